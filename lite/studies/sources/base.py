"""What all sources of studies share: how they are read, what they give, and what nothing looks like in them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.image.words import FRONTAL, view_of_words
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NOTHING: Final = ("", "nan", "none", "null", "n/a")
_FRONTAL_WORDS: Final = ("frontal", "chest")
EXPECTED_WHERE: Final = "frontal, chest or COLUMN=VALUE, with commas between them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which studies of a source are wanted."""

    frontal: bool = False  # leave out a film whose header names another view
    chest: bool = False  # leave out one whose header names another part of the body
    columns: tuple[tuple[str, str], ...] = ()  # and a row that has another value there

    @classmethod
    def parse(cls, text: str) -> Where:
        """Read `frontal,chest,split=test`.

        Raises:
            LiteError: it is something else.
        """
        words = [word.strip() for word in text.split(",")]
        columns = [tuple(part.strip() for part in word.split("=", 1)) for word in words if "=" in word]
        wrong = [word for word in words if "=" not in word and word not in _FRONTAL_WORDS]
        if wrong or any(not name for name, _ in columns):
            msg = f"got --where {text} · expected {EXPECTED_WHERE} · correct it"
            raise LiteError(msg)
        return cls(frontal="frontal" in words, chest="chest" in words, columns=tuple((n, v) for n, v in columns))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How a source is read."""

    image_folder: Path | None = None  # what film names are relative to; None: where the source itself is
    image_column: str | None = None  # of a table; None: guessed
    id_column: str | None = None
    reason_column: str | None = None
    reference_column: str | None = None
    header_reason: bool = False  # take the reason for the exam out of DICOM headers
    keep_rows: bool = False  # a study remembers all that its source says of it
    where: Where = Where()


_AS_IT_IS: Final = SourceOptions()
_NO_ROW: Final[Mapping[str, Any]] = {}


class StudyList(list[Study]):
    """Studies, how many entries of their source were left out for which reason, and what is to be said of it."""

    def __init__(self, kind: str = "list", options: SourceOptions = _AS_IT_IS) -> None:
        """Begin with none.

        Args:
            kind: what the source is, in a user's words: "MIMIC-CXR-JPG".
            options: how it is read.
        """
        super().__init__()
        self.kind = kind
        self.options = options
        self.left_out: Counter[str] = Counter()
        self.notes: list[str] = []  # such as which columns were guessed
        self._columns: dict[str, None] = {}  # that some row has had, in order
        self._seen: dict[str, Study] = {}

    @property
    def remark(self) -> str | None:
        """What was left out, in words."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        entries = len(self) + self.left_out.total()
        return f"{self.left_out.total()} of {entries} studies of the list left out: {reasons}" if reasons else None

    def leave_out(self, reason: str) -> None:
        """Count an entry that is no study for us: "of view LATERAL", "without findings"."""
        self.left_out[reason] += 1

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Say whether a row is wanted, and count one that is not."""
        self._columns |= dict.fromkeys(row)
        for name, wanted in self.options.where.columns:
            if (value := row.get(name)) is None or str(value).strip() != wanted:
                self.leave_out(f"with another {name} than {wanted}")
                return False
        return True

    def remembered(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what has to be kept of a row until its study is taken: all if that was asked for, else little."""
        self._columns |= dict.fromkeys(row)
        if self.options.keep_rows:
            return row
        return {name: row[name] for name, _ in self.options.where.columns if name in row} or _NO_ROW

    def take(self, study: Study, *, row: Mapping[str, Any], where: str, unique: bool = True) -> None:
        """Take a study, unless it is not wanted or here already.

        Args:
            study: with an id.
            row: what the source says of it, by the source's own names.
            where: the file and the row or entry, for an error.
            unique: an id that comes twice, of another film, is an error; the same film twice is left out once.

        Raises:
            LiteError: see `unique`.
        """
        if not self.wants(row):
            return
        study = replace(study, row=dict(row)) if self.options.keep_rows else study
        if unique and (before := self._seen.setdefault(study.id, study)) is not study:
            if before == study:
                self.leave_out("listed before")
                return
            msg = f"{where}: got the id {study.id} again, of other content · expected each once"
            raise LiteError(f"{msg} · correct it, or name a column of other ids with --id-column")
        self.append(study)

    def finish(self, path: Path) -> StudyList:
        """Return itself, once all has been read.

        Raises:
            LiteError: no study is left, or a condition names a column that no row has.
        """
        for name, _ in self.options.where.columns:
            if name not in self._columns:
                there = ", ".join(self._columns) or "none"
                msg = f"{path}: got --where with the column {name} · expected one of {there} · name one of them"
                raise LiteError(msg)
        if not self:
            msg = f"{path}: got no study that can be used ({self.remark or f'{self.kind}, empty'}) · expected frontal"
            raise LiteError(f"{msg} films · check the source")
        self._seen.clear()
        return self


def beginning_of(path: Path, count: int) -> bytes:
    """Return a file's first bytes; none where it is no file or cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_nothing(value: object) -> bool:
    """Say whether it is nothing, in the ways that tables have of writing that."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING)


def is_frontal(view: str) -> bool:
    """Say whether a view, in a data set's word for it, is a frontal one: "AP", "PA", "Frontal", "AP SUPINE"."""
    return view_of_words(view) in FRONTAL


def text_or_none(value: str | None) -> str | None:
    """Return a text without spaces around it; None where it is nothing."""
    return None if value is None or is_nothing(value) else value.strip()
