"""Weights in the forms of bitsandbytes, written and read, against the library itself."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import kernels.reference
from export.quantize.bnb import BnbFormat, quantize_int8, quantize_nf4
from kernels.bnb import NF4_QUANT_STATE_KEY, Int8Weight, Nf4Weight, import_bitsandbytes, int8_matmul, nf4_matmul

pytest.importorskip("bitsandbytes")

FORMATS: list[BnbFormat] = ["bnb-nf4", "bnb-int8"]
NF4_SHAPES = [(1, 64), (3, 64), (5, 192), (37, 576), (256, 128)]  # 1, 3, 15, 333 and 512 blocks
INT8_SHAPES = [(1, 1), (3, 5), (7, 64), (33, 130)]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def random_weight(shape: tuple[int, int], *, dtype: torch.dtype = torch.float16, scale: float = 0.02) -> torch.Tensor:
    """Draw a weight whose blocks differ in size, as the channels of a real one do."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    channels = torch.randn(shape[1], generator=generator).exp()
    return (torch.randn(shape, generator=generator) * channels * scale).to(dtype)


def quantised(decoder_format: BnbFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return quantize_nf4(weight) if decoder_format == "bnb-nf4" else quantize_int8(weight)


def stored(decoder_format: BnbFormat, tensors: dict[str, torch.Tensor]) -> Nf4Weight | Int8Weight:
    return (Nf4Weight if decoder_format == "bnb-nf4" else Int8Weight).from_tensors(tensors)


def dequantised(decoder_format: BnbFormat, weight: torch.Tensor) -> torch.Tensor:
    return stored(decoder_format, quantised(decoder_format, weight)).dequantize(torch.float32)


def matmul(decoder_format: BnbFormat, x: torch.Tensor, weight: Any) -> torch.Tensor:
    return nf4_matmul(x, weight) if decoder_format == "bnb-nf4" else int8_matmul(x, weight)


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 1e-7])  # the second is subnormal in float16
@pytest.mark.parametrize("shape", NF4_SHAPES)
def test_nf4_is_the_librarys_to_the_bit(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    library = import_bitsandbytes().functional
    packed, state = library.quantize_4bit(
        random_weight(shape, dtype=torch.float32, scale=scale), quant_type="nf4", compress_statistics=True
    )
    tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    state.dtype = dtype
    assert same_bytes(Nf4Weight.from_tensors(tensors).dequantize(dtype), library.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", INT8_SHAPES)
def test_int8_is_the_librarys(shape: tuple[int, int]) -> None:
    tensors = quantize_int8(random_weight(shape))
    expected = import_bitsandbytes().functional.int8_vectorwise_dequant(tensors["weight"], tensors["SCB"])
    torch.testing.assert_close(Int8Weight.from_tensors(tensors).dequantize(torch.float32), expected, rtol=3e-7, atol=0)
    # Rounded once: float16 differs from it by half a unit in the last place.
    half = Int8Weight.from_tensors(tensors).dequantize(torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=2**-11 * 1.01, atol=2**-25)


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_zeros_stay_zeros(decoder_format: BnbFormat) -> None:
    weight = torch.zeros(3, 128, dtype=torch.float16)
    assert torch.equal(dequantised(decoder_format, weight), weight.float())
    weight[1] = random_weight((1, 128))[0]
    back = dequantised(decoder_format, weight)
    assert bool(torch.isfinite(back).all())
    if decoder_format == "bnb-int8":
        assert torch.equal(back[::2], torch.zeros(2, 128))


@pytest.mark.parametrize("chunk_values", [1, 300, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5)])
@pytest.mark.parametrize("decoder_format", FORMATS)
def test_matmul_is_the_product_with_the_dequantised_weight(
    decoder_format: BnbFormat, rows: tuple[int, ...], dtype: torch.dtype, chunk_values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels.reference, "ROWS_VALUES", chunk_values)  # one row of the weight, two, all of it
    packed = stored(decoder_format, quantised(decoder_format, random_weight((37, 128))))
    x = torch.randn(*rows, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = matmul(decoder_format, x, packed)
    weight = packed.dequantize(dtype)
    assert got.dtype == dtype
    assert got.shape == (*rows, 37)
    exact = (x.double() @ weight.double().t()).to(dtype)
    torch.testing.assert_close(got, exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_int8_matmul_does_not_overflow_half_precision() -> None:
    """The sum of int8 times x is beyond float16 although the product, 127 times less and more, is not."""
    tensors = quantize_int8(torch.full((2, 64), 0.01, dtype=torch.float16))
    x = torch.full((1, 64), 100.0, dtype=torch.float16)
    got = int8_matmul(x, Int8Weight.from_tensors(tensors))
    torch.testing.assert_close(got, torch.full((1, 2), 64.0, dtype=torch.float16), rtol=1e-2, atol=0)


def test_a_weight_is_so_large_and_moves_whole() -> None:
    """Move to "meta", which every machine has."""
    weight = random_weight((256, 128))
    sizes = {"bnb-nf4": 256 * 128 // 2 + 512 + 4 * (16 + 2 + 256 + 1), "bnb-int8": 256 * 128 + 4 * 256}
    for decoder_format in FORMATS:
        here = stored(decoder_format, quantised(decoder_format, weight))
        moved = here.to("meta")
        assert moved.shape == here.shape == (256, 128)
        assert moved.nbytes == here.nbytes == sizes[decoder_format]
        assert moved.dequantize(torch.float16).is_meta


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_x_of_another_width_is_refused(decoder_format: BnbFormat) -> None:
    weight = stored(decoder_format, quantised(decoder_format, random_weight((5, 192))))
    with pytest.raises(ValueError, match=r"got x \[2, 64\] for a weight \[5, 192\] · expected a last dimension of 192"):
        matmul(decoder_format, torch.zeros(2, 64), weight)


MAP, ABSMAX = "weight.nested_quant_map", "weight.nested_absmax"
UINT8, INT8 = torch.uint8, torch.int8


@pytest.mark.parametrize(
    ("decoder_format", "damage", "message"),
    [
        ("bnb-nf4", {"weight.absmax": None}, r"missing or unknown: weight\.absmax$"),
        ("bnb-nf4", {"bias": torch.zeros(3)}, r"missing or unknown: bias$"),
        ("bnb-nf4", {"weight": torch.zeros(96, 1, dtype=UINT8)}, r"^weight: got \[96, 1\].*expected \[480, 1\]"),
        ("bnb-nf4", {"weight": torch.zeros(480, 1, dtype=INT8)}, r"^weight: got .*int8 · expected .*uint8"),
        ("bnb-nf4", {"weight.absmax": torch.zeros(15)}, r"^weight\.absmax: got \[15\] torch\.float32"),
        ("bnb-nf4", {"weight.quant_map": torch.zeros(8)}, r"^weight\.quant_map: got \[8\]"),
        ("bnb-nf4", {ABSMAX: torch.zeros(2)}, r"^weight\.nested_absmax: got \[2\]"),
        ("bnb-nf4", {MAP: torch.zeros(16)}, r"^weight\.nested_quant_map: got \[16\]"),
        ("bnb-nf4", {NF4_QUANT_STATE_KEY: torch.tensor([123], dtype=UINT8)}, "got no JSON object"),
        ("bnb-nf4", {NF4_QUANT_STATE_KEY: torch.tensor([91, 93], dtype=UINT8)}, "got no JSON object"),
        ("bnb-nf4", {NF4_QUANT_STATE_KEY: torch.zeros(2)}, "got no JSON object"),
        ("bnb-nf4", {"quant_type": "fp4"}, "'quant_type': 'fp4'"),
        ("bnb-nf4", {"blocksize": 128}, "'blocksize': 128"),
        ("bnb-nf4", {"nested_blocksize": 64}, "'nested_blocksize': 64"),
        ("bnb-nf4", {"nested_offset": None}, "got nested_offset None"),
        ("bnb-nf4", {"nested_offset": math.nan}, "got nested_offset nan"),
        ("bnb-nf4", {"shape": [5]}, r"got shape \[5\]"),
        ("bnb-nf4", {"shape": [10, 96]}, r"got shape \[10, 96\] · expected \[out, in\], in a multiple of 64"),
        ("bnb-nf4", {"shape": [-5, -192]}, r"got shape \[-5, -192\]"),
        ("bnb-int8", {"SCB": None}, "missing or unknown: SCB$"),
        ("bnb-int8", {"bias": torch.zeros(3)}, "missing or unknown: bias$"),
        ("bnb-int8", {"weight": torch.zeros(5, dtype=INT8)}, r"^weight: got .*\[5\] .*expected \[out, in\]"),
        ("bnb-int8", {"weight": torch.zeros(5, 192)}, r"^weight: got \[5, 192\] torch\.float32"),
        ("bnb-int8", {"SCB": torch.zeros(192)}, r"^SCB: got \[192\]"),
        ("bnb-int8", {"weight_format": torch.zeros(1, dtype=UINT8)}, r"^weight_format: got \[1\]"),
        ("bnb-int8", {"weight_format": torch.tensor(2, dtype=UINT8)}, "^weight_format: got 2 · expected 0, by rows"),
    ],
)
def test_damage_is_refused(decoder_format: BnbFormat, damage: dict[str, Any], message: str) -> None:
    tensors = quantised(decoder_format, random_weight((5, 192)))
    for name, value in damage.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif name in tensors:
            del tensors[name]
        else:
            state = json.loads(bytes(tensors[NF4_QUANT_STATE_KEY].tolist())) | {name: value}
            tensors[NF4_QUANT_STATE_KEY] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=message) as caught:
        stored(decoder_format, tensors)
    assert str(caught.value).count(" · ") == 2


def test_int8_without_weight_format_is_read() -> None:
    tensors = quantize_int8(random_weight((5, 192)))
    expected = Int8Weight.from_tensors(tensors).dequantize(torch.float32)
    del tensors["weight_format"]
    assert torch.equal(Int8Weight.from_tensors(tensors).dequantize(torch.float32), expected)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("decoder_format", "shape"),
    [("bnb-nf4", (37, 576)), ("bnb-nf4", (256, 128)), ("bnb-nf4", (512, 512)), ("bnb-int8", (33, 130))],
)
def test_matmul_on_a_gpu(
    decoder_format: BnbFormat, shape: tuple[int, int], dtype: torch.dtype, rows: tuple[int, ...]
) -> None:
    weight = stored(decoder_format, quantised(decoder_format, random_weight(shape)))
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        got = matmul(decoder_format, x.cuda(), weight.to("cuda"))
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    assert got.is_cuda
    assert got.dtype == dtype
    assert got.shape == exact.shape
    # Sums of up to 576 products of numbers about 1 and 0.02, in float16 at worst (TF32 is about as coarse).
    torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-2, atol=1e-2)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("decoder_format", FORMATS)
def test_a_weight_is_quantised_where_it_lies(decoder_format: BnbFormat) -> None:
    """A GPU may break a tie the other way; the weights that come back must be as near."""
    weight = random_weight((256, 128))
    tensors = quantised(decoder_format, weight.cuda())
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    ours, here = (
        stored(decoder_format, tensors).dequantize(torch.float32) - weight,
        dequantised(decoder_format, weight) - weight,
    )
    torch.testing.assert_close(ours.norm(), here.norm(), rtol=1e-3, atol=0)
