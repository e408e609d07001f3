"""The manifest of an artifact: its parts, and what holds for all of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import PurePosixPath
from typing import Any, Final

from lite.artifact.parts import ADAPTER_NAME, FileRecord, OneFilePart, Parts
from lite.config import DecodingDefaults, Preprocessing, PromptTemplate, from_json, to_json
from lite.errors import ArtifactError

FORMAT_VERSION: Final = 7
MANIFEST_NAME: Final = "manifest.json"

NOTICE: Final = (
    "Research draft, not for clinical use. Findings written by a language model can be wrong or incomplete: "
    "do not use them for diagnosis or care."
)
_MAX_RANK: Final = 1 << 16  # as many inputs as no decoder has
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is made of."""

    format_version: int = FORMAT_VERSION
    model: str
    created_by: str  # "llava-rad-lite X.Y.Z"
    sources: dict[str, str]  # source file -> sha256
    preprocessing: Preprocessing
    prompt: PromptTemplate = dataclasses.field(default_factory=PromptTemplate)
    decoding: DecodingDefaults = dataclasses.field(default_factory=DecodingDefaults)
    notice: str = NOTICE
    refused: tuple[str, ...] = ()  # what parity found too bad, of an artifact that was to be kept all the same
    parts: Parts

    @property
    def files(self) -> dict[str, FileRecord]:
        """The files of all parts."""
        return {name: record for part in self.parts.by_name().values() for name, record in part.files.items()}

    def with_parts(self, **parts: Any) -> Manifest:
        """Return the manifest with other parts."""
        return dataclasses.replace(self, parts=dataclasses.replace(self.parts, **parts))

    def to_json(self) -> str:
        """Write the manifest as JSON text, always the same text for the same manifest."""
        value = to_json(self)
        # What is not there is not named: a part that older versions do not know is no obstacle to them then.
        value["parts"] = {name: part for name, part in value["parts"].items() if part not in (None, {})}
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: str = MANIFEST_NAME) -> Manifest:
        """Read a manifest.

        Raises:
            ArtifactError: not JSON, written by a newer version, a key missing, unknown or of the wrong type, or a
                file name that leads out of the artifact.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
            msg = f"{where}: got text that is not JSON ({error}) · expected a manifest · export the artifact again"
            raise ArtifactError(msg) from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            todo = "upgrade llava-rad-lite" if newer else "export the artifact again with this version"
            msg = f"{where}: got format_version {version} · this version reads {FORMAT_VERSION} · {todo}"
            raise ArtifactError(msg)
        if version is None:
            msg = f"{where}: got no format_version · expected the manifest of an artifact · export the artifact again"
            raise ArtifactError(msg)
        manifest = from_json(cls, value, where=where)
        _check_files(manifest.parts, where)
        return manifest


def _check_files(parts: Parts, where: str) -> None:
    """Refuse a file that belongs to two parts, and a part that names a file it does not own."""
    if wrong := [name for name in parts.adapters if not ADAPTER_NAME.fullmatch(name)]:
        msg = f"{where}: got an adapter named {wrong[0]!r} · expected letters, digits, ., _ and - · export it again"
        raise ArtifactError(msg)
    for name, adapter in parts.adapters.items():
        if not 0 < adapter.rank <= _MAX_RANK or adapter.files.keys() != {*adapter.named()}:
            msg = f"{where}: got an adapter {name} of rank {adapter.rank} with {', '.join(adapter.files) or 'no file'}"
            raise ArtifactError(f"{msg} · expected a rank, its factors and perhaps its projector · export it again")
    if len(default := [name for name, adapter in parts.adapters.items() if adapter.is_default]) > 1:
        msg = f"{where}: got the adapters {' and '.join(default)} for requests that name none · expected one at most"
        raise ArtifactError(f"{msg} · export the artifact again")
    owners: dict[str, str] = {}
    for owner, part in parts.by_name().items():
        if not part.files or (isinstance(part, OneFilePart) and len(part.files) > 1):
            expected = "one" if isinstance(part, OneFilePart) else "at least one"
            msg = f"{where}: got {len(part.files)} files of the part {owner} · expected {expected}"
            raise ArtifactError(f"{msg} · export the artifact again")
        for name, record in part.files.items():
            _check_file_record(name, record, where)
            if name in owners:
                msg = f"{where}: got {name} in the parts {owners[name]} and {owner} · expected it in one"
                raise ArtifactError(f"{msg} · export the artifact again")
            owners[name] = owner
        for name in part.named():
            if name not in part.files:
                msg = f"{where}: got a part {owner} that does not list {name} · expected it among its files"
                raise ArtifactError(f"{msg} · the artifact is incomplete: export it again")


def _check_file_record(name: str, record: FileRecord, where: str) -> None:
    path = PurePosixPath(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name
    if not inside or str(path) != name or name == MANIFEST_NAME:
        msg = f"{where}: got the file name {name!r} · expected a path inside the artifact · do not use this artifact"
        raise ArtifactError(msg)
    if record.bytes < 0 or not _SHA256.fullmatch(record.sha256):
        msg = (
            f"{where}: got bytes={record.bytes} sha256={record.sha256!r} for {name} · expected a size and 64 hex "
            "digits · export the artifact again"
        )
        raise ArtifactError(msg)
