"""A file of results that is written line by line, and gone on with where it was.

A study is done when its line is on the disk, whatever happens to those behind it. A line that was cut off, by a kill or
by a disk that was full, is taken away, and its study is done again; one that failed is tried again. Settings do not
mix: a file holds what one artifact does, computed in one way. One process writes it at a time.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from lite.errors import LiteError
from lite.files import disk_errors_explained, whole_file
from lite.studies.lock import locked
from lite.studies.results import Findings, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import BinaryIO, Self

    from lite.studies.study import Study

SETTINGS: Final = (
    "engine",
    "device",
    "dtype",
    "cache_dtype",
    "prompt_weights",
    "provider",
    "num_image_tokens",
    "image_method",
)
"""What all results in a file share beside artifact and request: names of fields of `Findings`."""
_BEGINNING: Final = b'{"id": '


class Journal:
    """Results on their way into a file. Enter it to read what is there, and to write."""

    def __init__(
        self,
        path: Path,
        studies: Iterable[Study] = (),
        *,
        artifact_id: str,
        request: dict[str, Any],
        mix: bool = False,
        kept: Callable[[Result], None] = lambda _: None,
    ) -> None:
        """Say what is to be written. Nothing is read or written yet.

        Args:
            path: the file; it may be there.
            studies: those that the source has: a result of one of them is of the same film and reason.
            artifact_id: what drafts.
            request: what is asked for beside the studies.
            mix: let results of other artifacts and settings stay in the file; they count as not done.
            kept: is told of each result of these studies that is there, for what is made of lines.
        """
        self.path = path
        self.done: set[str] = set()  # ids of these studies; with `mix` it is known once `expect` has been told
        self.num_others = 0  # results of other studies, or by another artifact or settings
        self._asked = {study.id: (study.reason, _name_of(study)) for study in studies}
        self._artifact_id = artifact_id
        self._request = request
        self._mix = mix
        self._kept = kept
        self._by_settings: dict[tuple[Any, ...], set[str]] = {}  # ids of those that are done
        self._file: BinaryIO | None = None
        self._held = contextlib.ExitStack()
        self._syncing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lite-sync")
        self._synced: Future[None] = self._syncing.submit(lambda: None)

    # -- Read ---------------------------------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Read what is there; say whether there are lines that are not to be kept."""
        has_more = False
        for number, line, whole in _lines(self.path):
            where = f"{self.path}:{number}"
            if not whole:
                if not line.strip(b"\0").startswith(_BEGINNING[: len(line.strip(b"\0"))]):
                    raise self._refused(f"{where}: got a line of something else", "results of this command")
                has_more = True
                continue
            result = Result.from_json(_text(line, where), where=where)
            if result.error is not None:
                has_more = True
            elif self._is_ours(result, where):
                settings = tuple(getattr(result.findings, name) for name in SETTINGS)
                self._by_settings.setdefault(settings, set()).add(result.study.id)
                self._kept(result)
            else:
                self.num_others += 1
        if len(self._by_settings) > 1 and not self._mix:
            got, expected = (_shown(settings) for settings in list(self._by_settings)[:2])
            raise self._refused(f"{self.path}: got results with {got}, and others with {expected}", "one of them")
        if len(self._by_settings) == 1 and not self._mix:
            (self.done,) = self._by_settings.values()
        return has_more

    def _is_ours(self, result: Result, where: str) -> bool:
        """Say whether it is a result of one of the studies, by this artifact and for this request."""
        if result.findings is None:
            raise self._refused(f"{where}: got a result without its settings", "results of this command")
        asked = self._asked.get(result.study.id)
        if asked is not None and asked != (result.study.reason, _name_of(result.study)):
            raise self._refused(f"{where}: got another film or reason for {result.study.id}", "results of this source")
        if result.findings.artifact_id != self._artifact_id:
            got, expected = f"the artifact {result.findings.artifact_id}", self._artifact_id
        elif result.request != self._request:
            got, expected = str(result.request), str(self._request)
        else:
            return asked is not None or not self._asked
        if not self._mix:
            raise self._refused(f"{where}: got results of {got}", expected)
        return False

    def _refused(self, got: str, expected: str) -> LiteError:
        return LiteError(f"{got} · expected {expected}, to go on · give another --out, or move this file away")

    # -- Write --------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Lock the file, read what is there, and open it without the lines that are not to be kept.

        Raises:
            LiteError: another process writes it, or it cannot be read or written, or there is something else in it, or
                results of other settings.
        """
        with contextlib.ExitStack() as held:
            held.enter_context(locked(self.path))
            if self.path.is_file() and self._read():
                self._rewrite()
            with disk_errors_explained(self.path):
                self._file = held.enter_context(self.path.open("ab", buffering=0))
            self._held = held.pop_all()
        return self

    def _rewrite(self) -> None:
        """Write the file anew without lines that are cut off or say that a study failed."""
        with whole_file(self.path) as partial, partial.open("wb") as file:
            for _, line, whole in _lines(self.path):
                if whole and Result.from_json(_text(line, ""), where="").error is None:
                    file.write(line + b"\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file; take it away if nothing was written."""
        with contextlib.suppress(OSError, LiteError):  # what could not be written has been said
            self.sync(wait=True)
        self._syncing.shutdown()
        with contextlib.suppress(OSError):
            if self.path.is_file() and not self.path.stat().st_size:
                self.path.unlink()
        self._held.close()

    def expect(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings than those of the results that are there.

        Args:
            settings: by the names of SETTINGS.

        Raises:
            LiteError: they are others, and do not mix.
        """
        key = tuple(settings[name] for name in SETTINGS)
        if self.done is self._by_settings.get(key):
            return
        if self._by_settings and key not in self._by_settings and not self._mix:
            got = _shown(next(iter(self._by_settings)))
            raise self._refused(f"{self.path}: got results with {got}", _shown(key))
        self.done = self._by_settings.setdefault(key, set())
        self.num_others += sum(len(done) for other, done in self._by_settings.items() if other != key)

    def add(self, study: Study, result: Findings | LiteError) -> None:
        """Write the result of a study.

        Raises:
            LiteError: there is no room for it; what was written before it is whole.
        """
        if self._file is None:
            msg = "got a result for a file that is not open · expected it in a with block · enter the journal first"
            raise LiteError(msg)
        line = f"{Result.of(study, result, request=self._request).to_json()}\n".encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            if (written := self._file.write(line)) != len(line):
                self._file.write(line[written:])  # which says why
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            msg = f"{self.path}: got {error.strerror} · expected room for a line · make some, and start again: the"
            raise LiteError(f"{msg} {len(self.done)} results before it are kept") from error
        if not isinstance(result, LiteError):
            self.done.add(study.id)

    def sync(self, *, wait: bool = False) -> None:
        """Send what was written to the disk, in a thread: studies go on meanwhile.

        Args:
            wait: until it is there; otherwise only for what an earlier call has sent.

        Raises:
            LiteError: the system refuses.
        """
        with disk_errors_explained(self.path):
            self._synced.result()
            if self._file is not None:
                self._synced = self._syncing.submit(os.fsync, self._file.fileno())
            if wait:
                self._synced.result()


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield number, content and wholeness of each line; the last one may be cut off."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip(b"\n"), line.endswith(b"\n")
    except OSError as error:
        msg = f"{path}: got a file that cannot be read ({error}) · expected results · name another one"
        raise LiteError(msg) from error


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{where}: got a line that is no text ({error}) · expected results · name another file"
        raise LiteError(msg) from error


def _name_of(study: Study) -> str | None:
    """Return what its film's file is called, wherever the folder is now."""
    return os.path.basename(study.image) if isinstance(study.image, str | os.PathLike) else None  # noqa: PTH119


def _shown(settings: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(SETTINGS, settings, strict=True))
