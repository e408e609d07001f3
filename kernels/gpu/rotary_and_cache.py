"""Kernel of `kernels.rotary_and_cache`: one program for one head of one token."""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS

# Adding and subtracting 1.5 * 2^23 rounds a float32 to the nearest integer, ties to even, as torch.round does.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _quantize(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Return x / scale as int8, zeros where the scale is 0."""
    # div_rn: the usual quotient of a GPU may be off by one in the last place, which moves a tie.
    steps = tl.div_rn(x, tl.where(scale > 0.0, scale, 1.0))
    steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
    steps = (steps + ROUNDING) - ROUNDING
    return tl.where(scale > 0.0, steps, 0.0).to(tl.int8)


@triton.jit
def _write(
    first: tl.tensor, second: tl.tensor, cache_ptr: tl.tensor, scales_ptr: tl.tensor, half: tl.tensor, i: tl.tensor,
    cache_at: tl.tensor, scales_at: tl.tensor, QUANTIZED: tl.constexpr,
) -> None:  # fmt: skip
    """Put one vector, given in halves, into its slot."""
    if QUANTIZED:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), axis=0), tl.max(tl.abs(second), axis=0))
        # What is stored divides, not what was computed: rounded to float16 the two differ.
        scale = tl.div_rn(largest, 127.0).to(scales_ptr.dtype.element_ty)
        tl.store(scales_ptr + scales_at, scale)
        scale = scale.to(tl.float32)
        first, second = _quantize(first, scale), _quantize(second, scale)
    tl.store(cache_ptr + cache_at + i, first, mask=i < half)
    tl.store(cache_ptr + cache_at + half + i, second, mask=i < half)


@triton.jit
def rotary_and_cache_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, slots_ptr: tl.tensor,
    k_cache_ptr: tl.tensor, v_cache_ptr: tl.tensor, k_scales_ptr: tl.tensor, v_scales_ptr: tl.tensor,
    q_out_ptr: tl.tensor, k_out_ptr: tl.tensor,
    length: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor, half: tl.tensor, num_slots: tl.tensor,
    q_batch: tl.tensor, q_token: tl.tensor, k_batch: tl.tensor, k_token: tl.tensor,
    v_batch: tl.tensor, v_token: tl.tensor,
    cache_batch: tl.tensor, cache_head: tl.tensor, cache_slot: tl.tensor,
    scales_batch: tl.tensor, scales_head: tl.tensor,
    QUANTIZED: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Turn a head of q, turn and store a head of k, or store a head of v: heads + 2 kv_heads programs for a token.

    Program (token, head). A slot outside 0 … num_slots - 1 is not written.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token // length
    column = token % length
    i = tl.arange(0, BLOCK)
    mask = i < half
    if head < heads + kv_heads:
        cos = tl.load(cos_ptr + token * half + i, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + token * half + i, mask=mask, other=0.0)
        # One code for q and k: only the pointers differ.
        if head < heads:
            x_ptr = q_ptr + row * q_batch + column * q_token + head * half * 2
            out_ptr = q_out_ptr + (token * heads + head) * half * 2
        else:
            x_ptr = k_ptr + row * k_batch + column * k_token + (head - heads) * half * 2
            out_ptr = k_out_ptr + (token * kv_heads + head - heads) * half * 2
        x = tl.load(x_ptr + i, mask=mask, other=0.0)
        first, second = x.to(tl.float32), tl.load(x_ptr + half + i, mask=mask, other=0.0).to(tl.float32)
        turned_first = (first * cos - second * sin).to(x.dtype)
        turned_second = (second * cos + first * sin).to(x.dtype)
        tl.store(out_ptr + i, turned_first, mask=mask)
        tl.store(out_ptr + half + i, turned_second, mask=mask)
        if head >= heads:
            slot = tl.load(slots_ptr + token).to(tl.int64)
            if (slot >= 0) & (slot < num_slots):
                at = row * cache_batch + (head - heads) * cache_head.to(tl.int64) + slot * cache_slot
                scales_at = row * scales_batch + (head - heads) * scales_head.to(tl.int64) + slot
                _write(turned_first, turned_second, k_cache_ptr, k_scales_ptr, half, i, at, scales_at, QUANTIZED)
    else:
        v_head = head - heads - kv_heads
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if (slot >= 0) & (slot < num_slots):
            x_ptr = v_ptr + row * v_batch + column * v_token + v_head * half * 2
            first = tl.load(x_ptr + i, mask=mask, other=0.0)
            second = tl.load(x_ptr + half + i, mask=mask, other=0.0)
            at = row * cache_batch + v_head * cache_head.to(tl.int64) + slot * cache_slot
            scales_at = row * scales_batch + v_head * scales_head.to(tl.int64) + slot
            _write(first, second, v_cache_ptr, v_scales_ptr, half, i, at, scales_at, QUANTIZED)


def rotary_and_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    q_out: torch.Tensor, k_out: torch.Tensor,
) -> None:  # fmt: skip
    """Launch the kernel; the arguments are those of `kernels.rotary_and_cache`, the two outputs contiguous."""
    B, T, heads, head_dim = q.shape
    kv_heads, num_slots = k_cache.shape[1], k_cache.shape[2]
    strides = k_scales.stride() if k_scales is not None else (0, 0, 0)
    rotary_and_cache_kernel[(B * T, heads + 2 * kv_heads)](
        q, k, v, cos, sin, slots,
        k_cache, v_cache, k_cache if k_scales is None else k_scales, v_cache if v_scales is None else v_scales,
        q_out, k_out, T, heads, kv_heads, head_dim // 2, num_slots,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), strides[0], strides[1],
        # One warp: half a head of 128 is 2 numbers a thread.
        QUANTIZED=k_scales is not None, BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1, **OPTIONS,
    )  # fmt: skip
