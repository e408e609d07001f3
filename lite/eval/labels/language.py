"""Whether a text is English at all: a report in another language says nothing that the rules could read."""

from __future__ import annotations

import re
from typing import Literal

from lite.eval.labels.vocabulary import words_of

_WORD = re.compile(r"[^\W\d_]+")
# What stands where a report has no text, or where a name was taken out.
_PLACEHOLDER = re.compile(r"\bx{2,}\b|^\s*(?:nan|none|null|n/a)\s*$")
_ENGLISH, _FOREIGN = words_of("english"), words_of("foreign")
_LAST_LATIN = "\u024f"
# Below so many words a text is taken for English unless words of another language say otherwise.
_FEW = 10
_LEAST_SHARE = 0.25


def unreadable(text: str | None) -> Literal["empty", "not in English"] | None:
    """Say why a text cannot be read as a report, if it cannot: it has no words, or they are not English ones.

    At least a quarter of the different words of an English report are listed ones, and no more are words of other
    languages; text that is mostly in another script is not English. Too few words to tell by are taken for English.
    """
    # Each word counts once: a draft that repeats itself stays in its language.
    words = set(_WORD.findall(_PLACEHOLDER.sub(" ", (text or "").lower())))
    if not words:
        return "empty"
    if sum(len(word) for word in words if word[0] > _LAST_LATIN) * 2 > sum(map(len, words)):
        return "not in English"
    english, foreign = (sum(word in known for word in words) for known in (_ENGLISH, _FOREIGN))
    english_enough = foreign <= english and (len(words) < _FEW or english >= _LEAST_SHARE * len(words))
    return None if english_enough else "not in English"
