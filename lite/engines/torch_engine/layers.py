"""The modules of a Llama decoder, under the names of a Hugging Face one, and the operations that they are made of.

    x ─┬─────────────────────────▶ + ─┬──────────────────▶ + ──▶ …
       └─norm─ q k v ─rope─ attention ┘└─norm─ down(silu(gate)·up) ┘

q, k and v are one linear and gate and up another (see `torch_engine.linear`). Each operation is one of `kernels/`,
which chooses its backend by the device: Triton's kernels on an NVIDIA GPU, plain PyTorch elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.decode_attention import decode_attention
from kernels.rotary_and_cache import rotary_and_cache
from kernels.silu_mul import silu_mul
from lite.engines.torch_engine.linear import Linear
from lite.engines.torch_engine.lora import RowAdapters

if TYPE_CHECKING:
    from lite.config import DecoderConfig
    from lite.engines.torch_engine.cache import KVCache, LayerCache


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Where the tokens of one forward lie, computed once for all layers."""

    rows: slice  # of the cache
    slots: Tensor  # int64 [B, T]
    angles: tuple[Tensor, Tensor]  # cosines and sines, float32 [B, T, head_dim / 2]
    lengths: Tensor | None  # int64 [B, T], what each token sees; None: attend by torch, over kv_len slots
    kv_len: int  # slots that any of the tokens sees
    mask: Tensor | None  # bool [B, 1, T, kv_len]; None: a prompt's first chunk, or all of kv_len is seen
    reads_cache: bool  # the tokens see each other as the cache keeps them, as when each had been decoded by itself
    adapters: RowAdapters  # of each of the B * T tokens


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, kv = self.heads * config.head_dim, self.kv_heads * config.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = Linear(config.hidden_size, parts, config.quantization)
        self.o_proj = Linear(q, {"o_proj": config.hidden_size}, config.quantization)

    def forward(self, x: Tensor, tokens: Tokens, cache: KVCache) -> Tensor:
        """Put the keys and values of x [B, T, hidden_size] into the cache, and let x attend over it."""
        qkv = self.qkv_proj(x, tokens.adapters).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        here = cache.layer(self.layer, tokens.rows)
        q, k = rotary_and_cache(q, k, v, *tokens.angles, tokens.slots, **here._asdict())
        if tokens.lengths is not None:
            attended = decode_attention(q, lengths=tokens.lengths, **here._asdict())
        else:
            attended = self._attend(q, k, v, tokens, here)
        out: Tensor = self.o_proj(attended.flatten(-2), tokens.adapters)
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, here: LayerCache) -> Tensor:
        """Attend by torch: q [B, T, heads, head_dim] over the slots before kv_len."""
        # Of a prompt's own chunk nothing needs to be lost.
        keeps_own = here.k_scales is not None and not tokens.reads_cache
        keys, values = here.read(tokens.kv_len - k.shape[1] if keeps_own else tokens.kv_len, q.dtype)
        if keeps_own:
            keys = torch.cat((keys, k.transpose(1, 2)), dim=2)
            values = torch.cat((values, v.transpose(1, 2)), dim=2)
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=tokens.mask,
            is_causal=tokens.mask is None and q.shape[1] > 1,
            enable_gqa=self.heads > self.kv_heads,
        )
        return attended.transpose(1, 2)


class MLP(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = Linear(config.hidden_size, parts, config.quantization)
        self.down_proj = Linear(config.intermediate_size, {"down_proj": config.hidden_size}, config.quantization)

    def forward(self, x: Tensor, adapters: RowAdapters = None) -> Tensor:
        """Return down(silu(gate(x)) * up(x)), each token with its adapter."""
        out: Tensor = self.down_proj(silu_mul(self.gate_up_proj(x, adapters)), adapters)
        return out


class DecoderLayer(nn.Module):
    """Attention, then feed-forward; between them the decoder adds and norms in one, by the norms' weights."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaModel(nn.Module):
    """The decoder without its head; it exists because the checkpoint's keys begin with `model.`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        # `nn.Embedding(...)` draws its numbers, which on the meta device imports torch's compiler: 1 s and 140 MB.
        self.embed_tokens: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.empty(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
