"""The kernels and what they are measured beside: each op of a decoded token, at the shapes of a decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.speed.engine import off_by
from benchmarks.speed.linears import PEERS, bytes_of, random_gptq
from kernels import reference
from kernels.add_rms_norm import add_rms_norm
from kernels.decode_attention import decode_attention
from kernels.lora_add import lora_add
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
    dtype: str = "float16"
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
    ops: list[Callable[[Shapes, int, torch.device], Iterator[Contender]]] = [
        functools.partial(_attention, tokens=num_cached_tokens),
        functools.partial(_rotary, tokens=num_cached_tokens),
        _pointwise,
        _sampling,
        _adapters,
    ]
    for op in ops:
        for M in rows:
            yield from op(shapes, M, device)


def _all_of(
    op: str,
    shape: str,
    inputs: Mapping[str, Tensor],
    nbytes: int,
    expected: Tensor,
    runs: Mapping[str, Callable[..., Tensor]],
    *,
    bits: int = 16,
    dtype: str = "float16",
) -> Iterator[Contender]:
    """Yield the engines that compute an op from copies of the same tensors, which they take by name."""

    def prepare(run: Callable[..., Tensor]) -> Call:
        return Call(run=functools.partial(run, **{name: t.clone() for name, t in inputs.items()}), nbytes=nbytes)

    def ours(got: Tensor) -> float:
        return worst(got, expected, op, bits)

    def theirs(got: Tensor) -> float:
        return off_by(got, expected) / _PEER_TOLERANCES["16 bits"]

    for engine, run in runs.items():
        yield Contender(
            op=op, shape=shape, engine=engine, dtype=dtype, prepare=functools.partial(prepare, run),
            wrong=ours if engine == "lite" else theirs,
        )  # fmt: skip


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
            op="quant_matmul", shape=where, engine=f"lite int{bits}", prepare=prepare,
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
            prepare=prepare, wrong=lambda got: off_by(got, right) / _PEER_TOLERANCES[rule],
        )  # fmt: skip

    for name, (make, computes_in) in PEERS.items():
        if device.type == "cuda" or "fp16" in name:
            yield peer(name, make, computes_in)


def _attention(shapes: Shapes, B: int, device: torch.device, *, tokens: int) -> Iterator[Contender]:
    heads, kv_heads, head_dim = shapes.num_attention_heads, shapes.num_key_value_heads, shapes.head_dim
    q = torch.randn(B, heads, head_dim, device=device, dtype=torch.float16)
    slots = tokens + 256  # those to come
    drawn = torch.randn(2, B, kv_heads, slots, head_dim, device=device, dtype=torch.float16)
    lengths = torch.full((B,), tokens, dtype=torch.int32, device=device)

    def sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k, v = k_cache[:, :, :tokens], v_cache[:, :, :tokens]
        attend = functional.scaled_dot_product_attention
        return attend(q.unsqueeze(2), k, v, enable_gqa=heads > kv_heads).squeeze(2)

    for quantized in (False, True):
        cache = _cache(drawn, quantized=quantized)
        floats = {name: tensor if tensor.dtype == torch.int8 else tensor.float() for name, tensor in cache.items()}
        yield from _all_of(
            "decode_attention",
            f"{tokens} tokens, {B} rows",
            {"q": q, **cache},
            2 * B * kv_heads * tokens * _vector_bytes(head_dim, quantized=quantized) + 2 * q.nbytes,
            reference.decode_attention(q.float(), lengths=lengths, **floats),
            {"lite": functools.partial(decode_attention, lengths=lengths)}
            | ({} if quantized else {"torch sdpa": sdpa}),
            bits=8 if quantized else 16,
            dtype="int8 cache" if quantized else "float16",
        )


def _cache(drawn: Tensor, *, quantized: bool) -> dict[str, Any]:
    """Return keys and values [2, B, kv_heads, S, head_dim] as the ops take them."""
    if not quantized:
        return {"k_cache": drawn[0], "v_cache": drawn[1]}
    values, scales = reference.quantize_vectors(drawn, torch.float16)
    return {"k_cache": values[0], "v_cache": values[1], "k_scales": scales[0], "v_scales": scales[1]}


def _vector_bytes(head_dim: int, *, quantized: bool) -> int:
    return head_dim + 2 if quantized else 2 * head_dim


def _rotary(shapes: Shapes, B: int, device: torch.device, *, tokens: int) -> Iterator[Contender]:
    kv_heads, head_dim = shapes.num_key_value_heads, shapes.head_dim
    split = [shapes.num_attention_heads, kv_heads, kv_heads]
    qkv = torch.randn(B, 1, sum(split), head_dim, device=device, dtype=torch.float16)
    slots = torch.full((B, 1), tokens, device=device)
    cos, sin = reference.rotary_table(slots, head_dim, 1e4)
    drawn = torch.zeros(2, B, kv_heads, tokens + 1, head_dim, device=device, dtype=torch.float16)
    at = torch.arange(B, device=device)[:, None]

    def ours(qkv: Tensor, **cache: Any) -> Tensor:
        q, k, v = torch.split(qkv, split, dim=2)
        return rotary_and_cache(q, k, v, cos, sin, slots, **cache)[0]

    def plain(qkv: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = torch.split(qkv, split, dim=2)
        k_cache[at, :, slots] = reference.rotary(k, cos, sin)
        v_cache[at, :, slots] = v
        return reference.rotary(q, cos, sin)

    rotated = qkv.nbytes - qkv.nbytes * kv_heads // sum(split)  # q and k
    for quantized in (False, True):
        stored = 2 * B * kv_heads * _vector_bytes(head_dim, quantized=quantized)
        yield from _all_of(
            "rotary_and_cache",
            f"{B} rows",
            {"qkv": qkv, **_cache(drawn, quantized=quantized)},
            qkv.nbytes + rotated + stored + 2 * cos.nbytes,
            reference.rotary(torch.split(qkv, split, dim=2)[0].float(), cos, sin),
            {"lite": ours} if quantized else {"lite": ours, "torch": plain},
            dtype="int8 cache" if quantized else "float16",
        )


def _pointwise(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    x, residual = torch.randn(2, M, hidden, device=device, dtype=torch.float16)
    weight = torch.ones(hidden, device=device, dtype=torch.float16)
    yield from _all_of(
        "add_rms_norm",
        f"{hidden}, {M} rows",
        {"x": x, "residual": residual},
        4 * x.nbytes + weight.nbytes,
        reference.rms_norm((x + residual).float(), weight.float(), 1e-5),
        {
            "lite": lambda x, residual: add_rms_norm(x, residual, weight, 1e-5)[1],
            "torch": lambda x, residual: functional.rms_norm(x + residual, (hidden,), weight, 1e-5),
        },
    )
    gate_up = torch.randn(M, 2 * inner, device=device, dtype=torch.float16)
    yield from _all_of(
        "silu_mul",
        f"2 × {inner}, {M} rows",
        {"gate_up": gate_up},
        gate_up.nbytes * 3 // 2,
        reference.silu_mul(gate_up.float()),
        {"lite": silu_mul, "torch": lambda gate_up: functional.silu(gate_up[:, :inner]) * gate_up[:, inner:]},
    )


def _sampling(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    logits = torch.randn(M, shapes.vocab_size, device=device, dtype=torch.float16) * 4

    def ours(logits: Tensor, **given: Any) -> Tensor:
        return sample(logits, **given).logprobs

    for how, temperature in (("greedy", 0.0), ("nucleus of 0.9", 1.0)):
        given: dict[str, Any] = {
            "temperature": torch.full((M,), temperature, device=device),
            "top_p": torch.full((M,), 0.9, device=device),
            "seeds": torch.arange(M, device=device),
            "positions": torch.arange(M, device=device),
        }
        runs: dict[str, Callable[..., Tensor]] = {"lite": functools.partial(ours, **given)}
        if temperature:
            expected = reference.sample(logits, **given).logprobs
        else:
            expected = logits.float().log_softmax(-1).amax(-1)
            runs["torch"] = lambda logits: logits.float().log_softmax(-1).max(-1).values
        shape = f"{shapes.vocab_size} tokens, {M} rows, {how}"
        yield from _all_of("sample", shape, {"logits": logits}, logits.nbytes, expected, runs)


def _adapters(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    """Rank 64, the rows of two adapters in turn."""
    hidden, inner, rank = shapes.hidden_size, shapes.intermediate_size, 64
    q, kv = (n * shapes.head_dim for n in (shapes.num_attention_heads, shapes.num_key_value_heads))
    linears = {
        "qkv": ((q, kv, kv), hidden), "o": ((hidden,), q), "gate_up": ((inner, inner), hidden),
        "down": ((hidden,), inner),
    }  # fmt: skip
    slots = torch.arange(M, device=device) % 2
    for name, (parts, K) in linears.items():
        N, P = sum(parts), len(parts)
        drawn = functools.partial(torch.randn, device=device, dtype=torch.float16)
        inputs = {"y": drawn(M, N), "x": drawn(M, K)}
        inputs |= {"a": drawn(2, P * rank, K) / K**0.5, "b": drawn(2, N, rank) / rank**0.5}
        given: dict[str, Any] = {"slots": slots, "parts": parts}
        floats: dict[str, Any] = {name: tensor.float() for name, tensor in inputs.items()}
        read = sum(inputs[name].nbytes for name in ("a", "b")) * min(M, 2) // 2
        yield from _all_of(
            "lora_add",
            f"{name} {K}→{N}, rank {rank}, {M} rows",
            inputs,
            read + inputs["x"].nbytes + 2 * inputs["y"].nbytes,
            reference.lora_add(**floats, **given),
            {"lite": functools.partial(lora_add, **given), "torch": functools.partial(_gathered, **given)},
        )


def _gathered(y: Tensor, x: Tensor, a: Tensor, b: Tensor, slots: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Copy each row's adapter together for a batched product, as is done without a kernel."""
    h = torch.bmm(a[slots], x.unsqueeze(-1)).chunk(len(parts), dim=1)
    products = [torch.bmm(part, some) for part, some in zip(torch.split(b[slots], list(parts), dim=1), h, strict=True)]
    return y.add_(torch.cat(products, dim=1).squeeze(-1))
