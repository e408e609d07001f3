"""Artifacts: whole or not at all, and every damage has a name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import cache_fidelity, tiny_manifest, tiny_onnx_part, tiny_parts

from lite.artifact.manifest import FORMAT_VERSION, NOTICE, Manifest
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import CalibrationRecord, DecoderPart
from lite.artifact.write import StagedArtifact, check_target, staged_artifact
from lite.errors import ArtifactError

NAMES = ("tokenizer.model", "vision.onnx", "projector.onnx", "decoder/config.json", "decoder/model.safetensors")


def edit_manifest(folder: Path, **changes: Any) -> None:
    file = folder / "manifest.json"
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))


def test_manifest_round_trip() -> None:
    """None stands before or behind the other choice of a type, which may be a Literal or a dataclass."""
    assert all(words in NOTICE for words in ("not for clinical use", "esearch"))
    onnx = dataclasses.replace(tiny_onnx_part(int8_cache=True), fidelity=cache_fidelity(1e-7))
    calibration = CalibrationRecord(data="a.json", sha256="0" * 64, studies=1, tokens=2, token_weights={"image": 0.3})
    calibrated = DecoderPart(format="gptq-int8", group_size=32, method="gptq", lm_head="int8", calibration=calibration)
    for changes in (
        {"decoder_onnx": onnx},
        {"decoder": DecoderPart(format="fp16")},
        {"decoder": DecoderPart(format="gptq-int4", group_size=-1, method="rtn")},
        {"decoder": calibrated},
    ):
        manifest = tiny_manifest(parts=tiny_parts(**changes))
        assert Manifest.parse(manifest.to_json()) == manifest


def test_a_fresh_artifact_loads_and_verifies(tiny_artifact: Artifact) -> None:
    again = load_artifact(tiny_artifact.path)
    again.verify()
    assert again == tiny_artifact
    assert len(again.id) == 16
    assert set(again.manifest.files) == set(NAMES)
    assert again.nbytes == sum((again.path / name).stat().st_size for name in NAMES)


def test_the_id_follows_every_byte(own_artifact: Path, tiny_artifact: Artifact) -> None:
    assert load_artifact(own_artifact).id == tiny_artifact.id
    edit_manifest(own_artifact, notice="other")
    assert load_artifact(own_artifact).id != tiny_artifact.id


@pytest.mark.parametrize("name", NAMES)
def test_missing_truncated_and_changed_files_are_named_with_their_hash(own_artifact: Path, name: str) -> None:
    file = own_artifact / name
    content = file.read_bytes()
    sha256 = load_artifact(own_artifact).manifest.files[name].sha256

    file.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: got {len(content) - 1} bytes .*{len(content)} bytes.*{sha256}"):
        load_artifact(own_artifact)

    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    file.write_bytes(flipped)
    damaged = load_artifact(own_artifact)  # sizes fit: only the hash tells
    with pytest.raises(ArtifactError, match=rf"{name}: got sha256 [0-9a-f]{{64}} · expected {sha256}"):
        damaged.verify()

    file.unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: got no such file .*{sha256}"):
        load_artifact(own_artifact)


def edit_part(folder: Path, part: str, **changes: Any) -> None:
    parts = json.loads((folder / "manifest.json").read_text())["parts"]
    value = parts[part] | changes
    parts[part] = {key: item for key, item in value.items() if item is not ...}
    edit_manifest(folder, parts=parts)


RECORD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("decoder", {"files": {"decoder/other": RECORD}}, "part decoder that does not list decoder/model.safetensors"),
        ("tokenizer", {"files": {}}, "got 0 files of the part tokenizer · expected one"),
        ("tokenizer", {"files": {"a": RECORD, "b": RECORD}}, "got 2 files of the part tokenizer · expected one"),
        ("tokenizer", {"files": {"vision.onnx": RECORD}}, "got vision.onnx in the parts tokenizer and vision"),
        ("vision", {"files": {"a": {"bytes": -1, "sha256": "0" * 64}}}, "bytes=-1"),
        ("vision", {"files": {"a": {"bytes": 1, "sha256": "0" * 63}}}, "64 hex"),
        ("vision", {"files": {"a": {"bytes": 1}}}, r"parts\.vision\.files\.a: got no key 'sha256'"),
        ("decoder", {"format": "int3"}, r"parts\.decoder\.format: got 'int3' · expected .*'fp16'"),
        ("decoder", {"format": ...}, r"parts\.decoder: got no key 'format'"),
        ("decoder", {"bits": 4}, r"parts\.decoder: got an unknown key 'bits'"),
        ("decoder", {"fidelity": {"data": "built-in"}}, r"parts\.decoder\.fidelity: got no key 'divergence'"),
        ("vision", {"image_size": 28.5}, r"parts\.vision\.image_size: got 28\.5 · expected int"),
    ],
)
def test_a_part_that_is_wrong_is_refused_by_key(
    own_artifact: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    edit_part(own_artifact, part, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(own_artifact)


def test_engines_read_their_parts_and_the_shared_ones(tiny_onnx_artifact: Artifact, tmp_path: Path) -> None:
    copied = load_artifact(shutil.copytree(tiny_onnx_artifact.path, tmp_path / "copy"))
    for part, others in (("decoder", "onnx"), ("decoder_onnx", "torch")):
        for name in copied.manifest.parts.by_name()[part].files:
            content = (copied.path / name).read_bytes()
            (copied.path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            copied.verify(engine=others)  # type: ignore[arg-type]
            for engine in (None, "torch" if others == "onnx" else "onnx"):
                with pytest.raises(ArtifactError, match=f"{name}: got sha256"):
                    copied.verify(engine=engine)  # type: ignore[arg-type]
            (copied.path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 8}, "got format_version 8 · this version reads 7 · upgrade"),
        ({"format_version": 4}, "got format_version 4 .* export the artifact again"),
        ({"format_version": 0}, "got format_version 0 .* export the artifact again"),
        ({"format_version": ...}, "no format_version"),
        ({"format_version": "1"}, r"format_version: got '1' · expected int"),
        ({"format_version": True}, r"format_version: got True · expected int"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"model": ...}, "no key 'model'"),
        ({"model": 3}, r"\.model: got 3 · expected str"),
        ({"notice": None}, r"\.notice: got None · expected str"),
        ({"parts": []}, r"\.parts: got \[\] · expected an object"),
        ({"parts": {"projector": {}}}, r"\.parts: got an unknown key 'projector'"),
        ({"files": {"a": RECORD}}, "unknown key 'files'"),
        ({"preprocessing": {"image_size": 28, "mean": [0.5, 0.5]}}, r"\.preprocessing\.mean: got \[0\.5, 0\.5\]"),
        ({"preprocessing": {"image_size": 28.5}}, r"\.preprocessing\.image_size: got 28\.5"),
        ({"sources": {"a": 1}}, r"\.sources\.a: got 1 · expected str"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused_by_key(own_artifact: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(own_artifact, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(own_artifact)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../b", "..", "", ".", "a\\b", "C:evil", "a//b", "./a", "a/.", "manifest.json"],
)
def test_file_names_cannot_lead_out(own_artifact: Path, name: str) -> None:
    edit_part(own_artifact, "vision", files={name: RECORD})
    with pytest.raises(ArtifactError, match="expected a path inside the artifact"):
        load_artifact(own_artifact)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "no format_version"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_manifest_that_is_not_one(own_artifact: Path, content: bytes, message: str) -> None:
    (own_artifact / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(own_artifact)


def test_a_folder_that_onnx_runtime_could_not_open_is_refused_by_its_name(own_artifact: Path, tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/artifact-\xe4")
    own_artifact.rename(folder)
    with pytest.raises(ArtifactError, match=r"artifact-\\xe4'.*not UTF-8.*rename the folder"):
        load_artifact(folder)


def test_what_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, got in (("nowhere", "does not exist"), ("file", "a file"), ("empty", "a folder without manifest.json")):
        with pytest.raises(ArtifactError, match=f"{name}: got .*{got}.*`python -m export"):
            load_artifact(tmp_path / name)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextlib.contextmanager
def minimal(out: Path, *, overwrite: bool = False) -> Iterator[StagedArtifact]:
    """Yield an artifact that has its files, such as they are, and is not finished."""
    with staged_artifact(out, overwrite=overwrite) as staged:
        (staged.path / "decoder").mkdir()
        for name in NAMES:
            (staged.path / name).write_text(name)
        yield staged


def finished(out: Path, **changes: Any) -> Artifact:
    with minimal(out) as staged:
        return staged.finish(tiny_manifest(**changes))


def test_nothing_is_there_until_it_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "artifact"
    with minimal(out) as staged:
        assert not out.exists()
        assert staged.path.parent == out.parent  # the same disk, so that the rename is atomic
        artifact = staged.finish(tiny_manifest())
    assert artifact.path == out
    assert names(out.parent) == ["artifact"]
    artifact.verify()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_export_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with minimal(tmp_path / "artifact"):
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_an_unfinished_or_incomplete_one_leaves_nothing(tmp_path: Path) -> None:
    with minimal(tmp_path / "artifact"):
        pass
    assert names(tmp_path) == []
    with minimal(tmp_path / "artifact") as staged:
        (staged.path / "tokenizer.model").unlink()
        with pytest.raises(ArtifactError, match=r"got no file tokenizer\.model"):
            staged.finish(tiny_manifest())
    with minimal(tmp_path / "artifact") as staged:
        (staged.path / "decoder" / "spare").write_text("left over")
        with pytest.raises(ArtifactError, match="got the file decoder/spare, which no part owns"):
            staged.finish(tiny_manifest())
    assert names(tmp_path) == []


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with minimal(tmp_path / "artifact") as staged:
        decoder = DecoderPart(format="fp16", fidelity=cache_fidelity(float("nan")))
        with pytest.raises(ValueError, match="not JSON compliant"):
            staged.finish(tiny_manifest(parts=tiny_parts(decoder=decoder)))
    assert names(tmp_path) == []


def test_something_there_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    finished(out)
    with pytest.raises(ArtifactError, match="a path that exists"), staged_artifact(out):
        pass
    with minimal(out, overwrite=True) as staged:
        assert load_artifact(out).manifest.model == "tiny"
        staged.finish(tiny_manifest(model="second"))
    assert load_artifact(out).manifest.model == "second"
    assert names(tmp_path) == ["artifact"]


def interrupt_renames(monkeypatch: pytest.MonkeyPatch, *, at: int, before: bool, error: BaseException) -> None:
    """Let the rename of that number fail, or be interrupted just after it was done; all others do their work."""
    count = 0
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == at and before:
            raise error
        renamed = rename(self, target)
        if count == at:
            raise error
        return renamed

    monkeypatch.setattr(Path, "rename", fail)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("at", "before", "left"), [(1, True, "first"), (1, False, "first"), (2, True, "first"), (2, False, "second")]
)
def test_overwriting_that_fails_half_way_keeps_one_whole_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, before: bool, left: str, error: BaseException
) -> None:
    out = tmp_path / "artifact"
    finished(out, model="first")

    def overwrite() -> None:
        with minimal(out, overwrite=True) as staged, monkeypatch.context() as patch:
            interrupt_renames(patch, at=at, before=before, error=error)
            staged.finish(tiny_manifest(model="second"))

    with pytest.raises(ArtifactError if isinstance(error, OSError) else type(error)):  # in words
        overwrite()
    assert names(tmp_path) == ["artifact"]
    artifact = load_artifact(out)
    assert artifact.manifest.model == left
    artifact.verify()


def test_an_artifact_in_its_place_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "artifact"

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("lite.files._fsync", fail)
    with minimal(out) as staged:
        with pytest.raises(OSError, match="Input/output"):
            staged.finish(tiny_manifest())
        assert staged.folder.finished
    load_artifact(out).verify()
    assert names(tmp_path) == ["artifact"]


def test_overwriting_never_deletes_what_is_not_an_artifact(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artifact"), staged_artifact(home, overwrite=True):
        pass
    assert (home / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.txt", "mine/figures.csv", "decoder/other.safetensors"])
def test_overwriting_never_deletes_what_lies_beside_the_artifacts_files(tmp_path: Path, name: str) -> None:
    out = tmp_path / "artifact"
    finished(out)
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    with pytest.raises(ArtifactError, match=rf"{name}: got a file that is not the artifact's \(1 in all\)"):
        check_target(out, overwrite=True)
    assert (out / name).read_text() == "years of work"


def test_an_artifact_of_another_version_can_be_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    finished(out)
    edit_manifest(out, format_version=FORMAT_VERSION + 1)
    check_target(out, overwrite=True)
    # Versions before 5 had one list of files.
    edit_manifest(out, format_version=4, parts=..., files=dict.fromkeys(NAMES, RECORD))
    check_target(out, overwrite=True)


def test_overwriting_a_link_replaces_what_it_leads_to(tmp_path: Path) -> None:
    finished(tmp_path / "artifact-v3", model="first")
    link = tmp_path / "artifact"
    link.symlink_to("artifact-v3")
    with minimal(link, overwrite=True) as staged:
        staged.finish(tiny_manifest(model="second"))
    assert link.is_symlink()
    assert load_artifact(tmp_path / "artifact-v3").manifest.model == load_artifact(link).manifest.model == "second"
    assert names(tmp_path) == ["artifact", "artifact-v3"]


@pytest.mark.parametrize("inside", [".", "decoder"])
def test_the_folder_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    out = tmp_path / "artifact"
    finished(out)
    monkeypatch.chdir(out / inside)
    with pytest.raises(ArtifactError, match="got the folder you are in .* leave it first"):
        check_target(out, overwrite=True)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "artifact"
    finished(out)
    access = os.access
    # Who is root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and path != out / "decoder")
    with pytest.raises(ArtifactError, match="decoder: got a folder that cannot be written"):
        check_target(out, overwrite=True)
