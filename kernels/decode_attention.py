"""Attention of a few new tokens per row over a static cache, split over the slots (flash-decoding).

    q [B, T, heads, head_dim] · k_cache, v_cache [B, kv_heads, S, head_dim] · lengths [B, T]  ──▶  out, like q

    row 0   ├─ tile ─┼─ tile ─┼─ ti│           lengths[0]: what lies beyond is not read, whatever it holds
    row 1   ├─ tile ─│        ·                 one program for each tile and head; a second kernel combines them
            0       64      128        S

A tile is read once for all tokens of its row: one that is decoded, and drafted ones behind it. Each gets to the last
bit what it would by itself. How much is launched depends on the cache and T alone and the lengths stay on the GPU, so
one CUDA graph serves every token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from kernels import reference
from kernels.backend import Backend, device_guard, require_backend
from kernels.checks import check_cache, check_float

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_S: Final = 64
"""Slots of a tile. With head_dim 128 in 16 bits, 16 KiB of keys and as much of values: 64 numbers of each for each of
128 threads. A study of 1,470 tokens then gives 23 tiles x 32 heads = 736 programs, some for every multiprocessor; the
partial sums are 1.6 % of what is read."""
MAX_HEAD_DIM: Final = 256
"""Beyond it a tile would no longer fit the registers."""


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Let a query or a few of each row attend over the cache.

    Query head h reads key/value head h // (heads / kv_heads). Scores, weights and sums are float32.

    Args:
        q: [B, T, heads, head_dim], float16, bfloat16 or float32; its last axis without gaps. Without T: of one token.
        k_cache: [B, kv_heads, S, head_dim], see `check_cache`.
        v_cache: like k_cache.
        lengths: int32 or int64 [B, T], how many slots each token sees: its own position plus 1, as it has been written
            already. One of length 0 gets zeros. Without T like q.
        k_scales: [B, kv_heads, S], of a cache of int8: key = k_cache * k_scales.
        v_scales: like k_scales.

    Returns:
        The same shape and dtype as q.
    """
    if q.dim() == 3 and lengths.dim() == 1:
        one = decode_attention(
            q[:, None], k_cache, v_cache, lengths[:, None], k_scales=k_scales, v_scales=v_scales, backend=backend
        )
        return one[:, 0]
    _check(q, k_cache, v_cache, lengths)
    check_cache(k_cache, v_cache, k_scales, v_scales, dtype=q.dtype)
    if require_backend(q.device, backend) == "reference":
        return reference.decode_attention(q, k_cache, v_cache, lengths, k_scales=k_scales, v_scales=v_scales)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        from kernels.gpu import decode_attention as kernels

        (B, T, heads, head_dim), tiles = q.shape, -(-k_cache.shape[2] // BLOCK_S)
        places = B * T * heads
        sums, stats = (torch.empty(places, tiles, n, dtype=torch.float32, device=q.device) for n in (head_dim, 2))
        with device_guard(q.device):
            kernels.decode_attention(
                q, k_cache, v_cache, lengths, k_scales, v_scales, sums, stats, out, block_s=BLOCK_S
            )
    return out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    check_float("q", q)
    if q.dim() != 4 or k_cache.dim() != 4:
        got = f"q {list(q.shape)} and k_cache {list(k_cache.shape)}"
        raise ValueError(f"got {got} · expected [B, T, heads, head_dim] and [B, kv_heads, S, head_dim]")
    (B, T, heads, head_dim), (rows, kv_heads, _, width) = q.shape, k_cache.shape
    if (rows, width) != (B, head_dim) or kv_heads == 0 or heads % kv_heads:
        got = f"q {list(q.shape)} for k_cache {list(k_cache.shape)}"
        raise ValueError(f"got {got} · expected one B, one head_dim, and heads a multiple of kv_heads")
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"got head_dim {head_dim} · expected at most {MAX_HEAD_DIM} · use the reference's attention")
    if lengths.shape != (B, T) or lengths.dtype not in (torch.int32, torch.int64) or not lengths.is_contiguous():
        got = f"lengths {list(lengths.shape)} {lengths.dtype}"
        raise ValueError(f"got {got} · expected contiguous torch.int32 or torch.int64 [{B}, {T}]")
    if q.stride(3) != 1:
        raise ValueError(f"got q with strides {list(q.stride())} · expected the last to be 1")
    devices = {tensor.device for tensor in (q, k_cache, v_cache, lengths)}
    if len(devices) > 1:
        raise ValueError(f"got tensors on {' and '.join(sorted(map(str, devices)))} · expected one device")
