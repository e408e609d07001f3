"""How sure the model was of each sentence: signals of one pass, and how many other drafts of the film agree.

What a sentence states is what the labeller reads in it. *It states something false* if one of its mentions does, beside
the mentions of the reference (of a phantom's reference: all that is on the film):

- affirmed: the reference does not affirm or suspect that label, or no such mention of it has the same zone and size and
  the side. What either of them leaves open contradicts nothing. A bilateral finding may be two of the reference's.
- denied: the reference affirms the label; of Lung Opacity ("the lungs are clear"), anything that is a kind of it.
- suspected: never.

A reference that does not speak of a finding denies it, as CheXpert has it. A sentence without a mention states nothing.
*A sample agrees* with a sentence that would be false in nothing if the sample were the reference.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from lite.eval.labels import Mention, read_mentions
from lite.eval.labels.sentences import sentences
from lite.prompt import TextStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lite.prompt import Tokenizer
    from lite.studies.results import Findings

TOP: Final = 5
"""How many of the most probable tokens the signals look at."""
_LEAST: Final = 0.005  # of the chosen token's probability: what is less probable changes no signal
_NOT_SPACE: Final = re.compile(r"\S")
_OPACITIES: Final = ("Lung Opacity", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Lung Lesion")


def is_false(mention: Mention, truth: Sequence[Mention]) -> bool:
    """Say whether a mention is false beside those of a reference: see the module's docstring."""
    if mention.status == "uncertain":
        return False
    if mention.status == "negative":
        kinds = _OPACITIES if mention.label == "Lung Opacity" else (mention.label,)
        return any(other.status == "positive" and other.label in kinds for other in truth)
    there = [other for other in truth if other.label == mention.label and other.status != "negative"]
    sides = ("left", "right") if mention.side == "bilateral" else (mention.side,)
    return not all(any(_fits(mention, side, other) for other in there) for side in sides)


def _fits(mention: Mention, side: str | None, other: Mention) -> bool:
    pairs = (mention.zone, other.zone), (mention.size, other.size)
    same_side = side is None or other.side in (None, "bilateral", side)
    return same_side and all(None in pair or pair[0] == pair[1] for pair in pairs)


class Token(NamedTuple):
    """A token of a sentence."""

    id: int
    start: int  # where its first letter stands in the sentence
    logprob: float
    top: tuple[tuple[int, float], ...]  # token ids and log-probabilities, the likeliest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """A sentence of a draft: what it states, and how sure the model was."""

    text: str  # with the white space behind it
    tokens: tuple[Token, ...]
    mentions: tuple[Mention, ...]
    contrast: float | None  # see `contrast`; None: it states nothing, or has no token of its own
    agreement: float | None  # the share of samples; None: it states nothing, or there are none

    @property
    def denies(self) -> bool:
        """Whether it affirms nothing."""
        return all(mention.status == "negative" for mention in self.mentions)

    def is_false(self, truth: Sequence[Mention]) -> bool:
        """Say whether it states something false."""
        return any(is_false(mention, truth) for mention in self.mentions)


def stated(findings: Findings, tokenizer: Tokenizer) -> list[Stated]:
    """Split findings into sentences; joined, they are the text.

    A token counts where its first letter stands; white space and part of a letter, where the next one stands.

    Args:
        findings: with `token_logprobs`, and `top_logprobs` for the contrast.
        tokenizer: the one that made them.
    """
    text = findings.text
    if not text:
        return []
    starts = _starts(text)
    tokens: list[list[Token]] = [[] for _ in starts]
    for token in _tokens(findings, tokenizer):
        place = bisect_right(starts, token.start) - 1
        tokens[place].append(token._replace(start=token.start - starts[place]))
    mentions, drawn = read_mentions(text), [read_mentions(sample.text) for sample in findings.samples or ()]
    found = []
    for of, start, end in zip(tokens, starts, [*starts[1:], len(text)], strict=True):
        mine = tuple(mention for mention in mentions if start <= mention.start < end)
        sure = contrast(of, tokenizer) if mine and of else None
        one = Stated(text=text[start:end], tokens=tuple(of), mentions=mine, contrast=sure, agreement=None)
        agree = [not one.is_false(others) for others in drawn if mine]
        found.append(replace(one, agreement=sum(agree) / len(agree) if agree else None))
    return found


def _starts(text: str) -> list[int]:
    """Return where sentences begin, the first at 0; the number of an item is not one by itself."""
    letters = [(_NOT_SPACE.search(text, begin, end), end) for begin, end in sentences(text)]
    starts = [(letter.start(), end) for letter, end in letters if letter is not None]
    items = [text[start:end].isdigit() for start, end in starts]
    return [0, *(start for (start, _), in_item in zip(starts[1:], items, strict=False) if not in_item)]


def _tokens(findings: Findings, tokenizer: Tokenizer) -> Iterator[Token]:
    text, stream, shown = findings.text, TextStream(tokenizer), 0
    tops = findings.top_logprobs or ((),) * len(findings.token_ids)
    for token_id, logprob, top in zip(findings.token_ids, findings.token_logprobs or (), tops, strict=True):
        letter = _NOT_SPACE.search(text, shown)
        yield Token(token_id, letter.start() if letter is not None else len(text), logprob, top)
        shown += len(stream.push(token_id))


def contrast(tokens: Sequence[Token], tokenizer: Tokenizer) -> float:
    """Ask how sure a sentence was of what it means, whatever the words.

    Returns:
        The product over its tokens of the share that each has beside those that, put in its place, make a sentence
        which contradicts it: right for left, large for small.
    """
    ids = [token.id for token in tokens]
    mine, product = read_mentions(tokenizer.decode(ids)), 1.0
    for place, token in enumerate(tokens):
        against, least = 0.0, token.logprob + math.log(_LEAST)
        for other, logprob in token.top[:TOP]:
            if other in (token.id, tokenizer.eos_token_id) or logprob < least:
                continue
            theirs = read_mentions(tokenizer.decode([*ids[:place], other, *ids[place + 1 :]]))
            labels = {mention.label for mention in theirs}
            if any(mention.label in labels and is_false(mention, theirs) for mention in mine):
                against += math.exp(logprob - token.logprob)
        product /= 1 + against
    return product
