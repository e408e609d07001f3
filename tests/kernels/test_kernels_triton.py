"""The Triton kernels against their references, on odd shapes, outputs and unseen cache slots poisoned with NaN.

`triton_here.py` says where they run.
"""

from __future__ import annotations

import pytest
import torch
import triton_here
from random_weights import random_gptq
from triton_here import DEVICE, MARKS, NAN, Launches, full, names, poison, randn
from within import assert_within

from kernels import quant_matmul as quant_matmul_module
from kernels import reference
from kernels.add_rms_norm import add_rms_norm
from kernels.backend import card_of, select_backend
from kernels.decode_attention import decode_attention
from kernels.gptq import GptqWeight, to_tensors
from kernels.quant_matmul import decode_plan, quant_matmul
from kernels.quant_weight import QuantWeight
from kernels.rotary_and_cache import rotary_and_cache
from kernels.silu_mul import silu_mul

pytestmark = MARKS
launches, poisoned = triton_here.launches, triton_here.poisoned

# N, K, group size: N beside the tiles of 16 and 32 outputs, K beside the spans of 256 (4 bits) and 128 inputs (8 bits).
WEIGHTS = [
    (40, 320, 32),
    pytest.param(24, 384, 64, marks=pytest.mark.full),
    pytest.param(56, 640, 128, marks=pytest.mark.full),
    (8, 1032, 1032),
]


def test_the_backend_is_triton() -> None:
    selection = select_backend(DEVICE)
    assert selection.backend == "triton"
    assert not selection.is_fallback
    assert selection.reason


# ---- quant_matmul


@pytest.mark.parametrize("M", [1, 3, *full(2, 13)])
@pytest.mark.parametrize(("N", "K", "group_size"), WEIGHTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quant_matmul_decode(bits: int, N: int, K: int, group_size: int, M: int, launches: Launches) -> None:
    weight = QuantWeight.from_gptq(random_gptq(bits, N, K, group_size)).to(DEVICE)
    x = randn(M, K)
    got = quant_matmul(x.to(DEVICE), weight)
    plan = decode_plan(M, (N, K), bits, card_of(DEVICE))
    assert names(launches) == ["partial_products_kernel"] + ["sum_partials_kernel"] * (plan.splits > 1)
    assert_within(got, reference.quant_matmul(x.float(), weight.to("cpu")), "quant_matmul decode", bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_quant_matmul_decode_in_splits_of_different_length(bits: int, launches: Launches) -> None:
    spans = 11
    weight = QuantWeight.from_gptq(random_gptq(bits, 16, spans * 1024 // bits, 128)).to(DEVICE)
    plan = decode_plan(1, weight.shape, bits, card_of(DEVICE))
    assert plan.splits > 1
    assert spans % plan.splits
    x = randn(1, weight.shape[1])
    got = quant_matmul(x.to(DEVICE), weight)
    assert names(launches) == ["partial_products_kernel", "sum_partials_kernel"]
    assert launches[0][1][2] == plan.splits
    assert_within(got, reference.quant_matmul(x.float(), weight.to("cpu")), "quant_matmul decode", bits)
    assert torch.equal(got, quant_matmul(x.to(DEVICE), weight))  # to the bit, every time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quant_matmul_decode_in_other_dtypes(dtype: torch.dtype, launches: Launches) -> None:
    weight = QuantWeight.from_gptq(random_gptq(4, 40, 320, 32)).to(DEVICE)
    x = randn(3, 320, dtype=dtype)
    got = quant_matmul(x.to(DEVICE), weight)
    assert names(launches)[0] == "partial_products_kernel"
    assert_within(got, reference.quant_matmul(x.float(), weight.to("cpu")), "quant_matmul decode", 4)


@pytest.mark.parametrize("bits", [8, *full(4)])
def test_quant_matmul_is_exact_for_the_largest_and_the_smallest_scales(bits: int) -> None:
    """All integers at all places of a word, one at a time: the product is the weight, and that is exact in float32."""
    half, K = 1 << (bits - 1), 1024 // bits
    values = (torch.arange(16)[:, None] + torch.arange(K) * (2 * half // 16) + 1) % (2 * half) - half
    scales = torch.tensor([65504.0, 2.0**-24, 2.0**-14, 0.0, 1 / 3, 1.0, 2.0**-23, 3e-6]).half()
    scales = torch.cat([scales, -scales])[:, None]
    gptq = GptqWeight.from_tensors(to_tensors(values, scales, bits=bits), bits=bits)
    weight = QuantWeight.from_gptq(gptq).to(DEVICE)
    identity = torch.eye(K)
    for begin in range(0, K, 16):
        got = quant_matmul(identity[begin : begin + 16].to(DEVICE), weight)
        assert torch.equal(got.cpu().t(), gptq.dequantize(torch.float32)[:, begin : begin + 16])


@pytest.mark.parametrize("M", [17, *full(40)])
@pytest.mark.parametrize(("N", "K", "group_size"), WEIGHTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quant_matmul_prefill(
    bits: int, N: int, K: int, group_size: int, M: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_matmul_module, "SCRATCH_VALUES", 16 * K)  # 16 outputs at a time
    weight = QuantWeight.from_gptq(random_gptq(bits, N, K, group_size)).to(DEVICE)
    x = randn(M, K)
    got = quant_matmul(x.to(DEVICE), weight)
    assert names(launches) == ["dequantize_kernel"] * -(-N // 16)
    assert_within(got, reference.quant_matmul(x.float(), weight.to("cpu")), "quant_matmul prefill", bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_prefill_multiplies_by_the_weight_that_is_stored(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to torch's product is, bit for bit, the weight of `kernels.gptq`."""
    gptq = random_gptq(bits, 40, 320, 64)
    seen: list[torch.Tensor] = []
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda x, w, **kw: seen.append(w.t().clone()) or matmul(x, w, **kw))
    quant_matmul(randn(17, 320, dtype=dtype).to(DEVICE), QuantWeight.from_gptq(gptq).to(DEVICE))
    assert torch.equal(torch.cat(seen).cpu(), gptq.dequantize(dtype))


@pytest.mark.parametrize("M", [1, 20])
def test_linears_side_by_side_are_one_launch(M: int, launches: Launches) -> None:
    parts = [random_gptq(4, N, 320, 32, seed=seed) for seed, N in enumerate((40, 8, 24))]
    weight = QuantWeight.from_gptq(*parts).to(DEVICE)
    x = randn(M, 320)
    got = quant_matmul(x.to(DEVICE), weight)
    assert len([name for name in names(launches) if name != "sum_partials_kernel"]) == 1
    for part, product in zip(parts, got.split([40, 8, 24], dim=-1), strict=True):
        expected = reference.quant_matmul(x.float(), QuantWeight.from_gptq(part))
        assert_within(product, expected, "quant_matmul decode" if M == 1 else "quant_matmul prefill", 4)


def test_quant_matmul_takes_rows_with_gaps_and_any_number_of_axes(launches: Launches) -> None:
    weight = QuantWeight.from_gptq(random_gptq(4, 40, 320, 32)).to(DEVICE)
    wide = randn(2, 3, 1, 700)
    wide[..., 320:] = NAN
    got = quant_matmul(wide.to(DEVICE)[..., :320], weight)
    assert got.shape == (2, 3, 1, 40)
    assert_within(got, reference.quant_matmul(wide[..., :320].float(), weight.to("cpu")), "quant_matmul decode", 4)
    turned = randn(320, 5)
    got = quant_matmul(turned.to(DEVICE).t(), weight)
    assert_within(got, reference.quant_matmul(turned.t().float(), weight.to("cpu")), "quant_matmul decode", 4)
    before = len(launches)
    assert quant_matmul(torch.zeros(0, 320, dtype=torch.float16, device=DEVICE), weight).shape == (0, 40)
    assert len(launches) == before


# ---- decode_attention

# B, heads, kv_heads, S, head_dim, lengths: none a multiple of a tile; the last but one has rows of nothing and of all.
ATTENTION = [
    (3, 4, 2, 150, 24, (1, 7, 129)),
    (1, 2, 2, 65, 128, (65,)),
    (3, 3, 1, 64, 16, (0, 64, 63)),
    (1, 1, 1, 1100, 8, (1089,)),  # more tiles than are combined at a time
]


def poisoned_cache(
    kv_heads: int, slots: int, head_dim: int, lengths: tuple[int, ...], scales_dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """A layer of a larger cache, unseen slots poisoned: k_cache and v_cache, and the scales of an int8 cache."""
    cache: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("k", "v")):
        values = randn(2, len(lengths), kv_heads, slots, head_dim, seed=seed)
        scales = None
        if scales_dtype is not None:
            values, scales = reference.quantize_vectors(values, scales_dtype)
        for row, length in enumerate(lengths):
            values[:, row, :, length:] = 127 if scales is not None else NAN
            if scales is not None:
                scales[:, row, :, length:] = NAN
        cache[f"{name}_cache"] = values.to(DEVICE)[1]
        if scales is not None:
            cache[f"{name}_scales"] = scales.to(DEVICE)[1]
    return cache


def on_cpu(cache: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in cache.items()}


@pytest.mark.parametrize("scales_dtype", [None, torch.float16, *full(torch.float32)])
@pytest.mark.parametrize(("B", "heads", "kv_heads", "slots", "head_dim", "lengths"), ATTENTION)
def test_decode_attention(
    B: int, heads: int, kv_heads: int, slots: int, head_dim: int, lengths: tuple[int, ...],
    scales_dtype: torch.dtype | None, launches: Launches,
) -> None:  # fmt: skip
    cache = poisoned_cache(kv_heads, slots, head_dim, lengths, scales_dtype)
    q = randn(B, heads, head_dim, seed=2) * 3  # scores far from each other: without their maximum exp() would overflow
    seen = torch.tensor(lengths, dtype=torch.int32)
    got = decode_attention(q.to(DEVICE), lengths=seen.to(DEVICE), **cache)
    tiles = -(-slots // 64)
    assert launches == [("partial_attention_kernel", (tiles, B * heads)), ("combine_kernel", (B * heads,))]
    expected = reference.decode_attention(q.float(), lengths=seen, **on_cpu(cache))
    assert_within(got, expected, "decode_attention", 16 if scales_dtype is None else 8)


@pytest.mark.parametrize("scales_dtype", [None, torch.float16])
def test_drafted_tokens_see_to_the_bit_what_each_sees_by_itself(
    scales_dtype: torch.dtype | None, launches: Launches
) -> None:
    """One launch reads a tile for all; what only later ones see, and what a row that is free holds, may be a NaN."""
    cache = poisoned_cache(2, 150, 24, (66, 64, 0), scales_dtype)
    q, seen = randn(3, 3, 4, 24, seed=2) * 3, torch.tensor([[64, 65, 66], [62, 63, 64], [0, 0, 0]])
    together = decode_attention(q.to(DEVICE), lengths=seen.to(DEVICE), **cache)
    assert launches == [("partial_attention_kernel", (3, 12)), ("combine_kernel", (36,))]
    assert_within(
        together, reference.decode_attention(q.float(), lengths=seen, **on_cpu(cache)), "decode_attention",
        16 if scales_dtype is None else 8,
    )  # fmt: skip
    for token in range(3):
        alone = decode_attention(q[:, token].to(DEVICE), lengths=seen[:, token].contiguous().to(DEVICE), **cache)
        assert torch.equal(together[:, token], alone)
    later = {name: tensor.clone() for name, tensor in cache.items()}
    name = "v_cache" if scales_dtype is None else "v_scales"
    later[name][0, :, 65:] = NAN
    assert torch.equal(decode_attention(q.to(DEVICE), lengths=seen.to(DEVICE), **later)[:, :2], together[:, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decode_attention_in_other_dtypes(dtype: torch.dtype, launches: Launches) -> None:
    q = randn(2, 2, 16, dtype=dtype)
    k, v = randn(2, 2, 2, 70, 16, seed=1, dtype=dtype)
    lengths = torch.tensor([70, 3])
    got = decode_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), lengths.to(DEVICE))
    assert names(launches) == ["partial_attention_kernel", "combine_kernel"]
    assert_within(got, reference.decode_attention(q.float(), k.float(), v.float(), lengths), "decode_attention", 16)


@pytest.mark.parametrize("rising", [False, True])
def test_the_largest_score_may_come_last(*, rising: bool) -> None:
    """Over 18 tiles, 16 of which are combined at a time, the running maximum changes, or does not."""
    q, (k, v) = torch.ones(1, 1, 8).half(), randn(2, 1, 1, 1100, 8, seed=1)
    k += torch.linspace(-2, 2, 1100)[:, None] * (1 if rising else -1)
    lengths = torch.tensor([1100])
    got = decode_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), lengths.to(DEVICE))
    assert_within(got, reference.decode_attention(q.float(), k.float(), v.float(), lengths), "decode_attention", 16)


def test_other_lengths_are_the_same_launches(launches: Launches) -> None:
    """One CUDA graph serves every token; a row that has ended may have a length beyond the cache."""
    q, (k, v) = randn(2, 2, 16), randn(2, 2, 1, 70, 16, seed=1)
    for lengths in (torch.tensor([1000, 5]), torch.tensor([10, 0])):
        got = decode_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), lengths.to(DEVICE))
        expected = reference.decode_attention(q.float(), k.float(), v.float(), lengths.clamp(max=70))
        assert_within(got, expected, "decode_attention", 16)
    assert launches == [("partial_attention_kernel", (2, 4)), ("combine_kernel", (4,))] * 2


# ---- rotary_and_cache


@pytest.mark.parametrize("scales_dtype", [None, torch.float16, *full(torch.float32)])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 6), *full((4, 2, 24)), (1, 1, 128)])
def test_rotary_and_cache(
    heads: int, kv_heads: int, head_dim: int, scales_dtype: torch.dtype | None, launches: Launches
) -> None:
    B, T, slots = 3, 5, 9
    qkv = randn(B, T, (heads + 2 * kv_heads) * head_dim)
    qkv[0, 0] = 0  # vectors of zeros: a scale of 0
    # Ragged rows, a slot of -1 for padding, and one beyond the end.
    at = torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [2, -1, 3, 9, 5]])
    cos, sin = reference.rotary_table(at.clamp(min=0) * 100, head_dim, 1e4)
    shape = (2, B, kv_heads, slots, head_dim)  # of two layers, of which the second is written
    stored = torch.float16 if scales_dtype is None else torch.int8
    untouched = NAN if scales_dtype is None else 99
    cache = {name: torch.full(shape, untouched, dtype=stored, device=DEVICE) for name in ("k_cache", "v_cache")}
    if scales_dtype is not None:
        cache |= {name: poison(*shape[:-1], dtype=scales_dtype) for name in ("k_scales", "v_scales")}
    layer = {name: tensor[1] for name, tensor in cache.items()}
    q, k, v = qkv.to(DEVICE).unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=-2)
    tables = [tensor.to(DEVICE) for tensor in (cos, sin, at)]
    got_q, got_k = rotary_and_cache(q, k, v, *tables, **layer)
    assert launches == [("rotary_and_cache_kernel", (B * T, heads + 2 * kv_heads))]
    assert_within(got_q, reference.rotary(q.cpu().float(), cos, sin), "rotary_and_cache", 16)
    assert_within(got_k, reference.rotary(k.cpu().float(), cos, sin), "rotary_and_cache", 16)
    # The cache: what was returned, put or rounded slot by slot, and nothing else.
    for name, vectors in (("k", got_k.cpu()), ("v", v.cpu())):
        values, scales = cache[f"{name}_cache"].cpu(), cache.get(f"{name}_scales")
        expected = torch.full(shape, untouched, dtype=stored)
        expected_scales = torch.full(shape[:-1], NAN)
        for row in range(B):
            for token, slot in enumerate(at[row].tolist()):
                if not 0 <= slot < slots:
                    continue
                vector = vectors[row, token]
                if scales_dtype is not None:
                    vector, vector_scales = reference.quantize_vectors(vector, scales_dtype)
                    expected_scales[1, row, :, slot] = vector_scales.float()
                expected[1, row, :, slot] = vector
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
        if scales is not None:
            torch.testing.assert_close(scales.cpu().float(), expected_scales, rtol=0, atol=0, equal_nan=True)


def test_ties_and_the_largest_magnitude_round_as_in_torch(launches: Launches) -> None:
    """With a scale of exactly 1, halves go to the even neighbour; with one rounded down, nothing goes beyond 127."""
    v = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5]).half().view(1, 1, 1, 8)
    # 1e-5 / 127 is 1.3 of the smallest numbers of float16: it becomes 1 of them.
    k = torch.tensor([1e-5, -1e-5, 3e-6, 0, 0, 0, 0, 2.0**-24]).half().view(1, 1, 1, 8)
    k_cache, v_cache = torch.full((2, 1, 1, 1, 8), 99, dtype=torch.int8, device=DEVICE)
    k_scales, v_scales = poison(2, 1, 1, 1)
    cos, sin = torch.ones(1, 1, 4, device=DEVICE), torch.zeros(1, 1, 4, device=DEVICE)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    inputs = (k.to(DEVICE), k.to(DEVICE), v.to(DEVICE), cos, sin, slots)
    rotary_and_cache(*inputs, k_cache, v_cache, k_scales=k_scales, v_scales=v_scales)
    assert names(launches) == ["rotary_and_cache_kernel"]
    assert v_scales.item() == 1.0
    assert v_cache.flatten().tolist() == [127, 0, 2, 2, 0, -2, -126, 126]
    assert k_scales.item() == 2.0**-24
    assert k_cache.flatten().tolist() == [127, -127, 50, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary_and_cache_in_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = randn(3, 2, 3, 2, 16, dtype=dtype)
    at = torch.arange(3).expand(2, 3).contiguous()
    cos, sin = reference.rotary_table(at, 16, 1e4)
    k_cache, v_cache = poison(2, 2, 2, 4, 16, dtype=dtype)
    inputs = [tensor.to(DEVICE) for tensor in (q, k, v, cos, sin, at)]
    got_q, got_k = rotary_and_cache(*inputs, k_cache, v_cache)
    assert_within(got_q, reference.rotary(q.float(), cos, sin), "rotary_and_cache", 16)
    assert torch.equal(k_cache[:, :, :3].transpose(1, 2), got_k)
    assert torch.equal(v_cache[:, :, :3].transpose(1, 2).cpu(), v)
    assert v_cache[:, :, 3].isnan().all()


# ---- add_rms_norm and silu_mul


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 1, 129), (2, 4100)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *full(torch.bfloat16)])
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, launches: Launches) -> None:
    x, residual = randn(2, *shape, dtype=dtype)
    weight = randn(shape[-1], seed=1, dtype=dtype)
    inputs = [tensor.to(DEVICE) for tensor in (x, residual, weight)]
    got_sum, got = add_rms_norm(*inputs, 1e-5)
    rows = x.numel() // shape[-1]
    assert launches == [("add_rms_norm_kernel", (rows,))]
    assert_within(got_sum, x.float() + residual.float(), "add_rms_norm", 16)
    # Of the sum as it was rounded.
    expected = reference.rms_norm(got_sum.cpu().float(), weight.float(), 1e-5)
    assert_within(got, expected, "add_rms_norm", 16)


def test_add_rms_norm_beyond_the_squares_of_half_precision() -> None:
    x, residual, weight = randn(2, 33), torch.full((2, 33), 3e4, dtype=torch.float16), randn(33, seed=1)
    got_sum, got = add_rms_norm(x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE), 1e-6)
    assert torch.equal(got_sum.cpu(), x + residual)
    assert_within(got, reference.rms_norm((x + residual).float(), weight.float(), 1e-6), "add_rms_norm", 16)


@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 1, 2060)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, *full(torch.bfloat16)])
def test_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, launches: Launches) -> None:
    gate_up = randn(*shape, dtype=dtype) * 4
    inner = shape[-1] // 2
    gate_up.view(-1, 2 * inner)[0, 0] = -300  # exp(300) overflows; the product is 0 all the same
    got = silu_mul(gate_up.to(DEVICE))
    assert launches == [("silu_mul_kernel", (gate_up.numel() // shape[-1], -(-inner // 1024)))]
    assert_within(got, reference.silu_mul(gate_up.float()), "silu_mul", 16)
