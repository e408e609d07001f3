"""What commands that draft say on stderr beside their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lite.console import print_line, say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lite.errors import LiteError
    from lite.studies.results import Findings


class Notes:
    """Say what a user should know of results, each thing once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def tell(self, image: str, findings: Findings, *, cut: bool = True) -> None:
        """Say what was noted of a film, that its text was cut, if that counts, and what is slower than it has to be."""
        for remark in findings.film.remarks if findings.film else ():
            say(f"note: {image}: {remark}")
        if cut and findings.finish_reason == "length":
            count = findings.num_new_tokens
            say(f"note: the text was cut after {count} tokens (--max-new-tokens, or the context is full)")
        for fallback in findings.fallbacks:
            if fallback not in self._said:
                self._said.add(fallback)
                say(f"note: {fallback}")


def report(image: str, error: LiteError, *, what: str = "error") -> None:
    """Say on one line what is wrong with a film."""
    text = str(error)
    named = text.startswith((f"{image}:", f"{Path(image)}:"))
    say(f"{what}: {text if named else f'{image}: {text}'}")


def print_pieces(pieces: Iterable[str]) -> None:
    """Print a text as it is made."""
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # also when it fails or is interrupted: what follows begins on a line of its own
        print_line("")
