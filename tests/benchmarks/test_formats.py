"""The table of decoder formats: what its rows ask of the exporter, how a child is measured, and one made for real."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import random_checkpoint

from benchmarks import exports
from benchmarks.exports import FP16, PHANTOM, Recipe, Source, measured_run
from benchmarks.quality import command
from benchmarks.quality.command import CALIBRATION_SEED, main
from benchmarks.quality.compare import Row, format_table
from benchmarks.quality.recipes import FORMATS, TRICKS, ablation
from export.options import export_parser
from lite.artifact.open import load_artifact
from lite.errors import LiteError
from lite.studies.sources.listed import read_studies

PYTHON = sys.executable


def test_peak_memory_is_the_childs_own() -> None:
    """The process that measures is far larger than the child, which must not be seen in the figure."""
    filled = bytearray(b"x") * (400 << 20)
    idle = measured_run([PYTHON, "-c", "pass"])
    del filled
    busy = measured_run([PYTHON, "-c", "import time; filled = bytearray(b'x') * (150 << 20); time.sleep(0.2)"])
    assert idle.peak_rss_bytes < 60e6
    assert 150 << 20 < busy.peak_rss_bytes < 220e6
    assert busy.seconds >= 0.2


def test_a_child_that_fails_tells_why() -> None:
    code = "import sys; print('working', file=sys.stderr); sys.exit('error: no such film')"
    with pytest.raises(LiteError, match="^exit status 1: error: no such film$"):
        measured_run([PYTHON, "-c", code])
    with pytest.raises(LiteError, match="^signal 9: it says nothing$"):
        measured_run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(LiteError, match="got no start.*no-such-command"):
        measured_run(["no-such-command"])


def test_every_row_is_one_command_of_the_exporter(tmp_path: Path) -> None:
    source = Source(
        checkpoint=tmp_path / "checkpoint",
        base=tmp_path / "base",
        verify=tmp_path / "held-out.json",
        calibration=tmp_path / "calibration.json",
        device="cpu",
    )
    recipes = (FP16, *FORMATS, *ablation())
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    assert len({recipe.options for recipe in FORMATS}) == len(FORMATS)
    for recipe in recipes:
        command = source.command(recipe, tmp_path / "out")
        assert command[:3] == [PYTHON, "-m", "export"]
        assert command[3 : 3 + len(recipe.options)] == list(recipe.options)
        export_parser().parse_args(command[3:])  # exits when the exporter does not know it
        named = dict(pairwise(command))
        assert (named["--checkpoint"], named["--base"]) == (str(tmp_path / "checkpoint"), str(tmp_path / "base"))
        assert named["--out"] == str(tmp_path / "out")
        # Only GPTQ sees films, and never those that it is measured on.
        assert ("--calibration-data" in named) == (named.get("--method") == "gptq")
        assert named.get("--calibration-data", "none") in ("none", str(source.calibration))


def test_the_ablation_adds_and_removes_one_trick_at_a_time() -> None:
    def used(recipe: Recipe) -> set[str]:
        text = " ".join(recipe.options)
        on = {trick.name for trick in TRICKS if " ".join(trick.on) in text and " ".join(trick.off) not in text}
        off = {trick.name for trick in TRICKS if " ".join(trick.off) in text}
        assert on | off == {trick.name for trick in TRICKS}
        return on

    rows = {recipe.name: used(recipe) for recipe in ablation()}
    names = [trick.name for trick in TRICKS]
    assert rows["plain"] == set()
    assert rows["full"] == set(names)
    for at, name in enumerate(names[:-1]):
        assert rows[f"plus-{name}"] == set(names[: at + 1])
        assert rows[f"full-without-{name}"] == set(names) - {name}
    # Full without the last trick is the row before full; all others are different exports.
    assert len(rows) == 2 * len(names) == len({frozenset(on) for on in rows.values()})


def test_a_failed_row_keeps_its_place_and_shows_its_error() -> None:
    lines = format_table([Row(name="fp16", error="out of memory"), Row(name="other", error="no such option")])
    assert [line.split("|")[1].strip() for line in lines.splitlines()[2:4]] == ["fp16", "other"]
    assert lines.splitlines()[-2:] == ["- fp16 failed: out of memory", "- other failed: no such option"]


@pytest.mark.full
def test_a_row_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference, a row that fails, and one that cannot lose, of a random checkpoint: it exports soonest."""
    nonsense = Recipe(name="nonsense", options=("--decoder", "int3"))
    again = Recipe(name="again", options=("--decoder", "fp16", "--verify-studies", "1"))
    monkeypatch.setattr(command, "FORMATS", (nonsense, again))
    checkpoint, base = random_checkpoint.write(tmp_path / "random")
    out = tmp_path / "out"
    places = ["--checkpoint", str(checkpoint), "--base", str(base), "--out", str(out), "--device", "cpu"]
    assert main(["formats", "--films", "2", "--calibration-films", "2", *places, "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    reference, failed, same = values["formats"]
    assert [row["name"] for row in (reference, failed, same)] == ["fp16", "nonsense", "again"]
    assert "exit status 2" in failed["error"]
    assert "invalid choice: 'int3'" in failed["error"]
    assert failed["figures"] is failed["loss"] is failed["cost"] is reference["loss"] is None
    assert same["loss"]["divergence"]["mean_kl"]["value"] == 0
    assert same["loss"]["same_text"]["value"] == 1
    for row in (reference, same):
        assert row["error"] is None
        artifact = load_artifact(out / "artifacts" / row["name"])
        assert row["figures"]["artifact_id"] == artifact.id
        assert row["cost"]["seconds"] > 0.5
        # An export loads torch: the figure is bytes, not KiB.
        assert row["cost"]["peak_rss_bytes"] > 100e6
    # It says what it was measured on.
    assert "ablation" not in values
    held_out, calibration = (read_studies(out / name / "studies.json") for name in ("held-out", "calibration"))
    assert (len(held_out), len(calibration)) == (2, 2)
    assert not {study.id for study in held_out} & {study.id for study in calibration}
    assert (
        f"2 films of seed {command.FORMATS_SEED}; calibrated on 2 films of seed {CALIBRATION_SEED}" in values["films"]
    )
    assert values["command"].startswith("python -m benchmarks quality formats --films 2 ")
    assert {"Python", "torch", "onnxruntime"} <= set(values["versions"])
    assert " of " in values["machine"]


def test_wrong_use_and_nothing_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["formats", "--only", "int3"])
    assert ended.value.code == 2
    few = ["formats", "--films", "1", "--calibration-films", "1", "--only", "fp16"]
    assert main([*few, "--seed", str(CALIBRATION_SEED)]) == 1
    assert "the films to calibrate on · expected other films" in capsys.readouterr().err
    # Without an fp16 artifact there is nothing to compare with.
    monkeypatch.setattr(exports, "measured_run", lambda _: measured_run([PYTHON, "-c", "exit('error: no weights')"]))
    assert main([*few, "--checkpoint", str(tmp_path), "--base", str(PHANTOM / "base")]) == 1
    assert "error: exit status 1: error: no weights" in capsys.readouterr().err
