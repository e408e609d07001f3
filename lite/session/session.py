"""The session: one owner of the cache, however many threads ask.

    submit ──▶ waiting ──┬── the eyes' thread runs the tower for those that come next
                         └── the decoder's thread gives them rows, and steps (see `Loop`)

Requests are served in the order in which they came. The queue is bounded, and refuses what is too much. Both threads
hold the session only while they work: one that nobody holds any more ends, and gives its memory back.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from lite.engines.protocol import Cache
from lite.errors import Cancelled, LiteError, MemoryBudgetError, QueueFull
from lite.session.request import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lite.session.loop import Loop
    from lite.session.request import Request

F = TypeVar("F")
C = TypeVar("C", bound=Cache)
MAX_QUEUE: Final = 64
"""Requests that may wait for a row, each with a film of 3 MB at 518 pixels."""


_CLOSED: Final = "got a session that is closed · expected an open one · load the model again"


class Session(Generic[C, F]):
    """Requests waiting and under way. Safe to use from several threads at once."""

    def __init__(self, loop: Loop[C, F], *, max_queue: int = MAX_QUEUE, num_ahead: int = 1) -> None:
        """Prepare; threads start with the first request.

        Args:
            loop: of this session alone. It belongs to the decoder's thread: others may look at it, no more.
            max_queue: requests that may wait.
            num_ahead: how many of these the tower may be run for before there is a row.
        """
        self.loop = loop
        self.max_queue = max_queue
        self._num_ahead = num_ahead
        self.waiting: list[Progress[F]] = []
        self._pressure: tuple[MemoryBudgetError, Progress[F]] | None = None  # of the tower, for the loop to make room
        self._closed = False
        self._lock = threading.Lock()
        self._decoder = _Worker(self, Session._step, "lite-decoder")
        self._eyes = _Worker(self, Session._see, "lite-eyes")
        _SESSIONS.add(self)

    def submit(self, request: Request[F]) -> Progress[F]:
        """Take a request; return what will come of it.

        Raises:
            QueueFull: too many wait already.
            LiteError: the session is closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request[F]]) -> list[Progress[F]]:
        """Take several requests one behind the other, or none of them: of one film, it is read once for all.

        Raises:
            QueueFull: too many wait already.
            LiteError: the session is closed.
        """
        all_progress, name = [Progress(request) for request in requests], requests[0].id
        with self._lock:
            if self._closed:
                raise LiteError(f"{name}: {_CLOSED}")
            if self.waiting and len(self.waiting) + len(requests) > self.max_queue:
                msg = f"{name}: got a request while {len(self.waiting)} wait · expected at most"
                raise QueueFull(f"{msg} {self.max_queue} waiting · try again when some have ended")
            self.waiting += all_progress
            self._eyes.start()
            self._decoder.start()
        self._eyes.ring()
        self._decoder.ring()
        return all_progress

    def cancel(self, *requests: Progress[F]) -> None:
        """Have requests end at the next step, and their rows be free."""
        # Garbage collection may call this anywhere: it takes no lock.
        for progress in requests:
            if not progress.has_ended:
                progress.cancelled = True
                self._decoder.ring()

    def close(self, timeout_s: float | None = None) -> None:
        """End everything that waits or is under way, and let go of the cache; wait for the step that is being computed.

        Args:
            timeout_s: how long to wait at most; None waits until it is done.
        """
        with self._lock:
            self._closed = True
        for worker in (self._eyes, self._decoder):
            worker.stop(timeout_s)
        if not self._decoder.is_alive:
            self._end_all(Cancelled(_CLOSED))

    def _end_all(self, error: Exception) -> None:
        with self._lock:
            waiting, self.waiting = self.waiting, []
        for progress in waiting:
            progress.end(error)
        self.loop.drop_all(error)

    # -- The decoder's thread ----------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Do what there is to do; say whether there may be more."""
        if self._closed:
            self._end_all(Cancelled(_CLOSED))
            return False
        try:
            self._make_room()
            self._admit()
            if not self.loop.is_busy:
                return False
            self.loop.turn()
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            self._end_all(error)
        return True

    def _admit(self) -> None:
        """Give rows to those that wait: first those that have lost theirs, then by the order in which they came."""
        with self._lock:
            self.waiting[:0], self.loop.lost = self.loop.lost, []
            waiting = list(self.waiting)
        left = False
        for progress in waiting:
            if (why := progress.unwanted()) is not None:
                progress.end(why)
            has_room = progress.request.has_room
            if progress.has_ended or (has_room and not left and self.loop.admit(progress)):
                with self._lock:
                    self.waiting.remove(progress)
            elif has_room:
                left = True  # those behind it wait, too; but who is not wanted any more goes
        if waiting:
            self._eyes.ring()

    def _make_room(self) -> None:
        """Halve the rows where the tower found too little memory, or end its study."""
        pressure, self._pressure = self._pressure, None
        if pressure is None:
            return
        error, progress = pressure
        if not self.loop.make_room(error):
            progress.end(error)
        self._eyes.ring()

    # -- The eyes' thread --------------------------------------------------------------------------------------------

    def _see(self) -> bool:
        """Run the tower for the next request that needs it; say whether there may be more."""
        progress = self._next_unseen()
        if progress is None:
            return False
        started = time.perf_counter()
        try:
            features = progress.request.see()
        except MemoryBudgetError as error:
            self._pressure = error, progress
            self._decoder.ring()
            return False  # until there is room
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            progress.end(error)
        else:
            progress.vision_s = time.perf_counter() - started
            progress.vision_peaks = self.loop.peaks()
            progress.features = features
        self._decoder.ring()
        return True

    def _next_unseen(self) -> Progress[F] | None:
        with self._lock:
            if self._closed or self._pressure is not None:
                return None
            films, seen = set(), {True: 0, False: 0}  # by whether a lot has room for it
            for progress in self.waiting:
                film, has_room = progress.request.film, progress.request.has_room
                seen[has_room] += progress.features is not None
                wanted = progress.features is None and not progress.has_ended and not progress.cancelled
                wanted = wanted and (seen[has_room] < self._num_ahead or progress is self.waiting[0])
                # What another is about to read, or holds, need not be looked at again.
                if wanted and film not in films and not self.loop.holds(film):
                    return progress
                if film is not None:
                    films.add(film)
        return None


S = TypeVar("S")


class _Worker(Generic[S]):
    """A thread that sleeps until it is rung for, and holds its session only while it works."""

    def __init__(self, session: S, work: Callable[[S], bool], name: str) -> None:
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # the one thing that destructors may ring
        self._session = weakref.ref(session, lambda _, bell=self._bell: bell.put(None))  # type: ignore[misc]
        self._work = work
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it has started and not ended."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread.ident is None:
            self._thread.start()

    def ring(self) -> None:
        """Have it look at what there is to do."""
        self._bell.put(None)

    def stop(self, timeout_s: float | None) -> None:
        """End the thread, once it has done what it is doing."""
        self._stopped = True
        self.ring()
        if self.is_alive and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopped:
            self._bell.get()
            while not self._bell.empty():
                self._bell.get()
            while self._once():
                pass
            if self._session() is None:
                return

    def _once(self) -> bool:
        session = None if self._stopped else self._session()
        return session is not None and self._work(session)


_SESSIONS: weakref.WeakSet[Session[Any, Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Let no thread compute while the interpreter ends."""
    for session in list(_SESSIONS):
        session.close(timeout_s=60)
