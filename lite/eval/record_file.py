"""A reference record on disk: R.json and R.safetensors, both complete or neither taken for a record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lite.artifact.parts import FileRecord
from lite.config import from_json, to_json
from lite.errors import BackendUnavailable, LiteError
from lite.eval.divergence import TopK
from lite.eval.record import TOP_K, RecordInfo, ReferenceRecord, ids_type
from lite.files import check_writable, write_whole

RECORD_VERSION: Final = 1
_AGAIN: Final = "make it again with python -m lite.bench record"


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordFile:
    """What R.json holds."""

    format_version: int
    tensors: FileRecord
    record: RecordInfo


def record_paths(name: Path) -> tuple[Path, Path]:
    """Return the paths of the JSON and of the tensors for R, R.json or R.safetensors."""
    stem = name.name.removesuffix(".json").removesuffix(".safetensors")
    if not stem:
        msg = f"{name}: got no name for a record · expected one, such as references/fp16 · give one"
        raise LiteError(msg)
    return name.with_name(f"{stem}.json"), name.with_name(f"{stem}.safetensors")


def check_new(name: Path) -> None:
    """Refuse a name under which no record can be written: before anything is computed.

    Raises:
        LiteError: there is a record of this name, or its folder cannot be written.
    """
    json_path, _ = record_paths(name)
    if json_path.exists():
        msg = f"{json_path}: got a path that exists · expected a new one · remove the record there or choose a new name"
        raise LiteError(msg)
    check_writable(json_path)


def write_record(record: ReferenceRecord, name: Path) -> Path:
    """Write a record: both files complete or, whenever it is interrupted, nothing that can be taken for a record.

    Args:
        record: what to write.
        name: R, R.json or R.safetensors.

    Returns:
        The JSON's path.

    Raises:
        LiteError: there is a record of this name, or its folder cannot be written.
    """
    check_new(name)
    json_path, tensors_path = record_paths(name)
    tensors = _safetensors().save(_tensors_of(record))
    file = _RecordFile(
        format_version=RECORD_VERSION,
        tensors=FileRecord(bytes=len(tensors), sha256=hashlib.sha256(tensors).hexdigest()),
        record=record.info,
    )
    text = json.dumps(to_json(file), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(tensors_path, tensors)
    # The JSON last: it tells the hash of the tensors, so neither is taken for a record without the other.
    write_whole(json_path, text)
    return json_path


def read_record(name: Path) -> ReferenceRecord:
    """Read a record.

    Args:
        name: R, R.json or R.safetensors.

    Raises:
        LiteError: a file is missing, was changed or belongs to another record, or the record has another version.
        ArtifactError: a key of the JSON is missing, unknown or of the wrong type; it is named.
        BackendUnavailable: safetensors is not installed.
    """
    json_path, tensors_path = record_paths(name)
    if not json_path.exists() and (name / "manifest.json").exists():
        msg = f"{name}: got an artifact · expected a reference record, which says what an artifact did on a list"
        raise LiteError(f"{msg} · make one with python -m lite.bench record {name} --data LIST.json --out RECORD")
    file = _parse(_read_bytes(json_path), str(json_path))
    content = _read_bytes(tensors_path)
    got = len(content), hashlib.sha256(content).hexdigest()
    if got != (file.tensors.bytes, file.tensors.sha256):
        msg = (
            f"{tensors_path}: got {got[0]} bytes, sha256 {got[1]} · expected {file.tensors.bytes} bytes, sha256 "
            f"{file.tensors.sha256}, as {json_path.name} says · the file is damaged or of another record: copy both "
            f"files again, or {_AGAIN}"
        )
        raise LiteError(msg)
    tensors: dict[str, NDArray[Any]] = _safetensors().load(content)
    _check_tensors(tensors, file.record, tensors_path)
    return ReferenceRecord(
        info=file.record,
        offsets=tensors["offsets"],
        all_token_ids=tensors["token_ids"],
        top=TopK(ids=tensors["top_ids"], log_probs=tensors["top_log_probs"], log_tail=tensors["log_tail"]),
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = (
            f"{path}: got {error.strerror} · expected a file of a reference record, R.json and R.safetensors side by "
            f"side · check the path, copy both files, or {_AGAIN}"
        )
        raise LiteError(msg) from error


def _parse(content: bytes, where: str) -> _RecordFile:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets without end
        msg = f"{where}: got text that is not JSON ({error}) · expected a reference record · {_AGAIN}"
        raise LiteError(msg) from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is not int:
        msg = f"{where}: got no format_version · expected a reference record · check the path, or {_AGAIN}"
        raise LiteError(msg)
    if version != RECORD_VERSION:
        todo = "upgrade llava-rad-lite" if version > RECORD_VERSION else _AGAIN
        msg = f"{where}: got a record of format_version {version} · this version reads {RECORD_VERSION} · {todo}"
        raise LiteError(msg)
    return from_json(_RecordFile, value, where=where)


def _tensors_of(record: ReferenceRecord) -> dict[str, NDArray[Any]]:
    return {
        "offsets": record.offsets,
        "token_ids": record.all_token_ids,
        "top_ids": record.top.ids,
        "top_log_probs": record.top.log_probs,
        "log_tail": record.top.log_tail,
    }


def _check_tensors(tensors: dict[str, NDArray[Any]], info: RecordInfo, path: Path) -> None:
    """Refuse tensors that are whole and yet not those of the studies beside them."""
    vocab_size, num_tokens = info.settings.vocab_size, len(tensors.get("token_ids", ()))
    k, of_ids = min(TOP_K, vocab_size), ids_type(vocab_size)
    expected = {
        "offsets": (np.dtype(np.int32), (len(info.studies) + 1,)),
        "token_ids": (of_ids, (num_tokens,)),
        "top_ids": (of_ids, (num_tokens, k)),
        "top_log_probs": (np.dtype(np.float32), (num_tokens, k)),
        "log_tail": (np.dtype(np.float32), (num_tokens,)),
    }
    got = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            raise _misshapen(path, f"{name} {got.get(name)} in place of {expected.get(name)}")
    offsets = tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != num_tokens or (np.diff(offsets) < 1).any():
        raise _misshapen(path, f"offsets {offsets[:4].tolist()} … {offsets[-1]} for {num_tokens} tokens")


def _misshapen(path: Path, what: str) -> LiteError:
    return LiteError(f"{path}: got {what} · expected the tensors of the record's studies · {_AGAIN}")


def _safetensors() -> Any:  # noqa: ANN401 - a module
    try:
        import safetensors.numpy
    except ImportError as error:
        msg = f'got no safetensors ({error}) · expected it for records · pip install "llava-rad-lite[torch]"'
        raise BackendUnavailable(msg) from error
    return safetensors.numpy
