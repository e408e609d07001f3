"""The kernels and what they are measured beside: each op of a decoded token, at the shapes of a decoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.linears import PEERS, bytes_of, random_gptq
from kernels import reference
from kernels.add_rms_norm import add_rms_norm
from kernels.decode_attention import decode_attention
from kernels.quant_matmul import quant_matmul
from kernels.quant_weight import QuantWeight
from kernels.rotary_and_cache import rotary_and_cache
from kernels.sample import sample
from kernels.silu_mul import silu_mul
from kernels.tolerances import worst

if TYPE_CHECKING:
    from benchmarks.speed.weights import Shapes

_PEER_TOLERANCES: Final = {"16 bits": 0.005, "4 bits": 0.25}
"""Root mean square of a peer's difference, relative. 4 bits: it rounds our weights once more, by a rule of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One copy of a contender, ready to run."""

    run: Callable[[], Tensor]
    nbytes: int  # read and written


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to compute an op at one shape."""

    op: str
    shape: str
    engine: str
    dtype: str
    prepare: Callable[[], Call]  # makes a copy, in memory of its own; Unavailable where this machine cannot run it
    wrong: Callable[[Tensor], float]
    """The difference of what it computes from the reference, as a share of what is allowed: above 1 is wrong."""

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this project's kernels."""
        return self.engine.startswith("lite")


def contenders(
    shapes: Shapes, rows: Sequence[int], device: torch.device, num_cached_tokens: int = 1470
) -> Iterator[Contender]:
    """Yield all of them, each op's together."""
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    heads = shapes.num_attention_heads + 2 * shapes.num_key_value_heads
    linears = {
        "qkv": (heads * shapes.head_dim, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (shapes.vocab_size, hidden),
    }
    for name, shape in linears.items():
        for M in rows:
            yield from _linears(f"{name} {shape[1]}→{shape[0]}, {M} rows", shape, M, device)
    for M in rows:
        yield from _attention(shapes, num_cached_tokens, M, device)
    for M in rows:
        yield from _rotary(shapes, num_cached_tokens, M, device)
    for M in rows:
        yield from _pointwise(shapes, M, device)
    for M in rows:
        yield from _sampling(shapes, M, device)


def _linears(where: str, shape: tuple[int, int], M: int, device: torch.device) -> Iterator[Contender]:
    (N, K), dtype = shape, torch.float16
    x = torch.randn(M, K, device=device, dtype=dtype)
    moved = (M * K + M * N) * dtype.itemsize

    def ours(bits: int) -> Contender:
        gptq = random_gptq(bits, shape, device)
        expected = reference.quant_matmul(x.float(), QuantWeight.from_gptq(gptq))
        rule = "quant_matmul decode" if M <= 16 else "quant_matmul prefill"

        def prepare() -> Call:
            weight = QuantWeight.from_gptq(gptq)
            return Call(run=lambda: quant_matmul(x, weight), nbytes=weight.nbytes + moved)

        return Contender(
            op="quant_matmul", shape=where, engine=f"lite int{bits}", dtype="float16", prepare=prepare,
            wrong=lambda got: worst(got, expected, rule, bits),
        )  # fmt: skip

    yield from map(ours, (4, 8))
    dense = random_gptq(4, shape, device).dequantize(dtype)
    right = functional.linear(x.float(), dense.float())

    def peer(name: str, make: Callable[[Tensor], nn.Module], computes_in: torch.dtype) -> Contender:
        own = x.to(computes_in)  # the conversion is not its work

        def prepare() -> Call:
            linear = make(dense.clone())
            return Call(run=lambda: linear(own), nbytes=bytes_of(linear, dense) + moved)

        rule = "16 bits" if "fp16" in name else "4 bits"
        return Contender(
            op="quant_matmul", shape=where, engine=name, dtype=str(computes_in).removeprefix("torch."),
            prepare=prepare, wrong=lambda got: _relative(got, right) / _PEER_TOLERANCES[rule],
        )  # fmt: skip

    for name, (make, computes_in) in PEERS.items():
        if device.type == "cuda" or "fp16" in name:
            yield peer(name, make, computes_in)


def _attention(shapes: Shapes, tokens: int, B: int, device: torch.device) -> Iterator[Contender]:
    slots, heads, kv_heads, head_dim = (
        tokens + 256,  # those to come
        shapes.num_attention_heads,
        shapes.num_key_value_heads,
        shapes.head_dim,
    )
    q = torch.randn(B, heads, head_dim, device=device, dtype=torch.float16)
    drawn = torch.randn(2, B, kv_heads, slots, head_dim, device=device, dtype=torch.float16)
    lengths = torch.full((B,), tokens, dtype=torch.int32, device=device)
    vectors = 2 * B * kv_heads * tokens

    def contender(engine: str, dtype: str, prepare: Callable[[], Call], wrong: Callable[[Tensor], float]) -> Contender:
        where = f"{tokens} tokens, {B} rows"
        return Contender(op="decode_attention", shape=where, engine=engine, dtype=dtype, prepare=prepare, wrong=wrong)

    def ours(*, quantized: bool) -> Contender:
        cache = _cache(drawn, quantized=quantized)
        expected = reference.decode_attention(q.float(), lengths=lengths, **_floats(cache))

        def prepare() -> Call:
            copies: dict[str, Any] = {name: tensor.clone() for name, tensor in cache.items()}
            return Call(
                run=lambda: decode_attention(q, lengths=lengths, **copies),
                nbytes=vectors * (head_dim + 2 if quantized else 2 * head_dim) + 2 * q.nbytes,
            )

        bits = 8 if quantized else 16
        dtype = "int8 cache" if quantized else "float16"
        return contender("lite", dtype, prepare, lambda got: worst(got, expected, "decode_attention", bits))

    yield ours(quantized=False)
    yield ours(quantized=True)
    right = reference.decode_attention(q.float(), lengths=lengths, **_floats(_cache(drawn, quantized=False)))

    def sdpa() -> Call:
        k, v = drawn.clone()[:, :, :, :tokens]

        def run() -> Tensor:
            attend = functional.scaled_dot_product_attention
            return attend(q.unsqueeze(2), k, v, enable_gqa=heads > kv_heads).squeeze(2)

        return Call(run=run, nbytes=vectors * 2 * head_dim + 2 * q.nbytes)

    yield contender("torch sdpa", "float16", sdpa, lambda got: _relative(got, right) / _PEER_TOLERANCES["16 bits"])


def _cache(drawn: Tensor, *, quantized: bool) -> dict[str, Any]:
    """Return keys and values [2, B, kv_heads, S, head_dim] as the ops take them."""
    if not quantized:
        return {"k_cache": drawn[0], "v_cache": drawn[1]}
    values, scales = reference.quantize_vectors(drawn, torch.float16)
    return {"k_cache": values[0], "v_cache": values[1], "k_scales": scales[0], "v_scales": scales[1]}


def _floats(cache: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor if tensor.dtype == torch.int8 else tensor.float() for name, tensor in cache.items()}


def _rotary(shapes: Shapes, num_cached_tokens: int, B: int, device: torch.device) -> Iterator[Contender]:
    kv_heads, head_dim = shapes.num_key_value_heads, shapes.head_dim
    split = [shapes.num_attention_heads, kv_heads, kv_heads]
    qkv = torch.randn(B, 1, sum(split), head_dim, device=device, dtype=torch.float16)
    slots = torch.full((B, 1), num_cached_tokens, device=device)
    cos, sin = reference.rotary_table(slots, head_dim, 1e4)
    expected = reference.rotary(torch.split(qkv, split, dim=2)[0].float(), cos, sin)
    drawn = torch.zeros(2, B, kv_heads, num_cached_tokens + 1, head_dim, device=device, dtype=torch.float16)

    def contender(engine: str, dtype: str, prepare: Callable[[], Call]) -> Contender:
        return Contender(
            op="rotary_and_cache", shape=f"{B} rows", engine=engine, dtype=dtype, prepare=prepare,
            wrong=lambda got: worst(got, expected, "rotary_and_cache", 16),
        )  # fmt: skip

    def ours(*, quantized: bool) -> Contender:
        def prepare() -> Call:
            q, k, v = torch.split(qkv.clone(), split, dim=2)
            cache: dict[str, Any] = {
                name: tensor.clone() for name, tensor in _cache(drawn, quantized=quantized).items()
            }

            def run() -> Tensor:
                return rotary_and_cache(q, k, v, cos, sin, slots, **cache)[0]

            stored = 2 * B * kv_heads * (head_dim + 2 if quantized else 2 * head_dim)
            return Call(run=run, nbytes=qkv.nbytes + (q.numel() + k.numel()) * 2 + stored + 2 * cos.nbytes)

        return contender("lite", "int8 cache" if quantized else "float16", prepare)

    yield ours(quantized=False)
    yield ours(quantized=True)

    def plain() -> Call:
        q, k, v = torch.split(qkv, split, dim=2)
        k_cache, v_cache = drawn.clone()
        at = torch.arange(B, device=device)[:, None]

        def run() -> Tensor:
            k_cache[at, :, slots] = reference.rotary(k, cos, sin)
            v_cache[at, :, slots] = v
            return reference.rotary(q, cos, sin)

        return Call(run=run, nbytes=2 * qkv.nbytes + k.numel() * 2 + 2 * cos.nbytes)

    yield contender("torch", "float16", plain)


def _pointwise(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    x, residual = torch.randn(2, M, hidden, device=device, dtype=torch.float16)
    weight = torch.ones(hidden, device=device, dtype=torch.float16)
    gate_up = torch.randn(M, 2 * inner, device=device, dtype=torch.float16)
    normed = reference.rms_norm((x + residual).float(), weight.float(), 1e-5)
    gated = reference.silu_mul(gate_up.float())

    def norm(*, is_ours: bool) -> Call:
        own_x, own_residual = x.clone(), residual.clone()

        def run() -> Tensor:
            if is_ours:
                return add_rms_norm(own_x, own_residual, weight, 1e-5)[1]
            return functional.rms_norm(own_x + own_residual, (hidden,), weight, 1e-5)

        return Call(run=run, nbytes=4 * x.nbytes + weight.nbytes)

    def gate(*, is_ours: bool) -> Call:
        own = gate_up.clone()

        def run() -> Tensor:
            return silu_mul(own) if is_ours else functional.silu(own[:, :inner]) * own[:, inner:]

        return Call(run=run, nbytes=own.nbytes * 3 // 2)

    def contender(op: str, shape: str, make: Callable[..., Call], expected: Tensor, *, is_ours: bool) -> Contender:
        return Contender(
            op=op, shape=f"{shape}, {M} rows", engine="lite" if is_ours else "torch", dtype="float16",
            prepare=lambda: make(is_ours=is_ours), wrong=lambda got: _judged(got, expected, op, is_ours=is_ours),
        )  # fmt: skip

    for is_ours in (True, False):
        yield contender("add_rms_norm", str(hidden), norm, normed, is_ours=is_ours)
        yield contender("silu_mul", f"2 × {inner}", gate, gated, is_ours=is_ours)


def _sampling(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    logits = torch.randn(M, shapes.vocab_size, device=device, dtype=torch.float16) * 4
    greedy = logits.float().log_softmax(-1).amax(-1)

    def contender(engine: str, how: str, expected: Tensor, run: Callable[[Tensor], Tensor]) -> Contender:
        def prepare() -> Call:
            own = logits.clone()
            return Call(run=lambda: run(own), nbytes=own.nbytes)

        return Contender(
            op="sample", shape=f"{shapes.vocab_size} tokens, {M} rows, {how}", engine=engine, dtype="float16",
            prepare=prepare, wrong=lambda got: _judged(got, expected, "sample", is_ours=engine == "lite"),
        )  # fmt: skip

    for how, temperature in (("greedy", 0.0), ("nucleus of 0.9", 1.0)):
        given: dict[str, Any] = {
            "temperature": torch.full((M,), temperature, device=device),
            "top_p": torch.full((M,), 0.9, device=device),
            "seeds": torch.arange(M, device=device),
            "positions": torch.arange(M, device=device),
        }
        expected = reference.sample(logits, **given).logprobs if temperature else greedy
        yield contender("lite", how, expected, functools.partial(_logprobs, given))
    yield contender("torch", "greedy", greedy, lambda own: own.float().log_softmax(-1).max(-1).values)


def _logprobs(given: dict[str, Any], logits: Tensor) -> Tensor:
    return sample(logits, **given).logprobs


def _judged(got: Tensor, expected: Tensor, op: str, *, is_ours: bool) -> float:
    return worst(got, expected, op, 16) if is_ours else _relative(got, expected) / _PEER_TOLERANCES["16 bits"]


def _relative(got: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative; infinite if there is a NaN."""
    difference = float((got.float() - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf
