"""Artifacts being written: in a temporary folder beside their place, and renamed when they are complete."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lite.artifact.manifest import MANIFEST_NAME, Manifest
from lite.artifact.open import Artifact, load_artifact, sha256_of
from lite.artifact.parts import FileRecord
from lite.errors import ArtifactError
from lite.files import StagedFolder, staged_folder

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class StagedArtifact:
    """An artifact being written. Nothing is at its place until `finish` returns."""

    folder: StagedFolder

    @property
    def path(self) -> Path:
        """Where to write the files."""
        return self.folder.path

    def finish(self, manifest: Manifest) -> Artifact:
        """Hash what was written, write the manifest, and move the folder to its place.

        Args:
            manifest: its parts name their files; sizes and hashes are filled in here.

        Returns:
            The artifact at its place.

        Raises:
            ArtifactError: a file lies there that no part owns, or a part owns one that is not there.
        """
        owned = manifest.files
        written = {f.relative_to(self.path).as_posix() for f in self.path.rglob("*") if f.is_file()}
        if wrong := sorted(owned.keys() ^ written):
            got = f"no file {wrong[0]}" if wrong[0] in owned else f"the file {wrong[0]}, which no part owns"
            msg = f"{self.path}: got {got} · expected the files that the parts name, and no other · report this"
            raise ArtifactError(msg)
        parts = manifest.parts.with_files(lambda part: {file: self._record(file) for file in sorted(part.files)})
        text = dataclasses.replace(manifest, parts=parts).to_json()
        # A manifest that could not be read back must fail here, on the exporter's machine.
        Manifest.parse(text, where=str(self.path / MANIFEST_NAME))
        (self.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
        load_artifact(self.path)
        self.folder.finish()
        return load_artifact(self.folder.out)

    def _record(self, name: str) -> FileRecord:
        file = self.path / name
        return FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))


@contextlib.contextmanager
def staged_artifact(out: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[StagedArtifact]:
    """Yield a temporary folder beside `out`; leaving the block without `finish`, by any way, removes it.

    Args:
        out: where the artifact will be. Something there already is refused unless `overwrite`.
        overwrite: replace an artifact (or an empty folder) that is there, at the last moment. Anything else there is
            refused all the same.

    Raises:
        ArtifactError: `out` exists, or its parent folder cannot be written.
    """
    # Of a link the folder that it leads to is replaced, and not the link by a folder.
    target = Path(out).resolve()
    check_target(target, overwrite=overwrite)
    with staged_folder(target, replace=overwrite, error_type=ArtifactError) as folder:
        yield StagedArtifact(folder)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a place where no artifact can be written.

    Raises:
        ArtifactError: something is there that must not be replaced.
    """
    if not target.exists():
        return
    if not overwrite:
        msg = f"{target}: got a path that exists · expected a new one · choose another place, or remove it"
        raise ArtifactError(msg)
    # Overwriting deletes: only ever an artifact, never somebody's home folder, and nothing that lies beside its files.
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST_NAME).is_file()):
        msg = (
            f"{target}: got something that is not an artifact · expected an artifact to overwrite · remove it yourself"
        )
        raise ArtifactError(msg)
    if foreign := _foreign_files(target):
        msg = (
            f"{foreign[0]}: got a file that is not the artifact's ({len(foreign)} in all) · expected none in a folder "
        )
        raise ArtifactError(f"{msg}that is replaced · move it elsewhere first")
    if Path.cwd().is_relative_to(target):
        msg = f"{target}: got the folder you are in · expected another, as it is replaced · leave it first: cd .."
        raise ArtifactError(msg)
    folders = [target, *(entry for entry in target.rglob("*") if entry.is_dir())]
    if closed := [folder for folder in folders if not os.access(folder, os.W_OK)]:
        msg = f"{closed[0]}: got a folder that cannot be written · expected one that can be replaced · change its mode"
        raise ArtifactError(f"{msg}, or choose another place")


def _foreign_files(folder: Path) -> list[Path]:
    """Return the files that its manifest, of whatever version, does not list."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    ours = {folder / name for name in (MANIFEST_NAME, *_listed(manifest))}
    return sorted(entry for entry in folder.rglob("*") if not entry.is_dir() and entry not in ours)


def _listed(manifest: object) -> Iterator[str]:
    """Yield the names under every key "files"."""
    for key, value in manifest.items() if isinstance(manifest, dict) else ():
        yield from value if key == "files" and isinstance(value, dict) else _listed(value)
