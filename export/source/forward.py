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
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from export.source.checkpoint import SourceLayer
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
    # The patch embedding is a linear map of each patch. Not conv2d: cuDNN computes that in TF32 unless told otherwise,
    # and a yardstick of 10 mantissa bits would be worse than what it measures.
    patches = functional.unfold(pixel_values, tower.patch_size, stride=tower.patch_size).transpose(1, 2)
    x = functional.linear(patches, weights["patch_embed.proj.weight"].flatten(1), weights["patch_embed.proj.bias"])
    x = torch.cat([weights["cls_token"].expand(x.shape[0], -1, -1), x], dim=1) + weights["pos_embed"]
    for block in range(tower.num_blocks):
        prefix = f"blocks.{block}."
        here = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = _vit_block(here, x, num_heads=tower.num_heads)
    x = functional.gelu(functional.linear(x[:, 1:], weights["projector.0.weight"], weights["projector.0.bias"]))
    return functional.linear(x, weights["projector.2.weight"], weights["projector.2.bias"])


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


def decoder_layer(config: DecoderConfig, norms: Mapping[str, Tensor], linear: Linear, hidden: Tensor) -> Tensor:
    """Run one Llama layer over a whole sequence.

    Args:
        config: The decoder's shape.
        norms: `input_layernorm.weight` and `post_attention_layernorm.weight`.
        linear: Applies a named linear; what observes or replaces weights is a function of this form.
        hidden: float32 [T, C]: one sequence, positions 0 to T-1. So is what is returned.
    """
    x = rms_norm(hidden, norms["input_layernorm.weight"], config.rms_norm_eps)
    hidden = hidden + linear("self_attn.o_proj", attended(config, linear, x))
    x = rms_norm(hidden, norms["post_attention_layernorm.weight"], config.rms_norm_eps)
    return hidden + linear("mlp.down_proj", gated(linear, x))


def heads(config: DecoderConfig, linear: Linear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of the normed sequence x [T, C], rotated: each [heads, T, head_dim]."""
    tokens = x.shape[0]
    q, k, v = (
        linear(f"self_attn.{name}_proj", x).view(tokens, -1, config.head_dim).transpose(0, 1)
        for name in ("q", "k", "v")
    )
    cos, sin = _rope_tables(tokens, config.head_dim, config.rope_theta, x.device)
    return _rope(q, cos, sin), _rope(k, cos, sin), v


def attended(config: DecoderConfig, linear: Linear, x: Tensor) -> Tensor:
    """Return what o_proj is applied to: the heads' attention over the normed sequence x [T, C]."""
    q, k, v = heads(config, linear, x)
    queries_per_kv = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(queries_per_kv, dim=0), v.repeat_interleave(queries_per_kv, dim=0)
    out = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    return out.transpose(0, 1).reshape(len(x), -1)


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


def _rope_tables(tokens: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
