"""All layers from fewer: the whole way at small widths, and what each step is asked for."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from random_checkpoint import SMALL

from benchmarks.speed import depth, synthetic
from benchmarks.speed.depth import main, measure_depth, report_of
from benchmarks.speed.synthetic import write_checkpoint
from lite.errors import LiteError


def test_one_depth_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["--layers", "2", "2"])
    assert "one point gives no line" in capsys.readouterr().err


def test_a_table_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "QUANTITIES", {"load, s": lambda row: row["load_s"]})
    report = report_of({1: {"load_s": 3.0}, 2: {"load_s": 5.0}, 4: {"load_s": 9.0}})
    assert list(report.lines[0].values()) == ["load, s", "3", "5", "9", "2", "1", "~65", "+0.0%"]
    assert report.figures["lines"]["load, s"]["32"] == pytest.approx(65.0)
    lines = [
        report_of({1: {"load_s": 3.0}, 2: {"load_s": 5.0}, **more}).lines[0] for more in ({}, {4: {"load_s": 18.0}})
    ]
    assert [line["the deepest foretold"] for line in lines] == ["–", "-50.0%"]


@pytest.mark.full
def test_the_whole_way_at_small_widths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(depth, "write_checkpoint", functools.partial(write_checkpoint, shapes=SMALL))
    file = tmp_path / "depth.json"
    arguments = ["--layers", "1", "3", "--decoder", "fp16", "--device", "cpu"]
    assert main([*arguments, "--runs", "2", "--new-tokens", "3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "computed from the line through the depths, not measured" in shown
    assert shown.count(" ~") == len(depth.QUANTITIES) + 1
    section = json.loads(file.read_text())["sections"]["depth"]
    assert {row["engine"] for row in section["benches"].values()} == {"torch"}
    line = section["lines"]["decoder in memory, GB"]
    sizes = {depth: row["plan"]["decoder_bytes"] / 1e9 for depth, row in section["benches"].items()}
    assert line["each"] == pytest.approx((sizes["3"] - sizes["1"]) / 2, rel=1e-4)
    assert line["32"] == pytest.approx(sizes["1"] + 31 * line["each"], rel=1e-4)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_the_engine_is_that_of_export_and_bench(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(depth, "write_checkpoint", lambda *_, **__: None)
    for module in (depth, synthetic):
        monkeypatch.setattr(module, "measured_run", commands.append)
    (tmp_path / "bench.json").write_text('{"rows": [{}]}')
    options = depth._parser().parse_args(["--engine", engine])
    measure_depth(tmp_path, 1, options)
    export, bench = (" ".join(command) for command in commands)
    assert ("--engine onnx" in export) == (engine == "onnx")
    assert f"--engine {engine}" in bench


def fail(*_: object) -> None:
    raise LiteError("exit status 1: no room")


def test_a_step_that_fails_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(depth, "write_checkpoint", lambda out, **_: out.mkdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(synthetic, "measured_run", fail)
    assert main(["--layers", "1", "2", "--decoder", "fp16"]) == 1
    assert "error: exit status 1: no room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
