"""All layers from fewer: the line through the depths, and the whole way at small widths."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from random_checkpoint import SMALL

from benchmarks.speed import depth as full_depth
from benchmarks.speed.depth import fit, main
from benchmarks.speed.synthetic import write_checkpoint


def test_a_straight_line_is_found_and_foretells_the_deepest() -> None:
    line = fit([1, 2, 4], [13.0, 16.0, 22.0])
    assert (line.each, line.rest, line.at(32)) == pytest.approx((3.0, 10.0, 106.0))
    assert line.missed == pytest.approx(0.0)
    bent = fit([1, 2, 4], [13.0, 16.0, 44.0])
    assert bent.missed == pytest.approx(22 / 44 - 1)
    assert fit([1, 2], [13.0, 16.0]).missed is None


def test_one_depth_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--layers", "2", "2"])
    assert ended.value.code == 2
    assert "one point gives no line" in capsys.readouterr().err


def test_the_whole_way_at_small_widths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_depth, "write_checkpoint", functools.partial(write_checkpoint, widths=SMALL))
    file = tmp_path / "depth.json"
    arguments = ["--layers", "1", "3", "--decoder", "fp16", "--device", "cpu"]
    assert main([*arguments, "--runs", "2", "--new-tokens", "3", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "32 layers, computed" in shown
    assert "computed from the line through the depths, not measured" in shown
    assert shown.count(" ~") == len(full_depth.QUANTITIES)
    document = json.loads(file.read_text())
    assert {row["engine"] for row in document["rows"].values()} == {"torch"}
    line = document["lines"]["decoder in memory, GB"]
    sizes = {depth: row["plan"]["decoder_bytes"] / 1e9 for depth, row in document["rows"].items()}
    assert line["each"] == pytest.approx((sizes["3"] - sizes["1"]) / 2, rel=1e-6)
    assert line["32"] == pytest.approx(sizes["1"] + 31 * line["each"], rel=1e-6)


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_the_engine_is_that_of_export_and_bench(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(full_depth, "write_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(full_depth, "measured_run", commands.append)
    (tmp_path / "bench.json").write_text('{"rows": [{}]}')
    options = full_depth._parser().parse_args(["--engine", engine])
    full_depth.measure_depth(tmp_path, 1, options)
    export, bench = (" ".join(command) for command in commands)
    assert ("--engine onnx" in export) == (engine == "onnx")
    assert f"--engine {engine}" in bench


def test_a_step_that_fails_says_so_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_depth, "write_checkpoint", functools.partial(write_checkpoint, widths=SMALL))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["--layers", "1", "2", "--decoder", "fp16", "--device", "nonsense"]) == 1
    assert "error: exit status 1: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
