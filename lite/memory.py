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
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.artifact import VISION_NAME
from lite.errors import LiteError, MemoryBudgetError

if TYPE_CHECKING:
    from lite.artifact import Artifact, CacheDtype, OnnxPart, VisionPart
    from lite.config import DecoderConfig, Quantization
    from lite.engine import EngineName

ITEMSIZE: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_VISION_HELD: Final = {"fp32": 1.5, "fp16": 2.4, "int8": 2.0}  # of the bytes of the file: see _vision_bytes
FIRST_USE_BYTES: Final = 110 << 20
"""What the packages add on a CPU when they are first used: ONNX Runtime itself and its threads, torch's tables of
operators, the tokenizer. Measured with the phantom model, whose weights are small beside it (torch 2.13, ONNX Runtime
1.32, November 2026)."""
ONNX_FIRST_USE_BYTES: Final = 17 << 20
"""The same without torch, ONNX Runtime imported already."""
ONNX_CHUNK_SIZE: Final = 512
"""Tokens of a prompt that go through `decoder.onnx` together: it bounds the memory of activations."""
_ONNX_HELD: Final = 1.5
"""Of the activations: the arena has holes between them. 1.4 to 1.6 were measured in runs of 256 to 1,472 tokens at 7B
widths (ONNX Runtime 1.32 without memory patterns, November 2026)."""
_BLOCK_SIZES: Final = (128, 64, 32, 16)
"""Inputs of a block of MatMulNBits where a group is a whole row: as many as divide it."""
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
_EXPANDED_VALUES: Final = 3 * 2**23
"""Weights that are expanded at a time for a prompt: `kernels.quant_matmul.SCRATCH_VALUES`."""
_REPACKED_VALUES: Final = 2**24
"""Integers that are repacked at a time where a GPU is loaded: see `kernels.packing.to_tiles`."""
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
    prompt = num_prompt_tokens or manifest.vision.num_image_tokens + PROMPT_TEXT_TOKENS
    max_seq_len = min(prompt + (max_new_tokens or manifest.decoding.max_new_tokens), config.max_position_embeddings)
    vision_bytes, vision_work = _vision_bytes(manifest.vision, manifest.files[VISION_NAME].bytes)
    features = 4 * manifest.vision.num_image_tokens * config.hidden_size  # of one study, as the tower gives them
    if engine == "onnx" and (part := manifest.onnx) is not None:
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
            + _onnx_prefill_work_bytes(config, num_tokens=prompt, itemsize=itemsize, int8_cache=cache_dtype == "int8")
            + batch_size * 2 * 4 * config.vocab_size,
        )
    itemsize = ITEMSIZE[dtype or ("float32" if on_cpu else config.dtype)]
    int8_cache = cache_dtype == "int8"
    per_token = cache_bytes_per_token(config, itemsize=itemsize)
    if int8_cache:
        per_token = cache_bytes_per_token(config, itemsize=1) + cache_scale_bytes_per_token(config)
    prefill_work = functools.partial(
        _prefill_work_bytes, config, num_tokens=prompt, num_image_tokens=manifest.vision.num_image_tokens,
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
        load_work_bytes=_gpu_load_work_bytes(config),
        vision_work_bytes=0,
        prefill_work_bytes=waiting + prefill_work(on_gpu=True) + 2 * _cublas_workspace_bytes(device),
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

    def rows_that_fit(self, batch_size: int, max_new_tokens: int) -> int:
        """Return how many studies at a time fit: at least one, at most so many."""
        fitting = (n for n in range(batch_size, 1, -1) if self.fits(n, max_new_tokens=max_new_tokens))
        return next(fitting, 1)


def int8_cache_loss(artifact: Artifact, engine: EngineName) -> float | None:
    """Return what an int8 cache loses, in nats a token, as it was measured at export; None if it was not."""
    fidelity = artifact.manifest.fidelity
    of_engine = fidelity.get("onnx") if engine == "onnx" else fidelity
    measured = of_engine.get("int8_cache") if isinstance(of_engine, dict) else None
    lost = measured.get("mean_kl") if isinstance(measured, dict) else None
    return lost if isinstance(lost, float) else None


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


def decoder_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the weights of a decoder take in memory.

    Args:
        config: the decoder's shape.
        itemsize: bytes of a weight that is not quantised, as the decoder computes with it.
    """
    embeddings = config.vocab_size * config.hidden_size * itemsize
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size * itemsize
    head = 0 if config.tie_word_embeddings else head_bytes(config, itemsize=itemsize)
    return embeddings + norms + config.num_hidden_layers * layer_bytes(config, itemsize=itemsize) + head


def layer_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the seven linears of a layer take."""
    return sum(
        linear_bytes(shape, config.quantization, itemsize=itemsize) for shape in layer_linear_shapes(config).values()
    )


def head_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the head takes, whether it is its own or the embeddings'."""
    stored = config.quantization.lm_head if config.quantization is not None else None
    return linear_bytes((config.vocab_size, config.hidden_size), stored, itemsize=itemsize)


def layer_linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linears of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def linear_bytes(shape: tuple[int, int], quantization: Quantization | None, *, itemsize: int) -> int:
    """Return what a linear [out, in] takes in memory: as `kernels.gptq` and `kernels.bnb` hold it."""
    out_features, in_features = shape
    count = out_features * in_features
    if quantization is None:
        return count * itemsize
    if quantization.format == "bnb-int8":
        return count + 4 * out_features  # float32 magnitudes
    if quantization.format == "bnb-nf4":
        blocks = count // 64
        # A byte for each block's magnitude; for 256 of them a float32; the two tables and the offset.
        return count // 2 + blocks + 4 * math.ceil(blocks / 256) + 4 * (16 + 256 + 1)
    group_size = in_features if quantization.group_size in (-1, None) else quantization.group_size
    return count * quantization.bits // 8 + 2 * out_features * (in_features // group_size)  # float16 scales


def onnx_linear_shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linears of `decoder.onnx`: those of a layer, fused, and the head."""
    shapes = layer_linear_shapes(config)
    q, kv, inner = shapes["q_proj"][0], shapes["k_proj"][0], config.intermediate_size
    return {
        "qkv": (q + 2 * kv, config.hidden_size),
        "o": shapes["o_proj"],
        "gate_up": (2 * inner, config.hidden_size),
        "down": shapes["down_proj"],
        "lm_head": (config.vocab_size, config.hidden_size),
    }


def onnx_decoder_bytes(config: DecoderConfig, part: OnnxPart) -> int:
    """Return what the weights of `decoder.onnx` take in memory. The embeddings stay on the disk."""
    itemsize = ITEMSIZE[part.dtype]
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size * itemsize
    rotary = config.max_position_embeddings * config.head_dim * itemsize
    # Integers and scales are repacked, and the sum of each block is put beside them. What they were repacked from is
    # given back but for the scales, which stay mapped: 28 MiB of the 653 that 4 layers of a 7B model had resident when
    # loaded (ONNX Runtime 1.32, AVX2, November 2026).
    return onnx_read_bytes(config, part, bytes_per_block=4 + 4 + 4) + norms + rotary


def onnx_read_bytes(config: DecoderConfig, part: OnnxPart, *, bytes_per_block: int = 4) -> int:
    """Return what decoding one token reads of `decoder.onnx`: the integers of every linear, and their scales."""
    sizes = {
        name: onnx_linear_bytes(name, config, part, bytes_per_block=bytes_per_block)
        for name in onnx_linear_shapes(config)
    }
    head = sizes.pop("lm_head")
    return config.num_hidden_layers * sum(sizes.values()) + head


def onnx_linear_bytes(name: str, config: DecoderConfig, part: OnnxPart, *, bytes_per_block: int) -> int:
    """Return the bytes of a linear in MatMulNBits: integers, and for each block so much."""
    out_features, in_features = onnx_linear_shapes(config)[name]
    quantization = config.quantization
    bits = part.lm_head_bits if name == "lm_head" else quantization.bits if quantization is not None else 4
    block_size = onnx_block_size(in_features, quantization.group_size if quantization is not None else None)
    blocks = out_features * math.ceil(in_features / (block_size or in_features))
    return out_features * in_features * bits // 8 + blocks * bytes_per_block


def onnx_block_size(in_features: int, group_size: int | None) -> int | None:
    """Return the inputs of a block of MatMulNBits: a group, or of a whole row (-1, None) as many as fit; None: none."""
    if group_size not in (-1, None):
        return group_size
    return next((size for size in _BLOCK_SIZES if in_features % size == 0), None)


def cache_bytes_per_token(config: DecoderConfig, *, itemsize: int) -> int:
    """2 (keys, values) x layers x kv_heads x head_dim x bytes of an element."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def cache_scale_bytes_per_token(config: DecoderConfig) -> int:
    """2 (keys, values) x layers x kv_heads x 2 bytes: the scales of an int8 cache of torch's."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * 2


def _prefill_work_bytes(
    config: DecoderConfig,
    *,
    num_tokens: int,
    num_image_tokens: int,
    chunk_size: int,
    itemsize: int,
    int8_cache: bool,
    on_gpu: bool,
) -> int:
    """Count what one prompt takes on its way through torch's decoder: the embeddings of all, and a chunk in a layer.

    `tests/fake_cuda.py` counts what the decoder itself takes on a GPU; on a CPU the reference's intermediate results
    are there, too.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    product = functools.partial(_product_bytes, config, itemsize=itemsize, on_gpu=on_gpu)
    # The features, as they came and cast, beside the embeddings that they are put into.
    most = num_image_tokens * hidden * (4 + itemsize)
    for begin in range(0, num_tokens, chunk_size):
        end = min(begin + chunk_size, num_tokens)
        T = end - begin
        wide = T * itemsize
        # The residual stream and its norm; slots and angles; behind the first chunk a mask.
        streams = wide * 2 * hidden + T * (4 * config.head_dim + 16) + (T * end if begin else 0)
        # q, k and v as they were multiplied, and q and k turned.
        turned = wide * (q + 2 * kv + q + kv)
        # Of an int8 cache what was before: cast, scaled and both, in float32; then with what is new, in 16 bits.
        past = kv * max(12 * begin, 2 * itemsize * (begin + end)) if int8_cache else 0
        # The mask as numbers, and those padded.
        attended = wide * q + 4 * T * heads + (2 * wide * end if begin else 0) + (2 * itemsize * kv * end * int8_cache)
        attention = max(
            product(T, hidden, q, kv, kv), turned + max(past, attended), turned + wide * q + product(T, q, hidden)
        )
        gated = max(product(T, hidden, inner, inner), wide * 3 * inner, wide * inner + product(T, inner, hidden))
        if not on_gpu:
            # The reference computes in float32: q and k turned, and what is stored; silu(gate), and times up.
            cast = 4 if itemsize < 4 else 0
            attention = max(attention, turned + past + T * (q + 2 * kv) * 4 + T * q * cast)
            gated = max(gated, wide * 2 * inner + T * 2 * inner * (4 + cast))
        # One after the other: but on a CPU the C library keeps what the first has given back, as it is in small pieces.
        most = max(most, streams + (max(attention, gated) if on_gpu else attention + gated))
    rotary = 4 * config.max_position_embeddings * config.head_dim
    return rotary + num_tokens * hidden * itemsize + most + 2 * 4 * config.vocab_size


def _product_bytes(
    config: DecoderConfig, num_tokens: int, in_features: int, *widths: int, itemsize: int, on_gpu: bool
) -> int:
    """Return what the products of a linear's parts take, and on a GPU what of a weight is expanded for them."""
    products = num_tokens * sum(widths) * itemsize
    quantization = config.quantization
    is_nf4 = quantization is not None and quantization.format == "bnb-nf4"
    if on_gpu and not is_nf4:
        values = min(sum(widths), max(16, _EXPANDED_VALUES // in_features // 16 * 16)) * in_features
        return products + (values * itemsize if quantization is not None else 0)
    # Each by itself, then side by side; on a CPU a weight is expanded a few rows at a time, by bitsandbytes as a whole.
    expanded = widths[-1] * in_features * itemsize if on_gpu else 0
    return max(products + expanded, products * min(2, len(widths)))


def _cublas_workspace_bytes(device: str) -> int:
    """Return what torch gives cuBLAS for good for a stream, of which there are two: one captures the CUDA graphs."""
    import torch

    # Before there is such a card, the larger one (at::cuda::parseChosenWorkspaceSize, torch 2.13).
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9
    return 32 << 20 if major >= 9 else (8 << 20) + (128 << 10)


def _gpu_load_work_bytes(config: DecoderConfig) -> int:
    """Count what passes while linears are repacked or put side by side, beyond what is loaded after them."""
    shapes = layer_linear_shapes(config)
    itemsize = ITEMSIZE[config.dtype]
    later = 0 if config.tie_word_embeddings else head_bytes(config, itemsize=itemsize)
    most = 0
    for names in (("down_proj",), ("gate_proj", "up_proj"), ("o_proj",), ("q_proj", "k_proj", "v_proj")):
        values = sum(shapes[name][0] * shapes[name][1] for name in names)
        nbytes = sum(linear_bytes(shapes[name], config.quantization, itemsize=itemsize) for name in names)
        stored = config.quantization.format if config.quantization is not None else "fp16"
        work = 0
        if stored.startswith("gptq"):
            # As they were stored, and side by side; and some of the integers as int32, shifted and masked.
            work = 2 * nbytes + 8 * min(values, _REPACKED_VALUES)
        elif stored == "bnb-int8":
            work = 5 * nbytes + 8 * min(values, _REPACKED_VALUES)
        elif len(names) > 1:
            work = nbytes
        most = max(most, work - later)
        later += nbytes
    return most


def _onnx_prefill_work_bytes(config: DecoderConfig, *, num_tokens: int, itemsize: int, int8_cache: bool) -> int:
    """Count what a chunk of a prompt takes on its way through `decoder.onnx`, and the embeddings of the whole prompt.

    Measured with ONNX Runtime 1.32 (November 2026) on graphs of 4 layers, each width and the chunk varied alone: with a
    float cache the prompt before a chunk does not count (attention keeps no scores), nor does depth from 3 layers on.
    ONNX Runtime hands the buffers of a layer on to the next, so that those of attention are there when gate and up are
    computed. At 7B widths the count is 211 MiB for 512 tokens; 212 were measured.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # gate and up side by side, then each, and silu(gate): 5. Queries, keys and values side by side and each by itself,
    # turned, and what comes of them; the residual stream before and after, its norm. As wide as q, one is for both.
    widths = 5 * inner + 4 * q + 6 * kv + (3 if q == hidden else 4) * hidden
    chunk = min(num_tokens, ONNX_CHUNK_SIZE)
    work = round(_ONNX_HELD * chunk * widths * itemsize)
    if int8_cache and itemsize == ITEMSIZE["float32"]:
        # For the last chunk of a prompt: keys and values before it in float32, and once more while they are cast;
        # those with what is new; and what is new, while it is rounded (see `export.int8_cache_graph`).
        past = (num_tokens - 1) // ONNX_CHUNK_SIZE * ONNX_CHUNK_SIZE
        work += (3 * past + 2 * num_tokens + 2 * chunk) * kv * itemsize
    return work + num_tokens * hidden * itemsize


def _vision_bytes(part: VisionPart, file_bytes: int) -> tuple[int, int]:
    """Return what tower and projector take on a CPU, and their activations for one film: batches see one at a time."""
    tokens, tower = part.num_image_tokens + 1, part.tower
    # Measured with a ViT-B/14 at 518 pixels (ONNX Runtime 1.32, AVX2, November 2026): the scores four times over, of
    # which the arena's rounding up is one, and beside the weights what was repacked or cast for the products: a CPU
    # has none in float16.
    scores = 4 * tower.num_attention_heads * tokens**2
    gated = 2 * tokens * tower.intermediate_size
    stream = 4 * tokens * tower.hidden_size
    projected = 3 * part.num_image_tokens * part.hidden_size
    held = round(_VISION_HELD[part.format] * file_bytes)
    return held, 4 * max(stream + max(scores, gated), projected)


# -- What a process has taken ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The most memory that the process has held since it began, in bytes."""

    rss_bytes: int | None  # resident; None on Windows, where the standard library does not tell
    vram_bytes: int | None  # of torch's allocator; None without a GPU


def peak_rss_bytes() -> int | None:
    """Return the most memory the process has had resident since it began; None where that cannot be told (Windows)."""
    if sys.platform == "win32":
        return None
    # Not getrusage: what that tells a child process is never less than its parent's peak when it was started.
    if (peak := _proc_status("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rss_bytes() -> int | None:
    """Return the memory the process has resident now; None where /proc does not tell."""
    return _proc_status("VmRSS")


def _proc_status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# -- Reading and printing --------------------------------------------------------------------------------------------

_UNITS: Final = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Read a size: a number of bytes, or text, perhaps with a unit, such as "12GiB", "800 MB" or "12G" (binary).

    Raises:
        LiteError: it is no size.
    """
    if type(size) is int and size > 0:
        return size
    text = size if isinstance(size, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        msg = f"got the size {size!r} · expected a number of bytes, or one with a unit · write it like 12GiB"
        raise LiteError(msg)
    return int(float(found[1]) * _UNITS[found[2]])


def shown_bytes(count: float) -> str:
    """Return a size as text, in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
