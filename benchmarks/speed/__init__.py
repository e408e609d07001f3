"""How fast everything is, each figure beside its yardstick: `python -m benchmarks speed COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = {
    "depth": ("benchmarks.speed.depth", "random weights of the real widths, and what 32 layers take, from fewer"),
    "gpu": ("benchmarks.speed.gpu", "the whole runtime on a GPU, at full size, beside other libraries"),
    "kernels": ("benchmarks.speed.kernels", "the GPU kernels one by one, beside other libraries'"),
    "peers": ("benchmarks.speed.peers", "other runtimes at the same shapes, whichever are installed"),
    "profile": ("benchmarks.speed.profile", "where the onnx engine's time goes, operator by operator"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with all arguments behind its name; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed",
        description="Measure time and memory: what is wrong is not timed, and each figure stands beside its yardstick.",
        epilog=f"commands:\n{commands}\n\npython -m benchmarks speed COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below, with its arguments")
    module, _ = COMMANDS[parser.parse_args(arguments[:1]).command]
    status: int = importlib.import_module(module).main(arguments[1:])
    return status
