"""What figures were taken on: the machine, the packages, how fast its memory reads, the energy its GPU has used.

None of this needs torch, NVML or a driver to be there: what cannot be asked is left out, or `Missing` with the reason.
torch is asked only where it runs already, as importing it would change the very memory that is being measured.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from lite.engines.cores import available_cores
from lite.errors import BackendUnavailable, MemoryBudgetError
from lite.eval.figures import Missing
from lite.memory.process import memory_of_machine

_ROOT: Final = Path(__file__).resolve().parent.parent.parent
_PACKAGES: Final = ("torch", "onnxruntime", "onnxruntime-gpu", "bitsandbytes", "numpy", "llava-rad-lite")
_CPU_DEVICES: Final = Path("/sys/devices/system/cpu")
_CPU_READ_BYTES: Final = 512 << 20
_CPU_ROUNDS: Final = 5
_GPU_READ_BYTES: Final = 2 << 30
_GPU_ROUNDS: Final = 10


def machine() -> str:
    """Say what this runs on: cores, processor, memory, GPU; no name of the machine."""
    named = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    cores = available_cores()
    of_cores = f"{cores} core{'' if cores == 1 else 's'} of {processor}"
    return ", ".join([of_cores, f"{(memory_of_machine() or 0) / 1e9:.0f} GB", platform.system(), *_gpus()])


def versions() -> dict[str, str]:
    """Return what decides the figures: packages, NVIDIA's driver, and this project's commit if it is a checkout."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if drivers := _nvidia_smi("driver_version"):
        found["NVIDIA driver"] = drivers[0]
    # An installed copy may lie inside somebody else's checkout, whose commit says nothing here.
    if (_ROOT / ".git").exists():
        # Without the locks that git would take to note what it saw.
        environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
            done = subprocess.run(git, cwd=_ROOT, env=environment, capture_output=True, encoding="utf-8", check=True)
            found["commit"] = done.stdout.strip()
    return found


def _gpus() -> list[str]:
    """Name the GPUs; nothing where nobody can be asked."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return [torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"]
    return _nvidia_smi("name")


def _nvidia_smi(field: str) -> list[str]:
    """Ask NVIDIA's driver something of each GPU; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# -- Memory bandwidth ------------------------------------------------------------------------------------------------


def streaming_read_bandwidth(device: str) -> float:
    """Measure how fast memory is read from end to end, in bytes per second: the best of several rounds.

    On a CPU all `available_cores` read, each its part of an array some times larger than the caches. The array (512 MiB
    or more on a CPU, 2 GiB on a GPU, never above a quarter of what is free) is given back, but counts in the process's
    peak: read that first.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        BackendUnavailable: another device, or a GPU without torch.
        MemoryBudgetError: so little memory is free that the caches would be measured.
    """
    if device == "cpu":
        return _cpu_read_bandwidth()
    if device.startswith("cuda"):
        return _gpu_read_bandwidth(device)
    msg = f"got the device {device!r} · expected cpu, cuda or cuda:N · its memory bandwidth cannot be measured"
    raise BackendUnavailable(msg)


def _cpu_read_bandwidth() -> float:
    caches, free = _last_level_cache_bytes(), _available_memory()
    size = min(max(_CPU_READ_BYTES, 4 * caches), free // 4)
    if size < 2 * caches:
        msg = (
            f"got {free / 2**30:.1f} GiB of free memory · expected 8 times the last-level caches "
            f"({caches / 2**20:.0f} MiB) to measure what memory delivers · close other programs"
        )
        raise MemoryBudgetError(msg)
    parts = np.array_split(np.empty(size // 8, dtype=np.int64), available_cores())
    nbytes = sum(part.nbytes for part in parts)
    seconds = []
    with ThreadPoolExecutor(len(parts)) as pool:
        # Pages that nobody wrote to are one and the same page of zeros, and that stays in the cache.
        list(pool.map(lambda part: part.fill(1), parts))
        for _ in range(_CPU_ROUNDS):
            started = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            seconds.append(time.perf_counter() - started)
    return nbytes / min(seconds)


def _gpu_read_bandwidth(device: str) -> float:
    try:
        import torch
    except ImportError as error:
        msg = (
            f'got no torch ({error}) · expected it to measure a GPU\'s bandwidth · pip install "llava-rad-lite[torch]"'
        )
        raise BackendUnavailable(msg) from error
    free, _ = torch.cuda.mem_get_info(device)
    values = torch.ones(min(_GPU_READ_BYTES, free // 4) // 4, dtype=torch.float32, device=device)
    nbytes = values.nbytes
    # torch's events have no types.
    new_event: Any = torch.cuda.Event
    with torch.cuda.device(device):
        rounds = [(new_event(enable_timing=True), new_event(enable_timing=True)) for _ in range(_GPU_ROUNDS)]
        # All are queued before any is waited for, so that the GPU never waits for Python between two events.
        for start, end in rounds:
            start.record()
            values.sum()
            end.record()
        torch.cuda.synchronize()
    del values
    torch.cuda.empty_cache()
    milliseconds: float = min(start.elapsed_time(end) for start, end in rounds)
    return nbytes / (milliseconds / 1e3)


def _last_level_cache_bytes() -> int:
    """Return the size of all last-level caches together, 0 where the system does not say."""
    caches: dict[str, int] = {}
    for cpu in _CPU_DEVICES.glob("cpu[0-9]*"):
        levels = sorted((cpu / "cache").glob("index*"), key=lambda index: _text(index / "level"))
        size = _text(levels[-1] / "size").strip() if levels else ""
        if size.endswith("K") and size[:-1].isdecimal():
            # Cores that share a cache all list it.
            caches[_text(levels[-1] / "shared_cpu_list")] = int(size[:-1]) << 10
    return sum(caches.values())


def _available_memory() -> int:
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(available[1]) << 10 if available else memory_of_machine() or 0


# -- Energy ----------------------------------------------------------------------------------------------------------


def energy_meter(device: str) -> Callable[[], float] | Missing:
    """Find the energy counter of the GPU that torch calls `device`; say why if there is none.

    It counts the whole board, whoever uses it, and moves in steps of up to a tenth of a second: read it around a whole
    study or several, when the GPU has finished.

    Returns:
        A function that returns the joules used since the driver was loaded, and raises BackendUnavailable when the card
        no longer answers.
    """
    if not device.startswith("cuda"):
        return Missing(why="no GPU", todo="NVML counts the energy of NVIDIA GPUs, not that of a CPU.")
    try:
        # By its name as text: it is no dependency, and mypy need not find it.
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return Missing(why="not installed", todo="Energy is read through NVML: pip install nvidia-ml-py")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return Missing(why="no NVML", todo=f"NVML does not start ({error}): install NVIDIA's driver, or repair it.")
    import torch

    properties = torch.cuda.get_device_properties(device)

    def read() -> float:
        # Not by number: torch counts only what CUDA_VISIBLE_DEVICES leaves, and perhaps in another order.
        try:
            card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
            millijoules: int = nvml.nvmlDeviceGetTotalEnergyConsumption(card)
        except nvml.NVMLError as error:
            msg = f"got no energy from NVML ({error}) · expected millijoules · check the GPU with nvidia-smi"
            raise BackendUnavailable(msg) from error
        return millijoules / 1e3

    try:
        read()
    except BackendUnavailable as error:
        todo = f"NVML does not count the energy of this {properties.name} ({error}); of Volta and later cards it does."
        return Missing(why="not supported", todo=todo)
    return read
