"""`python -m benchmarks COMMAND`: what this repository measures, by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Final

# Each module has a `main` that takes the arguments behind the command and returns the exit status.
COMMANDS: Final = {
    "demo": ("benchmarks.demo", "export the phantom model in 4 bits, draft findings for a few films, show the truth"),
    "engines": ("benchmarks.engines", "compare the onnx engine with torch on one artifact: texts, KL, time"),
    "gate": ("benchmarks.gate", "compare today's exports with the baselines: quality, bytes, memory, imports, time"),
    "phantom": ("benchmarks.phantom.__main__", "synthetic films with known findings, and the small model for them"),
    "quantisation": ("benchmarks.quantisation", "what each decoder format costs and takes, in one table"),
    "slim": (
        "benchmarks.slim",
        "install base and cpu extras alone, without torch, draft with them, say what they take",
    ),
    "speed": ("benchmarks.speed", "time and memory: kernels, gpu, peers, profile, depth"),
    "synthetic": ("benchmarks.speed.synthetic", "write a checkpoint of the real shapes with random weights"),
    "v100": ("benchmarks.speed.v100", "the fp16 figures of a V100, each measured, published or modelled"),
}


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<14}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure exports of LLaVA-Rad, and what they are made of.",
        epilog=f"commands:\n{commands}\n\npython -m benchmarks COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below, with its arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with all arguments behind its name; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the first: the others, --help among them, are the command's.
    module, _ = COMMANDS[_parser().parse_args(arguments[:1]).command]
    status: int = importlib.import_module(module).main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
