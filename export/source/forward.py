"""The source model computed plainly in torch: the yardstick of parity, written to be obviously right.

Nothing here is merged, folded, fused or rounded: LoRA is applied beside the base weight at run time, LayerScale is a
multiplication, everything is float32. The exported forms take every one of those short cuts, so a mistake in one of
them shows as a difference. The decoder is computed one layer at a time over all sequences, so that 7B parameters need
the memory of one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from export.source.lora import LoraPair

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from export.source.checkpoint import SourceLayer
    from export.source.retrieval import BertShape
    from export.source.tower import TowerConfig
    from lite.config import DecoderConfig

    Linear = Callable[[str, Tensor], Tensor]
    """Apply the linear of a name ("self_attn.q_proj") to [..., in]."""

LAYER_NORM_EPS = 1e-6


def image_features(tensors: Mapping[str, Tensor], tower: TowerConfig, pixel_values: Tensor) -> Tensor:
    """Run the tower up to the selected block, drop the CLS token, project.

    Args:
        tensors: As `Checkpoint.read_tower` returns them.
        tower: The tower's shape.
        pixel_values: float32 [B, 3, S, S].

    Returns:
        float32 [B, P, C].
    """
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    x = _hidden_states(weights, tower, pixel_values, tower.num_blocks)
    x = functional.gelu(functional.linear(x[:, 1:], weights["projector.0.weight"], weights["projector.0.bias"]))
    return functional.linear(x, weights["projector.2.weight"], weights["projector.2.bias"])


def _hidden_states(weights: Mapping[str, Tensor], tower: TowerConfig, pixel_values: Tensor, num_blocks: int) -> Tensor:
    # The patch embedding is a linear map of each patch. Not conv2d: cuDNN computes that in TF32 unless told otherwise,
    # and a yardstick of 10 mantissa bits would be worse than what it measures.
    patches = functional.unfold(pixel_values, tower.patch_size, stride=tower.patch_size).transpose(1, 2)
    x = functional.linear(patches, weights["patch_embed.proj.weight"].flatten(1), weights["patch_embed.proj.bias"])
    x = torch.cat([weights["cls_token"].expand(x.shape[0], -1, -1), x], dim=1) + weights["pos_embed"]
    for block in range(num_blocks):
        prefix = f"blocks.{block}."
        here = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = _vit_block(here, x, num_heads=tower.num_heads)
    return x


def film_embeddings(tensors: Mapping[str, Tensor], tower: TowerConfig, pixel_values: Tensor) -> Tensor:
    """Run the whole tower, norm and head; return the CLS token's, of length 1.

    Args:
        tensors: As `Checkpoint.read_tower` and `RetrievalSource.read_film` return them.
        tower: The tower's shape.
        pixel_values: float32 [B, 3, S, S].

    Returns:
        float32 [B, dim].
    """
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    x = _hidden_states(weights, tower, pixel_values, tower.depth)
    x = functional.layer_norm(x, (tower.dim,), weights["norm.weight"], weights["norm.bias"], LAYER_NORM_EPS)
    return functional.normalize(functional.linear(x[:, 0], weights["head.proj.weight"]), dim=-1)


def text_embedding(tensors: Mapping[str, Tensor], bert: BertShape, input_ids: Tensor) -> Tensor:
    """Run the text tower on one text.

    Args:
        tensors: As `RetrievalSource.read_text` returns them.
        bert: The tower's shape.
        input_ids: int64 [T], without padding.

    Returns:
        float32 [dim], of length 1.
    """
    weights = {name: tensor.float() for name, tensor in tensors.items()}

    def linear(name: str, y: Tensor) -> Tensor:
        return functional.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(name: str, y: Tensor) -> Tensor:
        affine = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(y, (bert.hidden_size,), *affine, bert.layer_norm_eps)

    tables = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = tables["word"][input_ids] + tables["position"][: len(input_ids)] + tables["token_type"][0]
    x = layer_norm("embeddings.LayerNorm", x)
    for layer in range(bert.num_hidden_layers):
        prefix = f"encoder.layer.{layer}"
        parts = (linear(f"{prefix}.attention.self.{name}", x) for name in ("query", "key", "value"))
        q, k, v = (part.view(len(x), bert.num_attention_heads, -1).transpose(0, 1) for part in parts)
        attended = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
        x = layer_norm(f"{prefix}.attention.output.LayerNorm", x + linear(f"{prefix}.attention.output.dense", attended))
        inner = functional.gelu(linear(f"{prefix}.intermediate.dense", x))
        x = layer_norm(f"{prefix}.output.LayerNorm", x + linear(f"{prefix}.output.dense", inner))
    hidden = functional.gelu(functional.linear(x[0], weights["proj.0.weight"]))
    return functional.normalize(functional.linear(hidden, weights["proj.2.weight"]), dim=-1)


def _vit_block(weights: Mapping[str, Tensor], x: Tensor, *, num_heads: int) -> Tensor:
    batch, tokens, dim = x.shape

    def linear(name: str, y: Tensor) -> Tensor:
        return functional.linear(y, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def layer_norm(name: str, y: Tensor) -> Tensor:
        return functional.layer_norm(y, (dim,), weights[f"{name}.weight"], weights[f"{name}.bias"], LAYER_NORM_EPS)

    qkv = linear("attn.qkv", layer_norm("norm1", x)).view(batch, tokens, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim)
    x = x + weights["ls1.gamma"] * linear("attn.proj", attended)
    return x + weights["ls2.gamma"] * linear("mlp.fc2", functional.gelu(linear("mlp.fc1", layer_norm("norm2", x))))


def decoder_layer(
    config: DecoderConfig,
    norms: Mapping[str, Tensor],
    linear: Linear,
    hidden: Tensor,
    sequences: Sequence[Tensor] | None = None,
) -> Tensor:
    """Run one Llama layer over a whole sequence, or over several that begin alike.

    Args:
        config: The decoder's shape.
        norms: `input_layernorm.weight` and `post_attention_layernorm.weight`.
        linear: Applies a named linear; what observes or replaces weights is a function of this form.
        hidden: float32 [T, C]: one sequence, positions 0 to T-1. So is what is returned.
        sequences: Of each sequence the rows of `hidden` that are its positions 0, 1, …, where there are several.
    """
    x = rms_norm(hidden, norms["input_layernorm.weight"], config.rms_norm_eps)
    hidden = hidden + linear("self_attn.o_proj", attended(config, linear, x, sequences))
    x = rms_norm(hidden, norms["post_attention_layernorm.weight"], config.rms_norm_eps)
    return hidden + linear("mlp.down_proj", gated(linear, x))


def heads(
    config: DecoderConfig, linear: Linear, x: Tensor, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of the normed x [T, C], rotated: each [heads, T, head_dim].

    Positions, int64 [T], are 0 to T-1 unless they are given.
    """
    tokens = x.shape[0]
    q, k, v = (
        linear(f"self_attn.{name}_proj", x).view(tokens, -1, config.head_dim).transpose(0, 1)
        for name in ("q", "k", "v")
    )
    positions = torch.arange(tokens) if positions is None else positions
    cos, sin = _rope_tables(positions, config.head_dim, config.rope_theta, x.device)
    return _rope(q, cos, sin), _rope(k, cos, sin), v


def attended(config: DecoderConfig, linear: Linear, x: Tensor, sequences: Sequence[Tensor] | None = None) -> Tensor:
    """Return what o_proj is applied to: the heads' attention over the normed sequence x [T, C], or over several."""
    q, k, v = heads(config, linear, x, None if sequences is None else _positions(len(x), sequences))
    queries_per_kv = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(queries_per_kv, dim=0), v.repeat_interleave(queries_per_kv, dim=0)
    if sequences is None:
        out = _causal_attention(q, k, v)
    else:
        out = torch.empty_like(q)
        for rows in sequences:
            # Rows that sequences share come out alike from each.
            out[:, rows] = _causal_attention(q[:, rows], k[:, rows], v[:, rows])
    return out.transpose(0, 1).reshape(len(x), -1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def _positions(tokens: int, sequences: Sequence[Tensor]) -> Tensor:
    positions = torch.empty(tokens, dtype=torch.long)
    for rows in sequences:
        positions[rows.cpu()] = torch.arange(len(rows))
    return positions


def gated(linear: Linear, x: Tensor) -> Tensor:
    """Return what down_proj is applied to, for the normed sequence x [T, C]."""
    return functional.silu(linear("mlp.gate_proj", x)) * linear("mlp.up_proj", x)


def source_linear(layer: SourceLayer, device: str | torch.device = "cpu") -> Linear:
    """Return the linears of a source layer: base weight and LoRA beside each other, in float32."""
    weights = {name: w.to(device, torch.float32) for name, w in layer.weights.items() if name.endswith("_proj.weight")}
    pairs = {
        name: LoraPair(a=pair.a.to(device, torch.float32), b=pair.b.to(device, torch.float32), scale=pair.scale)
        for name, pair in layer.lora.items()
    }

    def linear(name: str, x: Tensor) -> Tensor:
        y = functional.linear(x, weights[f"{name}.weight"])
        return y + pairs[name].apply(x) if name in pairs else y

    return linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last axis, multiply by the weight, in float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.device, torch.float32)


def _rope_tables(positions: Tensor, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = positions.double()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
