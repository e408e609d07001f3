"""Any table of studies: a row each, its columns named by the user or plain enough to be guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, is_frontal, text_or_none
from lite.studies.sources.listed import film_path
from lite.studies.sources.tables import Table, open_table
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_GUESSES: Final = {
    "image": "image image_path path_to_image film film_path filename file_name file filepath file_path path dicom_path "
    "image_file img img_path",
    "id": "id study_id study studyid uid accession accession_number accessionnumber case_id exam_id",
    "reason": "reason reason_for_exam reason_for_study indication clinical_indication history clinical_history query",
    "reference": "reference findings section_findings report_findings ground_truth",
    "view": "view view_position viewposition projection frontal_lateral",
}
"""Plain names, the best first; capitals, and blanks or dashes for underscores, make no difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column of a table holds what; None: none does."""

    image: str
    id: str | None = None
    reason: str | None = None
    reference: str | None = None
    view: str | None = None


def read_table(path: Path, options: SourceOptions) -> StudyList:
    """Read a table of studies.

    A row without a film is left out, as is one whose view is not frontal. A study without an id is called by its film.

    Raises:
        LiteError: there is no such column, or no column for the films can be guessed; see `open_table`.
    """
    table = open_table(path)
    columns = choose_columns(table, options)
    studies = StudyList("table", options)
    studies.notes += [note for note in (table.remark, _guessed(columns, options)) if note]
    for line, row in table.rows():
        cells = {name: text_or_none(row[column]) for name, column in _named(columns).items()}
        if (image := cells["image"]) is None:
            studies.leave_out("without a film")
        elif (view := cells.get("view")) and not is_frontal(view):
            studies.leave_out(f"of view {view[:20]}")
        else:
            study = Study(
                film_path(image, path.parent, options.image_folder),
                cells.get("reason"),
                id=cells.get("id") or image,
                reference=cells.get("reference") or "",
            )
            studies.take(study, row=row, where=f"{path}:{line}")
    return studies.finish(path)


def choose_columns(table: Table, options: SourceOptions) -> Columns:
    """Return the columns that were named, and of the others those whose names are plain.

    Raises:
        LiteError: there is no such column; those that there are are named.
    """
    plain = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in reversed(table.columns)}
    found: dict[str, str] = {}
    for what, guesses in _GUESSES.items():
        named: str | None = getattr(options, f"{what}_column", None)
        if named is None:
            named = next((plain[guess] for guess in guesses.split() if guess in plain), None)
        elif named not in table.columns:
            msg = f"{table.path}: got --{what}-column {named} · expected a column of the table: "
            raise LiteError(f"{msg}{', '.join(table.columns)} · name one of them")
        if named is not None and named not in found.values():
            found[what] = named
    if "image" not in found:
        msg = f"{table.path}: got the columns {', '.join(table.columns)} · expected one of films, such as image or path"
        raise LiteError(f"{msg} · name it with --image-column")
    return Columns(**found)


def _named(columns: Columns) -> Mapping[str, str]:
    return {name: column for name in _GUESSES if (column := getattr(columns, name)) is not None}


def _guessed(columns: Columns, options: SourceOptions) -> str | None:
    """Say which columns were guessed, and which were not found."""
    guessed = [f"{n} from {c}" for n, c in _named(columns).items() if getattr(options, f"{n}_column", None) is None]
    missing = [name for name in ("id", "reason", "reference") if getattr(columns, name) is None]
    if not guessed:
        return None
    lacking = f"; no column for {', '.join(missing)}" if missing else ""
    return f"columns guessed: {', '.join(guessed)}{lacking} (--image-column, --id-column, … name others)"
