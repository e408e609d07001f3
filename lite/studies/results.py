"""What comes of a study: its findings, and how they were made."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lite.errors import LiteError
from lite.memory.process import Peaks

FinishReason = Literal["eos", "length"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a study went, in seconds.

    In a batch a token takes as long as one of all rows, and as the prompt of another study that began in between.
    """

    image_s: float  # reading and preprocessing the film
    queued_s: float = 0.0  # waiting for a row, beside others' studies
    vision_s: float  # tower and projector; 0 where a row still held the film
    prefill_s: float  # the prompt through the decoder, to the first token
    decode_steps_s: tuple[float, ...]  # each further token
    batch_size: int  # the most studies that were decoded together with it, itself included

    @property
    def decode_s(self) -> float:
        """All tokens but the first."""
        return sum(self.decode_steps_s)

    @property
    def ttft_s(self) -> float:
        """Time to the first token, from the file on."""
        return self.image_s + self.vision_s + self.prefill_s

    @property
    def total_s(self) -> float:
        """Time to the last token."""
        return self.ttft_s + self.decode_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The process's memory peaks until each stage of this study had ended, and the cache of its batch, in bytes.

    A peak is never less than the one before. In the first request of a process they tell what each stage takes.
    """

    image: Peaks
    vision: Peaks
    prefill: Peaks
    decode: Peaks
    cache_bytes: int

    @property
    def peak_rss_bytes(self) -> int | None:
        """The most that the process has had resident; None on Windows, where the standard library does not tell."""
        return self.decode.rss_bytes

    @property
    def peak_vram_bytes(self) -> int | None:
        """The most that torch's allocator has held on the GPU; None without one."""
        return self.decode.vram_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The drafted findings of one study, and how they were made."""

    text: str
    finish_reason: FinishReason  # "length": cut at max_new_tokens or at the end of the context
    token_ids: tuple[int, ...]  # generated, without EOS
    token_logprobs: tuple[float, ...] | None = None  # of each, on request
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # token ids beside each, the likeliest first
    num_prompt_tokens: int  # places in the context, the image's included
    num_reused_tokens: int = 0  # of these, what a row still held: the film, for another question
    timings: Timings
    memory: Memory
    rendering: str  # how the film's values became grey levels: see lite.image
    artifact_id: str
    engine: str  # of the decoder: "torch" or "onnx"
    device: str  # of the decoder: "cpu", "cuda"
    dtype: str  # what the decoder computes in
    cache_dtype: str  # what keys and values are stored as
    provider: str  # ONNX Runtime's, for the vision tower, and for the decoder of the onnx engine
    backend: str  # what the decoder's operations ran on: "triton, CUDA graphs", "triton", "torch" or "onnxruntime"
    fallbacks: tuple[str, ...]  # what was slower than it has to be on such a machine, each with its reason
    notice: str

    @property
    def num_new_tokens(self) -> int:
        """The number of generated tokens, without EOS."""
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StudyError:
    """Stands in the place of a study's findings when it cannot be used or computed."""

    index: int  # of the study, from 0
    error: LiteError
