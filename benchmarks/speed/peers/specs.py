"""The engines: what each is called, where it lives, and how far rounding may take its logits from ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

ROOT: Final = Path(__file__).resolve().parents[3]
CHECKED_LAYERS: Final = 2
PEERS_PYTHON: Final = ROOT / "build" / "peers-venv" / "bin" / "python"
"""Made by `make peers`. Where there is none, our own interpreter is asked for their packages."""


Module: TypeAlias = Literal["lite", "hugging_face", "llamacpp", "openvino", "products"]
_MAKE_PEERS: Final = "make peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """An engine in one form."""

    name: str
    module: Module
    form: str
    packages: tuple[str, ...]  # distributions it cannot do without
    install: str  # how to get them
    max_difference: float
    """Root mean square of the difference of its logits from ours, relative to ours, for up to CHECKED_LAYERS. Rounding
    our random weights to 4 bits gives 0.2 to 0.32; a rotary embedding that pairs the wrong components gives 0.67, and
    logits that have nothing to do with ours 1.4."""

    @property
    def lives_apart(self) -> bool:
        """Whether the peers' environment has its packages, and ours does not."""
        return self.install == _MAKE_PEERS

    def allowed_difference(self, num_layers: int) -> float:
        """Return `max_difference` at a depth: with 8 and 32 layers 1.7 and 2.3 times as much was seen as with 2."""
        return self.max_difference * math.sqrt(max(1.0, num_layers / CHECKED_LAYERS))


_PACKAGES: Final = {
    "lite": (("torch",), 'pip install "llava-rad-lite[torch]"'),
    "lite onnx": (("onnxruntime",), 'pip install "llava-rad-lite[cpu]"'),
    "transformers": (("torch", "transformers", "accelerate"), 'pip install "llava-rad-lite[bench]" accelerate'),
    "bitsandbytes": (
        ("torch", "transformers", "accelerate", "bitsandbytes"),
        'pip install "llava-rad-lite[bnb,bench]" accelerate',
    ),
    "llama.cpp": (("llama-cpp-python", "gguf", "safetensors"), _MAKE_PEERS),
    "OpenVINO": (("openvino", "safetensors"), _MAKE_PEERS),
}
# What rounding to so many bits may do.
_EXACT, _BFLOAT16, _EIGHT, _FOUR = 0.005, 0.03, 0.06, 0.4
_TABLE: Final[tuple[tuple[str, str, Module, str, float], ...]] = (
    ("lite", "dense", "lite", "dense", _EXACT),
    ("lite", "gptq-int4", "lite", "gptq-int4", _FOUR),
    ("lite onnx", "int4", "lite", "onnx float32", _FOUR),
    ("lite onnx", "int4 int8-cache", "lite", "onnx int8", _FOUR),
    ("lite onnx", "int4 int8-cache int8-prompts", "lite", "onnx int8 prompts", _FOUR),
    ("transformers", "float32", "hugging_face", "float32", _EXACT),
    ("transformers", "bfloat16", "hugging_face", "bfloat16", _BFLOAT16),
    ("bitsandbytes", "nf4", "hugging_face", "nf4", _FOUR),
    ("bitsandbytes", "int8", "hugging_face", "int8", _EIGHT),
    ("llama.cpp", "Q4_0", "llamacpp", "Q4_0", _FOUR),
    ("llama.cpp", "Q4_0 flash", "llamacpp", "Q4_0 flash", _FOUR),
    ("llama.cpp", "Q8_0", "llamacpp", "Q8_0", _EIGHT),
    ("llama.cpp", "Q8_0 flash", "llamacpp", "Q8_0 flash", _EIGHT),
    ("OpenVINO", "int4", "openvino", "int4 f32", _FOUR),
    ("OpenVINO", "int4 u8-cache", "openvino", "int4 u8", _FOUR),
)
SPECS: Final = {
    f"{engine} {variant}": Spec(
        name=f"{engine} {variant}", module=module, form=form, packages=_PACKAGES[engine][0],
        install=_PACKAGES[engine][1], max_difference=allowed,
    )
    for engine, variant, module, form, allowed in _TABLE
}  # fmt: skip
DENSE: Final = SPECS["lite dense"]


def ours(device: str) -> Spec:
    """Return what all engines take turns with on a device."""
    return SPECS["lite onnx int4" if device == "cpu" else "lite gptq-int4"]
