"""The processes of the engines and of the tower, and what they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed.peers.specs import ROOT
from lite.errors import BackendUnavailable, LiteError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BANDWIDTH: Final = """\
import sys
from lite.bench.machine import streaming_read_bandwidth
print(streaming_read_bandwidth(sys.argv[1]))
"""


class Process:
    """A worker."""

    def __init__(self, command: Sequence[str], *, name: str, threads: int, folder: Path) -> None:
        """Start it, and wait until it has loaded what it runs.

        Raises:
            BackendUnavailable: it cannot run here.
            LiteError: it failed.
        """
        self._said = (folder / f"{name}.txt").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(threads),
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

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have something done, and wait for it.

        Raises:
            LiteError: the engine failed, or its process died.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
                self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._said.seek(0)
            raise LiteError(f"its process ended with {ended}: {last_line(self._said.read())}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise BackendUnavailable(answer["unavailable"])
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


def last_line(text: str) -> str:
    """Return the last thing that a process said."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it says nothing"


def measured_bandwidth(device: str, threads: int) -> float:
    """Measure a streaming read with as many threads as the engines have, in a process of its own.

    Raises:
        LiteError: it failed.
    """
    command = [sys.executable, "-c", _BANDWIDTH, device]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(threads), capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise LiteError(f"the memory's bandwidth: {last_line(done.stderr)}")
    return float(done.stdout)


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}
