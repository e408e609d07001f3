"""Open-I, the chest films of Indiana University: a folder of XML reports, or two tables (`indiana_….csv`).

    <eCitation> <uId id="CXR1"/> … <AbstractText Label="INDICATION">, <AbstractText Label="FINDINGS"> …
      <parentImage id="CXR1_1_IM-0001-3001"> …

The XML does not say which film is frontal; the table `indiana_projections.csv` does. A report that declares a document
type is refused: no report of the set has one, and entities are how XML is made to do harm.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from lite.errors import LiteError
from lite.studies.sources.base import SourceOptions, StudyList, beginning_of, text_or_none
from lite.studies.sources.exams import Exams, note_what_is_missing
from lite.studies.sources.tables import open_table
from lite.studies.study import Study

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "Open-I"
_REPORTS: Final = "indiana_reports.csv"
_PROJECTIONS: Final = "indiana_projections.csv"
_SUFFIXES: Final = (".png", ".jpg", ".dcm")
_FIRST_FILM: Final = "the XML does not say which film is frontal: the first of each study is taken"


def recognises(path: Path) -> bool:
    """Say whether it is a folder with the two tables, one of them, or a folder of the data set's XML."""
    if path.name in (_REPORTS, _PROJECTIONS):
        return True
    if not path.is_dir():
        return False
    if all((path / name).is_file() for name in (_REPORTS, _PROJECTIONS)):
        return True
    some = itertools.islice(_xml_folder(path).glob("*.xml"), 8)  # one may be spoilt
    return any(b"<eCitation" in beginning_of(file, 4096) for file in some)


def read(path: Path, options: SourceOptions) -> StudyList:
    """Read a study for each report that has a film.

    Raises:
        LiteError: a table or a report cannot be read, or a report declares entities.
    """
    studies = StudyList(NAME, options)
    if path.is_file() or (path / _REPORTS).is_file():
        _read_tables(path if path.is_dir() else path.parent, studies)
    else:
        _read_xml(path, studies)
    note_what_is_missing(studies)
    return studies.finish(path)


def _read_tables(root: Path, studies: StudyList) -> None:
    reports, projections = open_table(root / _REPORTS), open_table(root / _PROJECTIONS)
    reports.need("uid", "indication", "findings")
    projections.need("uid", "filename", "projection")
    by_uid = {row["uid"].strip(): row for _, row in reports.rows()}
    exams = Exams(studies, projections.path)
    for line, projection in projections.rows():
        uid = projection["uid"].strip()
        row = by_uid.get(uid, {}) | projection
        texts = (text_or_none(row.get(name)) for name in ("indication", "findings"))
        exams.add(uid, row["filename"].strip(), row["projection"], line, row, *texts)
    films = studies.options.image_folder or root
    usual = films / "images" / "images_normalized"
    films = usual if usual.is_dir() else films
    for uid, film, where in exams.chosen():
        study = Study(films / film.name, film.reason, id=uid, reference=film.reference)
        studies.take(study, row=film.row, where=where)


def _xml_folder(path: Path) -> Path:
    inside = path / "ecgen-radiology"
    return inside if inside.is_dir() else path


def _read_xml(path: Path, studies: StudyList) -> None:
    studies.notes.append(_FIRST_FILM)
    films = studies.options.image_folder or path
    for file in sorted(_xml_folder(path).glob("*.xml"), key=lambda file: (len(file.name), file.name)):
        report = _parse(file)
        named = report.find(".//uId")
        uid = (named.get("id") if named is not None else None) or file.stem
        images = [name for image in report.iter("parentImage") if (name := image.get("id"))]
        labelled = ((text.get("Label", "").lower(), "".join(text.itertext())) for text in report.iter("AbstractText"))
        texts = {label: text_or_none(text) for label, text in labelled}
        if not images:
            studies.leave_out("without a film")
            continue
        there = (film for suffix in _SUFFIXES if (film := films / f"{images[0]}{suffix}").is_file())
        film = next(there, films / f"{images[0]}{_SUFFIXES[0]}")
        study = Study(film, texts.get("indication"), id=uid, reference=texts.get("findings") or "")
        studies.take(study, row={"uid": uid, "images": images, **texts}, where=str(file))


def _parse(path: Path) -> Element:
    """Parse a report; nothing that it declares is followed."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
        return builder.close()
    except (OSError, ValueError, expat.ExpatError) as error:
        msg = f"{path}: got a report that cannot be read ({error}) · expected XML of {NAME} · download it again"
        raise LiteError(msg) from error


def _refuse(*_: object) -> None:
    msg = "it has a document type, which may declare entities"
    raise ValueError(msg)
