"""`decoder.onnx` in an artifact: written beside `decoder/`, its int8 cache calibrated, and both measured.

decoder/ ─▶ decoder.onnx ─ studies ─▶ largest keys and values ─▶ decoder.int8_cache.onnx
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

from export import verify
from export.progress import progress_bar, stage
from export.studies import NamedStudies, StudyReader, by_film, read_judged, sha256_of_studies, with_own_films
from export.write.cache_scales import find_cache_scales
from export.write.decoder_onnx import (
    ACCURACY_LEVEL,
    DATA_NAME,
    EMBEDDINGS_NAME,
    GRAPH_NAME,
    require_gptq,
    require_head_dim,
    write_decoder_onnx,
)
from export.write.int8_cache_graph import INT8_CACHE_GRAPH_NAME, write_int8_cache_graph
from export.write.prompt_graphs import EXACTNESS_NAME, PROMPTS_DATA_NAME, write_prompt_graphs
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import Int8CacheGraph, OnnxFloat, OnnxPart, PromptGraphs, unhashed
from lite.artifact.write import staged_artifact
from lite.engines.machine import check_device
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import INT8_CACHE_SINCE, import_onnxruntime, is_at_least
from lite.errors import ArtifactError
from lite.files import link_or_copy
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from export.settings import ExportSettings, OnnxSettings

MAX_CACHE_STUDIES: Final = 16
"""Studies that the scales of the cache are found on, at most: each has a thousand tokens and more."""
CACHE_TOKENS: Final = 256
"""Findings tokens of each, at most."""


def write_onnx_part(artifact: Artifact, cache: NamedStudies, settings: OnnxSettings | ExportSettings) -> OnnxPart:
    """Write the files of `decoder.onnx` into an artifact that is being written.

    Args:
        artifact: Its other files, and what its manifest will say of them.
        cache: What the int8 cache is calibrated on: the first `MAX_CACHE_STUDIES`.
        settings: How.

    Returns:
        The part. With an ONNX Runtime that has no int8 cache there is no graph with one.
    """
    show_progress = settings.show_progress
    with stage("writing decoder.onnx", show=show_progress):
        part = _write_float_graph(artifact, settings.activations)
    part = _with_int8_cache(artifact, part, cache, show_progress=show_progress)
    if settings.prompt_weights == "stored":
        return part
    with stage("writing weights for prompts", show=show_progress):
        return _with_prompts(artifact, part)


def _with_prompts(artifact: Artifact, part: OnnxPart) -> OnnxPart:
    """Write the graphs for prompts, and what they read."""
    has_int8 = part.int8_cache is not None
    prompts = PromptGraphs(
        graph=f"decoder.prompts.{GRAPH_NAME.partition('.')[2]}",
        int8_cache=f"decoder.prompts.{INT8_CACHE_GRAPH_NAME.partition('.')[2]}" if has_int8 else None,
        data=PROMPTS_DATA_NAME,
        exactness=EXACTNESS_NAME,
    )
    graphs = {part.graph: prompts.graph}
    if part.int8_cache is not None and prompts.int8_cache is not None:
        graphs[part.int8_cache.graph] = prompts.int8_cache
    write_prompt_graphs(artifact.path, graphs)
    files = unhashed(*graphs.values(), prompts.data, prompts.exactness)
    return dataclasses.replace(part, files=part.files | files, prompts=prompts)


def _with_int8_cache(artifact: Artifact, part: OnnxPart, cache: NamedStudies, *, show_progress: bool) -> OnnxPart:
    """Write the graph with an int8 cache, if this ONNX Runtime has one."""
    written = artifact.with_parts(decoder_onnx=part)
    default = artifact.manifest.parts.default_adapter
    encoder, decoder = VisionEncoder(written), OnnxDecoder(written, adapters=() if default is None else (default,))
    if not is_at_least(import_onnxruntime().__version__, INT8_CACHE_SINCE):
        return part
    studies = cache.studies[:MAX_CACHE_STUDIES]
    bar = progress_bar("finding cache scales", by_film(studies), unit="film", show=show_progress)
    with stage("finding cache scales", show=show_progress):
        scales = find_cache_scales(decoder, bar, lambda film: encoder(film.pixel_values[None])[0])
        write_int8_cache_graph(artifact.path, *scales)
    num_image_tokens = artifact.manifest.parts.vision.num_image_tokens
    graph = Int8CacheGraph(
        graph=INT8_CACHE_GRAPH_NAME,
        data=cache.data,
        sha256=sha256_of_studies(studies),
        studies=len(studies),
        tokens=sum(study.num_tokens(num_image_tokens) for study in studies),
    )
    return dataclasses.replace(part, files=part.files | unhashed(INT8_CACHE_GRAPH_NAME), int8_cache=graph)


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
        path: The artifact. Nothing in it is changed.
        settings: How.
        out: The artifact to make, of the same files and the new ones; None puts it in the place of the old one, once
            it is complete.

    Returns:
        The finished artifact.

    Raises:
        ArtifactError: The artifact is damaged or not GPTQ, or `decoder.onnx` does not compute what `decoder/` does.
        LiteError: A list of studies cannot be used.
        BackendUnavailable: A package is missing or too old.
    """
    device = check_device(settings.device)
    source = Path(path).resolve()
    artifact = load_artifact(source)
    require_gptq(artifact.decoder_config())
    require_head_dim(artifact.decoder_config())
    artifact.verify()
    target = source if out is None else Path(out).resolve()
    if out is not None and target.is_relative_to(source):
        msg = f"{target}: got a place inside the artifact · expected one beside it · choose another place"
        raise ArtifactError(msg)
    tokenizer, manifest = artifact.file(artifact.manifest.parts.tokenizer.file), artifact.manifest
    max_seq_len = artifact.decoder_config().max_position_embeddings
    judged = read_judged(tokenizer, manifest, max_seq_len, settings)
    cache = StudyReader(tokenizer, manifest, max_seq_len=max_seq_len, max_tokens=CACHE_TOKENS).read(
        settings.calibration_data, settings.calibration_images, MAX_CACHE_STUDIES, option="--calibration-images"
    )
    show = settings.show_progress
    with staged_artifact(target, overwrite=out is None) as staged:
        artifact = dataclasses.replace(artifact, path=staged.path).with_parts(decoder_onnx=None)
        for name in artifact.manifest.files:
            link_or_copy(source / name, staged.path / name)
        part = write_onnx_part(artifact, with_own_films(cache), settings)
        artifact = artifact.with_parts(decoder_onnx=part)
        part = verify.measure_onnx(artifact, part, judged, device=device, show_progress=show)
        manifest = artifact.manifest.with_parts(decoder_onnx=part)
        verify.require_parity(manifest.parts)
        staged.finish(manifest)
    return load_artifact(target)
