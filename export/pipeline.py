"""The export from end to end: open and check, hash the sources, write the parts, measure them, keep the artifact.

    sources ─hash─▶ vision.onnx ─▶ decoder, a layer at a time ─▶ parity ─▶ artifact

It works in a folder beside the destination (`export.write.work`). An export that is stopped (Ctrl-C, a full disk, a
power cut) leaves its finished layers there, and the same command goes on behind them: to the same bytes, on the same
machine with the same number of threads. Nothing is at the
destination until everything is written and measured, and no artifact that fails parity is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from tqdm import tqdm

from export import verify
from export.quantize.calibration import (
    CalibrationStudies,
    HiddenStates,
    read_calibration,
    start_states,
    token_weights,
)
from export.quantize.layerwise import STAGES, LayerQuantizer
from export.quantize.token_weights import num_search_steps, search_token_weights
from export.settings import DEFAULTS, ExportSettings, TokenWeights
from export.source.checkpoint import Checkpoint, base_shapes, open_checkpoint
from export.studies import EncodedStudy, StudyReader
from export.write.decoder import (
    CONFIG_NAME,
    DecoderFolder,
    PartReport,
    calibrated_part,
    decoder_bytes,
    embeddings_part,
    head_part,
    layer_part,
    quantization_config,
    require_divisible,
    write_configs,
)
from export.write.onnx_part import BUILT_IN, MAX_CACHE_STUDIES, CacheStudies, write_onnx_part
from export.write.vision_onnx import build_vision_onnx, write_vision_onnx
from export.write.work import SEARCH_NAME, VISION_NAME, WorkFolder, work_folder, work_path
from lite._version import __version__
from lite.artifact.manifest import NOTICE, Manifest
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import (
    UNHASHED,
    CalibrationRecord,
    DecoderConfigPart,
    DecoderPart,
    MergeRecord,
    OnnxPart,
    Parts,
    TokenizerPart,
    TokenWeightSearch,
    TowerShape,
    VisionPart,
    unhashed,
)
from lite.artifact.write import check_target, staged_artifact
from lite.engines.torch_engine.device import check_device
from lite.errors import ArtifactError, BackendUnavailable
from lite.files import disk_errors_explained, give_name, whole_file
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

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
        The finished artifact; `artifact.manifest.fidelity` holds what was measured.

    Raises:
        CheckpointError: The source cannot be exported.
        ArtifactError: The artifact cannot be written there, or does not compute what the source does.
        BackendUnavailable: A package or device is missing.
    """
    # A wrong device should not show only when everything is written.
    settings = dataclasses.replace(settings, device=check_device(settings.device))
    check_target(Path(out).absolute(), overwrite=settings.overwrite)
    source = open_checkpoint(Path(checkpoint), Path(base))
    require_divisible(base_shapes(source.decoder), settings)
    with (
        _system_errors_explained(Path(out), settings),
        work_folder(Path(out), source.decoder.num_hidden_layers) as work,
    ):
        manifest = _manifest(source, work.decoder, settings)
        # Texts and films are read before the long part: a wrong path should not cost hours.
        studies = _studies(source, manifest, settings)
        calibration = read_calibration(source, manifest, settings.gptq) if settings.calibrates else None
        _require_space(source, work.path, calibration, settings)
        manifest = dataclasses.replace(manifest, sources=_hash_sources(source, settings))
        work.require_same(_arguments(manifest, calibration, settings))
        _write_vision(source, work.vision, settings)
        if calibration is None:
            _write_layers(source, work, settings)
        else:
            record = _write_calibrated_layers(source, work, manifest, calibration, settings)
            manifest = _with_decoder(manifest, calibration=record)
        _finish_decoder(source, work, manifest, settings)
        manifest = _with_decoder(manifest, files=unhashed(*work.decoder.files()), merge=_merge_record(source, work))
        with staged_artifact(out, overwrite=settings.overwrite) as staged:
            work.link_into(staged.path)
            shutil.copyfile(source.tokenizer, staged.path / TOKENIZER_NAME)
            artifact = Artifact(path=staged.path, manifest=manifest, id=UNHASHED)
            if settings.onnx:
                part = _write_onnx(artifact, studies, calibration, settings)
                artifact = artifact.with_parts(decoder_onnx=part)
            parts = _measure(source, artifact, studies, settings)
            try:
                verify.require_parity(parts)
            except ArtifactError:
                work.discard_parts()
                raise
            staged.finish(dataclasses.replace(artifact.manifest, parts=parts))
    return load_artifact(out)


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
                files=unhashed(VISION_NAME),
                format=settings.vision_format,
                image_size=source.tower.image_size,
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
    not_decoder = ("onnx", "activations", "overwrite", "show_progress")
    for name in (*not_decoder, "verify_data", "image_folder", "verify_studies", "verify_tokens"):
        del given[name]
    gptq: dict[str, Any] = given.pop("gptq")
    weights = settings.gptq.token_weights
    gptq["token_weights"] = "search" if weights is None else str(weights)
    # Of the calibration it is the content that counts, wherever it lies.
    del gptq["calibration_images"]
    gptq["calibration_data"] = calibration and f"{calibration.data} ({calibration.sha256[:12]})"
    if not settings.decoder_format.startswith("gptq"):
        gptq = {}
    sources = {name: sha256[:12] for name, sha256 in manifest.sources.items()}
    versions = {"version": manifest.created_by, "torch": torch.__version__, "threads": torch.get_num_threads()}
    return given | gptq | sources | versions


def _studies(source: Checkpoint, manifest: Manifest, settings: ExportSettings) -> list[EncodedStudy]:
    reader = StudyReader(
        source.tokenizer,
        manifest,
        max_seq_len=source.decoder.max_position_embeddings,
        max_tokens=settings.verify_tokens,
    )
    return reader.read(settings.verify_data, settings.image_folder, settings.verify_studies, option="--verify-data")


def _require_space(
    source: Checkpoint, folder: Path, calibration: CalibrationStudies | None, settings: ExportSettings
) -> None:
    """Refuse a disk that is too small before the work, not after it."""
    vision = sum(_numel(entry.shape) for entry in (source.trunk.entries | source.projector.entries).values())
    needed = decoder_bytes(base_shapes(source.decoder), settings)
    if settings.onnx:
        # The same once more, an 8-bit head, and scales of twice the bytes.
        needed += needed + needed // 20
    needed += vision * {"fp32": 4, "fp16": 2, "int8": 2}[settings.vision_format] + (1 << 20)
    if calibration is not None:
        tokens = sum(study.num_tokens(source.tower.num_patches) for study in calibration.studies)
        # A layer's inputs and outputs; the search takes as much, of fewer studies, before.
        needed += 2 * tokens * source.decoder.hidden_size * 4
    needed -= sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        msg = (
            f"{folder.parent}: got {free / 2**30:.2f} GiB free · expected at least {needed / 2**30:.2f} GiB for the "
            "artifact and what it is made from · free some space, or choose an --out on another disk"
        )
        raise ArtifactError(msg)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _hash_sources(source: Checkpoint, settings: ExportSettings) -> dict[str, str]:
    total = sum(file.stat().st_size for file in source.files.values())
    hashes = {}
    with _bar(settings, "hashing the sources", total, unit="B", unit_scale=True) as bar:
        for name, file in source.files.items():
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
            hashes[name] = digest.hexdigest()
    return hashes


def _write_vision(source: Checkpoint, file: Path, settings: ExportSettings) -> None:
    if file.is_file():
        return
    with _bar(settings, "writing vision.onnx", 2, unit="step") as bar:
        model = build_vision_onnx(
            source.read_tower(), source.tower, vision_format=settings.vision_format, model_name=source.name
        )
        bar.update()
        with whole_file(file) as partial:
            write_vision_onnx(model, partial)
        bar.update()


def _write_layers(source: Checkpoint, work: WorkFolder, settings: ExportSettings) -> None:
    """Write the embeddings and all layers in a form that takes no calibration."""
    parts = range(work.decoder.num_finished(), source.decoder.num_hidden_layers + 1)
    with _bar(settings, "writing the decoder", work.decoder.num_parts, initial=parts.start, unit="part") as bar:
        for part in parts:
            report = PartReport()
            tensors = layer_part(source, part - 1, settings, report) if part else embeddings_part(source, report)
            work.keep_report(part, report)
            work.decoder.write(part, tensors)
            bar.update()


def _write_calibrated_layers(
    source: Checkpoint,
    work: WorkFolder,
    manifest: Manifest,
    calibration: CalibrationStudies,
    settings: ExportSettings,
) -> CalibrationRecord:
    """Write the embeddings and all layers, each rounded by what it sees behind those before it."""
    P, layers = source.tower.num_patches, source.decoder.num_hidden_layers
    weights = _token_weights(source, work, manifest, calibration, settings)
    lengths = [study.num_tokens(P) for study in calibration.studies]

    def states(index: int) -> HiddenStates:
        return HiddenStates(work.path / f"hidden-{index:04d}", lengths, source.decoder.hidden_size)

    finished = work.decoder.num_finished()
    if finished == 0:
        embeddings = source.read_base("model.embed_tokens.weight")
        with _bar(settings, "reading the films", len(calibration.studies), unit="film") as bar:
            features = _features(work, manifest)
            start_states(states(0).file, calibration.studies, features, embeddings, P, advance=bar.update)
        del embeddings, features
        report = PartReport()
        tensors = embeddings_part(source, report)
        work.keep_report(0, report)
        work.decoder.write(0, tensors)
        finished = 1
    by_token = [token_weights(study, P, weights) for study in calibration.studies]
    quantizer = LayerQuantizer(source.decoder, settings)
    first = min(finished - 1, layers)
    with _bar(settings, "rounding the decoder", layers * len(STAGES), initial=first * len(STAGES), unit="pass") as bar:
        for index in range(first, layers):
            inputs, outputs = states(index), states(index + 1)
            if not inputs.complete:
                msg = (
                    f"{inputs.file}: got no hidden states to go on from · expected those before layer {index} · "
                    f"remove {work.path} to begin anew"
                )
                raise ArtifactError(msg)
            name = f"model.layers.{index}"
            layer = source.read_layer(index).merged()
            # In a spare file until the layer is done: what is called outputs is complete.
            spare = outputs.beside(work.path / "hidden.partial")
            rounded = quantizer.quantize(name, layer, inputs, spare, by_token, advance=bar.update)
            give_name(spare.file, outputs.file)
            work.keep_report(index + 1, PartReport(errors={f"{name}.{k}": v for k, v in rounded.errors.items()}))
            work.decoder.write(index + 1, calibrated_part(index, rounded.norms, rounded.linears))
            inputs.remove()
            bar.set_postfix_str(_errors_shown(index, rounded.errors))
    return CalibrationRecord(
        data=calibration.data,
        sha256=calibration.sha256,
        studies=len(calibration.studies),
        tokens=sum(lengths),
        image_weight=weights.image,
        prompt_weight=weights.prompt,
        search=_search_record(work),
        errors=_whole_report(work).errors,
    )


def _search_record(work: WorkFolder) -> TokenWeightSearch | None:
    found = work.read(SEARCH_NAME)
    return found and TokenWeightSearch(held_out_studies=found["held_out_studies"], mean_kl=found["mean_kl"])


def _whole_report(work: WorkFolder) -> PartReport:
    """Add up the reports of the parts that are finished."""
    whole = PartReport()
    for part in range(work.decoder.num_finished()):
        whole.merge(work.report(part))
    return whole


def _token_weights(
    source: Checkpoint,
    work: WorkFolder,
    manifest: Manifest,
    calibration: CalibrationStudies,
    settings: ExportSettings,
) -> TokenWeights:
    """Return the token weights as given, as an earlier run has chosen them, or by a search."""
    if settings.gptq.token_weights is not None:
        return settings.gptq.token_weights
    chosen = work.read(SEARCH_NAME)
    if chosen is None:
        with _bar(settings, "choosing λ", num_search_steps(source), unit="step") as bar:
            features = _features(work, manifest)
            best, kl = search_token_weights(source, calibration, features, work.path, settings, advance=bar.update)
        chosen = {"chosen": dataclasses.asdict(best), "held_out_studies": len(calibration.held_out), "mean_kl": kl}
        work.write(SEARCH_NAME, chosen)
    return TokenWeights(**chosen["chosen"])


def _features(work: WorkFolder, manifest: Manifest) -> Callable[[EncodedStudy], Tensor]:
    """Return the exported tower: the decoder is calibrated on what it will see at run time."""
    encoder = VisionEncoder(Artifact(path=work.path, manifest=manifest, id=UNHASHED))
    return lambda study: torch.from_numpy(encoder(study.pixel_values[None])[0])


def _errors_shown(index: int, errors: dict[str, float]) -> str:
    shown = " ".join(f"{name.rpartition('.')[2].removesuffix('_proj')} {error:.1%}" for name, error in errors.items())
    return f"layer {index}: {shown}"


def _finish_decoder(source: Checkpoint, work: WorkFolder, manifest: Manifest, settings: ExportSettings) -> None:
    """Write the final norm, the head, and the small files."""
    last = work.decoder.num_parts - 1
    if work.decoder.num_finished() == last:
        report = PartReport()
        tensors = head_part(source, settings, report)
        work.keep_report(last, report)
        work.decoder.write(last, tensors)
    work.decoder.write_index()
    write_configs(
        work.decoder.folder,
        source.decoder,
        source.decoding,
        notice=manifest.notice,
        quantization=quantization_config(settings),
    )


def _write_onnx(
    artifact: Artifact,
    studies: Sequence[EncodedStudy],
    calibration: CalibrationStudies | None,
    settings: ExportSettings,
) -> OnnxPart:
    """Write decoder.onnx; its cache is calibrated on what the decoder was, or on what it will be measured on."""
    cache = CacheStudies(studies=studies[:MAX_CACHE_STUDIES], data=_verify_name(settings))
    if calibration is not None:
        cache = CacheStudies(studies=calibration.studies[:MAX_CACHE_STUDIES], data=calibration.data)
    with _bar(settings, "writing decoder.onnx", 2 + len(cache.studies), unit="step") as bar:
        return write_onnx_part(artifact, cache, activations=settings.activations, advance=bar.update)


def _verify_name(settings: ExportSettings) -> str:
    return BUILT_IN if settings.verify_data is None else Path(settings.verify_data).name


def _merge_record(source: Checkpoint, work: WorkFolder) -> MergeRecord:
    whole = _whole_report(work)
    return MergeRecord(
        lora_scale=source.adapter_config.scale,
        max_abs_rounding=whole.max_abs,
        max_abs_rounding_tensor=whole.max_abs_tensor,
        relative_rms_rounding=whole.relative_rms,
    )


def _measure(
    source: Checkpoint, artifact: Artifact, studies: Sequence[EncodedStudy], settings: ExportSettings
) -> Parts:
    with _bar(settings, "measuring parity", verify.num_steps(source), unit="step") as bar:
        return verify.measure(
            source,
            artifact,
            studies,
            data=_verify_name(settings),
            device=settings.device,
            advance=bar.update,
        )


def _bar(settings: ExportSettings, name: str, total: int, **kwargs: Any) -> tqdm[Any]:
    return tqdm(total=total, desc=f"{name:<20}", disable=not settings.show_progress, dynamic_ncols=True, **kwargs)


@contextlib.contextmanager
def _system_errors_explained(out: Path, settings: ExportSettings) -> Iterator[None]:
    """Turn what the system refuses into an error of ours: memory, a full disk, any file that cannot be used."""
    try:
        with disk_errors_explained(out, ArtifactError):
            yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(".")[0]
        msg = (
            f"{settings.device}: got too little free memory ({reason}) · expected about 4 GiB for a 7B layer · free "
            f"some and repeat the command, which goes on with what is finished in {work_path(out)}, or remove that "
            "folder and begin anew with --device cpu"
        )
        raise BackendUnavailable(msg) from error
