"""What this machine has to compute with: asked once, so that a plan is a function of it.

Nothing heavy is imported where it cannot be needed: a process with the onnx engine never loads torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib.util
import re
import sys
from typing import TYPE_CHECKING, Final

from lite.engines.cores import available_cores
from lite.engines.onnx_session import adds_int8_exactly, import_onnxruntime
from lite.errors import BackendUnavailable
from lite.memory.process import memory_of_machine, rss_bytes

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.engines.options import LoadOptions

_CUDA_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None = None  # None: not asked, as asking takes memory there


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a plan may use."""

    gpus: tuple[Gpu, ...] = ()  # none where they were not asked for
    gpu_problem: str | None = None  # why torch does not see the GPU that is there
    has_torch: bool
    onnxruntime: str  # its version
    providers: tuple[str, ...]  # of ONNX Runtime, the preferred first
    resident_bytes: int = 0  # what the process has now, with the packages that it will need
    memory_bytes: int | None = None  # of the machine, or of the container; None if unknown
    num_cores: int = 1
    adds_int8_exactly: bool | None = None  # None: the artifact has nothing that asks for it


def look(options: LoadOptions, artifact: Artifact) -> Machine:
    """Look at this machine as far as the options and the artifact ask for it.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed, or torch, where nothing else will do, cannot be imported.
    """
    asked, exists = options.asked_engine, artifact.manifest.parts.decoder_onnx is not None
    may_be_torch = asked == "torch" or (asked is None and (not exists or (options.device == "auto" and has_gpu())))
    gpus: tuple[Gpu, ...] = ()
    problem: str | None = None
    # torch first: ONNX Runtime then finds the CUDA libraries that torch has brought.
    if may_be_torch:
        try:
            gpus = _gpus(options.device) if has_torch() else ()
            problem = gpu_problem() if not gpus and options.device != "cpu" else None
        except BackendUnavailable as error:  # it is there, and cannot be imported
            if asked == "torch" or not exists:
                raise
            problem = str(error)
    runtime = import_onnxruntime()
    part = artifact.manifest.parts.decoder_onnx
    prompts = part.prompts if part is not None and options.prompt_weights != "stored" and asked != "torch" else None
    return Machine(
        gpus=gpus,
        gpu_problem=problem,
        has_torch=has_torch(),
        onnxruntime=runtime.__version__,
        providers=tuple(runtime.get_available_providers()),
        resident_bytes=rss_bytes() or 0,
        memory_bytes=memory_of_machine(),
        num_cores=available_cores(),
        adds_int8_exactly=adds_int8_exactly(artifact.file(prompts.exactness)) if prompts else None,
    )


def has_torch() -> bool:
    """Say whether torch is installed, without importing it."""
    return "torch" in sys.modules or importlib.util.find_spec("torch") is not None


@functools.cache
def has_gpu() -> bool:
    """Ask the driver of NVIDIA's GPUs, if there is one."""
    try:
        driver = ctypes.CDLL(_CUDA_DRIVER)
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def gpu_problem() -> str | None:
    """Say why torch does not see the GPU that is there; None where it does, or there is none."""
    if not has_gpu():
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


def no_such_gpu(device: str, count: int, problem: str | None) -> BackendUnavailable:
    """Say that a device is none of the GPUs that torch sees."""
    expected = f"one of the {count} GPUs that torch sees" if count else "a GPU that torch sees: there is none"
    msg = f"got device {device!r} · expected {expected}{f' ({problem})' if problem else ''}"
    return BackendUnavailable(f"{msg} · use the CPU, or install a torch built for CUDA and the driver it needs")


def check_device(device: str) -> str:
    """Return the device that torch is to use.

    Args:
        device: "auto" (a GPU if torch sees one), "cpu", "cuda" or "cuda:N".

    Raises:
        BackendUnavailable: torch cannot be imported, or does not see that device.
    """
    from lite.engines.torch_engine.device import num_gpus  # which says what is missing

    if device == "auto":
        return "cuda" if num_gpus() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        msg = f"got device {device!r} · expected auto, cpu, cuda or cuda:N · choose one of them"
        raise BackendUnavailable(msg)
    if device != "cpu" and int(device.partition(":")[2] or 0) >= num_gpus():
        raise no_such_gpu(device, num_gpus(), gpu_problem())
    return device


def _gpus(device: str) -> tuple[Gpu, ...]:
    """Return the GPUs that torch sees; of the one that is meant it tells what is free."""
    # Asked also where the CPU is meant: torch is imported by it, and the plan counts what that takes.
    if check_device("cpu" if device == "cpu" else "auto") == "cpu":
        return ()
    import torch

    meant = int(device.partition(":")[2] or torch.cuda.current_device())
    gc.collect()  # a model that was let go of, and what torch has kept of its memory
    torch.cuda.empty_cache()
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            Gpu(
                name=properties.name,
                capability=(properties.major, properties.minor),
                total_bytes=properties.total_memory,
                free_bytes=torch.cuda.mem_get_info(index)[0] if index == meant else None,
            )
        )
    return tuple(found)
