"""CheXpert Plus, `df_chexpert_plus_….csv` with reports; and CheXpert, `train.csv` and `valid.csv`, which has none.

Films lie in `train/patient…/study…/view1_frontal.jpg`, or have become .png there: the file that exists is taken.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, text_or_none
from lite.studies.sources.exams import Exams, note_what_is_missing
from lite.studies.sources.listed import film_path
from lite.studies.sources.tables import open_table, peek_columns
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "CheXpert"
_PLUS_FILES: Final = "df_chexpert_plus_*.csv*"
_EXAM: Final = re.compile(r"(patient\w+/study\w+)/[^/]+$")


# The columns of film, Frontal or Lateral, AP or PA, and findings.
_PLUS: Final = ("path_to_image", "frontal_lateral", "ap_pa", "section_findings")
_OLDER: Final = ("Path", "Frontal/Lateral", "AP/PA")
_REASONS: Final = ("section_clinical_history", "section_history")


def recognises(path: Path) -> bool:
    """Say whether it is a table with the data set's columns or name, or a folder with such tables."""
    return any(table.match(_PLUS_FILES) or _layout_of(table) for table in _tables(path))


def read(path: Path, options: SourceOptions) -> StudyList:
    """Read a study for each folder of one that has a frontal film.

    Raises:
        LiteError: a table cannot be read, lacks a column, or names films in another way.
    """
    studies = StudyList(NAME, options)
    for table in _tables(path):
        layout = _layout_of(table) or _PLUS
        if layout is _PLUS:
            studies.kind = f"{NAME} Plus"
        for exam, film, where in _exams(table, layout, studies).chosen():
            image = _film(film.name, table.parent, options.image_folder)
            studies.take(Study(image, film.reason, id=exam, reference=film.reference), row=film.row, where=where)
    note_what_is_missing(studies)
    return studies.finish(path)


def _tables(path: Path) -> list[Path]:
    if path.is_dir():
        older = [path / f"{split}.csv" for split in ("train", "valid")]
        return sorted(path.glob(_PLUS_FILES))[-1:] or [table for table in older if _layout_of(table)]
    return [path]


def _layout_of(table: Path) -> tuple[str, ...] | None:
    columns = peek_columns(table)
    return next((layout for layout in (_PLUS, _OLDER) if columns.issuperset(layout)), None)


def _exams(path: Path, layout: tuple[str, ...], studies: StudyList) -> Exams:
    table = open_table(path)
    table.need(*layout)
    exams = Exams(studies, path)
    for line, row in table.rows():
        name, *cells = (row[column].strip() for column in layout)
        exam = _EXAM.search(name)
        if exam is None:
            msg = f"{path}:{line}: got the film {name[:60]} in {layout[0]} · expected …/patient…/study…/view….jpg"
            raise LiteError(f"{msg} · are the columns in the order of their names?")
        view = " ".join(filter(None, map(text_or_none, cells[:2])))
        reason = next(filter(None, (text_or_none(row.get(column)) for column in _REASONS)), None)
        exams.add(exam[1], name, view, line, row, reason, *map(text_or_none, cells[2:]))
    return exams


def _film(name: str, beside: Path, image_folder: Path | None) -> Path:
    """Return the film that is there: as it is called or with the other suffix, also without the first folder's name."""
    named = film_path(name, beside, image_folder)
    for film in (named, film_path(name.partition("/")[2], beside, image_folder)):
        for suffix in dict.fromkeys((film.suffix, ".jpg", ".png")):
            if (there := film.with_suffix(suffix)).is_file():
                return there
    return named
