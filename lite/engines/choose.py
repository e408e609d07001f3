"""Which engine computes the decoder: chosen from what the artifact has, what is installed, and what is asked for.

    torch   `decoder/`, by torch: every format, on a CPU or an NVIDIA GPU
    onnx    `decoder.onnx`, by ONNX Runtime: GPTQ's integers, on a CPU without torch, or by another of its providers

Nothing heavy is imported before the choice: a process with the onnx engine never loads torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from typing import TYPE_CHECKING, Final, Literal, get_args

from lite.errors import ArtifactError, BackendUnavailable, LiteError

if TYPE_CHECKING:
    from lite.artifact.open import Artifact

EngineName = Literal["torch", "onnx"]
_CUDA_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def choose_engine(
    artifact: Artifact,
    engine: str = "auto",
    *,
    device: str = "auto",
    dtype: str | None = None,
    provider: str | None = None,
) -> EngineName:
    """Return the engine to use.

    Args:
        artifact: a checked artifact.
        engine: "auto" takes torch if a GPU or a dtype is asked for; else onnx if the artifact has `decoder.onnx` and
            either there is no GPU for torch, the CPU or a provider is asked for, or torch is not installed; and torch
            otherwise.
        device: as for `lite.load`.
        dtype: as for `lite.load`; only torch has a choice.
        provider: as for `lite.load`; only onnx has a choice.

    Raises:
        ArtifactError: the engine asked for needs a `decoder.onnx` that is not there.
        BackendUnavailable: the engine asked for, or the only one for this artifact, needs torch.
        LiteError: there is no such engine, or two settings exclude each other.
    """
    if engine not in ("auto", *get_args(EngineName)):
        msg = f"got engine {engine!r} · expected auto, {', '.join(get_args(EngineName))} · choose one of them"
        raise LiteError(msg)
    for_torch = dtype is not None or device not in ("auto", "cpu")
    if for_torch and (engine == "onnx" or (engine == "auto" and provider is not None)):
        got = f"dtype {dtype!r}" if dtype is not None else f"device {device!r}"
        todo = "export decoder.onnx with --activations" if dtype is not None else "give a provider such as cuda"
        raise LiteError(f"got {got} for the onnx engine · expected it for the torch engine only · {todo}")
    if engine == "torch" and provider is not None:
        raise LiteError(f"got provider {provider!r} for the torch engine · expected it for onnx only · give a device")
    if provider is not None and device == "cpu" and not str(provider).lower().startswith("cpu"):
        msg = f"got device 'cpu' and provider {provider!r} · expected one of them · leave one out"
        raise LiteError(msg)
    exists = artifact.manifest.parts.decoder_onnx is not None
    if engine == "torch" or (engine == "auto" and provider is None and (for_torch or not exists)):
        _require_torch(artifact)
        return "torch"
    if not exists:
        msg = (
            f"{artifact.path}: got an artifact without decoder.onnx · expected one, for the onnx engine · make it with "
        )
        raise ArtifactError(f"{msg}`python -m export onnx {artifact.path}`, or use the torch engine")
    if engine == "onnx" or provider is not None:
        return "onnx"
    return "torch" if device == "auto" and _gpu_for_torch() else "onnx"


def has_torch() -> bool:
    """Say whether torch is installed, without importing it."""
    return "torch" in sys.modules or importlib.util.find_spec("torch") is not None


def _require_torch(artifact: Artifact) -> None:
    if has_torch():
        return
    listed = artifact.manifest.parts.decoder.format
    todo = "or leave out what asks for torch: a device, a dtype, or the engine"
    if artifact.manifest.parts.decoder_onnx is None:
        gptq = listed.startswith("gptq")
        todo = (
            f"or {'add decoder.onnx with `python -m export onnx`' if gptq else 'export it as gptq with --engine onnx'}"
        )
        todo += " where torch is installed"
    msg = (
        f'{artifact.path}: got no torch · expected it for a decoder in {listed} · pip install "llava-rad-lite[torch]", '
    )
    raise BackendUnavailable(msg + todo)


def _gpu_for_torch() -> bool:
    """Say whether torch sees a GPU; it is asked only where there is one, as importing it takes seconds."""
    return _has_gpu() and gpu_problem() is None


def gpu_problem() -> str | None:
    """Say why torch does not see the GPU that is there; None where it does, or there is none."""
    if not _has_gpu():
        return None
    if not has_torch():
        return "torch is not installed"
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:  # such as a driver that is too old, with its version
        return str(error).strip().partition("\n")[0]
    return f"torch {torch.__version__} does not see it"


@functools.cache
def _has_gpu() -> bool:
    """Ask the driver of NVIDIA's GPUs, if there is one."""
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False
