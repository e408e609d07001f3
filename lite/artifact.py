"""The artifact: a folder with everything the runtime needs, and a manifest that says what is in it.

    artifact/
      manifest.json       what each part is, the prompt, the preprocessing, every file with its bytes and sha256
      vision.onnx         pixel_values [B,3,S,S] -> image_features [B,P,C]
      decoder/            a Hugging Face Llama folder: config.json, model.safetensors
      decoder.onnx        perhaps: the decoder once more, for ONNX Runtime alone; with it decoder.onnx.data,
                          embed_tokens.npy, and decoder.int8_cache.onnx, the graph with another cache
      tokenizer.model     SentencePiece

The manifest is the only thing that decides: the runtime opens no file it does not list. An artifact is written to a
temporary sibling folder and renamed when it is complete, so it exists whole or not at all. Its id is the hash of the
manifest, which holds the hash of everything else: two artifacts with one id hold the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal

from lite.config import (
    DecoderConfig,
    DecoderFormat,
    DecodingDefaults,
    Preprocessing,
    PromptTemplate,
    VisionFormat,
    from_json,
    to_json,
)
from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT_VERSION: Final = 4
MANIFEST_NAME: Final = "manifest.json"
VISION_NAME: Final = "vision.onnx"
DECODER_CONFIG_NAME: Final = "decoder/config.json"
TOKENIZER_NAME: Final = "tokenizer.model"
ONNX_DATA_NAME: Final = "decoder.onnx.data"
ONNX_EMBEDDINGS_NAME: Final = "embed_tokens.npy"

OnnxFloat = Literal["float32", "float16"]
CacheDtype = Literal["float32", "float16", "int8"]
ONNX_GRAPH_NAMES: Final = {"float": "decoder.onnx", "int8": "decoder.int8_cache.onnx"}
"""The graphs by what their cache is: that of the activations, or int8."""

NOTICE: Final = (
    "Research draft, not for clinical use. Findings written by a language model can be wrong or incomplete: "
    "do not use them for diagnosis or care."
)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The size and the hash of one file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """The vision transformer inside `vision.onnx`: what its memory and its arithmetic follow from."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int  # those that are run
    num_attention_heads: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VisionPart:
    """What `vision.onnx` is. Its input and output are float32 whatever it computes in."""

    format: VisionFormat
    image_size: int
    num_image_tokens: int
    hidden_size: int  # the decoder's: what the projector makes
    tower: TowerShape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecord:
    """What a decoder was calibrated on, and how."""

    data: str  # the list's file name
    sha256: str  # of the films and tokens that were used, those held out for a search included
    studies: int
    tokens: int
    image_weight: float  # what an image token counts in the Hessian; a findings token counts 1
    prompt_weight: float  # and a token of the prompt's text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPart:
    """What `decoder/` holds."""

    format: DecoderFormat
    group_size: int | None = None  # of GPTQ: inputs that share a scale, -1 for all
    method: Literal["gptq", "rtn"] | None = None  # how the integers of the GPTQ format were found
    lm_head: Literal["fp16", "int8"] = "fp16"
    calibration: CalibrationRecord | None = None

    def describe(self) -> str:
        """Say what the weights are, and how they came to be."""
        details: list[str] = []
        if self.group_size is not None:
            details.append("one group" if self.group_size == -1 else f"groups of {self.group_size}")
        if self.lm_head != "fp16":
            details.append(f"{self.lm_head} head")
        if self.method == "rtn":
            details.append("rounded to nearest")
        if self.calibration is not None:
            details.append(f"calibrated on {self.calibration.studies} studies of {self.calibration.data}")
        return f"{self.format} ({', '.join(details)})" if details else self.format


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheCalibration:
    """What the scales of an int8 cache were found on."""

    data: str  # the list's file name, or "built-in"
    sha256: str  # of the films and tokens that were used
    studies: int
    tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OnnxPart:
    """What `decoder.onnx` is: the integers of `decoder/`, which has to be GPTQ."""

    dtype: OnnxFloat  # of the activations, and of a cache that is not int8
    accuracy_level: int  # of MatMulNBits; 4: its inputs are rounded to int8
    lm_head_bits: Literal[4, 8]
    cache_calibration: CacheCalibration | None = None  # None: there is no int8 cache

    @property
    def cache_dtypes(self) -> tuple[CacheDtype, ...]:
        """The caches that there are graphs for."""
        return (self.dtype,) if self.cache_calibration is None else (self.dtype, "int8")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an artifact is made of."""

    format_version: int = FORMAT_VERSION
    model: str
    created_by: str  # "llava-rad-lite X.Y.Z"
    sources: dict[str, str]  # source file -> sha256
    vision: VisionPart
    decoder: DecoderPart
    onnx: OnnxPart | None = None  # None: there is no decoder.onnx
    preprocessing: Preprocessing
    prompt: PromptTemplate = dataclasses.field(default_factory=PromptTemplate)
    decoding: DecodingDefaults = dataclasses.field(default_factory=DecodingDefaults)
    fidelity: dict[str, Any] = dataclasses.field(default_factory=dict)  # measured at export, by the exporter
    notice: str = NOTICE
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)  # filled in when the artifact is finished

    def to_json(self) -> str:
        """Write the manifest as JSON text, always the same text for the same manifest."""
        return json.dumps(to_json(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

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
        for name, record in manifest.files.items():
            _check_file_record(name, record, where)
        return manifest


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
        file = self.file(DECODER_CONFIG_NAME)
        return DecoderConfig.from_hf(read_json_object(file), where=str(file))

    def verify(self, *, engine: Literal["torch", "onnx"] | None = None) -> None:
        """Hash every listed file, or those that an engine reads.

        Raises:
            ArtifactError: a file is not what the manifest says; it names the first.
        """
        onnx_names = _onnx_names(self.manifest.onnx)
        for name, record in self.manifest.files.items():
            weights = name.startswith("decoder/") and name.endswith(".safetensors")
            if (engine == "onnx" and weights) or (engine == "torch" and name in onnx_names):
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
    for name in (VISION_NAME, DECODER_CONFIG_NAME, TOKENIZER_NAME, *_onnx_names(manifest.onnx)):
        artifact.file(name)
    for name, record in manifest.files.items():
        _check_size(folder / name, record)
    return artifact


def _onnx_names(part: OnnxPart | None) -> list[str]:
    """Return the files that an artifact with `decoder.onnx` must have."""
    if part is None:
        return []
    graphs = [ONNX_GRAPH_NAMES["float"], *([ONNX_GRAPH_NAMES["int8"]] if part.cache_calibration else [])]
    return [*graphs, ONNX_DATA_NAME, ONNX_EMBEDDINGS_NAME]


def _why_no_manifest(folder: Path, error: OSError) -> str:
    if not folder.exists():
        return "a path that does not exist"
    if not folder.is_dir():
        return "a file"
    if isinstance(error, FileNotFoundError):
        return f"a folder without {MANIFEST_NAME}"
    return f"a folder whose {MANIFEST_NAME} cannot be read ({error.strerror})"


def _check_size(file: Path, record: FileRecord) -> None:
    if not file.is_file():
        msg = (
            f"{file}: got no such file · expected {record.bytes} bytes, sha256 {record.sha256} · "
            "copy or export the artifact again"
        )
        raise ArtifactError(msg)
    size = file.stat().st_size
    if size != record.bytes:
        msg = (
            f"{file}: got {size} bytes · expected {record.bytes} bytes, sha256 {record.sha256} · the file is truncated "
            "or was changed: copy or export the artifact again"
        )
        raise ArtifactError(msg)


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


@dataclasses.dataclass(slots=True, kw_only=True)
class StagedArtifact:
    """An artifact being written. Nothing is at `out` until `finish` returns."""

    out: Path
    path: Path  # write the files here
    overwrite: bool
    finished: bool = False

    def finish(self, manifest: Manifest) -> Artifact:
        """Hash what was written, write the manifest, and move the folder to its place.

        Args:
            manifest: everything but `files`, which is filled in from what lies in the folder.

        Returns:
            The artifact at `out`.
        """
        written = sorted(file for file in self.path.rglob("*") if file.is_file())
        files = {
            file.relative_to(self.path).as_posix(): FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))
            for file in written
        }
        text = dataclasses.replace(manifest, files=files).to_json()
        # A manifest that could not be read back must fail here, on the exporter's machine.
        Manifest.parse(text, where=str(self.path / MANIFEST_NAME))
        (self.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
        load_artifact(self.path)
        for entry in [*self.path.rglob("*"), self.path]:
            _fsync(entry)
        self._move()
        _fsync(self.out.parent)
        return load_artifact(self.out)

    def _move(self) -> None:
        """Rename the folder to `out`; when that fails or is interrupted, what was at `out` is there again."""
        replaced = self.path.with_name(f"{self.path.name}.replaced")
        try:
            if self.overwrite and self.out.exists():
                self.out.rename(replaced)
            self.path.rename(self.out)
            self.finished = True
        finally:
            # The folders tell how far it went, wherever an interrupt came.
            if not self.path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            elif replaced.exists():
                replaced.rename(self.out)


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
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        msg = f"{target.parent}: got {error.strerror} · expected a folder that can be written · choose another place"
        raise ArtifactError(msg) from error
    staged = StagedArtifact(out=target, path=folder, overwrite=overwrite)
    try:
        yield staged
    finally:
        if not staged.finished:
            shutil.rmtree(folder, ignore_errors=True)


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
        listed = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        listed = {}
    ours = {folder / name for name in (MANIFEST_NAME, *listed)}
    return sorted(entry for entry in folder.rglob("*") if not entry.is_dir() and entry not in ours)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
