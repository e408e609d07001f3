"""How sure the model was of each sentence: the mean probability of its tokens. Whether it is true is another thing."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, TypedDict

from lite.eval.labels.sentences import sentences
from lite.prompt import TextStream

if TYPE_CHECKING:
    from lite.prompt import Tokenizer
    from lite.studies.results import Findings

_NOT_SPACE: Final = re.compile(r"\S")


class Sentence(TypedDict):
    """A part of a text, with the white space behind it: joined, the parts are the text."""

    text: str
    mean_probability: float | None  # None: it has no token of its own


def sentence_confidence(findings: Findings, tokenizer: Tokenizer) -> list[Sentence]:
    """Split a text into sentences, each with the mean probability of its tokens.

    A token counts where its first letter stands; white space and part of a letter, where the next one stands.

    Args:
        findings: with `token_logprobs`.
        tokenizer: the one that made them.
    """
    text = findings.text
    if not text:
        return []
    letters = (_NOT_SPACE.search(text, *span) for span in sentences(text))
    starts = [0, *[letter.start() for letter in letters if letter is not None][1:]]
    probabilities: list[list[float]] = [[] for _ in starts]
    stream, shown = TextStream(tokenizer), 0
    for token_id, logprob in zip(findings.token_ids, findings.token_logprobs or (), strict=True):
        letter = _NOT_SPACE.search(text, shown)
        place = letter.start() if letter is not None else len(text)
        probabilities[bisect_right(starts, place) - 1].append(math.exp(logprob))
        shown += len(stream.push(token_id))
    return [
        {"text": text[start:end], "mean_probability": round(sum(found) / len(found), 4) if found else None}
        for start, end, found in zip(starts, [*starts[1:], len(text)], probabilities, strict=True)
    ]
