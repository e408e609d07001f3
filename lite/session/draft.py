"""A draft: the text of one study as it is made, for whoever asked for it."""

from __future__ import annotations

import collections
import functools
import itertools
import queue
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from lite.errors import DeadlineExceeded, LiteError
from lite.prompt import TextStream
from lite.studies.results import StudyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lite.session.prepare import Prepared, Preparer
    from lite.session.request import Outcome, Token
    from lite.session.session import Session
    from lite.studies.results import Findings

T = TypeVar("T")


class Draft:
    """A study that was submitted: an iterator over pieces of its text, which joined are the text of its findings.

    The pieces come once, and any number of threads may wait for the result. A draft that nobody holds any more is
    cancelled.
    """

    def __init__(
        self,
        outcome: Outcome,
        text: TextStream,
        *,
        cancel: Callable[[], None],
        finish: Callable[[], Findings],
        samples: Sequence[Outcome] = (),
    ) -> None:
        """Take what a session has given: `finish` puts the findings together once it has ended without an error.

        Its pieces are those of `outcome`; it ends when the samples beside it have ended, too.
        """
        self._outcome = outcome
        self._all = (outcome, *samples)
        self._text = text
        self._finish = finish
        self._num_tokens = 0  # that were turned into text
        self._cancel = weakref.finalize(self, cancel)
        self._cancel.atexit = False  # then the session is closed anyway

    @property
    def id(self) -> str:
        """The id of the request."""
        return self._outcome.id

    @property
    def findings(self) -> Findings | None:
        """The findings; None while it goes on, or where an error ended it."""
        return self._made if self.done() and self.error is None else None

    @functools.cached_property
    def _made(self) -> Findings:
        return self._finish()

    @property
    def error(self) -> Exception | None:
        """What ended it; None while it goes on, or where it has ended well."""
        return next((outcome.error for outcome in self._all if outcome.error is not None), None)

    def done(self) -> bool:
        """Say whether it has ended."""
        return all(outcome.has_ended for outcome in self._all)

    def __iter__(self) -> Iterator[str]:
        """Return itself: the pieces come once."""
        return self

    def __next__(self) -> str:
        """Wait for the next piece.

        Raises:
            LiteError: the study has ended with that.
        """
        while (token_id := self._outcome.wait_for_token(self._num_tokens)) is not None:
            self._num_tokens += 1
            if piece := self._text.push(token_id):
                return piece
        if rest := self._text.finish():
            return rest
        raise StopIteration

    def result(self, timeout_s: float | None = None) -> Findings:
        """Wait for the findings.

        Args:
            timeout_s: how long at most; the study goes on afterwards. None waits until it ends.

        Raises:
            DeadlineExceeded: it has not ended by then.
            LiteError: the study has ended with that.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for outcome in self._all:
            if not outcome.wait(None if until is None else max(0.0, until - time.monotonic())):
                msg = f"{self.id}: got no findings within {timeout_s} s · expected some · wait longer, or cancel it"
                raise DeadlineExceeded(msg)
        if self.error is not None:
            raise self.error
        return self._made

    def cancel(self) -> None:
        """Have it end at the next step. What it has said already stays."""
        self._cancel()

    def so_far(self) -> Findings:
        """Return what there is now, as findings that were cut here: of a draft that was cancelled, or still goes on."""
        return self._finish()

    def poll(self) -> tuple[str, list[Token], bool]:
        """Take the next pieces without waiting: for one thread with many drafts, which `on_tokens` tells when.

        Returns:
            The text that has come since, its tokens (text may follow its tokens later), and whether that was all.

        Raises:
            LiteError: the study has ended with that, and all of its text was given before.
        """
        has_ended = self.done()  # before its tokens are taken: what comes in between is taken the next time
        tokens, _ = self._outcome.tokens_from(self._num_tokens)
        if has_ended and not tokens and self.error is not None:
            raise self.error
        self._num_tokens += len(tokens)
        text = "".join(self._text.push(token.id) for token in tokens)
        is_all = has_ended and self.error is None
        return text + (self._text.finish() if is_all else ""), tokens, is_all

    def on_tokens(self, listener: Callable[[], None]) -> None:
        """Call a function whenever there are new tokens, in the session's thread: it must not wait for anything."""
        self._outcome.on_tokens(listener)

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call a function when it ends, in the session's thread, or at once if it has ended."""
        left = itertools.count(len(self._all) - 1, -1)
        for outcome in self._all:
            outcome.on_end(lambda: None if next(left) else listener())


def submit_drafts(session: Session[Any, Any], preparer: Preparer, asked: Sequence[Prepared]) -> list[Draft]:
    """Submit studies with their samples, one behind the other."""
    requests = [request for prepared in asked for request in (prepared.request, *prepared.samples)]
    outcomes = iter(session.submit_all(requests))

    def draft(prepared: Prepared) -> Draft:
        outcome, *samples = mine = tuple(itertools.islice(outcomes, 1 + len(prepared.samples)))
        return Draft(
            outcome,
            TextStream(preparer.tokenizer),
            cancel=lambda: session.cancel(*mine),
            finish=lambda: preparer.findings(prepared, outcome, samples),
            samples=samples,
        )

    return [draft(prepared) for prepared in asked]


def as_completed(drafts: Iterable[Draft]) -> Iterator[Draft]:
    """Yield drafts as they end, with findings or an error."""
    held = dict(enumerate(drafts))
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, draft in held.items():
        draft.on_end(functools.partial(ended.put, index))
    while held:
        yield held.pop(ended.get())


def as_they_end(
    items: Iterable[T | None], submit: Callable[[T], Draft], *, window: int
) -> Iterator[tuple[T, Findings | LiteError]]:
    """Submit items, so many at a time, and yield each with what comes of it when it ends, in whichever order.

    Args:
        items: read lazily. None is none: it lets what has ended out while there is nothing new.
        submit: asks for one; what it raises stands in the place of the item's findings.
        window: how many are under way or waiting at a time.
    """
    under_way: dict[int, tuple[T, Draft]] = {}
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def result() -> tuple[T, Findings | LiteError]:
        item, draft = under_way.pop(ended.get())
        try:
            return item, draft.result()
        except LiteError as error:
            return item, error

    for index, item in enumerate(items):
        if item is not None:
            try:
                draft = submit(item)
            except LiteError as error:
                yield item, error
                continue
            under_way[index] = item, draft
            draft.on_end(functools.partial(ended.put, index))
        while under_way and (len(under_way) >= window or not ended.empty()):
            yield result()
    while under_way:
        yield result()


def in_order(items: Iterable[T], submit: Callable[[T], Draft], *, window: int) -> Iterator[Findings | StudyError]:
    """Submit items, so many at a time, and yield what comes of them in their order.

    What has ended is yielded before the next item is asked for.

    Args:
        items: read lazily.
        submit: asks for one; what it raises stands in the place of the item's findings.
        window: how many are under way or waiting at a time.
    """
    under_way: collections.deque[Draft | LiteError] = collections.deque()
    number = itertools.count()

    def result() -> Findings | StudyError:
        index, draft = next(number), under_way.popleft()
        if isinstance(draft, LiteError):
            return StudyError(index=index, error=draft)
        try:
            return draft.result()
        except LiteError as error:
            return StudyError(index=index, error=error)

    for item in items:
        try:
            under_way.append(submit(item))
        except LiteError as error:
            under_way.append(error)
        while under_way and (len(under_way) >= window or isinstance(under_way[0], LiteError) or under_way[0].done()):
            yield result()
    while under_way:
        yield result()
