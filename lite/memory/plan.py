"""Memory, in bytes: what an artifact will take, computed before anything of it is loaded.

    peak = Python and its packages + decoder + tower + tower's activations + cache + decoder's activations

Each term is counted from shapes. On a GPU the peak is that of torch's allocator, and the tower is not in it. On a CPU
it is that of resident memory, where two things are not in our hands: ONNX Runtime's arenas, which keep what activations
took (the tower's, and the decoder's of the onnx engine), and freed memory that the C library keeps.

`lite.engines.resolve` chooses what to run by these counts; `lite plan`, `lite.load`, `lite.bench` and its roofline all
have them from here.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final, Literal

from lite.errors import MemoryBudgetError
from lite.memory.counts import (
    ITEMSIZE,
    adapter_bytes,
    cache_bytes_per_token,
    cache_scale_bytes_per_token,
    cublas_workspace_bytes,
    decoder_bytes,
    gpu_load_work_bytes,
    onnx_adapter_bytes,
    onnx_decoder_bytes,
    onnx_linear_bytes,
    onnx_linear_shapes,
    onnx_prefill_work_bytes,
    onnx_prompt_bytes,
    prefill_work_bytes,
    vision_memory_bytes,
)
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lite.artifact.open import Artifact
    from lite.artifact.parts import AdapterPart, OnnxPart, VisionPart
    from lite.config import DecoderConfig

FIRST_USE_BYTES: Final = 40 << 20
"""What the packages add on a CPU when they are first used: threads, the code of torch's kernels, the tokenizer.

Measured with the phantom model, whose weights are small beside it, torch and ONNX Runtime imported before: 29 to 32 MiB
with four formats (torch 2.13, ONNX Runtime 1.32, an EPYC with AVX-512, November 2026).
"""
ONNX_FIRST_USE_BYTES: Final = 17 << 20
"""The same without torch."""
REASON_TOKENS: Final = 64
"""What a row allows for the words of a reason: one of two sentences takes some 40."""
FIXED_TEXT_TOKENS: Final = 64
"""The words of a prompt without a reason, where nobody has counted them: Vicuna's tokenizer makes 55 of them."""
CHUNK_SIZES: Final = (2048, 1024, 512, 256)
"""Tokens of a prompt that go through torch's decoder together: the first, or one that takes less memory where that does
not fit. A usual prompt is one chunk of the first: on a GPU the weights are expanded once for each."""
STUDIES_AHEAD: Final = 2
"""Studies that are made ready while a GPU decodes several: one for the next free row, and one being worked on."""
GPU_LIBRARIES_BYTES: Final = 640 << 20
"""What CUDA, cuBLAS and the compiled kernels take on a card, and what torch's allocator cannot use for its holes, 0.1
to 0.5 GB by `tests/fake_cuda.py`. An estimate: no GPU has been measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What the memory of an artifact follows from."""

    config: DecoderConfig
    vision: VisionPart
    vision_bytes: int  # of its file
    onnx: OnnxPart | None = None
    adapters: Mapping[str, AdapterPart] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, artifact: Artifact) -> Shapes:
        """Read them; nothing else is loaded."""
        parts = artifact.manifest.parts
        return cls(
            config=artifact.decoder_config(),
            vision=parts.vision,
            vision_bytes=parts.vision.nbytes,
            onnx=parts.decoder_onnx,
            adapters=parts.adapters,
        )

    @property
    def feature_bytes(self) -> int:
        """The features of one film, as the tower gives them."""
        return 4 * self.vision.num_image_tokens * self.config.hidden_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be run, as far as memory depends on it."""

    engine: Literal["torch", "onnx"] = "torch"
    device: str  # "cpu", "cuda" or "cuda:N"
    dtype: str | None = None  # of torch; None: float32 on a CPU, the stored one on a GPU
    cache_dtype: str | None = None  # "int8", or what is computed in, which is None, too
    int8_prompts: bool = False  # of onnx: by weights of their own
    adapters: tuple[str, ...] = ()  # that rows may use
    num_rows: int = 1  # studies that can be under way at a time
    num_prompt_tokens: int  # places of the longest prompt, the image's included
    max_new_tokens: int
    chunk_size: int = CHUNK_SIZES[0]  # of torch
    tower_on_gpu: bool = False  # by ONNX Runtime
    resident_bytes: int = 0  # what the process has already, its packages imported; left out on a GPU
    capability: tuple[int, int] = (8, 6)  # of the GPU

    @property
    def on_gpu(self) -> bool:
        """Whether the decoder is on a GPU."""
        return not self.device.startswith("cpu")

    def row_len(self, config: DecoderConfig) -> int:
        """Return the places of a row of the cache: no more than the context; on a GPU in steps of 64."""
        length = min(self.num_prompt_tokens + self.max_new_tokens, config.max_position_embeddings)
        return min(-(-length // 64) * 64, max(config.max_position_embeddings, length)) if self.on_gpu else length


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The parts of the peak, in bytes, for studies in so many rows."""

    num_rows: int
    max_seq_len: int  # places of a row
    resident_bytes: int  # Python and its packages; 0 for a GPU
    decoder_bytes: int  # the decoder's weights, as they lie in memory
    vision_bytes: int  # tower and projector; 0 where they are on another device
    cache_bytes: int
    load_work_bytes: int  # what passes while weights are converted
    vision_work_bytes: int  # activations of the tower: its arena keeps them
    prefill_work_bytes: int  # activations of the decoder, and the logits
    adapter_bytes: int = 0  # low-rank factors of all adapters
    beside_bytes: int = 0  # on the card, but not of torch's allocator: the tower, libraries; 0 on a CPU

    @property
    def weight_bytes(self) -> int:
        """What stays in memory between requests."""
        return self.resident_bytes + self.decoder_bytes + self.adapter_bytes + self.vision_bytes

    @property
    def study_bytes(self) -> int:
        """What the studies in all rows take beside that."""
        return self.vision_work_bytes + self.cache_bytes + self.prefill_work_bytes

    @property
    def peak_bytes(self) -> int:
        """The peak, over loading and drafting."""
        return self.weight_bytes + max(self.load_work_bytes, self.study_bytes)

    @property
    def card_bytes(self) -> int:
        """The peak with what is beside torch's allocator: what a limit is about."""
        return self.peak_bytes + self.beside_bytes

    @property
    def row_bytes(self) -> int:
        """What a row of the cache takes."""
        return self.cache_bytes // self.num_rows

    def items(self) -> dict[str, int]:
        """Return what takes how much, without what is nothing; the sum is `card_bytes`."""
        load_work = max(self.load_work_bytes - self.study_bytes, 0)
        items = {
            "Python and its packages": self.resident_bytes,
            "decoder": self.decoder_bytes,
            "adapters": self.adapter_bytes,
            "tower": self.vision_bytes,
            f"cache of {self.num_rows} x {self.max_seq_len:,} tokens": self.cache_bytes,
            "activations": self.vision_work_bytes + self.prefill_work_bytes,
            "loading, beyond these": load_work,
            "tower and libraries beside": self.beside_bytes,
        }
        return {name: count for name, count in items.items() if count}

    def __str__(self) -> str:
        """Say what takes how much."""
        return " + ".join(f"{name} {shown_bytes(count)}" for name, count in self.items().items())


def plan_memory(shapes: Shapes, workload: Workload) -> MemoryPlan:
    """Count what drafting will take at most."""
    adapters = [shapes.adapters[name] for name in workload.adapters]
    projectors = sum(part.files[part.projector].bytes for part in adapters if part.projector is not None)
    vision, vision_work = vision_memory_bytes(shapes.vision, shapes.vision_bytes + projectors)
    ranks = [part.rank for part in adapters]
    if workload.engine == "onnx" and shapes.onnx is not None:
        decoder = _by_onnx(shapes.onnx, shapes, workload, ranks)
    else:
        decoder = _by_torch(shapes, workload, ranks)
    plan = MemoryPlan(
        num_rows=workload.num_rows,
        max_seq_len=workload.row_len(shapes.config),
        vision_bytes=vision,
        vision_work_bytes=vision_work,
        **decoder,
    )
    return _on_gpu(plan, shapes, workload) if workload.engine == "torch" and workload.on_gpu else plan


def _by_onnx(part: OnnxPart, shapes: Shapes, workload: Workload, ranks: Sequence[int]) -> dict[str, int]:
    """Count what ONNX Runtime takes for the decoder, with adapters of some ranks."""
    config, rows, int8 = shapes.config, workload.num_rows, workload.cache_dtype == "int8"
    itemsize, prompts = ITEMSIZE[part.dtype], workload.int8_prompts
    # The largest linear's integers as they are on the disk, beside what they were repacked into.
    load_work = max(onnx_linear_bytes(name, config, part, bytes_per_block=0) for name in onnx_linear_shapes(config))
    work = onnx_prefill_work_bytes(
        config,
        num_tokens=workload.num_prompt_tokens,
        itemsize=itemsize,
        int8_cache=int8,
        adapters=bool(ranks),
    )
    per_token = cache_bytes_per_token(config, itemsize=1 if int8 else itemsize)
    return {
        "resident_bytes": workload.resident_bytes + ONNX_FIRST_USE_BYTES,
        "decoder_bytes": onnx_decoder_bytes(config, part) + (onnx_prompt_bytes(config, part) if prompts else 0),
        "adapter_bytes": onnx_adapter_bytes(config, ranks, itemsize=itemsize) * (2 if prompts else 1),
        "cache_bytes": rows * workload.row_len(config) * per_token,
        "load_work_bytes": load_work,
        "prefill_work_bytes": shapes.feature_bytes + rows * 2 * 4 * config.vocab_size + work,
    }


def _by_torch(shapes: Shapes, workload: Workload, ranks: Sequence[int]) -> dict[str, int]:
    """Count what torch takes for the decoder, with adapters of some ranks."""
    config, rows, int8 = shapes.config, workload.num_rows, workload.cache_dtype == "int8"
    itemsize = ITEMSIZE[workload.dtype or (config.dtype if workload.on_gpu else "float32")]
    per_token = cache_bytes_per_token(config, itemsize=1 if int8 else itemsize)
    per_token += cache_scale_bytes_per_token(config) if int8 else 0
    work = prefill_work_bytes(
        config,
        num_tokens=workload.num_prompt_tokens,
        num_image_tokens=shapes.vision.num_image_tokens,
        chunk_size=workload.chunk_size,
        itemsize=itemsize,
        int8_cache=int8,
        on_gpu=workload.on_gpu,
    )
    if int8 and not workload.on_gpu:
        # It is read as float32 to decode, a layer at a time: what is cast, scaled, and both.
        row_len = workload.row_len(config)
        work = max(work, 6 * rows * row_len * 2 * config.num_key_value_heads * config.head_dim)
    return {
        "resident_bytes": workload.resident_bytes + FIRST_USE_BYTES,
        "decoder_bytes": decoder_bytes(config, itemsize=itemsize),
        "adapter_bytes": adapter_bytes(config, ranks, itemsize=itemsize),
        "cache_bytes": rows * workload.row_len(config) * per_token,
        # The largest weight, as it is stored, beside what it becomes.
        "load_work_bytes": 2 * config.vocab_size * config.hidden_size if itemsize != 2 else 0,
        "prefill_work_bytes": work,
    }


def _on_gpu(plan: MemoryPlan, shapes: Shapes, workload: Workload) -> MemoryPlan:
    """Leave out what a card does not hold, and count what only a card does."""
    tower = plan.vision_bytes + plan.vision_work_bytes if workload.tower_on_gpu else 0
    # With several rows the features of the next studies wait on the card, if the tower is there.
    waiting = STUDIES_AHEAD * shapes.feature_bytes if workload.tower_on_gpu and workload.num_rows > 1 else 0
    return dataclasses.replace(
        plan,
        resident_bytes=0,
        vision_bytes=0,
        vision_work_bytes=0,
        load_work_bytes=gpu_load_work_bytes(shapes.config),
        prefill_work_bytes=plan.prefill_work_bytes + waiting + 2 * cublas_workspace_bytes(workload.capability),
        beside_bytes=GPU_LIBRARIES_BYTES + tower,
    )


def check_memory(plan: MemoryPlan, limit: int, *, what: str) -> None:
    """Refuse a plan that does not fit.

    Raises:
        MemoryBudgetError: see `refusal`.
    """
    if plan.card_bytes > limit:
        raise refusal(plan, limit, what=what)


def refusal(plan: MemoryPlan, limit: int, *, what: str, hint: str = "") -> MemoryBudgetError:
    """Return the error of a plan that does not fit: it names what is refused, the items, and what would fit."""
    # The caches alone grow with the rows: prompts go through one at a time.
    fits = (limit - plan.card_bytes + plan.cache_bytes) // plan.row_bytes
    todo = f"take {fits} at a time" if 1 <= fits < plan.num_rows else "give it more, or export with fewer bits"
    # As a limit this is enough: rounded up, as the process grows by a little until then.
    needed = math.ceil(plan.card_bytes * 1.005)
    digits = 2
    while (got := shown_bytes(limit, digits)) == (expected := shown_bytes(needed, digits, up=True)) and digits < 9:
        digits += 1
    msg = f"{what}: got a memory limit of {got} · expected at least {expected}: {plan} · {todo}{hint}"
    return MemoryBudgetError(msg)
