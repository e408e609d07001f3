"""Shares of attention, against those that transformers' own decoder returns, and the picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_folder import write_llama
from PIL import Image
from repository import CHECKPOINT
from torch.nn import functional

from benchmarks.quality.command import main
from benchmarks.quality.real.attention import Embedded, measure_shares, of_studies
from benchmarks.quality.real.decoder import EMBEDDINGS, LlamaFolder
from export.quantize.calibration import KINDS


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Path:
    return write_llama(tmp_path_factory.mktemp("attention") / "llama", tokenizer_model)


def test_shares_are_those_of_transformers(llama: Path) -> None:
    from transformers import LlamaForCausalLM

    decoder = LlamaFolder(llama)
    ids = [*decoder.prefix, *decoder.encode("The heart size is normal. The lungs are clear.")]
    theirs = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        attentions = theirs(torch.tensor([ids]), output_attentions=True).attentions
    expected = np.stack([layer[0].mean((0, 1)).numpy() for layer in attentions])

    def read_layer(index: int) -> tuple[dict[str, torch.Tensor], Any]:
        layer = decoder.read_layer(index)
        return layer, lambda name, x: functional.linear(x, layer[f"{name}.weight"])

    kinds = torch.tensor([0, *[1] * (len(ids) - 1)])
    read = Embedded(hidden=decoder.read(EMBEDDINGS)[torch.tensor(ids)], kinds=kinds)
    found = measure_shares(decoder.config, read_layer, [read, read], ("first", "other"))
    np.testing.assert_allclose(found.by_position, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.by_kind[:, 0], expected[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found.by_kind.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(found.positions_of_kind, [1 / len(ids), 1 - 1 / len(ids)])


def test_positions_of_a_study_are_of_four_kinds() -> None:
    name, found = of_studies(CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base", None)
    assert name == "llava-rad-phantom"
    assert found.kinds == KINDS
    np.testing.assert_allclose(found.by_kind.sum(1), 1, rtol=1e-6)
    shares = dict(zip(found.kinds, found.positions_of_kind, strict=True))
    # One BOS, and an image of 64 patches: a sequence is as long as either says.
    assert shares["image"] / shares["first"] == pytest.approx(64)
    assert 0 < shares["findings"] < shares["prompt"]


def test_the_command_draws_what_it_prints(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "shares.png"
    assert main(["attention", "--model", str(llama), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama: share of the attention that positions receive"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["of positions", "layer 0", "layer 1"]
    with Image.open(picture) as drawn:
        assert drawn.width > 800
        assert len(set(drawn.convert("L").get_flattened_data())) > 20


def test_half_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--checkpoint", "somewhere"]) == 1
    assert "got one of --checkpoint and --base" in capsys.readouterr().err
