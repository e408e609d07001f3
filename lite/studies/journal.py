"""A file of results that is written line by line, and gone on with where it was.

A line is there when its study is done, whatever happens to those behind it. Studies that failed are tried again the
next time, and a line that was cut off by a crash is written again. Settings do not mix: a file holds what one artifact
does, computed in one way.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.files import write_whole
from lite.studies.results import Findings, Result

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self, TextIO

    from lite.studies.study import Study

SETTINGS: Final = ("artifact_id", "engine", "device", "dtype", "cache_dtype", "provider")
"""What all results in a file share: names of fields of `Findings`."""
_BEGINNING: Final = '{"id": '


class Journal:
    """Results on their way into a file."""

    def __init__(self, path: Path, studies: Sequence[Study], *, artifact_id: str, request: dict[str, Any]) -> None:
        """Read what is there already. Nothing is written yet.

        Args:
            path: the file; it may be there.
            studies: all that the file may hold.
            artifact_id: what drafts.
            request: what is asked for beside the studies.

        Raises:
            LiteError: there is something else, or results of other studies or settings.
        """
        self.path = path
        self.done: dict[str, Result] = {}
        self._request = request
        self._artifact_id = artifact_id
        self._file: TextIO | None = None
        self._has_more = False  # lines that are not to be kept
        if path.is_file():
            self._read({study.id: study for study in studies})

    def _read(self, studies: dict[str, Study]) -> None:
        try:
            *lines, rest = self.path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            msg = f"{self.path}: got a file that cannot be read ({error}) · expected results · name another one"
            raise LiteError(msg) from error
        if rest and not rest.startswith(_BEGINNING[: len(rest)]):
            lines.append(rest)  # no line that was cut off, so nothing of ours
        self._has_more = bool(rest)
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            result = Result.from_json(line, where=where)
            if result.error is not None:
                self._has_more = True
                continue
            self._check(result, studies.get(result.study.id), where)
            self.done[result.study.id] = result

    def _check(self, result: Result, study: Study | None, where: str) -> None:
        if result.findings is None:
            raise self._refused(f"{where}: got a result without its settings", "results of this command")
        if study is None or study.reason != result.study.reason:
            name, what = result.study.id, "another reason for" if study else "a study that the list does not have,"
            raise self._refused(f"{where}: got {what} {name}", "results of this list")
        if result.request != self._request:
            raise self._refused(f"{where}: got results of {result.request}", str(self._request))
        self._check_settings(result, {"artifact_id": self._artifact_id})

    def _check_settings(self, result: Result, expected: dict[str, Any]) -> None:
        for name, value in expected.items():
            if (got := getattr(result.findings, name)) != value:
                raise self._refused(f"{self.path}: got results with {name} {got}", str(value))

    def _refused(self, got: str, expected: str) -> LiteError:
        return LiteError(f"{got} · expected {expected}, to go on · give another --out, or move this file away")

    def __enter__(self) -> Self:
        """Open the file, without the lines that are not to be kept."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._has_more:
                write_whole(self.path, "".join(f"{result.to_json()}\n" for result in self.done.values()))
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            msg = f"{self.path}: got {error.strerror} · expected a file that can be written · name another one"
            raise LiteError(msg) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file; take it away if nothing was written."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been said
                self._file.close()
            if self.path.is_file() and not self.path.stat().st_size:
                self.path.unlink()

    def add(self, study: Study, result: Findings | LiteError) -> None:
        """Write the result of a study.

        Raises:
            LiteError: it was made with other settings than those before, or there is no room for it.
        """
        if self._file is None:
            msg = "got a result for a file that is not open · expected it in a with block · enter the journal first"
            raise LiteError(msg)
        line = Result.of(study, result, request=self._request)
        if line.findings is not None:
            first = next(iter(self.done.values()), line).findings
            self._check_settings(line, {name: getattr(first, name) for name in SETTINGS})
        try:
            self._file.write(f"{line.to_json()}\n")
            self._file.flush()
        except OSError as error:
            msg = f"{self.path}: got {error.strerror} · expected room for a line · make some, and start again: the"
            raise LiteError(f"{msg} {len(self.done)} results before it are kept") from error
        if line.findings is not None:
            self.done[study.id] = line
