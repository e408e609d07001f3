"""The processes of the engines, and what they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed.harness import Unavailable
from benchmarks.speed.peers.specs import ROOT
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SETTLE_S: Final = 0.3
"""Between two engines: threads that wait for more work go on spinning for a while (OpenMP's do for up to 0.2 s)."""


class Process:
    """A worker."""

    def __init__(self, command: Sequence[str], *, log: Path, threads: int) -> None:
        """Start it, and wait until it has loaded what it runs.

        Raises:
            Unavailable: it cannot run here.
            LiteError: it failed.
        """
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self._said = log.open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            # A group of its own: Ctrl-C is for us alone, and who ends the group ends the writers of files in it, too.
            start_new_session=True,
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, *, limit_s: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Have something done, and wait for it.

        Raises:
            Unavailable: it takes longer than the limit; the process is no more of use.
            LiteError: the engine failed, or its process died.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
                self._process.stdin.flush()
        if self._process.stdout is not None and not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise Unavailable(f"took longer than {limit_s:g} s")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or ["it says nothing"]
            raise LiteError(f"its process ended with {ended}: {said[-1].strip()}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        if "error" in answer:
            raise LiteError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process and those that it has started, whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
