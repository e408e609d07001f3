"""Sessions of ONNX Runtime: which provider computes, with how many threads, and errors that say what to do."""

from __future__ import annotations

import contextlib
import mmap
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lite.engines.cores import available_cores
from lite.engines.protobuf import fields
from lite.errors import ArtifactError, BackendUnavailable, LiteError, MemoryBudgetError

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
DML: Final = "DmlExecutionProvider"
_SETTINGS: Final = {
    # By default its arena doubles each time, and every way of computing a convolution is tried, with what each takes.
    CUDA: {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
}
_REMOTE: Final = "AzureExecutionProvider"
"""Calls models elsewhere, and computes nothing itself; ONNX Runtime lists it everywhere."""
_SHORT: Final = {
    "cpu": CPU,
    "cuda": CUDA,
    "dml": DML,
    "directml": DML,
    "rocm": "ROCMExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
GRAPH_SINCE: Final = "1.22"
"""The first version with all operators of `decoder.onnx`: 8-bit MatMulNBits."""
INT8_CACHE_SINCE: Final = "1.27"
"""The first with those of the graph with an int8 cache."""
_FOLDER: Final = "session.model_external_initializers_file_folder_path"
"""The setting that tells where the files are that a graph reads which is not loaded from a file."""
EXACT_SHAPE: Final = (32, 64, 64)
"""M, K and N of the product of `adds_int8_exactly`: several rows, as a prompt has."""


def import_onnxruntime() -> types.ModuleType:
    """Import ONNX Runtime.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        msg = (
            f"got no onnxruntime ({error}) · expected it for the vision tower · "
            'pip install "llava-rad-lite[cpu]", or "llava-rad-lite[gpu]" with an NVIDIA GPU'
        )
        raise BackendUnavailable(msg) from error
    module: types.ModuleType = onnxruntime
    return module


def is_at_least(installed: str, since: str) -> bool:
    """Say whether a version of ONNX Runtime, such as "1.27.0", is as new as "1.27"."""
    return [int(part) for part in installed.split(".")[:2]] >= [int(part) for part in since.split(".")]


def require_onnxruntime(*, int8_cache: bool, installed: str | None = None) -> None:
    """Refuse a version that lacks an operator of `decoder.onnx`.

    Args:
        int8_cache: of the graph with an int8 cache.
        installed: which one to check; None asks ONNX Runtime.

    Raises:
        BackendUnavailable: ONNX Runtime is older, or not installed.
    """
    installed = installed or import_onnxruntime().__version__
    wanted = INT8_CACHE_SINCE if int8_cache else GRAPH_SINCE
    if not is_at_least(installed, wanted):
        what = "an int8 cache in GroupQueryAttention" if int8_cache else "8-bit MatMulNBits"
        msg = f"got onnxruntime {installed} · expected {wanted} or newer, the first with {what} · "
        raise BackendUnavailable(f'{msg}pip install --upgrade "onnxruntime>={wanted}"')


def provider_of_device(device: str, available: Sequence[str]) -> str:
    """Return the provider for a device of torch's such as "cuda:1"; the CPU's where there is none for CUDA."""
    wanted = device.replace("cuda", CUDA) if device.startswith("cuda") else CPU
    return wanted if wanted.partition(":")[0] in available else CPU


def check_provider(provider: str, available: Sequence[str], *, version: str) -> str:
    """Return the full name of a provider, with ":N" behind it where that was given.

    Args:
        provider: a name of ONNX Runtime's such as "CUDAExecutionProvider", or cpu, cuda, rocm, openvino; "cuda:1" for
            the second GPU.
        available: the providers that there are.
        version: ONNX Runtime's.

    Raises:
        BackendUnavailable: this ONNX Runtime has no such provider.
    """
    name, colon, index = provider.partition(":")
    name = _SHORT.get(name.lower(), name)
    available = [found for found in available if found != _REMOTE]
    if name not in available or (colon and not (index.isdecimal() and name != CPU)):
        msg = f"got provider {provider!r} · expected one that ONNX Runtime {version} has here: {', '.join(available)}"
        todo = "choose one of them, or install the build that has it (onnxruntime-gpu, onnxruntime-directml, …)"
        raise BackendUnavailable(f"{msg} · {todo}")
    return f"{name}{colon}{index}"


def open_session(
    file: Path,
    *,
    provider: str,
    data: Sequence[str] = (),
    patterns: bool = True,
    whole: bool = False,
    profile: Path | None = None,
    constants: Mapping[str, Any] = MappingProxyType({}),
    tail: Path | None = None,
    threads: int | None = None,
    change: Callable[[bytes], bytes] | None = None,
    added: Mapping[str, Any] = MappingProxyType({}),
) -> Any:  # noqa: ANN401 - of ONNX Runtime
    """Load a graph.

    Args:
        file: of an artifact that has been checked.
        provider: from `provider_of_device` or `check_provider`.
        data: the files beside it that hold its weights; none: it has them itself.
        patterns: allocate the activations of a run by what they took in a run of the same shape before. Where shapes
            are many that takes more memory, and no less time.
        whole: refuse the graph unless the provider computes all of it: an operator that it lacks would be computed on
            the CPU, with copies to and fro.
        constants: arrays to take in the place of the graph's own, by name.
        profile: let ONNX Runtime write down what each operator takes, into a file whose name begins like this one.
        tail: of the same artifact, nodes and outputs that continue the graph. Two messages of protobuf behind each
            other are one, with the entries of both: https://protobuf.dev/programming-guides/encoding/#last-one-wins
        threads: of an operator; None: one for each core.
        change: makes another graph of the file's content, and is given one whose external data has been checked.
        added: what that graph names without holding it, as values of ONNX Runtime's by name.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ArtifactError: ONNX Runtime does not take the file, or it names weights in another file than those.
        BackendUnavailable: the provider cannot be started, or does not have all operators.
    """
    runtime = import_onnxruntime()
    for read in filter(None, (file, tail)):
        _check_external_data(read, data)
    options = _options(runtime, patterns=patterns, profile=profile, threads=threads)
    values = {constant: runtime.OrtValue.ortvalue_from_numpy(array) for constant, array in constants.items()}
    for constant, value in values.items():
        options.add_initializer(constant, value)
    if added:
        options.add_external_initializers(list(added), list(added.values()))
    if change is not None:
        options.add_session_config_entry(_FOLDER, str(file.parent))
    name, _, index = provider.partition(":")
    settings: dict[str, Any] = dict(_SETTINGS.get(name, {})) | ({"device_id": int(index)} if index else {})
    providers: list[Any] = [(name, settings)]
    if name != CPU and whole:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    elif name != CPU:
        providers.append(CPU)
    try:
        # Left to itself it would print that a provider has failed, on stdout, and go on with the CPU.
        model: str | bytes = str(file) if tail is None else file.read_bytes() + tail.read_bytes()
        if change is not None:
            model = change(file.read_bytes())
        session = runtime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # its errors have no common base but Exception
        if name != CPU and not whole:
            again: dict[str, Any] = {"data": data, "patterns": patterns, "profile": profile, "constants": constants}
            again |= {"tail": tail, "threads": threads, "change": change, "added": added}
            return open_session(file, provider=CPU, **again)
        raise _explained(error, file, name) from error
    if whole and (got := session.get_providers()[0]) != name:
        msg = f"{file}: got {got} in place of {name}, which did not start · expected {name} · see that its libraries"
        raise BackendUnavailable(f"{msg} and its device are there, or use --provider cpu")
    # ONNX Runtime reads them as long as it computes, and does not hold them.
    session.held_constants = values | dict(added)
    return session


def _options(runtime: Any, *, patterns: bool, profile: Path | None, threads: int | None) -> Any:  # noqa: ANN401 - of ONNX Runtime
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_pattern = threads or available_cores(), patterns
    options.log_severity_level = 3  # errors only: warnings would land in the middle of a streamed text
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return options


def _explained(error: Exception, file: Path, name: str) -> LiteError:
    """Return what to say of a graph that a provider did not take."""
    reason = str(error).strip().partition("\n")[0][:200]
    if name != CPU:
        msg = f"{file}: got a provider {name} that does not start, or cannot compute it ({reason}) · expected one"
        todo = "use --provider cpu, or for a GPU export decoder.onnx with --activations float16"
        return BackendUnavailable(f"{msg} with all of its operators · {todo}")
    msg = f"{file}: got a graph that ONNX Runtime {import_onnxruntime().__version__} cannot load ({reason})"
    return ArtifactError(f"{msg} · expected the graph written at export · export the artifact again")


def adds_int8_exactly(file: Path) -> bool:
    """Say whether int8 products are exact here: without VNNI and the like, two of them are added up in 16 bits.

    Args:
        file: `int8_product.onnx` of an artifact.

    Raises:
        ArtifactError: ONNX Runtime does not take it.
    """
    rows, inner, columns = EXACT_SHAPE
    x, largest = np.full((rows, inner), 255, np.uint8), 255 * 127
    (product,) = open_session(file, provider=CPU).run(None, {"x": x})
    return bool(product.shape == (rows, columns) and (product == inner * largest).all())


@contextlib.contextmanager
def errors_explained(provider: str) -> Iterator[None]:
    """Say in this project's words what goes wrong while a graph is computed.

    Raises:
        MemoryBudgetError: it is about memory.
        LiteError: it is not.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no common base but Exception
        reason = str(error).strip().partition("\n")[0][:200]
        what = f"got an error of ONNX Runtime ({reason}) · expected {provider} to compute the graph · "
        if "memory" in str(error).lower() or isinstance(error, MemoryError):
            raise MemoryBudgetError(f"{what}take fewer studies at a time, or a larger machine") from error
        raise LiteError(f"{what}report this") from error


# -- The files that a graph reads ------------------------------------------------------------------------------------

_MESSAGES: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external_data"},
}
"""The messages of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto that lead to external data, by field."""
_DEEPEST: Final = 100
"""Messages within messages that protobuf reads."""


def _check_external_data(file: Path, data: Sequence[str]) -> None:
    """Refuse a graph that reads other files than those the manifest lists: before 1.24 ONNX Runtime would.

    Raises:
        ArtifactError: it names another one, or is no graph.
    """
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named = sorted(set(_locations(content, 0, len(content), "model")))
    except PermissionError as error:
        msg = f"{file}: got {error.strerror} · expected a readable file · check its permissions"
        raise ArtifactError(msg) from error
    except (OSError, ValueError, IndexError) as error:
        msg = f"{file}: got something that ONNX Runtime cannot load ({error}) · expected the graph written at export"
        raise ArtifactError(f"{msg} · export the artifact again") from error
    if other := [name for name in named if name not in data]:
        expected = " and ".join(data) or "itself"
        msg = f"{file}: got a graph that reads its weights from {other[0]!r} · expected them in {expected}"
        raise ArtifactError(f"{msg} · do not use this artifact")


def _locations(content: mmap.mmap, begin: int, end: int, message: str, depth: int = 0) -> Iterator[str]:
    """Walk through a message; yield the file names of external data."""
    if depth > _DEEPEST:
        raise ValueError("messages within messages without end")
    if message == "external_data":
        entry = [(field, content[at:to]) for field, at, to in fields(content, begin, end)]
        if (1, b"location") in entry:
            yield from (value.decode(errors="replace") for field, value in entry if field == 2)
        return
    for field, at, to in fields(content, begin, end):
        if field in _MESSAGES[message]:
            yield from _locations(content, at, to, _MESSAGES[message][field], depth + 1)
