"""bitsandbytes there, not there, talkative; and transformers, which quantises by it and reads our folders."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_export import Small, tensors_of

from export.quantize.bnb import BnbFormat, quantization_config, quantize_int8, quantize_nf4
from kernels.bnb import Int8Weight, Nf4Weight, import_bitsandbytes, int8_matmul, nf4_matmul
from lite.errors import BackendUnavailable

pytest.importorskip("bitsandbytes")

FORMATS: list[BnbFormat] = ["bnb-nf4", "bnb-int8"]
WEIGHT = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)).half()


def dequantised(decoder_format: BnbFormat, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    weight = Nf4Weight if decoder_format == "bnb-nf4" else Int8Weight
    return weight.from_tensors(tensors).dequantize(torch.float32)


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


def test_without_bitsandbytes_quantising_names_the_extra(fresh_import: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for quantize in (quantize_nf4, quantize_int8):
        with pytest.raises(BackendUnavailable, match=r'pip install "llava-rad-lite\[bnb\]"'):
            quantize(WEIGHT)


def test_on_a_cpu_nothing_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    nf4, int8 = quantize_nf4(WEIGHT), quantize_int8(WEIGHT)
    import_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    x = torch.ones(1, 192)
    for decoder_format, tensors, product in (
        ("bnb-nf4", nf4, nf4_matmul(x, Nf4Weight.from_tensors(nf4))),
        ("bnb-int8", int8, int8_matmul(x, Int8Weight.from_tensors(int8))),
    ):
        torch.testing.assert_close(product[0], dequantised(decoder_format, tensors).sum(1))


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
        quantize_nf4(WEIGHT)


@pytest.fixture
def transformers() -> Any:
    """Return transformers, which loads no quantised folder without accelerate."""
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(torch.tensor([[1, 5, 7, 96, 33, 12], [2, 2, 9, 40, 41, 0]])).logits
    return out.float()


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_transformers_quantises_and_writes_the_same_bytes(
    decoder_format: BnbFormat, small: Small, transformers: Any, tmp_path: Path
) -> None:
    settings = quantization_config(decoder_format)
    assert settings.pop("quant_method") == "bitsandbytes"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        small("fp16").path / "decoder",
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        dtype=torch.float16,
    )
    theirs.save_pretrained(tmp_path)
    ours, expected = tensors_of(small(decoder_format)), load_file(tmp_path / "model.safetensors")
    assert sorted(ours) == sorted(expected)
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(tensor, expected[name]), name
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization_config(decoder_format).items() <= written.items()


@pytest.mark.parametrize("decoder_format", FORMATS)
def test_transformers_reads_the_folder_and_computes_the_same(
    decoder_format: BnbFormat, small: Small, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load it as anyone would; then take from the library's layers the rounding that ours do not have."""
    # Where the CPU has bfloat16 products the 4-bit layer computes in bfloat16, whatever it was told.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
    folder, tensors = small(decoder_format).path / "decoder", tensors_of(small(decoder_format))
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values())
    dense = {name: tensor.float() for name, tensor in tensors.items() if tensor.dtype == torch.float16}
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        layer = name.removesuffix("weight")
        parts = {key.removeprefix(layer): tensor for key, tensor in tensors.items() if key.startswith(layer)}
        dense[name] = dequantised(decoder_format, parts)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
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
