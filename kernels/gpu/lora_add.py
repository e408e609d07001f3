"""Kernels of `kernels.lora_add`. Programs of a row without an adapter, with a slot below 0, read its slot and end."""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS


@triton.jit
def shrink_kernel(
    x_ptr: tl.tensor, a_ptr: tl.tensor, slots_ptr: tl.tensor, hidden_ptr: tl.tensor,
    K: tl.tensor, rank_rows: tl.tensor, tiles_per_split: tl.tensor,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """Multiply BLOCK_ROWS rows of A by one row of x, over the inputs of one split: hidden [splits, M, rank_rows].

    Program (row, rows of A, split); neighbours in the first that have the same adapter share it in the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        r = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        split = tl.program_id(2)
        a_rows = a_ptr + (slot * rank_rows + r)[:, None] * K
        total = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(K, BLOCK_K))):
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            mask = (r < rank_rows)[:, None] & (k < K)[None, :]
            a = tl.load(a_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
            total += a * x[None, :]
        at = (split * tl.num_programs(0) + row) * rank_rows + r
        tl.store(hidden_ptr + at, tl.sum(total, axis=1), mask=r < rank_rows)


@triton.jit
def expand_kernel(
    y_ptr: tl.tensor, b_ptr: tl.tensor, slots_ptr: tl.tensor, hidden_ptr: tl.tensor,
    N: tl.tensor, rank_rows: tl.tensor, end_0: tl.tensor, end_1: tl.tensor,
    SPLITS: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RANK: tl.constexpr,
) -> None:  # fmt: skip
    """Add to BLOCK_N outputs of one row of y their rows of B times h, the splits in the same order every time.

    Program (row, tile). Each part has tiles of its own, so a program needs the h of one part. The parts are 0 … end_0 -
    1, then up to end_1, then up to N; the later ones may be empty.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot >= 0:
        tile = tl.program_id(1)
        tiles_0 = tl.cdiv(end_0, BLOCK_N)
        tiles_1 = tiles_0 + tl.cdiv(end_1 - end_0, BLOCK_N)
        in_1, in_2 = tile >= tiles_0, tile >= tiles_1
        part = in_1.to(tl.int32) + in_2.to(tl.int32)
        begin = tl.where(in_2, end_1, tl.where(in_1, end_0, 0))
        end = tl.where(in_2, N, tl.where(in_1, end_1, end_0))
        n = begin + (tile - tl.where(in_2, tiles_1, tl.where(in_1, tiles_0, 0))) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_rows = b_ptr + (slot * N + n)[:, None] * RANK
        y = y_ptr + row * N + n
        h_ptr = hidden_ptr + row * rank_rows + part * RANK
        total = tl.load(y, mask=n < end, other=0.0).to(tl.float32)
        for first in tl.static_range(0, RANK, BLOCK_RANK):
            j = first + tl.arange(0, BLOCK_RANK)
            b = tl.load(b_rows + j[None, :], mask=(n < end)[:, None] & (j < RANK)[None, :], other=0.0)
            h = tl.zeros((BLOCK_RANK,), dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                at = split * tl.num_programs(0).to(tl.int64) * rank_rows + j
                h += tl.load(h_ptr + at, mask=j < RANK, other=0.0)
            total += tl.sum(b.to(tl.float32) * h[None, :], axis=1)
        tl.store(y, total, mask=n < end)


def lora_add(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor, hidden: torch.Tensor,
    *, ends: tuple[int, ...], block_rows: int, block_k: int, splits: int, block_n: int, block_rank: int,
) -> None:  # fmt: skip
    """Launch both kernels.

    x is [M, K] and y [M, N], contiguous; hidden is float32 [splits, M, rows of A], memory to work in. `ends` are where
    the parts end, the last at N. The rest is a `LoraPlan`.
    """
    (M, K), N, rank_rows = x.shape, y.shape[1], a.shape[1]
    shrink_kernel[(M, triton.cdiv(rank_rows, block_rows), splits)](
        x, a, slots, hidden, K, rank_rows, triton.cdiv(triton.cdiv(K, block_k), splits),
        BLOCK_ROWS=block_rows, BLOCK_K=block_k, num_warps=4, **OPTIONS,
    )  # fmt: skip
    tiles = sum(triton.cdiv(end - begin, block_n) for begin, end in zip((0, *ends), ends, strict=False))
    end_0, end_1, _ = (*ends, N, N)[:3]
    expand_kernel[(M, tiles)](
        y, b, slots, hidden, N, rank_rows, end_0, end_1,
        SPLITS=splits, RANK=b.shape[2], BLOCK_N=block_n, BLOCK_RANK=block_rank, num_warps=4, **OPTIONS,
    )  # fmt: skip
