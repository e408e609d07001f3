"""What figures were taken on. There is no GPU here: torch's CUDA calls and NVML's bindings are stood in for."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT, run_python

from lite.bench import machine as module
from lite.bench.machine import energy_meter, machine, streaming_read_bandwidth, versions
from lite.errors import BackendUnavailable, MemoryBudgetError
from lite.eval.figures import Missing

UUID = "5d1a2c3e-0000-4444-8888-123456789abc"


class FakeNVMLError(Exception):
    pass


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> ModuleType:
    """Put bindings in place that know two cards, the second of which is torch's, with a counter at 5 J."""
    nvml: Any = ModuleType("pynvml")
    cards = {"GPU-other": 0, f"GPU-{UUID}": 1}

    def handle(uuid: str) -> int:
        if uuid not in cards:
            raise FakeNVMLError("Not Found")
        return cards[uuid]

    nvml.NVMLError = FakeNVMLError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = handle
    nvml.nvmlDeviceGetTotalEnergyConsumption = [999_000, 5_000].__getitem__
    for name, value in changes.items():
        setattr(nvml, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def fake_gpu(monkeypatch: pytest.MonkeyPatch, uuid: str = UUID) -> None:
    properties = SimpleNamespace(name="Tesla V100", uuid=uuid)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def failing(*arguments: object) -> Any:
    raise FakeNVMLError("Not Supported")


# -- Machine and versions --------------------------------------------------------------------------------------------


def fake_driver(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    """Put a program in nvidia-smi's place."""
    whole = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        if command[0] != "nvidia-smi":
            return whole(command, **options)
        assert command[1] in ("--query-gpu=name", "--query-gpu=driver_version")
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(subprocess, "run", run)


def test_nothing_has_to_be_there_to_name_a_machine() -> None:
    """No torch, no NVML, no driver, no git: what cannot be asked is left out."""
    code = """
import platform, sys
sys.modules["pynvml"] = None
import lite.bench.cards, lite.bench.report, lite.bench.roofline, lite.bench.run, lite.bench.table
from lite.bench.machine import machine, versions
print(machine())
heavy = {"jinja2", "matplotlib", "torch"} & {*sys.modules}
print(machine().endswith(platform.system()), "Python" in versions(), *heavy)
"""
    first, second = run_python("-c", code, PATH="").splitlines()
    assert " of " in first
    assert second == "True True"


def test_a_gpu_is_named_by_torch_and_without_it_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(monkeypatch, "Tesla T4\nTesla V100\n")
    fake_gpu(monkeypatch)
    assert machine().endswith(", Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine().endswith(", no GPU")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine().endswith(", Tesla T4, Tesla V100")
    for failure in (FileNotFoundError("nvidia-smi"), subprocess.CalledProcessError(9, "nvidia-smi")):
        fake_driver(monkeypatch, failure)
        assert machine().endswith(f", {platform.system()}")


def test_versions_are_those_of_the_packages_and_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_driver(monkeypatch, "570.00\n570.00\n")
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert found["NVIDIA driver"] == "570.00"
    assert "onnxruntime-gpu" not in found or "onnxruntime" not in found


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_this_projects_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert head.startswith(versions()["commit"].removesuffix("-dirty"))
    # As when it is installed into an environment inside somebody else's checkout.
    monkeypatch.setattr(module, "_ROOT", ROOT / "lite")
    assert "commit" not in versions()


# -- Bandwidth -------------------------------------------------------------------------------------------------------


def test_bandwidth_is_bytes_read_by_all_cores_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def reduce(part: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        # Memory that was never written is one page of zeros.
        assert (part == 1).all()
        read.append(part.nbytes)
        return 1

    ticks = iter([0, 9, 10, 14, 20, 22, 30, 35, 40, 47])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(np, "bitwise_or", SimpleNamespace(reduce=reduce))
    monkeypatch.setattr(module, "_CPU_READ_BYTES", 3 << 20)
    monkeypatch.setattr(module, "_last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(module, "available_cores", lambda: 3)
    # Four times the caches are more than the least.
    assert streaming_read_bandwidth("cpu") == pytest.approx((4 << 20) / 2)
    assert len(read) == 3 * 5
    assert sum(read) == 5 * (4 << 20)


def test_it_takes_a_quarter_of_the_free_memory_and_refuses_to_measure_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(module, "_last_level_cache_bytes", lambda: 1 << 20)
    monkeypatch.setattr(module, "_available_memory", lambda: 12 << 20)
    assert streaming_read_bandwidth("cpu") == 3 << 20
    monkeypatch.setattr(module, "_available_memory", lambda: 7 << 20)
    with pytest.raises(MemoryBudgetError, match=r"got 0.0 GiB of free .*8 times the last-level caches \(1 MiB\)"):
        streaming_read_bandwidth("cpu")


def test_shared_caches_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, size) in enumerate((("1", "32K"), ("1", "32K"), ("2", "512K"), ("3", "4096K"))):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{shared if level == '3' else cpu}\n")
    (tmp_path / "cpufreq").mkdir()
    monkeypatch.setattr(module, "_CPU_DEVICES", tmp_path)
    assert module._last_level_cache_bytes() == 2 * (4096 << 10)
    monkeypatch.setattr(module, "_CPU_DEVICES", tmp_path / "none")
    assert module._last_level_cache_bytes() == 0


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's calls stood in for: which bytes are divided by which time."""
    done: list[str] = []

    class Event:
        made = 0

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            assert end.number == self.number + 1
            # The last is the fastest, at 0.5 ms.
            return 0.5 if end.number == 20 else 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (64 << 20, 80 << 20))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty_cache"))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, *, dtype, **_: ones(count, dtype=dtype))
    assert streaming_read_bandwidth("cuda:0") == pytest.approx((16 << 20) / 0.5e-3)
    assert done == ["record"] * 20 + ["synchronize", "empty_cache"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_bandwidth_of_a_gpu() -> None:
    assert 5e10 < streaming_read_bandwidth("cuda") < 1e14


def test_devices_that_cannot_be_measured_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="got the device 'mps' · expected cpu, cuda or cuda:N"):
        streaming_read_bandwidth("mps")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailable, match=r"got no torch .* expected it to measure a GPU's bandwidth"):
        streaming_read_bandwidth("cuda")


# -- Energy ----------------------------------------------------------------------------------------------------------


def test_energy_is_that_of_the_card_torch_means(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = fake_nvml(monkeypatch)
    fake_gpu(monkeypatch)
    # torch's first card is NVML's second.
    meter = energy_meter("cuda:0")
    assert not isinstance(meter, Missing)
    before = meter()
    nvml.nvmlDeviceGetTotalEnergyConsumption = [999_000, 7_500].__getitem__
    assert (before, meter() - before) == (5.0, 2.5)
    nvml.nvmlDeviceGetTotalEnergyConsumption = failing
    with pytest.raises(BackendUnavailable, match="got no energy from NVML .Not Supported."):
        meter()


def test_missing_energy_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)

    def missing(device: str = "cuda") -> tuple[str, str]:
        found = energy_meter(device)
        assert isinstance(found, Missing)
        return found.why, found.todo

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert missing("cpu")[0] == "no GPU"
    why, todo = missing()
    assert why == "not installed"
    assert todo.endswith("pip install nvidia-ml-py")
    fake_nvml(monkeypatch, nvmlInit=failing)
    why, todo = missing()
    assert why == "no NVML"
    assert "Not Supported" in todo
    assert "driver" in todo
    # A card without a counter, and one that NVML does not know: torch's name for it.
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=failing)
    why, todo = missing()
    assert why == "not supported"
    assert "this Tesla V100" in todo
    fake_nvml(monkeypatch)
    fake_gpu(monkeypatch, uuid="a card that NVML does not know")
    why, todo = missing()
    assert why == "not supported"
    assert "this Tesla V100 (got no energy from NVML (Not Found)" in todo
