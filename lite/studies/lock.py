"""A lock on a file of results: one run writes it at a time, and a run that was killed leaves it free.

The system holds the lock for as long as the process lives, so a lock file that was left behind locks nothing. What is
written in it is for the message alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from lite.errors import LiteError
from lite.files import disk_errors_explained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of a file: FILE.lock beside it, which is there as long as it is held.

    Raises:
        LiteError: another process holds it; its number and machine are named. Or the folder cannot be written.
    """
    lock = file.with_name(f"{file.name}.lock")
    with disk_errors_explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(lock, file)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: whoever waits finds that it is another file, and asks again
        os.close(descriptor)


def _take(lock: Path, file: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
                msg = f"{file}: got a file that {holder} is writing · expected one that is free · wait until it is done"
                raise LiteError(f"{msg}, or give another --out")
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was taken away in between


def _lock(descriptor: int) -> bool:
    """Lock an open file; say whether nobody else holds it."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
