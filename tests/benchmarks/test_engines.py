"""The table of torch beside onnx: what its figures are taken of, and that both engines really compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import demo
from benchmarks.quality import command
from benchmarks.quality.command import main
from benchmarks.quality.compare import Films, draft_in_turns, figures
from benchmarks.quality.engines import BESIDE, ENGINES, compare_engines
from lite.artifact.open import Artifact
from lite.eval.labels import read_labels
from lite.studies.study import Study

EOS = 2
VOCAB = 12


def test_both_engines_draft_films_of_their_own_and_the_table_says_how_far_they_agree(
    demo_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["engines", str(demo_onnx_artifact.path), "--films", "2", "--seed", "7", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == f"python -m benchmarks quality {' '.join(arguments)}"
    assert found["films"] == "2 of seed 7"
    torch, *rows = found["engines"]
    assert (torch["name"], torch["loss"]) == ("torch", None)
    pairs = [(name, reference) for reference, names in BESIDE.items() for name in names]
    assert [(row["name"], row["loss"]["reference"]) for row in rows] == pairs
    kl = {pair: row["loss"]["divergence"]["mean_kl"]["value"] for pair, row in zip(pairs, rows, strict=True)}
    # Two engines, and two caches of each: near, and not the same twice.
    assert 0 < kl["onnx", "torch"] < 2e-3
    assert 0 < kl["onnx-int8-cache", "onnx"] < 1e-3
    assert 0 < kl["torch-int8-cache", "torch"] < 1e-3
    assert all(row["figures"]["decode_tokens_per_s"] > 1 and row["figures"]["total_s"] > 0 for row in (torch, *rows))
    settings = [row["figures"]["setting"] for row in (torch, *rows)]
    assert len({setting.partition("), ")[0] for setting in settings}) == 1
    assert settings[3].startswith("gptq-int4 (groups of 128, calibrated on 64 studies of studies.json), ")
    assert settings[3].endswith("onnx, int8 cache")


class Model:
    """An engine that says what it is told, in as many seconds as it is told."""

    def __init__(self, name: str, log: list[tuple[str, str]], texts: dict[str, str], step_s: float) -> None:
        self.name, self.log, self.texts, self.step_s = name, log, texts, step_s
        parts = SimpleNamespace(decoder=SimpleNamespace(describe=lambda: "gptq-int4"))
        manifest = SimpleNamespace(decoding=SimpleNamespace(eos_token_id=EOS), parts=parts)
        self.artifact = SimpleNamespace(
            id="1234", path=Path(), manifest=manifest, decoder_config=lambda: SimpleNamespace(vocab_size=VOCAB)
        )
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
            engine=self.name,
            cache_dtype="float32",
            timings=SimpleNamespace(
                batch_size=1, decode_steps_s=(step_s, step_s), prefill_s=3 * step_s, total_s=10 * step_s
            ),
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
def models() -> dict[str, Any]:
    same = {"0": "Small left effusion .", "1": "Large heart .", "2": "Clear lungs ."}
    log: list[tuple[str, str]] = []
    paces = {"torch": 0.02, "torch-int8-cache": 0.02, "onnx": 0.01, "onnx-int8-cache": 0.005}
    made: dict[str, Any] = {name: Model(name, log, same, pace) for name, pace in paces.items()}
    made["onnx-int8-cache"].texts = same | {"1": "Normal heart ."}
    return made


def test_figures_are_of_the_films_and_the_references_texts(models: dict[str, Any]) -> None:
    studies = tuple(Study(Path(name), id=name) for name in "012")
    truth = tuple(read_labels(text) for text in ("Small left effusion.", "Large heart.", "Clear lungs."))
    films = Films(studies=studies, truth=truth)
    drafts = draft_in_turns(models, studies)
    losses = compare_engines(models, drafts, films)
    # In turns, film by film, and the first film twice.
    assert models["torch"].log == [(name, film) for film in "0012" for name in ENGINES]
    torch, _, onnx, int8 = (figures(found, truth) for found in drafts.values())
    assert (torch.decode_tokens_per_s, onnx.decode_tokens_per_s) == (pytest.approx(50), pytest.approx(100))
    assert (torch.prefill_s, torch.total_s) == (pytest.approx(0.06), pytest.approx(0.2))
    assert torch.micro_f1.value == onnx.micro_f1.value == 1.0
    assert int8.micro_f1.value < 1.0
    to_torch = losses["onnx", "torch"]
    assert (to_torch.same_text.value, to_torch.rouge_l.value) == (1.0, 1.0)
    for reference in ("torch", "onnx"):
        lost = losses["onnx-int8-cache", reference]
        assert lost.same_text.value == pytest.approx(2 / 3)
        assert lost.rouge_l.value < 1.0
    # Films 0 and 1 end with EOS, film 2 is cut. One token of onnx's twelve is another, in one film of three.
    assert to_torch.divergence.num_tokens == 5 + 4 + 3
    assert to_torch.divergence.same_top.value == pytest.approx(11 / 12)
    # KL(torch ‖ onnx), and not the other way round: torch gives that token p, onnx q, and both the rest evenly.
    p, q = (np.exp(logit) / (np.exp(logit) + VOCAB - 1) for logit in (9, -9))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert to_torch.divergence.mean_kl.value == pytest.approx(kl / 12)
    assert (to_torch.divergence.first_divergent_token.value, to_torch.divergence.first_divergent_token.count) == (2, 1)
    # The int8 cache is asked along both references' texts, which are the same here, and torch only along its own.
    assert len(models["torch"].scored) == 3
    assert len(models["onnx-int8-cache"].scored) == 6
    assert models["torch"].scored[0] == ("0", (8, 7, 11, 4, EOS))
    assert models["torch"].scored[2] == ("2", (8, 8, 4))


def test_an_artifact_without_decoder_onnx_is_an_error(
    demo_int4_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engines", str(demo_int4_artifact.path), "--films", "1"]) == 1
    assert "got an artifact without decoder.onnx" in capsys.readouterr().err
    for wrong in ([], ["engines"], ["engines", str(demo_int4_artifact.path), "--films", "0"]):
        with pytest.raises(SystemExit, match="^2$"):
            main(wrong)


def test_no_other_set_has_these_films() -> None:
    others = {demo.SEED, demo.CALIBRATION_SEED, command.FORMATS_SEED, command.CALIBRATION_SEED, 20_261_301}
    assert command.ENGINES_SEED not in others
