"""What a machine is found to have: its driver, what torch sees, and why it does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lite.artifact.open import Artifact
from lite.engines import machine as machines
from lite.engines.machine import Gpu, has_gpu, look
from lite.engines.options import LoadOptions
from lite.engines.resolve import resolve
from lite.errors import BackendUnavailable


def test_a_driver_is_asked_for_before_torch(tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch takes seconds: not where there can be no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("torch was asked"))
    # No such library, and one that is no driver: the process itself.
    for driver in ("libnosuchdriver.so.1", None):
        monkeypatch.setattr(machines, "_CUDA_DRIVER", driver)
        has_gpu.cache_clear()
        found = look(LoadOptions(), tiny_onnx_artifact)
        assert (found.gpus, found.gpu_problem) == ((), None)
    has_gpu.cache_clear()  # of what has just been answered
    monkeypatch.setattr(machines, "has_gpu", lambda: True)
    # Nor where the engine is another one.
    for options in ({"engine": "onnx"}, {"provider": "cpu"}, {"device": "cpu"}):
        assert look(LoadOptions(**options), tiny_onnx_artifact).gpus == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in (look(LoadOptions(), tiny_onnx_artifact).gpu_problem or "")


def test_a_torch_that_cannot_be_imported_is_a_problem_of_who_needs_it(
    tiny_artifact: Artifact, tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> tuple[Gpu, ...]:
        raise BackendUnavailable("got no torch (libcudart)")

    monkeypatch.setattr(machines, "_gpus", broken)
    monkeypatch.setattr(machines, "has_gpu", lambda: True)
    for artifact, options in ((tiny_artifact, {}), (tiny_onnx_artifact, {"engine": "torch"})):
        with pytest.raises(BackendUnavailable, match="libcudart"):
            look(LoadOptions(**options), artifact)  # type: ignore[arg-type]
    machine = look(LoadOptions(), tiny_onnx_artifact)
    found = resolve(LoadOptions(), tiny_onnx_artifact, machine)
    assert (found.engine, found.fallbacks) == (
        "onnx", ("the CPU in place of the GPU that is there: got no torch (libcudart)",)
    )  # fmt: skip


def test_what_is_free_is_asked_of_the_gpu_that_is_meant(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="T4", major=7, minor=5, total_memory=16 << 30)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "empty_cache": lambda: None,
        "get_device_properties": lambda _: card,
        "mem_get_info": lambda index: (index << 30, 16 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machines, "has_gpu", lambda: True)
    gpus = look(LoadOptions(device="cuda:1"), tiny_onnx_artifact).gpus
    assert [gpu.free_bytes for gpu in gpus] == [None, 1 << 30]
    assert (gpus[0].name, gpus[0].capability, gpus[0].total_bytes) == ("T4", (7, 5), 16 << 30)
    assert [gpu.free_bytes for gpu in look(LoadOptions(), tiny_onnx_artifact).gpus] == [0, None]


def test_why_torch_does_not_see_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 9000).\nPlease update")

    monkeypatch.setattr(machines, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machines.gpu_problem() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert machines.gpu_problem() == "The NVIDIA driver on your system is too old (found version 9000)."
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert machines.gpu_problem() == f"torch {torch.__version__} does not see it"
    monkeypatch.setattr(machines, "has_torch", lambda: False)
    assert machines.gpu_problem() == "torch is not installed"
