"""The artifact: a folder with everything the runtime needs, and a manifest that says what is in it.

    artifact/
      manifest.json       the parts, each with its files, their bytes and sha256; the prompt and the preprocessing
      vision.onnx         pixel_values [B,3,S,S] -> patch_features [B,P,D], class_attention [B,P]
      projector.onnx      patch_features [B,T,D] -> image_features [B,T,C]
      decoder/            a Hugging Face Llama folder: config.json, model.safetensors
      decoder.onnx        perhaps: the decoder once more, for ONNX Runtime alone; with it decoder.onnx.data,
                          embed_tokens.npy, and decoder.int8_cache.onnx, the graph with another cache
      adapters/NAME/      perhaps: a hospital's LoRA beside the decoder, and its projector
      tokenizer.model     SentencePiece

These are the names that the exporter gives. The manifest alone decides: each part names the files it owns, and the
runtime opens no other. An artifact is written to a
temporary sibling folder and renamed when it is complete, so it exists whole or not at all. Its id is the hash of the
manifest, which holds the hash of everything else: two artifacts with one id hold the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lite.artifact.manifest import MANIFEST_NAME, Manifest
from lite.artifact.parts import AdapterPart, FileRecord, OnnxPart
from lite.config import DecoderConfig
from lite.errors import ArtifactError, LiteError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact on disk whose manifest has been read and whose files have the sizes it says."""

    path: Path
    manifest: Manifest
    id: str  # the first 16 hex digits of the sha256 of manifest.json

    @property
    def nbytes(self) -> int:
        """The size of all listed files."""
        return sum(record.bytes for record in self.manifest.files.values())

    def with_parts(self, **parts: Any) -> Artifact:
        """Return the artifact with other parts in its manifest: one that is being written has no final one yet."""
        return dataclasses.replace(self, manifest=self.manifest.with_parts(**parts))

    def file(self, name: str) -> Path:
        """Return the path of a listed file; a file the manifest does not list is never opened."""
        if name not in self.manifest.files:
            msg = (
                f"{self.path}: got a manifest that does not list {name} · expected it among its files · "
                "the artifact is incomplete: export it again"
            )
            raise ArtifactError(msg)
        return self.path / name

    def decoder_config(self) -> DecoderConfig:
        """Read the decoder's shape."""
        file = self.file(self.manifest.parts.decoder_config.file)
        return DecoderConfig.from_hf(read_json_object(file), where=str(file))

    def adapter_part(self, name: str) -> AdapterPart:
        """Return what an adapter is.

        Raises:
            LiteError: there is none of that name.
        """
        adapters = self.manifest.parts.adapters
        if name not in adapters:
            known, choose = "none, as the artifact has no adapters", ""
            if adapters:
                known, choose = f"one of {', '.join(adapters)}", "choose one of them, or "
            msg = f"{self.path}: got the adapter {name!r} · expected {known} · {choose}add it"
            raise LiteError(f"{msg} with `python -m export adapter`")
        return adapters[name]

    def onnx_part(self, cache_dtype: str | None = None) -> OnnxPart:
        """Return what `decoder.onnx` is, and see that it has a graph for such a cache; None: any.

        Raises:
            ArtifactError: there is no `decoder.onnx`.
            LiteError: there is no such graph.
        """
        part = self.manifest.parts.decoder_onnx
        if part is None:
            msg = f"{self.path}: got an artifact without decoder.onnx · expected one, for the onnx engine"
            if self.manifest.parts.decoder.format.startswith("gptq"):
                raise ArtifactError(
                    f"{msg} · make it with `python -m export onnx {self.path}`, or use the torch engine"
                )
            msg += " · use the torch engine, or export with --decoder gptq-int4 --engine onnx"
            raise ArtifactError(msg)
        if cache_dtype not in (None, *part.cache_dtypes):
            msg = f"{self.path}: got cache_dtype {cache_dtype!r} · expected {' or '.join(part.cache_dtypes)}, which"
            raise LiteError(f"{msg} decoder.onnx was exported with · choose one of them")
        return part

    def verify(
        self,
        *,
        engine: Literal["torch", "onnx"] | None = None,
        adapters: Iterable[str] = (),
        names: Collection[str] | None = None,
    ) -> None:
        """Hash every listed file, or those that an engine reads with some adapters, or those that are named.

        Raises:
            ArtifactError: a file is not what the manifest says; it names the first.
        """
        parts = self.manifest.parts
        read = parts.by_name().values() if engine is None else parts.read_by(engine, adapters)
        for name, record in ((name, record) for part in read for name, record in part.files.items()):
            if names is not None and name not in names:
                continue
            got = sha256_of(self.path / name)
            if got != record.sha256:
                msg = (
                    f"{self.path / name}: got sha256 {got} · expected {record.sha256} · the file is damaged or was "
                    "changed: copy or export the artifact again"
                )
                raise ArtifactError(msg)


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact's manifest and check that each listed file is there with the right size.

    This reads one small file and asks for sizes; `Artifact.verify` hashes.

    Raises:
        ArtifactError: there is no artifact there, its manifest cannot be used, or a file is missing or has another
            size.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST_NAME
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        msg = f"{os.fsencode(folder)!r}: got a path that is not UTF-8 · expected one, as ONNX Runtime opens no other"
        raise ArtifactError(f"{msg} · rename the folder, or link to it under another name") from error
    try:
        raw = manifest_path.read_bytes()
    except OSError as error:
        msg = (
            f"{folder}: got {_why_no_manifest(folder, error)} · expected an artifact folder with {MANIFEST_NAME} · "
            "make one with `python -m export`"
        )
        raise ArtifactError(msg) from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        msg = f"{manifest_path}: got bytes that are not UTF-8 · expected JSON · export the artifact again"
        raise ArtifactError(msg) from error
    manifest = Manifest.parse(text, where=str(manifest_path))
    artifact = Artifact(path=folder, manifest=manifest, id=hashlib.sha256(raw).hexdigest()[:16])
    for name, record in manifest.files.items():
        _check_size(folder / name, record)
    return artifact


def _why_no_manifest(folder: Path, error: OSError) -> str:
    if not folder.exists():
        return "a path that does not exist"
    if not folder.is_dir():
        return "a file"
    if isinstance(error, FileNotFoundError):
        return f"a folder without {MANIFEST_NAME}"
    return f"a folder whose {MANIFEST_NAME} cannot be read ({error.strerror})"


def _check_size(file: Path, record: FileRecord) -> None:
    size = file.stat().st_size if file.is_file() else None
    if size != record.bytes:
        got, why = ("no such file", "") if size is None else (f"{size} bytes", "the file is truncated or was changed: ")
        msg = f"{file}: got {got} · expected {record.bytes} bytes, sha256 {record.sha256} · {why}copy or export"
        raise ArtifactError(f"{msg} the artifact again")


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of the artifact."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        msg = f"{file}: got something unreadable ({error}) · expected a JSON object · export the artifact again"
        raise ArtifactError(msg) from error
    if not isinstance(value, dict):
        msg = f"{file}: got a {type(value).__name__} · expected a JSON object · export the artifact again"
        raise ArtifactError(msg)
    return value


def sha256_of(file: Path) -> str:
    """Hash a file of any size in constant memory."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    try:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(view[:count])
    except OSError as error:
        msg = f"{file}: got {error.strerror} · expected a readable file · check the disk and its permissions"
        raise ArtifactError(msg) from error
    return digest.hexdigest()
