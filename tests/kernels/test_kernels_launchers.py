"""What the launchers do before a kernel runs: choose a backend, check arguments, cut the work; and weights in tiles."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from random_weights import random_gptq

from kernels import backend as backend_module
from kernels import quant_matmul as quant_matmul_module
from kernels import reference
from kernels.add_rms_norm import add_rms_norm
from kernels.backend import Card, Selection, require_backend, select_backend
from kernels.decode_attention import decode_attention
from kernels.gptq import gptq_matmul
from kernels.packing import from_tiles, pack, span_size, to_tiles, unpack
from kernels.quant_matmul import decode_plan, quant_matmul
from kernels.quant_weight import QuantWeight
from kernels.rotary_and_cache import rotary_and_cache
from kernels.sample import sample
from kernels.silu_mul import silu_mul

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


# ---- the backend


def test_a_cpu_gets_the_reference() -> None:
    assert select_backend(CPU) == Selection(backend="reference", reason="the tensors are on cpu")
    assert require_backend(CPU, None) == "reference"
    with pytest.raises(ValueError, match="got backend 'triton' on cpu .* expected tensors on an NVIDIA GPU"):
        require_backend(CPU, "triton")
    with pytest.raises(ValueError, match="got backend 'cuda' · expected reference or triton"):
        require_backend(CPU, "cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that is not there, to be changed by the test; the probe runs on it."""
    found: dict[str, Any] = {"capability": (8, 6), "triton": None, "probe": None, "hip": None}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend_module, "_card", lambda _: Card(capability=found["capability"], multiprocessors=46))
    monkeypatch.setattr(backend_module, "_triton_problem", lambda: found["triton"])
    monkeypatch.setattr(backend_module, "_probe_problem", lambda _, card, __: found["probe"] and f"{card}: no")
    backend_module._select_cuda.cache_clear()
    yield found
    backend_module._select_cuda.cache_clear()


def test_a_gpu_gets_the_kernels(card: dict[str, Any]) -> None:
    assert select_backend(CUDA) == Selection(backend="triton", reason="Card, compute capability 8.6")
    assert require_backend(CUDA, None) == "triton"
    assert require_backend(CUDA, "reference") == "reference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (6, 1)}, "Card, compute capability 6.1, and the kernels need 7.0"),
        ({"triton": "triton does not load (no): pip install triton"}, "triton does not load (no): pip install triton"),
        ({"probe": True}, "Card, compute capability 8.6: no"),
        ({"hip": "6.4"}, "a ROCm build of torch, and the kernels are written for NVIDIA"),
    ],
)
def test_a_gpu_without_kernels_falls_back_and_says_why(
    card: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    card.update(change)
    monkeypatch.setattr(torch.version, "hip", card["hip"])
    assert select_backend(CUDA) == Selection(backend="reference", reason=reason, is_fallback=True)
    with pytest.raises(ValueError, match="got backend 'triton' on cuda:0"):
        require_backend(CUDA, "triton")


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gpu.probe", raising=False)
    # `from kernels.gpu import probe` is content with the attribute.
    import kernels.gpu

    monkeypatch.delattr(kernels.gpu, "probe", raising=False)
    backend_module._triton_problem.cache_clear()
    try:
        assert "triton does not load" in (backend_module._triton_problem() or "")
        assert "pip install triton" in (backend_module._triton_problem() or "")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert select_backend(CPU).backend == "reference"
        assert select_backend(CPU).is_fallback
    finally:
        backend_module._triton_problem.cache_clear()


def test_a_compiler_that_fails_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = pytest.importorskip("kernels.gpu.probe", reason="Triton is for Linux only")

    def fails(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(probe, "run", fails)
    problem = backend_module._probe_problem(0, "Card", (8, 6))
    assert problem == "Card: triton does not compile for it (RuntimeError: Failed to find C compiler.)"
    # The compiler of an old Triton would end the process: it is not asked.
    monkeypatch.setattr(probe, "version", lambda: (3, 2))
    assert backend_module._probe_problem(0, "Card", (12, 0)) == "Card: triton 3.2 does not know it; 3.3 does"
    assert "C compiler" in (backend_module._probe_problem(0, "Card", (9, 0)) or "")


# ---- the weight in tiles


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("N", "K"), [(16, 256), (8, 8), (40, 264), (24, 1032), (56, 520)])
def test_tiles_hold_the_same_integers(bits: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # A few outputs at a time, so that there are several chunks.
    monkeypatch.setattr("kernels.packing._CHUNK_VALUES", 32 * 1280)
    qweight = random_gptq(bits, N, K, K).qweight
    tiles = to_tiles(qweight, bits)
    assert tiles.dtype == torch.int32
    assert tiles.shape == (-(-N // 16), -(-K // span_size(bits)), 16, 32)
    values = from_tiles(tiles, bits, K, N)
    assert torch.equal(values, unpack(qweight, bits).t())
    assert torch.equal(pack(values.t(), bits), qweight)  # and back, to the bit


def test_an_integer_is_where_the_drawing_has_it() -> None:
    """By the drawing alone: word w of output n in span s holds in field j the input 256 s + 32 j + w."""
    K, N = 300, 20
    values = torch.randint(0, 16, (N, 304), generator=torch.Generator().manual_seed(0))
    tiles = to_tiles(pack(values.t(), 4), 4)
    assert tiles.shape == (2, 2, 16, 32)
    for n, k in [(0, 0), (0, 1), (19, 299), (7, 31), (7, 32), (15, 255), (16, 256)]:
        s, rest = divmod(k, 256)
        j, w = divmod(rest, 32)
        assert int(tiles[n // 16, s, n % 16, w]) >> (4 * j) & 15 == int(values[n, k])
    # Beyond N and K, the zero in every field.
    assert int(tiles[1, 0, 4, 0]) & 0xFFFFFFFF == 0x88888888
    assert int(tiles[0, 1, 0, 31]) & 0xFFFFFFF0 == 0x88888880
    assert K < 304


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, -1])
def test_a_weight_in_tiles_is_the_same_weight(bits: int, group_size: int) -> None:
    gptq = random_gptq(bits, 40, 512, 512 if group_size == -1 else group_size)
    weight = QuantWeight.from_gptq(gptq)
    assert weight.shape == gptq.shape
    assert weight.device == CPU
    assert weight.nbytes == weight.tiles.nbytes + gptq.scales.nbytes
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(weight.dequantize(dtype), gptq.dequantize(dtype))
    assert torch.equal(weight.rows(5, 34, torch.float32), gptq.dequantize(torch.float32)[5:34])
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(1))
    product = quant_matmul(x, weight.to("cpu"))
    expected = gptq_matmul(x, gptq)
    # Sums of 512 products in float32, in whatever order the threads take them.
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    # And side by side with others.
    parts = [random_gptq(bits, N, 512, gptq.group_size, seed=N) for N in (8, 24)]
    whole = QuantWeight.from_gptq(gptq, *parts)
    assert whole.shape == (72, 512)
    separate = [part.dequantize(torch.float32) for part in (gptq, *parts)]
    assert torch.equal(whole.dequantize(torch.float32), torch.cat(separate))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "got weights of none"),
        ([(4, 8, 64, 32), (8, 8, 64, 32)], "got weights of 64 inputs, 4 bits, .* and 64 inputs, 8 bits"),
        ([(4, 8, 64, 32), (4, 8, 128, 32)], "expected one form"),
        ([(4, 8, 64, 32), (4, 8, 64, 64)], "groups of 32 on cpu and .* groups of 64"),
        ([(4, 8, 96, 48)], "got groups of 48 inputs · expected one of .* or all 96"),
        ([(4, 8, 64, 16)], "got groups of 16 inputs"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: list[tuple[int, int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantWeight.from_gptq(*(random_gptq(*form) for form in weights))


# ---- how a product is cut

CARDS = {"T4": 40, "RTX 3060": 28, "V100": 80, "RTX 4090": 128, "H200": 132}
LINEARS = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (8, 8), (64, 64)]


@pytest.mark.parametrize("multiprocessors", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_plan_covers_the_weight_and_leaves_no_split_empty(bits: int, multiprocessors: int) -> None:
    for shape, M in itertools.product(LINEARS, range(1, 17)):
        plan = decode_plan(M, shape, bits, Card(capability=(8, 0), multiprocessors=multiprocessors))
        spans = -(-shape[1] // span_size(bits))
        per_split = -(-spans // plan.splits)
        assert per_split * plan.splits >= spans
        assert per_split * (plan.splits - 1) < spans
        assert 1 <= plan.splits <= 16
        assert plan.rows in (1, 2, 4)
        assert plan.rows < 2 * M
        assert plan.block_n % 16 == 0


def test_a_plan_fills_the_card_but_not_more_than_once() -> None:
    card = Card(capability=(8, 9), multiprocessors=46)
    assert decode_plan(1, (4096, 4096), 4, card).splits == 2  # 128 programs; 368 have room
    assert decode_plan(1, (32000, 4096), 4, card).splits == 1  # 1,000 programs already
    assert decode_plan(1, (4096, 11008), 4, Card(capability=(8, 9), multiprocessors=128)).splits == 8


# ---- cuBLAS's switch


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = torch.backends.cuda.matmul
    if not hasattr(found, "allow_fp16_accumulation"):
        pytest.skip("torch before 2.7 has no such switch")
    return found


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_fp16_accumulation_is_put_back(switch: Any, *, before: bool, wanted: bool) -> None:
    was = switch.allow_fp16_accumulation
    try:
        switch.allow_fp16_accumulation = before
        with quant_matmul_module._accumulating(in_float16=wanted):
            assert switch.allow_fp16_accumulation == wanted
        assert switch.allow_fp16_accumulation == before
        with pytest.raises(KeyError), quant_matmul_module._accumulating(in_float16=wanted):
            raise KeyError
        assert switch.allow_fp16_accumulation == before
    finally:
        switch.allow_fp16_accumulation = was


def test_fp16_accumulation_takes_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    with quant_matmul_module._accumulating(in_float16=False):
        pass
    with (
        pytest.raises(ValueError, match="got fp16_accumulation with torch .* expected torch 2.7"),
        quant_matmul_module._accumulating(in_float16=True),
    ):
        pass


# ---- the reference backend, and what is refused


def test_on_a_cpu_the_references_compute() -> None:
    weight = QuantWeight.from_gptq(random_gptq(4, 40, 96, 32))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(quant_matmul(x, weight), reference.quant_matmul(x, weight))
    gate_up = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(silu_mul(gate_up), torch.nn.functional.silu(gate_up[:, :5]) * gate_up[:, 5:])
    total, normed = add_rms_norm(x, x, x[0], 1e-5)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, reference.rms_norm(x + x, x[0], 1e-5))


@pytest.mark.parametrize("scales_dtype", [None, torch.float16])
def test_the_reference_of_attention_over_the_cache_is_that_of_a_whole_prompt(scales_dtype: torch.dtype | None) -> None:
    """Tokens put in one after the other see what they see within a prompt."""
    B, T, heads, kv_heads, head_dim, slots = 2, 6, 4, 2, 8, 9
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, (heads + 2 * kv_heads) * head_dim, generator=generator)
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=-2)
    at = torch.arange(T).expand(B, T).contiguous()
    cos, sin = reference.rotary_table(at, head_dim, 1e4)
    shape = (B, kv_heads, slots, head_dim)
    nan = float("nan")
    cache = {name: torch.full(shape, nan) for name in ("k_cache", "v_cache")}
    if scales_dtype is not None:
        cache = {name: torch.full(shape, 99, dtype=torch.int8) for name in cache}
        cache |= {name: torch.full(shape[:3], nan, dtype=scales_dtype) for name in ("k_scales", "v_scales")}
    turned_q, turned_k = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
    whole = reference.attention(*(x.transpose(1, 2) for x in (turned_q, turned_k, v)), at)  # [B, heads, T, head_dim]
    for t in range(T):
        token = [x[:, t : t + 1] for x in (q, k, v, cos, sin, at)]
        token[3:] = [x.contiguous() for x in token[3:]]
        got_q, got_k = rotary_and_cache(*token, **cache)
        torch.testing.assert_close(got_q, turned_q[:, t : t + 1])
        torch.testing.assert_close(got_k, turned_k[:, t : t + 1])
        attended = decode_attention(got_q[:, 0], lengths=torch.full((B,), t + 1), **cache)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if scales_dtype is None else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(attended, whole[:, :, t], **tolerance)


def good(op: str) -> dict[str, Any]:
    """Arguments that fit."""
    q, k_cache, v_cache = torch.zeros(2, 4, 8), *torch.zeros(2, 2, 2, 5, 8)
    if op == "quant_matmul":
        return {"x": torch.zeros(3, 96), "weight": QuantWeight.from_gptq(random_gptq(4, 40, 96, 32))}
    if op == "decode_attention":
        return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "lengths": torch.ones(2, dtype=torch.int32)}
    if op == "rotary_and_cache":
        tokens = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 2, 8), "v": torch.zeros(2, 3, 2, 8)}
        tables = {"cos": torch.zeros(2, 3, 4), "sin": torch.zeros(2, 3, 4), "slots": torch.zeros(2, 3).long()}
        return tokens | tables | {"k_cache": k_cache, "v_cache": v_cache}
    if op == "add_rms_norm":
        return {"x": torch.zeros(3, 7), "residual": torch.zeros(3, 7), "weight": torch.zeros(7), "eps": 1e-5}
    if op == "sample":
        integers = {"seeds": torch.zeros(3).long(), "positions": torch.zeros(3).long()}
        return {"logits": torch.zeros(3, 9), "temperature": torch.ones(3), "top_p": torch.ones(3)} | integers
    return {"gate_up": torch.zeros(3, 14)}


OPS: dict[str, Any] = {
    "quant_matmul": quant_matmul,
    "decode_attention": decode_attention,
    "rotary_and_cache": rotary_and_cache,
    "add_rms_norm": add_rms_norm,
    "silu_mul": silu_mul,
    "sample": sample,
}


@pytest.mark.parametrize("op", OPS)
def test_what_fits_is_taken(op: str) -> None:
    OPS[op](**good(op))


INT8 = {"k_cache": torch.zeros(2, 2, 5, 8, dtype=torch.int8), "v_cache": torch.zeros(2, 2, 5, 8, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("quant_matmul", {"x": torch.zeros(3, 95)}, "expected a last dimension of 96"),
        ("quant_matmul", {"x": torch.zeros(3, 96).long()}, "got x torch.int64 · expected float16"),
        ("quant_matmul", {"backend": "triton"}, "got backend 'triton' on cpu"),
        ("decode_attention", {"q": torch.zeros(2, 8)}, "got q .* expected .B, T, heads, head_dim."),
        ("decode_attention", {"q": torch.zeros(2, 3, 8)}, "heads a multiple of kv_heads"),
        ("decode_attention", {"q": torch.zeros(3, 4, 8)}, "expected one B"),
        ("decode_attention", {"q": torch.zeros(8, 4, 2).permute(2, 1, 0)}, "got q with strides"),
        ("decode_attention", {"v_cache": torch.zeros(2, 2, 6, 8)}, r"got v_cache \[2, 2, 6, 8\]"),
        ("decode_attention", {"v_cache": torch.zeros(2, 5, 2, 8).transpose(1, 2)}, "got v_cache .* with strides"),
        ("decode_attention", {"k_cache": torch.zeros(2, 2, 5, 8).half()}, "got k_cache torch.float16 · expected"),
        ("decode_attention", INT8, "got a cache of torch.int8 and not both .* expected k_scales and v_scales"),
        ("decode_attention", {"k_scales": torch.zeros(2, 2, 5)}, "expected no scales"),
        (
            "decode_attention",
            INT8 | {"k_scales": torch.zeros(2, 2, 5), "v_scales": torch.zeros(2, 2, 5).half()},
            "got v_scales .* expected .* like k_scales",
        ),
        (
            "decode_attention",
            INT8 | {"k_scales": torch.zeros(2, 2, 4), "v_scales": torch.zeros(2, 2, 4)},
            r"got k_scales \[2, 2, 4\] .* expected .* \[2, 2, 5\]",
        ),
        ("decode_attention", {"lengths": torch.ones(3).int()}, r"got lengths \[3, 1\]"),
        ("decode_attention", {"lengths": torch.ones(2)}, "got lengths .* torch.float32"),
        ("rotary_and_cache", {"q": torch.zeros(2, 3, 4, 7)}, "head_dim even"),
        ("rotary_and_cache", {"k": torch.zeros(2, 3, 1, 8)}, r"got k \[2, 3, 1, 8\]"),
        ("rotary_and_cache", {"v": torch.zeros(2, 3, 2, 8).half()}, "got v .* torch.float16"),
        ("rotary_and_cache", {"v": torch.zeros(2, 2, 3, 8).transpose(1, 2)}, "got v with strides"),
        ("rotary_and_cache", {"cos": torch.zeros(2, 3, 8)}, r"got cos \[2, 3, 8\]"),
        ("rotary_and_cache", {"sin": torch.zeros(2, 3, 4).double()}, "got sin .* torch.float64"),
        ("rotary_and_cache", {"slots": torch.zeros(2, 3)}, "got slots torch.float32"),
        ("rotary_and_cache", {"slots": torch.zeros(2, 1).long().expand(2, 3)}, "got slots with strides"),
        ("rotary_and_cache", {"k_cache": torch.zeros(1, 2, 5, 8)}, r"got k_cache \[1, 2, 5, 8\]"),
        ("rotary_and_cache", INT8, "expected k_scales and v_scales"),
        ("add_rms_norm", {"residual": torch.zeros(3, 8)}, "got residual"),
        ("add_rms_norm", {"weight": torch.zeros(7).half()}, "got weight"),
        ("add_rms_norm", {"x": torch.zeros(7, 3).t()}, "got x with strides"),
        ("add_rms_norm", {"x": torch.zeros(3, 0)}, "got x"),
        ("silu_mul", {"gate_up": torch.zeros(3, 13)}, "expected contiguous"),
        ("silu_mul", {"gate_up": torch.zeros(14, 3).t()}, "expected contiguous"),
        ("sample", {"logits": torch.zeros(9)}, r"got logits \[9\] · expected \[N, V\]"),
        ("sample", {"logits": torch.zeros(3, 70000)}, "V at most 65536"),
        ("sample", {"logits": torch.zeros(9, 3).t()}, "got logits with strides"),
        ("sample", {"logits": torch.zeros(3, 9).long()}, "got logits torch.int64 · expected float16"),
        ("sample", {"temperature": torch.zeros(1)}, r"got temperature \[1\] .* expected \[3\]"),
        ("sample", {"top_p": torch.ones(3).half()}, "got top_p .* torch.float16"),
        ("sample", {"seeds": torch.zeros(3).int()}, "got seeds .* torch.int32"),
        ("sample", {"positions": torch.zeros(1).long().expand(3)}, "got positions with strides"),
        ("sample", {"num_top": 10}, "got num_top 10 · expected 0 … 9"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS[op](**(good(op) | change))
