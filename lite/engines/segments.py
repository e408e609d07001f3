"""How a prompt, and the text behind it, are divided into what an engine reads at a time."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lite.config import IMAGE_TOKEN_ID
from lite.engines.protocol import GREEDY, NO_ADAPTER, Cache, Sampling, Segment
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lite.engines.protocol import Engine

F = TypeVar("F")
C = TypeVar("C", bound=Cache)


def expand_image(input_ids: Sequence[int], num_image_tokens: int) -> tuple[int, ...]:
    """Put IMAGE_TOKEN_ID into each place of the image, where a prompt has it once."""
    if IMAGE_TOKEN_ID not in input_ids:
        return tuple(input_ids)
    at = list(input_ids).index(IMAGE_TOKEN_ID)
    return (*input_ids[:at], *[IMAGE_TOKEN_ID] * num_image_tokens, *input_ids[at + 1 :])


def num_prefix_tokens(input_ids: Sequence[int]) -> int:
    """Return how many tokens of an expanded prompt come before the question: the film and the words before it."""
    behind = [place for place, token_id in enumerate(input_ids) if token_id == IMAGE_TOKEN_ID]
    return behind[-1] + 1 if behind else 0


def divide(
    input_ids: Sequence[int],
    text: Sequence[int] = (),
    *,
    row: int = 0,
    start: int = 0,
    chunk_size: int,
    image_features: F | None,
    scores: bool = False,
    sampling: Sampling = GREEDY,
    adapter: int = NO_ADAPTER,
) -> Iterator[Segment[F]]:
    """Divide what a row has to read, from `start` on, into segments.

    None crosses the end of the prefix, so that a question is read in the same way whether its film was read just before
    it or for another question. So with an int8 cache a question sees the film as the cache keeps it.

    Args:
        input_ids: of the prompt, IMAGE_TOKEN_ID in each place of the image.
        text: what follows it: tokens that were chosen before, or that are scored.
        row: of the cache.
        start: what the row holds already.
        chunk_size: tokens of a segment, at most.
        image_features: of the whole image; None where `start` is behind it.
        scores: ask for the logits that each token of the text, and one more, is predicted from; otherwise for one
            token behind all of it.
        sampling: how that is chosen.
        adapter: of the row.
    """
    ids = (*input_ids, *text)
    bounds = sorted({start, num_prefix_tokens(input_ids), len(input_ids), len(ids)})
    for first, last in itertools.pairwise(bound for bound in bounds if bound >= start):
        for begin in range(first, last, chunk_size):
            end = min(begin + chunk_size, last)
            is_prompt = begin < len(input_ids)
            num_logits = int(end == len(ids))
            if scores:
                num_logits = int(end == len(input_ids)) if is_prompt else end - begin
            chunk = ids[begin:end]
            yield Segment(
                row=row,
                start=begin,
                input_ids=chunk,
                image_features=image_features if IMAGE_TOKEN_ID in chunk else None,
                image_start=ids[:begin].count(IMAGE_TOKEN_ID),
                num_logits=num_logits,
                is_prompt=is_prompt,
                sampling=sampling,
                adapter=adapter,
            )


def score(
    engine: Engine[C, F],
    input_ids: Sequence[int],
    target_ids: Sequence[int],
    image_features: F | None,
    *,
    num_image_tokens: int = 0,
    cache: C | None = None,
    start: int = 0,
    adapter: int = NO_ADAPTER,
) -> NDArray[np.float32]:
    """Return the logits from which each target token is predicted, all given the ones before it (teacher forcing).

    Args:
        engine: the decoder.
        input_ids: one prompt, with IMAGE_TOKEN_ID once if there is an image.
        target_ids: the tokens that follow it, at least one. They see the cache as if each had been decoded.
        image_features: [P, hidden_size], or None.
        num_image_tokens: P.
        cache: with a row that is long enough; for who wants to see what is written into it, or has begun to.
        start: how much of the prompt its row 0 holds already.
        adapter: to use.

    Returns:
        logits float32 [len(target_ids), vocab_size]; row i belongs to target_ids[i].

    Raises:
        LiteError: the logits are not finite.
    """
    prompt = expand_image(input_ids, num_image_tokens)
    text = target_ids[:-1]
    cache = cache or engine.new_cache(1, len(prompt) + len(text))
    chunk_size = engine.chunk_size
    parts = divide(
        prompt, text, start=start, chunk_size=chunk_size, image_features=image_features, scores=True, adapter=adapter
    )
    logits = np.concatenate([engine.logits(segment, cache) for segment in parts])
    if not np.isfinite(logits).all():
        raise LiteError(engine.overflow)
    return logits
