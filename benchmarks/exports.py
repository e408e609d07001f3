"""Exports as a user would type them, in a process of its own whose time and peak memory are measured.

Benchmarks do not import the exporter: what it costs, and what it makes, is that of its command line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lite.errors import LiteError

ROOT: Final = Path(__file__).resolve().parents[1]
PHANTOM: Final = Path(__file__).with_name("phantom") / "checkpoint"

# Run by a small Python between this process and the child: what a child is said to have had resident at its peak is
# never less than its parent's own peak, and this process holds films and models.
_LAUNCHER: Final = """\
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([child.returncode, time.perf_counter() - started, usage.ru_maxrss]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a command took."""

    seconds: float  # wall clock, with Python's start
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A way to export, by what the exporter's command line is told."""

    name: str
    options: tuple[str, ...]
    calibrated: bool = False  # is given films to calibrate on


FP16: Final = Recipe(name="fp16", options=("--decoder", "fp16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is exported, and on which lists of films it is calibrated and checked."""

    checkpoint: Path = PHANTOM / "llava-rad-phantom"
    base: Path = PHANTOM / "base"
    verify: Path
    calibration: Path
    device: str = "auto"

    def command(self, recipe: Recipe, out: Path) -> list[str]:
        """Return the command line of an export."""
        command = [sys.executable, "-m", "export", *recipe.options, "--device", self.device]
        # What the exporter measures of itself, and refuses when it is too bad, it measures on films of this kind.
        command += ["--verify-data", str(self.verify)]
        if recipe.calibrated:
            command += ["--calibration-data", str(self.calibration)]
        return [*command, "--checkpoint", str(self.checkpoint), "--base", str(self.base), "--out", str(out)]

    def export(self, recipe: Recipe, out: Path) -> Cost:
        """Export, and measure what that takes.

        Raises:
            LiteError: the export failed.
        """
        return measured_run([*self.command(recipe, out), "--quiet"])


def measured_run(command: Sequence[str]) -> Cost:
    """Run a command and measure it.

    Raises:
        LiteError: it failed; the message is the last line it wrote to stderr.
    """
    launcher = [sys.executable, "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, check=False, capture_output=True, encoding="utf-8", errors="replace")
    said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1].strip()
    if done.returncode:
        raise LiteError(f"{command[0]}: got no start ({said}) · expected a command · check the name")
    returncode, seconds, peak = json.loads(done.stdout)
    if returncode:
        ended = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        raise LiteError(f"{ended}: {said}")
    # Linux counts in KiB, macOS in bytes.
    return Cost(seconds=seconds, peak_rss_bytes=peak if sys.platform == "darwin" else peak * 1024)
