"""The table of torch beside onnx: what its figures are taken of, and that both engines really compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lite
from benchmarks import demo
from benchmarks.quality import engines
from benchmarks.quality import formats as quantisation
from benchmarks.quality.engines import ENGINES, PAIRS, compare_engines, main
from lite.artifact.open import Artifact
from lite.eval.labels import read_labels
from lite.studies.study import Study

EOS = 2
VOCAB = 12


def test_both_engines_draft_films_of_their_own_and_the_table_says_how_far_they_agree(
    demo_onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = [str(demo_onnx_artifact.path), "--films", "2", "--seed", "7", "--json", str(figures)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert [engine["name"] for engine in found["engines"]] == list(ENGINES)
    assert [(pair["candidate"], pair["yardstick"]) for pair in found["pairs"]] == list(PAIRS)
    torch_int8_to_float, to_torch, _, int8_to_float = (pair["divergence"] for pair in found["pairs"])
    # Two engines, and two caches of each: near, and not the same twice.
    assert 0 < to_torch["mean_kl"]["value"] < 2e-3
    assert 0 < int8_to_float["mean_kl"]["value"] < 1e-3
    assert 0 < torch_int8_to_float["mean_kl"]["value"] < 1e-3
    assert all(engine["decode_tokens_per_s"] > 1 and engine["total_s"] > 0 for engine in found["engines"])
    assert "| onnx-int8-cache  | onnx " in printed
    assert f"- Artifact: {demo_onnx_artifact.id} (gptq-int4" in printed
    assert f"engines {' '.join(arguments)}." in printed


class Model:
    """An engine that says what it is told, in as many seconds as it is told."""

    def __init__(self, name: str, log: list[tuple[str, str]], texts: dict[str, str], step_s: float) -> None:
        self.name, self.log, self.texts, self.step_s = name, log, texts, step_s
        manifest = SimpleNamespace(
            decoding=SimpleNamespace(eos_token_id=EOS), decoder=SimpleNamespace(describe=lambda: "gptq-int4")
        )
        self.artifact = SimpleNamespace(id="1234", manifest=manifest)
        self.scored: list[tuple[str, tuple[int, ...]]] = []

    def findings(self, image: Path, _: str | None) -> Any:
        # The first film warms up: it takes a hundred times as long.
        slow = 1 if (self.name, image.name) in self.log else 100
        self.log.append((self.name, image.name))
        step_s = self.step_s * (slow if image.name == "0" else 1)
        text = self.texts[image.name]
        return SimpleNamespace(
            text=text,
            token_ids=tuple(3 + len(word) for word in text.split()),
            finish_reason="length" if image.name == "2" else "eos",
            timings=SimpleNamespace(decode_steps_s=(step_s, step_s), prefill_s=3 * step_s, total_s=10 * step_s),
        )

    def score(self, image: Path, token_ids: tuple[int, ...], _: str | None) -> np.ndarray:
        self.scored.append((image.name, token_ids))
        logits = np.zeros((len(token_ids), VOCAB), dtype=np.float32)
        # onnx finds the third token of the first film's text odd.
        logits[np.arange(len(token_ids)), token_ids] = 9.0
        if image.name == "0" and self.name == "onnx":
            logits[2] = -logits[2]
        return logits


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Model]:
    same = {"0": "Small left effusion .", "1": "Large heart .", "2": "Clear lungs ."}
    other = same | {"1": "Normal heart ."}
    log: list[tuple[str, str]] = []
    made = {
        "torch": Model("torch", log, same, 0.02),
        "torch-int8-cache": Model("torch-int8-cache", log, same, 0.02),
        "onnx": Model("onnx", log, same, 0.01),
        "onnx-int8-cache": Model("onnx-int8-cache", log, other, 0.005),
    }
    by_options = {tuple(sorted(options.items())): made[name] for name, options in ENGINES.items()}
    monkeypatch.setattr(lite, "load", lambda _, **options: by_options[tuple(sorted(options.items()))])
    return made


def test_figures_are_of_the_films_and_the_yardsticks_texts(models: dict[str, Model]) -> None:
    studies = [Study(id=name, image=Path(name), reason=None) for name in "012"]
    truth = [read_labels(text) for text in ("Small left effusion.", "Large heart.", "Clear lungs.")]
    compared = compare_engines(Path("artifact"), studies, truth)
    # In turns, film by film, and the first film twice.
    assert models["torch"].log == [(name, film) for film in "0012" for name in ENGINES]
    torch, _, onnx, int8 = compared.engines
    assert compared.engine("onnx") is onnx
    assert (torch.decode_tokens_per_s, onnx.decode_tokens_per_s) == (pytest.approx(50), pytest.approx(100))
    assert (torch.prefill_s, torch.total_s) == (pytest.approx(0.06), pytest.approx(0.2))
    assert torch.label_f1.value == onnx.label_f1.value == 1.0
    assert int8.label_f1.value < 1.0
    _, to_torch, int8_to_torch, int8_to_onnx = compared.pairs
    assert compared.pair("onnx-int8-cache", "onnx") is int8_to_onnx
    assert (to_torch.same_text.value, to_torch.rouge_l.value) == (1.0, 1.0)
    assert int8_to_torch.same_text.value == int8_to_onnx.same_text.value == pytest.approx(2 / 3)
    assert int8_to_torch.rouge_l.value < 1.0
    # Films 0 and 1 end with EOS, film 2 is cut. One token of onnx's twelve is another, in one film of three.
    assert to_torch.divergence.num_tokens == 5 + 4 + 3
    assert to_torch.divergence.same_top.value == pytest.approx(11 / 12)
    # KL(torch ‖ onnx), and not the other way round: torch gives that token p, onnx q, and both the rest evenly.
    p, q = (np.exp(logit) / (np.exp(logit) + VOCAB - 1) for logit in (9, -9))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert to_torch.divergence.mean_kl.value == pytest.approx(kl / 12)
    assert (to_torch.divergence.first_divergent_token.value, to_torch.divergence.first_divergent_token.count) == (2, 1)
    # The int8 cache is asked along both yardsticks' texts, which are the same here, and torch only along its own.
    assert len(models["torch"].scored) == 3
    assert len(models["onnx-int8-cache"].scored) == 6
    assert models["torch"].scored[0] == ("0", (8, 7, 11, 4, EOS))
    assert models["torch"].scored[2] == ("2", (8, 8, 4))


def test_the_tables_say_how_many_and_where(models: dict[str, Model]) -> None:
    studies = [Study(id=name, image=Path(name), reason=None) for name in "012"]
    lines = engines.format_tables(compare_engines(Path("artifact"), studies, [read_labels("")] * 3)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[2][:4] == ["torch-int8-cache", "torch", "100.0% (3 of 3)", "– (of 0)"]
    assert cells[3][:4] == ["onnx", "torch", "100.0% (3 of 3)", "2 (of 1)"]
    assert cells[4][:4] == ["onnx-int8-cache", "torch", "66.7% (2 of 3)", "– (of 0)"]
    assert [row[0] for row in cells[-4:]] == list(ENGINES)
    assert cells[-4][2:] == ["50", "60.0", "0.200"]


def test_an_artifact_without_decoder_onnx_is_an_error(
    demo_int4_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo_int4_artifact.path), "--films", "1"]) == 1
    assert "got an artifact without decoder.onnx" in capsys.readouterr().err
    for wrong in ([], [str(demo_int4_artifact.path), "--films", "0"]):
        with pytest.raises(SystemExit, match="^2$"):
            main(wrong)


def test_no_other_set_has_these_films() -> None:
    others = {demo.SEED, demo.CALIBRATION_SEED, quantisation.SEED, quantisation.CALIBRATION_SEED, 20_261_301}
    assert engines.SEED not in others
