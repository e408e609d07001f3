"""The export from end to end: open and check, hash the sources, write the parts, measure them, keep the artifact.

    sources ─hash─▶ vision.onnx ─▶ decoder, a layer at a time ─▶ parity ─▶ artifact

It works in a folder beside the destination (`export.write.work`). An export that is stopped (Ctrl-C, a full disk, a
power cut) leaves its finished layers there, and the same command goes on behind them: to the same bytes, on the same
machine with the same number of threads. Nothing is at the destination until everything is written and measured. What
fails parity stays in that folder; only if it is told to, the export makes an artifact of it, which says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from export import verify
from export.progress import progress_bar, stage
from export.quantize.calibration import CalibrationStudies, read_calibration
from export.quantize.importance import IMPORTANCE_STUDIES
from export.settings import DEFAULTS, ExportSettings
from export.source.checkpoint import Checkpoint, open_checkpoint
from export.source.shapes import base_shapes
from export.studies import NamedStudies, read_judged, with_own_films
from export.write.adapter_part import write_published
from export.write.decoder import CONFIG_NAME, DecoderFolder, decoder_bytes, require_divisible
from export.write.decoder_onnx import require_head_dim
from export.write.layers import finish_decoder, merge_record, write_calibrated_layers, write_vision
from export.write.onnx_part import write_onnx_part
from export.write.retrieval_part import measure_retrieval, write_retrieval
from export.write.work import PROJECTOR_NAME, VISION_NAME, work_folder, work_path
from lite._version import __version__
from lite.artifact.manifest import NOTICE, Manifest
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import (
    UNHASHED,
    DecoderConfigPart,
    DecoderPart,
    Parts,
    TokenizerPart,
    TowerShape,
    VisionPart,
    unhashed,
)
from lite.artifact.write import check_target, staged_artifact
from lite.engines.machine import check_device
from lite.errors import ArtifactError, BackendUnavailable
from lite.files import disk_errors_explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.write.work import WorkFolder


_LOG = logging.getLogger(__name__)
LICENCE_NOTICE: Final = (
    "The weights keep the licence of the checkpoint they were converted from. microsoft/llava-rad: Microsoft Research "
    "License, for non-commercial research only, no clinical use, no redistribution of the model (converted or "
    "quantised included), no hosted service. Vicuna-7B v1.5: Llama 2 Community License."
)
TOKENIZER_NAME: Final = "tokenizer.model"
_CHUNK_BYTES: Final = 1 << 24


def export_artifact(
    checkpoint: str | Path, base: str | Path, out: str | Path, settings: ExportSettings = DEFAULTS
) -> Artifact:
    """Convert a checkpoint in LLaVA-Rad's published layout into an artifact.

    Args:
        checkpoint: Folder of the LLaVA-Rad download.
        base: Folder of its base language model.
        out: The artifact's folder; must not exist, unless `settings.overwrite`.
        settings: What to write, and how to measure it.

    Returns:
        The finished artifact; each of `artifact.manifest.parts` holds as `fidelity` what was measured of it.

    Raises:
        CheckpointError: The source cannot be exported.
        ArtifactError: The artifact cannot be written there, or does not compute what the source does.
        BackendUnavailable: A package or device is missing.
    """
    out = Path(out)
    # A wrong device should not show only when everything is written.
    settings = dataclasses.replace(settings, device=check_device(settings.device))
    check_target(out.absolute(), overwrite=settings.overwrite)
    text_vocab = None if settings.text_vocab is None else Path(settings.text_vocab)
    source = open_checkpoint(Path(checkpoint), Path(base), other_base=settings.other_base, text_vocab=text_vocab)
    require_divisible(base_shapes(source.decoder), settings)
    if settings.onnx:
        require_head_dim(source.decoder)
    with _system_errors_explained(out, settings), work_folder(out, source.decoder.num_hidden_layers) as work:
        manifest = _manifest(source, work.decoder, settings)
        # Texts and films are read before the long part: a wrong path should not cost hours.
        judged = read_judged(source.tokenizer, manifest, source.decoder.max_position_embeddings, settings)
        calibration = read_calibration(source, manifest, settings.gptq) if settings.calibrates else None
        _say_what_is_judged_twice(judged, calibration)
        _require_space(source, work.path, calibration, settings)
        with stage("hashing the sources", show=settings.show_progress):
            manifest = dataclasses.replace(manifest, sources=_hash_sources(source, settings))
        work.require_same(_arguments(manifest, calibration, settings))
        with stage("writing vision.onnx", show=settings.show_progress):
            write_vision(source, work.vision, settings)
        with stage("writing the decoder", show=settings.show_progress):
            if calibration is not None:
                record = write_calibrated_layers(source, work, manifest, calibration, settings)
                manifest = _with_decoder(manifest, calibration=record)
            finish_decoder(source, work, manifest, settings)
        manifest = _with_decoder(manifest, files=unhashed(*work.decoder.files()), merge=merge_record(source, work))
        _keep_measured(out, source, work, manifest, judged, calibration or with_own_films(judged), settings)
    return load_artifact(out)


def _say_what_is_judged_twice(judged: NamedStudies, calibration: CalibrationStudies | None) -> None:
    both = {study.film_sha256[:16] for study in judged.studies} & {*(calibration.films if calibration else ())}
    if both:
        _LOG.warning(
            "%s: %d of %d films are those of the calibration: what is lost on them flatters",
            judged.data, len(both), len(judged.studies),
        )  # fmt: skip


def _keep_measured(
    out: Path,
    source: Checkpoint,
    work: WorkFolder,
    manifest: Manifest,
    judged: NamedStudies,
    for_cache: NamedStudies,
    settings: ExportSettings,
) -> None:
    """Make the artifact of the finished parts, and put it in its place if it computes what the source does."""
    show = settings.show_progress
    with staged_artifact(out, overwrite=settings.overwrite) as staged:
        work.link_into(staged.path)
        shutil.copyfile(source.tokenizer, staged.path / TOKENIZER_NAME)
        artifact = Artifact(path=staged.path, manifest=manifest, id=UNHASHED)
        if settings.keep_lora:
            with stage("writing the published LoRA", show=show):
                artifact = write_published(artifact, source)
        if settings.onnx:
            part = write_onnx_part(artifact, for_cache, settings)
            artifact = artifact.with_parts(decoder_onnx=part)
        parts = verify.measure(source, artifact, judged, device=settings.device, show_progress=show)
        if source.retrieval is not None:
            with stage("writing and measuring retrieval", show=show):
                retrieval = write_retrieval(source, source.retrieval, artifact, settings)
                retrieval = measure_retrieval(source, source.retrieval, artifact, retrieval, judged)
            parts = dataclasses.replace(parts, retrieval=retrieval)
        try:
            refused = verify.require_parity(parts, keep_anyway=settings.keep_anyway)
        except ArtifactError as error:
            todo = "the same command goes on with it, with another --verify-data it measures again, and with "
            todo += "--keep-anyway it makes the artifact and marks it; remove that folder to begin anew"
            raise ArtifactError(f"{error} · what is finished stays in {work.path} · {todo}") from None
        staged.finish(dataclasses.replace(artifact.manifest, parts=parts, refused=refused))


def _manifest(source: Checkpoint, decoder: DecoderFolder, settings: ExportSettings) -> Manifest:
    return Manifest(
        model=source.name,
        created_by=f"llava-rad-lite {__version__}",
        sources={},
        preprocessing=source.preprocessing,
        decoding=source.decoding,
        notice=f"{NOTICE} {source.notice or LICENCE_NOTICE}",
        parts=Parts(
            tokenizer=TokenizerPart(files=unhashed(TOKENIZER_NAME)),
            vision=VisionPart(
                files=unhashed(VISION_NAME, PROJECTOR_NAME),
                graph=VISION_NAME,
                projector=PROJECTOR_NAME,
                format=settings.vision_format,
                image_size=source.tower.image_size,
                num_patches=source.tower.num_patches,
                num_image_tokens=source.tower.num_patches,
                hidden_size=source.decoder.hidden_size,
                tower=TowerShape(
                    hidden_size=source.tower.dim,
                    intermediate_size=source.tower.mlp_dim,
                    num_hidden_layers=source.tower.num_blocks,
                    num_attention_heads=source.tower.num_heads,
                ),
            ),
            decoder_config=DecoderConfigPart(files=unhashed(CONFIG_NAME)),
            decoder=_decoder_part(settings, decoder.weights),
        ),
    )


def _decoder_part(settings: ExportSettings, weights: tuple[str, ...]) -> DecoderPart:
    part = DecoderPart(files=unhashed(*weights), weights=weights, format=settings.decoder_format)
    if not settings.decoder_format.startswith("gptq"):
        return part
    gptq = settings.gptq
    return dataclasses.replace(part, group_size=gptq.group_size, method=gptq.method, lm_head=gptq.lm_head)


def _with_decoder(manifest: Manifest, **changes: Any) -> Manifest:
    decoder = dataclasses.replace(manifest.parts.decoder, **changes)
    return manifest.with_parts(decoder=decoder)


def _arguments(manifest: Manifest, calibration: CalibrationStudies | None, settings: ExportSettings) -> dict[str, Any]:
    """Return all that the bytes of decoder/ and vision.onnx depend on, by the names a user knows."""
    given: dict[str, Any] = dataclasses.asdict(settings)
    # How it is measured, and what is made of decoder/, changes no weight.
    not_decoder = ("onnx", "activations", "prompt_weights", "other_base", "overwrite", "keep_anyway", "show_progress")
    of_retrieval = ("retrieval", "text_vocab", "text_format")
    for name in (*not_decoder, *of_retrieval, "verify_data", "image_folder", "verify_studies", "verify_tokens"):
        del given[name]
    gptq: dict[str, Any] = given.pop("gptq")
    weights = settings.gptq.token_weights
    gptq["token_weights"] = "measure" if weights is None else str(weights)
    # Of the calibration it is the content that counts, wherever it lies.
    del gptq["calibration_images"]
    gptq["calibration_data"] = calibration and f"{calibration.data} ({calibration.sha256[:12]})"
    if not settings.decoder_format.startswith("gptq"):
        gptq = {}
    sources = {name: sha256[:12] for name, sha256 in manifest.sources.items()}
    versions = {"version": manifest.created_by, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return given | gptq | sources | versions


def _require_space(
    source: Checkpoint, folder: Path, calibration: CalibrationStudies | None, settings: ExportSettings
) -> None:
    """Refuse a disk that is too small before the work, not after it."""
    vision = sum(math.prod(entry.shape) for entry in (source.trunk.entries | source.projector.entries).values())
    needed = decoder_bytes(base_shapes(source.decoder), settings)
    if settings.onnx:
        # The same once more, an 8-bit head, and scales of twice the bytes.
        needed += needed + needed // 20
        weights = sum(math.prod(shape) for shape in base_shapes(source.decoder).values())
        needed += weights if settings.prompt_weights == "int8" else 0
    needed += vision * {"fp32": 4, "fp16": 2, "int8": 2}[settings.vision_format] + (1 << 20)
    if source.retrieval is not None:
        # At most: what of a checkpoint is not the trunk, and a block of it once more.
        others = sum(math.prod(entry.shape) for entry in source.retrieval.others.entries.values())
        needed += (others + vision // 8) * 4
    if calibration is not None:
        lengths = [study.num_tokens(source.tower.num_patches) for study in calibration.studies]
        # A layer's inputs and outputs; before that, of a few studies, what all layers read and gradients.
        states = max(2 * sum(lengths), (source.decoder.num_hidden_layers + 2) * sum(lengths[:IMPORTANCE_STUDIES]))
        needed += states * source.decoder.hidden_size * 4
    needed -= sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder.parent}: got {free / 2**30:.2f} GiB free · expected at least {needed / 2**30:.2f} GiB for the "
            "artifact and what it is made from · free some space, or choose an --out on another disk"
        )


def _hash_sources(source: Checkpoint, settings: ExportSettings) -> dict[str, str]:
    total, show = sum(file.stat().st_size for file in source.files.values()), settings.show_progress
    hashes = {}
    with progress_bar("hashing the sources", total=total, unit="B", unit_scale=True, show=show) as bar:
        for name, file in source.files.items():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
            hashes[name] = digest.hexdigest()
    return hashes


@contextlib.contextmanager
def _system_errors_explained(out: Path, settings: ExportSettings) -> Iterator[None]:
    """Turn what the system refuses into an error of ours: memory, a full disk, any file that cannot be used."""
    try:
        with disk_errors_explained(out, ArtifactError):
            yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(".")[0]
        raise BackendUnavailable(
            f"{settings.device}: got too little free memory ({reason}) · expected about 4 GiB for a 7B layer · free "
            f"some and repeat the command, which goes on with what is finished in {work_path(out)}, or remove that "
            "folder and begin anew with --device cpu"
        ) from error
