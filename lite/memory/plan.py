"""Memory, in bytes: what an artifact will take, computed before anything of it is loaded, and what a process has taken.

    peak = libraries + decoder + tower + tower's activations + cache + decoder's activations

Each term is counted from shapes. On a GPU the peak is that of torch's allocator, and the tower is not in it. On a CPU
it is that of resident memory, where two things are not in our hands: ONNX Runtime's arenas, which keep what activations
took (the tower's, and the decoder's of the onnx engine), and freed memory that the C library keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Final

from lite.errors import MemoryBudgetError

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.engines.choose import EngineName
from lite.memory.counts import (
    ITEMSIZE,
    cache_bytes_per_token,
    cache_scale_bytes_per_token,
    cublas_workspace_bytes,
    decoder_bytes,
    gpu_load_work_bytes,
    onnx_decoder_bytes,
    onnx_linear_bytes,
    onnx_linear_shapes,
    onnx_prefill_work_bytes,
    prefill_work_bytes,
    vision_memory_bytes,
)
from lite.memory.sizes import shown_bytes

FIRST_USE_BYTES: Final = 110 << 20
"""What the packages add on a CPU when they are first used: ONNX Runtime itself and its threads, torch's tables of
operators, the tokenizer. Measured with the phantom model, whose weights are small beside it (torch 2.13, ONNX Runtime
1.32, November 2026)."""
ONNX_FIRST_USE_BYTES: Final = 17 << 20
"""The same without torch, ONNX Runtime imported already."""
PROMPT_TEXT_TOKENS: Final = 128
"""What a plan allows for the words of a prompt: the fixed ones are 55 to 70, a reason of two sentences some 40 more."""
REASON_TOKENS: Final = 64
"""What the rows of a batch allow for a reason; with a longer one they are allocated anew."""
CHUNK_SIZES: Final = (2048, 1024, 512, 256)
"""Tokens of a prompt that go through torch's decoder together: the first, or one that takes less memory where that does
not fit. A usual prompt is one chunk of the first: on a GPU the weights are expanded once for each."""
STUDIES_AHEAD: Final = 2
"""Studies of a batch that are made ready while a GPU decodes: one for the next free row, and one being worked on."""
GPU_LIBRARIES_BYTES: Final = 640 << 20
"""What CUDA, cuBLAS and the compiled kernels take on a card, and what torch's allocator cannot use for its holes, 0.1
to 0.5 GB by `tests/fake_cuda.py`. An estimate: no GPU has been measured."""
MAX_CACHE_KL: Final = 1e-3
"""The most that an int8 cache may lose, in nats a token by the manifest, and still be taken without being asked for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The parts of the peak, in bytes, for `batch_size` studies at a time."""

    batch_size: int
    max_seq_len: int  # places of a study's cache
    libraries_bytes: int  # Python and its packages; 0 for a GPU
    decoder_bytes: int  # the decoder's weights, as they lie in memory
    vision_bytes: int  # tower and projector; 0 where they are on another device
    cache_bytes: int
    load_work_bytes: int  # what passes while weights are converted
    vision_work_bytes: int  # activations of the tower: its arena keeps them
    prefill_work_bytes: int  # activations of the decoder, and the logits
    beside_bytes: int = 0  # on the card, but not of torch's allocator: the tower, libraries; 0 on a CPU

    @property
    def weight_bytes(self) -> int:
        """What stays in memory between requests."""
        return self.libraries_bytes + self.decoder_bytes + self.vision_bytes

    @property
    def study_bytes(self) -> int:
        """What `batch_size` studies take beside that."""
        return self.vision_work_bytes + self.cache_bytes + self.prefill_work_bytes

    @property
    def peak_bytes(self) -> int:
        """The peak, over loading and drafting."""
        return self.weight_bytes + max(self.load_work_bytes, self.study_bytes)

    @property
    def card_bytes(self) -> int:
        """The peak with what is beside torch's allocator: what a limit is about."""
        return self.peak_bytes + self.beside_bytes

    def __str__(self) -> str:
        """Say what takes how much."""
        parts = {
            "the process before": self.libraries_bytes,
            "decoder": self.decoder_bytes,
            "tower": self.vision_bytes,
            f"cache of {self.batch_size} x {self.max_seq_len} tokens": self.cache_bytes,
            "activations": self.vision_work_bytes + self.prefill_work_bytes,
            "tower and libraries beside": self.beside_bytes,
        }
        return " + ".join(f"{name} {shown_bytes(value)}" for name, value in parts.items() if value)


def plan_memory(
    artifact: Artifact,
    *,
    device: str,
    dtype: str | None = None,
    engine: EngineName = "torch",
    cache_dtype: CacheDtype | None = None,
    batch_size: int = 1,
    num_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    chunk_size: int = CHUNK_SIZES[0],
    tower_on_gpu: bool = False,
    libraries_bytes: int = 0,
) -> MemoryPlan:
    """Count what drafting with an artifact will take at most.

    Args:
        artifact: a checked artifact; nothing of it is loaded.
        device: "cpu", "cuda" or "cuda:N".
        dtype: as for `lite.load`; of the torch engine.
        engine: which one.
        cache_dtype: as for `lite.load`; of the onnx engine. None is that of the activations.
        batch_size: studies at a time.
        num_prompt_tokens: places of the longest prompt, the image's included; None allows PROMPT_TEXT_TOKENS words.
        max_new_tokens: None takes the artifact's.
        chunk_size: tokens of a prompt that go through the torch engine together.
        tower_on_gpu: whether ONNX Runtime has the tower on the GPU.
        libraries_bytes: what the process has resident already, torch imported; left out on a GPU.
    """
    manifest, config = artifact.manifest, artifact.decoder_config()
    on_cpu = device.startswith("cpu")
    prompt = num_prompt_tokens or manifest.parts.vision.num_image_tokens + PROMPT_TEXT_TOKENS
    max_seq_len = min(prompt + (max_new_tokens or manifest.decoding.max_new_tokens), config.max_position_embeddings)
    vision_bytes, vision_work = vision_memory_bytes(manifest.parts.vision, manifest.parts.vision.nbytes)
    features = 4 * manifest.parts.vision.num_image_tokens * config.hidden_size  # of one study, as the tower gives them
    if engine == "onnx" and (part := manifest.parts.decoder_onnx) is not None:
        itemsize = ITEMSIZE[part.dtype]
        return MemoryPlan(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            libraries_bytes=libraries_bytes + ONNX_FIRST_USE_BYTES,
            decoder_bytes=onnx_decoder_bytes(config, part),
            vision_bytes=vision_bytes,
            cache_bytes=batch_size
            * max_seq_len
            * cache_bytes_per_token(config, itemsize=1 if cache_dtype == "int8" else itemsize),
            # The largest linear's integers as they are on the disk, beside what they were repacked into.
            load_work_bytes=max(
                onnx_linear_bytes(name, config, part, bytes_per_block=0) for name in onnx_linear_shapes(config)
            ),
            vision_work_bytes=vision_work,
            prefill_work_bytes=features
            + onnx_prefill_work_bytes(config, num_tokens=prompt, itemsize=itemsize, int8_cache=cache_dtype == "int8")
            + batch_size * 2 * 4 * config.vocab_size,
        )
    itemsize = ITEMSIZE[dtype or ("float32" if on_cpu else config.dtype)]
    int8_cache = cache_dtype == "int8"
    per_token = cache_bytes_per_token(config, itemsize=itemsize)
    if int8_cache:
        per_token = cache_bytes_per_token(config, itemsize=1) + cache_scale_bytes_per_token(config)
    prefill_work = functools.partial(
        prefill_work_bytes, config, num_tokens=prompt, num_image_tokens=manifest.parts.vision.num_image_tokens,
        chunk_size=chunk_size, itemsize=itemsize, int8_cache=int8_cache,
    )  # fmt: skip
    if on_cpu:
        # An int8 cache is read as float32 to decode, a layer at a time: what is cast, scaled, and both.
        values = batch_size * max_seq_len * 2 * config.num_key_value_heads * config.head_dim if int8_cache else 0
        return MemoryPlan(
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            libraries_bytes=libraries_bytes + FIRST_USE_BYTES,
            decoder_bytes=decoder_bytes(config, itemsize=itemsize),
            vision_bytes=vision_bytes,
            cache_bytes=batch_size * max_seq_len * per_token,
            # The largest weight, as it is stored, beside what it becomes.
            load_work_bytes=2 * config.vocab_size * config.hidden_size if itemsize != 2 else 0,
            vision_work_bytes=vision_work,
            prefill_work_bytes=max(prefill_work(on_gpu=False), 6 * values),
        )
    rows = -(-max_seq_len // 64) * 64  # see LlamaDecoder.new_cache
    # Of a batch those of the next studies wait on the card, if the tower is there.
    waiting = STUDIES_AHEAD * features if tower_on_gpu and batch_size > 1 else 0
    return MemoryPlan(
        batch_size=batch_size,
        max_seq_len=rows,
        libraries_bytes=0,
        decoder_bytes=decoder_bytes(config, itemsize=itemsize),
        vision_bytes=0,
        cache_bytes=batch_size * rows * per_token,
        load_work_bytes=gpu_load_work_bytes(config),
        vision_work_bytes=0,
        prefill_work_bytes=waiting + prefill_work(on_gpu=True) + 2 * cublas_workspace_bytes(device),
        beside_bytes=GPU_LIBRARIES_BYTES + (vision_bytes + vision_work if tower_on_gpu else 0),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """A memory limit, and what was chosen to stay within it."""

    artifact: Artifact
    limit: int  # bytes
    device: str
    dtype: str | None = None
    engine: EngineName = "torch"
    cache_dtype: CacheDtype | None = None
    chunk_size: int = CHUNK_SIZES[0]
    tower_on_gpu: bool = False
    libraries_bytes: int = 0

    @classmethod
    def choose(
        cls,
        artifact: Artifact,
        *,
        limit: int,
        device: str,
        dtype: str | None = None,
        engine: EngineName = "torch",
        cache_dtype: CacheDtype | None = None,
        tower_on_gpu: bool = False,
        libraries_bytes: int = 0,
    ) -> Planner:
        """Choose how one study at a time fits: as it is, with shorter chunks, or with an int8 cache.

        Args:
            artifact: a checked artifact.
            limit: bytes.
            device: as for `plan_memory`, and so on.
            dtype: of the torch engine.
            engine: which one.
            cache_dtype: None leaves the choice.
            tower_on_gpu: whether the tower has its memory there, too.
            libraries_bytes: as for `plan_memory`.

        Raises:
            MemoryBudgetError: nothing fits. It names the parts, and what would.
        """
        sizes = CHUNK_SIZES if engine == "torch" else CHUNK_SIZES[:1]

        def chunked(cache_dtype: CacheDtype | None) -> list[Planner]:
            whole = cls(
                artifact=artifact, limit=limit, device=device, dtype=dtype, engine=engine, cache_dtype=cache_dtype,
                tower_on_gpu=tower_on_gpu, libraries_bytes=libraries_bytes,
            )  # fmt: skip
            return [dataclasses.replace(whole, chunk_size=size) for size in sizes]

        choices, with_int8 = chunked(cache_dtype), chunked("int8")
        loss = int8_cache_loss(artifact, engine)
        may_take_int8 = cache_dtype is None and loss is not None and loss <= MAX_CACHE_KL
        if may_take_int8:
            choices += with_int8
        for choice in choices:
            if choice.fits(1):
                return choice
        hint = ""
        if cache_dtype is None and not may_take_int8 and with_int8[-1].fits(1):
            why = "was not measured at export" if loss is None else "lost too much at export"
            hint = f"; cache_dtype='int8' would fit, but {why} to be taken without being asked for"
        raise _refusal(choices[-1].plan(1), limit, what=str(artifact.path), hint=hint)

    def plan(self, batch_size: int, *, max_new_tokens: int | None = None) -> MemoryPlan:
        """Count what so many studies at a time take."""
        return plan_memory(
            self.artifact,
            device=self.device,
            dtype=self.dtype,
            engine=self.engine,
            cache_dtype=self.cache_dtype,
            chunk_size=self.chunk_size,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            tower_on_gpu=self.tower_on_gpu,
            libraries_bytes=self.libraries_bytes,
        )

    def fits(self, batch_size: int, *, max_new_tokens: int | None = None) -> bool:
        """Say whether so many studies at a time stay within the limit."""
        return self.plan(batch_size, max_new_tokens=max_new_tokens).card_bytes <= self.limit

    def fits_rows(self, num_rows: int, max_seq_len: int) -> bool:
        """Say whether so many rows of so many places stay within the limit."""
        plan = self.plan(num_rows)
        more = num_rows * max(0, max_seq_len - plan.max_seq_len) * (plan.cache_bytes // (num_rows * plan.max_seq_len))
        return plan.card_bytes + more <= self.limit

    def rows_that_fit(self, batch_size: int, max_new_tokens: int) -> int:
        """Return how many studies at a time fit: at least one, at most so many."""
        fitting = (n for n in range(batch_size, 1, -1) if self.fits(n, max_new_tokens=max_new_tokens))
        return next(fitting, 1)


def int8_cache_loss(artifact: Artifact, engine: EngineName) -> float | None:
    """Return what an int8 cache loses, in nats a token, as it was measured at export; None if it was not."""
    parts = artifact.manifest.parts
    part = parts.decoder_onnx if engine == "onnx" else parts.decoder
    if part is None or part.fidelity is None or part.fidelity.int8_cache is None:
        return None
    return part.fidelity.int8_cache.mean_kl


def check_memory(plan: MemoryPlan, limit: int, *, what: str, hint: str = "") -> None:
    """Refuse a plan that does not fit.

    Args:
        plan: what it takes.
        limit: bytes.
        what: is refused.
        hint: what else to do, to be added to the message.

    Raises:
        MemoryBudgetError: it names the parts, and what would fit.
    """
    if plan.card_bytes > limit:
        raise _refusal(plan, limit, what=what, hint=hint)


def _refusal(plan: MemoryPlan, limit: int, *, what: str, hint: str) -> MemoryBudgetError:
    # Of a batch the caches alone grow with the studies: prompts go through one at a time.
    fits = (limit - plan.card_bytes + plan.cache_bytes) // (plan.cache_bytes // plan.batch_size)
    todo = f"take {fits} at a time" if 1 <= fits < plan.batch_size else "give it more, or export with fewer bits"
    msg = (
        f"{what}: got a memory limit of {shown_bytes(limit)} · expected at least {_shown_limit(plan.card_bytes)}: "
        f"{plan} · {todo}{hint}"
    )
    return MemoryBudgetError(msg)


def _shown_limit(count: int) -> str:
    """Return a size as text that as a limit is enough: rounded up, as the process grows by a little until then."""
    digits, unit = (2, 30) if count >= 2**30 else (1, 20)
    steps = math.ceil(count / 2**unit * 10**digits * 1.005)
    return shown_bytes(steps / 10**digits * 2**unit)
