"""vision.onnx and the decoder's parts, written into the folder an export works in, behind what is there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from export.progress import progress_bar
from export.quantize.calibration import KINDS, HiddenStates, start_states, token_kinds
from export.quantize.importance import IMPORTANCE_STUDIES, Importance, SourceDecoder, measure_importance, uniform
from export.quantize.layerwise import PASSES, LayerQuantizer
from export.write.decoder import (
    PartReport,
    calibrated_part,
    plain_part,
    quantization_config,
    write_configs,
)
from export.write.vision_onnx import build_vision_onnx, write_vision_onnx
from export.write.work import IMPORTANCE_NAME
from lite.artifact.open import Artifact
from lite.artifact.parts import UNHASHED, CalibrationRecord, MergeRecord
from lite.errors import ArtifactError
from lite.files import give_name, whole_file
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from export.quantize.calibration import CalibrationStudies
    from export.settings import ExportSettings
    from export.source.checkpoint import Checkpoint
    from export.studies import EncodedStudy
    from export.write.work import WorkFolder
    from lite.artifact.manifest import Manifest


def write_vision(source: Checkpoint, files: Sequence[Path], settings: ExportSettings) -> None:
    """Write vision.onnx and projector.onnx, unless an earlier run has."""
    if all(file.is_file() for file in files):
        return
    models = build_vision_onnx(
        source.read_tower(), source.tower, vision_format=settings.vision_format, model_name=source.name
    )
    for file, model in zip(files, models, strict=True):
        with whole_file(file) as partial:
            write_vision_onnx(model, partial)


def write_parts(source: Checkpoint, work: WorkFolder, settings: ExportSettings, *, end: int | None = None) -> None:
    """Write the parts that are not there yet, all or up to an end, in forms that take no calibration."""
    source = stored_of(source, settings)
    done, end, show = work.decoder.num_finished(), end or work.decoder.num_parts, settings.show_progress
    for part in progress_bar("writing the decoder", range(done, end), total=end, initial=done, unit="part", show=show):
        report = PartReport()
        work.finish_part(part, plain_part(source, part, settings, report), report)


def stored_of(source: Checkpoint, settings: ExportSettings) -> Checkpoint:
    """Return what `decoder/` is made of: the LoRA merged, or the base alone."""
    return source.apart() if settings.keep_lora else source


def write_calibrated_layers(
    source: Checkpoint,
    work: WorkFolder,
    manifest: Manifest,
    calibration: CalibrationStudies,
    settings: ExportSettings,
) -> CalibrationRecord:
    """Write the embeddings and all layers, each rounded by what it sees behind those before it."""
    P, layers, show = source.tower.num_patches, source.decoder.num_hidden_layers, settings.show_progress
    importance = _importance(source, work, manifest, calibration, settings)
    lengths = [study.num_tokens(P) for study in calibration.studies]

    def states(index: int) -> HiddenStates:
        return HiddenStates(work.path / f"hidden-{index:04d}", lengths, source.decoder.hidden_size)

    if work.decoder.num_finished() == 0:
        embeddings, features = source.read_base("model.embed_tokens.weight"), _features(work, manifest)
        start_states(states(0).file, calibration.studies, features, embeddings, P, show=show)
        del embeddings, features
        write_parts(source, work, settings, end=1)
    kinds = [token_kinds(study, P) for study in calibration.studies]
    first = min(work.decoder.num_finished() - 1, layers)
    total, done = layers * PASSES, first * PASSES
    with progress_bar("rounding the decoder", total=total, initial=done, unit="pass", show=show) as bar:
        for index in range(first, layers):
            name, stored, beside = f"model.layers.{index}", stored_of(source, settings), {}
            if settings.keep_lora:
                pairs = source.read_layer(index).lora
                beside = {
                    f"{linear}.weight": pair.scale * (pair.b.float() @ pair.a.float()) for linear, pair in pairs.items()
                }
            layer = stored.read_layer(index).merged()
            quantizer = LayerQuantizer(name, layer, source.decoder, settings, beside=beside, advance=bar.update)
            _round_layer(work, quantizer, index, states(index), states(index + 1), kinds, importance[index])
            bar.set_postfix_str(_errors_shown(index, quantizer.errors))
    return CalibrationRecord(
        data=calibration.data,
        sha256=calibration.sha256,
        films=calibration.films,
        studies=len(calibration.studies),
        left_out=calibration.left_out,
        tokens=sum(lengths),
        token_weights=_mean_weights(importance),
        measured=settings.gptq.token_weights is None,
        errors=work.whole_report().errors,
    )


def _round_layer(
    work: WorkFolder,
    quantizer: LayerQuantizer,
    index: int,
    inputs: HiddenStates,
    outputs: HiddenStates,
    kinds: list[Tensor],
    importance: Importance,
) -> None:
    """Round a layer, and write it and the hidden states behind it."""
    if not inputs.complete:
        msg = f"{inputs.file}: got no hidden states to go on from · expected those before layer {index}"
        raise ArtifactError(f"{msg} · remove {work.path} to begin anew")
    # In a spare file until the layer is done: what is called outputs is complete.
    spare = outputs.beside(work.path / "hidden.partial")
    quantizer.quantize(inputs, spare, kinds, importance)
    give_name(spare.file, outputs.file)
    report = PartReport(errors={f"{quantizer.name}.{linear}": error for linear, error in quantizer.errors.items()})
    work.finish_part(index + 1, calibrated_part(quantizer.name, quantizer.norms, quantizer.linears), report)
    inputs.remove()


def _importance(
    source: Checkpoint,
    work: WorkFolder,
    manifest: Manifest,
    calibration: CalibrationStudies,
    settings: ExportSettings,
) -> list[Importance]:
    """Return what tokens count in each layer: as given, as an earlier run has measured it, or measured."""
    given, show = settings.gptq.token_weights, settings.show_progress
    if given is not None:
        return [uniform(given.image, given.prompt)] * source.decoder.num_hidden_layers
    found: list[Importance] | None = work.read(IMPORTANCE_NAME)
    if found is None:
        # Spread over the list, which may be sorted by patient, date or finding.
        every = max(1, len(calibration.studies) // IMPORTANCE_STUDIES)
        studies, P = calibration.studies[::every][:IMPORTANCE_STUDIES], source.tower.num_patches
        embeddings, features = source.read_base("model.embed_tokens.weight"), _features(work, manifest)
        states = start_states(work.path / "importance-0000", studies, features, embeddings, P, show=show)
        decoder = SourceDecoder(
            config=source.decoder,
            read_layer=lambda index: source.read_layer(index).merged(),
            norm=source.read_base("model.norm.weight"),
            head=source.read_base("lm_head.weight"),
        )
        kinds = [token_kinds(study, P) for study in studies]
        found = measure_importance(decoder, states, kinds, device=settings.device, show=show)
        states.remove()
        work.write(IMPORTANCE_NAME, found)
    return found


def _mean_weights(importance: list[Importance]) -> dict[str, float]:
    """Return what each kind of token counts in the mean over layers and linears."""
    every = [weights for layer in importance for weights in layer.values()]
    return {kind: sum(of) / len(every) for kind, of in zip(KINDS, zip(*every, strict=True), strict=True)}


def _features(work: WorkFolder, manifest: Manifest) -> Callable[[EncodedStudy], Tensor]:
    """Return the exported tower: the decoder is calibrated on what it will see at run time."""
    encoder = VisionEncoder(Artifact(path=work.path, manifest=manifest, id=UNHASHED))
    return lambda study: torch.from_numpy(encoder(study.pixel_values[None])[0])


def _errors_shown(index: int, errors: dict[str, float]) -> str:
    shown = " ".join(f"{name.rpartition('.')[2].removesuffix('_proj')} {error:.1%}" for name, error in errors.items())
    return f"layer {index}: {shown}"


def finish_decoder(source: Checkpoint, work: WorkFolder, manifest: Manifest, settings: ExportSettings) -> None:
    """Write the parts that are left, the final norm and the head at least, and the small files."""
    write_parts(source, work, settings)
    work.decoder.write_index()
    write_configs(
        work.decoder.folder,
        source.decoder,
        source.decoding,
        notice=manifest.notice,
        quantization=quantization_config(settings),
    )


def merge_record(source: Checkpoint, work: WorkFolder) -> MergeRecord:
    """Say what merging and storing the parts in 16 bits has rounded."""
    whole = work.whole_report()
    return MergeRecord(
        lora_scale=source.adapter.config.lora_alpha / source.adapter.config.r,
        max_abs_rounding=whole.max_abs,
        max_abs_rounding_tensor=whole.max_abs_tensor,
        relative_rms_rounding=whole.relative_rms,
    )
