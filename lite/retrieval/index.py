"""An index: the vectors of films and of their reports in files that grow, and that are searched whole.

    INDEX/index.json     format_version, artifact_id of the towers, dim, and where the artifact was
          films.f32      float32 [num_studies, dim]: a row a study, of length 1
          reports.f32    float32 [num_reports, dim]: a row a study that has a report, in the same order
          studies.jsonl  {"id", "image"}, and "report" where there is one: a line a study
          rows.i64       int64 [num_studies, 2]: where a study's line ends, and how many reports there are up to it

A study is in the index once its row of `rows.i64` is whole. That row is written after all else of it has been sent to
the disk (fsync), so whatever a kill, a full disk or a power cut leaves of a study that is not: it is cut off when the
index is next written to. What is in the index never changes. So one may search while another process writes: it sees
the studies that were there when it opened the index. Numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from lite.config import from_json
from lite.errors import ArtifactError, LiteError
from lite.files import disk_errors_explained, write_whole
from lite.retrieval.nearest import nearest
from lite.studies.lock import locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO, Self

    from numpy.typing import NDArray

FORMAT_VERSION: Final = 1
HEADER: Final = "index.json"
FILMS, REPORTS, STUDIES, ROWS = "films.f32", "reports.f32", "studies.jsonl", "rows.i64"
What = Literal["films", "reports"]
_FLOAT: Final = np.dtype("<f4")
_INT: Final = np.dtype("<i8")
_LENGTH_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What all vectors of an index share."""

    format_version: int
    artifact_id: str  # of the embeddings: see `lite.retrieval.towers.Retrieval`
    dim: int
    artifact: str  # where it was: an absolute path


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexed:
    """A study in an index."""

    id: str
    image: str  # its film's file: an absolute path
    report: str | None = None

    def to_dict(self) -> dict[str, str]:
        """Return what `json.dumps` takes; without a report, where there is none."""
        return {"id": self.id, "image": self.image} | ({} if self.report is None else {"report": self.report})

    @classmethod
    def from_line(cls, line: bytes) -> Indexed:
        """Read a line.

        Raises:
            ValueError: it is something else.
        """
        value = json.loads(line)
        if not isinstance(value, dict) or value.keys() - {"report"} != {"id", "image"}:
            raise ValueError("a line that is no study")
        if not all(isinstance(text, str) for text in value.values()):
            raise ValueError("a study of something else than text")
        return cls(**value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A study that a search has found."""

    similarity: float  # the cosine of two vectors
    study: Indexed


class Index:
    """An index as it was when it was opened, to search in. Its files are mapped, not read."""

    def __init__(self, path: Path, *, artifact_id: str | None = None) -> None:
        """Open an index.

        Args:
            path: the folder.
            artifact_id: whose vectors are wanted; None: whoever's.

        Raises:
            LiteError: there is none, it is damaged, or it holds vectors of another artifact.
        """
        self.path = path
        self.header = _read_header(path)
        if artifact_id is not None and self.header.artifact_id != artifact_id:
            msg = f"{path}: got an index by the artifact {self.header.artifact_id} · expected {artifact_id}"
            raise LiteError(f"{msg} · index the studies with this artifact, or search with that one")
        self._ends = _read_ends(path / ROWS)
        self.num_line_bytes, num_reports = map(int, self._ends[-1]) if len(self._ends) else (0, 0)
        self.films = _mapped(path / FILMS, _FLOAT, self.header.dim, rows=len(self._ends))
        self.reports = _mapped(path / REPORTS, _FLOAT, self.header.dim, rows=num_reports)
        self._lines = _mapped(path / STUDIES, np.dtype(np.uint8), 1, rows=self.num_line_bytes)

    def __len__(self) -> int:
        """Return how many studies there are."""
        return len(self._ends)

    def __getitem__(self, row: int) -> Indexed:
        """Read a study by its row.

        Raises:
            IndexError: there is no such row.
            LiteError: its line is damaged.
        """
        row = range(len(self))[row]
        start, end = int(self._ends[row - 1, 0]) if row else 0, int(self._ends[row, 0])
        try:
            return Indexed.from_line(self._lines[start:end].tobytes())
        except (ValueError, RecursionError) as error:
            raise _damaged(f"{self.path / STUDIES}: study {row + 1}", str(error)) from error

    def __iter__(self) -> Iterator[Indexed]:
        """Read all studies in their order."""
        return map(self.__getitem__, range(len(self)))

    def require(self, what: What) -> NDArray[np.float32]:
        """Return the vectors to search in: float32 [N, dim].

        Raises:
            LiteError: there are none.
        """
        matrix = self.films if what == "films" else self.reports
        if not len(matrix):
            got = "no study" if not len(self) else f"{len(self)} studies, none with a report"
            msg = f"{self.path}: got an index with {got} · expected at least one to search in"
            raise LiteError(f"{msg} · add some: python -m lite index ARTIFACT SOURCE --out {self.path}")
        return matrix

    def search(self, queries: NDArray[np.float32], what: What, *, top: int) -> list[list[Hit]]:
        """Find the studies whose films, or whose reports, are most similar to each query: the nearest first.

        It is a comparison with every vector, so nothing is missed; equal ones come in the order of the index.

        Args:
            queries: float32 [Q, dim], of length 1.
            what: what the queries are compared with.
            top: how many for each, at least 1; all, where there are fewer.

        Raises:
            LiteError: there is nothing to search in, or the queries are of another length.
        """
        matrix = self.require(what)
        _check(queries, len(queries), self.header.dim, "queries")
        found, similarities = nearest(matrix, queries, top)
        if what == "reports":  # a report's study is the first with so many reports up to it
            found = np.searchsorted(self._ends[:, 1], found + 1)
        return [
            [Hit(similarity=float(similarity), study=self[int(row)]) for row, similarity in zip(*of, strict=True)]
            for of in zip(found, similarities, strict=True)
        ]


class IndexWriter:
    """An index on its way. Enter it to see what is there, and to add to it."""

    def __init__(self, path: Path, *, artifact_id: str, dim: int, artifact: str = "") -> None:
        """Say whose vectors are to be written, and where. Nothing is read or written yet.

        Args:
            path: the folder; it may be there.
            artifact_id: of the embeddings.
            dim: how many numbers one has.
            artifact: where the artifact is, for whoever searches.
        """
        self.path = path
        self.num_reports = 0
        self._header = Header(format_version=FORMAT_VERSION, artifact_id=artifact_id, dim=dim, artifact=artifact)
        self._known: dict[str, int] = {}  # by id: a hash of all else that is known of it
        self._num_bytes = 0
        self._files: dict[str, BinaryIO] = {}
        self._held = contextlib.ExitStack()

    def __len__(self) -> int:
        """Return how many studies there are."""
        return len(self._known)

    @property
    def num_bytes(self) -> int:
        """What all of it takes on the disk."""
        return sum(self._sizes().values())

    def __enter__(self) -> Self:
        """Lock the index, make it where there is none, and cut off what was not finished.

        Raises:
            LiteError: another process writes it; it is another artifact's, or damaged; it cannot be written.
        """
        with contextlib.ExitStack() as held, disk_errors_explained(self.path):
            self._check_folder()
            held.enter_context(locked(self.path / ROWS))
            if not (self.path / HEADER).exists():
                write_whole(self.path / HEADER, f"{json.dumps(asdict(self._header))}\n")
            index = Index(self.path, artifact_id=self._header.artifact_id)
            self._known = {study.id: _rest_of(study.image, study.report) for study in index}
            if len(self._known) < len(index):
                raise _damaged(str(self.path / STUDIES), "a study that comes twice")
            self.num_reports = len(index.reports)
            self._num_bytes = index.num_line_bytes
            for name, size in self._sizes().items():
                (self.path / name).touch()
                self._files[name] = held.enter_context((self.path / name).open("r+b", buffering=0))
                self._files[name].truncate(size)
            self._held = held.pop_all()
        return self

    def _check_folder(self) -> None:
        """Refuse to write into a folder of something else."""
        if not self.path.exists() or (self.path / HEADER).exists():
            return
        if not self.path.is_dir() or any(not file.name.startswith((HEADER, ROWS)) for file in self.path.iterdir()):
            msg = f"{self.path}: got something that is no index · expected an index to go on with, or nothing"
            raise LiteError(f"{msg} · give another --out")

    def _sizes(self) -> dict[str, int]:
        """Return how many bytes of each file are in the index, the one that decides last."""
        row = self._header.dim * _FLOAT.itemsize
        return {
            FILMS: len(self) * row,
            REPORTS: self.num_reports * row,
            STUDIES: self._num_bytes,
            ROWS: len(self) * 2 * _INT.itemsize,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files."""
        self._held.close()

    def has(self, study_id: str, image: str, report: str | None) -> bool:
        """Say whether a study is there already.

        Raises:
            LiteError: there is one of that id with another film or report.
        """
        known = self._known.get(study_id)
        if known is not None and known != _rest_of(image, report):
            msg = f"{self.path}: got another film or report for {study_id} than the one in the index · expected the"
            raise LiteError(f"{msg} same, to go on · give another --out")
        return known is not None

    def add(
        self, studies: Sequence[Indexed], films: NDArray[np.float32], reports: NDArray[np.float32] | None = None
    ) -> None:
        """Add studies: when it returns they are on the disk. Where it fails, the first of them may be: see `len`.

        Args:
            studies: each of an id that is not there yet.
            films: float32 [len(studies), dim], of length 1.
            reports: float32 [number of studies with a report, dim], of length 1, in the studies' order.

        Raises:
            LiteError: vectors or ids are others than that; there is no room.
        """
        with_report = [study for study in studies if study.report is not None]
        reports = np.empty((0, self._header.dim), np.float32) if reports is None else reports
        _check(films, len(studies), self._header.dim, "films")
        _check(reports, len(with_report), self._header.dim, "reports")
        ids = {study.id for study in studies}
        if len(ids) < len(studies) or ids & self._known.keys():
            msg = f"{self.path}: got a study that is in the index already · expected each once · leave it out"
            raise LiteError(msg)
        # ASCII: a file's name may hold half a surrogate pair.
        lines = [f"{json.dumps(study.to_dict(), separators=(',', ':'))}\n".encode() for study in studies]
        ends = np.empty((len(studies), 2), _INT)
        ends[:, 0] = self._num_bytes + np.cumsum([len(line) for line in lines])
        ends[:, 1] = self.num_reports + np.cumsum([study.report is not None for study in studies])
        content = (films.astype(_FLOAT).tobytes(), reports.astype(_FLOAT).tobytes(), b"".join(lines), ends.tobytes())
        if not studies:
            return
        try:
            for (name, size), data in zip(self._sizes().items(), content, strict=True):
                with disk_errors_explained(self.path / name):
                    _write(self._files[name], size, data)
        finally:  # whoever reads sees whole rows, whatever came in between: what is there is there
            count = os.fstat(self._files[ROWS].fileno()).st_size // (2 * _INT.itemsize) - len(self)
            self._known |= {study.id: _rest_of(study.image, study.report) for study in studies[:count]}
            if count:
                self._num_bytes, self.num_reports = map(int, ends[count - 1])


def _write(file: BinaryIO, at: int, data: bytes) -> None:
    """Write behind what is in the index, over what an earlier try has left, and send it to the disk."""
    file.seek(at)
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def _rest_of(image: str, report: str | None) -> int:
    """Hash a film's name, wherever its folder is now, and a report."""
    return hash((os.path.basename(image), report))  # noqa: PTH119


def _read_header(path: Path) -> Header:
    file = path / HEADER
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path}: got no index ({error}) · expected a folder that python -m lite index has written"
        raise LiteError(f"{msg} · check the path") from error
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        msg = f"{file}: got format_version {version!r} · expected {FORMAT_VERSION} · index the studies again"
        raise LiteError(msg)
    try:
        header = from_json(Header, value, where=str(file))
    except ArtifactError as error:
        raise _damaged(str(file), str(error)) from error
    if header.dim < 1:
        raise _damaged(str(file), f"vectors of {header.dim} numbers")
    return header


def _mapped(file: Path, dtype: np.dtype[Any], columns: int, *, rows: int | None = None) -> NDArray[Any]:
    """Map the first rows of a file; None: as many as are whole."""
    try:
        there = file.stat().st_size // (dtype.itemsize * columns)
    except OSError:
        there = 0
    rows = there if rows is None else rows
    if not 0 <= rows <= there:
        raise _damaged(str(file), f"{there} rows where there should be {rows}")
    if not rows:
        return np.empty((0, columns), dtype)
    with disk_errors_explained(file):
        return np.memmap(file, dtype, "r", shape=(rows, columns))


def _read_ends(file: Path) -> NDArray[np.int64]:
    """Map the rows that say where studies end; what a power cut has left as zeros is none."""
    ends: NDArray[np.int64] = _mapped(file, _INT, 2)
    count = len(ends)
    while count and not ends[count - 1, 0]:
        count -= 1
    ends = ends[:count]
    steps = np.diff(ends, axis=0, prepend=np.zeros((1, 2), _INT))
    if (steps < (1, 0)).any() or (steps[:, 1] > 1).any():
        raise _damaged(str(file), "rows out of their order")
    return ends


def _check(vectors: NDArray[np.float32], count: int, dim: int, what: str) -> None:
    """Refuse what are not so many vectors of length 1."""
    if vectors.shape != (count, dim):
        msg = f"got {what} of shape {list(vectors.shape)} · expected [{count}, {dim}]"
        raise LiteError(f"{msg} · embed them with the artifact that the index is of")
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) <= _LENGTH_TOLERANCE).all():
        worst = lengths[~(np.abs(lengths - 1) <= _LENGTH_TOLERANCE)][0]
        msg = f"got a vector of length {worst:.4g} among {what} · expected 1 · scale it: the towers give it so"
        raise LiteError(msg)


def _damaged(where: str, got: str) -> LiteError:
    return LiteError(f"{where}: got a damaged index ({got}) · expected it whole · index the studies again elsewhere")
