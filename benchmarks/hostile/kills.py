"""Exports killed at random points: what is there afterwards is whole or not there, and going on gives the same bytes.

    export ──kill -9──▶ nothing, or the whole artifact ──the same command──▶ … ──▶ the bytes of an export left alone

An export is the exporter's command line in a fork of this process, in which torch is loaded.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.demo import GPTQ_INT4
from benchmarks.exports import PHANTOM
from benchmarks.hostile.child import alone
from lite.artifact.open import load_artifact
from lite.errors import ArtifactError, LiteError

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_SOURCE: Final = ("--checkpoint", str(PHANTOM / "llava-rad-phantom"), "--base", str(PHANTOM / "base"))
_SECONDS: Final = 600  # no export of the demo takes as long
_QUICK: Final = ("--verify-studies", "1", "--verify-tokens", "4", "--device", "cpu", "--quiet")


@dataclasses.dataclass(slots=True)
class Killed:
    """How an export has borne it."""

    name: str
    kills: int = 0
    finished: int = 0  # exports that came to their end, most of them after kills
    failures: list[str] = dataclasses.field(default_factory=list)


class Export:
    """A command of the exporter, what it makes when it is left alone, and how long that takes."""

    def __init__(self, name: str, arguments: Sequence[str], out: Path, *, before: Path | None = None) -> None:
        """Run it once.

        Args:
            name: what it is called.
            arguments: of `python -m export`.
            out: the artifact that it makes, or changes.
            before: what is at `out` before; None: nothing.
        """
        self.arguments, self.out, self.before = arguments, out, before
        self.killed = Killed(name)
        self.reset()
        started = time.perf_counter()
        status = self.run()
        self.seconds = time.perf_counter() - started
        if status:
            msg = f"got exit status {status} of an export that nobody killed · expected 0 · run it by hand: "
            raise LiteError(f"{msg}python -m export {' '.join(arguments)}")
        self.bytes = self._hashes()
        self.bytes_before = None
        self.reset()
        if before is not None:
            self.bytes_before = self._hashes()

    def reset(self) -> None:
        """Put things back as they were before the first export."""
        for left in self.out.parent.glob("*"), self.out.parent.glob(".*"):
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.before is not None:
            shutil.copytree(self.before, self.out)

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
            found = self._hashes() if self.out.exists() else None
        except ArtifactError as error:
            self.killed.failures.append(f"looks whole and is not: {error}")
            self.reset()
            return
        if found == self.bytes:
            self.killed.finished += 1
            self.reset()
        elif found != self.bytes_before:
            self.killed.failures.append("an artifact with other bytes than that of an export left alone")
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
            sys.argv = ["export", *self.arguments]
            sys.modules.pop("export.__main__", None)  # it is to run anew
            runpy.run_module("export", run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(status)

    def _wait(self, child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _hashes(self) -> dict[str, str]:
        artifact = load_artifact(self.out)
        artifact.verify()
        return {name: record.sha256 for name, record in artifact.manifest.files.items()} | {"id": artifact.id}


def exports(work: Path, studies: Path) -> list[Export]:
    """Make the exports that are to be killed: fp16, gptq-int4, and decoder.onnx for an artifact without.

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
    return made
