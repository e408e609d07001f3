"""Parity: what the exported artifact computes against what the source computes, measured before it is kept.

The source is computed plainly (see `export.source.forward`): LoRA beside the weights, all in float32. The artifact is
computed from the files just written, `vision.onnx` by ONNX Runtime and `decoder/` by the runtime's own decoder. Both
decoders are computed one layer at a time, so that 7B parameters need the memory of one layer. Each study is a film,
its prompt, and a findings text; the decoder is scored on the text, teacher-forced:

    source    film ─ torch tower ─ base + LoRA, float32 ──▶ p(token | …)  ─┐
    artifact  film ─ vision.onnx ─ decoder/ ──────────────▶ q(token | …)  ─┴▶ KL(p‖q), same top token
                          ├─────── with an int8 cache ────▶ r(token | …)  ───▶ KL(q‖r)
                          └─────── decoder.onnx ──────────▶ s(token | …)  ───▶ KL(q‖s), if there is one

The numbers go into the manifest; numbers worse than `TOLERANCES` end the export.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from export.progress import progress_bar
from export.quantize.calibration import embed
from export.source import forward
from lite.artifact.parts import DecoderFidelity, Divergence, VisionFidelity
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.segments import score
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError
from lite.eval.divergence import compare_logits, summarise
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from export.source.checkpoint import Checkpoint
    from export.studies import EncodedStudy, NamedStudies
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype, OnnxPart, Parts
    from lite.engines.torch_engine.decoder import LlamaDecoder


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
    # judge. Films and texts unlike what a model knows (the built-in ones, to the phantom model) cost it most: 1.0 nats
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
    data, studies, parts = judged.data, judged.studies, artifact.manifest.parts
    source_features, features = _source_features(checkpoint, studies, device), _artifact_features(artifact, studies)
    source_logits = _source_logits(checkpoint, studies, source_features, device, show_progress)
    logits, with_int8 = _artifact_logits(artifact, studies, features, device, show_progress, (None, "int8"))
    fidelity = DecoderFidelity(
        data=data,
        divergence=_compare_logits(studies, source_logits, logits),
        int8_cache=_compare_logits(studies, logits, with_int8),
    )
    return dataclasses.replace(
        parts,
        vision=dataclasses.replace(parts.vision, fidelity=_compare_features(source_features, features, data)),
        decoder=dataclasses.replace(parts.decoder, fidelity=fidelity),
        decoder_onnx=parts.decoder_onnx and _compare_onnx(artifact, parts.decoder_onnx, judged, features, logits),
    )


def measure_onnx(
    artifact: Artifact, part: OnnxPart, judged: NamedStudies, *, device: str = "cpu", show_progress: bool = False
) -> OnnxPart:
    """Measure the decoder.onnx of an artifact being written against its decoder/; see `measure`."""
    features = _artifact_features(artifact, judged.studies)
    (logits,) = _artifact_logits(artifact, judged.studies, features, device, show_progress)
    return _compare_onnx(artifact, part, judged, features, logits)


def require_parity(parts: Parts) -> None:
    """Raise ArtifactError if a number that was measured is worse than its tolerance."""
    for part, measure_name, got, limit_name in _measured(parts):
        limit, at_least = getattr(TOLERANCES[part], limit_name), limit_name.startswith("min")
        # Written so that NaN fails.
        if got >= limit if at_least else got <= limit:
            continue
        bound = "at least" if at_least else "at most"
        msg = f"parity of {part}: got {measure_name} {got:.6g} · expected {bound} {limit:g} · the artifact does not "
        if part.endswith(".onnx"):
            raise ArtifactError(f"{msg}compute what its decoder/ does, so it was not kept: report this")
        lossy = part.startswith("decoder") and part != "decoder fp16"
        advice = "or choose --method gptq, a smaller --group-size or more bits" if lossy else "and report this"
        raise ArtifactError(
            f"{msg}compute what the checkpoint does, so it was not kept: check that the base model is the one the "
            f"adapter was trained on, {advice}"
        )


def _measured(parts: Parts) -> Iterator[tuple[str, str, float, str]]:
    """Yield of each number its part, what it is, and which limit holds for it."""
    if (vision := parts.vision.fidelity) is not None:
        yield f"vision {parts.vision.format}", "cosine", vision.min_cosine, "min_cosine"
        yield f"vision {parts.vision.format}", "relative error", vision.relative_error, "max_relative_error"
    measured: list[tuple[str, Divergence | None]] = []
    if (fidelity := parts.decoder.fidelity) is not None:
        measured += [(f"decoder {parts.decoder.format}", fidelity.divergence), ("int8 cache", fidelity.int8_cache)]
    if parts.decoder_onnx is not None and (fidelity := parts.decoder_onnx.fidelity) is not None:
        measured += [("decoder.onnx", fidelity.divergence), ("decoder.int8_cache.onnx", fidelity.int8_cache)]
    for name, divergence in measured:
        if divergence is not None:
            yield name, "mean KL", divergence.mean_kl, "max_mean_kl"
            if divergence.tokens >= MIN_TOKENS_FOR_SAME_TOP:
                yield name, "same top token", divergence.same_top, "min_same_top"


@torch.inference_mode()
def _source_logits(
    checkpoint: Checkpoint, studies: Sequence[EncodedStudy], features: Sequence[Tensor], device: str, show: bool
) -> list[Tensor]:
    """Compute the source's logits of every target token, holding one decoder layer at a time.

    Returns:
        Per study [len(target_ids), vocab_size], float32, on the CPU.
    """
    config = checkpoint.decoder
    embeddings = checkpoint.read_base("model.embed_tokens.weight")
    hidden = [embed(study, image, embeddings).to(device) for study, image in zip(studies, features, strict=True)]
    del embeddings
    for index in progress_bar("running the source", range(config.num_hidden_layers), unit="layer", show=show):
        layer = checkpoint.read_layer(index)
        linear = forward.source_linear(layer, device)
        hidden = [forward.decoder_layer(config, layer.weights, linear, x) for x in hidden]
        del layer, linear
    norm = checkpoint.read_base("model.norm.weight")
    head = checkpoint.read_base("lm_head.weight").to(device, torch.float32)
    scored = [x[-len(study.target_ids) :] for study, x in zip(studies, hidden, strict=True)]
    return [torch.nn.functional.linear(forward.rms_norm(x, norm, config.rms_norm_eps), head).cpu() for x in scored]


@torch.inference_mode()
def _artifact_logits(
    artifact: Artifact,
    studies: Sequence[EncodedStudy],
    features: Sequence[Tensor],
    device: str,
    show: bool,
    cache_dtypes: Sequence[CacheDtype | None] = (None,),
) -> list[list[Tensor]]:
    """Compute the same with the runtime's decoder from the files just written, once for each kind of cache."""
    hidden: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    last: list[list[Tensor]] = []
    num_hidden_layers = artifact.decoder_config().num_hidden_layers
    for index in progress_bar("running the artifact", range(num_hidden_layers), unit="layer", show=show):
        decoder = load_decoder(artifact, device=device, layers=range(index, index + 1))
        if not hidden:
            embedded = [_parts(decoder, study, image) for study, image in zip(studies, features, strict=True)]
            hidden = [list(embedded) for _ in cache_dtypes]
        last = [[] for _ in cache_dtypes]
        for kind, cache_dtype in enumerate(cache_dtypes):
            decoder.quantizes_cache = cache_dtype == "int8"
            for study, parts in enumerate(hidden[kind]):
                hidden[kind][study], normed = _through_layer(decoder, parts)
                last[kind].append(normed[-len(parts[2]) - 1 :])
        if index + 1 < num_hidden_layers:
            del decoder
    return [[decoder.head_logits(scored).cpu() for scored in kind] for kind in last]


def _parts(decoder: LlamaDecoder, study: EncodedStudy, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a study in the parts that the runtime reads (`lite.engines.segments.divide`): film, question, text."""
    prompt = decoder.embed(study.input_ids, image)
    end = study.image_at + len(image)
    return prompt[:end], prompt[end:], decoder.embed(study.target_ids[:-1])


def _through_layer(
    decoder: LlamaDecoder, parts: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Read a study part by part; return the parts behind the layer, and all of them normed.

    A text is computed behind its prompt, as it is when it is decoded: what an int8 cache loses is lost there.
    """
    lengths = [len(part) for part in parts]
    cache, start = decoder.new_cache(1, sum(lengths)), 0
    found = []
    for part, reads_cache in zip(parts, (False, False, True), strict=True):
        if len(part):
            found.append(decoder(part[None], cache, start=start, reads_cache=reads_cache))
            start += len(part)
    after, normed = (torch.cat([pair[i][0] for pair in found]) for i in (0, 1))
    film, question, text = torch.split(after, lengths)
    return (film, question, text), normed


def _compare_onnx(
    artifact: Artifact, part: OnnxPart, judged: NamedStudies, features: Sequence[Tensor], logits: Sequence[Tensor]
) -> OnnxPart:
    """Compare decoder.onnx with the logits of decoder/, and its int8 cache with the float one."""
    studies = judged.studies

    def scored(cache_dtype: CacheDtype | None) -> list[Tensor]:
        decoder = OnnxDecoder(artifact, cache_dtype=cache_dtype)
        pairs = zip(studies, features, strict=True)
        return [
            torch.from_numpy(score(decoder, s.input_ids, s.target_ids, image.numpy(), num_image_tokens=len(image)))
            for s, image in pairs
        ]

    with_float = scored(None)
    fidelity = DecoderFidelity(
        data=judged.data,
        divergence=_compare_logits(studies, logits, with_float),
        int8_cache=_compare_logits(studies, with_float, scored("int8")) if part.int8_cache else None,
    )
    return dataclasses.replace(part, fidelity=fidelity)


def _source_features(checkpoint: Checkpoint, studies: Sequence[EncodedStudy], device: str) -> list[Tensor]:
    tensors = {name: tensor.to(device) for name, tensor in checkpoint.read_tower().items()}
    with torch.inference_mode():
        films = [torch.from_numpy(study.pixel_values)[None].to(device) for study in studies]
        return [forward.image_features(tensors, checkpoint.tower, film)[0].cpu() for film in films]


def _artifact_features(artifact: Artifact, studies: Sequence[EncodedStudy]) -> list[Tensor]:
    encoder = VisionEncoder(artifact)
    return [torch.from_numpy(encoder(study.pixel_values[None])[0]) for study in studies]


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


def _compare_logits(studies: Sequence[EncodedStudy], source: Sequence[Tensor], ours: Sequence[Tensor]) -> Divergence:
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
