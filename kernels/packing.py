"""Bit layouts: GPTQ v1, the form that AutoGPTQ, GPTQModel, transformers, vLLM and ExLlamaV2 read.

A weight w[N, K] (N outputs, K inputs) is `scale · (q − zero)`, with an unsigned integer q of `bits` bits; a *group* of
`group_size` neighbouring inputs shares scale and zero. With 4 bits a word of 32 bits holds pack_factor = 8 of them,
the first in the lowest bits:

    qweight int32 [K / 8, N]        word r of column n, along the inputs:
        bit  31            …                    4 3         0
            │ q[n, 8r+7] │ … │ q[n, 8r+1] │ q[n, 8r] │
    qzeros  int32 [K / group_size, N / 8]   the same, along the outputs, and each field holds zero − 1
    scales  float16 [K / group_size, N]
    g_idx   int32 [K]               the group of each input: k // group_size

Only the symmetric form is written and read here: zero = 2^(bits − 1), so every field of qzeros is 7 (or 127).

ONNX Runtime's MatMulNBits takes the same integers with the same zero, an output's side by side (`to_blocks`):

    B       uint8 [N, K / block_size, block_size · bits / 8]    low bits first; a block is a group
    scales  [N · K / block_size]

The GPU kernels of `kernels.quant_matmul` take them in *tiles* (`to_tiles`), made at load and never written to disk.
Inputs are cut into spans of 32 · pack_factor, 256 with 4 bits and 128 with 8; a tile holds one span of 16 outputs as
16 x 32 words, 2 KiB that lie together, and the tiles of the same outputs follow one another:

    tiles   int32 [ceil(N / 16), ceil(K / span), 16, 32]        word w of output n in span s, 4 bits:
        bit  31              …                                     4 3                0
            │ q[n, 256s+224+w] │ … │ q[n, 256s+64+w] │ q[n, 256s+32+w] │ q[n, 256s+w] │

- A program that computes 16 outputs reads one unbroken stretch of memory, each thread 4 words (16 bytes) at a time.
- Field j of the 32 words of an output holds 32 neighbouring inputs: they meet 32 neighbouring values of x, with no
  shuffling, and lie in one group whatever its size (a multiple of 32, or the whole row), so share one scale.
- What is beyond N or K holds the symmetric zero, a weight of 0.

scales stay as they are: for one group the scales of neighbouring outputs lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
TILE_OUTPUTS = 16
TILE_WORDS = 32
"""Words of an output in a tile: with 4 of them a thread, 8 threads share an output and a warp reads 512 bytes."""
_CHUNK_VALUES = 2**24
"""Integers that `to_tiles` expands at a time, each to 4 bytes: loading takes 64 MiB beside the weight, at any size."""


def pack_factor(bits: int) -> int:
    """Return how many values a word holds."""
    return WORD_BITS // bits


def symmetric_zero(bits: int) -> int:
    """Return the integer that stands for a weight of zero."""
    return 1 << (bits - 1)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers in 0 … 2^bits − 1 along the first axis, low bits first: [R, C] to int32 [R / pack_factor, C]."""
    fields = values.reshape(-1, pack_factor(bits), values.shape[1])
    words = torch.zeros(fields.shape[0], fields.shape[2], dtype=torch.int32, device=values.device)
    for field in range(pack_factor(bits)):
        words |= fields[:, field].to(torch.int32) << (bits * field)
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`: int32 [R, C] to uint8 [R · pack_factor, C]."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    # The shift of a negative word drags its sign in from the left; the mask takes that away again.
    fields = (words.unsqueeze(1) >> shifts[:, None]) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(0, 1)


def to_blocks(qweight: Tensor, bits: int, block_size: int) -> Tensor:
    """Turn GPTQ's words into the bytes of MatMulNBits: a transposition, as both put the first input lowest.

    Source:
        https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft.MatMulNBits)
    """
    # The bytes of a word lie lowest first, as on all machines that torch and ONNX Runtime run on.
    rows = qweight.t().contiguous().view(torch.uint8)
    return rows.view(rows.shape[0], -1, block_size * bits // 8)


def span_size(bits: int) -> int:
    """Return how many inputs a tile covers."""
    return TILE_WORDS * pack_factor(bits)


def to_tiles(qweight: Tensor, bits: int) -> Tensor:
    """Turn GPTQ's words into the tiles of the GPU kernels, on the same device; `from_tiles` undoes it."""
    K, N = qweight.shape[0] * pack_factor(bits), qweight.shape[1]
    span = span_size(bits)
    spans, rows = -(-K // span), -(-N // TILE_OUTPUTS)
    tiles = torch.empty(rows, spans, TILE_OUTPUTS, TILE_WORDS, dtype=torch.int32, device=qweight.device)
    step = max(1, _CHUNK_VALUES // (spans * span * TILE_OUTPUTS))
    for begin in range(0, rows, step):
        some = qweight[:, begin * TILE_OUTPUTS : (begin + step) * TILE_OUTPUTS]
        values = unpack(some, bits)  # [K, outputs]
        count = min(step, rows - begin)
        # On the right of each axis, last first.
        padding = (0, count * TILE_OUTPUTS - values.shape[1], 0, spans * span - K)
        whole = torch.nn.functional.pad(values, padding, value=symmetric_zero(bits))
        fields = whole.view(spans, pack_factor(bits), TILE_WORDS, count, TILE_OUTPUTS)
        # `pack` puts neighbours of the first axis into a word; the fields of a word have to be these neighbours.
        words = pack(fields.permute(3, 0, 4, 2, 1).reshape(-1, pack_factor(bits)).t().contiguous(), bits)
        tiles[begin : begin + count] = words.view(count, spans, TILE_OUTPUTS, TILE_WORDS)
    return tiles


def from_tiles(tiles: Tensor, bits: int, K: int, N: int) -> Tensor:
    """Undo `to_tiles`: the unsigned integers uint8 [N, K]; `pack(values.t(), bits)` is GPTQ's qweight again."""
    rows, spans = tiles.shape[:2]
    values = unpack(tiles.reshape(1, -1), bits)  # [pack_factor, words], as there is only one row of words
    fields = values.view(pack_factor(bits), rows, spans, TILE_OUTPUTS, TILE_WORDS)
    whole = fields.permute(1, 3, 2, 0, 4).reshape(rows * TILE_OUTPUTS, spans * span_size(bits))
    return whole[:N, :K]


def symmetric_qzeros(groups: int, out_features: int, bits: int) -> Tensor:
    """Return the qzeros of a symmetric weight: every field holds zero − 1, as version 1 of the format stores it."""
    stored = torch.full((out_features, groups), symmetric_zero(bits) - 1, dtype=torch.uint8)
    return pack(stored, bits).T.contiguous()


def group_index(in_features: int, group_size: int) -> Tensor:
    """Return g_idx, the group of each input, int32 [in_features]."""
    return torch.arange(in_features, dtype=torch.int32) // group_size
