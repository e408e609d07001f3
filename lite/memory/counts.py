"""What weights, caches and activations take, in bytes, counted from shapes.

Each count is that of the code it names; what had to be measured says where and when.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.artifact.parts import OnnxPart, VisionPart
    from lite.config import DecoderConfig, Quantization


ITEMSIZE: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_VISION_HELD: Final = {"fp32": 1.5, "fp16": 2.4, "int8": 2.0}  # of the bytes of the file: see vision_bytes
ONNX_CHUNK_SIZE: Final = 512
"""Tokens of a prompt that go through `decoder.onnx` together: it bounds the memory of activations."""
_ONNX_HELD: Final = 1.5
"""Of the activations: the arena has holes between them. 1.4 to 1.6 were measured in runs of 256 to 1,472 tokens at 7B
widths (ONNX Runtime 1.32 without memory patterns, November 2026)."""
_BLOCK_SIZES: Final = (128, 64, 32, 16)
"""Inputs of a block of MatMulNBits where a group is a whole row: as many as divide it."""
_EXPANDED_VALUES: Final = 3 * 2**23
"""Weights that are expanded at a time for a prompt: `kernels.quant_matmul.SCRATCH_VALUES`."""
_REPACKED_VALUES: Final = 2**24
"""Integers that are repacked at a time where a GPU is loaded: see `kernels.packing.to_tiles`."""


def decoder_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the weights of a decoder take in memory, those that are not quantised with so many bytes each."""
    embeddings = config.vocab_size * config.hidden_size * itemsize
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size * itemsize
    tied = head_bytes(config, itemsize=itemsize) if config.tie_word_embeddings else 0
    return embeddings + norms + decode_weight_bytes(config, itemsize=itemsize) - tied


def layer_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the seven linears of a layer take."""
    return sum(
        linear_bytes(shape, config.quantization, itemsize=itemsize) for shape in layer_linear_shapes(config).values()
    )


def head_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what the head takes, whether it is its own or the embeddings'."""
    stored = config.quantization.lm_head if config.quantization is not None else None
    return linear_bytes((config.vocab_size, config.hidden_size), stored, itemsize=itemsize)


def decode_weight_bytes(config: DecoderConfig, *, itemsize: int) -> int:
    """Return what decoding one token reads of the weights: every linear and the head, once.

    Of the embeddings it reads one row, and the norms are small: some ten-thousandths of the whole.
    """
    return config.num_hidden_layers * layer_bytes(config, itemsize=itemsize) + head_bytes(config, itemsize=itemsize)


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


def adapter_bytes(config: DecoderConfig, ranks: Sequence[int], *, itemsize: int) -> int:
    """Return what adapters of these ranks take in torch's decoder: stacked, and so all of the largest rank."""
    values = sum(sum(shape) for shape in layer_linear_shapes(config).values())
    return config.num_hidden_layers * len(ranks) * max(ranks, default=0) * values * itemsize


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


def onnx_prompt_bytes(config: DecoderConfig, part: OnnxPart) -> int:
    """Return what the graph for prompts takes beside that: a byte for each of the layers' weights, and its own head."""
    shapes = onnx_linear_shapes(config)
    del shapes["lm_head"]
    int8 = sum(out_features * (in_features + 4) for out_features, in_features in shapes.values())
    return config.num_hidden_layers * int8 + onnx_linear_bytes("lm_head", config, part, bytes_per_block=4 + 4 + 4)


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


def onnx_adapter_block(rank: int) -> int:
    """Return the ranks of an adapter that have one scale: the ranks of all are padded to whole blocks of them."""
    return 16 if rank <= 16 else 32 if rank % 64 else 64


def onnx_adapter_bytes(config: DecoderConfig, ranks: Sequence[int], *, itemsize: int = 4) -> int:
    """Return what adapters of these ranks take beside a graph of `decoder.onnx`: as `onnx_engine.adapted` has them.

    Args:
        config: the decoder's.
        ranks: one for each.
        itemsize: of the activations; in float32 the factors have 8 bits.
    """
    if itemsize == ITEMSIZE["float16"]:
        return adapter_bytes(config, ranks, itemsize=itemsize)
    largest = max(ranks, default=0)
    block = onnx_adapter_block(largest)
    rank, values = -(-largest // block) * block, 0
    for out_features, in_features in layer_linear_shapes(config).values():
        blocks = math.ceil(in_features / (onnx_block_size(in_features, None) or 16)) + out_features / block
        # As of the decoder's linears. 47 MiB were resident of one of rank 64 on 8 layers of a 7B model, and 44 are
        # counted (ONNX Runtime 1.32, AVX-512, December 2026).
        values += round(rank * (in_features + out_features + blocks * (4 + 4 + 4)))
    return config.num_hidden_layers * len(ranks) * values


def cache_bytes_per_token(config: DecoderConfig, *, itemsize: int) -> int:
    """2 (keys, values) x layers x kv_heads x head_dim x bytes of an element."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def cache_scale_bytes_per_token(config: DecoderConfig) -> int:
    """2 (keys, values) x layers x kv_heads x 2 bytes: the scales of an int8 cache of torch's."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * 2


def prefill_work_bytes(
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
    hidden = config.hidden_size
    chunk = _Chunk(config=config, itemsize=itemsize, int8_cache=int8_cache, on_gpu=on_gpu)
    in_layers = (chunk.nbytes(start, min(start + chunk_size, num_tokens)) for start in range(0, num_tokens, chunk_size))
    # The features, as they came and cast, beside the embeddings that they are put into.
    most = max(num_image_tokens * hidden * (4 + itemsize), *in_layers)
    rotary = 4 * config.max_position_embeddings * config.head_dim
    return rotary + num_tokens * hidden * itemsize + most + 2 * 4 * config.vocab_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """What a chunk of a prompt takes in a layer of torch's decoder."""

    config: DecoderConfig
    itemsize: int
    int8_cache: bool
    on_gpu: bool

    def nbytes(self, start: int, end: int) -> int:
        """Count the tokens from `start` to `end`."""
        # The residual stream and its norm; slots and angles; behind the first chunk a mask.
        T, config = end - start, self.config
        streams = T * (2 * config.hidden_size * self.itemsize + 4 * config.head_dim + 16) + (T * end if start else 0)
        attention, gated = self._attention(start, end), self._gated(T)
        # One after the other: but on a CPU the C library keeps what the first has given back, as it is in small pieces.
        return streams + (max(attention, gated) if self.on_gpu else attention + gated)

    def _attention(self, start: int, end: int) -> int:
        config, itemsize, T = self.config, self.itemsize, end - start
        hidden, heads = config.hidden_size, config.num_attention_heads
        q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
        wide = T * itemsize
        # q, k and v as they were multiplied, and q and k turned.
        turned = wide * (q + 2 * kv + q + kv)
        # Of an int8 cache what was before: cast, scaled and both, in float32; then with what is new, in 16 bits.
        past = kv * max(12 * start, 2 * itemsize * (start + end)) if self.int8_cache else 0
        # The mask as numbers, and those padded.
        attended = wide * q + 4 * T * heads + (2 * wide * end if start else 0)
        attended += 2 * itemsize * kv * end * self.int8_cache
        product = functools.partial(_product_bytes, config, T, itemsize=itemsize, on_gpu=self.on_gpu)
        most = max(product(hidden, q, kv, kv), turned + max(past, attended), turned + wide * q + product(q, hidden))
        if self.on_gpu:
            return most
        # The reference computes in float32: q and k turned, and what is stored.
        return max(most, turned + past + T * (q + 2 * kv) * 4 + T * q * (4 if itemsize < 4 else 0))

    def _gated(self, T: int) -> int:
        hidden, inner, wide = self.config.hidden_size, self.config.intermediate_size, T * self.itemsize
        product = functools.partial(_product_bytes, self.config, T, itemsize=self.itemsize, on_gpu=self.on_gpu)
        most = max(product(hidden, inner, inner), wide * 3 * inner, wide * inner + product(inner, hidden))
        if self.on_gpu:
            return most
        # In float32: silu(gate), and times up.
        return max(most, wide * 2 * inner + T * 2 * inner * (8 if self.itemsize < 4 else 4))


def _product_bytes(
    config: DecoderConfig, num_tokens: int, in_features: int, *widths: int, itemsize: int, on_gpu: bool
) -> int:
    """Return what the products of a linear's parts take, and on a GPU what is expanded of a weight for them."""
    products = num_tokens * sum(widths) * itemsize
    quantization = config.quantization
    is_nf4 = quantization is not None and quantization.format == "bnb-nf4"
    if on_gpu and not is_nf4:
        values = min(sum(widths), max(16, _EXPANDED_VALUES // in_features // 16 * 16)) * in_features
        return products + (values * itemsize if quantization is not None else 0)
    # Each by itself, then side by side; on a CPU a weight is expanded a few rows at a time, by bitsandbytes as a whole.
    expanded = widths[-1] * in_features * itemsize if on_gpu else 0
    return max(products + expanded, products * min(2, len(widths)))


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """Return what torch gives cuBLAS for good for a stream, of which there are two: one captures the CUDA graphs."""
    # at::cuda::parseChosenWorkspaceSize, torch 2.13.
    return 32 << 20 if capability >= (9, 0) else (8 << 20) + (128 << 10)


def gpu_load_work_bytes(config: DecoderConfig) -> int:
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


def onnx_prefill_work_bytes(
    config: DecoderConfig, *, num_tokens: int, itemsize: int, int8_cache: bool, adapters: bool = False
) -> int:
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
    # With adapters what they add to gate and up, too, and the sum: 158 to 164 MiB more were measured, 161 are counted.
    widths += 5 * inner if adapters else 0
    chunk = min(num_tokens, ONNX_CHUNK_SIZE)
    work = round(_ONNX_HELD * chunk * widths * itemsize)
    if int8_cache and itemsize == ITEMSIZE["float32"]:
        # For the last chunk of a prompt: keys and values before it in float32, and once more while they are cast;
        # those with what is new; and what is new, while it is rounded (see `export.write.int8_cache_graph`).
        past = (num_tokens - 1) // ONNX_CHUNK_SIZE * ONNX_CHUNK_SIZE
        work += (3 * past + 2 * num_tokens + 2 * chunk) * kv * itemsize
    return work + num_tokens * hidden * itemsize


def vision_memory_bytes(part: VisionPart, file_bytes: int) -> tuple[int, int]:
    """Return what tower and projector take on a CPU, and their activations for one film: batches see one at a time."""
    tokens, tower = part.num_patches + 1, part.tower
    # Measured with a ViT-B/14 at 518 pixels (ONNX Runtime 1.32, AVX2, November 2026): the scores four times over, of
    # which the arena's rounding up is one, and beside the weights what was repacked or cast for the products: a CPU
    # has none in float16.
    scores = 4 * tower.num_attention_heads * tokens**2
    gated = 2 * tokens * tower.intermediate_size
    stream = 4 * tokens * tower.hidden_size
    projected = 3 * part.num_image_tokens * part.hidden_size
    held = round(_VISION_HELD[part.format] * file_bytes)
    return held, 4 * max(stream + max(scores, gated), projected)
