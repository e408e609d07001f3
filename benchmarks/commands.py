"""A command that has commands: a table of modules, of which only the one asked for is imported."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Mapping, Sequence


def run_one_of(
    commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None, *, prog: str, description: str
) -> int:
    """Run the command that the first argument names with all arguments behind it; return its exit status.

    Args:
        commands: by name the module, whose `main` takes the arguments and returns the exit status, and what it does.
        argv: the arguments; those of the process when None.
        prog: how one gets here.
        description: what the commands have in common.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:<11}{text}" for name, (_, text) in commands.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"commands:\n{lines}\n\n{prog} COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of those below, with its arguments")
    # Only the first: the others, --help among them, are the command's.
    module, _ = commands[parser.parse_args(arguments[:1]).command]
    status: int = importlib.import_module(module).main(arguments[1:])
    return status


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """Return what was typed to run a command of `python -m benchmarks`."""
    return f"python -m benchmarks {name} {shlex.join(sys.argv[1:] if argv is None else argv)}"
