"""Kernels of `kernels.quant_matmul`, over the tiles that `kernels.packing` draws.

How an integer becomes a weight, without the slow conversion of an integer to a float: masked where it lies in its word,
and taken for the bits of a float32, q is a denormal number, q * 2^(position - 149), and

    weight / 2^38 = scale * (q - zero) / 2^38 = denormal * (scale * 2^(111 - position)) - zero * scale / 2^38

A mask and one multiply-add, then one more multiply-add for each row of x; a shift only for the fields that reach beyond
the 23 bits of the mantissa. All of it is exact: q has at most 8 bits, a scale 11. (2^149 times a scale would overflow;
2^111 times the largest, 2^16, does not.) GPUs multiply denormal numbers at full speed, and Triton does not have them
flushed to zero, which `tests/kernels/test_kernels_compiled.py` makes sure of.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS

TILE_OUTPUTS = tl.constexpr(16)
TILE_WORDS = tl.constexpr(32)
TILE_SIZE = tl.constexpr(512)
HUGE = tl.constexpr(2.0**38)


@triton.jit
def _tile_offsets(n: tl.tensor, spans: tl.tensor) -> tl.tensor:
    """Return where the words of outputs n begin, in their first span: [outputs]."""
    return (n // TILE_OUTPUTS).to(tl.int64) * spans * TILE_SIZE + (n % TILE_OUTPUTS) * TILE_WORDS


@triton.jit
def _scales(
    scales_ptr: tl.tensor, n: tl.tensor, k0: tl.tensor, N: tl.tensor, K: tl.tensor, GROUP_SIZE: tl.constexpr
) -> tl.tensor:
    """Return the scales of outputs n for the field that begins at input k0: float32 [outputs], 0 beyond N and K."""
    offsets = (k0 // GROUP_SIZE).to(tl.int64) * N + n
    return tl.load(scales_ptr + offsets, mask=n < tl.where(k0 < K, N, 0), other=0.0).to(tl.float32)


@triton.jit
def _tiny_weights(words: tl.tensor, scale: tl.tensor, field: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Return the weights in one field of some words, divided by HUGE: float32 [outputs, words]."""
    IN_PLACE: tl.constexpr = 23 // BITS
    POSITION: tl.constexpr = field % IN_PLACE * BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) << POSITION
    FACTOR: tl.constexpr = 2.0 ** (111 - POSITION)
    ZERO: tl.constexpr = -(2.0 ** (BITS - 1 - 38))
    denormal = ((words >> field // IN_PLACE * IN_PLACE * BITS) & MASK).to(tl.float32, bitcast=True)
    return denormal * (scale * FACTOR)[:, None] + (scale * ZERO)[:, None]


@triton.jit
def partial_products_kernel(
    x_ptr: tl.tensor, tiles_ptr: tl.tensor, scales_ptr: tl.tensor, out_ptr: tl.tensor,
    M: tl.tensor, N: tl.tensor, K: tl.tensor, x_stride: tl.tensor, spans: tl.tensor, spans_per_split: tl.tensor,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply ROWS rows of x by BLOCK_N outputs of the weight, over the inputs of one split.

    Program (row tile, output tile, split); neighbours in the first share the weight, which then comes from the L2
    cache. The products of the 32 words of an output are summed at the end and not in the loop. Rows are written out,
    at most 4 of them, as a third axis would have the compiler send words and x through shared memory.

    out is [splits, M, N]: float32 for `sum_partials_kernel`, or y itself where there is one split.
    """
    FIELDS: tl.constexpr = 32 // BITS
    row = tl.program_id(0) * ROWS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    word = tl.arange(0, TILE_WORDS)
    words_ptr = tiles_ptr + _tile_offsets(n, spans)[:, None] + word[None, :]
    x_ptr += row.to(tl.int64) * x_stride
    # Of a row that is not there nothing is read, and nothing written.
    K_1, K_2, K_3 = tl.where(row + 1 < M, K, 0), tl.where(row + 2 < M, K, 0), tl.where(row + 3 < M, K, 0)
    N_1, N_2, N_3 = tl.where(row + 1 < M, N, 0), tl.where(row + 2 < M, N, 0), tl.where(row + 3 < M, N, 0)
    total_0 = tl.zeros((BLOCK_N, TILE_WORDS), dtype=tl.float32)
    total_1 = total_0
    total_2 = total_0
    total_3 = total_0
    first = split * spans_per_split
    for span in range(first, tl.minimum(first + spans_per_split, spans)):
        words = tl.load(words_ptr + span * TILE_SIZE, mask=(n < N)[:, None], other=0)
        for field in tl.static_range(FIELDS):
            k0 = (span * FIELDS + field) * TILE_WORDS
            k = k0 + word
            # Each group is whole fields, or the other way round: a new scale only where a group begins.
            if field * TILE_WORDS % GROUP_SIZE == 0:
                scale = _scales(scales_ptr, n, k0, N, K, GROUP_SIZE)
            weights = _tiny_weights(words, scale, field, BITS)
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            total_0 += weights * x[None, :]
            if ROWS > 1:
                x = tl.load(x_ptr + x_stride + k, mask=k < K_1, other=0.0).to(tl.float32)
                total_1 += weights * x[None, :]
            if ROWS > 2:
                x = tl.load(x_ptr + 2 * x_stride + k, mask=k < K_2, other=0.0).to(tl.float32)
                total_2 += weights * x[None, :]
                x = tl.load(x_ptr + 3 * x_stride + k, mask=k < K_3, other=0.0).to(tl.float32)
                total_3 += weights * x[None, :]
    out_ptr += (split.to(tl.int64) * M + row) * N + n
    tl.store(out_ptr, tl.sum(total_0, axis=1) * HUGE, mask=n < N)
    if ROWS > 1:
        tl.store(out_ptr + N, tl.sum(total_1, axis=1) * HUGE, mask=n < N_1)
    if ROWS > 2:
        tl.store(out_ptr + 2 * N, tl.sum(total_2, axis=1) * HUGE, mask=n < N_2)
        tl.store(out_ptr + 3 * N, tl.sum(total_3, axis=1) * HUGE, mask=n < N_3)


@triton.jit
def sum_partials_kernel(
    partials_ptr: tl.tensor, out_ptr: tl.tensor, size: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Add up the splits, always in the same order: partials float32 [SPLITS, size] to out [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partials_ptr + split * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total, mask=at < size)


@triton.jit
def dequantize_kernel(
    tiles_ptr: tl.tensor, scales_ptr: tl.tensor, out_ptr: tl.tensor,
    begin: tl.tensor, end: tl.tensor, N: tl.tensor, K: tl.tensor, spans: tl.tensor,
    BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """Expand one span of BLOCK_N outputs, from `begin` on: out [end - begin, K]."""
    FIELDS: tl.constexpr = 32 // BITS
    span = tl.program_id(0)
    local = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = begin + local
    inside = n < end
    word = tl.arange(0, TILE_WORDS)
    words_ptr = tiles_ptr + _tile_offsets(n, spans)[:, None] + word[None, :]
    words = tl.load(words_ptr + span * TILE_SIZE, mask=inside[:, None], other=0)
    out_ptr += local.to(tl.int64)[:, None] * K
    for field in tl.static_range(FIELDS):
        k0 = (span * FIELDS + field) * TILE_WORDS
        k = (k0 + word)[None, :]
        if field * TILE_WORDS % GROUP_SIZE == 0:
            scale = _scales(scales_ptr, n, k0, N, K, GROUP_SIZE)
        weights = _tiny_weights(words, scale, field, BITS) * HUGE
        tl.store(out_ptr + k, weights, mask=inside[:, None] & (k < K))


def decode(
    x: torch.Tensor, tiles: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, partials: torch.Tensor,
    *, bits: int, group_size: int, rows: int, block_n: int, splits: int, num_warps: int,
) -> None:  # fmt: skip
    """Launch `partial_products_kernel`, and `sum_partials_kernel` where there is more than one split.

    x [M, K] has no gaps in its last axis; `partials` is float32 [splits, M, N], or `out` where splits is 1. A group is
    a power of two from 32 on, or a multiple of the span that covers K. The rest is a `DecodePlan`.
    """
    (M, K), N, spans = x.shape, scales.shape[1], tiles.shape[1]
    grid = (triton.cdiv(M, rows), triton.cdiv(N, block_n), splits)
    partial_products_kernel[grid](
        x, tiles, scales, partials, M, N, K, x.stride(0), spans, triton.cdiv(spans, splits),
        BITS=bits, GROUP_SIZE=group_size, ROWS=rows, BLOCK_N=block_n, num_warps=num_warps, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        # 512: 4 values for each of the 128 threads; there is little to do, so many small programs.
        sum_partials_kernel[(triton.cdiv(M * N, 512),)](
            partials, out, M * N, SPLITS=splits, BLOCK=512, num_warps=4, **OPTIONS
        )


def dequantize(
    tiles: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, *, begin: int, end: int, bits: int, group_size: int
) -> None:
    """Launch `dequantize_kernel` for outputs begin … end - 1: out [end - begin, K], contiguous."""
    K, N, spans = out.shape[1], scales.shape[1], tiles.shape[1]
    # 64 outputs: each of 128 threads reads 4 x 16 bytes, and the rows it writes stay 64 bytes long anyhow.
    grid = (spans, triton.cdiv(end - begin, 64))
    dequantize_kernel[grid](
        tiles, scales, out, begin, end, N, K, spans,
        BITS=bits, GROUP_SIZE=group_size, BLOCK_N=64, num_warps=4, **OPTIONS,
    )  # fmt: skip
