"""The session: what many threads at once do to it."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from typing import Any

import pytest
from scripted_engine import NUM_PLACES, ScriptedEngine, a_loop, expected, outcomes, request

from lite.errors import Cancelled, DeadlineExceeded, LiteError, MemoryBudgetError, QueueFull
from lite.session.request import Lot
from lite.session.session import Session


def a_session(engine: ScriptedEngine, *, rows: int = 2, max_queue: int = 64, **named: Any) -> Session[Any, Any]:
    return Session(a_loop(engine, rows=rows, places=40, **named), max_queue=max_queue)


def wait_until_idle(session: Session[Any, Any]) -> None:
    """Wait until nothing is under way or waits: no row has a study."""
    until = time.monotonic() + 20
    while session.loop.is_busy or session.waiting:
        assert time.monotonic() < until, "it does not come to rest"
        time.sleep(0.001)


@pytest.mark.parametrize("seed", range(30))
def test_eight_threads_that_ask_cancel_and_lose_patience(seed: int) -> None:
    """No token is lost, doubled or crossed, no row leaks, and each study ends in one way."""
    rng = random.Random(seed)
    engine = ScriptedEngine(run_ahead=seed % 3, chunk_size=rng.randrange(2, 9), faults=0.02)
    session = a_session(engine, rows=rng.randrange(1, 5), max_queue=rng.choice([3, 64]))
    problems: list[str] = []
    lot = Lot(2)

    def ask(number: int) -> None:
        mine = random.Random(seed * 100 + number)
        for turn in range(6):
            asked = request(mine.randrange(4), (5, *mine.choices(range(3, 9), k=3)), limit=mine.randrange(1, 25),
                            id=f"{number}.{turn}", lot=lot if number % 3 == 0 else None,
                            deadline=mine.choice([None, None, time.monotonic() + mine.random() * 0.01]))  # fmt: skip
            try:
                study = session.submit(asked)
            except QueueFull:
                continue
            patience, seen = mine.choice([99, 99, mine.randrange(4)]), list[int]()
            try:
                while len(seen) < patience and (token := study.wait_for_token(len(seen))) is not None:
                    seen.append(token)
                if len(seen) == patience:
                    session.cancel(study)
            except LiteError:
                pass
            if not study.wait(20):
                problems.append(f"{asked.id} does not end")
            token_ids, reason = expected(asked, faults=0.02)
            if seen != study.token_ids[: len(seen)]:
                problems.append(f"{asked.id}: {seen} is not the beginning of {study.token_ids}")
            if study.error is None and (study.token_ids, study.finish_reason) != (token_ids, reason):
                problems.append(f"{asked.id}: {study.token_ids} {study.finish_reason}, not {token_ids} {reason}")
            if study.token_ids != token_ids[: len(study.token_ids)]:
                problems.append(f"{asked.id}: {study.token_ids} crossed with another")
            if not isinstance(study.error, Cancelled | DeadlineExceeded | None) and reason is not None:
                problems.append(f"{asked.id}: {study.error}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    wait_until_idle(session)
    assert lot.num_rows == 0
    session.close()


def test_first_come_first_served() -> None:
    engine = ScriptedEngine()
    session = a_session(engine, rows=1)
    ended: list[str] = []
    studies = [session.submit(request(film, (5,), id=str(film))) for film in range(10)]
    for study in studies:
        study.on_end(lambda study=study: ended.append(study.id))
    assert all(study.wait(20) for study in studies)
    assert ended == [str(film) for film in range(10)]
    session.close()


def test_a_full_queue_refuses_and_says_so() -> None:
    engine = ScriptedEngine()
    hold, seen = threading.Event(), threading.Event()

    def see() -> list[int]:
        seen.set()
        assert hold.wait(20)
        return [1001] * NUM_PLACES

    session = a_session(engine, rows=1, max_queue=2)
    first = session.submit(request(1, (5,), see=see))
    assert seen.wait(20)
    second = session.submit(request(2, (5,)))
    with pytest.raises(QueueFull, match="got a request while 2 wait · expected at most 2"):
        session.submit(request(3, (5,)))
    hold.set()
    assert first.wait(20)
    assert second.wait(20)
    assert session.submit(request(3, (5,))).wait(20)
    session.close()


def test_a_lot_has_no_more_rows_than_it_may_and_does_not_hold_others_up() -> None:
    engine = ScriptedEngine()
    session = a_session(engine, rows=4)
    lot = Lot(2)
    studies = [session.submit(request(film, (5,), limit=30, lot=lot)) for film in range(6)]
    other = session.submit(request(9, (5,), limit=30))
    assert all(study.wait(20) for study in [*studies, other])
    assert max(len(entry[1]) for entry in engine.of("decode")) <= 3
    assert lot.num_rows == 0
    session.close()


def test_a_deadline_ends_what_waits_and_what_is_under_way() -> None:
    session = a_session(ScriptedEngine(), rows=1)
    late = session.submit(request(1, (5,), deadline=time.monotonic() - 1))
    assert late.wait(20)
    assert isinstance(late.error, DeadlineExceeded)
    assert session.submit(request(1, (5,))).wait(20)
    wait_until_idle(session)
    session.close()


def test_a_tower_that_fails_ends_its_study_only() -> None:
    def broken() -> list[int]:
        raise LiteError("got no picture")

    session = a_session(ScriptedEngine())
    bad, good = session.submit(request(1, (5,), see=broken)), session.submit(request(2, (5,)))
    assert bad.wait(20)
    assert good.wait(20)
    assert "no picture" in str(bad.error)
    assert outcomes([good]) == [expected(request(2, (5,)))]
    session.close()


def test_a_tower_without_memory_is_run_again_when_there_is_room() -> None:
    calls = []

    def see() -> list[int]:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryBudgetError("got no memory for a film")
        return [1001] * NUM_PLACES

    engine = ScriptedEngine()
    session = a_session(engine, rows=4)
    assert session.submit(request(5, (5,))).wait(20)
    study = session.submit(request(1, (5,), see=see))
    assert study.wait(20)
    assert outcomes([study]) == [expected(request(1, (5,)))]
    assert [entry[1] for entry in engine.of("cache")] == [4, 2]
    session.close()


def test_a_fault_of_the_program_is_told_to_whoever_waits_and_the_session_lives() -> None:
    engine = ScriptedEngine()
    engine.trouble["decode", 0] = ZeroDivisionError("a bug")
    session = a_session(engine)
    asked = next(r for film in range(99) if len(expected(r := request(film, (5,)))[0]) > 2)
    study = session.submit(asked)
    assert study.wait(20)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        study.wait_for_token(len(study.token_ids))
    again = session.submit(asked)
    assert again.wait(20)
    assert outcomes([again]) == [expected(asked)]
    session.close()


def test_closing_ends_everything_and_refuses_what_comes_later() -> None:
    engine = ScriptedEngine()
    session = a_session(engine, rows=1)
    studies = [session.submit(request(film, (5,), limit=60)) for film in range(20)]
    session.close()
    assert all(study.has_ended for study in studies)
    assert {type(study.error) for study in studies} <= {Cancelled, type(None)}
    with pytest.raises(LiteError, match="closed"):
        session.submit(request(1, (5,)))
    session.close()


def test_a_session_that_nobody_holds_ends_its_threads() -> None:
    before = threading.active_count()
    session = a_session(ScriptedEngine())
    assert session.submit(request(1, (5,))).wait(20)
    wait_until_idle(session)
    gone = weakref.ref(session)
    del session
    until = time.monotonic() + 20
    while (threading.active_count() > before or gone() is not None) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.001)
    assert gone() is None
    assert threading.active_count() <= before  # others' may have ended meanwhile, too
