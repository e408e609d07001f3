"""How sure the model was of each sentence: the mean probability of its tokens. How likely it is true is another thing."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, TypedDict

from lite.eval.labels.sentences import sentences
from lite.prompt import TextStream

if TYPE_CHECKING:
    from lite.prompt import Tokenizer
    from lite.studies.results import Findings


class Sentence(TypedDict):
    """A part of a text, with the white space behind it: joined, the parts are the text."""

    text: str
    mean_probability: float | None  # None: no token begins in it


def sentence_confidence(findings: Findings, tokenizer: Tokenizer) -> list[Sentence]:
    """Split a text into sentences, each with the mean probability of the tokens that begin in it.

    Args:
        findings: with `token_logprobs`.
        tokenizer: the one that made them.
    """
    text = findings.text
    begins = [start for span in sentences(text) if (start := _first_letter(text, *span)) is not None]
    starts = [0, *begins[1:]] if text else []
    probabilities: list[list[float]] = [[] for _ in starts]
    stream, shown = TextStream(tokenizer), 0
    for token_id, logprob in zip(findings.token_ids, findings.token_logprobs or (), strict=True):
        piece = stream.push(token_id)
        # White space before a word ends the sentence before; a token that shows nothing yet begins what comes next.
        first = shown + len(piece) - len(piece.lstrip())
        if starts:
            probabilities[bisect_right(starts, first) - 1].append(math.exp(logprob))
        shown += len(piece)
    return [
        {"text": text[start:end], "mean_probability": round(sum(found) / len(found), 4) if found else None}
        for start, end, found in zip(starts, [*starts[1:], len(text)], probabilities, strict=True)
    ]


def _first_letter(text: str, start: int, end: int) -> int | None:
    """Return where something stands that is not white space."""
    found = re.compile(r"\S").search(text, start, end)
    return found.start() if found else None
