"""What tests share is made once, made again when it was changed, and guarded."""

from __future__ import annotations

import os
from pathlib import Path

import exported
import pytest
from exported import check_unchanged, made_once


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(exported, "CACHE", tmp_path)
    return []


def make(made: list[Path], *settings: object) -> Path:
    def write(out: Path) -> None:
        made.append(out)
        out.mkdir()
        (out / "file").write_text("content")

    return made_once("thing", write, *settings)


def test_it_is_made_once_for_each_settings(made: list[Path]) -> None:
    assert make(made) == make(made) != make(made, 4)
    assert len(made) == 2


def test_other_sources_make_another(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(made)
    monkeypatch.setattr(exported, "source_hash", lambda: "others")
    assert make(made) != first
    assert first.exists()  # someone may be reading it
    os.utime(first, (0, 0))
    make(made, 4)
    assert not first.exists()


def test_what_was_changed_is_told_and_made_again(made: list[Path]) -> None:
    folder = make(made)
    check_unchanged(folder)
    (folder / "another").write_text("")
    with pytest.raises(AssertionError, match="a test has changed what all tests share"):
        check_unchanged(folder)
    make(made)
    assert len(made) == 2
    check_unchanged(folder)


def test_the_sources_of_the_hash_are_there() -> None:
    assert all((exported.ROOT / name).exists() for name in exported.SOURCES)
