"""`decoder.onnx` in an artifact: written beside `decoder/`, its int8 cache calibrated, and both measured.

decoder/ ─▶ decoder.onnx ─ studies ─▶ largest keys and values ─▶ decoder.int8_cache.onnx
└─ torch ─▶ p ─┬─ KL ─ q ◀─┘            parity "onnx"
q ─── KL ─── r ◀───────────────┘     parity "onnx int8 cache"
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from export import verify
from export.progress import progress_bar
from export.settings import DEFAULTS
from export.studies import EncodedStudy, StudyReader, list_name, sha256_of_studies
from export.write.cache_scales import find_cache_scales
from export.write.decoder_onnx import (
    ACCURACY_LEVEL,
    DATA_NAME,
    EMBEDDINGS_NAME,
    GRAPH_NAME,
    require_gptq,
    write_decoder_onnx,
)
from export.write.int8_cache_graph import INT8_CACHE_GRAPH_NAME, write_int8_cache_graph
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import Int8CacheGraph, OnnxFloat, OnnxPart, unhashed
from lite.artifact.write import staged_artifact
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import INT8_CACHE_SINCE, import_onnxruntime, is_at_least
from lite.engines.torch_engine.device import check_device
from lite.errors import ArtifactError
from lite.files import link_or_copy
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_CACHE_STUDIES: Final = 16
"""Studies that the scales of the cache are found on, at most: each has a thousand tokens and more."""
CACHE_TOKENS: Final = 256
"""Findings tokens of each, at most."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnnxSettings:
    """How `decoder.onnx` is written into an artifact that is there."""

    activations: OnnxFloat = "float32"
    """What it computes in, beside the integers: float32 for CPUs, float16 for the providers of GPUs."""
    calibration_data: str | Path | None = None
    """JSON list of studies to find the scales of the int8 cache on; None takes built-in ones."""
    calibration_images: str | Path | None = None
    """Where its images are; its own folder by default."""
    verify_data: str | Path | None = None
    """JSON list of studies to measure parity on; None takes built-in ones."""
    image_folder: str | Path | None = None
    """Where the images of `verify_data` are; its own folder by default."""
    verify_studies: int = DEFAULTS.verify_studies
    verify_tokens: int = DEFAULTS.verify_tokens
    device: str = "auto"
    """Where torch computes what it is measured against."""
    show_progress: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheStudies:
    """The studies that the scales of the int8 cache are found on."""

    studies: Sequence[EncodedStudy]
    data: str  # the list's file name, or "built-in"


def write_onnx_part(
    artifact: Artifact,
    cache: CacheStudies,
    *,
    activations: OnnxFloat,
    advance: Callable[[], object] = lambda: None,
) -> OnnxPart:
    """Write the files of `decoder.onnx` into an artifact that is being written.

    Args:
        artifact: its other files, and what its manifest will say of them.
        cache: what the int8 cache is calibrated on.
        activations: see `OnnxSettings`.
        advance: called twice, and once for each study.

    Returns:
        The part. With an ONNX Runtime that has no int8 cache there is no graph with one.

    Raises:
        ArtifactError: the decoder is not GPTQ.
        BackendUnavailable: ONNX Runtime is too old.
    """
    part = _write_float_graph(artifact, activations)
    advance()
    written = artifact.with_parts(decoder_onnx=part)
    encoder, decoder = VisionEncoder(written), OnnxDecoder(written)

    if not is_at_least(import_onnxruntime().__version__, INT8_CACHE_SINCE):
        for _ in range(1 + len(cache.studies)):
            advance()
        return part

    def features(study: EncodedStudy) -> Any:  # noqa: ANN401 - an array
        image = encoder(study.pixel_values[None])[0]
        advance()
        return image

    write_int8_cache_graph(artifact.path, *find_cache_scales(decoder, cache.studies, features))
    advance()
    num_image_tokens = artifact.manifest.parts.vision.num_image_tokens
    graph = Int8CacheGraph(
        graph=INT8_CACHE_GRAPH_NAME,
        data=cache.data,
        sha256=sha256_of_studies(list(cache.studies)),
        studies=len(cache.studies),
        tokens=sum(study.num_tokens(num_image_tokens) for study in cache.studies),
    )
    files_of_both = part.files | unhashed(INT8_CACHE_GRAPH_NAME)
    return dataclasses.replace(part, files=files_of_both, int8_cache=graph)


def _write_float_graph(artifact: Artifact, activations: OnnxFloat) -> OnnxPart:
    config = artifact.decoder_config()
    files = [artifact.file(name) for name in artifact.manifest.parts.decoder.weights]
    write_decoder_onnx(artifact.path, files, config, dtype=activations)
    bits = config.quantization.lm_head_bits if config.quantization else None
    return OnnxPart(
        files=unhashed(GRAPH_NAME, DATA_NAME, EMBEDDINGS_NAME),
        graph=GRAPH_NAME,
        data=DATA_NAME,
        embeddings=EMBEDDINGS_NAME,
        dtype=activations,
        accuracy_level=ACCURACY_LEVEL,
        lm_head_bits=4 if bits == 4 else 8,
    )


def add_onnx(path: str | Path, settings: OnnxSettings, *, out: str | Path | None = None) -> Artifact:
    """Write `decoder.onnx` for an artifact that has none, or write it anew.

    Args:
        path: the artifact. Nothing in it is changed.
        settings: how.
        out: the artifact to make, of the same files and the new ones; None puts it in the place of the old one, once
            it is complete.

    Returns:
        The finished artifact.

    Raises:
        ArtifactError: the artifact is damaged or not GPTQ, or `decoder.onnx` does not compute what `decoder/` does.
        CheckpointError: a list of studies cannot be used.
        BackendUnavailable: a package is missing or too old.
    """
    device = check_device(settings.device)
    artifact = load_artifact(Path(path).resolve())
    config = artifact.decoder_config()
    require_gptq(config)
    artifact.verify()

    judged, cache = _studies(artifact, settings)
    steps = 2 + len(cache.studies) + verify.num_onnx_steps(config)
    target = artifact.path if out is None else Path(out).resolve()
    if out is not None and target.is_relative_to(artifact.path):
        msg = f"{target}: got a place inside the artifact · expected one beside it · choose another place"
        raise ArtifactError(msg)
    bar = progress_bar("writing decoder.onnx", steps, show=settings.show_progress, unit="step")
    with staged_artifact(target, overwrite=out is None) as staged, bar:
        without = dataclasses.replace(artifact, path=staged.path).with_parts(decoder_onnx=None)
        for name in without.manifest.files:
            link_or_copy(artifact.path / name, staged.path / name)
        part = write_onnx_part(without, cache, activations=settings.activations, advance=bar.update)
        written, data = without.with_parts(decoder_onnx=part), list_name(settings.verify_data)
        part = verify.measure_onnx(written, part, judged, data=data, device=device, advance=bar.update)
        manifest = without.manifest.with_parts(decoder_onnx=part)
        verify.require_parity(manifest.parts)
        staged.finish(manifest)
    return load_artifact(target)


def _studies(artifact: Artifact, settings: OnnxSettings) -> tuple[Sequence[EncodedStudy], CacheStudies]:
    """Read what to measure on, and what to find the scales of the cache on."""
    manifest, max_seq_len = artifact.manifest, artifact.decoder_config().max_position_embeddings
    tokenizer = artifact.file(manifest.parts.tokenizer.file)

    def reader(max_tokens: int) -> StudyReader:
        return StudyReader(tokenizer, manifest, max_seq_len=max_seq_len, max_tokens=max_tokens)

    judged = reader(settings.verify_tokens).read(
        settings.verify_data, settings.image_folder, settings.verify_studies, option="--image-folder"
    )
    calibrating = reader(CACHE_TOKENS).read(
        settings.calibration_data, settings.calibration_images, MAX_CACHE_STUDIES, option="--calibration-images"
    )
    return judged, CacheStudies(studies=calibrating, data=list_name(settings.calibration_data))
