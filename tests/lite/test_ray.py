"""`lite run --ray`: what workers commit comes into the journal once; a real local Ray of two workers, and kills.

pip install -c constraints.txt 'llava-rad-lite[ray]'     for the last test: Ray takes 330 MB
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from repository import ROOT

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cohort.committed import Committed
from lite.cohort.run import DRAFTING, Extras
from lite.cohort.worker import Drafter, Work
from lite.errors import LiteError
from lite.studies.journal import Journal
from lite.studies.results import read_results
from lite.studies.study import Study

REQUEST = dict(zip(DRAFTING, (2, "mimic-cxr-jpg", False, None), strict=True))
ODD = "é\udc41"  # as a file's name may be


class Place:
    """Studies, the journal that they go into, and what a worker does with them, without Ray."""

    def __init__(self, folder: Path, artifact: Artifact, films: list[Path]) -> None:
        bad = folder / "bad.png"
        bad.write_bytes(b"no film")
        self.studies = [Study(str(film), "Cough.", id=f"s{n}", row={"n": n}) for n, film in enumerate(films[:3])]
        self.studies += [Study(str(bad), id="bad"), Study(str(films[3]), id=ODD)]
        self.journal = folder / "out" / "results.jsonl"
        self.work = Work(artifact=str(artifact.path), artifact_id=artifact.id, options={"device": "cpu"},
                         request=REQUEST, batch_size=2, folder=str(folder))  # fmt: skip
        self.told: list[str] = []

    def open(self) -> Journal:
        return Journal(self.journal, self.studies, artifact_id=self.work.artifact_id, request=REQUEST)

    def committed(self, journal: Journal) -> Committed:
        texts = Extras(text_dir=self.journal.parent / "texts")
        return Committed(journal, self.studies, artifact_id=self.work.artifact_id, request=REQUEST, extras=texts,
                         told=lambda study, _: self.told.append(study.id))  # fmt: skip

    def draft(self, folder: Path, drafter: Drafter) -> None:
        """Do as Ray does: a block a file, its lines a file, and then the mark that it is whole."""
        for block in sorted((folder / "studies").iterdir()):
            rows = [json.loads(line) for line in block.read_text().splitlines()]
            made = drafter({name: [row[name] for row in rows] for name in rows[0]})
            lines = [json.dumps(dict(zip(made, row, strict=True))) for row in zip(*made.values(), strict=True)]
            (folder / "lines" / block.name).write_text("\n".join(lines) + "\n")
            (folder / "committed" / f"{block.stem}.parquet").touch()


@pytest.fixture
def place(tmp_path: Path, tiny_artifact: Artifact, films: list[Path]) -> Place:
    return Place(tmp_path, tiny_artifact, films)


def test_what_is_committed_comes_into_the_journal_once(place: Place) -> None:
    with place.open() as journal:
        committed = place.committed(journal)
        folder = committed.prepare(0, 2)
        place.draft(folder, Drafter(place.work))
        marks = sorted((folder / "committed").iterdir())
        assert len(marks) == 3
        marks[1].rename(marks[1].with_name(f"{marks[1].stem}.pending.parquet"))
        torn = folder / "lines" / f"{marks[0].stem}.json"
        torn.write_bytes(torn.read_bytes()[:-100])
        committed.take()  # the first of the torn file, and the third block; the killed writer's is none
        assert place.told == ["s0", ODD]
        assert list(committed.left) == ["s1", "s2", "bad"]
        place.draft(committed.prepare(1, 9), Drafter(place.work))
        marks[0].touch()
        torn.write_text("")
    with place.open() as journal:  # the driver was killed, and starts again: failures are tried again
        committed = place.committed(journal)
        committed.take(failures=False)
        assert list(committed.left) == ["bad"]
        place.draft(committed.prepare(2, 1), Drafter(place.work))
        committed.take()
        committed.take()
        committed.clear()
    assert sorted(place.told) == sorted(study.id for study in place.studies)
    results = {result.study.id: result for result in read_results(place.journal)}
    assert [r for r, result in results.items() if result.error] == ["bad"]
    assert results["s2"].study.row == {"n": 2}
    assert results["s2"].request == REQUEST
    assert sorted(p.name for p in place.journal.parent.iterdir()) == ["results.jsonl", "texts"]
    assert len(list((place.journal.parent / "texts").iterdir())) == 4


def test_lines_of_other_settings_are_none_and_workers_that_cannot_draft_say_why(
    place: Place, tmp_path: Path, tiny_gptq_artifact: Artifact
) -> None:
    for change, message in (
        (
            {"artifact": str(tmp_path / "none")},
            "got no such folder on the node .* · expected the artifact, by the same",
        ),
        ({"version": "0.0"}, "got llava-rad-lite .* · expected 0.0 · install it on all nodes"),
        ({"artifact": str(tiny_gptq_artifact.path)}, "got the artifact .* on the node .* · expected"),
    ):
        with place.open() as journal:
            committed = place.committed(journal)
            place.draft(committed.prepare(0, 9), Drafter(replace(place.work, **change)))  # type: ignore[arg-type]
            with pytest.raises(LiteError, match=message):
                committed.take()
            committed.take(failures=False)
            committed.clear()
    with place.open() as journal:
        committed = place.committed(journal)
        other = replace(place.work, request=REQUEST | {"max_new_tokens": 3})
        place.draft(committed.prepare(0, 9), Drafter(other))
        committed.take(failures=False)  # of a run that was killed, with other settings
        assert not place.told
        committed.give_up()
    assert {str(result.error).split(" · ")[1] for result in read_results(place.journal)} == {"expected its findings"}


def test_without_ray_it_says_so_and_no_other_run_needs_it(
    tiny_artifact: Artifact, films: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "lite.cohort.ray_run", raising=False)
    command = ["run", str(tiny_artifact.path), str(films[0]), "--out", str(tmp_path / "out"), "--device", "cpu", "-q"]
    assert main([*command, "--max-new-tokens", "1", "--ray"]) == 1
    assert "expected it here and on all nodes · pip install 'llava-rad-lite[ray]'" in capsys.readouterr().err
    assert main([*command, "--max-new-tokens", "1"]) == 0


NUM_STUDIES = 120


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray: pip install 'llava-rad-lite[ray]'")
@pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes in /proc")
def test_killed_drivers_and_workers_leave_each_study_once(
    tiny_artifact: Artifact, films: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no film")
    entries = [{"id": f"s{n}", "image": str(films[n % 5])} for n in range(NUM_STUDIES)]
    entries[5] = {"id": "bad", "image": str(tmp_path / "bad.png")}
    entries[7]["id"] = ODD
    (tmp_path / "list.json").write_text(json.dumps(entries))
    out = tmp_path / "results.jsonl"
    # Two workers on two cores; the models are tiny, so that they are asked for many tokens.
    command = [sys.executable, "-m", "lite", "run", str(tiny_artifact.path), str(tmp_path / "list.json"), "--out"]
    command += [str(out), "--device", "cpu", "--batch-size", "1", "--max-new-tokens", "30", "--ray", "--ray-cores", "1"]
    said = tmp_path / "said"

    def run(victim: Callable[[int], int | None]) -> int:
        """Start it, and kill something of it once that has got on."""
        with said.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as driver:
            until, before = time.monotonic() + 300, None
            while (process := victim(driver.pid)) is None or before is None or num_lines(out) <= before:
                before = num_lines(out) if before is None and process is not None else before
                assert driver.poll() is None, said.read_text()
                assert time.monotonic() < until
                time.sleep(0.05)
            assert num_lines(out) < NUM_STUDIES
            os.kill(process, signal.SIGKILL)
            return int(driver.wait(timeout=300))

    assert run(lambda driver: driver) == -signal.SIGKILL
    first = out.read_bytes()
    assert run(worker_of) == 1, said.read_text()
    assert f"{NUM_STUDIES - 1} of {NUM_STUDIES} studies are drafted in {out}, 1 failed" in said.read_text()
    ids = Counter(json.loads(line)["id"] for line in out.read_text().splitlines())
    assert ids == Counter(entry["id"] for entry in entries)
    assert [result.study.id for result in read_results(out) if result.error] == ["bad"]
    kept = [line for line in first.splitlines(keepends=True) if b'"error"' not in line]
    assert out.read_bytes().startswith(b"".join(kept))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".png") == ["list.json", out.name, "said"]


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def worker_of(driver: int) -> int | None:
    """Find a process that drafts: Ray's own process is a child of the driver, and the workers are that one's."""
    parents: dict[int, int] = {}
    workers: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if entry.name.isdecimal():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                workers += [int(entry.name)] if b"(Drafter)" in (entry / "cmdline").read_bytes() else []
    return next((pid for pid in workers if parents.get(parents[pid]) == driver), None)
