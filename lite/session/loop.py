"""The loop of a session: one cache, and in each turn at most one chunk of a prompt and one token of every row.

    waiting ──admit──▶ a row reads its prompt, a chunk a turn ──▶ decodes, a token a turn ──▶ ends: the next has it

So a long prompt delays the texts under way by no more than a chunk at a time. A row that ends is given away at once,
and still holds its film: the next question about that film begins behind it. Nothing here computes on tensors (an
`Engine` does) or knows of threads (`Session` does).

An engine may run ahead: the next token is under way when the host looks at the last one, so that the device never waits
for the host. A study that has ended is then found out one step late, and that step was for nothing; one that ends by
its length is known before.

Where memory is short, the rows become half as many. Studies that lose their row are *lost*: whoever drives the loop
lets them in again before all others. They go on where they were: what they have said is read again behind the prompt.
"""

from __future__ import annotations

import collections
import time
import traceback
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from lite.engines.protocol import Cache
from lite.engines.segments import divide
from lite.errors import LiteError, MemoryBudgetError
from lite.session.drafting import Plain
from lite.session.rows import Row, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from lite.engines.protocol import Chosen, ChosenTokens, Engine
    from lite.memory.process import Peaks
    from lite.session.request import Progress

F = TypeVar("F")
C = TypeVar("C", bound=Cache)


class Loop(Generic[C, F]):
    """Studies under way, and the cache that they share. Used by one thread at a time."""

    def __init__(
        self,
        engine: Engine[C, F],
        *,
        num_rows: int,
        max_seq_len: int,
        context: int,
        eos_token_id: int,
        fits: Callable[[int, int], bool],
        peaks: Callable[[], Peaks],
        drafting: Plain | None = None,
    ) -> None:
        """Prepare; the cache is allocated when the first study needs it.

        Args:
            engine: the decoder.
            num_rows: studies that can be under way at a time.
            max_seq_len: places of a row, until a study needs more.
            context: the most that a row can have.
            eos_token_id: ends a study.
            fits: says whether so many rows of so many places fit the memory.
            peaks: tells the memory peaks so far.
            drafting: guesses how texts go on; None: each token is decoded by itself.
        """
        self.num_rows = num_rows
        self.max_seq_len = max_seq_len
        self.peaks = peaks
        self.lost: list[Progress[F]] = []  # had a row, and have to begin again before all others
        self._engine = engine
        self._context = context
        self._eos_token_id = eos_token_id
        self._fits = fits
        self._drafting = drafting or Plain()
        self._cache: C | None = None
        self.rows: Rows[F] = Rows(0)
        # What the engine has chosen and nobody has looked at: tokens, and whose they are.
        self._unread: collections.deque[tuple[Chosen, list[tuple[int, Progress[F]]]]] = collections.deque()

    @property
    def is_busy(self) -> bool:
        """Whether something is under way, or lost."""
        return bool(self.rows.taken() or self._unread or self.lost)

    def holds(self, film: Hashable) -> bool:
        """Say whether a film need not be looked at: a row holds it, or is reading it."""
        if film is None:
            return False
        reading = (row.progress for row in self.rows if row.unread)
        return self.rows.holding(film) is not None or any(p and p.request.film == film for p in reading)

    # -- Admission ---------------------------------------------------------------------------------------------------

    def admit(self, progress: Progress[F]) -> bool:
        """Give a study a row; say whether it has one, or has ended. If not, it stays the caller's."""
        request = progress.request
        needed = min(self._context, request.num_places)
        if self._cache is None or needed > self._cache.max_seq_len:
            if self.rows.taken() or self._unread:
                return False  # until all rows are free, and there can be a longer cache
            try:
                self._make_cache(needed)
            except MemoryBudgetError as error:
                progress.end(_forgetting_frames(error))
                return True
        row, held = self.rows.free(request.film), self.rows.holding(request.film)
        if row is None or (held is None and progress.features is None):
            return False
        start = 0
        if held is not None:
            start = held.num_prefix_tokens
            if held is not row:
                self._the_cache.copy_prefix(held.index, row.index, start)
        row.film, row.num_prefix_tokens = (request.film, start) if held is not None else (None, 0)
        progress.begin(num_reused_tokens=start)
        self.rows.take(row, progress)
        row.unread.extend(
            divide(
                request.input_ids,
                request.target_ids[:-1] or progress.token_ids,
                row=row.index,
                start=start,
                chunk_size=self._engine.chunk_size,
                image_features=progress.features,
                scores=bool(request.target_ids),
                sampling=request.sampling,
                adapter=request.adapter,
            )
        )
        progress.features = None  # the segments have them, and let go of them one by one
        return True

    @property
    def _the_cache(self) -> C:
        if self._cache is None:
            msg = "got no cache · expected one while a row is taken · report this"
            raise LiteError(msg)
        return self._cache

    def _make_cache(self, needed: int) -> None:
        """Get a cache of rows that are long enough, and of fewer rows where memory is short."""
        length, rows = max(self.max_seq_len, needed), self.num_rows
        while rows > 1 and not self._fits(rows, length):
            rows -= 1
        if not self._fits(rows, length):
            msg = f"got a study of {needed} places · expected one that fits the memory limit, as {self.max_seq_len} do"
            raise MemoryBudgetError(f"{msg} · shorten its reason, or let it write fewer tokens")
        self._cache, self.rows = None, Rows(0)  # before there is another one
        while self._cache is None:
            try:
                self._cache = self._engine.new_cache(rows, length)
            except MemoryBudgetError:
                if rows == 1:
                    raise
                rows //= 2
                self.num_rows = rows
        self.rows, self.max_seq_len = Rows(rows), length

    # -- One turn ----------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Read a chunk of one prompt, decode a token of every row whose prompt has been read, look at those before."""
        for row, progress in self.rows.taken():
            if (why := progress.unwanted()) is not None:
                progress.end(why)
                self._free(row)
        try:
            self._read_prompt()
            self._decode()
        except MemoryBudgetError as error:
            self.make_room(error)

    def drop_all(self, error: Exception) -> None:
        """End everything that is under way, and let go of the cache."""
        for progress in [*(progress for _, progress in self.rows.taken()), *self.lost]:
            progress.end(error)
        self._cache, self.rows = None, Rows(0)
        self.lost.clear()
        self._unread.clear()

    def _read_prompt(self) -> None:
        row = self.rows.reading()
        if row is None or row.progress is None:
            return
        progress, segment = row.progress, row.unread[0]
        request = progress.request
        chosen: Chosen | None = None
        try:
            if request.target_ids:
                logits = self._engine.logits(segment, self._the_cache)
                progress.logits += [logits] if segment.num_logits else []
            else:
                chosen = self._engine.extend(segment, self._the_cache)
        except MemoryBudgetError:
            raise
        except LiteError as error:
            progress.end(_forgetting_frames(error))
            self._free(row, damaged=True)
            return
        row.unread.popleft()
        if segment.end == request.num_prefix_tokens:
            row.film, row.num_prefix_tokens = request.film, segment.end
        if row.unread:
            return
        if chosen is not None:
            self._note(chosen, [(row, progress)])
            self._read(at_most=self._ahead)
        else:
            is_finite = all(np.isfinite(logits).all() for logits in progress.logits)
            progress.end("length" if is_finite else LiteError(self._engine.overflow))
            self._free(row, damaged=not is_finite)

    def _decode(self) -> None:
        self._read(at_most=self._ahead if self.rows.decoding() else 0)
        rows = self.rows.decoding()
        if not rows:
            return
        try:
            chosen = self._drafting.decode(self._engine, self._the_cache, rows, self._limit)
        except MemoryBudgetError:
            raise
        except LiteError as error:
            # It is not one study's own: what is being decoded ends.
            self._read(at_most=0)
            for row, progress in self.rows.decoding():
                progress.end(_forgetting_frames(error))
                self._free(row, damaged=True)
            return
        self._note(chosen, rows)
        self._read(at_most=self._ahead)

    @property
    def _ahead(self) -> int:
        """How many steps may be under way before the host looks at a token; to guess the next, it has to know all."""
        return 0 if self._drafting.is_awake else self._engine.run_ahead

    def _limit(self, progress: Progress[F]) -> int:
        """Return how many tokens a study may have."""
        # The newest token lies in no place yet: a context of 8 holds a prompt of 5 and 3 tokens, and predicts a fourth.
        return min(progress.request.max_new_tokens, self._context - len(progress.request.input_ids) + 1)

    def _note(self, chosen: Chosen, rows: Sequence[tuple[Row[F], Progress[F]]]) -> None:
        """Note that the engine has chosen a token for some rows; those that have enough are free."""
        self._unread.append((chosen, [(row.index, progress) for row, progress in rows]))
        together, cache = len(self.rows.decoding()), self._the_cache
        for row, progress in rows:
            progress.num_together = max(progress.num_together, together)
            progress.cache_bytes = progress.num_together * (cache.nbytes // cache.num_rows)
            row.num_chosen += 1
            if row.num_chosen == self._limit(progress):
                self._free(row)

    def _read(self, *, at_most: int) -> None:
        """Look at what was chosen, the oldest first, until so much is left."""
        while len(self._unread) > at_most:
            chosen, whose = self._unread.popleft()
            tokens = chosen.wait()
            now = time.perf_counter()
            for index, progress in whose:
                if not progress.has_ended:
                    self._take(progress, self.rows[index], tokens[index], now)
                elif not tokens[index].is_finite:  # it ran ahead, and may have left that behind
                    self._clear(self.rows[index])

    def _take(self, progress: Progress[F], row: Row[F], tokens: ChosenTokens, now: float) -> None:
        """Give a study its newest tokens, or end it; its row may be another's by now."""
        limit, overflow = self._limit(progress), self._engine.overflow
        end = progress.take(tokens, now, limit=limit, eos_token_id=self._eos_token_id, overflow=overflow)
        if progress.prefill_peaks is None:
            progress.prefill_peaks = self.peaks()
        if end is None:
            return
        progress.decode_peaks = self.peaks()
        damaged, has_row = isinstance(end, LiteError), row.progress is progress
        if has_row:
            self._free(row, damaged=damaged)
        progress.end(end)
        if damaged and not has_row:
            self._clear(row)
        if not damaged:
            self._drafting.learn(progress.token_ids)

    def _free(self, row: Row[F], *, damaged: bool = False) -> None:
        """Take a row from its study; what it holds of the film stays, unless it may not be finite."""
        self.rows.give_up(row)
        cache = self._the_cache
        cache.release(row.index, damaged=damaged)
        if damaged or row.film is None:
            row.film, row.num_prefix_tokens = None, 0
        cache.truncate(row.index, row.num_prefix_tokens)

    # -- When something fails ----------------------------------------------------------------------------------------

    def _clear(self, row: Row[F]) -> None:
        """Clear a row whose study is found out to have damaged it when it is free already, or another study's.

        Whatever was chosen there since then may be wrong, and nobody has looked at it yet: it is chosen again.
        """
        later = [theirs for _, whose in self._unread for index, theirs in whose if index == row.index]
        later += [row.progress] if row.progress is not None else []
        self._free(row, damaged=True)
        for _, whose in self._unread:
            whose[:] = [(index, theirs) for index, theirs in whose if index != row.index]
        self.lost[:0] = [progress for progress in dict.fromkeys(later) if not progress.has_ended]

    def make_room(self, error: MemoryBudgetError) -> bool:
        """Begin again with half the rows. With one alone there is nothing to halve: its study ends with the error.

        Returns:
            Whether there is more room now.
        """
        self._read(at_most=0)
        rows, studies = len(self.rows), []
        for row, progress in sorted(self.rows.taken(), key=lambda pair: pair[0].last_use):
            self.rows.give_up(row)
            studies.append(progress)
        self._cache, self.rows = None, Rows(0)
        _forgetting_frames(error)
        if rows <= 1:
            # None at all, where the last token was found to be the last one: then nothing was lost.
            for progress in studies:
                progress.end(error)
            return rows == 1
        self.num_rows = rows // 2
        self.lost[:0] = studies
        return True


def _forgetting_frames(error: LiteError) -> LiteError:
    """Return an error that does not keep what was named where it happened: a cache is most of a GPU's memory."""
    for known in (error, error.__cause__):
        if known is not None:
            traceback.clear_frames(known.__traceback__)
    return error
