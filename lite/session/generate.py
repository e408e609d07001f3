"""Greedy decoding of many studies: each one's prompt once, then a token at a time for all that are under way.

    studies ──▶ a free row: prefill ──▶ decode_one_token, all rows together ──▶ a row ends: the next study has it

A batch is a number of rows, not of studies: a row that ends is given to the next study at once (continuous batching),
so that the device is as full at the end as at the beginning. Nothing here computes on tensors. An engine does, behind
the small protocol below; this module decides which study has which row and when it stops, keeps the tokens, and
measures.

An engine may run ahead (`Engine.run_ahead`): the next token is under way when the host looks at the last one, so that
the device never waits for the host. A study that has ended is then found out one step late, which that step was for
nothing; one that ends by its length is not.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import traceback
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lite.errors import LiteError, MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lite.config import DecoderConfig
    from lite.engines.choose import EngineName
    from lite.memory.process import Peaks

FinishReason = Literal["eos", "length"]


class NewestTokens(Protocol):
    """Token ids that may still be on their way."""

    def tolist(self) -> list[int]:
        """Wait for them; negative where the logits were not finite."""


class Cache(Protocol):
    """What an engine remembers of the rows."""

    num_cached_tokens: list[int]  # of each row; 0 where it is free

    @property
    def batch_size(self) -> int:
        """The number of rows."""

    @property
    def max_seq_len(self) -> int:
        """The number of tokens a row can hold."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""

    def newest(self) -> NewestTokens:
        """Return the newest token of each row."""

    def release(self, row: int, *, damaged: bool = False) -> None:
        """Free a row; what it holds may not be finite if it is damaged."""


class Engine(Protocol):
    """What turns prompts and image features into tokens.

    `Any` stands for the engine's own types: its cache, image_features [P, hidden_size] in any array it takes, and
    logits in any array that numpy takes.
    """

    engine: EngineName
    config: DecoderConfig

    @property
    def device(self) -> object:
        """Where it computes: as text "cpu", "cuda" and the like."""

    @property
    def dtype(self) -> object:
        """What it computes in: as text "float32" and the like, perhaps with "torch." before it."""

    @property
    def cache_dtype(self) -> str:
        """What keys and values are stored as."""

    @property
    def backend(self) -> str:
        """What computes, for people."""

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What is slower here than it has to be, each with its reason."""

    @property
    def overflow(self) -> str:
        """What to say where logits are not finite: got, expected, what to do."""

    @property
    def run_ahead(self) -> int:
        """How many steps may be under way before the host looks at a token."""

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory that it has held on a GPU; None without one, or where that cannot be told."""

    def image_buffer(self, num_image_tokens: int) -> Any:  # noqa: ANN401 - see above
        """Return memory of its device for the features of an image, float32 [1, P, C]; None where it has none."""

    def new_cache(self, batch_size: int, max_seq_len: int) -> Any:  # noqa: ANN401
        """Return an empty cache."""

    def give_back(self, cache: Any) -> None:  # noqa: ANN401
        """Take a cache back that nobody uses any more."""

    def prefill(self, input_ids: Sequence[int], image_features: Any, cache: Any, row: int) -> Any:  # noqa: ANN401
        """Fill a free row with a prompt, and choose its first token; return the logits [1, vocab_size]."""

    def decode_one_token(self, cache: Any) -> Any:  # noqa: ANN401
        """Run the newest token of each row that is not free, and choose the next; return the logits."""

    def score(self, input_ids: Sequence[int], target_ids: Sequence[int], image_features: Any) -> Any:  # noqa: ANN401
        """Return the logits [len(target_ids), vocab_size] that each target token is predicted from."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One study: what is asked, and what has come of it so far."""

    input_ids: Sequence[int]
    num_prompt_tokens: int  # places it takes in the context, the image's included
    image_features: Callable[[], Any]  # makes [P, hidden_size] when its turn has come
    max_new_tokens: int  # at least 1; EOS does not count
    token_ids: list[int] = dataclasses.field(default_factory=list)  # without EOS
    finish_reason: FinishReason | None = None  # None while it goes on
    error: LiteError | None = None  # it has ended with this
    prefill_s: float = 0.0  # from when it had a row to when its first token was known
    decode_steps_s: list[float] = dataclasses.field(default_factory=list)  # between one token and the next
    prefill_peaks: Peaks | None = None  # of memory, when its first token was known
    cache_bytes: int = 0  # of the batch that it was in
    batch_size: int = 0  # rows of that
    since: float = 0.0  # time.perf_counter() at the last token, or when it had its row

    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None or self.error is not None

    def restart(self) -> None:
        """Forget what has come of it, as its row was lost."""
        self.token_ids.clear()
        self.decode_steps_s.clear()
        self.prefill_s, self.prefill_peaks = 0.0, None


class Requests(Protocol):
    """Where they come from."""

    def __call__(self, *, wait: bool) -> Request | None:
        """Return the next one; None if there will be none, or, without waiting, if none is ready."""


@dataclasses.dataclass(slots=True)
class _Row:
    """A study that has a row."""

    request: Request
    num_chosen: int = 0  # tokens that the engine has chosen, known here or not


class Generation:
    """Requests being worked on. Iterate over it: each item is a request and its new token, or None when it has ended.

    A study ends with EOS ("eos", which is not among its tokens), after max_new_tokens or with the context full (both
    "length"), or with an error of its own, which does not touch the others.

    Where a GPU has too little memory after all, the batch is halved, and what was under way begins again.
    """

    def __init__(
        self,
        engine: Engine,
        feed: Requests,
        *,
        batch_size: int,
        max_seq_len: int,
        context: int,
        eos_token_id: int,
        peaks: Callable[[], Peaks],
    ) -> None:
        """Prepare; nothing runs before the first item is asked for.

        Args:
            engine: the decoder.
            feed: what to work on.
            batch_size: rows.
            max_seq_len: places of a row, if no request needs more.
            context: the most that a row can have.
            eos_token_id: ends a study.
            peaks: tells the memory peaks so far.
        """
        self.batch_size = batch_size
        self._engine = engine
        self._feed = feed
        self._max_seq_len = max_seq_len
        self._context = context
        self._eos_token_id = eos_token_id
        self._peaks = peaks
        self._cache: Any = None
        self._rows: list[_Row | None] = []
        self._next: collections.deque[Request] = collections.deque()  # before what the feed has
        self._feed_has_ended = False
        self._admitted: Request | None = None  # that is being given a row just now
        # What the engine has chosen and nobody has looked at: tokens, and whose they are.
        self._unread: collections.deque[tuple[NewestTokens, list[tuple[int, Request]]]] = collections.deque()

    def __iter__(self) -> Iterator[tuple[Request, int | None]]:
        try:
            while self._has_more():
                try:
                    yield from self._admit()
                    yield from self._decode()
                except MemoryBudgetError as error:
                    yield from self._shrink(error)
        finally:
            if self._cache is not None:
                self._engine.give_back(self._cache)

    def _has_more(self) -> bool:
        return bool(any(self._rows) or self._unread or self._next or not self._feed_has_ended)

    def _admit(self) -> Iterator[tuple[Request, int | None]]:
        """Give free rows to the next requests."""
        while self._cache is None or None in self._rows:
            if not self._next and not self._feed_has_ended:
                busy = any(self._rows) or bool(self._unread)
                request = self._feed(wait=not busy)
                if request is None:
                    self._feed_has_ended = not busy
                    return
                self._next.append(request)
            if not self._next:
                return
            request = self._next[0]
            if request.has_ended():
                self._next.popleft()
                yield request, None
                continue
            if not self._has_room(request) and (any(self._rows) or self._unread):
                return  # until all rows are free, and there can be another cache
            self._admitted = request
            if not self._has_room(request):
                self._make_room(request)
            self._prefill(request)
            self._admitted = None
            if request.has_ended():
                yield request, None
            yield from self._read(at_most=self._engine.run_ahead)

    def _has_room(self, request: Request) -> bool:
        return self._cache is not None and self._needed(request) <= self._cache.max_seq_len

    def _needed(self, request: Request) -> int:
        return min(self._context, request.num_prompt_tokens + request.max_new_tokens)

    def _make_room(self, request: Request) -> None:
        """Get a cache that is long enough."""
        if self._cache is not None:
            self._engine.give_back(self._cache)
        self._cache, self._rows = None, []
        length = max(self._max_seq_len, self._needed(request))
        self._cache = self._engine.new_cache(self.batch_size, length)
        self._rows = [None] * self.batch_size

    def _prefill(self, request: Request) -> None:
        row = self._rows.index(None)
        request.cache_bytes, request.batch_size = self._cache.nbytes, self.batch_size
        try:
            seen = [request.image_features()]
            request.since = time.perf_counter()
            # Handed over, as they need not be kept while the prompt is computed.
            self._engine.prefill(request.input_ids, seen.pop(), self._cache, row)
        except MemoryBudgetError:
            raise
        except LiteError as error:
            request.error = _forgetting_frames(error)
            self._cache.release(row, damaged=True)
            self._next.popleft()
            return
        self._next.popleft()
        self._rows[row] = _Row(request)
        self._choose([row])

    def _limit(self, request: Request) -> int:
        """Return how many tokens it may have."""
        # The newest token lies in no slot yet: a context of 8 holds a prompt of 5 and 3 tokens, and predicts a fourth.
        return min(request.max_new_tokens, self._context - request.num_prompt_tokens + 1)

    def _decode(self) -> Iterator[tuple[Request, int | None]]:
        """Decode a token of every row; look at those before it."""
        yield from self._read(at_most=self._engine.run_ahead if any(self._rows) else 0)
        rows = [row for row, taken in enumerate(self._rows) if taken is not None]
        if not rows:
            return
        try:
            self._engine.decode_one_token(self._cache)
        except MemoryBudgetError:
            raise
        except LiteError as error:
            yield from self._fail(error)
            return
        self._choose(rows)
        yield from self._read(at_most=self._engine.run_ahead)

    def _choose(self, rows: Sequence[int]) -> None:
        """Note that the engine has chosen a token for some rows; those that have enough are free."""
        chosen = []
        newest = self._cache.newest()
        for row in rows:
            taken = self._rows[row]
            if taken is None:
                continue
            chosen.append((row, taken.request))
            taken.num_chosen += 1
            if taken.num_chosen == self._limit(taken.request):
                self._free(row)
        self._unread.append((newest, chosen))

    def _free(self, row: int, *, damaged: bool = False) -> None:
        self._rows[row] = None
        self._cache.release(row, damaged=damaged)

    def _read(self, *, at_most: int) -> Iterator[tuple[Request, int | None]]:
        """Look at what was chosen, the oldest first, until so much is left."""
        while len(self._unread) > at_most:
            newest, chosen = self._unread.popleft()
            token_ids = newest.tolist()
            now = time.perf_counter()
            for row, request in chosen:
                if request.has_ended():
                    continue  # it ran ahead
                if self._take(request, row, token_ids[row], now):
                    yield request, token_ids[row]
                if request.has_ended():
                    yield request, None

    def _take(self, request: Request, row: int, token_id: int, now: float) -> bool:
        """Give a request its newest token, or end it; say whether the token belongs to its text."""
        if request.prefill_peaks is None:
            request.prefill_s, request.prefill_peaks = now - request.since, self._peaks()
        else:
            request.decode_steps_s.append(now - request.since)
        request.since = now
        if token_id < 0:
            request.error = LiteError(self._engine.overflow)
        elif token_id == self._eos_token_id:
            request.finish_reason = "eos"
        else:
            request.token_ids.append(token_id)
            if len(request.token_ids) == self._limit(request):
                request.finish_reason = "length"
            return True
        taken = self._rows[row]
        if taken is not None and taken.request is request:
            self._free(row, damaged=request.error is not None)
        elif request.error is not None:
            self._clear(row)
        return False

    def _clear(self, row: int) -> None:
        """Clear a row whose study is found out to have damaged it when it is free already, or another study's."""
        taken = self._rows[row]
        self._free(row, damaged=True)
        if taken is None or taken.request.has_ended():
            return
        # Nobody has looked at a token of it yet, so there is nothing that would be said twice.
        for _, chosen in self._unread:
            chosen[:] = [(its_row, request) for its_row, request in chosen if request is not taken.request]
        self._next.appendleft(taken.request)

    def _shrink(self, error: MemoryBudgetError) -> Iterator[tuple[Request, int | None]]:
        """Begin again with half the rows; with one alone there is nothing to halve."""
        yield from self._read(at_most=0)
        interrupted = [taken.request for taken in self._rows if taken is not None]
        admitted, self._admitted = self._admitted, None
        self._cache, self._rows = None, []  # not given back: its memory is what is lacking
        _forgetting_frames(error)
        if self.batch_size == 1:
            if admitted is not None:
                self._next.remove(admitted)
                interrupted.append(admitted)
            # None at all, where the last token was found to be the last one: then nothing was lost.
            for request in interrupted:
                request.error = error
                yield request, None
            return
        for request in interrupted:
            request.restart()
        self._next.extendleft(reversed(interrupted))
        self.batch_size //= 2

    def _fail(self, error: LiteError) -> Iterator[tuple[Request, int | None]]:
        """End what is under way with an error that is not one study's own."""
        yield from self._read(at_most=0)
        for row, taken in enumerate(self._rows):
            if taken is not None:
                taken.request.error = _forgetting_frames(error)
                self._free(row, damaged=True)
                yield taken.request, None


def _forgetting_frames(error: LiteError) -> LiteError:
    """Return an error that does not keep what was named where it happened: a cache is most of a GPU's memory."""
    for known in (error, error.__cause__):
        if known is not None:
            traceback.clear_frames(known.__traceback__)
    return error
