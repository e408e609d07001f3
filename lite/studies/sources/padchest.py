"""PadChest: one table of films, each with its projection and the report of its study, in Spanish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lite.studies.sources.base import SourceOptions, StudyList, text_or_none
from lite.studies.sources.exams import Exams
from lite.studies.sources.tables import is_table, open_table, peek_columns
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "PadChest"
_NEEDED: Final = ("ImageID", "StudyID", "Projection", "Report")
_FILES: Final = "PADCHEST*.csv*"
_SPANISH: Final = "reports are in Spanish, as the data set prepared them: scores against English findings say nothing"


def recognises(path: Path) -> bool:
    """Say whether it is the data set's table, by its columns, or a folder with it, by its name."""
    table = _table(path)
    return table is not None and (path.is_dir() or peek_columns(table).issuperset(_NEEDED[:-1]))


def read(path: Path, options: SourceOptions) -> StudyList:
    """Read a study for each StudyID that has a frontal film.

    Raises:
        LiteError: the table cannot be read, or lacks a column.
    """
    studies = StudyList(NAME, options)
    table = open_table(_table(path) or path)
    table.need(*_NEEDED)
    exams = Exams(studies, table.path)
    children = set()
    for line, row in table.rows():
        study, folder = row["StudyID"].strip(), text_or_none(row.get("ImageDir"))
        name = row["ImageID"].strip()
        if (text_or_none(row.get("Pediatric")) or "No") != "No":
            children.add(study)
        name = f"{folder}/{name}" if folder else name
        exams.add(study, name, text_or_none(row["Projection"]), line, row, reference=text_or_none(row["Report"]))
    films = options.image_folder or table.path.parent
    for study, film, where in exams.chosen():
        bare = films / film.name.rpartition("/")[2]
        image = bare if bare.is_file() else films / film.name
        studies.take(Study(image, id=study, reference=film.reference), row=film.row, where=where)
    studies.notes.append(_SPANISH)
    if of_children := sum(study.id in children for study in studies):
        studies.notes.append(f"{of_children} of {len(studies)} studies are of children (column Pediatric)")
    return studies.finish(path)


def _table(path: Path) -> Path | None:
    return path if path.is_file() else max((file for file in path.glob(_FILES) if is_table(file)), default=None)
