"""Turn queries and keys by their positions, and put keys and values into a static cache: one launch for a layer.

    q, k, v ──rotary(q), rotary(k)──▶ q, k, returned          also for attention within a prompt
                    │
                    └─ k, v at their slots ──▶ k_cache, v_cache [B, kv_heads, S, head_dim]

A cache of int8 keeps each vector (a token's key or value of one head) with a scale of its own, the largest magnitude /
127: 1 byte a number, and 2 or 4 a vector. No calibration, and an outlier costs its own vector only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import reference
from kernels.backend import Backend, device_guard, require_backend
from kernels.checks import check_cache, check_float, check_tensor, check_whole

if TYPE_CHECKING:
    from torch import Tensor


def rotary_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn q and k (Llama's convention, see `reference.rotary`); write k and v into the cache.

    Of a fused product qkv [B, T, (heads + 2 kv_heads) * head_dim], q, k and v are views, and are not copied:

        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=-2)

    Args:
        q: [B, T, heads, head_dim], float16, bfloat16 or float32; each token's heads without gaps; head_dim even.
        k: [B, T, kv_heads, head_dim], likewise.
        v: like k.
        cos: float32 [B, T, head_dim / 2], contiguous, from `reference.rotary_table`.
        sin: like cos.
        slots: int32 or int64 [B, T], contiguous: where in its row each token goes. Those outside 0 … S - 1 (-1, say)
            are not written. Two tokens of a row must not have one slot.
        k_cache: [B, kv_heads, S, head_dim], see `check_cache`. It and the next three are written to.
        v_cache: like k_cache.
        k_scales: [B, kv_heads, S], of a cache of int8.
        v_scales: like k_scales.

    Returns:
        The turned q and k, in their dtype. The cache holds the latter.
    """
    _check(q, k, v, cos, sin, slots, k_cache)
    check_cache(k_cache, v_cache, k_scales, v_scales, dtype=q.dtype)
    if require_backend(q.device, backend) == "reference":
        return reference.rotary_and_cache(
            q, k, v, cos, sin, slots, k_cache, v_cache, k_scales=k_scales, v_scales=v_scales
        )
    q_turned, k_turned = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.numel():
        from kernels.gpu import rotary_and_cache as kernels

        with device_guard(q.device):
            kernels.rotary_and_cache(q, k, v, cos, sin, slots, k_cache, v_cache, k_scales, v_scales, q_turned, k_turned)
    return q_turned, k_turned


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor) -> None:
    check_float("q", q)
    if q.dim() != 4 or q.shape[3] % 2 or k_cache.dim() != 4:
        got = f"q {list(q.shape)} and k_cache {list(k_cache.shape)}"
        raise ValueError(f"got {got} · expected [B, T, heads, head_dim], head_dim even, and [B, kv_heads, S, head_dim]")
    B, T, _, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    if k_cache.shape[0] != B or k_cache.shape[3] != head_dim or k_cache.device != q.device:
        got = f"k_cache {list(k_cache.shape)} on {k_cache.device}"
        raise ValueError(f"got {got} · expected [{B}, kv_heads, S, {head_dim}] on {q.device}, as q has it")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, (B, T, kv_heads, head_dim), q.dtype, q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1 or (tensor.stride(2) != head_dim and tensor.shape[2] > 1):
            got = f"{name} with strides {list(tensor.stride())}"
            raise ValueError(f"got {got} · expected the last two to be {head_dim} and 1")
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_whole(name, tensor, (B, T, head_dim // 2), torch.float32, q.device)
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"got slots {slots.dtype} · expected torch.int32 or torch.int64")
    check_whole("slots", slots, (B, T), slots.dtype, q.device)
