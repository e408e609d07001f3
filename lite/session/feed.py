"""The studies of a batch, made ready one after the other: here when they are asked for, or ahead in another thread."""

from __future__ import annotations

import collections
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

Item = TypeVar("Item")
Ready = TypeVar("Ready")


class Feed(Generic[Item, Ready]):
    """Takes items from an iterator, in this thread, and makes each ready."""

    def __init__(self, items: Iterator[Item], prepare: Callable[[Item], Ready], *, ahead: int = 0) -> None:
        """Prepare; nothing is taken yet.

        Args:
            items: read lazily, no further than is needed.
            prepare: makes an item ready.
            ahead: how many to make ready before they are asked for, in another thread; 0 makes none.
        """
        self._items = items
        self._prepare = prepare
        self._ahead = ahead
        self._waiting: collections.deque[Future[Ready]] = collections.deque()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lite-feed") if ahead else None

    def __enter__(self) -> Feed[Item, Ready]:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of what nobody has asked for."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def __call__(self, *, wait: bool) -> Ready | None:
        """Return the next one; None if there is none left, or, without waiting, if none is ready."""
        if self._executor is None:
            return next((self._prepare(item) for item in self._items), None)
        self._submit()
        if not self._waiting or not (wait or self._waiting[0].done()):
            return None
        ready = self._waiting.popleft().result()
        self._submit()
        return ready

    def _submit(self) -> None:
        while self._executor is not None and len(self._waiting) < self._ahead:
            for item in self._items:
                self._waiting.append(self._executor.submit(self._prepare, item))
                break
            else:
                return
