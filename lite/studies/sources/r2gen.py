"""R2Gen's `annotation.json`, of Open-I or MIMIC-CXR.

{"train": [{"id": …, "report": …, "image_path": [film, …]}, …], "val": […], "test": […]}
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, beginning_of, is_nothing
from lite.studies.sources.listed import film_path, read_json
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "R2Gen's annotation"
_SPLITS: Final = ("train", "val", "test")
_BEGINNING: Final = re.compile(rb'\s*\{\s*"(train|val|test)"\s*:\s*\[')
_LOWER_CASE: Final = "its reports are lower-cased and cleaned: scores on them do not compare with scores on raw reports"
_FIRST_FILM: Final = "it does not say which film is frontal: the first of each study is taken"


def recognises(path: Path) -> bool:
    """Say whether it is JSON that begins with a split, or a folder with such an `annotation.json`."""
    file = _file(path)
    return file.suffix.lower() == ".json" and _BEGINNING.match(beginning_of(file, 256)) is not None


def read(path: Path, options: SourceOptions) -> StudyList:
    """Read a study for each entry of each split.

    Raises:
        LiteError: it cannot be read, or an entry is no study.
    """
    file = _file(path)
    entries = read_json(file)
    studies = StudyList(NAME, options)
    studies.notes += [_LOWER_CASE, _FIRST_FILM]
    images = file.parent / "images"
    beside = images if images.is_dir() else file.parent
    for split in _SPLITS:
        listed = entries.get(split, [])
        if not isinstance(listed, list):
            msg = f"{file}: got something else in {split} · expected a list of studies · is it R2Gen's own file?"
            raise LiteError(msg)
        for number, entry in enumerate(listed, start=1):
            where = f"{file}: {split}, entry {number}"
            row = {**entry, "split": split} if isinstance(entry, dict) else {}
            studies.take(_study(row, where, beside, options.image_folder), row=row, where=where)
    return studies.finish(path)


def _file(path: Path) -> Path:
    return path / "annotation.json" if path.is_dir() else path


def _study(row: dict[str, Any], where: str, beside: Path, image_folder: Path | None) -> Study:
    films = row.get("image_path")
    films = [films] if isinstance(films, str) else films
    name, report = row.get("id"), row.get("report")
    first = films[0] if isinstance(films, list) and films else None
    whole = isinstance(first, str) and isinstance(name, str | int) and isinstance(report, str | float | None)
    if not (whole and first) or is_nothing(name):
        msg = f"{where}: got an entry with {', '.join(row) or 'nothing'} · expected id, report and image_path (films)"
        raise LiteError(f"{msg} · correct it, or take it out")
    reference = "" if is_nothing(report) else str(report).strip()
    return Study(film_path(str(first), beside, image_folder), id=str(name), reference=reference)
