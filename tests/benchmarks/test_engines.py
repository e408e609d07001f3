"""The table of torch beside onnx: what its figures are taken of, and that both engines really compute."""

from __future__ import annotations

import json

import pytest

from benchmarks import demo
from benchmarks.quality import command
from benchmarks.quality.command import main
from benchmarks.quality.engines import BESIDE
from lite.artifact.open import Artifact


def test_both_engines_draft_films_of_their_own_and_the_table_says_how_far_they_agree(
    demo_onnx_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["engines", str(demo_onnx_artifact.path), "--films", "2", "--seed", "7", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == f"python -m benchmarks quality {' '.join(arguments)}"
    assert found["films"] == "2 of seed 7"
    tables = {reference: found[f"beside {reference}"] for reference in BESIDE}
    kl = {}
    for reference, (own, *others) in tables.items():
        assert (own["name"], own["loss"]) == (reference, None)
        assert [(row["name"], row["loss"]["reference"]) for row in others] == [
            (name, reference) for name in BESIDE[reference]
        ]
        kl |= {(row["name"], reference): row["loss"]["divergence"]["mean_kl"]["value"] for row in others}
    # Two engines, and two caches of each: near, and not the same twice.
    assert 0 < kl["onnx", "torch"] < 2e-3
    assert 0 < kl["onnx-int8-cache", "onnx"] < 1e-3
    assert 0 < kl["torch-int8-cache", "torch"] < 1e-3
    decoder = "gptq-int4 (groups of 128, calibrated on 64 studies of studies.json)"
    caches = ("torch, float32", "torch, int8", "onnx, float32", "onnx, int8")
    assert [row["figures"]["setting"] for row in tables["torch"]] == [f"{decoder}, {cache} cache" for cache in caches]


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
