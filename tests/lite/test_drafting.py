"""Drafting: what is guessed, what of it is verified, and that a text is the same with it and without."""

from __future__ import annotations

import collections
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import drive
from scripted_engine import CONTEXT, EOS, PEAKS, ScriptedEngine, a_loop, expected, outcomes, request

import lite
from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import ChosenTokens, Sampling, Segment
from lite.errors import LiteError, MemoryBudgetError
from lite.loading import prompt_of
from lite.session import drafting as module
from lite.session.drafting import Chances, Costs, Drafting, measure_costs
from lite.session.ngrams import CONTEXT as LONGEST
from lite.session.ngrams import Guess, Ngrams, join, num_texts, read_table, tokenizer_sha256, write_table
from lite.session.request import Progress

FREE = Costs([1, 2], [1.0, 1.0])
TABLE: dict[str, Any] = {"tokenizer_sha256": "t", "vocab_size": 50, "eos_token_id": EOS}


# ---- the table


def best_match(texts: Sequence[Sequence[int]], text: Sequence[int]) -> tuple[int, collections.Counter[int]]:
    """Look everywhere: the longest match of the newest tokens, and what follows such."""
    found: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    begun = [-1] * LONGEST + [EOS, *text]
    for other in texts:
        whole = [-1] * LONGEST + [EOS, *other, EOS]
        for place in range(LONGEST + 1, len(whole)):
            same = 0
            while same < LONGEST and whole[place - 1 - same] == begun[-1 - same]:
                same += 1
            found[same][whole[place]] += 1
    return max(found), found[max(found)]


@pytest.mark.parametrize("seed", range(20))
def test_a_guess_is_what_most_often_followed_the_longest_match(seed: int) -> None:
    rng = random.Random(seed)
    words = range(3, 3 + rng.choice([2, 4, 9]))
    texts = [rng.choices(words, k=rng.randrange(9)) for _ in range(rng.randrange(1, 9))]
    table = Ngrams(join(texts, EOS))
    for _ in range(30):
        text = rng.choices([*words, 99], k=rng.randrange(12))
        matched, following = best_match(texts, text)
        guesses = table.follow(text, 5, least=0.0)
        most = max(following.values())
        likeliest = {token for token, count in following.items() if count == most}
        if matched == 0 or likeliest == {EOS}:
            assert guesses == []
        elif guesses or EOS not in likeliest:
            first = guesses[0]
            assert (first.matched, first.seen) == (matched, following.total())
            assert first.token_id in likeliest
            assert first.share == most / following.total()


def test_guesses_go_on_along_the_texts_and_end_where_these_part_or_end() -> None:
    table = Ngrams(join([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 9], [3, 5, 6, 7, 4]], EOS))
    ids = [guess.token_id for guess in table.follow([5], 9)]
    assert ids == [6, 7, 8]
    assert [guess.token_id for guess in table.follow([5], 2)] == [6, 7]
    shares = [guess.share for guess in table.follow([5], 9)]
    assert shares == [1, 2 / 3, 1]
    assert [guess.token_id for guess in table.follow([5], 9, least=0.7)] == [6]
    assert table.follow([40], 9) == []
    # At the beginning of a text the others' beginnings are as before, not what lies before those.
    assert table.follow([], 9)[0].token_id == 5


def test_of_too_many_texts_the_last_are_kept() -> None:
    tokens = join(([number, number] for number in range(3, 40)), EOS, most=20)
    assert tokens.tolist() == [EOS, *[token for number in range(34, 40) for token in (number, number, EOS)]]
    assert num_texts(tokens) == 6


def test_a_table_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    file, tokens = tmp_path / "table", join([[5, 6, 7], [8]], EOS)
    write_table(file, tokens, tokenizer_sha256="t")
    assert read_table(file, **TABLE).tolist() == tokens.tolist()
    good = file.read_bytes()
    header, _, data = good.partition(b"\n")
    fields = json.loads(header)
    with pytest.raises(LiteError, match="got a table for another tokenizer · expected the artifact's own"):
        read_table(file, **TABLE | {"tokenizer_sha256": "u"})
    for vocabulary in ({"vocab_size": 8}, {"eos_token_id": 5}):
        with pytest.raises(LiteError, match="got tokens that are no texts"):
            read_table(file, **TABLE | vocabulary)
    changed = {
        b"": "got no table",
        b"\n".join((header, data[:-1])): "bytes of tokens, not as hashed",
        b"\n".join((header, data + b"\0\0")): "bytes of tokens, not as hashed",
        b"\n".join((header, data[:2] + b"\7" + data[3:])): "not as hashed",
        json.dumps(fields | {"format": "x"}).encode() + b"\n" + data: "got the format 'x'",
        json.dumps(fields | {"more": 1}).encode() + b"\n" + data: "got no table",
        b"\x80\x04N." + good: "got no table",
        b"[" * 4096 + good: "got no table",
    }
    for content, message in changed.items():
        file.write_bytes(content)
        with pytest.raises(LiteError, match=message):
            read_table(file, **TABLE)
    with pytest.raises(LiteError, match="got no table"):
        read_table(tmp_path / "none", **TABLE)


# ---- what is worth verifying


def guesses(*shares: float, seen: int = 10_000) -> list[Guess]:
    return [Guess(5, LONGEST, seen, share) for share in shares]


def test_as_many_guesses_are_verified_as_pay() -> None:
    """Two tokens are nearly free and four take twice as long: the third and fourth have to be nearly certain."""
    drafting = Drafting(Costs([1, 2, 4, 8], [1.0, 1.1, 2.0, 4.0]), eos_token_id=EOS)
    cases = [
        (guesses(0.9, 0.5, 0.5), 1),
        (guesses(1.0, 1.0, 1.0), 3),
        (guesses(0.05, 1.0, 1.0), 0),
        ([], 0),
        (guesses(*[1.0] * 15), 3),
    ]
    for of_row, count in cases:
        assert drafting.counts([of_row], together=False) == [count]
        assert drafting.counts([of_row], together=True) == [count]
    # Several rows share what a step costs: alone by themselves they would not.
    sure, none = guesses(1.0, 1.0, 1.0), guesses()
    steep = Drafting(Costs([1, 2, 4, 8], [1.0, 1.1, 2.0, 4.0]), eos_token_id=EOS)
    assert steep.counts([sure, sure, sure, sure], together=False) == [0] * 4
    flat = Drafting(FREE, eos_token_id=EOS)
    assert flat.counts([sure, none], together=True) == [3, 0]
    assert flat.counts([sure, none, sure, none], together=False) == [0] * 4
    # A cost that falls is noise.
    assert Costs([1, 2, 4], [2.0, 1.0, 3.0]).ratios == (1.0, 1.0, 1.5)
    assert [Costs([1, 2, 4], [1.0, 1.0, 2.0]).of(n) for n in (1, 3, 4, 8)] == [1.0, 1.5, 2.0, 4.0]


def test_guesses_that_were_wrong_are_trusted_less_and_others_are_not() -> None:
    chances, (guess,), (other,) = Chances(), guesses(0.9), guesses(0.9, seen=1)
    before = chances.of(guess)
    assert before == pytest.approx(0.9, abs=1e-3)
    assert chances.of(other) == pytest.approx(0.45)
    for _ in range(2000):
        chances.note(guess, is_right=False)
    assert chances.of(guess) < 0.02
    assert chances.of(other) == pytest.approx(0.45)
    for _ in range(2000):
        chances.note(guess, is_right=True)
    assert chances.of(guess) > 0.7, "what was long ago fades"


# ---- texts are what they are without


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_each_study_says_what_it_says_alone(seed: int, together: bool) -> None:
    """Whatever is drafted, right or wrong, in however many rows, at the end of a row too, and whatever fails."""
    rng = random.Random(seed)
    faults = rng.choice([0.0, 0.0, 0.04])
    asked = [
        request(rng.randrange(6), tuple(rng.choices(range(3, 6), k=rng.randrange(1, 3))), limit=rng.randrange(1, 12))
        for _ in range(20)
    ]
    context, rows = rng.choice([14, CONTEXT]), rng.randrange(1, 5)
    # Some texts as they will be, and some that part from that.
    texts = [expected(one, faults=faults)[0] for one in asked[::2]]
    texts += [[*text[: len(text) // 2], 40, *text[len(text) // 2 :]] for text in texts]
    drafting = Drafting(FREE, eos_token_id=EOS, texts=join(texts, EOS) if seed % 3 else None)
    engine = ScriptedEngine(run_ahead=seed % 2, faults=faults, verifies_together=together)
    loop = a_loop(engine, rows=rows, context=context, places=rng.randrange(1, 15), drafting=drafting)
    studies = drive(loop, asked)
    for study, one in zip(studies, asked, strict=True):
        token_ids, reason = expected(one, context=context, faults=faults)
        assert (study.token_ids, study.finish_reason) == (token_ids, reason)
        assert (str(study.error) == engine.overflow) == (reason is None)
        assert len(study.logprobs) == len(token_ids)
        if reason is not None:
            assert len(study.decode_steps_s) == len(token_ids) - (reason == "length")
        assert 0 <= study.num_accepted_tokens <= study.num_drafted_tokens
    done = drafting.statistics
    assert sum(study.num_accepted_tokens for study in studies) == done.accepted
    if seed % 3 and not faults and rows == 1:
        assert done.accepted > 5
        assert (
            len(engine.of("decode")) == done.steps < sum(len(study.token_ids) for study in studies) - done.accepted / 2
        )


def test_no_more_is_verified_than_a_text_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAFTS", 1)
    asked = next(r for film in range(99) if len(expected(r := request(film, (5,), limit=4))[0]) == 4)
    drafting = Drafting(FREE, eos_token_id=EOS, texts=join([[*expected(asked)[0], 7, 8]], EOS))
    (study,) = drive(a_loop(ScriptedEngine(), drafting=drafting), [asked])
    # One with the prompt, two of a step; of the last there is nothing to draft.
    assert (study.num_drafted_tokens, study.num_accepted_tokens, study.finish_reason) == (1, 1, "length")


def test_the_tokens_of_a_step_have_equal_parts_of_its_time_and_none_lies_beyond_the_end() -> None:
    chosen = ChosenTokens((5, 6, EOS, 7), (-1.0, -2.0, -3.0, -4.0))
    for limit, kept, steps, reason in ((9, 2, 3, "eos"), (3, 2, 3, "eos"), (2, 2, 2, "length"), (1, 1, 1, "length")):
        study = Progress(request(1, (5,)))
        study.prefill_peaks, study.since = PEAKS, 10.0
        assert study.take(chosen, 16.0, limit=limit, eos_token_id=EOS, overflow="") == reason
        assert (study.token_ids, study.logprobs) == ([5, 6][:kept], [-1.0, -2.0][:kept])
        assert study.decode_steps_s == [6.0 / steps] * steps


def test_what_runs_out_of_memory_among_drafts_goes_on_where_it_was() -> None:
    asked = [request(film, (5, 6), limit=30) for film in range(8)]
    texts = join([expected(one)[0] for one in asked], EOS)
    engine = ScriptedEngine(verifies_together=True)
    engine.trouble["decode", 1] = MemoryBudgetError("got no memory for a token")
    loop = a_loop(engine, rows=4, places=40, drafting=Drafting(FREE, eos_token_id=EOS, texts=texts))
    assert outcomes(drive(loop, asked)) == [expected(one) for one in asked]
    assert [entry[1] for entry in engine.of("cache")] == [4, 2]


def test_a_process_learns_from_its_own_texts_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OWN_TOKENS", 40)
    drafting = Drafting(FREE, eos_token_id=EOS)
    asked = next(r for film in range(99) if len(expected(r := request(film, (5,), limit=30))[0]) > 8)
    first, second = drive(a_loop(ScriptedEngine(), drafting=drafting), [asked, asked])
    assert first.num_accepted_tokens == 0
    assert second.num_accepted_tokens > 5
    assert second.token_ids == first.token_ids
    for number in range(3, 40):
        drafting.learn([number] * 5)
    assert drafting._own is not None
    assert len(drafting._own) <= 40
    assert drafting.guess([39], 3)[0].token_id == 39
    assert drafting.guess([3], 3) == []


def test_where_nothing_pays_nothing_is_looked_up_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WATCH", 10)
    monkeypatch.setattr(module, "_REST", 20)
    steep = Drafting(Costs([1, 2], [1.0, 9.0]), eos_token_id=EOS)
    asked = [request(film, (5,), limit=30) for film in range(30)]
    engine = ScriptedEngine(run_ahead=1)
    assert outcomes(drive(a_loop(engine, drafting=steep), asked)) == [expected(one) for one in asked]
    steps = len(engine.of("decode"))
    assert 0 < steep.statistics.steps < 0.6 * steps
    assert steep.statistics.drafted == 0


# ---- on real engines


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_token_by_itself_is_to_the_bit_what_it_is_behind_drafts(
    tiny_onnx_artifact: Artifact, cache_dtype: Any
) -> None:
    """And what was drafted and cut away has left nothing behind."""
    engine: Any = OnnxDecoder(tiny_onnx_artifact, cache_dtype=cache_dtype, two_rows=True)
    rng = np.random.default_rng(5)
    text = rng.integers(3, 300, 40).tolist()
    prompt, caches = text[:12], [engine.new_cache(1, 60) for _ in range(2)]
    for cache in caches:
        engine.extend(Segment(row=0, start=0, input_ids=prompt, num_logits=1), cache)
    alone, drafted = caches
    at = 12
    while at < 40:
        count = int(rng.integers(0, min(5, 40 - at)))
        right = text[at + 1 : at + 1 + count]
        wrong = rng.integers(3, 300, 3).tolist()
        drafted.truncate(0, at, newest=text[at])
        engine.decode(drafted, {0: [*right, *wrong]})
        together = drafted.last_logits[0]
        for back in range(count + 1):
            alone.truncate(0, at + back, newest=text[at + back])
            engine.decode(alone)
            assert np.array_equal(alone.last_logits[0, 0], together[back])
        at += count + 1


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_texts_with_a_table_are_those_without(
    tiny_onnx_artifact: Artifact, films: list[Path], tmp_path: Path, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the public way: reports are drafted, a table is built of them, and it saves steps."""
    sampled = {"max_new_tokens": 24, "sampling": Sampling(temperature=1.0, seed=4)}
    # Loaded to draft, and given nothing to draft by: `drafts="off"` may part from it where two tokens are as likely.
    plain = dataclasses.replace(lite.load(tiny_onnx_artifact.path, engine=engine, drafts="auto"), drafting=None)
    found = [plain.findings(film, **how) for film in films[:2] for how in ({"max_new_tokens": 24}, sampled)]
    assert {(one.num_drafted_tokens, one.num_accepted_tokens) for one in found} == {(0, 0)}
    reports, table = tmp_path / "reports.txt", tmp_path / "reports.drafts"
    reports.write_text("Clear lungs.\n\n  A small effusion. \n", encoding="utf-8")
    assert main(["drafts", "build", str(reports), "--artifact", str(tiny_onnx_artifact.path), "--out", str(table)]) == 0
    assert "2 texts" in capsys.readouterr().out
    # What random weights say is no text that a tokenizer would make: the table is given the tokens.
    write_table(table, join([one.token_ids for one in found], 2), tokenizer_sha256=tokenizer_sha256(tiny_onnx_artifact))
    model = lite.load(tiny_onnx_artifact.path, engine=engine, drafts=table)
    assert model.drafting is not None
    assert engine == "torch" or model.decoder.two_rows  # type: ignore[attr-defined]
    # Here a step of two tokens takes twice as long as that of one: as if it were free, so that something is drafted.
    free = Drafting(FREE, eos_token_id=2, texts=join([one.token_ids for one in found], 2))
    model = dataclasses.replace(model, drafting=free)
    again = [model.findings(film, **how) for film in films[:2] for how in ({"max_new_tokens": 24}, sampled)]
    assert [one.token_ids for one in again] == [one.token_ids for one in found]
    assert all(one.num_accepted_tokens > 10 for one in again)
    assert len(again[0].timings.decode_steps_s) == len(found[0].timings.decode_steps_s)
    assert model.plan.drafts == str(table)
    assert json.loads(json.dumps(again[0].to_dict()))["num_accepted_tokens"] == again[0].num_accepted_tokens


def test_costs_are_measured_on_the_engine_itself(tiny_onnx_artifact: Artifact) -> None:
    _, prompt = prompt_of(tiny_onnx_artifact)
    costs = measure_costs(OnnxDecoder(tiny_onnx_artifact, two_rows=True), min(100, prompt.max_seq_len))
    assert costs.tokens == (1, 2, 4, 8)
    assert costs.ratios[0] == 1.0
    assert str(costs).startswith("1: 1.00, 2: ")


def test_a_table_that_is_none_is_refused_before_anything_is_loaded(
    tiny_onnx_artifact: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(LiteError, match=r"none: got no table of drafts .*lite drafts build"):
        lite.load(tiny_onnx_artifact.path, drafts=tmp_path / "none")
    with pytest.raises(LiteError, match="got drafts '' · expected auto, off, or the path"):
        lite.load(tiny_onnx_artifact.path, drafts="")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n", encoding="utf-8")
    command = ["drafts", "build", str(empty), "--artifact", str(tiny_onnx_artifact.path), "--out", str(tmp_path / "t")]
    assert main(command) == 1
    assert not (tmp_path / "t").exists()
