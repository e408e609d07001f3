"""The engines: what each is called, where it lives, and how far rounding may take its logits from ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).resolve().parents[3]
CHECKED_LAYERS: Final = 2
PEERS_PYTHON: Final = ROOT / "build" / "peers-venv" / "bin" / "python"

_SCALES: Final = 2 / 128  # bytes a weight: a float16 for a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One row of the table."""

    name: str
    module: Literal["lite_decoder", "lite_onnx", "hugging_face", "llamacpp"]
    form: str
    packages: tuple[str, ...]  # distributions it cannot do without
    install: str  # how to get them
    bytes_per_weight: float  # of a layer's linears, on a CPU
    dense_bytes: float = 4.0  # of a value of embedding and head, on a CPU
    library_bytes: float = 0.6e9  # resident with nothing loaded
    max_difference: float
    """Root mean square of the difference of its logits from ours, relative to ours, for up to CHECKED_LAYERS. Rounding
    Gaussian weights to 4 bits gives 0.08 to 0.19, to 8 bits 0.01 to 0.02; a rotary embedding that pairs the wrong
    components gives 0.3, and logits that have nothing to do with ours 1.4."""
    environment: Literal["project", "peers"] = "project"
    gpu_only: bool = False

    def allowed_difference(self, num_layers: int) -> float:
        """Return `max_difference` at a depth: with 8 and 32 layers 1.7 and 2.3 times as much was seen as with 2."""
        return self.max_difference * math.sqrt(max(1.0, num_layers / CHECKED_LAYERS))


def _lite(name: str, form: str, *, bytes_per_weight: float, max_difference: float) -> Spec:
    return Spec(
        name=name,
        module="lite_decoder",
        form=form,
        packages=("torch",),
        install='pip install "llava-rad-lite[torch]"',
        bytes_per_weight=bytes_per_weight,
        max_difference=max_difference,
    )


def _lite_onnx(name: str, cache_dtype: str) -> Spec:
    return Spec(
        name=name,
        module="lite_onnx",
        form=cache_dtype,
        # The latter two write its artifact.
        packages=("onnxruntime", "onnx", "torch"),
        install='pip install "llava-rad-lite[export]"',
        # A block has a float32 scale, and a sum that ONNX Runtime adds.
        bytes_per_weight=0.5 + 2 * 4 / 128,
        dense_bytes=1.5,
        library_bytes=0.3e9,
        max_difference=_FOUR,
    )


def _transformers(form: str, *, bytes_per_weight: float, max_difference: float, gpu_only: bool = False) -> Spec:
    return Spec(
        name=f"transformers {form}",
        module="hugging_face",
        form=form,
        packages=("torch", "transformers", "accelerate"),
        install='pip install "llava-rad-lite[bench]" accelerate',
        bytes_per_weight=bytes_per_weight,
        dense_bytes=bytes_per_weight,
        max_difference=max_difference,
        gpu_only=gpu_only,
    )


def _bitsandbytes(form: str, *, bytes_per_weight: float, max_difference: float) -> Spec:
    return Spec(
        name=f"bitsandbytes {form}",
        module="hugging_face",
        form=form,
        packages=("torch", "transformers", "accelerate", "bitsandbytes"),
        install='pip install "llava-rad-lite[bnb,bench]" accelerate',
        bytes_per_weight=bytes_per_weight,
        max_difference=max_difference,
    )


def _llama_cpp(form: str, *, bytes_per_weight: float, max_difference: float) -> Spec:
    return Spec(
        name=f"llama.cpp {form}",
        module="llamacpp",
        form=form,
        packages=("llama-cpp-python", "gguf"),
        install="make peers",
        bytes_per_weight=bytes_per_weight,
        dense_bytes=1.5,
        library_bytes=0.2e9,
        max_difference=max_difference,
        environment="peers",
    )


# What rounding to so many bits may do.
_EXACT, _BFLOAT16, _EIGHT, _FOUR = 0.005, 0.03, 0.05, 0.25

REFERENCE: Final = _lite("lite dense", "dense", bytes_per_weight=4, max_difference=0)
"""Always measured: the others' logits are compared with its own."""

SPECS: Final = (
    REFERENCE,
    _lite("lite gptq-int4", "gptq-int4", bytes_per_weight=0.5 + _SCALES, max_difference=_FOUR),
    _lite_onnx("lite onnx int4", "float32"),
    _lite_onnx("lite onnx int4 int8-cache", "int8"),
    _transformers("float32", bytes_per_weight=4, max_difference=_EXACT),
    _transformers("float16", bytes_per_weight=2, max_difference=_EXACT, gpu_only=True),
    _transformers("bfloat16", bytes_per_weight=2, max_difference=_BFLOAT16),
    _bitsandbytes("nf4", bytes_per_weight=0.5 + 1 / 64, max_difference=_FOUR),
    _bitsandbytes("int8", bytes_per_weight=1, max_difference=_EIGHT),
    _lite("tinygemm int4", "tinygemm", bytes_per_weight=0.5 + 2 * _SCALES, max_difference=_FOUR),
    Spec(
        name="gemlite int4",
        module="lite_decoder",
        form="gemlite",
        packages=("torch", "gemlite"),
        install="pip install gemlite",
        bytes_per_weight=0.5 + 2 * _SCALES,
        max_difference=_FOUR,
        gpu_only=True,
    ),
    _llama_cpp("Q4_0", bytes_per_weight=18 / 32, max_difference=_FOUR),
    _llama_cpp("Q4_0 flash", bytes_per_weight=18 / 32, max_difference=_FOUR),
    _llama_cpp("Q8_0", bytes_per_weight=34 / 32, max_difference=_EIGHT),
    _llama_cpp("Q8_0 flash", bytes_per_weight=34 / 32, max_difference=_EIGHT),
)
