"""The words in which two texts differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final, Literal

# A number with its decimals, a word, white space, or one other character: joined, they are the text.
_PIECE: Final = re.compile(r"\d+\.\d+|\w+(?:[-'’]\w+)*|\s+|.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Words that follow each other: in both texts, only in the first (removed), or only in the second (added)."""

    kind: Literal["same", "removed", "added"]
    text: str


def compare_words(first: str, second: str) -> list[Passage]:
    """Tell how `second` is made from `first`, word by word.

    What was removed at a place comes before what was added there.

    Returns:
        Passages in order, none empty: without those added they are `first`, without those removed `second`.
    """
    a, b = _PIECE.findall(first), _PIECE.findall(second)
    passages: list[Passage] = []
    removed = added = ""
    for tag, a_start, a_end, b_start, b_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        before, after = "".join(a[a_start:a_end]), "".join(b[b_start:b_end])
        # Changed words with the same space between them are one change, not as many as there are words.
        if tag == "equal" and not (before.isspace() and (removed or added)):
            passages += _change(removed, added)
            passages.append(Passage(kind="same", text=before))
            removed = added = ""
        else:
            removed += before
            added += after
    return passages + _change(removed, added)


def _change(removed: str, added: str) -> list[Passage]:
    passages = [Passage(kind="removed", text=removed), Passage(kind="added", text=added)]
    return [passage for passage in passages if passage.text]
