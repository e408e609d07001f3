"""Which backend computes an op here, and why.

    reference   plain PyTorch (`kernels.reference`): anywhere, and the specification
    triton      kernels for NVIDIA GPUs from Volta (7.0) on; under TRITON_INTERPRET=1 on a CPU too, for tests

`select_backend` decides it, once for a device, and all ops ask it: their `backend` is None for the selected one. An op
raises ValueError where a shape, dtype, stride or device does not fit, or where the backend asked for does not run. What
was selected belongs in the result of whoever runs the ops: a GPU on which the kernels do not run computes all the
same, slowly, and the reason has to be seen.

Triton reads TRITON_INTERPRET when it is imported: set it before the process starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import TYPE_CHECKING, Final, Literal

import torch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

Backend = Literal["reference", "triton"]

OLDEST_CAPABILITY: Final = (7, 0)
"""Volta: no kernel here needs more, but for those that say so."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What computes the ops on a device."""

    backend: Backend
    reason: str
    """Why this one, for people: the card, or what is missing."""
    is_fallback: bool = False
    """Whether the device is a GPU and the kernels do not run there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the tables of the kernels are keyed by."""

    capability: tuple[int, int]
    multiprocessors: int


INTERPRETED_CARD: Final = Card(capability=(8, 0), multiprocessors=2)
"""What the interpreter stands in for: a card so small that small shapes are split as large ones are on a large card."""


def is_interpreted() -> bool:
    """Say whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select_backend(device: torch.device) -> Selection:
    """Choose the backend of all ops on a device.

    The first call for a GPU compiles and runs an empty kernel, to know that the compiler works: make it before a CUDA
    graph is captured. Later calls look the answer up.
    """
    if is_interpreted():
        problem = _triton_problem()
        if problem is None:
            return Selection(backend="triton", reason="TRITON_INTERPRET=1: interpreted, for tests")
        return Selection(backend="reference", reason=problem, is_fallback=True)
    if device.type != "cuda":
        return Selection(backend="reference", reason=f"the tensors are on {device.type}")
    return _select_cuda(_index(device))


def require_backend(device: torch.device, requested: str | None) -> Backend:
    """Return the backend to use, the one that was asked for or else the selected one; or raise ValueError."""
    if requested is None:
        return select_backend(device).backend
    if requested == "reference":
        return "reference"
    if requested != "triton":
        raise ValueError(f"got backend {requested!r} · expected reference or triton · leave it out for the right one")
    selection = select_backend(device)
    if selection.backend != "triton":
        msg = f"got backend 'triton' on {device} ({selection.reason}) · expected tensors on an NVIDIA GPU"
        raise ValueError(f"{msg} · leave it out")
    return "triton"


def card_of(device: torch.device) -> Card:
    """Return what the tables ask of the card; it does not wait for the GPU."""
    if device.type != "cuda":
        return INTERPRETED_CARD
    return _card(_index(device))


def device_guard(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _index(device: torch.device) -> int:
    # torch's types have it that there always is an index; "cuda" alone has none.
    index: int | None = device.index
    return torch.cuda.current_device() if index is None else index


@functools.cache
def _card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(capability=(properties.major, properties.minor), multiprocessors=properties.multi_processor_count)


@functools.cache
def _select_cuda(index: int) -> Selection:
    name, capability = torch.cuda.get_device_name(index), _card(index).capability
    card = f"{name}, compute capability {capability[0]}.{capability[1]}"
    problem = None
    if torch.version.hip is not None:
        problem = "a ROCm build of torch, and the kernels are written for NVIDIA"
    elif capability < OLDEST_CAPABILITY:
        problem = f"{card}, and the kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
    else:
        problem = _triton_problem() or _probe_problem(index, card, capability)
    if problem is not None:
        return Selection(backend="reference", reason=problem, is_fallback=True)
    return Selection(backend="triton", reason=card)


@functools.cache
def _triton_problem() -> str | None:
    """Say why Triton cannot be imported, None where it can."""
    try:
        from kernels.gpu import probe  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"triton does not load ({error}): pip install triton"
    return None


def _probe_problem(index: int, card: str, capability: tuple[int, int]) -> str | None:
    """Run an empty kernel: what lacks a C compiler, or a card that this Triton no longer knows, is found out now."""
    from kernels.gpu import probe

    if capability >= (10, 0) and probe.version() < (3, 3):
        # Not to be tried: asked for a card it does not know, its compiler ends the process.
        return f"{card}: triton {'.'.join(map(str, probe.version()))} does not know it; 3.3 does"
    try:
        probe.run(torch.device("cuda", index))
    except Exception as error:  # noqa: BLE001 - whatever the compiler or the driver raises is the reason
        first = (str(error).strip().splitlines() or [""])[0]
        return f"{card}: triton does not compile for it ({type(error).__name__}: {first})"
    return None
