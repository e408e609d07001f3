"""Decoding on as many multiprocessors as a small card has: is it the memory that limits it, or the arithmetic?

A green context (CUDA 12.8 and torch 2.11 or newer) owns some of a card's multiprocessors. What is launched on a stream
of its runs there alone, and so does a CUDA graph that was captured on that stream. How many they really are is counted,
as the driver rounds; and the yardstick is a streaming read by the same ones. The kernels are told that number, as on a
small card. Memory and caches stay the large card's.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch

from benchmarks.speed.decoders import part_of
from benchmarks.speed.gpu.lanes import cache_of, lane_of, row_of, time_lanes
from benchmarks.speed.harness import Unavailable, reason
from kernels import backend
from kernels.backend import card_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.artifact.parts import CacheDtype

_MANY: Final = 1.5
"""Counted multiprocessors over those asked for: more is no restriction."""


def measure(rig: Rig, report: Report) -> None:
    """Decode on few multiprocessors.

    Raises:
        Unavailable: this torch, driver or card cannot restrict a launch.
    """
    if rig.on_gpu and (count := card_of(rig.device).multiprocessors) <= rig.setting.few_sms:
        raise Unavailable(f"the card has {count} multiprocessors by itself")
    context = green_context(rig.setting.few_sms, rig.device)
    rig.kept.append(context)  # what was recorded on its stream may be asked for until the end
    rig.decoder()
    torch.cuda.synchronize(rig.device)
    with on_stream(context.Stream()):
        launched, captured = count_multiprocessors(rig)
        report.figures |= {"asked": rig.setting.few_sms, "launched_on": launched, "captured_on": captured}
        if max(launched, captured) > _MANY * rig.setting.few_sms:
            msg = f"asked for {rig.setting.few_sms}, it ran on {launched} multiprocessors launched, {captured} captured"
            raise Unavailable(f"the green context does not restrict it: {msg}")
        with planned_for(captured, rig.device):
            measure_on(rig, report, captured)
        torch.cuda.synchronize(rig.device)


def green_context(count: int, device: torch.device) -> Any:  # noqa: ANN401 - torch's has no types
    """Return a green context with so many multiprocessors.

    Raises:
        Unavailable: there is no such thing here.
    """
    try:
        from torch.cuda import green_contexts
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has no green contexts, 2.11 has") from error
    context: Any = green_contexts.GreenContext
    if not hasattr(context, "Stream"):
        raise Unavailable(f"the green contexts of torch {torch.__version__} have no streams, those of 2.11 have")
    try:
        return context.create(num_sms=count, device_id=device.index)
    except (RuntimeError, TypeError) as error:
        raise Unavailable(f"no green context ({reason(error)})") from error


def count_multiprocessors(rig: Rig) -> tuple[int, int]:
    """Count where launches on the current stream run, and where a captured one does.

    Raises:
        Unavailable: nothing can be launched or captured there.
    """
    from benchmarks.speed.gpu.smid import Multiprocessors

    try:
        probe = Multiprocessors(rig.device)
        probe.note()
        launched = probe.count()
        if rig.capture is None:
            return launched, launched
        rig.capture(probe.note)()
        return launched, probe.count()
    except RuntimeError as error:
        raise Unavailable(f"on the stream of a green context nothing runs ({reason(error)})") from error


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:  # noqa: ANN401 - see above
    """Launch on a stream meanwhile, and capture on it: a graph's kernels stay bound to its multiprocessors."""
    # What `torch.cuda.graph` captures on if it is told nothing; that it does is counted above.
    with torch.cuda.stream(stream), mock.patch.object(torch.cuda.graph, "default_capture_stream", stream):
        yield


@contextlib.contextmanager
def planned_for(count: int, device: torch.device) -> Iterator[None]:
    """Let the kernels' tables see a card of so many multiprocessors meanwhile."""
    small = dataclasses.replace(card_of(device), multiprocessors=count)
    with mock.patch.object(backend, "_card", return_value=small):
        yield


def measure_on(rig: Rig, report: Report, count: int) -> None:
    """Decode with either cache, on so many multiprocessors."""
    setting = rig.setting
    bandwidth = rig.measured_bandwidth()
    report.figures["bandwidth_bytes_per_s"] = bandwidth
    report.notes.append(
        f"{count} multiprocessors ran it (asked for {setting.few_sms}), and read {bandwidth / 1e9:,.0f} GB/s. "
        f"Context: {setting.context} tokens."
    )
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    parts = [part_of(rig.decoder(), cache_dtype=dtype, capture=rig.capture) for dtype in cache_dtypes]
    rows = min(setting.rows)
    lanes = {cache_of(part, dtype): lane_of(rig, part, rows) for part, dtype in zip(parts, cache_dtypes, strict=True)}
    found = {cache: row_of("lite int4", cache, rows) for cache in lanes}
    time_lanes(rig, lanes, found, bandwidth, reference=next(iter(lanes)))
    for row in found.values():
        report.add(row)
