"""Exports that are stopped: what is kept, and that the same command goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import random_checkpoint
import torch
from filelock import FileLock
from repository import ROOT
from small_export import Folders, command_line, settings_for, stopped_at

import export.pipeline
import export.quantize.layerwise
import export.write.work
from export import TokenWeights, export_artifact
from export.quantize.calibration import HiddenStates
from export.source.checkpoint import open_checkpoint
from export.write.decoder import DecoderFolder
from lite.errors import ArtifactError, BackendUnavailable, CheckpointError, LiteError

if TYPE_CHECKING:
    from lite.artifact.open import Artifact


@pytest.fixture
def stopped(folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an export to "artifact" that was stopped with two parts of its decoder finished."""
    with stopped_at(monkeypatch, DecoderFolder, "write", 2):
        export_artifact(*folders, tmp_path / "artifact", settings_for(listed))
    return tmp_path / ".artifact.export"


@pytest.mark.parametrize(
    ("owner", "name", "call", "finished"),
    [
        (DecoderFolder, "write", 1, 1),  # the first layer is rounded, and not yet written
        pytest.param(export.quantize.layerwise.LayerQuantizer, "quantize", 1, 2, marks=pytest.mark.full),
        (HiddenStates, "write", 40, 2),  # in the middle of the second layer
        (export.pipeline.verify, "measure", 0, 4),
    ],
)
def test_a_stopped_export_goes_on_to_the_same_bytes(
    folders: Folders, listed: Path, gptq_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, call: int, finished: int,
) -> None:  # fmt: skip
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, owner, name, call):
        export_artifact(*folders, out, settings)
    work = tmp_path / ".artifact.export"
    parts = {part: part.stat().st_mtime_ns for part in (work / "decoder").glob("*.safetensors")}
    assert len(parts) == finished
    assert not out.exists()
    # The finished parts are those of the artifact: they are not made again.
    written: list[int] = []
    right = DecoderFolder.write
    monkeypatch.setattr(DecoderFolder, "write", lambda s, part, t: (written.append(part), right(s, part, t))[1])
    artifact = export_artifact(*folders, out, settings)
    assert written == list(range(finished, random_checkpoint.LAYERS + 2))
    assert artifact.id == gptq_artifact.id
    assert {path.name for path in tmp_path.iterdir()} == {"artifact"}


def test_what_tokens_count_is_measured_once_though_interrupted(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(listed, token_weights=None, calibration_studies=6)
    with stopped_at(monkeypatch, DecoderFolder, "write", 0):
        export_artifact(*folders, tmp_path / "artifact", settings)
    kept = {path.name for path in (tmp_path / ".artifact.export").iterdir()}
    assert "importance.json" in kept
    assert not [name for name in kept if name.startswith("importance-")]
    monkeypatch.setattr(export.write.layers, "measure_importance", None)
    calibration = export_artifact(*folders, tmp_path / "artifact", settings).manifest.parts.decoder.calibration
    assert calibration is not None
    assert (calibration.studies, calibration.measured) == (6, True)
    weights = calibration.token_weights
    assert weights.keys() == {"first", "prompt", "image", "findings"}
    assert weights["findings"] == 1
    assert 0 < weights["image"] < 10


def test_other_arguments_are_refused_by_name_and_nothing_is_lost(
    folders: Folders, listed: Path, tmp_path: Path, stopped: Path
) -> None:
    out, settings = tmp_path / "artifact", settings_for(listed)
    kept = sorted(path.name for path in stopped.rglob("*"))
    other_list = listed.with_name("fewer.json")
    other_list.write_text(json.dumps(json.loads(listed.read_text())[:8]))
    others = {
        r"group_size 64 \(was 32\)": settings_for(listed, group_size=64),
        r"decoder_format 'gptq-int8' \(was 'gptq-int4'\)": settings_for(listed, "gptq-int8"),
        r"token_weights '1,1' \(was '0.3,0.1'\)": settings_for(listed, token_weights=TokenWeights(image=1, prompt=1)),
        r"vision_format 'fp16' \(was 'fp32'\)": dataclasses.replace(settings, vision_format="fp16"),
        r"calibration_data 'fewer.json \(": settings_for(other_list),
    }
    for named, other in others.items():
        with pytest.raises(ArtifactError, match=rf"got {named}.*2 parts of its decoder finished.*remove the folder"):
            export_artifact(*folders, out, other)
    assert sorted(path.name for path in stopped.rglob("*")) == kept
    # How it is measured is another matter.
    artifact = export_artifact(*folders, out, dataclasses.replace(settings, verify_studies=3))
    part = artifact.manifest.parts.decoder
    assert part.fidelity is not None
    assert (part.group_size, part.fidelity.divergence.studies) == (32, 3)


def test_ctrl_c_keeps_the_finished_layers_and_says_so(folders: Folders, listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    arguments = command_line(folders, out, "--decoder", "gptq-int4", "--group-size", 32, "--calibration-data", listed)
    command = [sys.executable, "-m", "export", *arguments, "--refine", "40", "--token-weights", "1,1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        decoder = tmp_path / ".artifact.export" / "decoder"
        deadline = time.monotonic() + 120
        while not list(decoder.glob("model-00002*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, told = process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("the export was done before the interrupt came")
    assert process.returncode == 130, told
    assert printed == ""
    assert "the same command goes on with the finished parts in" in told
    assert "Traceback" not in told
    assert list(decoder.glob("model-0000*"))
    assert not out.exists()


def test_what_an_export_has_left_is_kept_through_the_failures_of_others(
    folders: Folders, listed: Path, gptq_artifact: Artifact, tmp_path: Path, stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A wrong path, another checkpoint, something in the way: none of them costs the finished layers."""
    out, settings = tmp_path / "artifact", settings_for(listed)
    parts = sorted((stopped / "decoder").glob("model-*"))
    assert len(parts) == 2
    source = open_checkpoint(*folders)
    deeper = dataclasses.replace(source, decoder=dataclasses.replace(source.decoder, num_hidden_layers=9))
    with monkeypatch.context() as patch:
        patch.setattr(export.pipeline, "open_checkpoint", lambda *_, **__: deeper)
        patch.setattr(export.pipeline, "_require_space", lambda *_: None)
        with pytest.raises(ArtifactError, match="2 parts of its decoder finished"):
            export_artifact(*folders, out, dataclasses.replace(settings, vision_format="fp16"))
    assert all(part.is_file() for part in parts)
    with pytest.raises(LiteError, match="got a file that cannot be read"):
        export_artifact(*folders, out, settings_for(tmp_path / "nowhere.json"))
    assert all(part.is_file() for part in parts)
    right = export.pipeline.finish_decoder

    def meanwhile(*args: Any) -> None:
        right(*args)
        out.mkdir()
        (out / "mine.txt").write_text("precious")

    with monkeypatch.context() as patch:
        patch.setattr(export.pipeline, "finish_decoder", meanwhile)
        with pytest.raises(ArtifactError, match="got a path that exists"):
            export_artifact(*folders, out, settings)
    shutil.rmtree(out)
    assert all(part.is_file() for part in parts)
    assert export_artifact(*folders, out, settings).id == gptq_artifact.id


def test_going_on_does_not_write_into_an_artifact_that_shares_its_files(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the artifact is in place and before the folder is gone, the two hold the same files."""
    out, settings = tmp_path / "artifact", settings_for(listed)
    with stopped_at(monkeypatch, export.write.work.shutil, "rmtree", 0):
        export_artifact(*folders, out, settings)
    first = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    work = tmp_path / ".artifact.export" / "decoder" / "config.json"
    assert work.samefile(out / "decoder" / "config.json")
    with stopped_at(monkeypatch, export.pipeline, "staged_artifact", 0):
        export_artifact(*folders, out, dataclasses.replace(settings, overwrite=True))
    assert not work.samefile(out / "decoder" / "config.json")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == first


def test_hidden_states_lost_to_a_power_cut_are_noticed(
    folders: Folders, listed: Path, tmp_path: Path, stopped: Path
) -> None:
    out, settings, states = tmp_path / "artifact", settings_for(listed), stopped / "hidden-0001"
    states.write_bytes(bytes(states.stat().st_size))
    with pytest.raises(CheckpointError, match=r"layers\.1\..*got no inputs but zeros"):
        export_artifact(*folders, out, settings)
    states.unlink()
    with pytest.raises(ArtifactError, match="hidden-0001: got no hidden states to go on from"):
        export_artifact(*folders, out, settings)


def test_a_gpu_that_is_too_small_is_an_error_that_says_what_to_do(
    folders: Folders, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(export.quantize.layerwise, "Hessian", full)
    with pytest.raises(BackendUnavailable, match=r"CUDA out of memory.*repeat the command.*--device cpu"):
        export_artifact(*folders, tmp_path / "artifact", settings_for(listed))
    assert (tmp_path / ".artifact.export").is_dir()


def test_two_exports_to_one_place_do_not_meet(folders: Folders, tmp_path: Path) -> None:
    work = tmp_path / ".artifact.export"
    work.mkdir()
    with FileLock(work / "lock"), pytest.raises(ArtifactError, match="another export is working in"):
        export_artifact(*folders, tmp_path / "artifact")
    assert export_artifact(*folders, tmp_path / "artifact").manifest.parts.decoder.format == "fp16"


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_disk_that_fills_up_leaves_no_artifact_and_the_rest_goes_on(
    folders: Folders, listed: Path, gptq_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to let a file grow, as a full disk does."""
    import resource

    out, (soft, hard) = tmp_path / "artifact", resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(file.stat().st_size for file in (gptq_artifact.path / "decoder").iterdir())
    write = export.pipeline.write_calibrated_layers

    def limited(*args: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, hard))
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(export.pipeline, "write_calibrated_layers", limited)
        try:
            with pytest.raises(LiteError, match="check the disk"):
                export_artifact(*folders, out, settings_for(listed))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not out.exists()
    for part in (tmp_path / ".artifact.export" / "decoder").glob("*.safetensors"):
        assert part.read_bytes() == (gptq_artifact.path / "decoder" / part.name).read_bytes()
    assert export_artifact(*folders, out, settings_for(listed)).id == gptq_artifact.id
