"""`python -m benchmarks speed gpu` on a CPU, at small shapes: each section, and what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from repository import ROOT
from torch import nn

from benchmarks.speed.gpu import batches, check, decode, few_sms, int8_cache, memory, model, prefill
from benchmarks.speed.gpu.command import (
    QUICK,
    SECTIONS,
    Section,
    _parser,
    document_of,
    format_report,
    main,
    measure_sections,
    setting_of,
)
from benchmarks.speed.gpu.decoding import Decoding, time_in_turns, tokens_seen
from benchmarks.speed.gpu.rig import Clock, HostClock, Report, Rig, Setting
from benchmarks.speed.kernels import Shapes, Unavailable
from benchmarks.speed.peers.lite_decoder import weight_bytes
from kernels.gptq import GptqWeight
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import linears_of
from lite.memory.counts import decoder_bytes, layer_bytes
from lite.session.generate import Request

CPU = torch.device("cpu")
SHAPES = Shapes(hidden_size=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocab_size=80)
SMALL = Setting(
    shapes=SHAPES, layers=2, context=20, prompt_tokens=18, rows=(1, 2), rounds=2, new_tokens=3, checked_tokens=4,
    scored_tokens=5, chunk_sizes=(64, 8), requests=5, batch_size=2, text_tokens=(2, 6),
)  # fmt: skip
BANDWIDTH = 1e9


class FakeClock:
    """Every stretch between two marks takes a millisecond."""

    def __init__(self) -> None:
        self.marks = 0

    def mark(self) -> None:
        self.marks += 1

    def seconds(self) -> list[float]:
        marks, self.marks = self.marks, 0
        return [1e-3] * (marks - 1)


def rig(setting: Setting = SMALL, *, clock: Callable[[], Clock] = FakeClock, capture: Any = None) -> Rig:
    torch.manual_seed(0)
    return Rig(setting=setting, device=CPU, clock=clock, capture=capture, bandwidth=lambda _: BANDWIDTH)


def decoder(bits: int | None = 4) -> LlamaDecoder:
    torch.manual_seed(0)
    return model.random_decoder(rig().config(bits), CPU)


# -- Decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_random_decoder_takes_what_a_loaded_one_does(bits: int | None) -> None:
    made = decoder(bits)
    assert made.nbytes == decoder_bytes(made.config, itemsize=4)
    assert made.dtype == torch.float32
    for name, linear in linears_of(made).items():
        (weight,) = linear.weights
        assert weight.shape == (sum(linear.parts.values()), linear.in_features)
        assert isinstance(weight, GptqWeight) == (bits is not None and name != "lm_head")
        assert model.dequantized(linear).mean().abs() < 0.1 * model.dequantized(linear).std(), name
    config = made.config
    head = 4 * config.vocab_size * config.hidden_size
    norms = 4 * 5 * config.hidden_size
    assert weight_bytes(made) == config.num_hidden_layers * layer_bytes(config, itemsize=4) + head + norms


def test_each_weight_is_its_own_draw() -> None:
    weights = [model.dequantized(linear).flatten()[:64] for linear in linears_of(decoder()).values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_plain_logits_are_what_the_decoder_computes(bits: int | None, rows: int) -> None:
    made = decoder(bits)
    expected = check.expected_logits(made)
    for capture in (None, record):
        part = model.part_of(made, capture=capture)
        got = check.logits_of(part, expected.input_ids, rows)
        assert got.shape == (rows, 2, SHAPES.vocab_size)
        assert check.difference(got, expected.logits) < 1e-5
    quantized = model.part_of(made, cache_dtype="int8")
    assert 1e-5 < check.difference(check.logits_of(quantized, expected.input_ids, rows), expected.logits) < 0.03


def test_the_text_depends_on_the_prompt_and_on_its_own_tokens() -> None:
    """Else captured and launched steps would agree for no reason, and a KL would say nothing."""
    made = decoder()
    texts = [model.greedy(made, model.random_prompt(made.config, 30, CPU, seed=seed), 12)[0] for seed in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    assert all(len(set(text)) > 3 for text in texts)


def test_a_part_shares_the_weights_and_nothing_else() -> None:
    made = decoder()
    part = model.part_of(made, layers=1, cache_dtype="int8", capture=record)
    assert part.config.num_hidden_layers == len(part.model.layers) == 1
    assert len(made.model.layers) == 2
    assert made.capture is None
    assert linears_of(part)["model.layers.0.mlp.down_proj"] is linears_of(made)["model.layers.0.mlp.down_proj"]
    assert part.new_cache(1, 8).k_cache.dtype == torch.int8
    assert made.new_cache(1, 8).k_cache.dtype == torch.float32


PEERS = {"tinygemm": model.tinygemm, "nf4": model.nf4, "dense": model.dense}
WIDE = dataclasses.replace(SHAPES, hidden_size=256, inner=256, heads=4, kv_heads=4, head_dim=64)


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_our_model(name: str) -> None:
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    ours = model.random_decoder(rig(dataclasses.replace(SMALL, shapes=WIDE)).config(4), CPU)
    expected = check.expected_logits(ours)
    theirs = model.swapped(ours, PEERS[name], dtype=torch.float32)
    far = check.difference(check.logits_of(theirs, expected.input_ids, 1), expected.logits)
    assert far < (1e-5 if name == "dense" else check.ALLOWED["4 bits"])
    dense = 4 * 2 * (3 * 256 * 256 + 256 * 256 + 3 * 256 * 256)
    assert weight_bytes(theirs) - weight_bytes(ours) > 0 if name == "dense" else weight_bytes(theirs) < dense / 4


def test_transformers_computes_our_model() -> None:
    pytest.importorskip("transformers")
    ours = decoder()
    expected = check.expected_logits(ours)
    dense = model.swapped(ours, model.dense, dtype=torch.float32)
    engine = model.transformers_engine(dense, max_seq_len=80)
    engine.start(2)
    got = (engine.prefill(expected.input_ids[:-1]), engine.decode_one_token(expected.input_ids[-1]))
    assert check.difference(torch.stack(got), expected.logits) < 1e-5


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="not installed"):
        model.gemlite(torch.zeros(1, 1))

    def missing() -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(model, "import_bitsandbytes", missing)
    with pytest.raises(Unavailable, match="not installed"):
        model.nf4(torch.zeros(1, 64))


def test_a_prompt_has_the_places_that_were_asked_for() -> None:
    config = rig().config(4)
    for tokens in (2, 18, 1420):
        prompt = model.random_prompt(config, tokens, CPU)
        assert prompt.num_tokens == tokens
        assert len(prompt.features) == max(tokens - 50, tokens - tokens // 2)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_a_filled_cache_decodes_to_numbers(cache_dtype: Any) -> None:
    part = model.part_of(decoder(), cache_dtype=cache_dtype)
    cache = part.new_cache(2, 12)
    model.fill(cache, 10)
    first = part.decode_one_token(cache).clone()
    assert min(cache.newest().tolist()) >= 0
    model.rewind(cache, 10)
    cache.input_ids.zero_()
    assert torch.equal(part.decode_one_token(cache), first)


# -- Decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded() -> Report:
    report = Report(title="Decoding")
    decode.measure(rig(capture=record), report)
    return report


def row_of(report: Report, engine: str, rows: int, cache: str = "float16") -> dict[str, Any]:
    (found,) = (
        row
        for row in report.figures["rows"]
        if (row["engine"], row["rows"], row["cache"]) == (engine, rows, cache)
    )  # fmt: skip
    return dict(found)


def test_bytes_and_shares_of_decoding(decoded: Report) -> None:
    row, config = row_of(decoded, "lite int4", 2), rig().config(4)
    read = 2 * layer_bytes(config, itemsize=4) + 4 * 64 * (80 + 5)
    assert row["weight_bytes"] == read
    # Keys and values of 2 layers, 2 heads of 16, float32 on a CPU; 20 of context, one not timed, two of three.
    assert row["cache_bytes"] == 2 * 23 * (2 * 2 * 2 * 16 * 4)
    assert row["share"] == pytest.approx((read + row["cache_bytes"]) / 1e-3 / BANDWIDTH)
    assert row["time"]["p50"] == pytest.approx(1e-3)
    assert row["time"]["count"] == 2 * 3
    assert row["ratio"] == 1
    assert row["graph"] is True
    int8 = row_of(decoded, "lite int4", 1, "int8")
    assert int8["cache_bytes"] == 23 * (2 * 2 * 2 * (16 + 2))
    assert row_of(decoded, "lite int4, launched", 1)["graph"] is False


def test_the_table_of_decoding(decoded: Report) -> None:
    assert decoded.wrong == []
    text = format_report(decoded)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(decoded.cells) + 2
    assert max(len(cells) for cells in decoded.cells) == min(len(cells) for cells in decoded.cells) == 9
    assert "| lite int4" in lines[2]
    assert "1.000–1.000" in lines[2]
    engines = {row["engine"] for row in decoded.figures["rows"]}
    assert {"lite int4", "lite int8", "lite int4, launched", "tinygemm int4", "fp16, cuBLAS", "gemlite int4"} <= engines
    assert "gemlite int4, float16 cache, 1 row: not installed" in text
    assert "lite onnx, float16 cache, 1 row: no --artifact" in text
    assert row_of(decoded, "lite int8", 2)["turns"] == (
        "lite int4, float16 cache", "lite int8, float16 cache", "lite int8, int8 cache",
    )  # fmt: skip


def test_logits_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ALLOWED", dict.fromkeys(check.ALLOWED, -1.0))
    monkeypatch.setattr(decode, "time_in_turns", lambda _, decodings: pytest.fail("timed") if decodings else {})
    report = Report(title="Decoding")
    decode.measure(rig(), report)
    assert any("lite int4, float16 cache, 1 row: its logits differ" in line for line in report.wrong)
    assert not any("tinygemm" in line for line in report.wrong), "a peer's mistake is not ours"
    assert {cells[3] for cells in report.cells if cells[0].startswith("lite int")} == {"WRONG"}
    assert all(row["time"] is None for row in report.figures["rows"])


def test_captured_steps_that_decode_something_else_are_wrong() -> None:
    def damaged(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        first = step()  # and never anything else
        return lambda: first

    here = rig(capture=damaged)
    problem = check.check_graphs(here, here.decoder(), None)
    assert problem is not None
    assert problem.startswith("captured steps decode other tokens")
    report = Report(title="Decoding")
    decode.measure(here, report)
    assert any("captured steps decode other tokens" in line for line in report.wrong)


def test_a_capture_that_fails_is_wrong_and_named() -> None:
    def fails(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted\nand more")

    here = rig(capture=fails)
    assert check.check_graphs(here, here.decoder(), None) == "not captured in a CUDA graph: operation not permitted"


def test_groups() -> None:
    group = functools.partial(decode.grouped, reference="ref", needed=4)
    assert group({"ref": 4, "a": 2, "b": 1}, room=9) == [["ref", "a", "b"]]
    assert group({"ref": 4, "a": 4, "b": 4}, room=9) == [["ref", "a"], ["ref", "b"]]
    assert group({"a": 4, "b": 4}, room=9) == [["ref", "a"], ["ref", "b"]]
    assert group({"ref": 4, "a": 4}, room=7) == [["ref"], ["a"]]
    assert group({"ref": 4, "a": 8, "b": 1}, room=6) == [["ref", "b"]]
    assert decode.grouped({"a": 1, "b": 1}, reference="ref", needed=math.inf, room=9) == [["a", "b"]]


def test_a_cache_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here = rig(dataclasses.replace(SMALL, rows=(1, 8)))
    one = decode.cache_bytes(here, 1, None)
    monkeypatch.setattr(
        Rig, "room", lambda self, *, unlimited=False: 1e9 if unlimited or self.is_unlimited else 5.0 * one
    )
    report = Report(title="Decoding")
    decode.measure(here, report)
    assert report.wrong == []
    eight = row_of(report, "lite int4", 8)
    assert eight["time"] is None
    assert "does not fit" in eight["why"]
    assert row_of(report, "lite int4", 8, "int8")["time"] is not None
    peer = row_of(report, "fp16, cuBLAS", 8)
    assert peer["unlimited"]
    assert any(line.startswith("²") for line in report.notes)


def test_a_peer_too_large_for_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    here = rig()
    room = 3.0 * decode.cache_bytes(here, 2, None)
    monkeypatch.setattr(Rig, "room", lambda *_, **__: room)
    report = Report(title="Decoding")
    decode.measure(here, report)
    assert report.wrong == []
    assert "the card has" in row_of(report, "fp16, cuBLAS", 1)["why"]


def test_a_decoding_that_fails_is_left_out() -> None:
    class Counting(Decoding):
        def __init__(self, fails_at: int) -> None:
            self.steps, self.fails_at = 0, fails_at

        def start(self) -> None:
            pass

        def step(self) -> None:
            self.steps += 1
            if self.steps == self.fails_at:
                raise RuntimeError("no memory\nfor long")

    good, bad = Counting(0), Counting(6)
    found = time_in_turns(rig(), {"good": good, "bad": bad})
    assert found == {"good": [1e-3] * 6, "bad": "failed (RuntimeError: no memory)"}
    assert good.steps == 2 * 4
    assert bad.steps == 6
    assert tokens_seen(20, 3) == 23


def test_nothing_begins_when_the_time_is_up() -> None:
    here = rig()
    here.deadline = 0.0
    report = Report(title="Decoding")
    decode.measure(here, report)
    assert {row["why"] for row in report.figures["rows"][:-1]} == {decode.LATE}
    assert report.wrong == []


# -- The other sections ----------------------------------------------------------------------------------------------


def test_prefill() -> None:
    report = Report(title="Prefill")
    prefill.measure(rig(), report)
    rows = report.figures["rows"]
    sums = (False, True) if prefill.accumulation_switch() else (False,)
    whats = ["lite int4, chunks of 64", "lite int4, chunks of 8", "cuBLAS alone"]
    assert [(row["what"], row["fp16_accumulation"]) for row in rows] == [
        (what, fp16) for fp16 in sums for what in whats
    ]
    assert [row["ratio"] for row in rows[:3]] == [1, 1, None]
    assert report.cells[0][4] == "18,000"
    assert any("TTFT without the vision tower (no --artifact was given)" in note for note in report.notes)
    if prefill.accumulation_switch():
        assert report.figures["fp16_accumulation"]["passes"]
        assert not torch.backends.cuda.matmul.allow_fp16_accumulation


def test_float16_sums_have_a_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MAX_KL", -1.0)
    monkeypatch.setattr(prefill, "accumulation_switch", lambda: True)
    here, report = rig(), Report(title="Prefill")
    made = model.part_of(here.decoder())
    prefill._judge_fp16_sums(here, report, made, model.random_prompt(made.config, 18, CPU))
    assert not report.figures["fp16_accumulation"]["passes"]
    assert "float16 sums FAIL their gate" in report.notes[-1]
    assert report.wrong == []


def test_without_float16_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "accumulation_switch", lambda: False)
    report = Report(title="Prefill")
    prefill.measure(rig(), report)
    assert len(report.cells) == 3
    assert any("float16 sums: torch" in note for note in report.notes)


def test_float16_sums_reach_the_linears_and_are_taken_back() -> None:
    made = decoder()
    with prefill.accumulating(made, in_float16=True):
        assert all(linear.fp16_accumulation for linear in linears_of(made).values())
    assert not any(linear.fp16_accumulation for linear in linears_of(made).values())


def test_ttft_with_an_artifact(tiny_artifact: Any) -> None:
    report = Report(title="Prefill")
    prefill.measure(rig(dataclasses.replace(SMALL, artifact=tiny_artifact.path)), report)
    figures = report.figures
    assert figures["ttft_s"] == figures["vision_s"]["p50"] + figures["prefill_and_first_token_s"]["p50"]
    assert any("the tower on CPUExecutionProvider" in note for note in report.notes)


def test_memory() -> None:
    report = Report(title="Memory")
    memory.measure(rig(), report)
    rows = report.figures["rows"]
    assert [(row["rows"], row["cache"]) for row in rows] == [(1, "float16"), (1, "int8"), (8, "float16"), (8, "int8")]
    for row in rows:
        assert row["error"] == row["planned_bytes"] / row["held_bytes"] - 1
        assert row["plan"]["batch_size"] == row["rows"]
    assert report.cells[0][4].endswith("%")


def test_the_plan_is_that_of_the_real_model() -> None:
    """On a GPU, which need not be there to be planned for; bytes that are known of Vicuna-7B in 4 bits."""
    here = Rig(setting=Setting(), device=torch.device("cuda", 0))
    planned = memory.plan(here, 8, None)
    assert planned.max_seq_len == 1536
    assert planned.cache_bytes == 8 * 1536 * 2 * 32 * 4096 * 2
    assert planned.decoder_bytes == decoder_bytes(here.config(4), itemsize=2)
    assert planned.weight_bytes + planned.study_bytes < Setting().memory_bytes


def test_int8_cache() -> None:
    report = Report(title="An int8 cache")
    int8_cache.measure(rig(), report)
    assert [cells[0] for cells in report.cells] == ["float16", "int8"]
    # 2 (keys, values) x 2 layers x 2 heads, of 16 float32; or of 16 bytes and a scale.
    assert [cells[1] for cells in report.cells] == ["512", "144"]
    assert report.figures["gain"] == pytest.approx(0)
    assert 0 < report.figures["mean_kl"] < 0.01
    assert any("Random weights" in note for note in report.notes)


@pytest.mark.parametrize("capture", [None, record])
def test_batches(capture: Any) -> None:
    report = Report(title="Batches")
    here = rig(capture=capture)
    batches.measure(here, report)
    rows = report.figures["rows"]
    ways = [("continuous", "float16"), ("static", "float16"), ("continuous", "int8"), ("static", "int8")]
    assert [(row["batching"], row["cache"]) for row in rows] == ways
    prompt = model.random_prompt(here.decoder().config, 18, CPU)
    tokens = sum(request.max_new_tokens for request in batches._requests(here, prompt))
    assert {row["tokens"] for row in rows} == {tokens}
    assert {row["studies"] for row in rows} == {5}
    assert {row["rows"] for row in rows} == {2}
    assert all(2 <= request.max_new_tokens <= 6 for request in batches._requests(here, prompt))


def test_continuous_batching_takes_fewer_steps() -> None:
    here = rig()
    made = model.part_of(here.decoder())
    steps = 0
    decode_one_token = made.decode_one_token

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return decode_one_token(*arguments)

    made.decode_one_token = counted  # type: ignore[method-assign]
    prompt = model.random_prompt(made.config, 18, CPU)
    lengths = (6, 1, 6, 1, 1, 6)

    def requests() -> list[Request]:
        return [batches._request(prompt, length) for length in lengths]

    batches._run(here, made, [requests()])
    continuous, steps = steps, 0
    every = requests()
    batches._run(here, made, [every[i : i + 2] for i in range(0, 6, 2)])
    assert continuous < steps


def test_few_multiprocessors_without_a_gpu() -> None:
    with pytest.raises(Unavailable, match=r"no green context|has no green contexts|have no streams"):
        few_sms.measure(rig(), Report(title="Few multiprocessors"))


def test_few_multiprocessors() -> None:
    """As on a GPU, but for the restriction."""
    report, here = Report(title="Few multiprocessors", header=decode.HEADER), rig(capture=record)
    few_sms._measure(here, report, 28)
    assert [(cells[0], cells[1], cells[2]) for cells in report.cells] == [
        ("lite int4", "float16", "1"),
        ("lite int4", "int8", "1"),
    ]
    row = report.figures["rows"][0]
    assert row["share"] == pytest.approx(row["bytes_per_s"] / BANDWIDTH)
    assert [row["ratio"] for row in report.figures["rows"]] == [1, 1]
    assert "1.000 | 1.000–1.000 |" in format_report(report)
    assert "28 multiprocessors ran it (asked for 28), and read 1 GB/s" in report.notes[0]


def test_the_kernels_plan_for_few_multiprocessors() -> None:
    from kernels.backend import card_of

    device = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.backend._card", lambda _: card_of(CPU))
        with few_sms.planned_for(28, device):
            assert card_of(device).multiprocessors == 28
        assert card_of(device).multiprocessors == card_of(CPU).multiprocessors


# -- The command -----------------------------------------------------------------------------------------------------


def test_sections_are_isolated_and_written_one_by_one() -> None:
    def fails(rig: Rig, report: Report) -> None:
        report.header = ("what", "ms")
        report.cells.append(("half", "1"))
        raise ValueError("odd\nmore")

    def absent(rig: Rig, report: Report) -> None:
        raise Unavailable("no such card")

    def works(rig: Rig, report: Report) -> None:
        report.figures["value"] = math.nan

    sections = [
        Section(name=name, title=name.title(), measure=measure, share=0.5)
        for name, measure in (("fails", fails), ("absent", absent), ("works", works))
    ]
    seen: list[list[str]] = []
    reports = measure_sections(rig(), sections, 100, lambda so_far: seen.append(list(so_far)))
    assert seen == [["fails"], ["fails", "absent"], ["fails", "absent", "works"]]
    assert reports["fails"].wrong == ["Fails: failed (ValueError: odd)"]
    assert "Not measured to the end: failed (ValueError: odd)." in format_report(reports["fails"])
    assert "| half" in format_report(reports["fails"])
    assert reports["absent"].wrong == []
    assert "Not measured: no such card." in format_report(reports["absent"])
    document = json.dumps({name: document_of(report) for name, report in reports.items()}, allow_nan=False)
    assert json.loads(document)["works"]["value"] is None


def test_a_section_has_its_share_of_the_time_and_none_begins_after_the_end() -> None:
    now = 0.0
    deadlines = []

    def takes(seconds: float) -> Callable[[Rig, Report], None]:
        def measure(rig: Rig, report: Report) -> None:
            nonlocal now
            deadlines.append(rig.deadline)
            now += seconds

        return measure

    here = rig()
    here.now = lambda: now
    sections = [Section(name=str(i), title=str(i), measure=takes(60), share=0.5) for i in range(3)]
    reports = measure_sections(here, sections, 100, lambda _: None)
    assert deadlines == [50, 100]
    assert reports["2"].why == "the time was up"
    assert reports["0"].took_s == 60


def test_every_section_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """All but the kernels, which need a GPU: as the command runs them, one after the other on one rig."""
    setting = dataclasses.replace(SMALL, rows=(1,), rounds=1)
    sections = [section for section in SECTIONS if section.name != "kernels"]
    reports = measure_sections(rig(setting, clock=HostClock), sections, 600, lambda _: None)
    assert {name: report.wrong for name, report in reports.items() if report.wrong} == {}
    assert [name for name, report in reports.items() if report.why] == ["few-sms"]
    json.dumps({name: document_of(report) for name, report in reports.items()}, allow_nan=False)


def test_the_setting() -> None:
    whole = setting_of(_parser().parse_args([]))
    assert whole == dataclasses.replace(Setting(), rows=(1, 2, 4, 8))
    assert (whole.layers, whole.context, whole.prompt_tokens, whole.memory_bytes) == (32, 1470, 1420, 12_000_000_000)
    assert whole.shapes.hidden_size == 4096
    quick = setting_of(_parser().parse_args(["--quick", "--rows", "2", "1", "2", "--memory-gb", "6"]))
    assert (quick.layers, quick.rows, quick.memory_bytes) == (QUICK.layers, (1, 2), 6_000_000_000)
    assert setting_of(_parser().parse_args(["--quick", "--layers", "2"])).layers == 2
    # Everything that is decoded has a place in the context.
    assert whole.context + whole.new_tokens < 4096
    assert whole.prompt_tokens + whole.text_tokens[1] <= 4096


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--json", str(tmp_path / "figures.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: got no GPU")
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--rows", "0"], ["--rows"], ["odd"], ["--memory-gb", "0"], ["--memory-gb", "inf"], ["--only", "odd"]],
)
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)


def test_a_linear_of_a_peer_that_raises_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel image is available")

    odd = decode.Model(
        name="odd", bytes_per_weight=1, make=decode._peer(lambda _: Fails(), "float16"), allowed="4 bits"
    )
    monkeypatch.setattr(decode, "MODELS", (decode.MODELS[0], odd))
    report = Report(title="Decoding")
    decode.measure(rig(), report)
    assert report.wrong == []
    assert "failed (RuntimeError: no kernel image is available)" in row_of(report, "odd", 1)["why"]


def test_the_count_of_multiprocessors_compiles() -> None:
    """As far as machine code, for cards that are not there; a driver that knows only what they are stands in."""
    pytest.importorskip("triton")
    code = """
import torch
from compile_kernels import NoGpu
from triton.runtime import driver
cards = NoGpu()
driver.set_active(cards)
from benchmarks.speed.gpu import smid
for cards.capability in (70, 86, 90):
    kernel = smid._note_kernel.run(torch.empty(64, dtype=torch.int32), grid=(64,), warmup=True, num_warps=1)
    print("%smid" in kernel.asm["ptx"], len(kernel.asm["cubin"]) > 0)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["True True"] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    """The command as it is, but for two layers; in a process of its own, all of which its memory limit is for."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "speed", "gpu", "--quick", "--layers", "2", "--rows", "1", "2"]
    command += ["--skip", "kernels", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert [name for name, section in sections.items() if section["wrong"]] == []
    rows = sections["decode"]["rows"]
    ours = [row for row in rows if row["engine"].startswith("lite int")]
    assert all(row["time"] is not None for row in ours)
    assert all(row["graph"] for row in ours if "launched" not in row["engine"])
    assert all(abs(row["difference"]) < 0.03 for row in ours)
    assert {row["what"] for row in sections["prefill"]["rows"]} >= {"lite int4, chunks of 2048", "cuBLAS alone"}
    assert len(sections["memory"]["rows"]) == 4
    assert len(sections["batches"]["rows"]) == 4
