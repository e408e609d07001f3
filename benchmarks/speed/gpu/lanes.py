"""Decoders that take turns: each goes back to the end of the context, and decodes some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from benchmarks.speed.decoders import weight_bytes
from benchmarks.speed.engine import WARM_UP, Rows
from benchmarks.speed.harness import Row, times_in_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Clock
    from benchmarks.speed.peers.hugging_face import TransformersEngine
    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.decoder import LlamaDecoder


def row_of(name: str, cache: str, num_rows: int) -> Row:
    """Return a row to be filled in."""
    return Row(names={"engine": name, "cache": cache, "rows": str(num_rows)})


def cache_of(decoder: LlamaDecoder, cache_dtype: CacheDtype | None) -> str:
    """Return what a decoder's keys and values are stored as."""
    return cache_dtype or str(decoder.dtype).removeprefix("torch.")


class Decoding(Protocol):
    """Rows that decode: ours, or transformers'."""

    num_rows: int
    bytes_per_token: float

    @property
    def problem(self) -> str | None:
        """Why its steps are not captured, although they should be."""

    def decode(self) -> None:
        """Decode a token of every row; wait for nothing, if that is possible."""

    def wait(self, *, for_all: bool = True) -> object:
        """Wait for the tokens under way."""

    def rewind(self, num_tokens: int) -> None:
        """Go back to the end of the context."""


class TransformersRows:
    """transformers, as a user runs it: the token goes through the host."""

    num_rows = 1
    problem: str | None = None

    def __init__(self, engine: TransformersEngine, layers: int) -> None:
        self.engine, self.layers = engine, layers
        self.bytes_per_token = float(engine.cache_bytes_per_token)

    def decode(self) -> None:
        """Decode a token."""
        self.engine.next_token()

    def wait(self, *, for_all: bool = True) -> None:
        """Do nothing: the token is there."""

    def rewind(self, num_tokens: int) -> None:
        """Make a new cache, and fill it: by a prompt, which asks nothing of what is within."""
        self.engine.start(self.layers)
        self.engine.first_token([1] * num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One of those that take turns."""

    rows: Decoding
    weight_bytes: int  # read for a token
    clock: Callable[[], Clock]
    captured: bool | None = None  # None: not ours to say

    def turn(self, context: int, new_tokens: int) -> list[float]:
        """Time some tokens."""
        self.rows.rewind(context)
        self.rows.decode()  # untimed: the first after something else
        self.rows.wait()
        clock = self.clock()
        clock.mark()
        for _ in range(new_tokens):
            self.rows.decode()
            clock.mark()
            self.rows.wait(for_all=False)
        self.rows.wait()
        return clock.seconds()


def lane_of(rig: Rig, decoder: LlamaDecoder, num_rows: int) -> Lane:
    """Make a cache for one of our decoders, fill it, compile and capture.

    Raises:
        MemoryBudgetError: it does not fit.
    """
    setting = rig.setting
    rows = Rows(decoder, num_rows, setting.context + max(setting.new_tokens + 1, WARM_UP))
    rows.fill(setting.context)
    rows.warm_up(setting.context)
    captured = decoder.capture is not None and rows.problem is None
    return Lane(rows=rows, weight_bytes=weight_bytes(decoder), clock=rig.clock, captured=captured)


def tokens_seen(context: int, new_tokens: int) -> int:
    """Return what the median of the timed tokens sees: the context, one that was not timed, half of the others."""
    return context + 1 + (new_tokens + 1) // 2


def time_lanes(
    rig: Rig, lanes: Mapping[str, Lane], rows: Mapping[str, Row], bandwidth: float, reference: str | None = None
) -> None:
    """Let all lanes take turns, and fill in the rows of those that have one.

    Args:
        rig: the device.
        lanes: by key.
        rows: what is known of some of them.
        bandwidth: bytes per second.
        reference: the key that the others' times are divided by, if it is among them.
    """
    context, new_tokens = rig.setting.context, rig.setting.new_tokens
    turns = {key: lambda lane=lane: lane.turn(context, new_tokens) for key, lane in lanes.items()}
    found = times_in_turns(turns, rig.setting.rounds)
    beside = found.get(reference) if reference else None
    for key, row in rows.items():
        time, lane = found[key], lanes[key]
        if isinstance(time, str):
            row.why, row.is_wrong = time, True
            continue
        seen = lane.rows.num_rows * tokens_seen(context, new_tokens)
        cache_bytes = round(seen * lane.rows.bytes_per_token)
        row.time, row.bandwidth, row.nbytes = time, bandwidth, lane.weight_bytes + cache_bytes
        row.figures |= {"weight_bytes": lane.weight_bytes, "cache_bytes": cache_bytes}
        row.figures |= {"graph": lane.captured, "turns": list(lanes), "ratio": None}
        if beside is not None and not isinstance(beside, str):
            row.figures["ratio"] = time.p50 / beside.p50
            row.cells["× lite int4"] = f"{time.p50 / beside.p50:.2f}"
        if lane.rows.problem is not None:
            row.why, row.is_wrong = f"timed without a CUDA graph: {lane.rows.problem}", True
