"""Exports and cohorts killed at random points: what is there afterwards is whole, and going on gives the same.

    export ──kill -9──▶ nothing, or the whole artifact ──the same command──▶ … ──▶ the bytes of an export left alone
    run ──kill -9──▶ whole lines, none twice ──the same command──▶ … ──▶ the results of a run left alone

A program is its command line in a fork of this process, in which torch is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.demo import GPTQ_INT4
from benchmarks.exports import PHANTOM
from benchmarks.hostile.checkpoints import BASE, CHECKPOINT, HOSPITAL
from benchmarks.hostile.child import alone
from lite.artifact.open import load_artifact
from lite.errors import LiteError

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

_SOURCE: Final = ("--checkpoint", str(PHANTOM / "llava-rad-phantom"), "--base", str(PHANTOM / "base"))
_SECONDS: Final = 600  # no program here takes as long
_QUICK: Final = ("--verify-studies", "1", "--verify-tokens", "4", "--device", "cpu", "--quiet")


@dataclasses.dataclass(slots=True)
class Killed:
    """How a program has borne it."""

    name: str
    kills: int = 0
    finished: int = 0  # how often it came to its end, mostly after kills
    failures: list[str] = dataclasses.field(default_factory=list)


class Program:
    """A command line, what it makes when it is left alone, and how long that takes."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], out: Path) -> None:
        """Run it once.

        Args:
            name: what it is called.
            module: of the command line.
            arguments: of it.
            out: what it makes, or changes, in a folder of its own.
        """
        self.module, self.arguments, self.out = module, arguments, out
        self.killed = Killed(name)
        self.reset()
        started = time.perf_counter()
        status = self.run()
        self.seconds = time.perf_counter() - started
        if status:
            msg = f"got exit status {status} of a program that nobody killed · expected 0 · run it by hand: "
            raise LiteError(f"{msg}python -m {module} {' '.join(arguments)}")
        self.whole = self.found()
        self.reset()

    def found(self) -> Mapping[str, str] | None:
        """Return what is there; None: nothing.

        Raises:
            LiteError: it looks whole and is not.
        """
        raise NotImplementedError

    def is_on_its_way(self, found: Mapping[str, str] | None) -> bool:
        """Say whether what is there, and not all of it, may be there after a kill."""
        raise NotImplementedError

    def reset(self) -> None:
        """Put things back as they were before the first time."""
        for left in self.out.parent.glob("*"), self.out.parent.glob(".*"):
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.out.parent.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Run it to its end; return the exit status."""
        return self._wait(self._start())

    def kill_once(self, rng: random.Random) -> None:
        """Start or go on, kill it at a random point, and look at what is there."""
        child = self._start()
        time.sleep(rng.uniform(0, 1.2 * self.seconds))
        os.kill(child, signal.SIGKILL)
        if self._wait(child) == -signal.SIGKILL:
            self.killed.kills += 1
        try:
            found = self.found()
        except LiteError as error:
            self.killed.failures.append(f"looks whole and is not: {error}")
            self.reset()
            return
        if found == self.whole:
            self.killed.finished += 1
            self.reset()
        elif not self.is_on_its_way(found):
            self.killed.failures.append("other content than that of a program left alone")
            self.reset()

    def _start(self) -> int:
        child = os.fork()
        if child:
            return child
        import runpy

        status = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            alone()
            signal.alarm(_SECONDS)
            sys.argv = [self.module, *self.arguments]
            sys.modules.pop(f"{self.module}.__main__", None)  # it is to run anew
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(status)

    def _wait(self, child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Export(Program):
    """A command of the exporter: an artifact is there whole, or what was there before is."""

    def __init__(self, name: str, arguments: Sequence[str], out: Path, *, before: Path | None = None) -> None:
        """Run it once; `before` is what is at `out` before, None: nothing."""
        self.before = before
        super().__init__(name, "export", arguments, out)
        self.found_before = self.found()

    def reset(self) -> None:
        """Put things back as they were."""
        super().reset()
        if self.before is not None:
            shutil.copytree(self.before, self.out)

    def found(self) -> Mapping[str, str] | None:
        """Return the hashes of the artifact's files, compared with the files, and its id."""
        if not self.out.exists():
            return None
        artifact = load_artifact(self.out)
        artifact.verify()
        return {name: record.sha256 for name, record in artifact.manifest.files.items()} | {"id": artifact.id}

    def is_on_its_way(self, found: Mapping[str, str] | None) -> bool:
        """Say whether it is what was there before."""
        return found is None or found == self.found_before


class Cohort(Program):
    """`lite run`: each study that has a line is done, once, and has the text of a run left alone."""

    def __init__(self, name: str, artifact: Path, studies: Path, out: Path) -> None:
        """Run it once."""
        texts = ("--text-dir", str(out.parent / "texts"), "--batch-size", "2", "--max-new-tokens", "16")
        arguments = ("run", str(artifact), str(studies), "--out", str(out), *texts, "--device", "cpu", "--quiet")
        super().__init__(name, "lite", arguments, out)

    def found(self) -> Mapping[str, str] | None:
        """Return the texts by their studies.

        Raises:
            LiteError: a study is there twice, or without its text file.
        """
        lines = self.out.read_bytes().split(b"\n")[:-1] if self.out.exists() else []  # the last one may be torn
        texts: dict[str, str] = {}
        for line in lines:
            result = json.loads(line)
            if result["id"] in texts:
                raise LiteError(f"got {result['id']} twice · expected each study once · see lite.studies.journal")
            texts[result["id"]] = result["prediction"]
            if not (self.out.parent / "texts" / f"{result['id']}.txt").is_file():
                raise LiteError(f"got {result['id']} without its text · expected it first · see lite.cohort.run")
        return texts

    def is_on_its_way(self, found: Mapping[str, str] | None) -> bool:
        """Say whether all that is there belongs there."""
        return found is None or found.items() <= self.whole.items()  # type: ignore[union-attr]


def exports(work: Path, studies: Path) -> list[Export]:
    """Make the exports that are to be killed: fp16, gptq-int4, and decoder.onnx and an adapter for an artifact without.

    Args:
        work: a folder of theirs.
        studies: a list of phantoms, to calibrate on.
    """
    calibrated = (*GPTQ_INT4.options, "--calibration-data", str(studies))
    made = []
    for name, options in (("fp16", ("--decoder", "fp16")), ("gptq-int4", calibrated)):
        out = work / name / "artifact"
        made.append(Export(name, (*options, *_SOURCE, *_QUICK, "--out", str(out)), out))
    rounded = work / "rounded" / "artifact"
    without = (
        "--decoder",
        "gptq-int4",
        "--group-size",
        "64",
        "--method",
        "rtn",
        *_SOURCE,
        *_QUICK,
        "--out",
        str(rounded),
    )
    Export("rounded", without, rounded).run()
    out = work / "onnx" / "artifact"
    made.append(Export("onnx", ("onnx", str(out), *_QUICK), out, before=rounded))
    out = work / "adapter" / "artifact"
    sources = ("--base", str(BASE), "--published", str(CHECKPOINT), "--keep-anyway")
    command = ("adapter", str(HOSPITAL), "--artifact", str(out), "--name", "north", *sources, *_QUICK)
    made.append(Export("adapter", command, out, before=rounded))
    return made
