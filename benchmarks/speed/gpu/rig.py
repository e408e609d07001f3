"""What the sections measure on, and with: the device, its clock, its bandwidth, the decoder that all of them share."""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from benchmarks.speed.decoders import random_decoder
from benchmarks.speed.harness import Clock
from benchmarks.speed.weights import Shapes
from lite.bench.machine import streaming_read_bandwidth
from lite.config import DecoderConfig
from lite.engines.torch_engine.cuda_graph import capture_cuda_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lite.engines.torch_engine.cuda_graph import Capture
    from lite.engines.torch_engine.decoder import LlamaDecoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much of what is measured."""

    shapes: Shapes = field(default_factory=Shapes)
    layers: int = 32
    context: int = 1470  # tokens that a decoded one sees
    prompt_tokens: int = 1420
    rows: Sequence[int] = (1, 2, 4, 8)
    rounds: int = 5
    new_tokens: int = 32  # timed in a round
    checked_tokens: int = 16  # decoded with and without CUDA graphs
    chunk_sizes: Sequence[int] = (2048, 512)
    requests: int = 24
    batch_size: int = 8
    text_tokens: tuple[int, int] = (40, 160)  # of the shortest and the longest text of a batch
    memory_bytes: int = 12_000_000_000


@dataclass(kw_only=True)
class Rig:
    """One device, and what a test would have otherwise."""

    setting: Setting
    device: torch.device
    clock: Callable[[], Clock] = lambda: Clock(on_gpu=True)
    capture: Capture | None = None
    bandwidth: Callable[[str], float] = streaming_read_bandwidth
    _decoder: LlamaDecoder | None = None

    @classmethod
    def of_gpu(cls, setting: Setting, device: torch.device) -> Rig:
        """Measure on a GPU."""
        return cls(setting=setting, device=device, capture=functools.partial(capture_cuda_graph, device=device))

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU: tests measure on a CPU."""
        return self.device.type == "cuda"

    def config(self, bits: int | None) -> DecoderConfig:
        """Return the decoder's shape, its linears in so many bits; None: in 16."""
        return DecoderConfig.from_hf(self.setting.shapes.config(self.setting.layers, bits))

    def decoder(self) -> LlamaDecoder:
        """Return the int4 decoder, which is made once if nobody forgets it."""
        if self._decoder is None:
            self._decoder = random_decoder(self.config(4), self.device)
        return self._decoder

    @property
    def has_decoder(self) -> bool:
        """Whether it is there."""
        return self._decoder is not None

    def forget_decoder(self) -> None:
        """Let go of it: something larger needs the memory."""
        self._decoder = None
        self.tidy()

    def measured_bandwidth(self) -> float:
        """Return the bytes per second of a streaming read, now."""
        self.tidy()
        return self.bandwidth(str(self.device))

    def tidy(self) -> None:
        """Give memory that nobody uses any more back."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
