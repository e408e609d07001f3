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
    our random weights to 4 bits gives 0.26 or 0.27; a rotary embedding that pairs the wrong components gives 0.67, and
    logits that have nothing to do with ours 1.4."""

    def allowed_difference(self, num_layers: int) -> float:
        """Return `max_difference` at a depth: with 8 and 32 layers 1.7 and 2.3 times as much was seen as with 2."""
        return self.max_difference * math.sqrt(max(1.0, num_layers / CHECKED_LAYERS))

    @property
    def in_own_environment(self) -> bool:
        """Whether it runs in the peers' environment."""
        return self.module == "llamacpp"


# What rounding to so many bits may do.
_EXACT, _BFLOAT16, _EIGHT, _FOUR = 0.005, 0.03, 0.06, 0.4
_SCALES: Final = 2 / 128  # bytes a weight: a float16 for a group

_lite = functools.partial(
    Spec, module="lite_decoder", packages=("torch",), install='pip install "llava-rad-lite[torch]"'
)  # fmt: skip
_lite_onnx = functools.partial(
    Spec,
    module="lite_onnx",
    packages=("onnxruntime", "onnx", "torch"),  # the latter two write its artifact
    install='pip install "llava-rad-lite[export]"',
    bytes_per_weight=0.5 + 2 * 4 / 128,  # a block has a float32 scale, and a sum that ONNX Runtime adds
    dense_bytes=1.5,
    library_bytes=0.3e9,
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
    Spec,
    module="llamacpp",
    packages=("llama-cpp-python", "gguf"),
    install="make peers",
    dense_bytes=1.5,
    library_bytes=0.2e9,
)

REFERENCE: Final = _lite(name="lite dense", form="dense", bytes_per_weight=4, max_difference=0)
"""Always measured: the others' logits are compared with its own."""

SPECS: Final = (
    REFERENCE,
    _lite(name="lite gptq-int4", form="gptq-int4", bytes_per_weight=0.5 + _SCALES, max_difference=_FOUR),
    _lite_onnx(name="lite onnx int4", form="float32"),
    _lite_onnx(name="lite onnx int4 int8-cache", form="int8"),
    _hugging_face(name="transformers float32", form="float32", bytes_per_weight=4, max_difference=_EXACT),
    _hugging_face(name="transformers bfloat16", form="bfloat16", bytes_per_weight=2, max_difference=_BFLOAT16),
    _bitsandbytes(name="bitsandbytes nf4", form="nf4", bytes_per_weight=0.5 + 1 / 64, max_difference=_FOUR),
    _bitsandbytes(name="bitsandbytes int8", form="int8", bytes_per_weight=1, max_difference=_EIGHT),
    _lite(name="tinygemm int4", form="tinygemm int4", bytes_per_weight=0.5 + 2 * _SCALES, max_difference=_FOUR),
    _llama_cpp(name="llama.cpp Q4_0", form="Q4_0", bytes_per_weight=18 / 32, max_difference=_FOUR),
    _llama_cpp(name="llama.cpp Q4_0 flash", form="Q4_0 flash", bytes_per_weight=18 / 32, max_difference=_FOUR),
    _llama_cpp(name="llama.cpp Q8_0", form="Q8_0", bytes_per_weight=34 / 32, max_difference=_EIGHT),
    _llama_cpp(name="llama.cpp Q8_0 flash", form="Q8_0 flash", bytes_per_weight=34 / 32, max_difference=_EIGHT),
)  # fmt: skip
OURS: Final = ("lite onnx int4", "lite onnx int4 int8-cache")
THEIRS: Final = ("llama.cpp Q4_0", "llama.cpp Q4_0 flash")
"""What is set against each other where both are in a run."""
