"""Weights in the forms of bitsandbytes: against the library itself, and as folders transformers writes and reads."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file
from tiny import random_llama, tiny_llama_config

import kernels.reference
from export.quantize.bnb import (
    BnbFormat,
    quantization_config,
    quantize_int8,
    quantize_nf4,
)
from kernels.bnb import (
    NF4_QUANT_STATE_KEY,
    Int8Weight,
    Nf4Weight,
    import_bitsandbytes,
    int8_matmul,
    nf4_matmul,
)
from lite.errors import BackendUnavailable, CheckpointError

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


def dequantised(decoder_format: BnbFormat, weight: torch.Tensor) -> torch.Tensor:
    return stored(decoder_format, quantised(decoder_format, weight)).dequantize(torch.float32)


def stored(decoder_format: BnbFormat, tensors: dict[str, torch.Tensor]) -> Nf4Weight | Int8Weight:
    return (Nf4Weight if decoder_format == "bnb-nf4" else Int8Weight).from_tensors(tensors)


def matmul(decoder_format: BnbFormat, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    if decoder_format == "bnb-nf4":
        return nf4_matmul(x, Nf4Weight.from_tensors(tensors))
    return int8_matmul(x, Int8Weight.from_tensors(tensors))


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)


# --- what is written -------------------------------------------------------------------------------------------------


def library_state_dict(decoder_format: BnbFormat, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Let the library's own layer quantise the weight and serialise itself."""
    modules = import_bitsandbytes().nn
    out_features, in_features = weight.shape
    if decoder_format == "bnb-nf4":
        layer = modules.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", compress_statistics=True)
        layer.weight = modules.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, module=layer)
    else:
        layer = modules.Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        layer.weight = modules.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.weight = layer.weight.to("cpu")
    return dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("decoder_format", "shape"),
    [*(("bnb-nf4", shape) for shape in NF4_SHAPES), *(("bnb-int8", shape) for shape in INT8_SHAPES)],
)
def test_tensors_are_those_of_the_librarys_own_layer(
    decoder_format: BnbFormat, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(shape, dtype=dtype)
    got, expected = quantised(decoder_format, weight), library_state_dict(decoder_format, weight)
    assert sorted(got) == sorted(expected)
    assert [name for name in got if not same_bytes(got[name], expected[name])] == []
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in got.values())


def test_the_json_text_is_the_librarys() -> None:
    text = bytes(quantize_nf4(random_weight((5, 192)))[NF4_QUANT_STATE_KEY].tolist())
    state = json.loads(text)
    assert isinstance(state.pop("nested_offset"), float)
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [5, 192],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused(
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], bad: float
) -> None:
    weight = random_weight((3, 64))
    weight[1, 7] = bad
    with pytest.raises(CheckpointError, match=r"got 1 infinities or NaNs .* damaged"):
        quantize(weight)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
@pytest.mark.parametrize(
    "weight", [torch.zeros(64), torch.zeros(0, 64), torch.zeros(2, 64, dtype=torch.bfloat16)], ids=["1d", "0", "bf16"]
)
def test_what_is_no_weight_is_refused(
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]], weight: torch.Tensor
) -> None:
    with pytest.raises(CheckpointError, match=r"expected a matrix \[out, in\] in float16 or float32"):
        quantize(weight)


@pytest.mark.parametrize("shape", [(64, 32), (64, 96), (2, 65)])
def test_nf4_refuses_input_features_its_blocks_do_not_fit(shape: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match=r"multiples of 64.*choose bnb-int8 or fp16"):
        quantize_nf4(random_weight(shape))


def test_int8_refuses_what_the_library_would_round_to_infinity() -> None:
    weight = random_weight((3, 5), dtype=torch.float32)
    weight[2, 1] = 7e4
    with pytest.raises(CheckpointError, match=r"got a weight of 7e\+04 · expected one that fits float16"):
        quantize_int8(weight)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_nf4_value_by_value() -> None:
    """Follow the format with plain Python, one value at a time."""
    tensors = quantize_nf4(random_weight((5, 192)))
    code, absmax, quant_map, nested_absmax, nested_quant_map = (
        tensors[name].flatten().tolist()
        for name in ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
    )
    offset = json.loads(bytes(tensors[NF4_QUANT_STATE_KEY].tolist()))["nested_offset"]
    expected = []
    for i in range(5 * 192):
        nibble = code[i // 2] >> 4 if i % 2 == 0 else code[i // 2] & 15
        block = i // 64
        expected.append(quant_map[nibble] * (nested_quant_map[absmax[block]] * nested_absmax[block // 256] + offset))
    got = Nf4Weight.from_tensors(tensors).dequantize(torch.float32)
    torch.testing.assert_close(got, torch.tensor(expected).view(5, 192), rtol=1e-6, atol=1e-9)


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


def test_nf4_errs_by_half_a_gap_at_most() -> None:
    """The widest gap between two of the 16 values is 0.304; rounding a magnitude to 8 bits adds 1 % of the largest."""
    weight = random_weight((37, 576), dtype=torch.float32)
    error = (dequantised("bnb-nf4", weight) - weight).abs().view(37, -1, 64)
    magnitude = weight.view(37, -1, 64).abs().amax(-1, keepdim=True)
    assert bool((error <= 0.153 * magnitude + 0.01 * magnitude.max()).all())


def test_int8_errs_by_half_a_step_at_most() -> None:
    weight = random_weight((37, 576))
    error = (dequantised("bnb-int8", weight) - weight).abs()
    assert bool((error <= 0.501 / 127 * weight.float().abs().amax(1, keepdim=True)).all())


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
    decoder_format: BnbFormat,
    rows: tuple[int, ...],
    dtype: torch.dtype,
    chunk_values: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels.reference, "ROWS_VALUES", chunk_values)  # one row of the weight, two, all of it
    tensors = quantised(decoder_format, random_weight((37, 128)))
    x = torch.randn(*rows, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = matmul(decoder_format, x, tensors)
    weight = stored(decoder_format, tensors).dequantize(dtype)
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


def test_sizes_in_memory() -> None:
    weight = random_weight((256, 128))
    nf4 = Nf4Weight.from_tensors(quantize_nf4(weight))
    assert nf4.shape == (256, 128)
    assert nf4.nbytes == 256 * 128 // 2 + 512 + 4 * (16 + 2 + 256 + 1)
    int8 = Int8Weight.from_tensors(quantize_int8(weight))
    assert int8.shape == (256, 128)
    assert int8.nbytes == 256 * 128 + 4 * 256


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_a_weight_moves_whole(decoder_format: BnbFormat) -> None:
    """Move to "meta", which every machine has."""
    tensors = quantised(decoder_format, random_weight((5, 192)))
    weight: Nf4Weight | Int8Weight
    weight = Nf4Weight.from_tensors(tensors) if decoder_format == "bnb-nf4" else Int8Weight.from_tensors(tensors)
    moved = weight.to("meta")
    assert moved.shape == (5, 192)
    assert moved.dequantize(torch.float16).is_meta
    assert moved.nbytes == weight.nbytes


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_x_of_another_width_is_refused(decoder_format: BnbFormat) -> None:
    tensors = quantised(decoder_format, random_weight((5, 192)))
    x = torch.zeros(2, 64)
    with pytest.raises(ValueError, match=r"got x \[2, 64\] for a weight \[5, 192\] · expected a last dimension of 192"):
        matmul(decoder_format, x, tensors)


def with_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[NF4_QUANT_STATE_KEY].tolist())) | changes
        tensors[NF4_QUANT_STATE_KEY] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def with_tensors(**changes: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in changes.items():
            if tensor is None:
                del tensors[name]
            else:
                tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_tensors(**{"weight.absmax": None}), r"missing or unknown: weight\.absmax$"),
        (with_tensors(bias=torch.zeros(3)), r"missing or unknown: bias$"),
        (with_tensors(weight=torch.zeros(96, 1, dtype=torch.uint8)), r"^weight: got \[96, 1\].*expected \[480, 1\]"),
        (with_tensors(weight=torch.zeros(480, 1, dtype=torch.int8)), r"^weight: got .*int8 · expected .*uint8"),
        (with_tensors(**{"weight.absmax": torch.zeros(15)}), r"^weight\.absmax: got \[15\] torch\.float32"),
        (with_tensors(**{"weight.quant_map": torch.zeros(8)}), r"^weight\.quant_map: got \[8\]"),
        (with_tensors(**{"weight.nested_absmax": torch.zeros(2)}), r"^weight\.nested_absmax: got \[2\]"),
        (with_tensors(**{"weight.nested_quant_map": torch.zeros(16)}), r"^weight\.nested_quant_map: got \[16\]"),
        (with_tensors(**{NF4_QUANT_STATE_KEY: torch.tensor([123], dtype=torch.uint8)}), "got no JSON object"),
        (with_tensors(**{NF4_QUANT_STATE_KEY: torch.tensor([91, 93], dtype=torch.uint8)}), "got no JSON object"),
        (with_tensors(**{NF4_QUANT_STATE_KEY: torch.zeros(2)}), "got no JSON object"),
        (with_state(quant_type="fp4"), "'quant_type': 'fp4'"),
        (with_state(blocksize=128), "'blocksize': 128"),
        (with_state(nested_blocksize=64), "'nested_blocksize': 64"),
        (with_state(nested_offset=None), "got nested_offset None"),
        (with_state(nested_offset=math.nan), "got nested_offset nan"),
        (with_state(shape=[5]), r"got shape \[5\]"),
        (with_state(shape=[10, 96]), r"got shape \[10, 96\] · expected \[out, in\], in a multiple of 64"),
        (with_state(shape=[-5, -192]), r"got shape \[-5, -192\]"),
    ],
)
def test_damaged_nf4_is_refused(damage: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    tensors = quantize_nf4(random_weight((5, 192)))
    damage(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        Nf4Weight.from_tensors(tensors)
    assert str(caught.value).count(" · ") == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_tensors(SCB=None), "missing or unknown: SCB$"),
        (with_tensors(bias=torch.zeros(3)), "missing or unknown: bias$"),
        (with_tensors(weight=torch.zeros(5, dtype=torch.int8)), r"^weight: got shape \[5\] · expected \[out, in\]"),
        (with_tensors(weight=torch.zeros(5, 192)), r"^weight: got \[5, 192\] torch\.float32"),
        (with_tensors(SCB=torch.zeros(192)), r"^SCB: got \[192\]"),
        (with_tensors(weight_format=torch.tensor([0], dtype=torch.uint8)), r"^weight_format: got \[1\]"),
        (with_tensors(weight_format=torch.tensor(2, dtype=torch.uint8)), "^weight_format: got 2 · expected 0, by rows"),
    ],
)
def test_damaged_int8_is_refused(damage: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    tensors = quantize_int8(random_weight((5, 192)))
    damage(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        Int8Weight.from_tensors(tensors)
    assert str(caught.value).count(" · ") == 2


def test_int8_without_weight_format_is_read() -> None:
    tensors = quantize_int8(random_weight((5, 192)))
    expected = Int8Weight.from_tensors(tensors).dequantize(torch.float32)
    del tensors["weight_format"]
    assert torch.equal(Int8Weight.from_tensors(tensors).dequantize(torch.float32), expected)


# --- the library: there, not there, talkative ------------------------------------------------------------------------


@pytest.fixture
def fresh_import() -> Iterator[None]:
    """Forget that bitsandbytes was imported; put it back afterwards."""
    before = {name: module for name, module in sys.modules.items() if name == "bitsandbytes"}
    import_bitsandbytes.cache_clear()
    sys.modules.pop("bitsandbytes", None)
    yield
    import_bitsandbytes.cache_clear()
    sys.modules.pop("bitsandbytes", None)
    sys.modules.update(before)


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_without_bitsandbytes_quantising_names_the_extra(
    quantize: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    fresh_import: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "llava-rad-lite\[bnb\]"'):
        quantize(random_weight((3, 64)))


def test_on_a_cpu_nothing_needs_bitsandbytes(tmp_path: Path) -> None:
    """Import, read and multiply in a process that then cannot import the library."""
    weight = random_weight((5, 192))
    save_file(quantize_nf4(weight), tmp_path / "nf4.safetensors")
    save_file(quantize_int8(weight), tmp_path / "int8.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file
import export.quantize.bnb
from kernels.bnb import Int8Weight, Nf4Weight, int8_matmul, nf4_matmul
print("bitsandbytes" in sys.modules)
sys.modules["bitsandbytes"] = None
x = torch.ones(1, 192)
print(*nf4_matmul(x, Nf4Weight.from_tensors(load_file(sys.argv[1]))).flatten().tolist())
print(*int8_matmul(x, Int8Weight.from_tensors(load_file(sys.argv[2]))).flatten().tolist())
"""
    files = [str(tmp_path / name) for name in ("nf4.safetensors", "int8.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, *lines = done.stdout.splitlines()
    assert loaded == "False"
    for line, decoder_format in zip(lines, FORMATS, strict=True):
        expected = dequantised(decoder_format, weight).sum(1)
        torch.testing.assert_close(torch.tensor([float(word) for word in line.split()]), expected)


def test_importing_the_library_is_silent(
    fresh_import: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Import one that warns in both ways, as the real one does on processors that not every machine has."""
    (tmp_path / "bitsandbytes.py").write_text(
        "import logging, warnings\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Please pip install kernels')\n"
        "warnings.warn('old', FutureWarning)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.INFO, logger="bitsandbytes")
    assert import_bitsandbytes().__file__ == str(tmp_path / "bitsandbytes.py")
    assert caplog.records == []
    assert logging.getLogger("bitsandbytes").level == logging.INFO


def test_a_library_that_does_not_load_is_as_good_as_none(
    fresh_import: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no CUDA binary')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"does not load \(no CUDA binary\)"):
        quantize_nf4(random_weight((3, 64)))


# --- folders that transformers writes and reads ----------------------------------------------------------------------


@pytest.fixture
def transformers() -> Any:
    """Return transformers, which loads no quantised folder without accelerate."""
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A Llama with grouped-query attention whose layers differ in shape."""
    config = tiny_llama_config(97, hidden_size=128, intermediate_size=192, head_dim=32)
    return config, random_llama(config)


def is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], decoder_format: BnbFormat | None
) -> Path:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if decoder_format is not None and is_quantised(name):
            layer = name.removesuffix("weight")
            tensors |= {layer + part: tensor for part, tensor in quantised(decoder_format, weight).items()}
        else:
            tensors[name] = weight
    if decoder_format is not None:
        config = config | {"quantization_config": quantization_config(decoder_format)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(torch.tensor([[1, 5, 7, 96, 33, 12], [2, 2, 9, 40, 41, 0]])).logits
    return out.float()


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_transformers_quantises_and_writes_the_same_bytes(
    decoder_format: BnbFormat,
    llama: tuple[dict[str, Any], dict[str, torch.Tensor]],
    transformers: Any,
    tmp_path: Path,
) -> None:
    config, weights = llama
    settings = quantization_config(decoder_format)
    assert settings.pop("quant_method") == "bitsandbytes"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        write_folder(tmp_path / "fp16", config, weights, None),
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        dtype=torch.float16,
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_file(write_folder(tmp_path / "ours", config, weights, decoder_format) / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert sorted(ours) == sorted(expected)
    assert [name for name in ours if not same_bytes(ours[name], expected[name])] == []
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert quantization_config(decoder_format).items() <= written.items()


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_transformers_reads_the_folder_and_computes_the_same(
    decoder_format: BnbFormat,
    llama: tuple[dict[str, Any], dict[str, torch.Tensor]],
    transformers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Load it as anyone would; then take from the library's layers the rounding that ours do not have."""
    # Where the CPU has bfloat16 products the 4-bit layer computes in bfloat16, whatever it was told.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    config, weights = llama
    folder = write_folder(tmp_path / "ours", config, weights, decoder_format)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    dense = {
        name: dequantised(decoder_format, weight) if is_quantised(name) else weight.float()
        for name, weight in weights.items()
    }
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    plain.load_state_dict(dense)
    expected = logits(plain)

    library = import_bitsandbytes().nn
    layer = library.Linear4bit if decoder_format == "bnb-nf4" else library.Linear8bitLt
    layers = [module for module in theirs.modules() if isinstance(module, layer)]
    assert len(layers) == 14
    assert type(theirs.lm_head) is torch.nn.Linear

    # As the folder asks for: float16 throughout, and activations rounded to int8 below the threshold in int8.
    assert theirs.model.norm.weight.dtype == torch.float16
    relative_error = float((logits(theirs) - expected).norm() / expected.norm())
    if decoder_format == "bnb-nf4":
        assert {module.compute_dtype for module in layers} == {torch.float16}
        assert 0 < relative_error < 5e-3
        for module in layers:
            module.compute_dtype = torch.float32
    else:
        assert {module.state.threshold for module in layers} == {6.0}
        assert 0 < relative_error < 5e-2
        for module in layers:
            module.state.threshold = 1e-30  # every column holds a larger one, and is computed as it is

    # In float32 and unrounded: what is left is the order of the sums.
    for parameter in theirs.parameters():
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


# --- on a GPU --------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (300,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(37, 576), (256, 128), (512, 512)])
def test_nf4_matmul_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    weight = Nf4Weight.from_tensors(quantize_nf4(random_weight(shape)))
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.inference_mode():
        got = nf4_matmul(x.cuda(), weight.to("cuda"))
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    assert got.is_cuda
    assert got.dtype == dtype
    assert got.shape == exact.shape
    # Sums of up to 576 products of numbers about 1 and 0.02, in float16 at worst (TF32 is about as coarse).
    torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-2, atol=1e-2)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (2, 5)])
def test_int8_matmul_on_a_gpu(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = Int8Weight.from_tensors(quantize_int8(random_weight((33, 130))))
    x = torch.randn(*rows, 130, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = int8_matmul(x.cuda(), weight.to("cuda"))
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    assert got.dtype == dtype
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
