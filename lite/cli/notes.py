"""What commands that draft say beside their results: of films and texts on stderr, of sentences below the text."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.console import print_line, say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lite.errors import LiteError
    from lite.studies.results import Findings

UNCALIBRATED: Final = (
    "how sure the model was of what each sentence means, uncalibrated (calibrate it by: python -m lite confidence):"
)


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


def print_sentences(findings: Findings) -> None:
    """Print how sure the model was of each sentence: the less, the more question marks."""
    if findings.sentences is None:
        return
    calibrated = findings.calibration is not None
    print_line(
        f"how likely each sentence is true, by calibration {findings.calibration}:" if calibrated else UNCALIBRATED
    )
    count = len(findings.samples or ())
    for one in findings.sentences:
        sure = one.probability if calibrated else one.score
        share = "–" if sure is None else f"{math.floor(100 * sure)}%" if calibrated else f"{sure:.2f}"
        agree = "" if one.agreement is None else f"{one.agreement * count:.0f} of {count}"
        mark = "" if sure is None or not calibrated else "??" if sure < 0.75 else "?" if sure < 0.9 else ""
        print_line(f"  {mark:2} {share:>4}  {agree:{len(f'{count} of {count}')}}  {' '.join(one.text.split())}")
