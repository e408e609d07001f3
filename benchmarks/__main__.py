"""`python -m benchmarks COMMAND`: what this repository measures, by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from benchmarks.commands import run_one_of

COMMANDS: Final = {
    "demo": ("benchmarks.demo", "export the phantom model in 4 bits, draft findings for a few films, show the truth"),
    "gate": ("benchmarks.gates.gate", "compare today's exports with the baselines: quality, bytes, memory, imports"),
    "hostile": ("benchmarks.hostile.command", "spoilt inputs of every kind, and programs that are killed"),
    "phantom": ("benchmarks.phantom.__main__", "synthetic films with known findings, and the small model for them"),
    "quality": (
        "benchmarks.quality.command",
        "what is lost: artifacts, engines, formats, and interop with other programs",
    ),
    "serve": ("benchmarks.serve.command", "what a server withstands: clients, hostile ones, and its own end"),
    "slim": ("benchmarks.gates.slim", "install the base and the cpu extra alone, without torch, and draft with them"),
    "speed": ("benchmarks.speed", "time and memory: gpu, peers, profile, depth"),
    "synthetic": ("benchmarks.speed.synthetic", "write a checkpoint of the real shapes with random weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with all arguments behind its name; return its exit status."""
    return run_one_of(
        COMMANDS,
        argv,
        prog="python -m benchmarks",
        description="Measure exports of LLaVA-Rad, and what they are made of.",
    )


if __name__ == "__main__":
    sys.exit(main())
