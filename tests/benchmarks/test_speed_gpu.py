"""`python -m benchmarks speed gpu` on a CPU, at small shapes: each section, and what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import record
from repository import ROOT
from torch import nn

from benchmarks.speed import gpu
from benchmarks.speed.gpu import QUICK, SECTIONS, batches, decode, main, memory, prefill
from benchmarks.speed.gpu.rig import Rig, Setting
from benchmarks.speed.harness import Clock, Record, Report
from benchmarks.speed.linears import PEERS
from benchmarks.speed.weights import Shapes
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import linears_of
from lite.errors import MemoryBudgetError
from lite.memory.counts import decoder_bytes, layer_bytes

CPU = torch.device("cpu")
SHAPES = Shapes(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=80)
SMALL = Setting(
    shapes=SHAPES, layers=2, context=20, prompt_tokens=18, rows=(1, 2), rounds=2, new_tokens=3, checked_tokens=4,
    chunk_sizes=(64, 8), requests=5, batch_size=2, text_tokens=(2, 6),
)  # fmt: skip
BANDWIDTH = 1e9


class FakeClock(Clock):
    """Every stretch between two marks takes a millisecond."""

    def seconds(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [1e-3] * (len(marks) - 1)


def rig(setting: Setting = SMALL, *, clock: Callable[[], Clock] = FakeClock, capture: Any = None) -> Rig:
    torch.manual_seed(0)
    return Rig(setting=setting, device=CPU, clock=clock, capture=capture, bandwidth=lambda _: BANDWIDTH)


def measured(measure: Callable[[Rig, Report], None], here: Rig) -> Report:
    report = Report(title="A section")
    measure(here, report)
    return report


# -- Decoding --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded() -> Report:
    # Each token is launched; that nothing is frozen that must not be, `test_batches` shows.
    return measured(decode.measure, rig(capture=lambda step: step))


def row_of(report: Report, engine: str, rows: int, cache: str = "float32") -> dict[str, Any]:
    wanted = {"engine": engine, "cache": cache, "rows": str(rows)}
    (found,) = (row.document() for row in report.rows if row.names == wanted)
    return found


def test_bytes_and_shares_of_decoding(decoded: Report) -> None:
    assert decoded.wrong == []
    row, config = row_of(decoded, "lite int4", 2), rig().config(4)
    read = 2 * layer_bytes(config, itemsize=4) + 4 * 64 * (80 + 5)
    assert row["weight_bytes"] == read
    # Keys and values of 2 layers, 2 heads of 16, float32 on a CPU; 20 of context, one not timed, two of three.
    assert row["cache_bytes"] == 2 * 23 * (2 * 2 * 2 * 16 * 4)
    assert row["share"] == pytest.approx((read + row["cache_bytes"]) / 1e-3 / BANDWIDTH)
    assert (row["time"]["count"], row["ratio"], row["graph"]) == (2 * 3, None, True)
    assert row_of(decoded, "lite int4", 1, "int8")["cache_bytes"] == 23 * (2 * 2 * 2 * (16 + 2))
    assert row_of(decoded, "lite int8", 2)["ratio"]["p50"] == 1
    assert "| 1.00 (1.00–1.00) |" in decoded.markdown()
    engines = {row.names["engine"] for row in decoded.rows}
    assert {"lite int8", "tinygemm int4", decode.DENSE, "gemlite int4"} <= engines
    assert "gemlite int4, –, 1: not installed" in decoded.markdown()


def test_logits_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ALLOWED", dict.fromkeys(decode.ALLOWED, -1.0))
    report = measured(decode.measure, rig())
    assert any("lite int4, float32, 1: its logits differ" in line for line in report.wrong)
    assert not any("tinygemm" in line for line in report.wrong), "a peer's mistake is not ours"
    assert all(row.time is None for row in report.rows)


def test_captured_steps_that_decode_something_else_are_wrong() -> None:
    def damaged(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        first = step()  # and never anything else
        return lambda: first

    def fails(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted\nand more")

    report = measured(decode.measure, rig(dataclasses.replace(SMALL, rows=(1,)), capture=damaged))
    assert any("captured steps decode other tokens" in line for line in report.wrong)
    here = rig(capture=fails)
    assert decode.check_graphs(here, here.decoder(), None) == "not captured in a CUDA graph: operation not permitted"


def test_a_cache_that_does_not_fit_beside_our_int4_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of eight fit alone, of sixteen in int8 only."""
    held = 0
    lane = decode.Lane

    def give_back(size: int) -> None:
        nonlocal held
        held -= size

    def limited(here: Rig, source: LlamaDecoder, cache_dtype: Any, rows: int) -> decode.Lane:
        nonlocal held
        size = rows * (1 if cache_dtype else 4)
        if held + size > 34:
            raise MemoryBudgetError("no memory")
        found = lane(here, source, cache_dtype, rows)
        held += size
        weakref.finalize(found.rows, give_back, size)
        return found

    monkeypatch.setattr(decode, "Lane", limited)
    monkeypatch.setattr(decode, "MODELS", decode.MODELS[1:2])
    report = measured(decode.measure, rig(dataclasses.replace(SMALL, rows=(1, 8, 16))))
    assert report.wrong == []
    assert row_of(report, "lite int8", 1)["ratio"]["p50"] == 1
    for rows, cache in ((8, "float32"), (8, "int8"), (16, "int8")):
        row = row_of(report, "lite int8", rows, cache)
        assert row["time"]["count"] == 2 * 3
        assert row["ratio"] is None
    assert row_of(report, "lite int8", 16)["why"] == "no memory"


def test_a_linear_of_a_peer_that_raises_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        def forward(self, *_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(PEERS, "tinygemm int4", (lambda _: Fails(), torch.float16))
    monkeypatch.setattr(decode, "MODELS", [model for model in decode.MODELS if model.name == "tinygemm int4"])
    report = measured(decode.measure, rig())
    assert report.wrong == []
    assert report.rows[0].why == "failed (RuntimeError: no kernel image is available)"


# -- The other sections ----------------------------------------------------------------------------------------------


def test_prefill() -> None:
    report = measured(prefill.measure, rig())
    kinds = ("float32", "float16") if prefill.has_fp16_sums() else ("float32",)
    ours = [(f"lite int4, chunks of {chunk}", kind) for kind in kinds for chunk in (64, 8)]
    assert [tuple(row.names.values()) for row in report.rows] == [*ours, ("cuBLAS alone", "float32")]
    assert [row.ratio and row.ratio.p50 for row in report.rows] == [*(1 for _ in ours), None]
    assert report.rows[0].cells["tokens/s"] == "18,000"


def test_sums_that_are_wrong_have_no_time_and_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MAX_DIFFERENCE", -1.0)
    here = rig()
    report, linears = measured(prefill.measure, here), linears_of(here.decoder()).values()
    assert [row.time is None for row in report.rows] == [*(True for _ in report.rows[1:]), False]
    assert [line.partition(": off")[0] for line in report.wrong] == [
        f"lite int4, chunks of {chunk}, float32" for chunk in (64, 8)
    ]
    assert not any(linear.fp16_accumulation for linear in linears)
    prefill.add_up_in(here.decoder(), "float16")
    assert all(linear.fp16_accumulation for linear in linears)


def test_memory() -> None:
    report = measured(memory.measure, rig())
    found = report.figures["planned_and_held"]
    assert [(row["rows"], row["cache"]) for row in found] == [(1, "float16"), (1, "int8"), (8, "float16"), (8, "int8")]
    for row in found:
        assert row["error"] == row["planned_bytes"] / row["held_bytes"] - 1
        assert row["plan"]["num_rows"] == row["rows"]
    assert report.lines[0]["plan is off by"].endswith("%")


def test_the_plan_is_that_of_the_real_model() -> None:
    """On a GPU, which need not be there to be planned for; bytes that are known of Vicuna-7B in 4 bits."""
    here = Rig(setting=Setting(), device=torch.device("cuda", 0))
    planned = memory.plan(here, 8, None)
    assert planned.cache_bytes == 8 * 1536 * 2 * 32 * 4096 * 2
    assert planned.decoder_bytes == decoder_bytes(here.config(4), itemsize=2)
    assert planned.weight_bytes + planned.study_bytes < Setting().memory_bytes


@pytest.mark.parametrize("capture", [None, record])
def test_batches(capture: Any) -> None:
    report = measured(batches.measure, rig(capture=capture))
    ways = [("continuous", "float16"), ("static", "float16"), ("continuous", "int8"), ("static", "int8")]
    assert [tuple(row.names.values()) for row in report.rows] == ways
    assert [row.figures["rows"] for row in report.rows] == [2] * 4
    assert {(row.figures["tokens"], row.figures["studies"]) for row in report.rows} == {
        (report.rows[0].figures["tokens"], 5)
    }
    assert 2 * 5 <= report.rows[0].figures["tokens"] <= 6 * 5


# -- The command -----------------------------------------------------------------------------------------------------


def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    """All but the kernels, which need a GPU: as the command runs them, one after the other on one rig."""
    setting = dataclasses.replace(SMALL, rows=(1,), rounds=1)
    found = Record(command="", file=tmp_path / "figures.json")
    gpu.measure_sections(rig(setting, clock=Clock), [name for name in SECTIONS if name != "kernels"], found)
    assert {name: report.wrong for name, report in found.reports.items() if report.wrong} == {}
    assert [name for name, report in found.reports.items() if report.why] == []
    assert len(json.loads((tmp_path / "figures.json").read_text())["sections"]) == 4


def test_the_setting() -> None:
    parse = gpu._parser().parse_args
    whole = gpu.setting_of(parse([]))
    assert whole == Setting()
    assert (whole.layers, whole.context, whole.prompt_tokens, whole.memory_bytes) == (32, 1470, 1420, 12_000_000_000)
    quick = gpu.setting_of(parse(["--quick", "--rows", "2", "1", "2", "--memory-gb", "6"]))
    assert (quick.layers, quick.rows, quick.memory_bytes) == (QUICK.layers, (1, 2), 6_000_000_000)
    assert gpu.setting_of(parse(["--quick", "--layers", "2"])).layers == 2


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--rows"], ["odd"], ["--memory-gb", "0"], ["--only", "odd"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    """The command as it is, but for two layers; in a process of its own."""
    file = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", "speed", "gpu", "--quick", "--layers", "2", "--rows", "1", "2"]
    command += ["--only", *[name for name in SECTIONS if name != "kernels"], "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    sections = json.loads(file.read_text(encoding="utf-8"))["sections"]
    assert [name for name, section in sections.items() if section["wrong"]] == []
    ours = [row for row in sections["decode"]["rows"] if row["engine"].startswith("lite int")]
    assert all(row["time"] is not None for row in ours)
    assert all(row["graph"] for row in ours)
    assert all(abs(row["difference"]) < 0.03 for row in ours)
    assert len(sections["memory"]["planned_and_held"]) == len(sections["batches"]["rows"]) == 4
