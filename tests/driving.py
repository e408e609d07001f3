"""Driving an engine by hand: a prompt, a token at a time, and the logits that the tokens were chosen from.

Engines hand out tokens; what these were chosen from is the cache's `last_logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_engine.cache import OnnxCache
from lite.engines.protocol import Segment
from lite.engines.segments import divide, expand_image, score
from lite.engines.torch_engine.cache import KVCache
from lite.session.loop import Loop
from lite.session.request import Progress, Request

NOT_FINITE = -1
# Three studies of a tiny artifact, and a text that one may have.
PROMPTS = [
    [1, 30, 31, IMAGE_TOKEN_ID, 40, 41, 42],
    [1, IMAGE_TOKEN_ID, 50],
    [1, 60, 61, 62, 63, IMAGE_TOKEN_ID, 70, 71, 72, 73, 74],
]
TARGETS = [80, 81, 82, 83, 84, 85, 2]
IMAGES = np.random.default_rng(3).standard_normal((3, 4, 64)).astype(np.float32)
LENGTHS = [len(prompt) + 3 for prompt in PROMPTS]


def _noting(owner: type, name: str) -> None:
    """Keep what was chosen with the cache."""
    original = getattr(owner, name)

    def noted(self: Any, *arguments: Any) -> Any:
        chosen = original(self, *arguments)
        self.__dict__.setdefault("chosen", []).append(chosen)
        return chosen

    setattr(owner, name, noted)


_noting(KVCache, "begin")
_noting(KVCache, "advance")
_noting(OnnxCache, "choose")


def read_prompt(
    engine: Any, input_ids: Sequence[int], image: Any, cache: Any, row: int = 0, *, at_once: bool = False
) -> Any:
    """Fill a row with a prompt, and choose its first token; return the logits [1, vocab_size].

    With `at_once` film and question are one segment, and so see each other unrounded, whatever the cache.
    """
    prompt = expand_image(input_ids, 0 if image is None else len(image))
    parts = divide(prompt, row=row, chunk_size=engine.chunk_size, image_features=image)
    if at_once:
        parts = iter([Segment(row=row, start=0, input_ids=prompt, image_features=image, num_logits=1)])
    for segment in parts:
        engine.extend(segment, cache)
    return cache.last_logits[0, -1:]


def decode_token(engine: Any, cache: Any, input_ids: Sequence[int] | None = None) -> Any:
    """Read the newest token of each row, or another, and choose the next; return the logits [rows, vocab_size]."""
    if input_ids is not None:
        for row, token_id in enumerate(input_ids):
            cache.truncate(row, cache.num_cached_tokens[row], newest=token_id)
    first = cache.active.start if engine.engine == "onnx" else 0
    engine.decode(cache)
    logits = cache.last_logits[:, -1]
    if engine.engine == "onnx":  # those of the rows from the first to the last that is active
        logits = np.concatenate((np.full((first, logits.shape[1]), np.nan, np.float32), logits))
    return logits


def newest_of(cache: Any) -> list[int]:
    """Return the newest token of each row; NOT_FINITE where there is none, or its logits were not finite."""
    newest = [NOT_FINITE] * cache.num_rows
    for chosen in cache.__dict__.get("chosen", []):
        tokens = chosen if isinstance(chosen, dict) else chosen.wait()
        for row, of_row in tokens.items():
            newest[row] = of_row.token_ids[-1] if of_row.is_finite else NOT_FINITE
    return newest


def score_text(engine: Any, input_ids: Sequence[int], target_ids: Sequence[int], image: Any, **named: Any) -> Any:
    """Return the logits that each target is predicted from: a tensor for torch, an array for ONNX Runtime."""
    num_image_tokens = 0 if image is None else len(image)
    logits = score(engine, input_ids, target_ids, image, num_image_tokens=num_image_tokens, **named)
    return torch.from_numpy(np.array(logits)) if engine.engine == "torch" else logits


def drive(loop: Loop[Any, Any], asked: Sequence[Request[Any]]) -> list[Progress[Any]]:
    """Run studies in this thread, in order, each seen when its turn comes."""
    studies = [Progress(one) for one in asked]
    waiting = list(studies)
    while waiting or loop.is_busy:
        waiting[:0], loop.lost = loop.lost, []
        while waiting:
            if not loop.holds(waiting[0].request.film) and waiting[0].features is None:
                waiting[0].features = waiting[0].request.see()
            if not loop.admit(waiting[0]):
                break
            waiting.pop(0)
        loop.turn()
    return studies
