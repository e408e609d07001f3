"""The specification: each op in plain PyTorch, computed in float32, written to be obviously right.

Every kernel is tested against the function of the same name here, and each runs where no kernel does. What an op takes
and returns is said by its launcher, the module of its name; here any float dtype and any strides will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.weights import StoredWeight

ROWS_VALUES: Final = 2**19
"""Values of a stored weight that are expanded at a time: 2 MB of float32 stay in the cache between being written and
being read by the product, and the memory does not grow with the weight."""
GPU_ROWS_VALUES: Final = 2**24
"""The same on a GPU, where each step is a few launches, whatever its size: 64 MB of float32."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of x [..., hidden_size] to a root mean square of one, then by `weight` [hidden_size].

    `eps` is added to the mean square; the result has the dtype of x.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def rotary_table(position_ids: Tensor, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles, position * theta^(-2i / head_dim).

    Each is float32 [..., head_dim / 2], for position_ids [...].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float().unsqueeze(-1) * rope_theta**-exponents
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's vector by its position, in the Llama convention: component i pairs with i + head_dim / 2.

    x is [B, T, heads, head_dim], and so is the result; cos and sin are [B, T, head_dim / 2], from `rotary_table`.
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
        x: [..., in], floating, on the weight's device.
        shape: (out, in) of the weight.
        rows: rows(begin, end) makes rows begin … end - 1 of it, in the dtype of x.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: x has another last dimension.
    """
    if x.shape[-1] != shape[1]:
        got = f"x {list(x.shape)} for a weight {list(shape)}"
        raise ValueError(f"got {got} · expected a last dimension of {shape[1]} · pass the input of this linear")
    flat = x.reshape(-1, shape[1])
    step = max(1, (ROWS_VALUES if x.device.type == "cpu" else GPU_ROWS_VALUES) // shape[1])
    product = flat.new_empty(flat.shape[0], shape[0])
    for begin in range(0, shape[0], step):
        end = min(begin + step, shape[0])
        product[:, begin:end] = flat @ rows(begin, end).t()
    return product.view(*x.shape[:-1], shape[0])


def quant_matmul(x: Tensor, weight: StoredWeight) -> Tensor:
    """Multiply x by the transpose of a quantised weight, whose values are exact in float32."""
    product = matmul_by_rows(x.float(), weight.shape, lambda begin, end: weight.rows(begin, end, torch.float32))
    return product.to(x.dtype)


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, slots: Tensor, *, parts: tuple[int, ...]) -> Tensor:
    """Add B (A x) of its adapter to each row of y, part by part, in place; a row without an adapter is not touched.

    The rows of an adapter are computed together, so that an adapter that none has costs nothing.
    """
    slots = slots.view(y.shape[:-1])
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = slots == slot
            hidden = (x[rows].float() @ a[slot].float().t()).chunk(len(parts), dim=-1)  # [rows, rank] of each part
            outputs = [h @ part.float().t() for h, part in zip(hidden, torch.split(b[slot], list(parts)), strict=True)]
            y[rows] = (y[rows].float() + torch.cat(outputs, dim=-1)).to(y.dtype)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual, rounded to their dtype, and `rms_norm` of that."""
    total = (x.float() + residual.float()).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, of the gate and behind it up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def quantize_vectors(x: Tensor, scales_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each vector of x [..., head_dim] to int8 by its largest magnitude.

    Returns:
        int8 [..., head_dim] in -127 … 127, and the scales [...], 0 for a vector of zeros; x is about values * scales.
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

    Slots outside the cache are not written.
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
) -> Tensor:
    """Let each token [B, T] attend over the first `lengths` slots of its row, by `attention`; over none gives zeros."""
    if q.dim() == 3:
        one = decode_attention(q[:, None], k_cache, v_cache, lengths[:, None], k_scales=k_scales, v_scales=v_scales)
        return one[:, 0]
    k, v = k_cache.float(), v_cache.float()
    if k_scales is not None and v_scales is not None:
        k, v = k * k_scales.float().unsqueeze(-1), v * v_scales.float().unsqueeze(-1)
    lengths = lengths.long().clamp(max=k.shape[2])
    attended = attention(q.float().transpose(1, 2), k, v, lengths - 1).transpose(1, 2)
    return attended.masked_fill((lengths <= 0)[:, :, None, None], 0.0).to(q.dtype)


class Sampled(NamedTuple):
    """What `sample` chose for each row, and how probable that was: NaN in a row that is not finite."""

    token_ids: Tensor  # int64 [N]
    logprobs: Tensor  # float32 [N]
    top_ids: Tensor  # int64 [N, num_top]
    top_logprobs: Tensor  # float32 [N, num_top]
    is_finite: Tensor  # bool [N]


def sample(
    logits: Tensor, *, temperature: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor, num_top: int = 0
) -> Sampled:
    """Choose a token for each row: the most probable one, or one drawn from the nucleus.

    With p = softmax(logits / temperature) the nucleus is {p >= t}, for the largest t for which it has at least `top_p`
    of the probability: the fewest of the most probable tokens, and all that are as probable as the last of them. The
    draw is a race in which token i arrives after E_i / p_i, where E_i is exponentially distributed; the first one wins
    with probability p_i. (-log E_i is Gumbel's noise, and this the Gumbel-max trick.) E_i is a function of seed,
    position and i alone: a replay draws the same token.
    """
    is_finite = logits.isfinite().all(-1)
    x = logits.float().masked_fill(~is_finite[:, None], 0.0)
    token_ids = x.argmax(-1)
    # A CPU may look at values without waiting for anything, and most rows are greedy.
    if x.device.type != "cpu" or bool((temperature > 0).any()):
        drawn = _draw(
            x, temperature.masked_fill(temperature <= 0, 1.0), top_p, exponentials(seeds, positions, x.shape[1])
        )
        token_ids = torch.where((temperature > 0) & is_finite, drawn, token_ids)
    logprobs = x.log_softmax(-1).masked_fill(~is_finite[:, None], float("nan"))
    top_ids = token_ids.new_empty(len(x), num_top)
    for rank in range(num_top):
        top_ids[:, rank] = x.argmax(-1)
        x = x.scatter(-1, top_ids[:, rank, None], float("-inf"))
    chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
    return Sampled(token_ids, chosen, top_ids.mul_(is_finite[:, None]), logprobs.gather(-1, top_ids), is_finite)


def _draw(x: Tensor, temperature: Tensor, top_p: Tensor, arrivals: Tensor) -> Tensor:
    """Draw a token of each row's nucleus; `arrivals` are the E_i."""
    weights = ((x - x.amax(-1, keepdim=True)) / temperature[:, None]).exp()  # p_i as shares of the largest
    falling = weights.sort(-1, descending=True).values
    masses = falling.double().cumsum(-1)
    last = (masses >= top_p[:, None] * masses[:, -1:]).int().argmax(-1, keepdim=True)  # the first that suffices
    threshold = falling.gather(-1, last)
    return (weights.masked_fill(weights < threshold, 0.0) / arrivals).argmax(-1)


_GOLDEN: Final = 0x9E3779B9
_LOW_32: Final = 0xFFFFFFFF


def exponentials(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Return an exponentially distributed number for each token of each row, the same on every backend.

    All 64 bits of the seeds [N] count, and the lower 32 of the positions. The numbers [N, V] are from 2^-33 to 17.
    """
    first = _mix(seeds ^ _mix(positions + _GOLDEN))
    second = _mix(seeds >> 32 ^ _mix(first + _GOLDEN))
    tokens = torch.arange(vocab_size, device=seeds.device)
    bits = _mix(second[:, None] ^ _mix(first[:, None] + tokens * _GOLDEN))
    # Fine where it matters, near 0: the smallest arrive first. Below 1, which a float32 of 32 ones is rounded to.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log1p(-uniform)


def _mix(x: Tensor) -> Tensor:
    """Scramble the lower 32 bits one to one: the last step of the hash MurmurHash3.

    The arithmetic is that of unsigned 32 bits. Products wrap around in int64, and their lower half is right even so.
    """
    x = x & _LOW_32
    x = (x ^ x >> 16) * 0x85EBCA6B & _LOW_32
    x = (x ^ x >> 13) * 0xC2B2AE35 & _LOW_32
    return x ^ x >> 16
