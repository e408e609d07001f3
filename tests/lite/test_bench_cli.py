"""What the command line of `lite.bench` refuses, and what it takes when it is not told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_command import bench, write_list

from lite.artifact.open import Artifact
from lite.bench import __main__ as cli
from lite.bench.quality import NO_REPORTS, NOT_ENGLISH, Clinical, against_reports
from lite.bench.results import Draft, ReportQuality


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-folder", "--data", "{tmp}/list.json"), "got a path that does not exist"),
        (("{artifact}", "--data", "{tmp}/none.json"), "got a file that cannot be read"),
        (("{artifact}", "--data", "{tmp}"), "got a folder · expected a JSON list of studies"),
        (("{artifact}", "--data", "{tmp}/empty.json"), "got no list, or an empty one"),
        (("{artifact}", "--data", "{tmp}/list.json", "--reference", "{tmp}/none"), "none.json: got"),
        (("{artifact}", "--data", "{tmp}/list.json", "--reference", "{artifact}"), "got an artifact · expected a ref"),
        (
            ("{artifact}", "--data", "{tmp}/list.json", "--html", "{tmp}/list.json/r.html"),
            "expected a place that can be",
        ),
        (("{artifact}", "--data", "{tmp}/list.json", "--chexbert", "{tmp}/none.pth"), "none.pth: got no such file"),
        (("{artifact}", "--data", "{tmp}/list.json", "--chexbert", "{tmp}/bad.pth"), "bad.pth: got"),
        (
            ("{artifact}", "--data", "{tmp}/list.json", "--reference", "x", "--max-new-tokens", "9"),
            "expected one of them",
        ),
        (("{artifact}", "--data", "{tmp}/gone.json", "--device", "cpu"), "got 1 of 1 films that are not there"),
        (("{artifact}", "--data", "{tmp}/list.json", "--engine", "onnx"), "got an artifact without decoder.onnx"),
        (
            ("{artifact}", "--data", "{tmp}/list.json", "--engine", "torch", "--provider", "cpu"),
            "got provider 'cpu' for the torch engine",
        ),
        (
            ("record", "{artifact}", "--data", "{tmp}/list.json", "--out", "{tmp}/r", "--engine", "onnx"),
            "got an artifact without decoder.onnx",
        ),
        (("record", "{artifact}", "--data", "{tmp}/gone.json", "--out", "{tmp}/r"), "got 1 of 1 films"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, tiny_artifact: Artifact, films: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_list(tmp_path, films[:1])
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "vocab.txt").write_text("[PAD]")
    (tmp_path / "gone.json").write_text(json.dumps([{"id": "1", "image": "gone.png"}]))
    places = {"artifact": str(tiny_artifact.path), "tmp": str(tmp_path)}
    status, _, err = bench(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 1
    assert message in err


@pytest.mark.parametrize(
    "arguments", [("--batch-sizes", "1,0"), ("--memory-limit", "lots"), ("--runs", "-1"), ("--no-such-flag",), ()]
)
def test_wrong_use(arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(tmp_path), *(("--data", "list.json") if arguments else ()), *arguments])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_reports_that_are_empty_are_none() -> None:
    assert against_reports([""], [Draft(id="s0", text="Clear.")], Clinical()) is NO_REPORTS
    german = "Keine Ergüsse, kein Pneumothorax. Das Herz ist nicht vergrößert, die Lunge ist frei."
    drafts = [Draft(id=f"s{number}", text="The lungs are clear.") for number in (0, 1)]
    assert against_reports([german], drafts[:1], Clinical()) is NOT_ENGLISH
    mixed, english = (
        against_reports([report, "Clear lungs. No effusion."], drafts, Clinical()) for report in (german, "")
    )
    assert isinstance(mixed, ReportQuality)
    assert mixed == english
