"""The engines: what each is called, where it lives, and how far rounding may take its logits from ours."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).resolve().parents[3]
CHECKED_LAYERS: Final = 2
PEERS_PYTHON: Final = ROOT / "build" / "peers-venv" / "bin" / "python"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """An engine in one form."""

    name: str
    module: Literal["lite", "hugging_face", "llamacpp"]
    form: str
    packages: tuple[str, ...]  # distributions it cannot do without
    install: str  # how to get them
    max_difference: float
    """Root mean square of the difference of its logits from ours, relative to ours, for up to CHECKED_LAYERS. Rounding
    our random weights to 4 bits gives 0.26 or 0.27; a rotary embedding that pairs the wrong components gives 0.67, and
    logits that have nothing to do with ours 1.4."""

    def allowed_difference(self, num_layers: int) -> float:
        """Return `max_difference` at a depth: with 8 and 32 layers 1.7 and 2.3 times as much was seen as with 2."""
        return self.max_difference * math.sqrt(max(1.0, num_layers / CHECKED_LAYERS))


# What rounding to so many bits may do.
_EXACT, _BFLOAT16, _EIGHT, _FOUR = 0.005, 0.03, 0.06, 0.4

_torch = functools.partial(Spec, module="lite", packages=("torch",), install='pip install "llava-rad-lite[torch]"')
_onnx = functools.partial(
    Spec,
    module="lite",
    packages=("onnxruntime",),
    install='pip install "llava-rad-lite[cpu]"',
    max_difference=_FOUR,
)
_hugging_face = functools.partial(
    Spec,
    module="hugging_face",
    packages=("torch", "transformers", "accelerate"),
    install='pip install "llava-rad-lite[bench]" accelerate',
)
_bitsandbytes = functools.partial(
    Spec,
    module="hugging_face",
    packages=("torch", "transformers", "accelerate", "bitsandbytes"),
    install='pip install "llava-rad-lite[bnb,bench]" accelerate',
)
_llama_cpp = functools.partial(
    Spec, module="llamacpp", packages=("llama-cpp-python", "gguf", "safetensors"), install="make peers"
)

DENSE: Final = _torch(name="lite dense", form="dense", max_difference=_EXACT)
"""The others' logits are compared with its own."""

SPECS: Final = (
    DENSE,
    _torch(name="lite gptq-int4", form="gptq-int4", max_difference=_FOUR),
    _onnx(name="lite onnx int4", form="onnx float32"),
    _onnx(name="lite onnx int4 int8-cache", form="onnx int8"),
    _hugging_face(name="transformers float32", form="float32", max_difference=_EXACT),
    _hugging_face(name="transformers bfloat16", form="bfloat16", max_difference=_BFLOAT16),
    _bitsandbytes(name="bitsandbytes nf4", form="nf4", max_difference=_FOUR),
    _bitsandbytes(name="bitsandbytes int8", form="int8", max_difference=_EIGHT),
    _llama_cpp(name="llama.cpp Q4_0", form="Q4_0", max_difference=_FOUR),
    _llama_cpp(name="llama.cpp Q4_0 flash", form="Q4_0 flash", max_difference=_FOUR),
    _llama_cpp(name="llama.cpp Q8_0", form="Q8_0", max_difference=_EIGHT),
    _llama_cpp(name="llama.cpp Q8_0 flash", form="Q8_0 flash", max_difference=_EIGHT),
)


def ours(device: str) -> Spec:
    """Return what all engines take turns with on a device."""
    name = "lite onnx int4" if device == "cpu" else "lite gptq-int4"
    return next(spec for spec in SPECS if spec.name == name)
