"""Reference records on disk: written, read, and refused when they are not whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from recorded import assert_equal, edit, take, three_studies

from lite.errors import LiteError
from lite.eval.record import ReferenceRecord
from lite.eval.record_file import check_new, read_record, write_record
from lite.model import FindingsModel


@pytest.fixture(scope="module")
def record(tiny_model: FindingsModel, films: list[Path]) -> ReferenceRecord:
    return take(tiny_model, three_studies(films))


@pytest.fixture
def written(record: ReferenceRecord, tmp_path: Path) -> Path:
    return write_record(record, tmp_path / "R")


@pytest.mark.parametrize("name", ["R", "R.json", "R.safetensors"])
def test_a_record_comes_back_as_it_was(record: ReferenceRecord, tmp_path: Path, name: str) -> None:
    assert write_record(record, tmp_path / "new folder" / name) == tmp_path / "new folder" / "R.json"
    assert sorted(file.name for file in (tmp_path / "new folder").iterdir()) == ["R.json", "R.safetensors"]
    for other in ("R", "R.json", "R.safetensors"):
        assert_equal(read_record(tmp_path / "new folder" / other), record)


def test_a_dot_in_a_name_is_part_of_it(record: ReferenceRecord, tmp_path: Path) -> None:
    assert write_record(record, tmp_path / "demo.v1").name == "demo.v1.json"
    with pytest.raises(LiteError, match="got no name for a record"):
        read_record(Path())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format_version=2), "got a record of format_version 2 .* reads 1 · upgrade"),
        (lambda value: value.update(format_version=0), "got a record of format_version 0 .* make it again"),
        (lambda value: value.pop("format_version"), r"R\.json: got no format_version"),
        (lambda value: value.update(extra=1), "got an unknown key 'extra'"),
        (lambda value: value.pop("tensors"), "got no key 'tensors'"),
        (lambda value: value["record"].pop("machine"), r"R\.json\.record: got no key 'machine'"),
        (lambda value: value["record"]["settings"].update(seed=1), r"record\.settings: got an unknown key 'seed'"),
        (lambda value: value["record"]["studies"][1].pop("text"), r"studies\[1\]: got no key 'text'"),
        (lambda value: value["record"]["studies"][1].update(finish_reason="tired"), "got 'tired'"),
        (lambda value: value["record"]["studies"].pop(), r"R\.safetensors: got offsets .*\(4,\)\) in place"),
    ],
)  # fmt: skip
def test_a_json_that_is_not_a_records_is_refused(
    written: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit(written, change)
    with pytest.raises(LiteError, match=message):
        read_record(written)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_text_that_is_no_record_is_refused(written: Path, text: str) -> None:
    written.write_text(text, encoding="utf-8")
    with pytest.raises(LiteError, match=r"R\.json: got .* expected a reference record"):
        read_record(written)


def test_a_changed_byte_or_half_a_record_is_found(written: Path) -> None:
    tensors = written.with_suffix(".safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(LiteError, match=r"R\.safetensors: got .* sha256 .* as R\.json says · the file is damaged"):
        read_record(written)
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LiteError, match=f"got {len(whole) // 2} bytes, .* expected {len(whole)} bytes"):
        read_record(written)
    tensors.unlink()
    with pytest.raises(LiteError, match=r"R\.safetensors: got No such file .* side by side"):
        read_record(written)
    tensors.write_bytes(whole)
    written.unlink()
    with pytest.raises(LiteError, match=r"R\.json: got No such file"):
        read_record(written)


def test_tensors_that_do_not_fit_their_studies_are_refused(written: Path) -> None:
    tensors_path = written.with_suffix(".safetensors")
    good = safetensors.numpy.load_file(tensors_path)
    for changes, message in (
        ({"log_tail": good["log_tail"].astype(np.float64)}, r"log_tail \(dtype\('float64'\)"),
        ({"top_ids": good["top_ids"][:, :63].copy()}, "top_ids .*63.*in place of .*64"),
        ({"more": good["log_tail"]}, "more .* in place of None"),
        ({"offsets": good["offsets"][[0, 2, 1, 3]]}, "offsets .* for"),
        ({"offsets": good["offsets"] + np.int32(1)}, "offsets .* for"),
    ):
        content = safetensors.numpy.save(good | changes)
        tensors_path.write_bytes(content)
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit(written, lambda value, record=record: value.update(tensors=record))
        with pytest.raises(LiteError, match=f"got {message}"):
            read_record(written)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_is_interrupted_never_looks_whole(
    record: ReferenceRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, fails_at: int
) -> None:
    calls = 0
    real = getattr(Path, step)

    def failing(*arguments: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, failing)
        with pytest.raises(LiteError, match=r"R\.\w+: got a full disk"):
            write_record(record, tmp_path / "R")
    assert [file.name for file in tmp_path.iterdir()] == (["R.safetensors"] if fails_at == 2 else [])
    with pytest.raises(LiteError, match="got No such file"):
        read_record(tmp_path / "R")
    # What is left over stands in nobody's way.
    write_record(record, tmp_path / "R")
    assert_equal(read_record(tmp_path / "R"), record)


def test_a_record_is_never_replaced(record: ReferenceRecord, written: Path) -> None:
    before = {file: file.read_bytes() for file in written.parent.iterdir()}
    for refuse in (check_new, lambda name: write_record(record, name)):
        with pytest.raises(LiteError, match=r"R\.json: got a path that exists · expected a new one"):
            refuse(written.with_suffix(""))
    assert {file: file.read_bytes() for file in written.parent.iterdir()} == before
