"""Files that exist whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite.errors import LiteError

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; one that is there is replaced when the new one is complete.

    Raises:
        LiteError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Texts come from files: half a surrogate pair is no reason to write nothing.
        whole = content if isinstance(content, bytes) else content.encode("utf-8", errors="xmlcharrefreplace")
        partial.write_bytes(whole)
        partial.replace(path)
    except OSError as error:
        msg = f"{path}: got {error.strerror} · expected a file that can be written · name another one"
        raise LiteError(msg) from error
    finally:
        partial.unlink(missing_ok=True)
