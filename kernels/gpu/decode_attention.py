"""Kernels of `kernels.decode_attention`: partial attention over tiles of the cache, then their combination.

A tile of slots gives three things: the largest score m, the sum l of exp(score - m), and the sum of exp(score - m) * v.
Over several tiles, with M the largest m, the output is Σ exp(m - M) * sums / Σ exp(m - M) * l.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS


@triton.jit
def partial_attention_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, k_scales_ptr: tl.tensor, v_scales_ptr: tl.tensor,
    lengths_ptr: tl.tensor, sums_ptr: tl.tensor, stats_ptr: tl.tensor, scale: tl.tensor,
    num_tokens: tl.tensor, heads: tl.tensor, groups: tl.tensor, head_dim: tl.tensor, num_slots: tl.tensor,
    q_batch: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, kv_batch: tl.tensor, kv_head: tl.tensor,
    kv_slot: tl.tensor, scales_batch: tl.tensor, scales_head: tl.tensor,
    QUANTIZED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Attend with one head of a row's tokens over one tile of BLOCK_S slots, which is read once for all of them.

    Program (tile, row and head) writes sums [B * T * heads, tiles, head_dim] and stats [.., 2]. What lies at or beyond
    a token's length does not count, even if it is a NaN; a tile without any slot before that writes nothing of that
    token, and `combine_kernel` does not read it.
    """
    tile, row_head = tl.program_id(0), tl.program_id(1)
    row = row_head // heads
    head = row_head % heads
    tokens = tl.arange(0, BLOCK_Q)
    lengths = tl.load(lengths_ptr + row * num_tokens + tokens, mask=tokens < num_tokens, other=0)
    longest = tl.minimum(tl.max(lengths, axis=0), num_slots)
    if tile * BLOCK_S < longest:
        slots = tile * BLOCK_S + tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        read = slots < longest
        mask = read[:, None] & (d < head_dim)[None, :]
        at = row.to(tl.int64) * kv_batch + (head // groups).to(tl.int64) * kv_head
        offsets = at + slots.to(tl.int64)[:, None] * kv_slot + d[None, :]
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        k_scales = slots.to(tl.float32)
        v_scales = k_scales
        if QUANTIZED:
            at = row.to(tl.int64) * scales_batch + (head // groups).to(tl.int64) * scales_head
            k_scales = tl.load(k_scales_ptr + at + slots, mask=read, other=0.0).to(tl.float32)
            v_scales = tl.load(v_scales_ptr + at + slots, mask=read, other=0.0).to(tl.float32)
        for token in range(num_tokens):
            length = tl.minimum(tl.load(lengths_ptr + row * num_tokens + token), num_slots)
            if tile * BLOCK_S < length:
                seen = slots < length
                q_at = row.to(tl.int64) * q_batch + token * q_token + head * q_head
                q = tl.load(q_ptr + q_at + d, mask=d < head_dim, other=0.0)
                scores = tl.sum(k * (q.to(tl.float32) * scale)[None, :], axis=1)
                if QUANTIZED:
                    scores *= k_scales
                scores = tl.where(seen, scores, float("-inf"))
                largest = tl.max(scores, axis=0)
                weights = tl.exp(scores - largest)
                total = tl.sum(weights, axis=0)
                if QUANTIZED:
                    weights *= v_scales
                # Of a slot that only a later token sees nothing counts: zero times a NaN would be one.
                summed = tl.sum(tl.where(seen[:, None], weights[:, None] * v, 0.0), axis=0)
                place = ((row * num_tokens + token) * heads + head).to(tl.int64) * tl.num_programs(0) + tile
                tl.store(sums_ptr + place * head_dim + d, summed, mask=d < head_dim)
                tl.store(stats_ptr + place * 2, largest)
                tl.store(stats_ptr + place * 2 + 1, total)


@triton.jit
def combine_kernel(
    sums_ptr: tl.tensor, stats_ptr: tl.tensor, lengths_ptr: tl.tensor, out_ptr: tl.tensor,
    heads: tl.tensor, head_dim: tl.tensor, tiles: tl.tensor, num_slots: tl.tensor,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Combine the tiles of one token and head, BLOCK_T at a time, in order: out [B * T * heads, head_dim]."""
    row_head = tl.program_id(0)
    length = tl.minimum(tl.load(lengths_ptr + row_head // heads), num_slots)
    live = (length + BLOCK_S - 1) // BLOCK_S
    d = tl.arange(0, BLOCK_D)
    largest = float("-inf")
    total = 0.0
    sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, live, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        place = row_head.to(tl.int64) * tiles + tile
        m = tl.load(stats_ptr + place * 2, mask=tile < live, other=float("-inf"))
        l = tl.load(stats_ptr + place * 2 + 1, mask=tile < live, other=0.0)  # noqa: E741 - its name in the literature
        mask = (tile < live)[:, None] & (d < head_dim)[None, :]
        some = tl.load(sums_ptr + place[:, None] * head_dim + d[None, :], mask=mask, other=0.0)
        new_largest = tl.maximum(largest, tl.max(m, axis=0))
        weights = tl.exp(m - new_largest)
        fade = tl.exp(largest - new_largest)
        sums = sums * fade + tl.sum(weights[:, None] * some, axis=0)
        total = total * fade + tl.sum(weights * l, axis=0)
        largest = new_largest
    # A row of length 0 has seen nothing: zeros, and not 0 / 0.
    sums = sums / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row_head.to(tl.int64) * head_dim + d, sums, mask=d < head_dim)


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    sums: torch.Tensor, stats: torch.Tensor, out: torch.Tensor, *, block_s: int,
) -> None:  # fmt: skip
    """Launch both kernels; the arguments are those of `kernels.decode_attention`, the rest contiguous.

    sums is float32 [B * T * heads, tiles, head_dim] and stats [B * T * heads, tiles, 2]: memory to work in, for tiles
    of block_s slots.
    """
    (B, T, heads, head_dim), (_, kv_heads, slots, _) = q.shape, k_cache.shape
    tiles, block_d = sums.shape[1], triton.next_power_of_2(head_dim)
    strides = k_scales.stride() if k_scales is not None else (0, 0, 0)
    partial_attention_kernel[(tiles, B * heads)](
        q, k_cache, v_cache, k_cache if k_scales is None else k_scales, v_cache if v_scales is None else v_scales,
        lengths, sums, stats, head_dim**-0.5, T, heads, heads // kv_heads, head_dim, slots,
        q.stride(0), q.stride(1), q.stride(2), k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), *strides[:2],
        QUANTIZED=k_scales is not None, BLOCK_Q=triton.next_power_of_2(T), BLOCK_S=block_s, BLOCK_D=block_d,
        num_warps=4, **OPTIONS,
    )  # fmt: skip
    # 16 tiles at a time: with head_dim 128 that is 16 sums for each of 128 threads, and 1,024 slots a turn.
    combine_kernel[(B * T * heads,)](
        sums, stats, lengths, out, heads, head_dim, tiles, slots,
        BLOCK_S=block_s, BLOCK_T=16, BLOCK_D=block_d, num_warps=4, **OPTIONS,
    )  # fmt: skip
