"""The command line: `python -m lite COMMAND …`, or `llava-rad-lite COMMAND …`.

Text goes to stdout and everything else to stderr. Exit status: 0 all went well, 1 something failed (each failure is
one line on stderr), 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite._version import __version__
from lite.console import run_command

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: Final = (
    "generate", "run", "score", "confidence", "receive", "serve", "index", "search", "plan", "info", "drafts"
)  # fmt: skip
"""The modules of `lite.cli` that are commands. Each has HELP, `add_arguments` and `run`."""
DOORS: Final = {
    "bench": ("lite.bench.__main__", "measure artifacts, like python -m lite.bench"),
    "export": ("export.__main__", "make an artifact of a checkpoint, like python -m export"),
}
"""Command lines of their own, which have all that follows the name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] and given[0] in DOORS:
        status: int = importlib.import_module(DOORS[given[0]][0]).main(given[1:])
        return status
    arguments = _parser().parse_args(given)
    return run_command(lambda: arguments.run(arguments))


class _CommandParser(argparse.ArgumentParser):
    """Answers an unknown option with the usage of its command, where argparse gives that of all commands."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # noqa: ANN401 - as argparse has it
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    name = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=name if name.startswith("llava-rad-lite") else "python -m lite",
        description="Draft the findings of frontal chest X-rays with an exported LLaVA-Rad artifact. "
        "A research tool: not for clinical use.",
        epilog="exit status: 0 done, 1 something failed, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"llava-rad-lite {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for command in COMMANDS:
        module: Any = importlib.import_module(f"lite.cli.{command}")
        description = getattr(module, "DESCRIPTION", f"{module.HELP[0].upper()}{module.HELP[1:]}.")
        subparser = commands.add_parser(
            command,
            help=module.HELP,
            description=textwrap.fill(description, 100),
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    for door, (_, text) in DOORS.items():
        commands.add_parser(door, help=text, add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
