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
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def pack_factor(bits: int) -> int:
    """Return how many values a word holds."""
    return WORD_BITS // bits


def symmetric_zero(bits: int) -> int:
    """Return the integer that stands for a weight of zero."""
    return 1 << (bits - 1)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers along the first axis, low bits first.

    Args:
        values: [R, C], integers in 0 … 2^bits − 1, R a multiple of pack_factor(bits).
        bits: 4 or 8.

    Returns:
        int32 [R / pack_factor, C].
    """
    fields = values.reshape(-1, pack_factor(bits), values.shape[1])
    words = torch.zeros(fields.shape[0], fields.shape[2], dtype=torch.int32, device=values.device)
    for field in range(pack_factor(bits)):
        words |= fields[:, field].to(torch.int32) << (bits * field)
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`.

    Args:
        words: int32 [R, C].
        bits: 4 or 8.

    Returns:
        uint8 [R · pack_factor, C].
    """
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    # The shift of a negative word drags its sign in from the left; the mask takes that away again.
    fields = (words.unsqueeze(1) >> shifts[:, None]) & ((1 << bits) - 1)
    return fields.to(torch.uint8).flatten(0, 1)


def to_blocks(qweight: Tensor, bits: int, block_size: int) -> Tensor:
    """Turn GPTQ's words into the bytes of MatMulNBits: a transposition, as both put the first input lowest.

    Args:
        qweight: int32 [K / pack_factor, N].
        bits: 4 or 8.
        block_size: inputs of a block, which divides K.

    Returns:
        uint8 [N, K / block_size, block_size · bits / 8].

    Source:
        https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft.MatMulNBits)
    """
    # The bytes of a word lie lowest first, as on all machines that torch and ONNX Runtime run on.
    rows = qweight.t().contiguous().view(torch.uint8)
    return rows.view(rows.shape[0], -1, block_size * bits // 8)


def symmetric_qzeros(groups: int, out_features: int, bits: int) -> Tensor:
    """Return the qzeros of a symmetric weight: every field holds zero − 1, as version 1 of the format stores it."""
    stored = torch.full((out_features, groups), symmetric_zero(bits) - 1, dtype=torch.uint8)
    return pack(stored, bits).T.contiguous()


def group_index(in_features: int, group_size: int) -> Tensor:
    """Return g_idx, the group of each input, int32 [in_features]."""
    return torch.arange(in_features, dtype=torch.int32) // group_size
