"""Which weights prompts are read by: int8 ones of their own where there is all that they take, or the stored ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lite.engines.onnx_session import CPU
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from lite.artifact.open import Artifact
    from lite.artifact.parts import PromptWeights
    from lite.engines.machine import Machine

MAX_PROMPT_KL: Final = 1e-3
"""The most that int8 prompts may lose, in nats a token by the manifest, and still be taken unasked; or else
`MAX_PROMPT_SHARE` of what the decoder has lost before them."""
MAX_PROMPT_SHARE: Final = 0.1


def prompt_ways(
    asked: PromptWeights | None, artifact: Artifact, provider: str | None, machine: Machine, adapters: Collection[str]
) -> Iterator[tuple[bool, str]]:
    """Yield whether prompts may be read by int8 weights, the preferred way first, each with the reason.

    Args:
        asked: by the caller; None leaves the choice.
        artifact: a checked one with `decoder.onnx`.
        provider: that will compute it.
        machine: what there is.
        adapters: of hospitals, that are loaded: what int8 prompts lose with them is not measured.

    Raises:
        LiteError: int8 ones are asked for, and something that they take is not there.
    """
    problem = _problem(artifact, provider, machine)
    if asked == "int8":
        if problem is not None:
            msg = f"{artifact.path}: got prompt_weights 'int8' · expected what they take: {problem} · leave it out"
            raise LiteError(f"{msg}, or export with --prompt-weights int8 for a CPU with VNNI")
        yield True, "asked for"
    elif asked == "stored":
        yield False, "asked for"
    else:
        unknown = f"what int8 ones lose with {', '.join(adapters)} was not measured" if adapters else None
        against = problem or _lost_too_much(artifact) or unknown
        if against is None:
            yield True, "the artifact has them: a prompt takes 0.6 of its time"
        yield False, against or "int8 ones do not fit the memory"


def _problem(artifact: Artifact, provider: str | None, machine: Machine) -> str | None:
    if artifact.onnx_part().prompts is None:
        return "the artifact has no int8 weights for them"
    if provider != CPU:
        return "int8 ones are for CPUs"
    return None if machine.adds_int8_exactly else "this CPU does not add int8 products up exactly"


def _lost_too_much(artifact: Artifact) -> str | None:
    parts = artifact.manifest.parts
    prompts = artifact.onnx_part().prompts
    lost = prompts.divergence if prompts is not None else None
    if lost is None:
        return "what int8 ones lose was not measured at export"
    before = parts.decoder.fidelity.divergence.mean_kl if parts.decoder.fidelity is not None else 0.0
    if lost.mean_kl <= max(MAX_PROMPT_KL, MAX_PROMPT_SHARE * before):
        return None
    return f"int8 ones lost {lost.mean_kl:.2g} nats a token at export, more than a tenth of what the decoder had"
