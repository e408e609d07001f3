"""What a process has taken, in bytes."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


# -- What a process has taken ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The most memory that the process has held since it began, in bytes."""

    rss_bytes: int | None  # resident; None on Windows, where the standard library does not tell
    vram_bytes: int | None  # of torch's allocator; None without a GPU


def peak_rss_bytes() -> int | None:
    """Return the most memory the process has had resident since it began; None where that cannot be told (Windows)."""
    if sys.platform == "win32":
        return None
    # Not getrusage: what that tells a child process is never less than its parent's peak when it was started.
    if (peak := _proc_status("VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def rss_bytes() -> int | None:
    """Return the memory the process has resident now; None where /proc does not tell."""
    return _proc_status("VmRSS")


def _proc_status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
