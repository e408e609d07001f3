"""Files that exist whole or not at all, also after a power cut.

A file is written under another name, its bytes are sent to the disk, and only then it gets its name. What had that name
before keeps its bytes for whoever holds a hard link to it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
