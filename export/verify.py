"""Parity: what the exported artifact computes against what the source computes, measured before it is kept.

The source is computed plainly (see `export.source.forward`): LoRA beside the weights, all in float32. The artifact is
computed from the files just written, `vision.onnx` by ONNX Runtime and `decoder/` by the runtime's own decoder (see
`export.logits`). Each study is a film, its prompt, and a findings text; the decoder is scored on the text,
teacher-forced:

    source    film ─ torch tower ─ base + LoRA, float32 ──▶ p(token | …)  ─┐
    artifact  film ─ vision.onnx ─ decoder/ ──────────────▶ q(token | …)  ─┴▶ KL(p‖q), same top token
                          ├─────── with an int8 cache ────▶ r(token | …)  ───▶ KL(q‖r)
                          └─────── decoder.onnx ──────────▶ s(token | …)  ───▶ KL(q‖s), if there is one

The numbers go into the manifest; numbers worse than `TOLERANCES` end the export, unless it is to be kept anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

import torch

from export.logits import artifact_logits, onnx_logits, source_logits
from export.progress import stage
from export.source import forward
from export.studies import by_film
from lite.artifact.parts import DecoderFidelity, Divergence, VisionFidelity
from lite.engines.onnx_session import adds_int8_exactly
from lite.engines.protocol import NO_ADAPTER
from lite.errors import ArtifactError
from lite.eval.divergence import compare_logits, summarise
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from export.source.checkpoint import Checkpoint
    from export.studies import FilmStudies, NamedStudies
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype, OnnxPart, Parts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The worst an export may measure."""

    min_cosine: float | None = None
    max_relative_error: float | None = None
    max_mean_kl: float | None = None
    min_same_top: float | None = None


TOLERANCES: Final = {
    # float32 sums in another order: 1e-6 of the features' RMS is usual, the bar leaves room for deep towers.
    "vision fp32": Tolerance(min_cosine=0.99999, max_relative_error=1e-3),
    # float16 rounds at 5e-4; outlier channels of a trained tower make single features a few times worse than the mean.
    "vision fp16": Tolerance(min_cosine=0.999, max_relative_error=0.1),
    # 0.11 and 0.9990 on the phantom's tower, 0.19 and 0.998 on a random one of real size with outlier channels; a form
    # that saturates its sums measures 0.6 to 2.5 and less than 0.99.
    "vision int8": Tolerance(min_cosine=0.99, max_relative_error=0.5),
    # Rounding to float16 costs about 1e-6 nats; published fp16-to-bf16 noise is 2.5e-5 and 99.74 % the same top token.
    # A merge with half the LoRA scale costs more than 0.1.
    "decoder fp16": Tolerance(max_mean_kl=1e-3, min_same_top=0.98),
    # Bars for a broken export, not for a lossy one: what was lost is in the summary and the manifest, for the user to
    # judge. Films and texts unlike what a model knows (the built-in ones, to the phantom model) cost it most: 0.8 nats
    # by rounding to nearest in 4 bits. A weight packed along the wrong axis costs more than ln(vocabulary) / 2.
    "decoder gptq-int8": Tolerance(max_mean_kl=0.05, min_same_top=0.9),
    "decoder bnb-int8": Tolerance(max_mean_kl=0.3, min_same_top=0.8),
    "decoder gptq-int4": Tolerance(max_mean_kl=2.0, min_same_top=0.4),
    "decoder bnb-nf4": Tolerance(max_mean_kl=2.0, min_same_top=0.4),
    # A scale for each vector: 1e-6 to 1e-4 nats.
    "int8 cache": Tolerance(max_mean_kl=0.05, min_same_top=0.9),
    # Against decoder/, whose integers it has: what is lost is lost by inputs rounded to int8, 1e-4 to 1e-3 nats on
    # films that the model knows. And against itself with a float cache.
    "decoder.onnx": Tolerance(max_mean_kl=0.3, min_same_top=0.8),
    "decoder.int8_cache.onnx": Tolerance(max_mean_kl=0.3, min_same_top=0.8),
    # Against itself, its prompts by the stored weights: 6e-6 to 4e-4 nats on the phantom.
    "decoder.prompts.onnx": Tolerance(max_mean_kl=0.3, min_same_top=0.8),
    # Of embeddings of length 1, the film's by the format of the vision tower.
    "retrieval fp32": Tolerance(min_cosine=0.99999),
    "retrieval fp16": Tolerance(min_cosine=0.999),
    "retrieval int8": Tolerance(min_cosine=0.98),
}
"""By part and format. The decoder is measured behind the exported vision part, as a user will run it."""

MIN_TOKENS_FOR_SAME_TOP: Final = 100
"""With fewer scored tokens one near-tie is more than a per cent; same_top is then recorded but does not fail."""


def measure(
    checkpoint: Checkpoint,
    artifact: Artifact,
    judged: NamedStudies,
    *,
    device: str = "cpu",
    show_progress: bool = False,
) -> Parts:
    """Measure the artifact being written against its source; return its parts with what was measured of each."""
    data, films, parts, show = judged.data, by_film(judged.studies), artifact.manifest.parts, show_progress
    with stage("parity, features", show=show):
        of_source, features = source_features(checkpoint, films, device), artifact_features(artifact, films)
    with stage("parity, the source", show=show):
        expected = source_logits(checkpoint, films, of_source, device, show=show)
    with stage("parity, the artifact", show=show):
        caches: tuple[CacheDtype | None, ...] = (None, "int8")
        adapter = parts.default_adapter
        logits, with_int8 = artifact_logits(
            artifact, films, features, device, show=show, cache_dtypes=caches, adapter=adapter
        )
    fidelity = DecoderFidelity(
        data=data,
        divergence=divergence_of(films, expected, logits),
        int8_cache=divergence_of(films, logits, with_int8),
    )
    parts = dataclasses.replace(
        parts,
        vision=dataclasses.replace(parts.vision, fidelity=_compare_features(of_source, features, data)),
        decoder=dataclasses.replace(parts.decoder, fidelity=fidelity),
    )
    if parts.decoder_onnx is None:
        return parts
    with stage("parity, decoder.onnx", show=show):
        part = _compare_onnx(artifact, parts.decoder_onnx, data, films, features, logits)
    return dataclasses.replace(parts, decoder_onnx=part)


def measure_onnx(
    artifact: Artifact, part: OnnxPart, judged: NamedStudies, *, device: str = "cpu", show_progress: bool = False
) -> OnnxPart:
    """Measure the decoder.onnx of an artifact being written against its decoder/; see `measure`."""
    films = by_film(judged.studies)
    with stage("parity", show=show_progress):
        features = artifact_features(artifact, films)
        adapter = artifact.manifest.parts.default_adapter
        (logits,) = artifact_logits(artifact, films, features, device, show=show_progress, adapter=adapter)
        return _compare_onnx(artifact, part, judged.data, films, features, logits)


def require_parity(parts: Parts, *, keep_anyway: bool = False) -> tuple[str, ...]:
    """Compare what was measured with what is tolerated.

    Returns:
        What is worse than its tolerance, for the manifest of an artifact that is kept anyway; nothing of a good one.

    Raises:
        ArtifactError: A number is worse, and `keep_anyway` is off or it is not even a number.
    """
    refused = []
    for part, measure_name, got, limit_name in _measured(parts):
        limit, at_least = getattr(TOLERANCES[part], limit_name), limit_name.startswith("min")
        # Written so that NaN fails.
        if got >= limit if at_least else got <= limit:
            continue
        bound = f"expected at {'least' if at_least else 'most'} {limit:g}"
        refused.append(f"parity of {part}: got {measure_name} {got:.6g} · {bound}")
        if not keep_anyway or not math.isfinite(got):
            raise ArtifactError(f"{refused[-1]} · {_what_failed(part)}")
    return tuple(refused)


def _what_failed(part: str) -> str:
    msg = "the artifact does not compute what"
    if part.endswith(".onnx"):
        return f"{msg} its decoder/ does, so it was not kept: report this"
    lossy = part.startswith("decoder") and part != "decoder fp16"
    advice = "or choose --method gptq, a smaller --group-size or more bits" if lossy else "and report this"
    msg = f"{msg} the checkpoint does, so it was not kept: check that the base model is the one the adapter was trained"
    return f"{msg} on, {advice}"


def _measured(parts: Parts) -> Iterator[tuple[str, str, float, str]]:
    """Yield of each number its part, what it is, and which limit holds for it."""
    if (vision := parts.vision.fidelity) is not None:
        yield f"vision {parts.vision.format}", "cosine", vision.min_cosine, "min_cosine"
        yield f"vision {parts.vision.format}", "relative error", vision.relative_error, "max_relative_error"
    if parts.retrieval is not None and (embedded := parts.retrieval.fidelity) is not None:
        yield f"retrieval {parts.vision.format}", "cosine of films", embedded.film_cosine, "min_cosine"
        yield f"retrieval {parts.retrieval.text_format}", "cosine of texts", embedded.text_cosine, "min_cosine"
    measured: list[tuple[str, Divergence | None]] = []
    if (fidelity := parts.decoder.fidelity) is not None:
        measured += [(f"decoder {parts.decoder.format}", fidelity.divergence), ("int8 cache", fidelity.int8_cache)]
    if parts.decoder_onnx is not None and (fidelity := parts.decoder_onnx.fidelity) is not None:
        measured += [("decoder.onnx", fidelity.divergence), ("decoder.int8_cache.onnx", fidelity.int8_cache)]
        prompts = parts.decoder_onnx.prompts
        measured += [("decoder.prompts.onnx", prompts.divergence)] if prompts is not None else []
    for name, divergence in measured:
        if divergence is not None:
            yield name, "mean KL", divergence.mean_kl, "max_mean_kl"
            if divergence.tokens >= MIN_TOKENS_FOR_SAME_TOP:
                yield name, "same top token", divergence.same_top, "min_same_top"


def _compare_onnx(
    artifact: Artifact,
    part: OnnxPart,
    data: str,
    films: Sequence[FilmStudies],
    features: Sequence[Tensor],
    logits: Sequence[Tensor],
) -> OnnxPart:
    """Compare decoder.onnx with the logits of decoder/, and its int8 cache with the float one."""
    adapter = artifact.manifest.parts.default_adapter
    with_float = onnx_logits(artifact, films, features, None, adapter=adapter)
    with_int8 = onnx_logits(artifact, films, features, "int8", adapter=adapter) if part.int8_cache else None
    fidelity = DecoderFidelity(
        data=data,
        divergence=divergence_of(films, logits, with_float),
        int8_cache=None if with_int8 is None else divergence_of(films, with_float, with_int8),
    )
    if (prompts := part.prompts) is not None and adds_int8_exactly(artifact.file(prompts.exactness)):
        behind = onnx_logits(artifact, films, features, None, int8_prompts=True, adapter=adapter)
        prompts = dataclasses.replace(prompts, divergence=divergence_of(films, with_float, behind))
    return dataclasses.replace(part, fidelity=fidelity, prompts=prompts)


def source_features(checkpoint: Checkpoint, films: Sequence[FilmStudies], device: str) -> list[Tensor]:
    """Return of each film what the source's tower and projector make of it, [P, hidden_size]."""
    tensors = {name: tensor.to(device) for name, tensor in checkpoint.read_tower().items()}
    with torch.inference_mode():
        pixels = [torch.from_numpy(film.pixel_values)[None].to(device) for film in films]
        return [forward.image_features(tensors, checkpoint.tower, values)[0].cpu() for values in pixels]


def artifact_features(artifact: Artifact, films: Sequence[FilmStudies], adapter: str | None = None) -> list[Tensor]:
    """Return the same of the artifact's, with the projector of an adapter if it has one."""
    encoder = VisionEncoder(artifact, adapters=() if adapter is None else (adapter,))
    slot = NO_ADAPTER if adapter is None else 0
    return [torch.from_numpy(encoder(film.pixel_values[None], adapter=slot)[0]) for film in films]


def _compare_features(source: Sequence[Tensor], ours: Sequence[Tensor], data: str) -> VisionFidelity:
    p, q = torch.stack(list(source)).double(), torch.stack(list(ours)).double()
    cosine = torch.nn.functional.cosine_similarity(p, q, dim=-1)
    max_abs = float((p - q).abs().max())
    rms = float(p.square().mean().sqrt())
    return VisionFidelity(
        data=data,
        films=len(source),
        max_abs=max_abs,
        relative_error=max_abs / rms,
        mean_cosine=float(cosine.mean()),
        min_cosine=float(cosine.min()),
    )


def divergence_of(films: Sequence[FilmStudies], source: Sequence[Tensor], ours: Sequence[Tensor]) -> Divergence:
    """Compare logits of all studies along their targets."""
    studies = [study for film in films for study in film.studies]
    pairs = zip(studies, source, ours, strict=True)
    compared = [compare_logits(p.numpy(), q.numpy(), study.target_ids) for study, p, q in pairs]
    summary = summarise(compared)
    divergent = summary.first_divergent_token
    return Divergence(
        studies=summary.num_studies,
        tokens=summary.num_tokens,
        mean_kl=summary.mean_kl.value,
        max_kl=max(float(study.kl.max()) for study in compared),
        same_top=summary.same_top.value,
        perplexity_ratio=summary.perplexity_ratio.value,
        first_divergent_token=divergent.value if divergent.count else None,
        studies_without_divergence=summary.without_divergence.value,
    )
