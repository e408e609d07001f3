"""Files and folders that exist whole or not at all, also after a power cut.

A file is written under another name, its bytes are sent to the disk, and only then it gets its name. A folder is
written beside its place and renamed when it is complete. What had the name before keeps its bytes until then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import secrets
import shutil
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_LONGEST_NAME: Final = 200  # in bytes: file systems take 255, and a partial file has a longer name


@contextlib.contextmanager
def disk_errors_explained(out: Path, error_type: type[LiteError] = LiteError) -> Iterator[None]:
    """Turn what the system says of files into an error of ours.

    Args:
        out: what is being written, for an error that does not know its file.
        error_type: the error of ours.

    Raises:
        LiteError: the disk is full, or a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            msg = (
                f"{where}: got a full disk · expected room to write {out.name} · free some space, or name another disk"
            )
        else:
            msg = (
                f"{where}: got an error from the system ({error.strerror or error}) · expected a place that can be "
                "read and written · check the disk and its permissions, or name another place"
            )
        raise error_type(msg) from error


# -- Files -----------------------------------------------------------------------------------------------------------


def partial_name(file: Path) -> Path:
    """Return the name a file has while it is written."""
    return file.with_name(f"{file.name}.partial")


def give_name(partial: Path, file: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    _fsync(partial)
    partial.replace(file)
    _fsync(file.parent)


@contextlib.contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield the path to write to. The file gets its name when the block ends well, and leaves nothing otherwise.

    Raises:
        LiteError: it cannot be written.
    """
    partial = partial_name(file)
    with disk_errors_explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            give_name(partial, file)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that counts is the one on its way
                partial.unlink(missing_ok=True)
            raise


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file; one that is there is replaced when the new one is complete.

    Raises:
        LiteError: it cannot be written.
    """
    # Texts come from files: half a surrogate pair is no reason to write nothing.
    data = content.encode(errors="xmlcharrefreplace") if isinstance(content, str) else content
    with whole_file(file) as partial:
        partial.write_bytes(data)


def check_writable(*files: Path | None) -> None:
    """Refuse files that cannot be written, before the work that they are for; None is one that is not wanted.

    Raises:
        LiteError: a folder has its name, or nothing can be written beside it.
    """
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise LiteError(f"{file}: got a folder · expected a file to write · name a file in it")
        partial = partial_name(file)
        with disk_errors_explained(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            partial.unlink()


def safe_name(text: str, suffix: str) -> str:
    """Return a file name for any text, another one for each: no folder, nothing hidden, nothing that a system reserves.

    Letters and digits stay as they are, of any script; what is not safe is written %2F. A long one is cut, and ends in
    a hash.
    """
    name = "".join(
        char if char.isalnum() or char in " ._-+=@," else quote(char, safe="", errors="surrogatepass") for char in text
    )
    name = f"%2E{name[1:]}" if name[:1] in (".", "") else name
    if len(f"{name}{suffix}".encode()) > _LONGEST_NAME:
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
        name = f"{name.encode()[: _LONGEST_NAME - len(suffix) - 17].decode(errors='ignore')}-{digest}"
    return f"{name}{suffix}"


def link_or_copy(file: Path, target: Path) -> None:
    """Put a file at another place, too: as a hard link, or a copy where there are none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file.resolve(), target)  # of a symbolic link what it leads to: from elsewhere it may lead nowhere
    except OSError:
        shutil.copyfile(file, target)


# -- Folders ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, kw_only=True)
class StagedFolder:
    """A folder being written. Nothing is at `out` until `finish` returns."""

    out: Path
    path: Path  # write the files here
    replace: bool
    finished: bool = False

    def finish(self) -> None:
        """Send all files to the disk, and move the folder to its place."""
        for entry in [*self.path.rglob("*"), self.path]:
            _fsync(entry)
        self._move()
        _fsync(self.out.parent)

    def _move(self) -> None:
        """Rename the folder to `out`; when that fails or is interrupted, what was at `out` is there again."""
        replaced = self.path.with_name(f"{self.path.name}.replaced")
        try:
            if self.replace and self.out.exists():
                self.out.rename(replaced)
            self.path.rename(self.out)
            self.finished = True
        finally:
            # The folders tell how far it went, wherever an interrupt came.
            if not self.path.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            elif replaced.exists():
                replaced.rename(self.out)


@contextlib.contextmanager
def staged_folder(
    out: Path, *, replace: bool = False, error_type: type[LiteError] = LiteError
) -> Iterator[StagedFolder]:
    """Yield a temporary folder beside `out`; leaving the block without `finish`, by any way, removes it.

    Args:
        out: where the folder will be.
        replace: put it in the place of what is there, at the last moment. Whether that may go is for the caller to
            check.
        error_type: the error of ours for what the system refuses.

    Raises:
        LiteError: something is there and `replace` is not given, or the folder cannot be written.
    """
    if not replace and os.path.lexists(out):
        raise error_type(f"{out}: got a path that exists · expected a new one · choose another place, or remove it")
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    with disk_errors_explained(out, error_type):
        folder.mkdir(parents=True)
        staged = StagedFolder(out=out, path=folder, replace=replace)
        try:
            yield staged
        finally:
            if not staged.finished:
                shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folder, and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
