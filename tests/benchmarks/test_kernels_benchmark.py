"""`python -m benchmarks speed kernels`: what it measures is right first, and without a GPU it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed import kernels as benchmark
from benchmarks.speed.kernels import Call, Contender, Shapes, Timed, Unavailable, contenders, main, measure, table
from lite.bench.measure import quantiles

SMALL = Shapes(hidden_size=64, inner=96, heads=4, kv_heads=2, head_dim=16, vocab_size=40, num_cached_tokens=70)
OPS = {"quant_matmul", "decode_attention", "rotary_and_cache", "add_rms_norm", "silu_mul", "sample"}


def no_clock(calls: Sequence[Callable[[], Tensor]], rounds: int) -> Timed:
    """Run each call, as all copies have to work, and say it took a millisecond."""
    for call in calls:
        call()
    return Timed(call=quantiles([1e-3] * rounds), graph=True)


def small_rows(rows: Sequence[int]) -> list[benchmark.Row]:
    return [
        measure(contender, rounds=3, bandwidth=1e9, time=no_clock)
        for contender in contenders(SMALL, rows, torch.device("cpu"))
    ]


def test_every_op_is_right_beside_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the references compute, and what is checked, counted and printed is the same."""
    monkeypatch.setattr(benchmark, "_FLUSH_BYTES", 1)  # two copies are enough
    rows = small_rows([1, 3])
    assert {row.op for row in rows} == OPS
    assert [row.why for row in rows if row.why is not None] == []
    for op in OPS:
        assert len({row.engine.split()[0] for row in rows if row.op == op}) == 2, op
    assert len({(row.op, row.shape, row.engine, row.dtype) for row in rows}) == len(rows)
    # o: 64 x 64 in 4 bits is 2,048 bytes and padded to 8 KiB in tiles, 64 scales; x and y of one row.
    small = next(row for row in rows if row.shape == "o 64→64, 1 rows" and row.engine == "lite int4")
    assert small.bytes_per_s == pytest.approx((8192 + 64 * 2 + 2 * 64 * 2) / 1e-3)
    assert small.share == pytest.approx((8192 + 64 * 2 + 2 * 64 * 2) / 1e6)
    text = table(rows)
    assert len(text.splitlines()) == len(rows) + 2
    assert "| 1.0000 | 1.0000–1.0000 |" in text


def contender(wrong: float, *, engine: str = "lite int4", fails: Exception | None = None) -> Contender:
    def prepare() -> Call:
        if fails is not None:
            raise fails
        return Call(run=lambda: torch.zeros(1), nbytes=1000)

    named = {"op": "quant_matmul", "shape": "small", "engine": engine, "dtype": "float16"}
    return Contender(**named, prepare=prepare, wrong=lambda _: wrong)


def test_what_is_wrong_is_not_timed() -> None:
    def never(calls: Any, rounds: int) -> Timed:
        raise AssertionError

    row = measure(contender(1.5), rounds=3, bandwidth=1e9, time=never)
    assert row.is_wrong
    assert row.time is None
    assert row.why == "WRONG: off by 1.5 times what is allowed"
    assert "WRONG" in table([row])
    assert any("off by 1.5" in note for note in benchmark._notes([row], 1e9, "Card"))


def test_a_peer_that_is_not_there_or_fails_is_named_and_one_of_ours_raises() -> None:
    absent = measure(
        contender(0, engine="gemlite", fails=Unavailable("not installed")), rounds=1, bandwidth=1, time=no_clock
    )
    assert absent.why == "not installed"
    failed = measure(contender(0, engine="gemlite", fails=KeyError("odd")), rounds=1, bandwidth=1, time=no_clock)
    assert failed.why == "failed (KeyError: 'odd')"
    notes = benchmark._notes([absent, absent, failed], 1e9, "Card")
    assert notes.count("gemlite: not installed.") == 1
    with pytest.raises(KeyError):
        measure(contender(0, fails=KeyError("odd")), rounds=1, bandwidth=1, time=no_clock)


def test_calls_that_no_graph_holds_are_marked() -> None:
    row = measure(contender(0), rounds=3, bandwidth=1e9, time=no_clock)
    by_hand = dataclasses.replace(row, graph=False)
    assert "1.0000¹" in table([by_hand])
    assert any(note.startswith("¹") for note in benchmark._notes([by_hand], 1e9, "Card"))
    assert not any(note.startswith("¹") for note in benchmark._notes([row], 1e9, "Card"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--json", str(tmp_path / "figures.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: got no GPU")
    assert "expected an NVIDIA GPU · run this on a machine with one" in captured.err
    assert not (tmp_path / "figures.json").exists()


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--rows"], ["odd"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
