"""Who takes the studies of a batch, who makes them ready, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lite.session.feed import Feed

PATIENCE_S = 120.0


class Items:
    """An iterator that notes how far it has been read, and by which threads."""

    def __init__(self, count: int) -> None:
        self.taken = 0
        self.count = count
        self.threads: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.threads.add(threading.get_ident())
        if self.taken == self.count:
            raise StopIteration
        self.taken += 1
        return self.taken - 1


def drained(feed: Feed[int, int]) -> list[int]:
    found = []
    while (ready := feed(wait=True)) is not None:
        found.append(ready)
    return found


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_all_come_in_order_and_then_none(ahead: int) -> None:
    with Feed(iter(range(7)), lambda item: item * 10, ahead=ahead) as feed:
        assert drained(feed) == [0, 10, 20, 30, 40, 50, 60]
        assert (feed(wait=True), feed(wait=False)) == (None, None)


@pytest.mark.parametrize("wait", [True, False])
def test_here_each_is_taken_when_it_is_asked_for(wait: bool) -> None:
    items, prepared = Items(3), []

    def prepare(item: int) -> int:
        prepared.append((item, threading.get_ident()))
        return item

    here = threading.get_ident()
    with Feed(items, prepare) as feed:
        assert items.taken == 0
        for item in range(3):
            assert feed(wait=wait) == item, "one that is not ready yet is made ready, wait or not"
            assert items.taken == item + 1
            assert prepared == [(before, here) for before in range(item + 1)]
        assert feed(wait=wait) is None


def test_ahead_items_are_taken_here_and_made_ready_in_another_thread() -> None:
    items, threads = Items(9), set()

    def prepare(item: int) -> int:
        threads.add(threading.get_ident())
        return item

    with Feed(items, prepare, ahead=2) as feed:
        assert items.taken == 0, "nothing before it is asked for"
        assert feed(wait=True) == 0
        # One is out and two are on their way: no more than was asked for.
        assert items.taken == 3
        assert feed(wait=True) == 1
        assert items.taken == 4
        assert len(drained(feed)) == 7
    # A generator over films is not for two threads, and may belong to whoever calls.
    assert items.threads == {threading.get_ident()}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_the_next_is_made_ready_while_nobody_asks() -> None:
    prepared = [threading.Event() for _ in range(3)]

    def prepare(item: int) -> int:
        prepared[item].set()
        return item

    with Feed(iter(range(3)), prepare, ahead=2) as feed:
        assert feed(wait=True) == 0
        assert all(event.wait(PATIENCE_S) for event in prepared)


def test_who_does_not_wait_gets_what_is_ready_only() -> None:
    may_go = threading.Event()

    def prepare(item: int) -> int:
        assert may_go.wait(PATIENCE_S)
        return item

    with Feed(iter([5]), prepare, ahead=2) as feed:
        assert feed(wait=False) is None
        assert feed(wait=False) is None
        may_go.set()
        deadline = time.monotonic() + PATIENCE_S
        while (ready := feed(wait=False)) is None:
            assert time.monotonic() < deadline
        assert ready == 5
        assert feed(wait=True) is None


def test_what_nobody_asks_for_any_more_is_not_made_ready() -> None:
    begun, may_go, prepared = threading.Event(), threading.Event(), []

    def prepare(item: int) -> int:
        prepared.append(item)
        begun.set()
        assert may_go.wait(PATIENCE_S)
        return item

    threads = set(threading.enumerate())
    with Feed(iter(range(9)), prepare, ahead=3) as feed:
        assert feed(wait=False) is None
        assert begun.wait(PATIENCE_S)
        (worker,) = set(threading.enumerate()) - threads
    # It did not wait for the one that is being made ready; the two behind it are cancelled.
    assert worker.is_alive()
    may_go.set()
    worker.join(PATIENCE_S)
    assert not worker.is_alive()
    assert prepared == [0]


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_comes_where_its_item_would(ahead: int) -> None:
    def prepare(item: int) -> int:
        if item == 1:
            raise ZeroDivisionError("of item 1")
        return item

    with Feed(iter(range(3)), prepare, ahead=ahead) as feed:
        assert feed(wait=True) == 0
        with pytest.raises(ZeroDivisionError, match="of item 1"):
            feed(wait=True)
        assert feed(wait=True) == 2


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_items_is_not_hidden(ahead: int) -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("no such list")

    with Feed(items(), lambda item: item, ahead=ahead) as feed, pytest.raises(OSError, match="no such list"):
        drained(feed)
