"""An engine for tests of what is above engines: what it says follows from all that a row holds, and nothing else.

So whatever is lost, doubled, or crossed with another study changes the text. `expected` says what a prompt leads to.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lite.config import IMAGE_TOKEN_ID
from lite.engines.protocol import NO_DRAFTS, ChosenTokens, Segment
from lite.memory.process import Peaks
from lite.session.loop import Loop
from lite.session.request import Progress, Request

EOS = 2
VOCAB = 50
NOT_FINITE = -1
PEAKS = Peaks(rss_bytes=7, vram_bytes=None)
NUM_PLACES = 4  # of an image
CONTEXT = 100


def next_token(held: Sequence[int], *, faults: float = 0.0) -> int:
    """Choose a token by all that a row holds: EOS now and then, and NOT_FINITE as often as `faults` says."""
    rng = random.Random(repr(tuple(held)))
    if rng.random() < faults:
        return NOT_FINITE
    return EOS if rng.random() < 0.15 else rng.randrange(3, VOCAB)


def request(number: int, question: Sequence[int], *, limit: int = 10, **changes: Any) -> Request[list[int]]:
    """Ask something about a film; its features are its number in each place."""
    input_ids = (1, *[IMAGE_TOKEN_ID] * NUM_PLACES, *question)
    values: dict[str, Any] = {
        "id": f"{number} {question}",
        "input_ids": input_ids,
        "film": number,
        "see": lambda: [1000 + number] * NUM_PLACES,
        "max_new_tokens": limit,
    }
    return Request(**(values | changes))


def expected(asked: Request[list[int]], *, context: int = CONTEXT, faults: float = 0.0) -> tuple[list[int], str | None]:
    """Say what a study alone leads to: its tokens, and how it ends; None: with an error."""
    held = [place if place != IMAGE_TOKEN_ID else asked.see()[0] for place in asked.input_ids]
    said: list[int] = []
    for _ in range(min(asked.max_new_tokens, context - len(held) + 1)):
        token = next_token(held + said, faults=faults)
        if token in (EOS, NOT_FINITE):
            return said, "eos" if token == EOS else None
        said.append(token)
    return said, "length"


def outcomes(studies: Sequence[Progress[list[int]]]) -> list[tuple[list[int], str | None]]:
    return [(study.token_ids, study.finish_reason) for study in studies]


@dataclasses.dataclass
class ScriptedCache:
    num_rows: int
    max_seq_len: int

    def __post_init__(self) -> None:
        self.nbytes = 10 * self.num_rows * self.max_seq_len
        self.held: list[list[int]] = [[] for _ in range(self.num_rows)]
        self.newest = [0] * self.num_rows
        self.active = [False] * self.num_rows
        self.damaged = [False] * self.num_rows
        self.only_drafts = [False] * self.num_rows  # what damaged it lies behind its newest token

    @property
    def num_cached_tokens(self) -> list[int]:
        return [len(held) for held in self.held]

    def truncate(self, row: int, length: int, *, newest: int | None = None) -> None:
        assert length <= len(self.held[row])
        del self.held[row][length:]
        if newest is not None and self.only_drafts[row]:
            self.damaged[row] = self.only_drafts[row] = False
        self.newest[row] = self.newest[row] if newest is None else newest

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        assert not self.active[target]
        assert length <= len(self.held[source])
        self.held[target] = self.held[source][:length]

    def release(self, row: int, *, damaged: bool = False) -> None:
        self.active[row] = False
        if damaged:
            self.held[row], self.damaged[row] = [], False


class ScriptedChosen:
    def __init__(self, engine: ScriptedEngine, tokens: dict[int, ChosenTokens]) -> None:
        self.engine, self.tokens = engine, tokens

    def wait(self) -> dict[int, ChosenTokens]:
        self.engine.log.append(("read",))
        return self.tokens


class ScriptedEngine:
    """The log holds ("cache", rows, places), ("extend", row, start, end), ("decode", rows) and ("read",)."""

    engine, device, dtype, cache_dtype, backend, config = "onnx", "cpu", "float32", "float32", "script", None
    fallbacks: tuple[str, ...] = ()
    overflow = "got logits that are not finite in scripts · expected numbers · write another one"

    def __init__(
        self, *, run_ahead: int = 0, chunk_size: int = 100, faults: float = 0.0, verifies_together: bool = False
    ) -> None:
        self.run_ahead, self.chunk_size, self.faults = run_ahead, chunk_size, faults
        self.verifies_together = verifies_together
        self.log: list[tuple[Any, ...]] = []
        self.trouble: dict[tuple[str, int], Exception] = {}  # by the call and its number, from 0
        self.calls: dict[str, int] = {}

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        """Return what the log has of some kinds."""
        return [entry for entry in self.log if entry[0] in kinds]

    def peak_vram_bytes(self) -> None: ...

    def image_buffer(self, num_image_tokens: int) -> None: ...

    def new_cache(self, num_rows: int, max_seq_len: int) -> ScriptedCache:
        self._trouble("cache")
        self.log.append(("cache", num_rows, max_seq_len))
        return ScriptedCache(num_rows, max_seq_len)

    def extend(self, segment: Segment[list[int]], cache: ScriptedCache) -> ScriptedChosen | None:
        self._trouble("extend")
        self._hold(segment, cache)
        if not segment.num_logits:
            return None
        cache.active[segment.row] = True
        return ScriptedChosen(self, {segment.row: self._choose(cache, segment.row)})

    def logits(self, segment: Segment[list[int]], cache: ScriptedCache) -> Any:
        self._trouble("logits")
        self._hold(segment, cache)
        held = cache.held[segment.row]
        rows = [held[: segment.end - back] for back in reversed(range(segment.num_logits))]
        tokens = [next_token(row, faults=self.faults) for row in rows]
        return np.array([[np.nan if t == NOT_FINITE else float(i == t) for i in range(VOCAB)] for t in tokens])

    def decode(self, cache: ScriptedCache, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> ScriptedChosen:
        self._trouble("decode")
        rows = [row for row, active in enumerate(cache.active) if active]
        assert rows, "nothing to decode"
        assert {*drafts} <= {*rows}
        self.log.append(("decode", tuple(rows)))
        most = max(map(len, drafts.values()), default=0) if self.verifies_together else 0
        tokens = {}
        for row in rows:
            drafted = drafts.get(row, ())
            chosen = []
            for token in (cache.newest[row], *drafted, *[3] * (most - len(drafted))):
                cache.held[row].append(token)
                assert len(cache.held[row]) <= cache.max_seq_len, "more tokens than the row has places"
                before = cache.damaged[row]
                chosen.append(self._choose(cache, row))
                cache.only_drafts[row] |= bool(chosen[1:]) and cache.damaged[row] and not before
            tokens[row] = ChosenTokens(
                tuple(one.token_ids[0] for one in chosen),
                (-0.5,) * len(chosen),
                tuple(one.top[0] for one in chosen),
                all(one.is_finite for one in chosen),
            )
        return ScriptedChosen(self, tokens)

    def _hold(self, segment: Segment[list[int]], cache: ScriptedCache) -> None:
        row, held = segment.row, cache.held[segment.row]
        self.log.append(("extend", row, segment.start, segment.end))
        assert not cache.active[row]
        assert segment.start <= len(held), "a gap"
        assert len(segment.input_ids) <= self.chunk_size
        assert segment.end <= cache.max_seq_len
        places = iter((segment.image_features or [])[segment.image_start :])
        read = [next(places) if token == IMAGE_TOKEN_ID else token for token in segment.input_ids]
        held[segment.start :] = read

    def _choose(self, cache: ScriptedCache, row: int) -> ChosenTokens:
        token = next_token(cache.held[row], faults=self.faults)
        is_finite = token != NOT_FINITE and not cache.damaged[row]
        cache.damaged[row] = not is_finite
        cache.newest[row] = token if is_finite else 0
        return ChosenTokens((cache.newest[row],), (-0.5,), (((cache.newest[row], -0.5), (0, -1.0)),), is_finite)

    def _trouble(self, call: str) -> None:
        at = self.calls[call] = self.calls.get(call, -1) + 1
        if (call, at) in self.trouble:
            raise self.trouble.pop((call, at))


def a_loop(
    engine: ScriptedEngine, *, rows: int = 1, places: int = 1, context: int = CONTEXT, **named: Any
) -> Loop[Any, Any]:
    fits = named.pop("fits", lambda *_: True)
    return Loop(
        engine,  # type: ignore[arg-type]
        num_rows=rows, max_seq_len=places, context=context, eos_token_id=EOS, fits=fits, peaks=lambda: PEAKS, **named,
    )  # fmt: skip
