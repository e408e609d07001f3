"""Past studies beside a draft: the nearest of an index, for whoever reads it. The model sees none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli.options import load_towers
from lite.console import print_line, say

if TYPE_CHECKING:
    import argparse

    from lite.errors import LiteError
    from lite.retrieval.ask import Answer
    from lite.studies.results import Findings

TOP: Final = 3


def add_index(parser: argparse.ArgumentParser) -> None:
    """Add the index that past studies are taken from."""
    what = (
        f"print the {TOP} nearest studies of this index beside each draft, to check it by; the model sees none of them"
    )
    parser.add_argument("--index", type=Path, metavar="INDEX", help=what)


class Past:
    """The index that a command was given, or none, and then nothing is said."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Open the index, and load the towers of the artifact that drafts.

        Raises:
            LiteError: there is none, it is another artifact's, or it has nothing in it.
        """
        self._arguments = arguments
        if arguments.index is not None:
            from lite.retrieval.ask import open_index

            self._index, artifact = open_index(arguments.index, Path(arguments.artifact))
            self._towers = load_towers(arguments, artifact)

    def _find(self, image: str, text: str | None) -> Answer | None:
        """Find by the draft where there are reports, and else, or where it has no words, by the film."""
        if self._arguments.index is None or text is None:
            return None
        from lite.retrieval.ask import ask_film, ask_words

        if len(self._index.reports) and text.strip():
            return ask_words(self._index, self._towers, text, "reports", top=TOP)
        how = {"rendering": self._arguments.rendering, "any_film": self._arguments.any_film}
        return ask_film(self._index, self._towers, image, "films", top=TOP, **how)

    def show(self, image: str, text: str) -> None:
        """Print them below a draft."""
        from lite.cli.search import table

        if answer := self._find(image, text):
            if answer.remark:
                say(f"note: {image}: {answer.remark}")
            asked = "reports are nearest to the draft" if answer.what == "reports" else "films are nearest to this one"
            for line in ("", f"past studies whose {asked} (the model has not seen them):", *table(answer.hits)):
                print_line(line)

    def added(self, line: str, image: str, found: Findings | LiteError) -> str:
        """Return a line of JSON with them in it, as "past", where there is a draft."""
        answer = self._find(image, getattr(found, "text", None))
        if answer is None:
            return line
        past = {"in": answer.what, "index": str(self._arguments.index), "hits": answer.to_dicts()}
        return json.dumps(json.loads(line) | {"past": past}, ensure_ascii=False)
