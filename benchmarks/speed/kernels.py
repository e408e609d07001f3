"""The GPU kernels one by one, `python -m benchmarks speed kernels`: right first, then how fast, beside others.

At the shapes of Vicuna-7B. Each op is computed once and compared with its reference; what is wrong is not timed. Then
it is captured in a CUDA graph, as the decoder runs it, once for each of several copies of what it reads: together they
exceed the L2 cache, so each call reads memory as in a decoder, where other layers came in between.

GB/s counts what a call has to read and write, each byte once; beside it, its share of a streaming read in this run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.add_rms_norm import add_rms_norm
from kernels.backend import Selection, select_backend
from kernels.decode_attention import decode_attention, decode_attention_workspace_bytes
from kernels.gptq import GptqWeight
from kernels.packing import pack_factor
from kernels.quant_matmul import QuantWeight, quant_matmul, quant_matmul_workspace_bytes
from kernels.rotary_and_cache import rotary_and_cache
from kernels.sample import sample
from kernels.silu_mul import silu_mul
from kernels.tolerances import worst
from lite.bench.machine import machine, streaming_read_bandwidth, versions
from lite.bench.measure import quantiles
from lite.bench.results import Quantiles
from lite.bench.table import markdown_table
from lite.console import positive, run_command
from lite.errors import BackendUnavailable
from lite.files import write_whole

GROUP_SIZE: Final = 128
_FLUSH_BYTES: Final = 256 << 20
"""Read by the copies in turn: more than twice the largest L2 cache (126 MB on a Blackwell card)."""
_MAX_COPIES: Final = 64
_ROUNDS: Final = 50
_PEER_TOLERANCES: Final = {"float16": 0.005, "4 bits": 0.25}
"""Root mean square of a peer's difference, relative. 4 bits: it rounds our weights once more, by a rule of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A decoder's: those of Vicuna-7B, unless a test wants it smaller."""

    hidden_size: int = 4096
    inner: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 32000
    num_cached_tokens: int = 1470  # a study's prompt

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each product of a token."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden_size),
            "o": (self.hidden_size, self.heads * self.head_dim),
            "gate_up": (2 * self.inner, self.hidden_size),
            "down": (self.hidden_size, self.inner),
            "head": (self.vocab_size, self.hidden_size),
        }


class Unavailable(Exception):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """A contender that this machine cannot run; the message says why, in a few words."""


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
    prepare: Callable[[], Call]
    """Makes a copy, in memory of its own.

    Raises:
        Unavailable: this machine cannot run it.
    """
    wrong: Callable[[Tensor], float]
    """The difference of what it computes from the reference, as a share of what is allowed: above 1 is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A contender, measured, or why it is not."""

    op: str
    shape: str
    engine: str
    dtype: str
    time: Quantiles | None = None  # seconds of one call
    bytes_per_s: float | None = None
    share: float | None = None  # of the bandwidth of a streaming read in this run
    graph: bool | None = None  # captured, or launched one by one
    why: str | None = None  # not measured
    is_wrong: bool = False


# ---- the contenders


def contenders(shapes: Shapes, rows: Sequence[int], device: torch.device) -> Iterator[Contender]:
    """Yield all of them, each op's together."""
    for name, shape in shapes.linears().items():
        for M in rows:
            yield from _linears(f"{name} {shape[1]}→{shape[0]}", shape, M, device)
    for M in rows:
        yield from _attention(shapes, M, device)
    for M in rows:
        yield from _rotary(shapes, M, device)
    for M in rows:
        yield from _pointwise(shapes, M, device)
    for M in rows:
        yield from _sampling(shapes, M, device)


def random_gptq(bits: int, shape: tuple[int, int], device: torch.device) -> GptqWeight:
    """Draw a weight whose products with values of order 1 are of order 1; all bits are as probable."""
    N, K = shape
    qweight = torch.randint(-(2**31), 2**31, (K // pack_factor(bits), N), dtype=torch.int32, device=device)
    group_size = GROUP_SIZE if K % GROUP_SIZE == 0 else K
    scales = (torch.rand(K // group_size, N, device=device) + 0.5) / (1 << (bits - 1)) / K**0.5
    return GptqWeight(qweight=qweight, scales=scales.half(), bits=bits, group_size=group_size)


def _linears(shape_name: str, shape: tuple[int, int], M: int, device: torch.device) -> Iterator[Contender]:
    (N, K), dtype = shape, torch.float16
    x = torch.randn(M, K, device=device, dtype=dtype)
    moved = (M * K + M * N) * dtype.itemsize
    op, where = "quant_matmul", f"{shape_name}, {M} rows"

    def ours(bits: int, backend: Any) -> Contender:  # noqa: ANN401 - one of three texts
        gptq = random_gptq(bits, shape, device)
        expected = reference.quant_matmul(x.float(), QuantWeight.from_gptq(gptq))
        rule = "quant_matmul decode" if M <= 16 and backend is None else "quant_matmul prefill"

        def prepare() -> Call:
            weight = QuantWeight.from_gptq(gptq)
            nbytes = quant_matmul_workspace_bytes(M, weight, dtype=dtype)
            out, workspace = _out(x, N), torch.empty(nbytes, dtype=torch.uint8, device=device)

            def run() -> Tensor:
                try:
                    return quant_matmul(x, weight, out=out, workspace=workspace, backend=backend)
                except ValueError as error:  # a card without such tensor cores
                    raise Unavailable(str(error)) from error

            return Call(run=run, nbytes=weight.nbytes + moved)

        return Contender(
            op=op,
            shape=where,
            engine=f"lite int{bits}" + (" dot" if backend else ""),
            dtype="float16",
            prepare=prepare,
            wrong=lambda got: worst(got, expected, rule, bits),
        )

    yield ours(4, None)
    yield ours(8, None)
    if device.type == "cuda":
        yield ours(4, "triton-dot")
    dense = random_gptq(4, shape, device).dequantize(dtype)
    right = functional.linear(x.float(), dense.float())

    def peer(
        engine: str, computes_in: str, rounds_to: str, make: Callable[[], tuple[Callable[[], Tensor], int]]
    ) -> Contender:
        def prepare() -> Call:
            run, nbytes = make()
            return Call(run=run, nbytes=nbytes + moved)

        return Contender(
            op=op,
            shape=where,
            engine=engine,
            dtype=computes_in,
            prepare=prepare,
            wrong=lambda got: _relative(got, right) / _PEER_TOLERANCES[rounds_to],
        )

    yield peer("torch", "float16", "float16", lambda: _torch_linear(x, dense.clone()))
    if device.type == "cuda":
        yield peer("tinygemm int4", "bfloat16", "4 bits", lambda: _tinygemm(x, dense))
        yield peer("bitsandbytes nf4", "float16", "4 bits", lambda: _nf4(x, dense))
        yield peer("gemlite int4", "float16", "4 bits", lambda: _gemlite(x, dense))


def _torch_linear(x: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], int]:
    return lambda: functional.linear(x, weight), weight.nbytes


def _tinygemm(x: Tensor, dense: Tensor) -> tuple[Callable[[], Tensor], int]:
    from benchmarks.speed.peers.lite_decoder import TinygemmLinear

    if torch.cuda.get_device_capability(x.device) < (8, 0):
        raise Unavailable("it needs a card of compute capability 8.0")
    linear = TinygemmLinear(dense.float())
    x = x.to(torch.bfloat16)  # what it takes; the conversion is not its work
    return lambda: linear(x), linear.packed.nbytes + linear.scales_and_zeros.nbytes


def _nf4(x: Tensor, dense: Tensor) -> tuple[Callable[[], Tensor], int]:
    bitsandbytes: Any = _package("bitsandbytes")
    packed, state = bitsandbytes.functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
    nbytes = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return lambda: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state), nbytes


def _gemlite(x: Tensor, dense: Tensor) -> tuple[Callable[[], Tensor], int]:
    from benchmarks.speed.peers.lite_decoder import gemlite_linear

    _package("gemlite.helper")
    linear = gemlite_linear(dense)
    # A float16 scale and a zero of that size for each group.
    return lambda: linear(x), dense.numel() // 2 + 2 * 2 * dense.numel() // GROUP_SIZE


def _package(name: str) -> Any:  # noqa: ANN401 - a peer's module
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise Unavailable(f"not installed ({error})") from error


def _attention(shapes: Shapes, B: int, device: torch.device) -> Iterator[Contender]:
    tokens, dtype = shapes.num_cached_tokens, torch.float16
    slots = tokens + 256  # those to come
    where = f"{tokens} tokens, {B} rows"
    q = torch.randn(B, shapes.heads, shapes.head_dim, device=device, dtype=dtype)
    drawn = torch.randn(2, B, shapes.kv_heads, slots, shapes.head_dim, device=device, dtype=dtype)
    lengths = torch.full((B,), tokens, dtype=torch.int32, device=device)
    vectors = 2 * B * shapes.kv_heads * tokens

    def ours(*, quantized: bool) -> Contender:
        cache = _cache(drawn, quantized=quantized)
        expected = reference.decode_attention(q.float(), lengths=lengths, **_floats(cache))

        def prepare() -> Call:
            copies: dict[str, Any] = {name: tensor.clone() for name, tensor in cache.items()}
            nbytes = decode_attention_workspace_bytes(B, shapes.heads, shapes.head_dim, slots)
            out, workspace = torch.empty_like(q), torch.empty(nbytes, dtype=torch.uint8, device=device)
            read = vectors * (shapes.head_dim + 2 if quantized else 2 * shapes.head_dim)
            return Call(
                run=lambda: decode_attention(q, lengths=lengths, out=out, workspace=workspace, **copies),
                nbytes=read + 2 * q.nbytes,
            )

        return Contender(
            op="decode_attention",
            shape=where,
            engine="lite",
            dtype="int8 cache" if quantized else "float16",
            prepare=prepare,
            wrong=lambda got: worst(got, expected, "decode_attention", 8 if quantized else 16),
        )

    yield ours(quantized=False)
    yield ours(quantized=True)
    right = reference.decode_attention(q.float(), lengths=lengths, **_floats(_cache(drawn, quantized=False)))

    def sdpa() -> Call:
        k, v = drawn.clone()[:, :, :, :tokens]

        def run() -> Tensor:
            grouped = shapes.heads > shapes.kv_heads
            return functional.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=grouped).squeeze(2)

        return Call(run=run, nbytes=vectors * 2 * shapes.head_dim + 2 * q.nbytes)

    yield Contender(
        op="decode_attention",
        shape=where,
        engine="torch sdpa",
        dtype="float16",
        prepare=sdpa,
        wrong=lambda got: _relative(got, right) / _PEER_TOLERANCES["float16"],
    )


def _cache(drawn: Tensor, *, quantized: bool) -> dict[str, Any]:
    """Return keys and values [2, B, kv_heads, S, head_dim] as the ops take them."""
    if not quantized:
        return {"k_cache": drawn[0], "v_cache": drawn[1]}
    values, scales = reference.quantize_vectors(drawn, torch.float16)
    return {"k_cache": values[0], "v_cache": values[1], "k_scales": scales[0], "v_scales": scales[1]}


def _floats(cache: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor if tensor.dtype == torch.int8 else tensor.float() for name, tensor in cache.items()}


def _taken_apart(qkv: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of q, k and v [B, 1, heads, head_dim]."""
    heads = qkv.view(qkv.shape[0], 1, -1, shapes.head_dim)
    end_of_q, end_of_k = shapes.heads, shapes.heads + shapes.kv_heads
    return heads[:, :, :end_of_q], heads[:, :, end_of_q:end_of_k], heads[:, :, end_of_k:]


def _rotary(shapes: Shapes, B: int, device: torch.device) -> Iterator[Contender]:
    heads, kv_heads, head_dim = shapes.heads, shapes.kv_heads, shapes.head_dim
    qkv = torch.randn(B, 1, (heads + 2 * kv_heads) * head_dim, device=device, dtype=torch.float16)
    q, k, v = _taken_apart(qkv, shapes)
    slots = torch.full((B, 1), shapes.num_cached_tokens, device=device)
    cos, sin = reference.rotary_table(slots, head_dim, 1e4)
    expected = reference.rotary(q.float(), cos, sin)
    drawn = torch.zeros(2, B, kv_heads, shapes.num_cached_tokens + 1, head_dim, device=device, dtype=torch.float16)

    def ours(*, quantized: bool) -> Contender:
        def prepare() -> Call:
            q, k, v = _taken_apart(qkv.clone(), shapes)
            cache: dict[str, Any] = {
                name: tensor.clone() for name, tensor in _cache(drawn, quantized=quantized).items()
            }
            q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (q, k))

            def run() -> Tensor:
                return rotary_and_cache(q, k, v, cos, sin, slots, **cache, q_out=q_out, k_out=k_out)[0]

            stored = 2 * B * kv_heads * (head_dim + 2 if quantized else 2 * head_dim)
            return Call(run=run, nbytes=qkv.nbytes + q_out.nbytes + k_out.nbytes + stored + 2 * cos.nbytes)

        return Contender(
            op="rotary_and_cache",
            shape=f"{B} rows",
            engine="lite",
            dtype="int8 cache" if quantized else "float16",
            prepare=prepare,
            wrong=lambda got: worst(got, expected, "rotary_and_cache", 16),
        )

    yield ours(quantized=False)
    yield ours(quantized=True)

    def plain() -> Call:
        k_cache, v_cache = drawn.clone()
        at = torch.arange(B, device=device)[:, None]

        def run() -> Tensor:
            k_cache[at, :, slots] = reference.rotary(k, cos, sin)
            v_cache[at, :, slots] = v
            return reference.rotary(q, cos, sin)

        return Call(run=run, nbytes=2 * qkv.nbytes + k.numel() * 2 + 2 * cos.nbytes)

    yield Contender(
        op="rotary_and_cache",
        shape=f"{B} rows",
        engine="torch",
        dtype="float16",
        prepare=plain,
        wrong=lambda got: worst(got, expected, "rotary_and_cache", 16),
    )


def _pointwise(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    x, residual = torch.randn(2, M, shapes.hidden_size, device=device, dtype=torch.float16)
    weight = torch.ones(shapes.hidden_size, device=device, dtype=torch.float16)
    gate_up = torch.randn(M, 2 * shapes.inner, device=device, dtype=torch.float16)
    normed = reference.rms_norm((x + residual).float(), weight.float(), 1e-5)
    gated = reference.silu_mul(gate_up.float())

    def norm(engine: str) -> Contender:
        def prepare() -> Call:
            own_x, own_residual = x.clone(), residual.clone()
            sums, out = torch.empty_like(x), torch.empty_like(x)

            def lite() -> Tensor:
                return add_rms_norm(own_x, own_residual, weight, 1e-5, sum_out=sums, out=out)[1]

            def plain() -> Tensor:
                return functional.rms_norm(own_x + own_residual, (shapes.hidden_size,), weight, 1e-5)

            return Call(run=lite if engine == "lite" else plain, nbytes=4 * x.nbytes + weight.nbytes)

        return Contender(
            op="add_rms_norm",
            shape=f"{shapes.hidden_size}, {M} rows",
            engine=engine,
            dtype="float16",
            prepare=prepare,
            wrong=lambda got: _judged(got, normed, "add_rms_norm", engine),
        )

    def gate(engine: str) -> Contender:
        def prepare() -> Call:
            own = gate_up.clone()
            out = torch.empty(M, shapes.inner, device=device, dtype=torch.float16)

            def plain() -> Tensor:
                return functional.silu(own[:, : shapes.inner]) * own[:, shapes.inner :]

            run = (lambda: silu_mul(own, out=out)) if engine == "lite" else plain
            return Call(run=run, nbytes=own.nbytes + out.nbytes)

        return Contender(
            op="silu_mul",
            shape=f"2 × {shapes.inner}, {M} rows",
            engine=engine,
            dtype="float16",
            prepare=prepare,
            wrong=lambda got: _judged(got, gated, "silu_mul", engine),
        )

    for make in (norm, gate):
        for engine in ("lite", "torch"):
            yield make(engine)


def _sampling(shapes: Shapes, M: int, device: torch.device) -> Iterator[Contender]:
    logits = torch.randn(M, shapes.vocab_size, device=device, dtype=torch.float16) * 4
    greedy = logits.float().log_softmax(-1).amax(-1)

    def contender(engine: str, how: str, expected: Tensor, run: Callable[[Tensor], Tensor]) -> Contender:
        def prepare() -> Call:
            own = logits.clone()
            return Call(run=lambda: run(own), nbytes=own.nbytes)

        return Contender(
            op="sample",
            shape=f"{shapes.vocab_size} tokens, {M} rows, {how}",
            engine=engine,
            dtype="float16",
            prepare=prepare,
            wrong=lambda got: _judged(got, expected, "sample", engine),
        )

    for how, temperature in (("greedy", 0.0), ("nucleus of 0.9", 1.0)):
        given: dict[str, Any] = {
            "temperature": torch.full((M,), temperature, device=device),
            "top_p": torch.full((M,), 0.9, device=device),
            "seeds": torch.arange(M, device=device),
            "positions": torch.arange(M, device=device),
        }
        expected = reference.sample(logits, **given).logprobs if temperature else greedy
        yield contender("lite", how, expected, lambda own, given=given: sample(own, **given).logprobs)  # type: ignore[misc]
    yield contender("torch", "greedy", greedy, lambda own: own.float().log_softmax(-1).max(-1).values)


def _judged(got: Tensor, expected: Tensor, op: str, engine: str) -> float:
    if engine == "lite":
        return worst(got, expected, op, 16)
    return _relative(got, expected) / _PEER_TOLERANCES["float16"]


def _out(x: Tensor, N: int) -> Tensor:
    return torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device)


def _relative(got: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the difference, relative; infinite if there is a NaN."""
    difference = float((got.float() - expected).norm() / expected.norm())
    return difference if math.isfinite(difference) else math.inf


# ---- measuring


def measure(contender: Contender, *, rounds: int, bandwidth: float, time: Callable[..., Timed]) -> Row:
    """Check a contender, then time it.

    Args:
        contender: which.
        rounds: how often all copies are run.
        bandwidth: of a streaming read, bytes per second.
        time: `time_calls`, or what a test puts in its place.
    """
    row = Row(op=contender.op, shape=contender.shape, engine=contender.engine, dtype=contender.dtype)
    try:
        first = contender.prepare()
        wrong = contender.wrong(first.run())
        if wrong > 1:
            return dataclasses.replace(row, why=f"WRONG: off by {wrong:.3g} times what is allowed", is_wrong=True)
        copies = min(_MAX_COPIES, max(2, -(-_FLUSH_BYTES // first.nbytes)))
        calls = [first, *(contender.prepare() for _ in range(copies - 1))]
        timed = time([call.run for call in calls], rounds)
    except Unavailable as reason:
        return dataclasses.replace(row, why=str(reason))
    except Exception as error:
        if contender.engine.startswith("lite"):
            raise
        # Whatever a peer raises is why it is not measured.
        return dataclasses.replace(row, why=f"failed ({type(error).__name__}: {error})")
    bytes_per_s = first.nbytes / timed.call.p50
    return dataclasses.replace(
        row, time=timed.call, bytes_per_s=bytes_per_s, share=bytes_per_s / bandwidth, graph=timed.graph
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """How long one call took, on the GPU."""

    call: Quantiles
    graph: bool


def time_calls(calls: Sequence[Callable[[], Tensor]], rounds: int) -> Timed:
    """Run all calls one after the other, again and again, and divide: from one CUDA graph, if they can be captured."""
    for call in calls:  # compiles, and whatever else happens the first time
        call()
    torch.cuda.synchronize()
    graph = _captured(calls)

    def run() -> None:
        if graph is not None:
            graph.replay()
            return
        for call in calls:
            call()

    for _ in range(3):
        run()
    # torch's events have no types.
    new_event: Any = torch.cuda.Event
    events = [(new_event(enable_timing=True), new_event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 / len(calls) for start, end in events]
    return Timed(call=quantiles(seconds), graph=graph is not None)


def _captured(calls: Sequence[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph | None:
    """Capture the calls; None if one of them does what a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    kept = []
    try:
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    del kept
    return graph


# ---- the command


_HEADER: Final = ("op", "shape", "engine", "dtype", "ms", "p20–p80", "GB/s", "of bandwidth")


def table(rows: Sequence[Row]) -> str:
    """Return the figures as markdown."""
    return markdown_table(_HEADER, [_cells(row) for row in rows], left=4)


def _cells(row: Row) -> tuple[str, ...]:
    named = (row.op, row.shape, row.engine, row.dtype)
    if row.time is None or row.bytes_per_s is None or row.share is None:
        return (*named, "WRONG" if row.is_wrong else "–", "–", "–", "–")
    mark = "" if row.graph else "¹"
    spread = f"{row.time.p20 * 1e3:.4f}–{row.time.p80 * 1e3:.4f}"
    return (*named, f"{row.time.p50 * 1e3:.4f}{mark}", spread, f"{row.bytes_per_s / 1e9:,.0f}", f"{row.share:.0%}")


def report(rows: Sequence[Row], bandwidth: float, reason: str) -> str:
    """Return the figures as markdown, and what a reader has to know of them."""
    return table(rows) + "\n\n" + "\n".join(f"- {note}" for note in _notes(rows, bandwidth, reason))


def _notes(rows: Sequence[Row], bandwidth: float, reason: str) -> list[str]:
    notes = [
        f"Kernels on: {reason}. Bandwidth of a streaming read in this run: {bandwidth / 1e9:,.0f} GB/s.",
        f"Medians of {_ROUNDS} rounds over several copies, from a CUDA graph. Copies of the small ops (add_rms_norm, "
        "silu_mul, rotary_and_cache) stay within the L2 cache, as what they read does in a decoder.",
    ]
    if any(row.graph is False for row in rows):
        notes.append("¹ cannot be captured in a CUDA graph: launched one by one, which Python may have slowed down.")
    whys = dict.fromkeys((row.engine, row.why) for row in rows if row.why is not None and not row.is_wrong)
    notes += [f"{engine}: {why}." for engine, why in whys]
    return notes + [f"{row.engine}, {row.op} {row.shape}: {row.why}." for row in rows if row.is_wrong]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed kernels",
        description="Check the GPU kernels against their references at the shapes of Vicuna-7B, then time them beside "
        "torch, tinygemm, bitsandbytes and gemlite, as far as they are installed.",
        epilog="exit status: 0 all of ours are right, 1 one is not or there is no GPU, 2 wrong use.",
    )
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=[1, 8], metavar="M",
        help="rows of x, studies at a time; more than 16 is a prefill (default: 1 8)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def find_gpu() -> tuple[torch.device, Selection]:
    """Return the current GPU, and why the kernels run there.

    Raises:
        BackendUnavailable: there is no GPU, or the kernels do not run on it.
    """
    if not torch.cuda.is_available():
        msg = (
            f"got no GPU that torch {torch.__version__} sees · expected an NVIDIA GPU · run this on a machine with one"
        )
        raise BackendUnavailable(msg)
    device = torch.device("cuda", torch.cuda.current_device())
    selection = select_backend(device)
    if selection.backend != "triton" or selection.is_fallback:
        msg = f"got no kernels ({selection.reason}) · expected Triton's on {device} · install what is missing"
        raise BackendUnavailable(msg)
    return device, selection


def measure_all(
    rows: Sequence[int], device: torch.device, *, bandwidth: float, stop: Callable[[], bool] = lambda: False
) -> list[Row]:
    """Measure every contender at the shapes of Vicuna-7B.

    Args:
        rows: of x, studies at a time.
        device: a GPU.
        bandwidth: of a streaming read, bytes per second.
        stop: says before each whether the time is up.
    """
    torch.manual_seed(0)
    measured: list[Row] = []
    with torch.inference_mode():
        for contender in contenders(Shapes(), rows, device):
            if stop():
                break
            measured.append(measure(contender, rounds=_ROUNDS, bandwidth=bandwidth, time=time_calls))
            torch.cuda.empty_cache()
    return measured


def is_right(rows: Sequence[Row]) -> bool:
    """Say whether all that is ours computes what it should."""
    return not any(row.is_wrong and row.engine.startswith("lite") for row in rows)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure, print, write; return the exit status.

    Raises:
        BackendUnavailable: there is no GPU, or the kernels do not run on it.
    """
    device, selection = find_gpu()
    bandwidth = streaming_read_bandwidth(str(device))
    rows = measure_all(arguments.rows, device, bandwidth=bandwidth)
    found = versions()
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    about = (f"Machine: {machine()}.", f"Versions: {listed}.", f"Command: `{command}`.")
    sys.stdout.write("\n".join((report(rows, bandwidth, selection.reason), *(f"- {line}" for line in about))) + "\n")
    if arguments.json is not None:
        document = {
            "machine": machine(),
            "versions": found,
            "command": command,
            "bandwidth_bytes_per_s": bandwidth,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_whole(arguments.json, json.dumps(document, ensure_ascii=False, indent=1) + "\n")
    return 0 if is_right(rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    return run_command(lambda: run(arguments, shlex.join(["python", "-m", "benchmarks", "speed", "kernels", *given])))


if __name__ == "__main__":
    sys.exit(main())
