"""What the sections measure on, and with: the device, its clock, its memory limit, the decoder that all of them share.

On a GPU times are those between events on it; the host's clock would tell when a launch was asked for. On a CPU it is
the host's. A test puts in a clock of its own.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from benchmarks.speed.gpu.model import LAYERS, VICUNA, config_json, random_decoder
from lite.bench.machine import streaming_read_bandwidth
from lite.config import DecoderConfig
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.speed.kernels import Shapes
    from lite.engines.torch_engine.cuda_graph import Capture
    from lite.engines.torch_engine.decoder import LlamaDecoder

WORK_BYTES: Final = 700_000_000
"""Kept free of what is put into the memory side by side: a prompt's activations, cuBLAS, holes between allocations."""


class Clock(Protocol):
    """Tells how long it is from one mark to the next."""

    def mark(self) -> None:
        """Note the time, on the device: when all before it has ended."""

    def seconds(self) -> list[float]:
        """Wait, return the times between the marks so far, and forget these."""


class CudaClock:
    """Events on the current stream."""

    def __init__(self) -> None:
        self._events: list[Any] = []  # torch's events have no types

    def mark(self) -> None:
        """Record an event."""
        new_event: Any = torch.cuda.Event
        event = new_event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Wait for the last event; return the times between them."""
        events, self._events = self._events, []
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


class HostClock:
    """The host's clock, for what has ended when it returns."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def mark(self) -> None:
        """Note the time."""
        self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the times between the marks."""
        times, self._times = self._times, []
        return [end - start for start, end in itertools.pairwise(times)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much of what is measured."""

    shapes: Shapes = VICUNA
    layers: int = LAYERS
    context: int = 1470  # tokens that a decoded one sees
    prompt_tokens: int = 1420
    rows: Sequence[int] = (1, 2, 4, 8)
    rounds: int = 5
    new_tokens: int = 32  # timed in a round
    checked_tokens: int = 16  # decoded with and without CUDA graphs
    scored_tokens: int = 64
    chunk_sizes: Sequence[int] = (2048, 512)
    requests: int = 24
    batch_size: int = 8
    text_tokens: tuple[int, int] = (40, 160)  # of the shortest and the longest text of a batch
    few_sms: int = 28
    memory_bytes: int = 12_000_000_000
    artifact: Path | None = None


@dataclass(kw_only=True)
class Report:
    """What a section has to say; what it has measured before it fails is kept."""

    title: str
    header: Sequence[str] = ()
    left: int = 1  # columns of words
    cells: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # of ours
    why: str | None = None  # not measured, or not to its end
    text: str | None = None  # in the place of a table
    took_s: float = 0.0


@dataclass(kw_only=True)
class Rig:
    """One device, and what a test would have otherwise."""

    setting: Setting
    device: torch.device
    clock: Callable[[], Clock] = CudaClock
    capture: Capture | None = None
    bandwidth: Callable[[str], float] = streaming_read_bandwidth
    now: Callable[[], float] = time.monotonic
    deadline: float = math.inf
    is_unlimited: bool = False  # the memory limit is let go of at present
    kept: list[Any] = field(default_factory=list)  # alive until the end
    _decoder: LlamaDecoder | None = None

    @classmethod
    def of_gpu(cls, setting: Setting, device: torch.device) -> Rig:
        """Measure on a GPU."""
        return cls(setting=setting, device=device, capture=functools.partial(capture_cuda_graph, device=device))

    def config(self, bits: int | None) -> DecoderConfig:
        """Return the decoder's shape, its linears in so many bits; None: in 16."""
        return DecoderConfig.from_hf(config_json(self.setting.shapes, self.setting.layers, bits))

    def decoder(self) -> LlamaDecoder:
        """Return the int4 decoder, which is made once if nobody forgets it."""
        if self._decoder is None:
            self._decoder = random_decoder(self.config(4), self.device, capture=self.capture)
        return self._decoder

    @property
    def has_decoder(self) -> bool:
        """Whether it is there."""
        return self._decoder is not None

    def forget_decoder(self) -> None:
        """Let go of it: something larger needs the memory."""
        self._decoder = None
        self.tidy()

    def is_late(self) -> bool:
        """Say whether the section's time is up."""
        return self.now() >= self.deadline

    def measured_bandwidth(self) -> float:
        """Return the bytes per second of a streaming read, now."""
        self.tidy()
        return self.bandwidth(str(self.device))

    def tidy(self) -> None:
        """Give memory that nobody uses any more back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def limit(self, nbytes: float) -> None:
        """Let torch's allocator have so much."""
        if self.device.type == "cuda":
            _, total = torch.cuda.mem_get_info(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), self.device)

    def room(self, *, unlimited: bool = False) -> float:
        """Return the bytes that can still be taken, of the limit or of the whole card; on a CPU there is no limit.

        Args:
            unlimited: as if the limit had been let go of.
        """
        if self.device.type != "cuda":
            return math.inf
        self.tidy()
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_allocated(self.device)
        here = free + torch.cuda.memory_reserved(self.device) - held
        limit = math.inf if unlimited or self.is_unlimited else self.setting.memory_bytes
        return min(here, limit - held) - WORK_BYTES

    @contextlib.contextmanager
    def unlimited(self) -> Iterator[None]:
        """Let go of the memory limit meanwhile."""
        self.limit(math.inf)
        self.is_unlimited = True
        try:
            yield
        finally:
            self.is_unlimited = False
            self.tidy()
            self.limit(self.setting.memory_bytes)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line: its tensors must not stay alive with it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
