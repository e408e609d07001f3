"""The export from end to end: open and check, hash the sources, write the parts, measure them, keep the artifact.

Everything is written into a temporary folder beside the destination, which is renamed at the very end; whatever ends
an export early (an error, a full disk, Ctrl-C, parity out of tolerance) leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from export import verify
from export.checkpoint import Checkpoint, open_checkpoint
from export.decoder import MergeReport, SafetensorsWriter, fp16_specs, fp16_tensors, write_configs
from export.settings import DEFAULTS, ExportSettings, VisionFormat
from export.vision_onnx import build_vision_onnx, write_vision_onnx
from lite._version import __version__
from lite.artifact import (
    NOTICE,
    TOKENIZER_NAME,
    VISION_NAME,
    Artifact,
    DecoderPart,
    Manifest,
    VisionPart,
    load_artifact,
    staged_artifact,
)
from lite.decoder import check_device
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LICENCE_NOTICE: Final = (
    "The weights keep the licence of the checkpoint they were converted from. microsoft/llava-rad: Microsoft Research "
    "License, for non-commercial research only, no clinical use, no redistribution of the model (converted or "
    "quantised included), no hosted service. Vicuna-7B v1.5: Llama 2 Community License."
)
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
    source = open_checkpoint(Path(checkpoint), Path(base))
    with _system_errors_explained(Path(out)), staged_artifact(out, overwrite=settings.overwrite) as staged:
        _require_space(source, staged.path, settings.vision_format)
        manifest = _manifest(source, settings)
        # Texts and films are read before the long part: a wrong path should not cost an hour.
        studies = _studies(source, manifest, settings)
        manifest = dataclasses.replace(manifest, sources=_hash_sources(source, settings))
        _write_vision(source, staged.path, settings)
        merge = _write_decoder(source, staged.path / "decoder", manifest, settings)
        shutil.copyfile(source.tokenizer, staged.path / TOKENIZER_NAME)
        fidelity = {"merge": merge, **_measure(source, staged.path, manifest, studies, settings)}
        verify.require_parity(fidelity, manifest)
        staged.finish(dataclasses.replace(manifest, fidelity=fidelity))
    return load_artifact(out)


def _manifest(source: Checkpoint, settings: ExportSettings) -> Manifest:
    return Manifest(
        model=source.name,
        created_by=f"llava-rad-lite {__version__}",
        sources={},
        vision=VisionPart(
            format=settings.vision_format,
            image_size=source.tower.image_size,
            num_image_tokens=source.tower.num_patches,
            hidden_size=source.decoder.hidden_size,
        ),
        decoder=DecoderPart(format=settings.decoder_format),
        preprocessing=source.preprocessing,
        decoding=source.decoding,
        notice=f"{NOTICE} {source.notice or LICENCE_NOTICE}",
    )


def _studies(source: Checkpoint, manifest: Manifest, settings: ExportSettings) -> list[verify.VerifyStudy]:
    studies = verify.Studies(source, manifest, max_tokens=settings.verify_tokens)
    if settings.verify_data is None:
        return studies.built_in(settings.verify_studies)
    listed = Path(settings.verify_data)
    return studies.from_list(listed, Path(settings.image_folder or listed.parent), settings.verify_studies)


def _require_space(source: Checkpoint, folder: Path, vision_format: VisionFormat) -> None:
    """Refuse a disk that is too small before the work, not after it."""
    decoder = sum(spec.nbytes for spec in fp16_specs(source.decoder))
    vision = sum(_numel(entry.shape) for entry in (source.trunk.entries | source.projector.entries).values())
    needed = decoder + vision * (4 if vision_format == "fp32" else 2) + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        msg = (
            f"{folder.parent}: got {free / 2**30:.2f} GiB free · expected at least {needed / 2**30:.2f} GiB for the "
            "artifact · free some space, or choose an --out on another disk"
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


def _write_vision(source: Checkpoint, folder: Path, settings: ExportSettings) -> None:
    with _bar(settings, "writing vision.onnx", 2, unit="step") as bar:
        model = build_vision_onnx(
            source.read_tower(), source.tower, vision_format=settings.vision_format, model_name=source.name
        )
        bar.update()
        write_vision_onnx(model, folder / VISION_NAME)
        bar.update()


def _write_decoder(source: Checkpoint, folder: Path, manifest: Manifest, settings: ExportSettings) -> dict[str, Any]:
    folder.mkdir()
    report = MergeReport()
    with (
        _bar(settings, "merging the decoder", source.decoder.num_hidden_layers + 3, unit="part") as bar,
        SafetensorsWriter(folder, fp16_specs(source.decoder)) as writer,
    ):
        for _, tensors in fp16_tensors(source, report):
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            bar.update()
    write_configs(folder, source.decoder, source.decoding, notice=manifest.notice)
    return {
        "lora_scale": source.adapter_config.scale,
        "max_abs_rounding": report.max_abs,
        "max_abs_rounding_tensor": report.max_abs_tensor,
        "relative_rms_rounding": report.relative_rms,
    }


def _measure(
    source: Checkpoint,
    folder: Path,
    manifest: Manifest,
    studies: Sequence[verify.VerifyStudy],
    settings: ExportSettings,
) -> dict[str, Any]:
    with _bar(settings, "measuring parity", verify.num_steps(source, device=settings.device), unit="step") as bar:
        fidelity = verify.measure(source, folder, manifest, studies, device=settings.device, advance=bar.update)
    data = "built-in" if settings.verify_data is None else Path(settings.verify_data).name
    return {"verify_data": data, **fidelity}


def _bar(settings: ExportSettings, name: str, total: int, **kwargs: Any) -> tqdm[Any]:
    return tqdm(total=total, desc=f"{name:<20}", disable=not settings.show_progress, dynamic_ncols=True, **kwargs)


@contextlib.contextmanager
def _system_errors_explained(out: Path) -> Iterator[None]:
    """Turn what the system refuses into an error of ours: a full disk, or any file that cannot be read or written."""
    try:
        yield
    except OSError as error:
        # A write that finds no room does not know its file's name.
        where = error.filename or out
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            msg = (
                f"{where}: got a full disk · expected room to write the artifact · "
                "free some space, or choose an --out on another disk"
            )
        else:
            msg = (
                f"{where}: got an error from the system ({error.strerror or error}) · expected a file that can be read "
                "or written · check the disk and its permissions"
            )
        raise ArtifactError(msg) from error
