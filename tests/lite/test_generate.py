"""Which study has which row and when it stops, with an engine that says what the test tells it to."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from lite.errors import ContextLengthError, LiteError, MemoryBudgetError
from lite.memory.process import Peaks
from lite.session.generate import Generation, Request

EOS = 2
NEVER = 49  # what the engine says after EOS
NOT_FINITE = -1
PEAKS = Peaks(rss_bytes=7, vram_bytes=None)
RUN_AHEAD = pytest.mark.parametrize("run_ahead", [0, 1])


class ScriptedTokens:
    def __init__(self, engine: ScriptedEngine, token_ids: list[int]) -> None:
        self.engine, self.token_ids = engine, token_ids

    def tolist(self) -> list[int]:
        self.engine.log.append(("read",))
        return self.token_ids


class ScriptedCache:
    def __init__(self, engine: ScriptedEngine, batch_size: int, max_seq_len: int) -> None:
        self.engine = engine
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        self.nbytes = 10 * batch_size * max_seq_len
        self.num_cached_tokens = [0] * batch_size
        self.studies: list[int | None] = [None] * batch_size
        self.token_ids = [NEVER] * batch_size
        self.damaged_by: dict[int, int] = {}  # the study, by its row

    def newest(self) -> ScriptedTokens:
        return ScriptedTokens(self.engine, list(self.token_ids))

    def release(self, row: int, *, damaged: bool = False) -> None:
        self.engine.log.append(("damaged" if damaged else "release", row))
        self.num_cached_tokens[row], self.studies[row] = 0, None
        if damaged:
            self.damaged_by.pop(row, None)


class ScriptedEngine:
    """Says the script of each study, token after token, then EOS; checks what it is asked, and notes it.

    A study's prompt is its number. The log holds ("cache", rows, slots), ("prefill", study, row), ("decode", {row:
    study}), ("read",), ("release", row), ("damaged", row) and
    ("back", rows).
    """

    overflow = "got logits that are not finite in scripts · expected numbers · write another one"

    def __init__(self, *script: Sequence[int], run_ahead: int = 0, prompts: Sequence[int] | None = None) -> None:
        self.script = script
        self.run_ahead = run_ahead
        self.prompts = list(prompts or [5] * len(script))
        self.log: list[tuple[Any, ...]] = []
        self.said = [0] * len(script)
        self.trouble: dict[tuple[str, int], Exception] = {}  # by the call and its number, from 0
        self.calls: dict[str, int] = {}
        self.caches: list[weakref.ref[ScriptedCache]] = []

    def run(
        self, *, limits: Sequence[int] | int = 10, context: int = 100, **named: Any
    ) -> tuple[list[Request], list[tuple[int, int | None]]]:
        """Run all studies; return the requests, and what came of which."""
        requests = self.requests(limits)
        events = list(self.events(feed(requests), context=context, **named))
        return requests, events

    def requests(self, limits: Sequence[int] | int = 10) -> list[Request]:
        return [
            Request(
                input_ids=[study],
                num_prompt_tokens=self.prompts[study],
                image_features=lambda: "features",
                max_new_tokens=limits if isinstance(limits, int) else limits[study],
            )
            for study in range(len(self.script))
        ]

    def generation(self, requests: Any, *, batch_size: int = 1, max_seq_len: int = 1, context: int = 100) -> Generation:
        return Generation(
            self,  # type: ignore[arg-type]
            requests,
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            context=context,
            eos_token_id=EOS,
            peaks=lambda: PEAKS,
        )

    def events(self, requests: Any, **named: Any) -> Iterator[tuple[int, int | None]]:
        for request, token_id in self.generation(requests, **named):
            yield request.input_ids[0], token_id

    def new_cache(self, batch_size: int, max_seq_len: int) -> ScriptedCache:
        self._trouble("cache")
        self.log.append(("cache", batch_size, max_seq_len))
        cache = ScriptedCache(self, batch_size, max_seq_len)
        assert not [before for before in self.caches if before() is not None], "two caches at a time"
        self.caches.append(weakref.ref(cache))
        return cache

    def give_back(self, cache: ScriptedCache) -> None:
        self.log.append(("back", cache.batch_size))

    def prefill(self, input_ids: Sequence[int], image_features: Any, cache: ScriptedCache, row: int) -> None:
        assert image_features == "features"
        assert cache.num_cached_tokens[row] == 0, "the row is not free"
        (study,) = input_ids
        self._trouble("prefill")
        self.log.append(("prefill", study, row))
        assert self.prompts[study] <= cache.max_seq_len
        cache.num_cached_tokens[row] = self.prompts[study]
        cache.studies[row] = study
        self.said[study] = 0
        self._say(cache, row, study)

    def decode_one_token(self, cache: ScriptedCache) -> None:
        rows = {row: study for row, study in enumerate(cache.studies) if study is not None}
        assert rows, "nothing to decode"
        self._trouble("decode")
        self.log.append(("decode", rows))
        for row, study in rows.items():
            cache.num_cached_tokens[row] += 1
            assert cache.num_cached_tokens[row] <= cache.max_seq_len, "more tokens than the cache has slots"
            self.said[study] += 1
            self._say(cache, row, study)
            if cache.damaged_by.get(row, study) != study:
                cache.token_ids[row] = NOT_FINITE  # of what another one has left behind

    def _say(self, cache: ScriptedCache, row: int, study: int) -> None:
        script = [*self.script[study], EOS]
        at = self.said[study]
        cache.token_ids[row] = script[at] if at < len(script) else NEVER
        if cache.token_ids[row] == NOT_FINITE:
            cache.damaged_by[row] = study

    def _trouble(self, call: str) -> None:
        at = self.calls[call] = self.calls.get(call, -1) + 1
        if (call, at) in self.trouble:
            raise self.trouble.pop((call, at))

    def of(self, *kinds: str) -> list[tuple[Any, ...]]:
        """Return what the log has of some kinds."""
        return [entry for entry in self.log if entry[0] in kinds]

    def decoded(self) -> list[list[int]]:
        """Return the studies of each step."""
        return [list(rows.values()) for _, rows in self.of("decode")]


def feed(requests: Iterable[Request | None]) -> Callable[..., Request | None]:
    """Hand requests over; a None is said once, to who does not wait."""
    items = list(requests)

    def take(*, wait: bool) -> Request | None:
        while items:
            item = items.pop(0)
            if item is not None or not wait:
                return item
        return None

    return take


def outcome(requests: Sequence[Request]) -> list[tuple[list[int], str | None]]:
    return [(request.token_ids, request.finish_reason) for request in requests]


# A study by itself.


def test_eos_ends_a_study_and_is_not_its_token() -> None:
    engine = ScriptedEngine([7, 8, 9])
    requests, events = engine.run()
    assert outcome(requests) == [([7, 8, 9], "eos")]
    assert events == [(0, 7), (0, 8), (0, 9), (0, None)]
    assert engine.decoded() == [[0], [0], [0]]


def test_eos_at_once_is_an_empty_text_and_no_decoding() -> None:
    engine = ScriptedEngine([])
    requests, events = engine.run()
    assert (outcome(requests), events) == ([([], "eos")], [(0, None)])
    assert engine.decoded() == []


@RUN_AHEAD
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_max_new_tokens(limit: int, run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8, 9, 10], run_ahead=run_ahead)
    requests, _ = engine.run(limits=limit)
    assert outcome(requests) == [([7, 8, 9, 10][:limit], "length")]
    assert len(engine.decoded()) == limit - 1, "the last token needs no decoding"


@RUN_AHEAD
def test_eos_right_after_the_last_allowed_token_is_not_looked_for(run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8], run_ahead=run_ahead)
    requests, _ = engine.run(limits=2)
    assert outcome(requests) == [([7, 8], "length")]


@RUN_AHEAD
@pytest.mark.parametrize(("prompt", "made_tokens"), [(5, 4), (7, 2), (8, 1)])
def test_a_full_context_ends_a_study(prompt: int, made_tokens: int, run_ahead: int) -> None:
    # The newest token lies in no slot yet: a context of 8 holds a prompt of 5 and 3 tokens, and predicts a fourth.
    engine = ScriptedEngine(range(10, 30), prompts=[prompt], run_ahead=run_ahead)
    requests, _ = engine.run(limits=15, context=8)
    assert outcome(requests) == [(list(range(10, 10 + made_tokens)), "length")]
    assert engine.of("cache") == [("cache", 1, 8)]


def test_nothing_runs_before_it_is_asked_for_and_times_add_up() -> None:
    engine = ScriptedEngine([7, 8])
    (request,) = engine.requests()
    events = iter(engine.generation(feed([request])))
    assert engine.log == []
    assert (request.prefill_s, request.prefill_peaks) == (0.0, None)
    assert next(events) == (request, 7)
    assert request.prefill_s > 0.0
    assert request.prefill_peaks == PEAKS
    assert request.decode_steps_s == []
    assert [token_id for _, token_id in events] == [8, None]
    assert len(request.decode_steps_s) == 2  # the first token is prefill's; the end takes a step
    assert min(request.decode_steps_s) > 0.0


# Many.


def test_studies_end_by_themselves() -> None:
    engine = ScriptedEngine([7], [8, 9, 10], [11, 12], prompts=[5, 9, 2])
    requests, events = engine.run(limits=3, batch_size=3, max_seq_len=12)
    assert events == [(0, 7), (1, 8), (2, 11), (0, None), (1, 9), (2, 12), (1, 10), (1, None), (2, None)]
    assert outcome(requests) == [([7], "eos"), ([8, 9, 10], "length"), ([11, 12], "eos")]
    assert engine.decoded() == [[0, 1, 2], [1, 2]]


def test_a_row_that_ends_is_given_to_the_next_study_at_once() -> None:
    engine = ScriptedEngine([7], [8, 9, 10, 11], [12, 13], [14])
    requests, events = engine.run(batch_size=2)
    assert [request.token_ids for request in requests] == [[7], [8, 9, 10, 11], [12, 13], [14]]
    # Study 0 ends in the first step; study 2 has its row before there is a second one, and study 3 comes after it.
    assert engine.of("prefill", "decode", "release") == [
        ("prefill", 0, 0),
        ("prefill", 1, 1),
        ("decode", {0: 0, 1: 1}),
        ("release", 0),
        ("prefill", 2, 0),
        ("decode", {0: 2, 1: 1}),
        ("decode", {0: 2, 1: 1}),
        ("release", 0),
        ("prefill", 3, 0),
        ("decode", {0: 3, 1: 1}),
        ("release", 0),
        ("release", 1),
    ]
    assert [study for study, token_id in events if token_id is None] == [0, 2, 3, 1]
    assert events[:5] == [(0, 7), (1, 8), (0, None), (1, 9), (2, 12)]
    assert {request.batch_size for request in requests} == {2}


def test_a_study_that_ends_with_its_first_token_holds_no_row() -> None:
    engine = ScriptedEngine([7, 8], [], [], [9])
    requests, _ = engine.run(batch_size=2)
    assert outcome(requests) == [([7, 8], "eos"), ([], "eos"), ([], "eos"), ([9], "eos")]
    assert engine.decoded() == [[0, 3], [0]]
    assert [entry[1:] for entry in engine.of("prefill")] == [(0, 0), (1, 1), (2, 1), (3, 1)]


def test_a_studys_limit_does_not_depend_on_its_neighbours() -> None:
    """A short prompt beside a long one gets as many tokens as alone."""
    script = range(10, 40)
    for context in (100, 12):
        alone, _ = ScriptedEngine(script, prompts=[3]).run(limits=20, context=context)
        beside, _ = ScriptedEngine(script, script, prompts=[3, 9]).run(limits=20, context=context, batch_size=2)
        assert outcome(beside)[0] == outcome(alone)[0]


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
@pytest.mark.parametrize("seed", range(30))
def test_each_study_says_what_it_says_alone(seed: int, run_ahead: int) -> None:
    rng = random.Random(seed)
    script = [[rng.choice([NOT_FINITE, *range(10, 40)]) for _ in range(rng.randrange(9))] for _ in range(12)]
    prompts = [rng.randrange(1, 20) for _ in script]
    limits = [rng.randrange(1, 10) for _ in script]
    engine = ScriptedEngine(*script, prompts=prompts, run_ahead=run_ahead)
    requests = engine.requests(limits)
    given = [item for request in requests for item in [None] * rng.choice([0, 0, 1, 3]) + [request]]
    rows, context = rng.randrange(1, 5), 22
    events = list(engine.events(feed(given), batch_size=rows, context=context, max_seq_len=rng.randrange(1, 22)))

    said: dict[int, list[int]] = {}
    for study, token_id in events:
        if token_id is not None:
            said.setdefault(study, []).append(token_id)
    for study, request in enumerate(requests):
        limit = min(limits[study], context - prompts[study] + 1)
        expected = script[study][:limit]
        ended = "length" if len(expected) == limit else "eos"
        if NOT_FINITE in expected:
            expected, ended = expected[: expected.index(NOT_FINITE)], None
        assert request.token_ids == said.get(study, []) == expected
        assert request.finish_reason == ended
        assert (request.error is None) == (ended is not None)
        assert [event for event in events if event[0] == study][-1] == (study, None)
    assert [token_id for _, token_id in events].count(None) == len(requests)
    assert max(len(studies) for studies in engine.decoded()) <= rows
    assert {entry[1] for entry in engine.of("cache")} == {rows}
    begun = [entry[1] for entry in engine.of("prefill")]
    assert list(dict.fromkeys(begun)) == list(range(12)), "first come, first served"
    assert len(begun) == 12 or any(NOT_FINITE in said for said in script)


@RUN_AHEAD
def test_the_cache_is_as_long_as_most_need_and_a_longer_study_gets_another(run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8, 9], [10], [11, 12], [13], prompts=[5, 6, 20, 4], run_ahead=run_ahead)
    requests, events = engine.run(limits=4, batch_size=2, max_seq_len=10)
    assert outcome(requests) == [([7, 8, 9], "eos"), ([10], "eos"), ([11, 12], "eos"), ([13], "eos")]
    # The third needs 24 slots. It waits until both rows are free, and the fourth does not overtake it.
    assert engine.of("cache", "prefill", "back") == [
        ("cache", 2, 10),
        ("prefill", 0, 0),
        ("prefill", 1, 1),
        ("back", 2),
        ("cache", 2, 24),
        ("prefill", 2, 0),
        ("prefill", 3, 1),
        ("back", 2),
    ]
    assert [study for study, token_id in events if token_id is None][:2] == [1, 0]
    assert [request.cache_bytes for request in requests] == [200, 200, 480, 480]


def test_a_cache_is_no_longer_than_the_context() -> None:
    engine = ScriptedEngine([7], prompts=[5])
    engine.run(limits=500, context=30)
    assert engine.of("cache") == [("cache", 1, 30)]


# Where the engine runs ahead.


def test_tokens_are_read_one_step_late() -> None:
    engine = ScriptedEngine([7, 8, 9, 10], run_ahead=1)
    (request,) = engine.requests()
    events = iter(engine.generation(feed([request])))
    for token_id, steps in ((7, 1), (8, 2), (9, 3), (10, 4)):
        assert next(events) == (request, token_id)
        assert len(engine.decoded()) == steps, "the step after this token is under way when it is handed out"
    assert list(events) == [(request, None)]
    assert request.token_ids == [7, 8, 9, 10]


def test_the_end_by_eos_costs_one_step_and_the_end_by_length_none() -> None:
    steps = {}
    for run_ahead in (0, 1):
        for limit in (3, 10):
            engine = ScriptedEngine([7, 8, 9], run_ahead=run_ahead)
            requests, _ = engine.run(limits=limit)
            assert outcome(requests) == [([7, 8, 9], "length" if limit == 3 else "eos")]
            assert NEVER not in requests[0].token_ids
            steps[run_ahead, limit] = len(engine.decoded())
    assert steps == {(0, 3): 2, (1, 3): 2, (0, 10): 3, (1, 10): 4}


def test_a_row_is_given_away_before_its_last_token_is_known() -> None:
    """That a study ends by its length is known before: no step is lost between it and the next."""
    engine = ScriptedEngine([7, 8, 9], [10, 11], run_ahead=1)
    requests, events = engine.run(limits=2)
    assert outcome(requests) == [([7, 8], "length"), ([10, 11], "length")]
    assert events == [(0, 7), (0, 8), (0, None), (1, 10), (1, 11), (1, None)]
    at = engine.log.index(("prefill", 1, 0))
    assert engine.log[:at].count(("read",)) == 1, "of the two tokens of the first"


def test_what_ran_ahead_of_an_ended_study_is_nobodys() -> None:
    """The row of a study that has ended with EOS runs a step too many, and then belongs to another."""
    engine = ScriptedEngine([7], [8, 9, 10, 11, 12], [13, 14], run_ahead=1)
    requests, events = engine.run(batch_size=2)
    assert [request.token_ids for request in requests] == [[7], [8, 9, 10, 11, 12], [13, 14]]
    assert engine.decoded() == [[0, 1], [0, 1], [2, 1], [2, 1], [2, 1], [1]]
    assert (0, NEVER) not in events


# Errors.


@RUN_AHEAD
def test_an_error_in_a_prompt_ends_its_study_only(run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8], [9, 10], [11, 12], run_ahead=run_ahead)
    engine.trouble["prefill", 1] = problem = ContextLengthError("got too much")
    requests, events = engine.run(batch_size=2)
    assert [(request.token_ids, request.error) for request in requests] == [
        ([7, 8], None),
        ([], problem),
        ([11, 12], None),
    ]
    assert events.count((1, None)) == 1
    # Half of the prompt may be in the row, and the next study has it at once.
    assert engine.of("prefill", "damaged") == [("prefill", 0, 0), ("damaged", 1), ("prefill", 2, 1)]


def test_an_error_in_an_image_ends_its_study_only() -> None:
    engine = ScriptedEngine([7], [8])
    requests = engine.requests()

    def broken() -> Any:
        raise LiteError("got no picture")

    requests[0].image_features = broken
    events = list(engine.events(feed(requests)))
    assert events == [(0, None), (1, 8), (1, None)]
    assert "no picture" in str(requests[0].error)


def test_a_request_that_has_ended_already_is_handed_out() -> None:
    engine = ScriptedEngine([7], [8])
    requests = engine.requests()
    requests[0].error = LiteError("got nothing")
    assert list(engine.events(feed(requests))) == [(0, None), (1, 8), (1, None)]
    assert [entry[1] for entry in engine.of("prefill")] == [1]


@RUN_AHEAD
def test_numbers_that_are_not_finite_end_their_study_only(run_ahead: int) -> None:
    engine = ScriptedEngine([7, NOT_FINITE, 8], [9, 10, 11, 12], [13], run_ahead=run_ahead)
    requests, _ = engine.run(batch_size=2)
    assert [request.token_ids for request in requests] == [[7], [9, 10, 11, 12], [13]]
    assert [request.finish_reason for request in requests] == [None, "eos", "eos"]
    assert isinstance(requests[0].error, LiteError)
    assert str(requests[0].error) == engine.overflow
    assert engine.of("damaged") == [("damaged", 0)]
    assert engine.log.index(("damaged", 0)) < engine.log.index(("prefill", 2, 0))


@RUN_AHEAD
@pytest.mark.parametrize("limit", [1, 2])
def test_the_last_token_may_be_the_one_that_is_not_finite(limit: int, run_ahead: int) -> None:
    """Its row has been released when that is found out, and may be another study's already: that one begins again."""
    engine = ScriptedEngine([7, NOT_FINITE][-limit:], [9, 10], [11, 12], run_ahead=run_ahead)
    requests, events = engine.run(limits=[limit, 10, 10], max_seq_len=15)
    assert str(requests[0].error) == engine.overflow
    assert [request.token_ids for request in requests[1:]] == [[9, 10], [11, 12]]
    assert events.count((0, None)) == 1
    assert [event for event in events if event[0] == 1] == [(1, 9), (1, 10), (1, None)]
    assert len(engine.of("prefill")) == 3 + run_ahead


@RUN_AHEAD
def test_an_error_of_the_engine_ends_all_that_is_under_way_and_no_more(run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8, 9], [10, 11, 12], [13, 14], run_ahead=run_ahead)
    engine.trouble["decode", 1] = problem = LiteError("got an error of the engine")
    requests, events = engine.run(batch_size=2)
    # The tokens that were chosen before are theirs.
    assert [(request.token_ids, request.error) for request in requests] == [
        ([7, 8], problem),
        ([10, 11], problem),
        ([13, 14], None),
    ]
    assert [(study, token_id) for study, token_id in events if token_id is None] == [(0, None), (1, None), (2, None)]
    assert engine.of("damaged") == [("damaged", 0), ("damaged", 1)]


def test_an_error_that_is_none_of_ours_is_not_hidden() -> None:
    engine = ScriptedEngine([7, 8])
    engine.trouble["decode", 0] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        engine.run()
    assert engine.of("back") == [("back", 1)]


def test_an_error_of_whoever_hands_out_studies_is_not_hidden() -> None:
    """Such as one of a generator over films, which is over then: as if there had been no more of them."""
    engine = ScriptedEngine([7, 8], [9])
    first, _ = engine.requests()
    handed_out = iter([first])

    def broken(*, wait: bool) -> Request:
        for request in handed_out:
            return request
        raise LiteError("got no list of films")

    events = engine.events(broken, batch_size=2)
    with pytest.raises(LiteError, match="no list of films"):
        list(events)
    assert first.error is None


# Memory.


OUT = "got no memory for a token"


@RUN_AHEAD
@pytest.mark.parametrize("call", [("cache", 0), ("prefill", 0), ("prefill", 2), ("decode", 0), ("decode", 2)])
def test_with_too_little_memory_half_the_rows_begin_again(call: tuple[str, int], run_ahead: int) -> None:
    script = [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17], [18], [19, 20], [21]]
    engine = ScriptedEngine(*script, run_ahead=run_ahead)
    engine.trouble[call] = MemoryBudgetError(OUT)
    requests, events = engine.run(batch_size=4)
    assert outcome(requests) == [(said, "eos") for said in script]
    assert [request.error for request in requests] == [None] * 6
    assert sorted(study for study, token_id in events if token_id is None) == list(range(6))
    caches = [entry[1] for entry in engine.of("cache")]
    assert caches == ([2] if call[0] == "cache" else [4, 2])
    assert all(len(studies) <= 2 for studies in engine.decoded()[call[1] if call[0] == "decode" else 0 :])
    # What was under way comes before what was not.
    again = [entry[1] for entry in engine.log[engine.log.index(("cache", 2, 15)) :] if entry[0] == "prefill"]
    assert again == [study for study in range(6) if study in again]
    assert again[-2:] == [4, 5]
    assert {request.batch_size for request in requests[4:]} == {2}
    # The first token is in no decoding step, as if there had been only one beginning.
    assert [len(request.decode_steps_s) for request in requests] == [len(said) for said in script]


def test_half_the_rows_may_still_be_too_many() -> None:
    engine = ScriptedEngine([7, 8], [9, 10], [11], [12], [13])
    engine.trouble = {("decode", 0): MemoryBudgetError(OUT), ("decode", 1): MemoryBudgetError(OUT)}
    requests, _ = engine.run(batch_size=5)
    assert outcome(requests) == [([7, 8], "eos"), ([9, 10], "eos"), ([11], "eos"), ([12], "eos"), ([13], "eos")]
    assert [entry[1] for entry in engine.of("cache")] == [5, 2, 1]
    assert all(len(studies) == 1 for studies in engine.decoded())


def test_what_was_complete_is_not_begun_again() -> None:
    """Of a study that has said its last token nothing is missing, although nobody has looked at it."""
    engine = ScriptedEngine([7, 8], [9, 10, 11], run_ahead=1)
    engine.trouble["decode", 1] = MemoryBudgetError(OUT)
    requests, events = engine.run(limits=[2, 10], batch_size=2)
    assert outcome(requests) == [([7, 8], "length"), ([9, 10, 11], "eos")]
    assert [entry[1] for entry in engine.of("prefill")] == [0, 1, 1]
    assert events.count((0, None)) == 1


@RUN_AHEAD
@pytest.mark.parametrize("call", [("cache", 0), ("prefill", 0), ("decode", 1)])
def test_one_study_alone_without_memory_has_an_error(call: tuple[str, int], run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8, 9], [10, 11], run_ahead=run_ahead)
    engine.trouble[call] = problem = MemoryBudgetError(OUT)
    requests, events = engine.run(batch_size=1)
    assert requests[0].error is problem
    assert events.count((0, None)) == 1
    assert outcome(requests)[1] == ([10, 11], "eos")
    assert engine.of("cache")[-1] == ("cache", 1, 15)


def test_without_memory_for_a_step_that_nobody_needed_nothing_is_lost() -> None:
    """The token before it was the last one, which is found out when it is too late to do without the step."""
    engine = ScriptedEngine([7], [8, 9], run_ahead=1)
    engine.trouble["decode", 1] = MemoryBudgetError(OUT)
    requests, events = engine.run(batch_size=1)
    assert outcome(requests) == [([7], "eos"), ([8, 9], "eos")]
    assert events.count((0, None)) == events.count((1, None)) == 1


def test_an_error_for_want_of_memory_keeps_none() -> None:
    """Its traceback leads to the frames in which the cache was named: the next study could have no other one."""
    engine = ScriptedEngine([7, 8, 9], [10, 11])

    def compute(cache: ScriptedCache) -> None:
        raise RuntimeError("CUDA out of memory")

    def decode(cache: ScriptedCache) -> None:
        try:
            compute(cache)
        except RuntimeError as error:
            raise MemoryBudgetError(OUT) from error

    engine.decode_one_token = decode  # type: ignore[method-assign]
    requests = engine.requests()
    events = engine.events(feed(requests))
    assert [next(events), next(events)] == [(0, 7), (0, None)]
    assert isinstance(requests[0].error, MemoryBudgetError)
    gc.collect()
    assert [cache() for cache in engine.caches] == [None]
    del engine.decode_one_token
    assert list(events) == [(1, 10), (1, 11), (1, None)]


# The feed, and who listens.


@RUN_AHEAD
def test_a_feed_that_has_none_ready_is_asked_again(run_ahead: int) -> None:
    engine = ScriptedEngine([7, 8, 9], [10], [11, 12], run_ahead=run_ahead)
    first, second, third = engine.requests()
    asked: list[bool] = []
    take = feed([first, None, None, second, None, third])

    def noted(*, wait: bool) -> Request | None:
        asked.append(wait)
        return take(wait=wait)

    events = list(engine.events(noted, batch_size=2))
    assert outcome([first, second, third]) == [([7, 8, 9], "eos"), ([10], "eos"), ([11, 12], "eos")]
    assert [study for study, token_id in events if token_id is None].count(2) == 1
    # It waits only where it has nothing else to do: at first, and in the end.
    assert (asked[0], asked[-1]) == (True, True)
    assert asked[1:4] == [False, False, False]
    assert [1] in [studies[1:] for studies in engine.decoded()], "the second comes while the first is under way"


def test_studies_are_taken_as_rows_become_free() -> None:
    engine = ScriptedEngine([7, 8, 9], [10], [11], [12])
    requests, taken = engine.requests(), 0

    def take(*, wait: bool) -> Request | None:
        nonlocal taken
        taken += 1
        return requests[taken - 1] if taken <= len(requests) else None

    events = engine.events(take, batch_size=2)
    assert next(events) == (0, 7)
    assert taken == 1
    for event in events:
        ended = sum(request.has_ended() for request in requests)
        assert taken <= ended + 2, event


def test_a_cache_is_given_back_when_all_is_done_or_nobody_listens_any_more() -> None:
    engine = ScriptedEngine([7, 8, 9], [10])
    engine.run(batch_size=2)
    assert engine.log[-1] == ("back", 2)
    assert engine.of("back") == [("back", 2)]

    engine = ScriptedEngine([7, 8, 9], [10])
    events = engine.events(feed(engine.requests()), batch_size=2)
    next(events)
    assert engine.of("back") == []
    events.close()  # type: ignore[attr-defined]
    assert engine.of("back") == [("back", 2)]


def test_without_studies_there_is_nothing() -> None:
    engine = ScriptedEngine()
    assert list(engine.events(feed([]), batch_size=3)) == []
    assert engine.log == []
