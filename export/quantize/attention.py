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

from typing import TYPE_CHECKING

import torch

from export.source import forward

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from export.quantize.gptq import Hessian
    from lite.config import DecoderConfig

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
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
    together = x.new_zeros(tokens, tokens)  # Σ Aᵀ Λ A
    of_query, of_key = x.new_zeros(tokens), x.new_zeros(tokens)
    for head, query in enumerate(q):
        key, value = k[head // sharing], v[head // sharing]
        A = (query @ key.T / config.head_dim**0.5).masked_fill_(future, -torch.inf).softmax(-1)
        out = A @ value
        from_out = out.square().sum(1, keepdim=True) + value.square().sum(1) - 2 * out @ value.T
        weighted = A * weights.sqrt().unsqueeze(1)
        together.addmm_(weighted.T, weighted)
        score = weighted.square_().mul_(from_out.clamp_min_(0))
        of_key += query.square().sum(1) @ score
        of_query += score @ key.square().sum(1)
    hessians[QUERY].add(x, of_query)
    hessians[KEY].add(x, of_key)
    hessians[VALUE].add_joint(x, together)
