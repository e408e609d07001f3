"""What a process has taken, in bytes, and giving back what it does not need."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Final

_M_MMAP_THRESHOLD: Final = -3  # of glibc's malloc.h
_MADV_COLLAPSE: Final = 25  # of Linux 6.1
_LARGE_PAGE: Final = 2 << 20
_PRIVATE_MEMORY: Final = re.compile(r"^(\w+)-(\w+) rw-p 00000000 00:00 0 *(?:\[heap\])?$", re.MULTILINE)
"""A line of /proc/self/maps: memory that no file is behind, and no stack."""
_CGROUP_MEMORY_MAX: Final = Path("/sys/fs/cgroup/memory.max")


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


def release_free_memory() -> None:
    """Give memory that the C library keeps for later back to the system, where it is glibc.

    Behind loading this is up to 190 MB at 7B widths, of what weights were read and converted in (November 2026).
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def map_large_blocks() -> None:
    """Have each block from 64 KiB on pages of its own, which go back to the system with it, where the library is glibc.

    Films and requests of many threads otherwise leave holes in the heap: a server held 10 % more after 2,000 requests
    than after 100, and 1 % so (November 2026).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 64 * 1024)


def use_large_pages() -> None:
    """Put what the process holds by now on pages of 2 MiB, where Linux can: a copy, a page at a time.

    A token reads all weights, and with pages of 4 KiB the processor looks up where they lie as often: at 7B widths in 4
    bits a token took 1.24 times as long (ONNX Runtime 1.32, 2 cores with AVX-512, December 2026). By the usual setting,
    "madvise", whoever asks gets large ones, and neither ONNX Runtime nor malloc asks. It takes 2.5 s a GB: some studies
    of a 7B model's 4 bits make up for it.
    """
    if sys.platform != "linux":
        return
    try:
        maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    for begin, end in _PRIVATE_MEMORY.findall(maps):
        _collapse(-(-int(begin, 16) // _LARGE_PAGE), int(end, 16) // _LARGE_PAGE)


def _collapse(first: int, end: int) -> None:
    """Make large pages of some places of theirs; Linux ends at one without memory, and older ones refuse all."""
    place, size = ctypes.c_void_p(first * _LARGE_PAGE), ctypes.c_size_t((end - first) * _LARGE_PAGE)
    if first < end and ctypes.CDLL(None).madvise(place, size, _MADV_COLLAPSE) and end - first > 1:
        middle = (first + end) // 2
        _collapse(first, middle)
        _collapse(middle, end)


def memory_of_machine() -> int | None:
    """Return the memory that processes here can have together: the machine's, or its container's; None if unknown."""
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(_CGROUP_MEMORY_MAX.read_text(encoding="ascii")))
    return min((limit for limit in limits if limit > 0), default=None)


def _proc_status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
