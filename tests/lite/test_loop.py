"""The loop of a session: which study has which row, what that still holds, when it stops, and what fails."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from driving import drive
from scripted_engine import CONTEXT, EOS, NUM_PLACES, PEAKS, ScriptedEngine, a_loop, expected, outcomes, request

from lite.errors import ContextLengthError, LiteError, MemoryBudgetError
from lite.session.request import Progress, Request

RUN_AHEAD = pytest.mark.parametrize("run_ahead", [0, 1])
OUT = "got no memory for a token"


def run(engine: ScriptedEngine, asked: Sequence[Request[list[int]]], **named: Any) -> list[Progress[list[int]]]:
    return drive(a_loop(engine, **named), asked)


# -- A study by itself -----------------------------------------------------------------------------------------------


@RUN_AHEAD
@pytest.mark.parametrize("limit", [1, 2, 3, 50])
def test_a_study_says_what_follows_from_its_prompt(limit: int, run_ahead: int) -> None:
    asked = [request(film, (5, film), limit=limit) for film in range(20)]
    for one in asked:
        (study,) = run(ScriptedEngine(run_ahead=run_ahead), [one])
        assert outcomes([study]) == [expected(one)]
        assert study.logprobs == [-0.5] * len(study.token_ids)
        assert study.prefill_s > 0
        # The first token is the prompt's; the end takes a step, unless it is known before.
        assert len(study.decode_steps_s) == len(study.token_ids) - (study.finish_reason == "length")
        assert (study.prefill_peaks, study.decode_peaks, study.num_together) == (PEAKS, PEAKS, 1)


@RUN_AHEAD
@pytest.mark.parametrize("context", [6, 8, 10])
def test_a_full_context_ends_a_study(context: int, run_ahead: int) -> None:
    # The newest token lies in no place yet: a context of 8 holds a prompt of 6 and 2 tokens, and predicts a third.
    asked = [request(film, (5,), limit=50) for film in range(9)]
    studies = run(ScriptedEngine(run_ahead=run_ahead), asked, context=context)
    assert outcomes(studies) == [expected(one, context=context) for one in asked]
    assert "length" in {study.finish_reason for study in studies}


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_a_prompt_goes_through_in_chunks_that_end_with_the_film(chunk_size: int) -> None:
    asked = request(3, (5, 6, 7))
    engine = ScriptedEngine(chunk_size=chunk_size)
    assert outcomes(run(engine, [asked])) == [expected(asked)]
    ends = [entry[3] for entry in engine.of("extend")]
    assert 1 + NUM_PLACES in ends
    assert len(ends) == -(-5 // chunk_size) + -(-3 // chunk_size)


def test_what_is_asked_for_beside_a_token_is_told() -> None:
    from lite.engines.protocol import Sampling

    asked = request(3, (5,), sampling=Sampling(num_top=1))
    (study,) = run(ScriptedEngine(), [asked])
    assert study.top == [((token, -0.5),) for token in study.token_ids]


def test_a_score_reads_prompt_and_targets_and_frees_its_row() -> None:
    asked = request(3, (5, 6))
    said = (*expected(asked)[0], EOS)
    scored = request(3, (5, 6), target_ids=said)
    engine = ScriptedEngine(chunk_size=3)
    scores, after = run(engine, [scored, asked])
    logits = [row for part in scores.logits for row in part]
    assert [int(row.argmax()) for row in logits] == list(said)
    assert engine.of("decode") == engine.of("decode")[: len(said) - 1]
    assert outcomes([after]) == [expected(asked)]


# -- Many ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_each_study_says_what_it_says_alone(seed: int, run_ahead: int) -> None:
    """Whatever its neighbours, the row it has, what that held before, and which of the others fail."""
    rng = random.Random(seed)
    asked = [
        request(rng.randrange(5), tuple(rng.choices(range(3, 9), k=rng.randrange(1, 5))), limit=rng.randrange(1, 10))
        for _ in range(14)
    ]
    engine = ScriptedEngine(run_ahead=run_ahead, chunk_size=rng.randrange(1, 12), faults=0.04)
    rows, context = rng.randrange(1, 5), rng.choice([14, CONTEXT])
    studies = run(engine, asked, rows=rows, context=context, places=rng.randrange(1, 15))
    for study, one in zip(studies, asked, strict=True):
        token_ids, reason = expected(one, context=context, faults=0.04)
        assert (study.token_ids, study.finish_reason) == (token_ids, reason)
        assert (str(study.error) == engine.overflow) == (reason is None)
        assert study.features is None
        assert 1 <= study.num_together <= rows
    # Films that a row still held were not read again.
    assert any(study.num_reused_tokens for study in studies) or rows > 3 or len({one.film for one in asked}) == 14
    assert {study.num_reused_tokens for study in studies} <= {0, 1 + NUM_PLACES}


@RUN_AHEAD
def test_a_long_prompt_delays_the_others_by_a_chunk_at_a_time(run_ahead: int) -> None:
    long = request(2, tuple(range(3, 43)), limit=3)
    short = next(r for film in range(99) if len(expected(r := request(film, (5,), limit=60))[0]) > 30)
    engine = ScriptedEngine(run_ahead=run_ahead, chunk_size=4)
    run(engine, [short, long], rows=2)
    kinds = "".join(entry[0][0] for entry in engine.of("extend", "decode"))
    assert "dedededed" in kinds, "a chunk, a token, a chunk, a token"
    assert "ee" not in kinds[kinds.index("d") : kinds.rindex("e")], "two chunks without a token between them"


def test_a_row_that_ends_is_given_away_at_once() -> None:
    asked = [request(film, (5,)) for film in range(12)]
    engine = ScriptedEngine()
    studies = run(engine, asked, rows=3, places=30)
    assert outcomes(studies) == [expected(one) for one in asked]
    lengths = sum(max(0, len(study.token_ids) - (study.finish_reason == "length")) for study in studies)
    full = [len(entry[1]) for entry in engine.of("decode")]
    assert sum(full) == lengths, "no step for nobody"
    assert full[: len(full) // 2].count(3) > 2
    assert engine.of("cache") == [("cache", 3, 30)]


def test_a_longer_study_waits_for_a_longer_cache_and_is_not_overtaken() -> None:
    asked = [request(0, (5,)), request(1, (5, 6)), request(2, tuple(range(3, 23))), request(3, (7,))]
    engine = ScriptedEngine()
    studies = run(engine, asked, rows=2, places=20)
    assert outcomes(studies) == [expected(one) for one in asked]
    assert engine.of("cache") == [("cache", 2, 20), ("cache", 2, 35)]
    starts = [entry for entry in engine.log if entry[0] == "cache" or (entry[0] == "extend" and entry[2] == 0)]
    assert starts.index(("cache", 2, 35)) == 3
    assert studies[3].cache_bytes == studies[3].num_together * 350


def test_a_study_whose_row_would_not_fit_is_refused_and_the_rest_goes_on() -> None:
    asked = [request(0, (5,)), request(1, tuple(range(3, 43))), request(2, (7,))]
    fewer = ScriptedEngine()
    studies = run(fewer, asked, rows=2, places=20, fits=lambda rows, places: rows * places <= 55)
    assert outcomes(studies) == [expected(one) for one in asked]
    assert fewer.of("cache") == [("cache", 2, 20), ("cache", 1, 55)]
    studies = run(ScriptedEngine(), asked, rows=2, places=20, fits=lambda rows, places: rows * places <= 40)
    assert isinstance(studies[1].error, MemoryBudgetError)
    assert "got a study of 55 places" in str(studies[1].error)
    assert outcomes(studies)[::2] == [expected(one) for one in asked[::2]]


# -- Warm rows -------------------------------------------------------------------------------------------------------


@RUN_AHEAD
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_another_question_about_a_film_reads_the_question_only(rows: int, run_ahead: int) -> None:
    asked = [request(7, (5,)), request(7, (6, 5)), request(8, (5,)), request(7, (5,))]
    engine = ScriptedEngine(run_ahead=run_ahead)
    studies = run(engine, asked, rows=rows, places=40)
    assert outcomes(studies) == [expected(one) for one in asked]
    reused = [study.num_reused_tokens for study in studies]
    assert reused[:3] == [0, 5, 0]
    assert reused[3] == (0 if rows == 1 else 5), "with one row the other film has taken its place"
    assert [entry[2] for entry in engine.of("extend")].count(0) == reused.count(0)


def test_questions_at_the_same_time_share_a_film() -> None:
    asked = [request(7, (5, number), limit=30) for number in range(3, 9)]
    engine = ScriptedEngine(chunk_size=2)
    studies = run(engine, asked, rows=4, places=60)
    assert outcomes(studies) == [expected(one) for one in asked]
    assert [study.num_reused_tokens for study in studies] == [0, 5, 5, 5, 5, 5]


def test_the_film_used_the_longest_ago_is_forgotten_first() -> None:
    asked = [request(film, (5,)) for film in (1, 2, 1, 3, 1, 2)]
    studies = run(ScriptedEngine(), asked, rows=2, places=40)
    # Film 1 is used again and again; film 3 takes the place of film 2.
    assert [study.num_reused_tokens for study in studies][2:] in ([5, 0, 5, 0], [5, 0, 5, 5])
    assert outcomes(studies) == [expected(one) for one in asked]


def test_a_film_without_a_name_is_always_read() -> None:
    studies = run(ScriptedEngine(), [request(7, (5,), film=None)] * 3)
    assert [study.num_reused_tokens for study in studies] == [0, 0, 0]


# -- Errors ----------------------------------------------------------------------------------------------------------


@RUN_AHEAD
def test_an_error_in_a_prompt_ends_its_study_only(run_ahead: int) -> None:
    asked = [request(film, (5,)) for film in range(4)]
    engine = ScriptedEngine(run_ahead=run_ahead)
    engine.trouble["extend", 2] = problem = ContextLengthError("got too much")
    studies = run(engine, asked, rows=2)
    assert [study.error for study in studies] == [None, problem, None, None]
    assert [out for out in outcomes(studies) if out[1]] == [expected(asked[i]) for i in (0, 2, 3)]


@RUN_AHEAD
def test_an_error_of_the_engine_ends_what_is_being_decoded_and_no_more(run_ahead: int) -> None:
    asked = [request(film, (5,), limit=40) for film in range(6)]
    engine = ScriptedEngine(run_ahead=run_ahead)
    engine.trouble["decode", 1] = problem = LiteError("got an error of the engine")
    studies = run(engine, asked, rows=2)
    failed = [study for study in studies if study.error is problem]
    assert 1 <= len(failed) <= 2
    for study, one in zip(studies, asked, strict=True):
        token_ids, reason = expected(one)
        assert study.token_ids == token_ids[: len(study.token_ids)], "what was chosen before is theirs"
        assert study in failed or (study.token_ids, study.finish_reason) == (token_ids, reason)


@RUN_AHEAD
@pytest.mark.parametrize("call", [("cache", 0), ("extend", 0), ("extend", 3), ("decode", 0), ("decode", 2)])
def test_with_too_little_memory_half_the_rows_go_on_where_they_were(call: tuple[str, int], run_ahead: int) -> None:
    asked = [request(film, (5, 6), limit=30) for film in range(8)]
    engine = ScriptedEngine(run_ahead=run_ahead)
    engine.trouble[call] = MemoryBudgetError(OUT)
    studies = run(engine, asked, rows=4, places=40)
    assert outcomes(studies) == [expected(one) for one in asked]
    assert [study.error for study in studies] == [None] * 8
    assert [entry[1] for entry in engine.of("cache")] == ([2] if call[0] == "cache" else [4, 2])
    # No token came twice, and none has a time twice.
    steps = [len(study.decode_steps_s) + (study.finish_reason == "length") for study in studies]
    assert steps == [len(study.token_ids) for study in studies]


@RUN_AHEAD
@pytest.mark.parametrize("call", [("cache", 0), ("extend", 0), ("decode", 1)])
def test_one_row_without_memory_ends_its_study(call: tuple[str, int], run_ahead: int) -> None:
    asked = [r for film in range(99) if len(expected(r := request(film, (5,)))[0]) > 4][:2]
    engine = ScriptedEngine(run_ahead=run_ahead)
    engine.trouble[call] = problem = MemoryBudgetError(OUT)
    studies = run(engine, asked, rows=1)
    assert studies[0].error is problem
    assert outcomes(studies)[1] == expected(asked[1])


def test_an_error_for_want_of_memory_keeps_no_cache() -> None:
    """Its traceback leads to the frames in which the cache was named: the next study could have no other one."""
    engine, caches = ScriptedEngine(), []
    new_cache = engine.new_cache

    def noted(num_rows: int, max_seq_len: int) -> Any:
        cache = new_cache(num_rows, max_seq_len)
        caches.append(weakref.ref(cache))
        return cache

    engine.new_cache = noted  # type: ignore[method-assign]
    engine.trouble["extend", 0] = MemoryBudgetError(OUT)
    (study,) = run(engine, [request(1, (5,))])
    assert isinstance(study.error, MemoryBudgetError)
    gc.collect()
    assert [cache() for cache in caches] == [None]
