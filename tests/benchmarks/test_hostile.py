"""Hostile inputs: what is called a failure, that a seed is an input, and that exports bear being killed."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import random_checkpoint
from exported import made_once

import export.adapter
import export.pipeline  # noqa: F401 - in this process, so that no fork of it has to
from benchmarks.hostile import child
from benchmarks.hostile.child import MARK, Watch
from benchmarks.hostile.command import main, spoil
from benchmarks.hostile.kills import Cohort, Export
from benchmarks.hostile.kinds import KINDS, input_folder
from benchmarks.hostile.material import Material
from benchmarks.phantom.write import write_studies
from lite.artifact.open import Artifact
from lite.errors import LiteError


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret").write_text("secret")
    return Watch(outside)


@pytest.fixture(scope="module")
def material(demo_artifact: Artifact, adapted_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("hostile")
    studies = write_studies(folder / "studies", count=2, seed=1, dicom=True)
    (folder / "predictions.jsonl").write_text('{"id": "1", "query": "What?", "prediction": "Clear lungs."}\n')
    return Material(
        artifact=demo_artifact.path,
        adapted=adapted_artifact.path,
        studies=studies,
        predictions=folder / "predictions.jsonl",
    )


def refuse() -> None:
    raise LiteError("got this · expected that · do so")


def hang_in_c() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    time.sleep(60)


HARM: dict[str, Callable[[Watch], object]] = {
    "ValueError": lambda watch: int("x"),  # noqa: ARG005
    "SIGSEGV": lambda watch: os.kill(os.getpid(), signal.SIGSEGV),  # noqa: ARG005
    "without a word": lambda watch: os._exit(3),  # noqa: ARG005
    "MemoryError": lambda watch: bytearray(2 * child.EXTRA_BYTES),  # noqa: ARG005
    "hangs": lambda watch: hang_in_c(),  # noqa: ARG005
    "os.system": lambda watch: os.system("true"),  # noqa: ARG005, S605
    "subprocess": lambda watch: subprocess.run(["true"], check=True),  # noqa: ARG005
    "socket": lambda watch: socket.getaddrinfo("127.0.0.1", 9),  # noqa: ARG005
    "names": lambda watch: Path(watch.outside, "secret").read_text(),
    "to write": lambda watch: Path(watch.outside).with_name("new").write_text(""),
    "os.mkdir": lambda watch: Path(watch.outside).with_name("made").mkdir(),
    "os.link": lambda watch: Path(watch.outside, "link").hardlink_to(Path(watch.outside, "secret")),
    "was run": lambda watch: sys.modules.setdefault(MARK, sys),  # noqa: ARG005
}


@pytest.mark.parametrize("harm", HARM)
def test_what_is_neither_read_nor_refused_is_a_failure(
    harm: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "SECONDS", 1)
    outcome = watch.read(lambda: HARM[harm](watch))
    assert outcome.ending == "failure"
    assert harm in outcome.why


def test_harm_that_is_done_in_secret_is_a_failure_all_the_same(watch: Watch) -> None:
    def caught() -> None:
        os.system("true")  # noqa: S605
        refuse()

    assert watch.read(caught).ending == "failure"


def test_what_is_read_or_refused_is_none(watch: Watch) -> None:
    assert watch.read(lambda: 1).ending == "read"

    def make_and_remove() -> None:
        Path(watch.inside, "made").mkdir()
        Path(watch.inside, "made", "file").write_text("")
        shutil.rmtree(Path(watch.inside, "made"))

    Path(watch.inside).mkdir()
    assert watch.read(make_and_remove) == child.Outcome("read")
    outcome = watch.read(refuse)
    assert (outcome.ending, outcome.why) == ("refused", "got this · expected that · do so")


def test_a_child_does_not_wait_for_threads_that_only_its_parent_has(watch: Watch) -> None:
    torch = pytest.importorskip("torch")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 22).sum()  # begins the threads
        assert watch.read(lambda: torch.ones(1 << 22).sum()).ending == "read"
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_an_input(kind: str, material: Material, tmp_path: Path) -> None:
    written = []
    for seed in (5, 5, 6):
        with input_folder(tmp_path) as folder:
            KINDS[kind](material, random.Random(f"{kind}:{seed}"), folder)
            written.append({path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()})
    assert written[0] == written[1]
    assert written[1] != written[2] or not written[0]


def test_inputs_of_every_kind_are_read_or_refused(material: Material, tmp_path: Path) -> None:
    counts = spoil(material, list(KINDS), range(3), tmp_path, ends=lambda: False)
    assert {kind: count.total for kind, count in counts.items()} == dict.fromkeys(KINDS, 3)
    assert {why for count in counts.values() for why in count.failures} == set()
    assert any(count.refused for count in counts.values())


def test_inputs_without_end_end_in_time(material: Material, tmp_path: Path) -> None:
    ended = iter([False, False, True])
    counts = spoil(material, ["reason", "studies"], itertools.count(), tmp_path, ends=lambda: next(ended))
    assert {kind: count.total for kind, count in counts.items()} == {"reason": 1, "studies": 1}


def test_an_export_is_killed_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "exports" / "artifact"
    source = made_once("small-checkpoint", random_checkpoint.write)
    arguments = ["--checkpoint", str(source / "llava-rad-phantom"), "--base", str(source / "base"), "--out", str(out)]
    export = Export("fp16", [*arguments, "--verify-studies", "1", "--verify-tokens", "4", "--quiet"], out)
    rng = random.Random(0)
    export.seconds *= 2  # now and then it comes to its end
    while export.killed.kills < 2 or not export.killed.finished:
        export.kill_once(rng)
    assert export.killed.failures == []
    export.whole = {"decoder": "other bytes"}
    while not export.killed.failures:
        export.kill_once(rng)
    assert "other content" in export.killed.failures[0]


def test_a_replay_that_names_no_input_is_refused(capsys: pytest.CaptureFixture[str], material: Material) -> None:
    from benchmarks.hostile.command import _replay

    with pytest.raises(LiteError, match="expected KIND:SEED"):
        _replay("film:x", material, Path("unused"))
    with pytest.raises(SystemExit):
        main(["--kinds", "films"])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.full
def test_a_cohort_is_killed_and_goes_on_to_the_same_results(
    tmp_path: Path, tiny_artifact: Artifact, films: list[Path]
) -> None:
    entries = [{"id": str(index), "image": str(film)} for index, film in enumerate(films)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    cohort = Cohort("run", tiny_artifact.path, tmp_path / "list.json", tmp_path / "run" / "results.jsonl")
    rng = random.Random(0)
    while cohort.killed.kills < 2 or not cohort.killed.finished:
        cohort.kill_once(rng)
    assert cohort.killed.failures == []
    cohort.run()
    whole = cohort.out.read_text()
    cohort.out.write_text(whole + whole.splitlines(keepends=True)[0])
    with pytest.raises(LiteError, match="twice"):
        cohort.found()
    cohort.out.write_text(whole.replace('"prediction": "', '"prediction": "x', 1))
    assert not cohort.is_on_its_way(cohort.found())
