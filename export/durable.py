"""Files that exist whole or not at all, also after a power cut.

A file is written under another name, its bytes are sent to the disk, and only then it gets its name. What had that name
before keeps its bytes for whoever holds a hard link to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from lite.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def partial_name(file: Path) -> Path:
    """Return the name a file has while it is written."""
    return file.with_name(f"{file.name}.partial")


def write_whole(file: Path, content: bytes) -> None:
    """Write a file."""
    partial = partial_name(file)
    partial.write_bytes(content)
    give_name(partial, file)


def give_name(partial: Path, file: Path) -> None:
    """Give a finished file its name, once its bytes are on the disk."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def disk_errors_explained(out: Path) -> Iterator[None]:
    """Turn what the system says of files into an error of ours.

    Args:
        out: what is being written, for an error that does not know its file.

    Raises:
        ArtifactError: the disk is full, or a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        # A write that finds no room does not know its file's name.
        where = error.filename or out
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            msg = (
                f"{where}: got a full disk · expected room to write the artifact · "
                "free some space, or choose an --out on another disk"
            )
        else:
            msg = (
                f"{where}: got an error from the system ({error.strerror or error}) · expected a file that can be read "
                "or written · check the disk and its permissions"
            )
        raise ArtifactError(msg) from error
