"""When rows stop, with an engine that says what the test tells it to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lite.generate import Generation
from lite.memory import Peaks

EOS = 2
VOCAB_SIZE = 50


class ScriptedCache:
    nbytes = 1234

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.num_cached_tokens: list[int] = []


class ScriptedEngine:
    """Says the script of each row, token after token, then EOS; checks what it is asked."""

    def __init__(self, *script: Sequence[int], num_prompt_tokens: Sequence[int]) -> None:
        self.script = script
        self.num_prompt_tokens = list(num_prompt_tokens)
        self.calls: list[tuple[list[int], list[bool]]] = []
        self.cache: ScriptedCache | None = None

    def new_cache(self, batch_size: int, max_seq_len: int) -> ScriptedCache:
        assert batch_size == len(self.script)
        self.cache = ScriptedCache(max_seq_len)
        return self.cache

    def prefill(self, prompts: Sequence[Sequence[int]], image_features: Any, cache: ScriptedCache) -> np.ndarray:
        assert len(prompts) == len(image_features) == len(self.script)
        cache.num_cached_tokens = list(self.num_prompt_tokens)
        return self._logits()

    def decode_one_token(self, input_ids: Sequence[int], cache: ScriptedCache, active: Sequence[bool]) -> np.ndarray:
        self.calls.append((list(input_ids), list(active)))
        for row, grows in enumerate(active):
            if grows:
                cache.num_cached_tokens[row] += 1
                assert cache.num_cached_tokens[row] <= cache.max_seq_len, "more tokens than the cache has slots"
        return self._logits()

    def _logits(self) -> np.ndarray:
        at = len(self.calls)
        token_ids = [row[at] if at < len(row) else EOS for row in self.script]
        return np.eye(VOCAB_SIZE, dtype=np.float32)[token_ids]


def generation(
    *script: Sequence[int], max_new_tokens: int = 10, max_seq_len: int = 100, prompts: Sequence[int] | None = None
) -> tuple[Generation, ScriptedEngine]:
    lengths = prompts or [5] * len(script)
    engine = ScriptedEngine(*script, num_prompt_tokens=lengths)
    made = Generation(
        engine,
        [[1]] * len(script),
        np.zeros((len(script), 1, 4), dtype=np.float32),
        num_prompt_tokens=lengths,
        max_new_tokens=max_new_tokens,
        max_seq_len=max_seq_len,
        eos_token_id=EOS,
        peaks=lambda: Peaks(rss_bytes=7, vram_bytes=None),
    )
    return made, engine


def outcome(made: Generation) -> list[tuple[list[int], str | None]]:
    for _ in made:
        pass
    return [(row.token_ids, row.finish_reason) for row in made.rows]


def test_eos_ends_a_row_and_is_not_its_token() -> None:
    made, engine = generation([7, 8, 9])
    assert outcome(made) == [([7, 8, 9], "eos")]
    assert [ids for ids, _ in engine.calls] == [[7], [8], [9]]


def test_eos_at_once_is_an_empty_text_and_no_decoding() -> None:
    made, engine = generation([])
    assert outcome(made) == [([], "eos")]
    assert engine.calls == []


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_max_new_tokens(limit: int) -> None:
    made, engine = generation([7, 8, 9, 10], max_new_tokens=limit)
    assert outcome(made) == [([7, 8, 9, 10][:limit], "length")]
    assert len(engine.calls) == limit - 1, "the last token needs no decoding"


def test_eos_right_after_the_last_allowed_token_is_not_looked_for() -> None:
    made, _ = generation([7, 8], max_new_tokens=2)
    assert outcome(made) == [([7, 8], "length")]


@pytest.mark.parametrize(("prompt", "made_tokens"), [(5, 4), (7, 2), (8, 1)])
def test_a_full_context_ends_a_row(prompt: int, made_tokens: int) -> None:
    # The newest token lies in no slot yet: a context of 8 holds a prompt of 5 and 3 tokens, and predicts a fourth.
    made, engine = generation(range(10, 30), max_new_tokens=15, max_seq_len=8, prompts=[prompt])
    assert outcome(made) == [(list(range(10, 10 + made_tokens)), "length")]
    assert engine.cache is not None
    assert engine.cache.max_seq_len == 8


def test_rows_end_by_themselves() -> None:
    made, engine = generation([7], [8, 9, 10], [11, 12], max_new_tokens=3, prompts=[5, 9, 2])
    assert list(made) == [[7, 8, 11], [None, 9, 12], [None, 10, None]]
    assert [(row.token_ids, row.finish_reason) for row in made.rows] == [
        ([7], "eos"),
        ([8, 9, 10], "length"),
        ([11, 12], "eos"),
    ]
    assert [active for _, active in engine.calls] == [[True, True, True], [False, True, True]]


def test_a_rows_limit_does_not_depend_on_its_neighbours() -> None:
    """A short prompt beside a long one gets as many tokens as alone."""
    script = range(10, 40)
    for limit, context in ((20, 100), (20, 12)):
        alone, _ = generation(script, max_new_tokens=limit, max_seq_len=context, prompts=[3])
        beside, _ = generation(script, script, max_new_tokens=limit, max_seq_len=context, prompts=[3, 9])
        assert outcome(beside)[0] == outcome(alone)[0]


def test_the_cache_is_as_long_as_needed_and_no_longer() -> None:
    made, engine = generation([7], [8], max_new_tokens=4, prompts=[5, 9])
    outcome(made)
    assert engine.cache is not None
    assert engine.cache.max_seq_len == 9 + 4
    assert made.cache_bytes == 1234


def test_nothing_runs_before_it_is_asked_for_and_times_add_up() -> None:
    made, engine = generation([7, 8])
    assert engine.cache is None
    assert made.prefill_s == 0.0
    assert made.prefill_peaks is None
    outcome(made)
    assert made.prefill_s > 0.0
    assert len(made.decode_steps_s) == 2  # the first token is prefill's
    assert min(made.decode_steps_s) > 0.0
    assert made.prefill_peaks == Peaks(rss_bytes=7, vram_bytes=None)
