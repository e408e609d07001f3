"""MIMIC-CXR-JPG: tables of films and splits, the films in `files/p10/p…/s…/`, and reports as text or cut in a table.

The tables are packed or not: `mimic-cxr-…-metadata.csv.gz` (needed), `…-split.csv.gz`, `mimic_cxr_sectioned.csv` (the
findings; it has no reasons) and `files/p10/p…/s….txt` (reports, with the reason). The last two come with MIMIC-CXR.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, text_or_none
from lite.studies.sources.exams import Exams, Film, note_what_is_missing
from lite.studies.sources.sections import Sections, cut_sections
from lite.studies.sources.tables import is_table, open_table
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Container

NAME: Final = "MIMIC-CXR-JPG"
_METADATA: Final = "mimic-cxr-*-metadata.csv*"
_SPLIT: Final = "mimic-cxr-*-split.csv*"
_SECTIONED: Final = "mimic_cxr_sectioned.csv*"


def recognises(path: Path) -> bool:
    """Say whether it is the data set's folder, or its table of films."""
    return _table(path, _METADATA) is not None if path.is_dir() else path.match(_METADATA)


def read(path: Path, options: SourceOptions) -> StudyList:
    """Read a study for each `study_id` that has a frontal film.

    Raises:
        LiteError: a table cannot be read, lacks a column, or has something else in it than numbers for ids.
    """
    studies = StudyList(NAME, options)
    root = path if path.is_dir() else path.parent
    table = (_table(root, _METADATA) or path) if path.is_dir() else path
    chosen = list(_exams(root, table, studies).chosen())
    findings = _findings(root, {study for study, _, _ in chosen})
    films = options.image_folder or root
    films = films / "files" if (films / "files").is_dir() else films
    folders = [folder for folder in dict.fromkeys((root / "files", films)) if folder.is_dir()]
    for study, film, where in chosen:
        report = _report(folders, film)
        reference = findings.get(study) or report.findings or ""
        image = Path(f"{films}/{film.name}")  # half the time and memory of films / film.name
        studies.take(Study(image, report.reason, id=study, reference=reference), row=film.row, where=where)
    note_what_is_missing(studies)
    return studies.finish(path)


def _table(root: Path, pattern: str) -> Path | None:
    """Return the last version of a table, if it is there."""
    return max((path for path in root.glob(pattern) if is_table(path)), default=None)


def _exams(root: Path, path: Path, studies: StudyList) -> Exams:
    table = open_table(path)
    table.need("dicom_id", "subject_id", "study_id", "ViewPosition")
    splits = _splits(root, studies)
    exams = Exams(studies, path)
    for line, row in table.rows():
        dicom, subject, study = (row[name].strip() for name in ("dicom_id", "subject_id", "study_id"))
        if not (subject.isdecimal() and study.isdecimal()):
            msg = f"{path}:{line}: got subject_id {subject[:40]} and study_id {study[:40]} · expected numbers"
            raise LiteError(f"{msg} · are the columns in the order of their names?")
        if splits:
            row["split"] = splits.get(study, "")
        view = text_or_none(row["ViewPosition"]) or text_or_none(row.get("ViewCodeSequence_CodeMeaning"))
        exams.add(study, f"p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg", view, line, row)
    return exams


def _splits(root: Path, studies: StudyList) -> dict[str, str]:
    """Return train, validate or test for each study."""
    path = _table(root, _SPLIT)
    if path is None:
        studies.notes.append(f"{root} has no {_SPLIT.rstrip('*')}.gz: studies come without their split")
        return {}
    table = open_table(path)
    table.need("study_id", "split")
    return {row["study_id"].strip(): sys.intern(row["split"].strip()) for _, row in table.rows()}


def _findings(root: Path, wanted: Container[str]) -> dict[str, str]:
    path = _table(root, _SECTIONED)
    if path is None:
        return {}
    table = open_table(path)
    table.need("study", "findings")
    rows = ((row["study"].strip().removeprefix("s"), text_or_none(row["findings"])) for _, row in table.rows())
    return {study: " ".join(findings.split()) for study, findings in rows if findings and study in wanted}


def _report(folders: list[Path], film: Film) -> Sections:
    """Return the sections of the report beside the study's folder, which has its name."""
    name = f"{film.name.rpartition('/')[0]}.txt"
    for folder in folders:
        path = Path(f"{folder}/{name}")
        try:
            return cut_sections(path.read_text(encoding="utf-8", errors="replace"))
        except FileNotFoundError:
            continue
        except OSError as error:
            msg = f"{path}: got a report that cannot be read ({error}) · expected text · check the file"
            raise LiteError(msg) from error
    return Sections()
