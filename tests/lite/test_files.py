"""Whole files and folders: complete or not there, and what the system refuses is told in words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lite.errors import ArtifactError, LiteError
from lite.files import check_writable, link_or_copy, staged_folder, whole_file, write_whole


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.json"
    write_whole(file, "first \ud83d")  # half a surrogate pair is written as its number
    assert file.read_text() == "first &#55357;"

    def fail() -> None:
        with whole_file(file) as partial:
            partial.write_bytes(b"half")
            assert file.read_text().startswith("first")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert file.read_text().startswith("first")
    write_whole(file, b"second")
    assert file.read_bytes() == b"second"
    assert names(file.parent) == ["file.json"]


@pytest.mark.parametrize(("number", "said"), [(28, "a full disk"), (30, "system .Read-only file system")])
def test_what_the_system_refuses_is_told_and_not_what_cleaning_up_meets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    """A read-only disk refuses to delete, too: that must not stand in the place of the error that counts."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError(16, "busy")))
    for call in (lambda: write_whole(tmp_path / "a.json", "text"), lambda: check_writable(tmp_path / "a.json")):
        with pytest.raises(LiteError, match=rf"a\.json: got .*{said}.* · expected .* · "):
            call()


def test_a_place_is_checked_before_the_work(tmp_path: Path) -> None:
    check_writable(None, tmp_path / "new" / "file.json")
    assert names(tmp_path / "new") == []
    with pytest.raises(LiteError, match="got a folder · expected a file to write"):
        check_writable(tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(LiteError, match="got an error from the system"):
        check_writable(tmp_path / "file" / "below.json")


def test_a_folder_is_there_when_it_is_finished_and_leaves_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as staged:
        (staged.path / "a").write_text("a")
        assert not out.exists()
        staged.finish()
    assert (names(out), names(out.parent)) == (["a"], ["out"])
    with pytest.raises(LiteError, match="a path that exists"), staged_folder(out):
        pass
    with staged_folder(out, replace=True) as staged:
        (staged.path / "b").write_text("b")
    assert (names(out), names(out.parent)) == (["a"], ["out"]), "it was not finished"
    with staged_folder(out, replace=True) as staged:
        (staged.path / "b").write_text("b")
        staged.finish()
    assert (names(out), names(out.parent)) == (["b"], ["out"])


def test_a_full_disk_ends_a_folder_with_the_error_asked_for(tmp_path: Path) -> None:
    def fill() -> None:
        with staged_folder(tmp_path / "out", error_type=ArtifactError) as staged:
            (staged.path / "a").write_text("a")
            raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="out: got a full disk"):
        fill()
    assert names(tmp_path) == []


def test_of_a_symbolic_link_the_file_is_put_at_the_other_place(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("content")
    (tmp_path / "link").symlink_to("blob")
    link_or_copy(tmp_path / "link", tmp_path / "deep" / "er" / "file")
    assert not (tmp_path / "deep" / "er" / "file").is_symlink()
    assert (tmp_path / "deep" / "er" / "file").read_text() == "content"
