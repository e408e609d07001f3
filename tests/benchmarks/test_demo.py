"""The demo's own parts: what counts as agreement, and that texts fit their columns and the picture."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import lite
from benchmarks import demo
from benchmarks.exports import Source
from lite.eval.agreement import compare_findings
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

TRUTH = "Small left pleural effusion. Right upper zone consolidation. No pneumothorax."


@pytest.mark.parametrize(
    ("draft", "verdicts"),
    [
        (TRUTH, {"Pleural Effusion": "", "Consolidation": ""}),
        (
            "Small right pleural effusion. Right lower zone consolidation.",
            {"Pleural Effusion": "right, should be left", "Consolidation": "lower, should be upper"},
        ),
        (
            "Large left pleural effusion. Small left pneumothorax.",
            {"Pleural Effusion": "large, should be small", "Consolidation": "missed", "Pneumothorax": "not there"},
        ),
        (
            "Small left pleural effusion. Right upper zone consolidation. The heart is severely enlarged.",
            {"Pleural Effusion": "", "Consolidation": "", "Cardiomegaly": "not there"},
        ),
        (
            "Small pleural effusion. Right upper zone consolidation.",
            {"Pleural Effusion": "no side, should be left", "Consolidation": ""},
        ),
    ],
)
def test_agreement_is_by_label_side_zone_and_size(draft: str, verdicts: dict[str, str]) -> None:
    # Labels that follow from others, such as Lung Opacity from consolidation, are the labeller's business.
    found = {verdict.label: verdict.wrong for verdict in compare_findings(TRUTH, draft)}
    assert {label: wrong for label, wrong in found.items() if label != "Lung Opacity"} == verdicts


def test_the_size_of_a_heart_is_a_degree() -> None:
    (found,) = compare_findings("Moderate cardiomegaly.", "The heart is severely enlarged.")
    assert found == ("Cardiomegaly", "moderate", "severe, should be moderate")
    assert compare_findings("No edema.", "Large left pneumothorax.")[1] == ("Pneumothorax", "left, large", "not there")


def test_columns_fit_the_terminal_and_lose_no_word() -> None:
    left, right = TRUTH * 3, f"A longer word: hemopneumothorax. {TRUTH}"
    lines = list(demo._side_by_side(left, right, 80))
    assert max(map(len, lines)) <= 80
    columns = [" ".join(line.split("│")[index].strip() for line in lines).split() for index in (0, 1)]
    assert columns == [left.split(), right.split()]


def drafted(tmp_path: Path, text: str) -> demo.Drafted:
    film = tmp_path / "film.png"
    levels = np.full((64, 64), 200, dtype=np.uint8)
    levels[:8] = np.arange(64)  # a film has more than one
    Image.fromarray(levels).save(film)
    study = Study(film, "Cough.", id="1", reference=TRUTH)
    findings, fp16 = (
        cast("lite.Findings", SimpleNamespace(text=words, engine=engine, timings=SimpleNamespace(total_s=seconds)))
        for words, engine, seconds in ((text, "onnx", 0.5), (TRUTH, "torch", 1.5))
    )
    return demo.Drafted(study=study, findings=findings, fp16=fp16)


def test_fp16_stands_beside_in_as_few_words_as_that_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, other = drafted(tmp_path, TRUTH), drafted(tmp_path, "Small right pleural effusion.")
    demo._print_film(1, same, 110)
    demo._print_film(2, other, 110)
    first, second = capsys.readouterr().out.split("Film 2")
    assert "fp16 drafts: the same" in first
    assert f"fp16 drafts: {TRUTH}" in second.replace("\n  ", " ")
    assert "✓ Consolidation   ✓ Pleural Effusion" in first
    assert "✗ Pleural Effusion: right, should be left" in second
    score = demo._score([same, other])
    assert "2 of 4 findings agree" in score
    assert "4 of 4 in fp16; 1 of 2 texts are the same." in score
    # The films of a batch share its seconds.
    assert demo._who_drafted([same, other]) == "4 bits by onnx (0.25 s a film), fp16 by torch (0.75 s a film)"


def test_the_picture_grows_with_its_texts(tmp_path: Path) -> None:
    short, long = (drafted(tmp_path, TRUTH * times) for times in (1, 12))
    small = demo.draw_picture([short, short, short], "Not for clinical use.")
    large = demo.draw_picture([short, long, short], "Not for clinical use.")
    assert small.width == large.width
    assert small.height < large.height
    # Three films, the third alone in its row: grey where they are, paper where a fourth would be.
    half = small.height // 2
    assert small.width == demo._WIDTH
    columns = [2 * demo._GAP + demo._FILM // 2, 4 * demo._GAP + demo._CARD + demo._FILM // 2]
    # Paper to the last row: nothing is cut off, and nothing black is left below.
    assert {small.getpixel((x, small.height - 1)) for x in range(small.width)} == {demo._PAPER}
    for rows, expected in ((range(half), [True, True]), (range(half, small.height), [True, False])):
        assert [(200, 200, 200) in {small.getpixel((x, y)) for y in rows} for x in columns] == expected


def test_a_failed_export_ends_the_demo_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path / "out")
    monkeypatch.setattr(demo, "NUM_FILMS", 2)
    monkeypatch.setattr(demo, "NUM_CALIBRATION_FILMS", 3)
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", fail)
    assert demo.main([]) == 1
    assert "got exit code 1 from the export" in capsys.readouterr().err
    # Parity is measured on the films that the demo shows: they are there before the export.
    options = dict(zip(commands[0][3::2], commands[0][4::2], strict=False))
    assert len(read_studies(Path(options["--verify-data"]))) == int(options["--verify-studies"]) == 2
    # And calibrated on others.
    assert (options["--decoder"], options["--engine"]) == ("gptq-int4", "onnx")
    calibrated_on = {study.path.read_bytes() for study in read_studies(Path(options["--calibration-data"]))}
    assert len(calibrated_on) == 3
    assert not calibrated_on & {study.path.read_bytes() for study in read_studies(Path(options["--verify-data"]))}


def test_sizes_and_parity_of_the_export_are_shown_and_its_terms_are_not_said_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = "artifact: 0123\n  decoder   KL 4e-10 nats/token, same top token 100.00%\n\nTerms.\n\nnext:\n  type this"

    def succeed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, stdout=summary)

    monkeypatch.setattr(subprocess, "run", succeed)
    source = Source(verify=tmp_path / "studies.json", calibration=tmp_path / "others.json")
    demo._export(demo.FP16, source, tmp_path / "out" / "artifact")
    printed = capsys.readouterr().out
    assert "KL 4e-10 nats/token, same top token 100.00%" in printed
    assert f"--verify-data {tmp_path / 'studies.json'}" in printed
    assert "Terms." not in printed
    assert "next:" not in printed
