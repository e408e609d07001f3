"""The V100's entry: the committed file is what the code gives, and says of every figure where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed.v100 import DECODER, VISION, entry, entry_text, main
from benchmarks.speed.v100 import shapes as shapes_of_study
from benchmarks.speed.weights import Shapes
from lite.bench.cards import V100_ENTRY, read_reference_card
from lite.config import DecoderConfig


def test_the_committed_file_is_what_the_code_gives() -> None:
    assert V100_ENTRY.read_text(encoding="utf-8") == entry_text(), "run: python -m benchmarks v100 --out"


def test_nothing_is_called_measured_and_all_have_an_origin() -> None:
    figures = json.loads(V100_ENTRY.read_text(encoding="utf-8"))["figures"]
    kinds = {name: figure["kind"] for name, figure in figures.items()}
    assert set(kinds.values()) == {"published", "modelled"}
    for name, figure in figures.items():
        assert set(figure) == {"value", "unit", "kind", "source"}
        assert figure["source"]
        # Seconds, bytes and tokens can only be modelled as long as nobody has published any.
        assert (figure["unit"] == "fraction") == (figure["kind"] == "published"), name


def test_the_published_figures_are_those_of_the_papers() -> None:
    figures = entry().figures
    published = {name: 100 * figure.value for name, figure in figures.items() if figure.kind == "published"}
    assert published == pytest.approx(
        {
            "chexbert_f1_micro_14": 57.3,
            "chexbert_f1_micro_5": 57.4,
            "chexbert_f1_macro_14": 39.5,
            "chexbert_f1_macro_5": 47.7,
            "radgraph_f1": 29.4,
            "bleu_4": 16.1,
            "rouge_l": 30.8,
        }
    )
    assert all("later paper" in figure.source for figure in figures.values() if figure.kind == "published")


def test_the_modelled_figures_are_bytes_and_operations_over_the_card() -> None:
    figures = entry().figures
    nbytes = 13.214e9 + 1470 * 524_288
    assert figures["decode_token_s"].value == pytest.approx(nbytes / (0.6 * 900e9), rel=1e-3)
    assert figures["decode_tokens_per_s_at_most"].value == pytest.approx(900e9 / nbytes, rel=1e-3)
    assert figures["prefill_s"].value == pytest.approx(18.9e12 / (0.5 * 112e12), rel=1e-2)
    assert "0.6 × 900 GB/s" in figures["decode_token_s"].source
    assert "0.5 × 112 TFLOP/s" in figures["prefill_s"].source


def test_the_shapes_are_those_of_the_synthetic_checkpoint() -> None:
    shapes = Shapes()
    assert DecoderConfig.from_hf(shapes.config(32)) == DECODER
    assert (VISION.image_size, VISION.tower.hidden_size) == (shapes.image_size, shapes.tower_dim)
    assert VISION.tower.num_hidden_layers == shapes.tower_depth - 1
    assert VISION.num_image_tokens == (VISION.image_size // 14) ** 2
    # 86.58 M parameters less a block of 7.1 M, and the projector.
    assert shapes_of_study().vision_bytes == pytest.approx(2 * (86.58e6 - 7.09e6 + 19.92e6), rel=2e-3)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out == entry_text()
    out = tmp_path / "entry.json"
    assert main(["--out", str(out)]) == 0
    assert read_reference_card(out).figures.keys() == entry().figures.keys()
    assert main(["--out", str(out / "entry.json")]) == 1, "a file is no folder"
    assert "error: " in capsys.readouterr().err
