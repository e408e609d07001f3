"""`python -m benchmarks speed gpu --only kernels`: what it measures is right first, and without a GPU it says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from test_speed_gpu import SMALL, measured, rig
from torch import Tensor

from benchmarks.speed import kernels
from benchmarks.speed.contenders import Call, Contender
from benchmarks.speed.gpu import main
from benchmarks.speed.harness import Unavailable
from benchmarks.speed.kernels import measure_one
from benchmarks.speed.weights import Shapes
from lite.eval.figures import Quantiles, quantiles

SHAPES = Shapes(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=40)
OPS = {"quant_matmul", "decode_attention", "rotary_and_cache", "add_rms_norm", "silu_mul", "sample", "lora_add"}


def no_clock(calls: Sequence[Callable[[], Tensor]]) -> tuple[Quantiles, bool]:
    """Run each call, as all copies have to work, and say it took a millisecond."""
    for call in calls:
        call()
    return quantiles([1e-3]), False


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "time_calls", no_clock)


def test_every_op_is_right_beside_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the references compute, and what is checked and counted is the same."""
    monkeypatch.setattr(kernels, "_MAX_COPIES", 2)
    setting = dataclasses.replace(SMALL, shapes=SHAPES, rows=(1, 2, 3), context=70)
    rows = measured(kernels.measure, rig(setting)).rows
    assert {row.names["op"] for row in rows} == OPS
    assert [row.why for row in rows if row.why is not None] == []
    for op in OPS:
        assert {row.names["engine"].startswith("lite") for row in rows if row.names["op"] == op} == {True, False}, op
    assert len({row.label for row in rows}) == len(rows)
    # o: 64 x 64 in 4 bits is 2,048 bytes and padded to 8 KiB in tiles, 64 scales; x and y of one row.
    small = next(row for row in rows if row.label == "quant_matmul, o 64→64, 1 rows, lite int4, float16")
    assert small.bytes_per_s == pytest.approx((8192 + 64 * 2 + 2 * 64 * 2) / 1e-3)
    assert (small.line()["ms"], small.line()["captured"]) == ("1", "no")


def contender(wrong: float, *, engine: str = "lite int4", fails: Exception | None = None) -> Contender:
    def prepare() -> Call:
        if fails is not None:
            raise fails
        return Call(run=lambda: torch.zeros(1), nbytes=1000)

    named = {"op": "quant_matmul", "shape": "small", "engine": engine, "dtype": "float16"}
    return Contender(**named, prepare=prepare, wrong=lambda _: wrong)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "time_calls", lambda _: pytest.fail("timed"))
    row = measure_one(contender(1.5), bandwidth=1e9)
    assert (row.is_wrong, row.time, row.why) == (True, None, "off by 1.5 times what is allowed")


def test_a_peer_that_is_not_there_or_fails_is_named_and_one_of_ours_raises() -> None:
    for error, why in ((Unavailable("not installed"), "not installed"), (KeyError("odd"), "failed (KeyError: 'odd')")):
        assert measure_one(contender(0, engine="gemlite", fails=error), bandwidth=1e9).why == why
    with pytest.raises(KeyError):
        measure_one(contender(0, fails=KeyError("odd")), bandwidth=1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--only", "kernels", "--json", str(tmp_path / "figures.json")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "error: got no GPU" in captured.err
    assert "expected an NVIDIA GPU · run this on a machine with one" in captured.err
    assert not (tmp_path / "figures.json").exists()
