"""What is asked of a session, and what has come of it so far.

Request    what is asked: a prompt, its film, how tokens are chosen, when to stop. It does not change.
Outcome    what has come of it: tokens, times, an error. Any thread may wait for it, and only the session writes it.
Progress   the same with its request, as the session's threads see it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from lite.engines.protocol import GREEDY, NO_ADAPTER, Sampling
from lite.engines.segments import num_prefix_tokens
from lite.errors import Cancelled, DeadlineExceeded, LiteError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import numpy as np
    from numpy.typing import NDArray

    from lite.engines.protocol import ChosenTokens
    from lite.memory.process import Peaks
    from lite.studies.results import FinishReason

F = TypeVar("F")


@dataclasses.dataclass(slots=True, eq=False)
class Lot:
    """Requests of which only so many may have a row at a time, whatever the session has."""

    limit: int
    num_rows: int = 0  # that they have now


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request(Generic[F]):
    """One study, ready for an engine."""

    id: str
    input_ids: tuple[int, ...]  # the prompt's, IMAGE_TOKEN_ID in each place of the image
    film: Hashable  # whatever decides the prefix; None: it is read anew each time
    see: Callable[[], F]  # makes the image's features; called when they are needed, perhaps more than once
    max_new_tokens: int  # at least 1; EOS does not count
    sampling: Sampling = GREEDY
    adapter: int = NO_ADAPTER  # its place in `Engine.adapters`
    target_ids: tuple[int, ...] = ()  # score these instead of choosing tokens
    deadline: float | None = None  # on time.monotonic's clock
    lot: Lot | None = None

    @property
    def num_prefix_tokens(self) -> int:
        """Of the prompt, what comes before the question: the film and the words before it."""
        return num_prefix_tokens(self.input_ids)

    @property
    def has_room(self) -> bool:
        """Whether its lot may have another row."""
        return self.lot is None or self.lot.num_rows < self.lot.limit

    @property
    def num_places(self) -> int:
        """The places of a row that it may need."""
        # The newest token lies in no place yet, and the last target is never read.
        return len(self.input_ids) + (len(self.target_ids) - 1 if self.target_ids else self.max_new_tokens)


class Token(NamedTuple):
    """One token of a text."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most probable tokens beside it, if asked for


class Outcome:
    """What has come of a request, for whoever waits for it. Only the session's threads write it."""

    def __init__(self, request_id: str) -> None:
        """Begin with nothing."""
        self.id = request_id
        self.token_ids: list[int] = []  # without EOS
        self.logprobs: list[float] = []  # of each token
        self.top: list[tuple[tuple[int, float], ...]] = []  # the most probable tokens beside each, if asked for
        self.logits: list[NDArray[np.float32]] = []  # of a request that scores
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None  # a LiteError, or a fault of the program
        self.num_reused_tokens = 0  # of the prompt, that a row held already
        self.submitted = self.since = time.perf_counter()
        self.queued_s = 0.0  # from its submission to when it had a row, but for the tower
        self.vision_s = 0.0
        self.prefill_s = 0.0  # from when it had a row to when its first token was known
        self.decode_steps_s: list[float] = []  # between one token and the next
        self.num_together = 0  # the most studies that were decoded together with it, itself included
        self.cache_bytes = 0  # of so many rows
        self.num_drafted_tokens = 0  # guesses that were verified
        self.num_accepted_tokens = 0  # of these, what the model would have said
        self.vision_peaks: Peaks | None = None
        self.prefill_peaks: Peaks | None = None
        self.decode_peaks: Peaks | None = None
        self._has_ended = False
        self._changed = threading.Condition()
        self._on_end: list[Callable[[], None]] = []
        self._on_tokens: list[Callable[[], None]] = []

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes."""
        return self._has_ended

    def wait_for_token(self, index: int) -> int | None:
        """Wait for a token; None if the study has ended before it. An error that ended it is raised."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.token_ids) > index or self._has_ended)
            if len(self.token_ids) > index:
                return self.token_ids[index]
        if self.error is not None:
            raise self.error
        return None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; say whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._has_ended, timeout_s)

    def tokens_from(self, index: int) -> tuple[list[Token], bool]:
        """Return the tokens from one on that have come so far, and whether nothing more comes."""
        with self._changed:
            tops = self.top or [()] * len(self.token_ids)
            told = zip(self.token_ids, self.logprobs, tops, strict=True)
            return [Token(*one) for one in list(told)[index:]], self._has_ended

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call a function at the end, from whichever thread: at once if it has ended."""
        with self._changed:
            if not self._has_ended:
                self._on_end.append(listener)
                return
        listener()

    def on_tokens(self, listener: Callable[[], None]) -> None:
        """Call a function whenever there are new tokens, in the session's thread; it must not wait for anything."""
        with self._changed:
            self._on_tokens.append(listener)


class Progress(Outcome, Generic[F]):
    """A request on its way, for the session's threads."""

    def __init__(self, request: Request[F]) -> None:
        """Begin with nothing."""
        super().__init__(request.id)
        self.request = request
        self.features: F | None = None  # between the tower and the prompt
        self.cancelled = False

    def begin(self, *, num_reused_tokens: int) -> None:
        """Note that it has a row, which holds so many tokens of its prompt."""
        self.num_reused_tokens = num_reused_tokens
        self.since = time.perf_counter()
        self.queued_s = max(0.0, self.since - self.submitted - self.vision_s)

    def take(
        self, chosen: ChosenTokens, now: float, *, limit: int, eos_token_id: int, overflow: str
    ) -> FinishReason | LiteError | None:
        """Take the next tokens, up to the end of the text, and note how long they have taken.

        Args:
            chosen: one, or several of one step, which have the same part of its time; none where they are not finite.
            now: when they were known.
            limit: how many tokens the text may have.
            eos_token_id: ends it, and is none of it.
            overflow: what to say where they are not finite.

        Returns:
            Why the text ends; None if it goes on.
        """
        token_ids = chosen.token_ids[: limit - len(self.token_ids)]
        count = token_ids.index(eos_token_id) if eos_token_id in token_ids else len(token_ids)
        count, steps = (count, min(count + 1, len(token_ids))) if chosen.is_finite else (0, 1)
        with self._changed:
            self.token_ids += token_ids[:count]
            self.logprobs += chosen.logprobs[:count]
            if self.request.sampling.num_top:
                self.top += (top[: self.request.sampling.num_top] for top in chosen.top[:count])
            if self.prefill_peaks is None:
                self.prefill_s = now - self.since
            else:
                self.decode_steps_s += [(now - self.since) / steps] * steps
            self.since = now
            self._changed.notify_all()
        for listener in self._on_tokens:
            listener()
        if not chosen.is_finite:
            return LiteError(overflow)
        if count < len(token_ids):
            return "eos"
        return "length" if len(self.token_ids) == limit else None

    def end(self, reason: FinishReason | Exception) -> None:
        """Say that nothing more comes. It keeps no film."""
        with self._changed:
            if self._has_ended:
                return
            if isinstance(reason, Exception):
                self.error = reason
            else:
                self.finish_reason = reason
            self.features = None
            self._has_ended = True
            self._changed.notify_all()
            listeners, self._on_end = self._on_end, []
            self._on_tokens = []
        for listener in listeners:
            listener()

    def unwanted(self) -> LiteError | None:
        """Say why nobody wants it any more; None while somebody does."""
        name = self.request.id
        if self.cancelled:
            return Cancelled(
                f"{name}: got a cancellation · expected an end of its own · submit it again if it is still wanted"
            )
        deadline = self.request.deadline
        if deadline is not None and time.monotonic() > deadline:
            msg = f"{name}: got no end before its deadline · expected one · give it more time, or the session less work"
            return DeadlineExceeded(msg)
        return None
