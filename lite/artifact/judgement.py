"""What a divergence means, in words: beside figures that are known, and from where on an artifact is of no use.

    nats/token   what peers report of Llama-2-7B, against its own float16        same top token
    2.5e-5       float16 against bfloat16: noise                                 99.7 %
    4e-4         llama.cpp's q8_0, 8 bits                                        98.8 %
    0.013        its q4_K_M, between 4 and 5 bits                                94.7 %

Other forms of 4 bits usually lose 0.01 to 0.1. Where texts are spoilt was seen on a real decoder of 135 million
parameters: this project's GPTQ measured 0.095 there (84 % the same top token), NF4 0.28 (73 %), and rounding to nearest
0.55 (64 %, and half as much perplexity again; SmolLM2-135M, 20,480 tokens, November 2026).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from lite.artifact.manifest import Manifest
    from lite.artifact.parts import AdapterFidelity, DecoderFidelity

USUAL_KL: Final = 0.1
UNUSABLE_KL: Final = 0.5
_WORSE_F1: Final = 0.05
"""A loss of label F1 by an adapter that is said: what an export measures on shows no smaller one."""
_GRADES: Final = (
    (1e-4, "no more than noise (float16 against bfloat16: 2.5e-5)"),
    (2e-3, "as little as 8 bits usually lose (q8_0 of 7B: 4e-4)"),
    (0.02, "as little as the better forms of 4 bits lose (q4_K_M of 7B: 0.013)"),
    (USUAL_KL, "what 4 bits usually lose (0.01 to 0.1)"),
    (UNUSABLE_KL, "more than 4 bits usually lose (0.01 to 0.1): compare its texts before you use it"),
    (math.inf, "not usable (4 bits usually lose 0.01 to 0.1): much of the text will differ"),
)
"""Up to which KL, in nats a token, a divergence is called what."""
_BUILT_IN: Final = (
    "the built-in studies may be unlike what the model knows, --verify-data LIST.json at export gives the real figure"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What is to be said of a divergence."""

    text: str
    is_warning: bool


def judge(mean_kl: float, same_top: float) -> Judgement:
    """Say what a divergence means.

    Args:
        mean_kl: From what an artifact was made of, in nats a token.
        same_top: The share of tokens for which both hold the same one to be the most probable.
    """
    # Written so that NaN is the worst.
    text = next((words for bound, words in _GRADES if mean_kl <= bound), _GRADES[-1][1])
    if same_top < 1:
        parted = f"1 token in {round(1 / (1 - same_top))}" if same_top >= 0.5 else f"{1 - same_top:.0%} of the tokens"
        text += f"; at {parted} another one is the most probable"
    return Judgement(text=text, is_warning=not mean_kl <= USUAL_KL)


def judged(fidelity: DecoderFidelity | AdapterFidelity) -> Judgement:
    """Say what the divergence of a decoder means, alone or with an adapter."""
    return judge(fidelity.divergence.mean_kl, fidelity.divergence.same_top)


def warnings_of(manifest: Manifest, adapters: Container[str]) -> Iterator[str]:
    """Say what whoever runs an artifact with adapters must not overlook: that it was refused, how much it has lost."""
    for refusal in manifest.refused:
        yield f"kept at the export though it was refused: {refusal}"
    parts = manifest.parts
    of_onnx = parts.decoder_onnx.fidelity if parts.decoder_onnx is not None else None
    measured: dict[str, DecoderFidelity | AdapterFidelity | None] = {
        "the decoder": parts.decoder.fidelity,
        "decoder.onnx": of_onnx,
        **{f"the decoder with {name}": part.fidelity for name, part in parts.adapters.items() if name in adapters},
    }
    for name, fidelity in measured.items():
        if fidelity is not None and (found := judged(fidelity)).is_warning:
            why = f" · {_BUILT_IN}" if fidelity.data == "built-in" else ""
            yield f"{name} has lost {fidelity.divergence.mean_kl:.2g} nats a token, {found.text}{why}"
    for name, part in parts.adapters.items():
        if name in adapters and part.fidelity is not None:
            own, without = part.fidelity.label_f1, part.fidelity.label_f1_without
            if own is not None and without is not None and own < without - _WORSE_F1:
                yield f"with {name} texts had label F1 {own:.3f} at the export, without it {without:.3f}"
