"""A folder that films arrive in: each is a study once it has stopped growing."""

from __future__ import annotations

import contextlib
import stat
from typing import TYPE_CHECKING

from lite.console import say
from lite.errors import LiteError
from lite.image.headers import read_header
from lite.studies.sources.folder import is_hidden, read_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from threading import Event

    from lite.studies.sources.base import SourceOptions
    from lite.studies.study import Study


def watch_folder(folder: Path, options: SourceOptions, stop: Event, *, interval_s: float) -> Iterator[Study | None]:
    """Yield the studies of a folder as they arrive, and None whenever there is nothing new.

    A film is there when its size and time are the same in two looks; a DICOM study, when all of its films are that have
    begun to arrive. Of what comes later for a study that was yielded nothing is made.
    """
    before: dict[Path, tuple[int, int]] = {}
    taken: set[Path] = set()
    yielded: set[str] = set()
    while not stop.is_set():
        now = _sizes(folder)
        new = [file for file in now if file not in taken]
        growing = {file for file in new if before.get(file) != now[file]}
        unfinished = {uid for file in growing if (uid := _study_uid(file))}
        ready = [file for file in new if file not in growing and not (unfinished and _study_uid(file) in unfinished)]
        taken = (taken & now.keys()).union(ready)
        before = now
        for study in _studies_of(ready, folder, options):
            if stop.is_set():
                return
            if study.id not in yielded:
                yielded.add(study.id)
                yield study
        yield None
        stop.wait(interval_s)


def _sizes(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of all files that are no longer empty, by name."""
    found: dict[Path, tuple[int, int]] = {}
    for file in sorted(folder.rglob("*")):
        with contextlib.suppress(OSError):  # taken away in between
            told = file.stat()
            if told.st_size and stat.S_ISREG(told.st_mode) and not is_hidden(file.relative_to(folder)):
                found[file] = told.st_size, told.st_mtime_ns
    return found


def _study_uid(file: Path) -> str | None:
    header = read_header(file)
    return header.study_uid if header else None


def _studies_of(files: list[Path], folder: Path, options: SourceOptions) -> list[Study]:
    try:
        return read_files(files, folder, options) if files else []
    except LiteError as error:  # nothing that can be drafted from has come
        say(f"note: {error}")
        return []
