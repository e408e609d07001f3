"""The Hessians of q, k and v: what an error of theirs costs behind the attention.

A linear's own outputs count each token alike. What q, k and v make is read through the softmax A of each head, by the
queries t behind a position s:

    o_t = Σ_s A_ts v_s

    v    Σ_t λ_t ‖Σ_s A_ts Δv_s‖²                  H = Xᵀ (Σ_heads Aᵀ Λ A) X
    k    Σ_t λ_t A_ts² ‖v_s − o_t‖² (q_t · Δk_s)²   each position s weighs Σ_t λ_t A_ts² ‖v_s − o_t‖² ‖q_t‖²
    q    Σ_s λ_t A_ts² ‖v_s − o_t‖² (Δq_t · k_s)²   each position t weighs λ_t Σ_s A_ts² ‖v_s − o_t‖² ‖k_s‖²

That of v is exact, but that all heads share it; those of k and q take a score's error to the first order, the scores'
errors for independent and the vectors' directions for unknown. What it amounts to: in trained decoders the first
position draws a third of all attention and more from the middle layers on (an attention sink, Xiao et al. 2023). As one
token of some hundreds it hardly counts in Σ x xᵀ, and its value came out half wrong; here it counts as often as it is
read, and so does any other position that many look at, in a film too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from export.source import forward

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from export.quantize.gptq import Hessian
    from lite.config import DecoderConfig

BLOCK_QUERIES: Final = 256
QUERY, KEY, VALUE = (f"self_attn.{name}_proj" for name in "qkv")


def add_sequence(
    hessians: Mapping[str, Hessian], config: DecoderConfig, linear: forward.Linear, x: Tensor, weights: Tensor
) -> None:
    """Count a sequence in the Hessians of q, k and v.

    Args:
        hessians: By the names of the three linears.
        config: The decoder's shape.
        linear: Applies the linears as the source has them.
        x: What they read, float32 [T, C].
        weights: λ of each query, [T].
    """
    q, k, v = forward.heads(config, linear, x)
    tokens, sharing = len(x), len(q) // len(k)
    together = x.new_zeros(tokens, tokens)  # Σ Aᵀ Λ A
    of_query, of_key = x.new_zeros(tokens), x.new_zeros(tokens)
    for head, queries in enumerate(q):
        keys, values = k[head // sharing], v[head // sharing]
        for start in range(0, tokens, BLOCK_QUERIES):  # which need no keys behind them
            end = min(start + BLOCK_QUERIES, tokens)
            query, key, value = queries[start:end], keys[:end], values[:end]
            future = torch.ones(end - start, end, dtype=torch.bool, device=x.device).triu(start + 1)
            A = (query @ key.T / config.head_dim**0.5).masked_fill_(future, -torch.inf).softmax(-1)
            out = A @ value
            weighted = A * weights[start:end].sqrt().unsqueeze(1)
            together[:end, :end].addmm_(weighted.T, weighted)
            weighted.square_()  # λ A², of which ‖v − o‖² = ‖v‖² + ‖o‖² − 2 v·o makes three products
            q2, k2, o2, v2 = (rows.square().sum(1) for rows in (query, key, out, value))
            q2o, k2v = q2.unsqueeze(1) * out, k2.unsqueeze(1) * value
            of_key[:end] += (q2 * o2) @ weighted + v2 * (q2 @ weighted) - 2 * ((weighted.T @ q2o) * value).sum(1)
            of_query[start:end] += weighted @ (k2 * v2) + o2 * (weighted @ k2) - 2 * ((weighted @ k2v) * out).sum(1)
    hessians[QUERY].add(x, of_query.clamp_min_(0))
    hessians[KEY].add(x, of_key.clamp_min_(0))
    hessians[VALUE].add_joint(x, together)
