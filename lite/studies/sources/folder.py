"""A folder of films, a pattern of their names, or a tree of DICOM files: one study a film, or one a StudyInstanceUID.

Of a DICOM file only the header is read. Films that belong to one study are told by it, and the frontal one is chosen
by the rules of films (`lite.image.rules`): PA before AP before a view that the file does not tell.
"""

from __future__ import annotations

import glob
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.image.files import EXTENSIONS
from lite.image.headers import FilmHeader, read_header
from lite.studies.sources.base import SourceOptions, StudyList
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_VIEWS: Final = {"PA": 0, "AP": 1, "FRONTAL": 2, None: 3}
"""Which of several frontal films is taken: the first in this order, then by the name of its file."""


@dataclass(slots=True)
class _Exam:
    """The films of one StudyInstanceUID that may be drafted from."""

    films: list[tuple[Path, FilmHeader]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def read_folder(path: Path, options: SourceOptions) -> StudyList:
    """Read a folder, and the folders in it.

    Raises:
        LiteError: there is no film in it.
    """
    files = (file for file in sorted(path.rglob("*")) if not is_hidden(file.relative_to(path)))
    return read_files((file for file in files if file.is_file()), path, options)


def read_pattern(pattern: str, options: SourceOptions) -> StudyList:
    """Read the files that a pattern names: "films/**/*.png".

    Raises:
        LiteError: it names none.
    """
    files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 - also absolute ones
    if not files:
        msg = f"{pattern}: got a pattern that names no file · expected films · check it, in quotes for the shell"
        raise LiteError(msg)
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    return read_files((file for file in files if file.is_file()), Path(*fixed), options)


def read_files(files: Iterable[Path], root: Path, options: SourceOptions) -> StudyList:
    """Read films: pictures are a study each, and are called by their path in the folder; DICOM files are put together.

    Raises:
        LiteError: there is no film.
    """
    studies = StudyList("folder", options)
    exams: dict[str, _Exam] = {}
    others = 0
    for file in files:
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
        header = read_header(file)
        if header is not None:
            _add(exams.setdefault(header.study_uid or name, _Exam()), file, header)
        elif file.suffix.lower() in EXTENSIONS:
            studies.take(Study(file, id=name), row={"path": str(file)}, where=str(root))
        else:
            others += 1
    for study, row in _of_exams(exams, studies):
        studies.take(study, row=row, where=str(root))
    if exams:
        studies.kind = "DICOM tree"
    if more := sum(max(0, len(exam.films) - 1) for exam in exams.values()):
        studies.notes.append(f"of the frontal films, {more} are not drafted from: one of a study is, PA before AP")
    if others:
        studies.notes.append(f"of the files in {root}, {others} are no films, by their names and beginnings")
    return studies.finish(root)


def is_hidden(name: Path) -> bool:
    """Say whether it, or a folder that it lies in, begins with a dot: such as what a Mac leaves on a share."""
    return any(part.startswith(".") for part in name.parts)


def _add(exam: _Exam, file: Path, header: FilmHeader) -> None:
    if header.refused is None:
        exam.films.append((file, header))
    else:
        exam.refused.append(header.refused)


def _of_exams(exams: dict[str, _Exam], studies: StudyList) -> Iterator[tuple[Study, dict[str, Any]]]:
    """Yield one study of each exam that has a frontal film; count the others."""
    for uid, exam in exams.items():
        if not exam.films:
            studies.leave_out(f"without a frontal chest film ({exam.refused[0].partition(' (')[0]})")
            continue
        exam.films.sort(key=lambda film: (_VIEWS.get(film[1].view, len(_VIEWS)), film[0].as_posix()))
        file, header = exam.films[0]
        reason = header.reason if studies.options.header_reason else None
        yield Study(file, reason, id=uid), header.row
