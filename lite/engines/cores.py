"""How many CPU cores this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_CGROUP_CPU_MAX: Final = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Return the number of cores for compute threads, at least 1.

    It is the smallest of the cores the process is bound to, the container's CPU quota, and OMP_NUM_THREADS where that
    is set. Libraries left to themselves often count the cores of the whole host, and many threads that share few cores
    are slower than few threads.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [bound, _quota(_CGROUP_CPU_MAX), os.environ.get("OMP_NUM_THREADS", "")]
    return max(1, min(int(limit) for limit in limits if str(limit).isdecimal() and int(limit) > 0))


def _quota(file: Path) -> str | int:
    """Read a cgroup v2 quota, "max 100000" or "<microseconds> <period>"; an empty string is no quota."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return ""
    return math.ceil(int(quota) / int(period)) if quota.isdecimal() and period.isdecimal() else ""
