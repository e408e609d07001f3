"""Tables of text: CSV and TSV, packed by gzip or not, in whichever encoding and with whichever separator."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import TextIO

SUFFIXES: Final = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".txt")
_SEPARATORS: Final = ",;\t|"
_LONGEST_FIELD: Final = 16 * 1024**2
_LONGEST_HEADER: Final = 64 * 1024
_GZIP: Final = b"\x1f\x8b"
_BOMS: Final = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table that has been looked at, and is read row by row."""

    path: Path
    columns: tuple[str, ...]
    encoding: str
    separator: str

    @property
    def remark(self) -> str | None:
        """What its reader should know: that it is not in UTF-8."""
        if self.encoding.startswith("utf-8"):
            return None
        return f"{self.path.name} is not in UTF-8; read as {self.encoding}: check that its letters are right"

    def need(self, *columns: str) -> None:
        """Check that it has columns.

        Raises:
            LiteError: one is missing; those that there are are named.
        """
        if missing := [name for name in columns if name not in self.columns]:
            msg = f"{self.path}:1: got the columns {', '.join(self.columns)} · expected also {', '.join(missing)}"
            raise LiteError(f"{msg} · is it the data set's own file, as it was downloaded?")

    def rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yield the number of the line in which a row begins, and its cells by their columns; blank lines are none.

        Raises:
            LiteError: a row has more or fewer cells than there are columns, or is no text.
        """
        with _explained(self.path), _opened(self.path, self.encoding) as file:
            reader = csv.reader(file, delimiter=self.separator, strict=True)
            next(reader)
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                if not any(cells):
                    continue
                if len(cells) != len(self.columns):
                    msg = f"{self.path}:{line}: got {len(cells)} cells · expected {len(self.columns)}, one a column"
                    raise LiteError(f"{msg} · quote cells that have a separator or a line's end in them")
                yield line, dict(zip(self.columns, cells, strict=True))


def open_table(path: Path) -> Table:
    """Look at the beginning of a table: its encoding, its separator and its columns.

    Raises:
        LiteError: it cannot be read, or it has no header, or a column twice.
    """
    with _explained(path):
        csv.field_size_limit(_LONGEST_FIELD)
        encoding = _encoding_of(path)
        with _opened(path, encoding) as file:
            first = file.readline()
            separator = max(_SEPARATORS, key=first.count)
            file.seek(0)
            columns = tuple(cell.strip() for cell in next(csv.reader(file, delimiter=separator), []))
    if not any(columns):
        raise LiteError(f"{path}: got an empty table · expected a line of column names, then a row per study · fill it")
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise LiteError(f"{path}: got the column {twice[0]} twice · expected each once · rename one of them")
    return Table(path=path, columns=columns, encoding=encoding, separator=separator)


def is_table(path: Path) -> bool:
    """Say whether a file is called like a table."""
    return path.name.lower().endswith(SUFFIXES)


def peek_columns(path: Path) -> frozenset[str]:
    """Return a table's columns from its first line alone; none where it is no table or cannot be read."""
    if not (is_table(path) and path.is_file()):
        return frozenset()
    with contextlib.suppress(OSError, EOFError, zlib.error, csv.Error), _opened(path, "latin-1") as file:
        first = file.readline(_LONGEST_HEADER).removeprefix("\xef\xbb\xbf")
        cells = next(csv.reader([first], delimiter=max(_SEPARATORS, key=first.count)), [])
        return frozenset(cell.strip() for cell in cells)
    return frozenset()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected a table · check the path"
        raise LiteError(msg) from error
    except (csv.Error, UnicodeError) as error:
        msg = f"{path}: got a table that cannot be read ({error}) · expected CSV · save it as CSV in UTF-8 again"
        raise LiteError(msg) from error


def _encoding_of(path: Path) -> str:
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    with gzip.open(path) if packed else path.open("rb") as file:
        beginning = file.read(4)
        for bom, encoding in _BOMS:
            if beginning.startswith(bom):
                return encoding
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            while chunk := file.read(2**20):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "cp1252"
    return "utf-8"


@contextlib.contextmanager
def _opened(path: Path, encoding: str) -> Iterator[TextIO]:
    with path.open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        with gzip.open(raw) if packed else contextlib.nullcontext(raw) as data:
            # Letters that cp1252 lacks are better wrong than a reason to read nothing: the remark says so.
            errors = "replace" if encoding == "cp1252" else "strict"
            with io.TextIOWrapper(data, encoding=encoding, errors=errors, newline="") as text:
                yield text
