"""What adapters (LoRA) add to the product of a linear, a different one for each row of a batch, or none: y += B (A x).

    shrink     h = A x      a split of the inputs each, float32
    expand     y += B h     the splits are added up as h is read: there is no third launch

Parts are linears side by side (q, k and v; gate and up), each with an A of its own rank and a B of its own outputs.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from kernels import reference
from kernels.backend import Backend, Card, card_of, device_guard, require_backend
from kernels.checks import check_float, check_tensor, check_whole

if TYPE_CHECKING:
    from torch import Tensor

MAX_PARTS: Final = 3
"""Linears side by side in one weight; where each ends is an argument of the kernel."""


class LoraPlan(NamedTuple):
    """How `lora_add` cuts both products into programs, for each row of x."""

    block_rows: int  # of A: shrink reads block_rows × block_k values a tile
    block_k: int
    splits: int
    block_n: int  # outputs: expand reads block_n × block_rank values of B a tile
    block_rank: int


def lora_plan(M: int, K: int, num_parts: int, rank: int, card: Card) -> LoraPlan:
    """Return how to cut the products of M rows with adapters of parts with K inputs: no measurement, but arithmetic.

    An adapter of rank R is R * (num_parts * K + N) values. Of Vicuna-7B with rank 64 in 16 bits that is 3.1 MB for
    q, k and v, 1.0 for o, 3.9 for gate and up, 1.9 for down: 320 MB in 32 layers for a token, of one adapter, a tenth
    of int4 weights; on a card with 1 TB/s 0.3 ms, and 0.5 to 3 µs for each of the two launches. That is what a program
    takes to wait for memory once: the programs shall be many, and have all they read under way at once.
    """
    # 2,048 values a tile: with 128 threads two loads of 16 bytes each, under way together.
    block_rows, block_k = 4, 512
    block_rank = min(1 << (rank - 1).bit_length(), 256)
    # No more than 32 outputs: 4,096 of them are 128 programs then, and it is not the bytes of a small rank that count.
    block_n = min(2048 // block_rank, 32)
    programs = M * -(-num_parts * rank // block_rows)
    tiles = -(-K // block_k)
    # A multiprocessor has room for 8 programs of 128 threads: a thread takes 64 registers at most (ptxas, 7.5 to 12.0).
    wanted = 8 * card.multiprocessors // programs
    # Each program of expand reads h of all splits: with 8 that is, from the L2 cache, half of what it reads of B.
    splits = max(1, min(wanted, tiles, 8))
    # As many tiles in each, and none without any.
    return LoraPlan(block_rows, block_k, -(-tiles // -(-tiles // splits)), block_n, block_rank)


def lora_add(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    *,
    parts: tuple[int, ...],
    backend: Backend | None = None,
) -> Tensor:
    """Add to each row of y, in place, what its adapter makes of x: B (A x), in float32 and rounded once.

    A row without an adapter keeps its bits, and nothing of a or b is read for it. What `slots` holds is not checked, as
    the launcher does not wait for it: a slot from S on reads memory that is not an adapter's.

    Args:
        y: [..., out], float16, bfloat16 or float32, contiguous: the product of the linear.
        x: [..., in] in the dtype of y: what the linear was given.
        a: [S, P * rank, in] in the dtype of y, contiguous: of each adapter A of each part, one below the other. Where a
            rank is smaller, the rest is zeros.
        b: [S, out, rank] in the dtype of y, contiguous: of each adapter B of all parts, one below the other, the scale
            included.
        slots: int64 [rows of x], contiguous: the adapter of each row, negative for none.
        parts: the outputs of each of the P parts, at most MAX_PARTS.

    Returns:
        y.
    """
    check_float("y", y)
    if y.dim() < 1 or x.dim() < 1 or a.dim() != 3:
        got = f"y {list(y.shape)}, x {list(x.shape)} and a {list(a.shape)}"
        raise ValueError(f"got {got} · expected [..., out], [..., in] and [S, parts * rank, in]")
    (*leading, N), K, (S, rank_rows, _) = y.shape, x.shape[-1], a.shape
    if not 0 < len(parts) <= MAX_PARTS or min(parts) < 1 or sum(parts) != N:
        raise ValueError(f"got parts {list(parts)} · expected 1 to {MAX_PARTS} whose sum is {N}, the outputs of y")
    if not rank_rows or rank_rows % len(parts):
        raise ValueError(f"got a {list(a.shape)} · expected parts * rank rows an adapter, for {len(parts)} parts")
    M, rank = math.prod(leading), rank_rows // len(parts)
    check_whole("y", y, (*leading, N), y.dtype, y.device)
    check_tensor("x", x, (*leading, K), y.dtype, y.device)
    check_whole("a", a, (S, rank_rows, K), y.dtype, y.device)
    check_whole("b", b, (S, N, rank), y.dtype, y.device)
    check_whole("slots", slots, (M,), torch.int64, y.device)
    if require_backend(y.device, backend) == "reference":
        return reference.lora_add(y, x, a, b, slots, parts=parts)
    if x.numel():
        from kernels.gpu import lora_add as kernels

        plan = lora_plan(M, K, len(parts), rank, card_of(y.device))
        # Of a row without an adapter neither written nor read.
        hidden = torch.empty(plan.splits, M, rank_rows, dtype=torch.float32, device=y.device)
        ends = tuple(accumulate(parts))
        with device_guard(y.device):
            flat = x.contiguous().view(M, K)
            kernels.lora_add(y.view(M, N), flat, a, b, slots, hidden, ends=ends, **plan._asdict())
    return y
