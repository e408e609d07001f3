"""Our decoder of random weights, made where it computes; other libraries' linears in it; what it should compute.

No checkpoint is read, and 4-bit integers are drawn as such: each weight is a draw of its own, so that bytes and time
are those of the real model. What the model writes means nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.linears import random_gptq
from benchmarks.speed.weights import EMBEDDINGS, gain_of
from kernels.quant_weight import QuantWeight
from kernels.reference import attention, rms_norm, rotary, rotary_table, silu_mul
from lite.config import DecoderConfig
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.device import DTYPES
from lite.engines.torch_engine.linear import Linear, linears_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.cuda_graph import Capture


def random_decoder(config: DecoderConfig, device: torch.device) -> LlamaDecoder:
    """Draw a decoder where it computes.

    Args:
        config: its shape; GPTQ or 16 bits.
        device: float32 on a CPU, the config's dtype elsewhere.
    """
    dtype = torch.float32 if device.type == "cpu" else DTYPES[config.dtype]
    with torch.device("meta"):
        decoder = LlamaDecoder(config)
    state = {name: _norm_or_embeddings(plain.shape, device, dtype) for name, plain in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)
    triton = decoder.selection.backend == "triton"
    for linear in linears_of(decoder).values():
        N, K = sum(linear.parts.values()), linear.in_features
        gains = torch.cat([torch.full((size,), gain_of(part)) for part, size in linear.parts.items()]).to(device)
        if linear.quantization is None:
            linear.weights = ((torch.randn(N, K, device=device) * (gains[:, None] * K**-0.5)).to(dtype),)
            continue
        drawn = random_gptq(linear.quantization.bits, (N, K), device)
        # Integers of 0 … 15 around 8 have a mean of -0.5, which layer by layer would add up to one vector for all
        # tokens: some groups have the other sign.
        signs = torch.randint(0, 2, drawn.scales.shape, device=device) * 2 - 1
        drawn = dataclasses.replace(drawn, scales=(drawn.scales * signs * gains).to(drawn.scales.dtype))
        linear.weights = (QuantWeight.from_gptq(drawn) if triton else drawn,)
    return decoder.eval().requires_grad_(requires_grad=False)


def _norm_or_embeddings(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, device=device)
    return (1 + 0.1 * drawn if len(shape) == 1 else EMBEDDINGS * drawn).to(dtype)


def part_of(
    decoder: LlamaDecoder,
    *,
    layers: int | None = None,
    cache_dtype: CacheDtype | None = None,
    capture: Capture | None = None,
) -> LlamaDecoder:
    """Return a decoder of the same weights: of the first layers (None: all), with a cache and captures of its own."""
    count = decoder.config.num_hidden_layers if layers is None else layers
    with torch.device("meta"):
        part = LlamaDecoder(dataclasses.replace(decoder.config, num_hidden_layers=count), cache_dtype=cache_dtype)
    part.model.embed_tokens, part.model.norm = decoder.model.embed_tokens, decoder.model.norm
    part.model.layers = nn.ModuleList(list(decoder.model.layers)[:count])
    part.lm_head = decoder.lm_head
    part.capture, part.chunk_size = capture, decoder.chunk_size
    return part.eval()


def swapped(decoder: LlamaDecoder, make: Callable[[Tensor], nn.Module], dtype: torch.dtype) -> LlamaDecoder:
    """Return a decoder with other linears, made of the same weights; the head stays what it is, in the new dtype.

    Args:
        decoder: the original; its linears' inputs side by side stay so.
        make: makes a linear of a weight [out, in] float32.
        dtype: what the new one computes in.

    Raises:
        Unavailable: from `make`.
    """
    with torch.device("meta"):
        new = LlamaDecoder(decoder.config)
    linears = linears_of(decoder)
    for name in linears_of(new):
        if name == "lm_head":
            new.lm_head = Linear(linears[name].in_features, linears[name].parts)
            new.lm_head.weights = (dequantized(linears[name], dtype),)
        else:
            new.set_submodule(name, make(dequantized(linears[name])))
    state = {name: tensor.to(dtype) for name, tensor in decoder.state_dict().items() if name in new.state_dict()}
    # Not strict: the new linears may have a state of their own.
    new.load_state_dict(state, strict=False, assign=True)
    return new.eval().requires_grad_(requires_grad=False)


def weight_bytes(decoder: LlamaDecoder) -> int:
    """Add up what decoding a token reads."""
    state: dict[str, Tensor] = decoder.state_dict()
    plain = sum(tensor.nbytes for name, tensor in state.items() if "embed_tokens" not in name)
    return plain + sum(linear.nbytes for linear in linears_of(decoder).values())


def dequantized(linear: Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a linear's weight [out, in]; one that has this dtype already is not copied."""
    whole = [weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype) for weight in linear.weights]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


@torch.inference_mode()
def plain_logits(decoder: LlamaDecoder, input_ids: list[int]) -> Tensor:
    """Compute a decoder plainly: float32, no cache, one weight at a time.

    Args:
        decoder: with weights of ours.
        input_ids: of a text.

    Returns:
        logits float32 [T, vocab_size].
    """
    config, eps = decoder.config, decoder.config.rms_norm_eps
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = torch.arange(len(input_ids), device=decoder.device)[None]
    cos, sin = rotary_table(positions, head_dim, config.rope_theta)
    linears = linears_of(decoder)

    def product(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, dequantized(linears[name]))

    x = decoder.embed(input_ids).float()[None]
    for number, layer in enumerate(decoder.model.layers):
        place = f"model.layers.{number}."
        norms: Any = layer
        normed = rms_norm(x, norms.input_layernorm.weight.float(), eps)
        qkv = product(normed, f"{place}self_attn.qkv_proj")
        q, k, v = torch.split(qkv.view(1, len(x[0]), -1, head_dim), [heads, kv_heads, kv_heads], dim=-2)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), positions).transpose(1, 2)
        x = x + product(attended.flatten(-2), f"{place}self_attn.o_proj")
        normed = rms_norm(x, norms.post_attention_layernorm.weight.float(), eps)
        x = x + product(silu_mul(product(normed, f"{place}mlp.gate_up_proj")), f"{place}mlp.down_proj")
    normed = rms_norm(x, decoder.model.norm.weight.float(), eps)
    return product(normed[0], "lm_head")
