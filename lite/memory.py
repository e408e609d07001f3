"""Memory, in bytes: what an artifact will take, computed before anything of it is loaded, and what a process has taken.

    peak = libraries + decoder + tower + tower's activations + cache + decoder's activations

Each term is counted from shapes. On a GPU the peak is that of torch's allocator, and the tower is not in it. On a CPU
it is that of resident memory, where two things are not in our hands: ONNX Runtime's arenas, which keep what activations
took (the tower's, and the decoder's of the onnx engine), and freed memory that the C library keeps.
"""

from __future__ import annotations

import dataclasses
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

    def __str__(self) -> str:
        """Say what takes how much."""
        parts = {
            "the process before": self.libraries_bytes,
            "decoder": self.decoder_bytes,
            "tower": self.vision_bytes,
            f"cache of {self.batch_size} x {self.max_seq_len} tokens": self.cache_bytes,
            "activations": self.vision_work_bytes + self.prefill_work_bytes,
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
        libraries_bytes: what the process has resident already, torch imported; left out on a GPU.
    """
    manifest, config = artifact.manifest, artifact.decoder_config()
    on_cpu = device.startswith("cpu")
    prompt = num_prompt_tokens or manifest.vision.num_image_tokens + PROMPT_TEXT_TOKENS
    max_seq_len = min(prompt + (max_new_tokens or manifest.decoding.max_new_tokens), config.max_position_embeddings)
    vision_bytes, vision_work = _vision_bytes(manifest.vision, manifest.files[VISION_NAME].bytes, batch_size)
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
            prefill_work_bytes=_onnx_prefill_work_bytes(
                config, batch_size=batch_size, num_tokens=prompt, itemsize=itemsize, int8_cache=cache_dtype == "int8"
            ),
        )
    itemsize = ITEMSIZE[dtype or ("float32" if on_cpu else config.dtype)]
    return MemoryPlan(
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        libraries_bytes=libraries_bytes + FIRST_USE_BYTES if on_cpu else 0,
        decoder_bytes=decoder_bytes(config, itemsize=itemsize),
        # ONNX Runtime's memory is its own: torch's allocator, whose peak a GPU's plan is about, does not see it.
        vision_bytes=vision_bytes if on_cpu else 0,
        cache_bytes=batch_size * max_seq_len * cache_bytes_per_token(config, itemsize=itemsize),
        # The largest weight, as it is stored, beside what it becomes.
        load_work_bytes=2 * config.vocab_size * config.hidden_size if on_cpu and itemsize != 2 else 0,
        vision_work_bytes=vision_work if on_cpu else 0,
        prefill_work_bytes=batch_size * _prefill_work_bytes(config, num_tokens=prompt, itemsize=itemsize),
    )


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
    if plan.peak_bytes <= limit:
        return
    fits = (limit - plan.weight_bytes) // (plan.study_bytes // plan.batch_size)
    todo = f"take {fits} at a time" if 1 <= fits < plan.batch_size else "give it more, or export with fewer bits"
    msg = (
        f"{what}: got a memory limit of {shown_bytes(limit)} · expected at least {_shown_limit(plan.peak_bytes)}: "
        f"{plan} · {todo}{hint}"
    )
    raise MemoryBudgetError(msg)


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


def _prefill_work_bytes(config: DecoderConfig, *, num_tokens: int, itemsize: int) -> int:
    """Count what one prompt takes on its way through a layer."""
    # Embeddings twice (a row, padded), the image's features, the residual stream before and after, its norm.
    streams = 6 * num_tokens * config.hidden_size * itemsize
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = num_tokens * (2 * q + 4 * kv) * itemsize + num_tokens**2 * (1 + itemsize)  # the mask, twice
    gated = 3 * num_tokens * config.intermediate_size * itemsize
    logits = 2 * 4 * config.vocab_size
    return streams + max(attention, gated) + logits


def _onnx_prefill_work_bytes(
    config: DecoderConfig, *, batch_size: int, num_tokens: int, itemsize: int, int8_cache: bool
) -> int:
    """Count what a chunk of a prompt takes on its way through `decoder.onnx`, and what waits beside it.

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
    # The image's features of every study, and the prompt's embeddings of the one that is computed.
    waiting = (batch_size * 4 + itemsize) * num_tokens * hidden
    return work + waiting + batch_size * 2 * 4 * config.vocab_size


def _vision_bytes(part: VisionPart, file_bytes: int, batch_size: int) -> tuple[int, int]:
    """Return what tower and projector take on a CPU, and their activations."""
    tokens, tower = part.num_image_tokens + 1, part.tower
    # Measured with a ViT-B/14 at 518 pixels (ONNX Runtime 1.32, AVX2, November 2026): the scores four times over, of
    # which the arena's rounding up is one, and beside the weights what was repacked or cast for the products: a CPU
    # has none in float16.
    scores = 4 * tower.num_attention_heads * tokens**2
    gated = 2 * tokens * tower.intermediate_size
    stream = 4 * tokens * tower.hidden_size
    projected = 3 * part.num_image_tokens * part.hidden_size
    held = round(_VISION_HELD[part.format] * file_bytes)
    return held, 4 * batch_size * max(stream + max(scores, gated), projected)


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
