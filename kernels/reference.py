"""The specification: each op in plain PyTorch, computed in float32, written to be obviously right.

Every kernel is tested against the function of the same name here, and each runs where no kernel does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.quant_matmul import QuantWeight

ROWS_VALUES: Final = 2**19
"""Values of a stored weight that are expanded at a time: 2 MB of float32 stay in the cache between being written and
being read by the product, and the memory does not grow with the weight."""
GPU_ROWS_VALUES: Final = 2**24
"""The same on a GPU, where each step is a few launches, whatever its size: 64 MB of float32."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to a root mean square of one, then by `weight`.

    Args:
        x: [..., hidden_size], any float dtype.
        weight: [hidden_size].
        eps: added to the mean square.

    Returns:
        [..., hidden_size] in the dtype of x.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def rotary_table(position_ids: Tensor, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles, position * theta^(-2i / head_dim).

    Args:
        position_ids: [...], integers.
        head_dim: even.
        rope_theta: the base of the frequencies.

    Returns:
        cos and sin, each float32 [..., head_dim / 2].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float().unsqueeze(-1) * rope_theta**-exponents
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's vector by its position, in the Llama convention: component i pairs with i + head_dim / 2.

    Args:
        x: [B, T, heads, head_dim].
        cos: [B, T, head_dim / 2], from `rotary_table`.
        sin: like cos.

    Returns:
        [B, T, heads, head_dim] in the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, position_ids: Tensor) -> Tensor:
    """Attend over a static cache in which the rows have different lengths.

    A query at position p sees the slots 0 … p of its own row and nothing else, so what lies in later slots (padding,
    an earlier request) cannot matter. Query head h reads key/value head h // (heads / kv_heads).

    Args:
        q: [B, heads, T, head_dim].
        k_cache: [B, kv_heads, S, head_dim], the keys of slots 0 … S - 1.
        v_cache: like k_cache.
        position_ids: [B, T], the slot each query itself lies in.

    Returns:
        [B, heads, T, head_dim] in the dtype of q.
    """
    groups = q.shape[1] // k_cache.shape[1]
    k, v = (cache.float().repeat_interleave(groups, dim=1) for cache in (k_cache, v_cache))
    scores = q.float() @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, heads, T, S]
    slots = torch.arange(k_cache.shape[2], device=q.device)
    hidden = slots > position_ids[:, None, :, None]  # [B, 1, T, S]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    # A zero weight times a NaN is a NaN: unseen slots may hold anything, so they are cleared and not only weighted.
    unseen = hidden.all(2)[:, 0, :, None].unsqueeze(1)  # [B, 1, S, 1]
    out: Tensor = weights @ v.masked_fill(unseen, 0.0)
    return out.to(q.dtype)


def matmul_by_rows(x: Tensor, shape: tuple[int, int], rows: Callable[[int, int], Tensor]) -> Tensor:
    """Multiply x by the transpose of a weight that is expanded a few rows at a time.

    Args:
        x: [..., in].
        shape: (out, in) of the weight.
        rows: rows(begin, end) makes rows begin … end - 1 of it, in the dtype of x.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: x has another last dimension.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"got inputs of {x.shape[-1]} features · expected {shape[1]}, the weight's")
    flat = x.reshape(-1, shape[1])
    step = max(1, (ROWS_VALUES if x.device.type == "cpu" else GPU_ROWS_VALUES) // shape[1])
    product = flat.new_empty(flat.shape[0], shape[0])
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        product[:, begin:end] = flat @ rows(begin, end).t()
    return product.view(*x.shape[:-1], shape[0])


def quant_matmul(x: Tensor, weight: QuantWeight) -> Tensor:
    """Multiply x by the transpose of a quantised weight, whose values are exact in float32.

    Args:
        x: [..., in], floating, on the weight's device.
        weight: (out, in).

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: x has another last dimension.
    """
    product = matmul_by_rows(x.float(), weight.shape, lambda begin, end: weight.rows(begin, end, torch.float32))
    return product.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual, rounded to their dtype, and `rms_norm` of that.

    Args:
        x: [..., hidden_size], any float dtype.
        residual: like x.
        weight: [hidden_size].
        eps: added to the mean square.

    Returns:
        The sum and the normed sum, each in the shape and dtype of x.
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up.

    Args:
        gate_up: [..., 2 * inner], the gate and behind it up, any float dtype.

    Returns:
        [..., inner] in the dtype of gate_up.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def quantize_vectors(x: Tensor, scales_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each vector to int8 by its largest magnitude; a vector of zeros has a scale of 0.

    Args:
        x: [..., head_dim], any float dtype.
        scales_dtype: float16 or float32.

    Returns:
        int8 [..., head_dim] in -127 … 127, and the scales [...]; x is about values * scales.
    """
    scales = (x.float().abs().amax(-1) / 127).to(scales_dtype)
    # What is stored divides, not what was computed: rounded to float16 the two differ.
    stored = scales.float().unsqueeze(-1)
    steps = (x.float() / stored.masked_fill(stored == 0, 1.0)).clamp(-127, 127).round()
    return steps.masked_fill(stored == 0, 0.0).to(torch.int8), scales


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
) -> tuple[Tensor, Tensor]:
    """Turn q and k by `rotary`; write k and v into the cache, by `quantize_vectors` if that is int8.

    Args:
        q: [B, T, heads, head_dim], any float dtype.
        k: [B, T, kv_heads, head_dim].
        v: like k.
        cos: [B, T, head_dim / 2], from `rotary_table`.
        sin: like cos.
        slots: [B, T], where in its row each token goes; outside 0 … S - 1 it is not written.
        k_cache: [B, kv_heads, S, head_dim], in the dtype of k or int8. Written to.
        v_cache: like k_cache. Written to.
        k_scales: [B, kv_heads, S] for a cache of int8, float16 or float32. Written to.
        v_scales: like k_scales. Written to.

    Returns:
        The turned q and k.
    """
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    rows, tokens = ((slots >= 0) & (slots < k_cache.shape[2])).nonzero(as_tuple=True)
    places = slots[rows, tokens].long()
    for x, cache, scales in ((k, k_cache, k_scales), (v, v_cache, v_scales)):
        vectors = x[rows, tokens]  # [written, kv_heads, head_dim]
        if scales is None:
            cache[rows, :, places] = vectors
        else:
            cache[rows, :, places], scales[rows, :, places] = quantize_vectors(vectors, scales.dtype)
    return q, k


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    max_seq_len: int | None = None,
) -> Tensor:
    """Let one query per row attend over the first `lengths` slots of its row, by `attention`.

    Args:
        q: [B, heads, head_dim], any float dtype.
        k_cache: [B, kv_heads, S, head_dim], any float dtype, or int8.
        v_cache: like k_cache.
        lengths: [B], integers; a row of length 0 gets zeros.
        k_scales: [B, kv_heads, S] for a cache of int8: key = k_cache * k_scales.
        v_scales: like k_scales.
        max_seq_len: slots from here on are not seen.

    Returns:
        [B, heads, head_dim] in the dtype of q.
    """
    k, v = k_cache.float(), v_cache.float()
    if k_scales is not None and v_scales is not None:
        k, v = k * k_scales.float().unsqueeze(-1), v * v_scales.float().unsqueeze(-1)
    lengths = lengths.long().clamp(max=k.shape[2] if max_seq_len is None else max_seq_len)
    attended = attention(q.float().unsqueeze(2), k, v, lengths[:, None] - 1).squeeze(2)
    return attended.masked_fill((lengths <= 0)[:, None, None], 0.0).to(q.dtype)
