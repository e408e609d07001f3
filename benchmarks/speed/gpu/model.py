"""Decoders made of random weights on a device, other libraries' linears in them, and what they should compute.

No checkpoint is read: each weight is a draw of its own, so that bytes and time are those of the real model. Embeddings
are about as small as what a layer adds to them, so that logits depend on every part of it, and the head is so large
that these are neither flat nor one-hot. What the model writes means nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.phantom.layout import llama_config_json
from benchmarks.speed.kernels import GROUP_SIZE, Shapes, Unavailable, random_gptq
from benchmarks.speed.peers.hugging_face import TransformersEngine
from benchmarks.speed.peers.lite_decoder import TinygemmLinear, gemlite_linear
from kernels.bnb import Nf4Weight, import_bitsandbytes
from kernels.quant_matmul import QuantWeight
from kernels.reference import attention, rms_norm, rotary, rotary_table, silu_mul
from lite.config import IMAGE_TOKEN_ID, DecoderConfig, Quantization
from lite.engines.torch_engine.decoder import DTYPES, LlamaDecoder
from lite.engines.torch_engine.linear import Linear, linears_of, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.cache import KVCache
    from lite.engines.torch_engine.cuda_graph import Capture

VICUNA: Final = Shapes()
LAYERS: Final = 32
_CONTEXT: Final = 4096
_EMBEDDINGS: Final = 0.5  # their standard deviation
_GAINS: Final = {"q_proj": 2.5, "k_proj": 2.5, "lm_head": 3.0}
"""What some linears multiply by beside keeping the size of their input: attention that picks, logits that differ."""
_QUESTION_TOKENS: Final = 50


def config_json(shapes: Shapes, layers: int, bits: int | None) -> dict[str, Any]:
    """Return `config.json` of a decoder of these shapes; None has 16-bit linears, and the head has them always."""
    plain = llama_config_json(
        {
            "hidden_size": shapes.hidden_size,
            "intermediate_size": shapes.inner,
            "num_hidden_layers": layers,
            "num_attention_heads": shapes.heads,
            "num_key_value_heads": shapes.kv_heads,
            "head_dim": shapes.head_dim,
            "vocab_size": shapes.vocab_size,
            "max_position_embeddings": _CONTEXT,
        }
    )
    if bits is None:
        return plain
    # As `random_gptq`: small shapes are not made of whole groups.
    group_size = GROUP_SIZE if shapes.hidden_size % GROUP_SIZE == shapes.inner % GROUP_SIZE == 0 else -1
    gptq = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": False}
    return plain | {"quantization_config": gptq}


def random_decoder(
    config: DecoderConfig,
    device: torch.device,
    *,
    cache_dtype: CacheDtype | None = None,
    capture: Capture | None = None,
) -> LlamaDecoder:
    """Draw a decoder where it computes.

    Args:
        config: its shape; GPTQ or 16 bits.
        device: float32 on a CPU, the config's dtype elsewhere.
        cache_dtype: "int8", or None for what it computes in.
        capture: how a step of decoding is captured; None launches its kernels one by one.
    """
    dtype = torch.float32 if device.type == "cpu" else DTYPES[config.dtype]
    with torch.device("meta"):
        decoder = LlamaDecoder(config, cache_dtype=cache_dtype)
    state = {name: _norm_or_embeddings(plain.shape, device, dtype) for name, plain in decoder.state_dict().items()}
    decoder.load_state_dict(state, assign=True)
    triton = decoder.selection.backend == "triton"
    for linear in linears_of(decoder).values():
        N, K = sum(linear.parts.values()), linear.in_features
        gains = torch.cat([torch.full((size,), _GAINS.get(part, 1.0)) for part, size in linear.parts.items()])
        if linear.quantization is None:
            linear.weights = ((torch.randn(N, K, device=device) * (gains.to(device)[:, None] * K**-0.5)).to(dtype),)
            continue
        drawn = random_gptq(linear.quantization.bits, (N, K), device)
        # Integers of 0 … 15 around 8 have a mean of -0.5, which layer by layer would add up to one vector for all
        # tokens: some groups have the other sign.
        signs = torch.randint(0, 2, drawn.scales.shape, device=device) * 2 - 1
        drawn = dataclasses.replace(drawn, scales=(drawn.scales * signs * gains.to(device)).to(drawn.scales.dtype))
        linear.weights = (QuantWeight.from_gptq(drawn) if triton else drawn,)
    decoder.capture = capture
    return decoder.eval().requires_grad_(requires_grad=False)


def _norm_or_embeddings(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(shape, device=device)
    return (1 + 0.1 * drawn if len(shape) == 1 else _EMBEDDINGS * drawn).to(dtype)


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


# -- Peers -----------------------------------------------------------------------------------------------------------


def tinygemm(weight: Tensor) -> nn.Module:
    """Round a weight for torch's own int4 product.

    Raises:
        Unavailable: the card has no bfloat16.
    """
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise Unavailable("it needs a card of compute capability 8.0")
    return TinygemmLinear(weight)


def gemlite(weight: Tensor) -> nn.Module:
    """Round a weight for gemlite.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        importlib.import_module("gemlite.helper")
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"not installed ({error})") from error
    made: nn.Module = gemlite_linear(weight)
    return made


def nf4(weight: Tensor) -> nn.Module:
    """Round a weight to bitsandbytes' NF4, in our linear, which calls the library's kernel.

    Raises:
        Unavailable: it is not installed, or has no CUDA library for this torch.
    """
    try:
        quantize: Any = import_bitsandbytes().functional.quantize_4bit
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    packed, state = quantize(weight.to(torch.float16), quant_type="nf4", compress_statistics=True)
    made = Linear(weight.shape[1], {"all": weight.shape[0]}, Quantization(format="bnb-nf4"))
    made.weights = (
        Nf4Weight(
            shape=(weight.shape[0], weight.shape[1]),
            packed=packed,
            absmax=state.absmax,
            quant_map=state.code,
            nested_absmax=state.state2.absmax,
            nested_quant_map=state.state2.code,
            nested_offset=state.offset,
        ),
    )
    return made


def dense(weight: Tensor) -> nn.Module:
    """Keep a weight in 16 bits on a GPU, for cuBLAS."""
    made = Linear(weight.shape[1], {"all": weight.shape[0]})
    made.weights = (weight.to(torch.float16) if weight.is_cuda else weight,)
    return made


def swapped(
    decoder: LlamaDecoder, make: Callable[[Tensor], nn.Module], *, dtype: torch.dtype, layers: int | None = None
) -> LlamaDecoder:
    """Return a decoder with other linears, made of the same weights; the head stays what it is, in the new dtype.

    Args:
        decoder: the original; its linears' inputs side by side stay so.
        make: makes a linear of a weight [out, in] float32.
        dtype: what the new one computes in.
        layers: only the first ones.

    Raises:
        Unavailable: from `make`.
    """
    count = decoder.config.num_hidden_layers if layers is None else layers
    with torch.device("meta"):
        new = LlamaDecoder(dataclasses.replace(decoder.config, num_hidden_layers=count))
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


def transformers_engine(decoder: LlamaDecoder, *, max_seq_len: int) -> TransformersEngine:
    """Let transformers compute the weights of a dense decoder, in the same memory.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
        rotary_embedding = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"not installed ({error})") from error
    ours = decoder.config
    shapes = Shapes(
        hidden_size=ours.hidden_size, inner=ours.intermediate_size, heads=ours.num_attention_heads,
        kv_heads=ours.num_key_value_heads, head_dim=ours.head_dim, vocab_size=ours.vocab_size,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        **config_json(shapes, ours.num_hidden_layers, None), attn_implementation="sdpa", dtype=decoder.dtype
    )
    state: dict[str, Tensor] = {"lm_head.weight": dequantized(decoder.lm_head, decoder.dtype)}
    with torch.device("meta"):  # for the names that a checkpoint gives to the parts of our linears
        linears = linears_of(LlamaDecoder(dataclasses.replace(ours, quantization=None)))
    ours_by_name = linears_of(decoder)
    for part, (name, inner) in parts_of(linears).items():
        if name != "lm_head":
            sizes = linears[name].parts
            split = torch.split(dequantized(ours_by_name[name], decoder.dtype), list(sizes.values()))
            state[f"{part}.weight"] = dict(zip(sizes, split, strict=True))[inner]
    state |= {name: tensor for name, tensor in decoder.state_dict().items() if tensor.dim() == 1 or "embed" in name}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    with decoder.device:  # its angles are a buffer that no state has
        model.model.rotary_emb = rotary_embedding(config)
    return TransformersEngine(
        model.eval(), max_seq_len=max_seq_len, computes_in=str(decoder.dtype).removeprefix("torch.")
    )


# -- What it should compute ------------------------------------------------------------------------------------------


def dequantized(linear: Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a linear's weight [out, in]; one that has this dtype already is not copied."""
    whole = [weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype) for weight in linear.weights]
    return whole[0] if len(whole) == 1 else torch.cat(whole)


@torch.inference_mode()
def plain_logits(decoder: LlamaDecoder, inputs_embeds: Tensor) -> Tensor:
    """Compute a decoder plainly: float32, no cache, one weight at a time.

    Args:
        decoder: with weights of ours.
        inputs_embeds: [T, hidden_size].

    Returns:
        logits float32 [T, vocab_size].
    """
    config, eps = decoder.config, decoder.config.rms_norm_eps
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = torch.arange(len(inputs_embeds), device=inputs_embeds.device)[None]
    cos, sin = rotary_table(positions, head_dim, config.rope_theta)
    linears = {name: linear for name, linear in linears_of(decoder).items() if name != "lm_head"}

    def product(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, dequantized(linears[name]))

    x = inputs_embeds.float()[None]
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
    return functional.linear(normed[0], dequantized(decoder.lm_head))


# -- Prompts and caches ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """An image of noise, and a question of random tokens."""

    input_ids: list[int]
    features: Tensor  # float32 [P, hidden_size]

    @property
    def num_tokens(self) -> int:
        """The places it takes."""
        return len(self.input_ids) - 1 + len(self.features)


def random_prompt(config: DecoderConfig, num_tokens: int, device: torch.device, *, seed: int = 0) -> Prompt:
    """Draw a prompt of `num_tokens` places, as much of it text as in a real one."""
    generator = torch.Generator().manual_seed(seed)
    text = min(_QUESTION_TOKENS, num_tokens // 2)
    ids = torch.randint(config.vocab_size, (text,), generator=generator).tolist()
    features = _EMBEDDINGS * torch.randn(num_tokens - text, config.hidden_size, generator=generator)
    return Prompt(input_ids=[ids[0], IMAGE_TOKEN_ID, *ids[1:]], features=features.to(device))


def greedy(decoder: LlamaDecoder, prompt: Prompt, count: int) -> tuple[list[int], str | None]:
    """Decode; return the tokens, and why the steps were not captured although they should have been."""
    cache = decoder.new_cache(1, prompt.num_tokens + count)
    decoder.prefill(prompt.input_ids, prompt.features, cache)
    token_ids = cache.newest().tolist()
    while len(token_ids) < count:
        decoder.decode_one_token(cache)
        token_ids += cache.newest().tolist()
    return token_ids, not_captured(decoder, cache, 1)


def not_captured(decoder: LlamaDecoder, cache: KVCache, rows: int) -> str | None:
    """Say why a step of so many rows was not captured; None if it was, or should not have been."""
    if decoder.capture is None:
        return None
    step = cache.steps.get(rows)
    if step is None:
        return "it has not run"
    return None if step.is_captured else step.problem or "it ran only once"


@torch.inference_mode()
def fill(cache: KVCache, num_tokens: int) -> None:
    """Draw keys and values for every row, as if prompts of that length had gone through."""
    for tensor in (cache.k_cache, cache.v_cache):
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        else:
            tensor.normal_()
    for scales in (cache.k_scales, cache.v_scales):
        if scales is not None:
            scales.fill_(1 / 64)  # of integers up to 127: values of order 1
    rewind(cache, num_tokens)


@torch.inference_mode()
def rewind(cache: KVCache, num_tokens: int) -> None:
    """Let every row begin again behind its first tokens."""
    cache.position_ids.fill_(num_tokens)
    cache.num_cached_tokens = [num_tokens] * cache.batch_size
