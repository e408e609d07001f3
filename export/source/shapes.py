"""What the configurations promise: the name and the shape of every tensor of the decoder and its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from export.source.lora import LINEARS

if TYPE_CHECKING:
    from collections.abc import Collection

    from export.source.lora import AdapterConfig
    from lite.config import DecoderConfig

ADAPTER_PREFIX: Final = "base_model.model."


def layer_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of one decoder layer."""
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    query, kv = (heads * decoder.head_dim for heads in (decoder.num_attention_heads, decoder.num_key_value_heads))
    attention = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    shapes: dict[str, tuple[int, ...]] = {
        f"{linear}.weight": shape for linear, shape in zip(LINEARS, attention + mlp, strict=True)
    }
    return shapes | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def base_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the base model, in the order of the network."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (decoder.vocab_size, decoder.hidden_size)}
    for layer in range(decoder.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(decoder).items()}
    shapes["model.norm.weight"] = (decoder.hidden_size,)
    shapes["lm_head.weight"] = (decoder.vocab_size, decoder.hidden_size)
    return shapes


def linear_shapes(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return (out, in) of every linear of the layers: `model.layers.0.self_attn.q_proj`."""
    in_layer = layer_shapes(decoder)
    return {
        f"model.layers.{layer}.{linear}": (in_layer[f"{linear}.weight"][0], in_layer[f"{linear}.weight"][1])
        for layer in range(decoder.num_hidden_layers)
        for linear in LINEARS
    }


def adapter_shapes(
    decoder: DecoderConfig, adapter: AdapterConfig, has: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every LoRA factor: of the linears that it targets, or that it `has` tensors for."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (rows, columns) in linear_shapes(decoder).items():
        targets = adapter.linears
        if module in has if targets is None else module.split(".", 3)[3] in targets:
            rank = adapter.rank(module)
            shapes[f"{ADAPTER_PREFIX}{module}.lora_A.weight"] = (rank, columns)
            shapes[f"{ADAPTER_PREFIX}{module}.lora_B.weight"] = (rows, rank)
    return shapes
