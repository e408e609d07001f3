"""What the configurations promise: the name and the shape of every tensor of the decoder and its adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from export.source.lora import LINEARS

if TYPE_CHECKING:
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


def adapter_shapes(decoder: DecoderConfig, adapter: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every LoRA factor."""
    shapes: dict[str, tuple[int, ...]] = {}
    in_layer = layer_shapes(decoder)
    for layer in range(decoder.num_hidden_layers):
        for linear in adapter.linears:
            rows, columns = in_layer[f"{linear}.weight"]
            module = f"{ADAPTER_PREFIX}model.layers.{layer}.{linear}"
            shapes[f"{module}.lora_A.weight"] = (adapter.r, columns)
            shapes[f"{module}.lora_B.weight"] = (rows, adapter.r)
    return shapes
