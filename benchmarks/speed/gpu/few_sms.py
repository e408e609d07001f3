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

from benchmarks.speed.gpu import model
from benchmarks.speed.gpu.decode import HEADER, REFERENCE, Row, add, timed
from benchmarks.speed.gpu.decoding import Decoding, LiteDecoding, time_in_turns
from benchmarks.speed.gpu.rig import first_line
from benchmarks.speed.kernels import Unavailable
from kernels import backend
from kernels.backend import card_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.speed.gpu.rig import Report, Rig
    from lite.artifact.parts import CacheDtype

_MANY: Final = 1.5
"""Counted multiprocessors over those asked for: more is no restriction."""


def measure(rig: Rig, report: Report) -> None:
    """Decode on few multiprocessors.

    Raises:
        Unavailable: this torch, driver or card cannot restrict a launch.
    """
    report.header, report.left = HEADER, 2
    report.figures |= {"rows": []}
    if rig.device.type == "cuda" and (count := card_of(rig.device).multiprocessors) <= rig.setting.few_sms:
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
            _measure(rig, report, captured)
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
        raise Unavailable(f"no green context ({first_line(error)})") from error


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
        raise Unavailable(f"on the stream of a green context nothing runs ({first_line(error)})") from error


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


def _measure(rig: Rig, report: Report, count: int) -> None:
    setting = rig.setting
    bandwidth = rig.measured_bandwidth()
    report.figures["bandwidth_bytes_per_s"] = bandwidth
    report.notes.append(
        f"{count} multiprocessors ran it (asked for {setting.few_sms}), and read {bandwidth / 1e9:,.0f} GB/s. "
        f"Context: {setting.context} tokens."
    )
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    rows = min(setting.rows)
    found: dict[str, Row] = {}
    decodings: dict[str, Decoding] = {}
    for cache_dtype in cache_dtypes:
        part = model.part_of(rig.decoder(), cache_dtype=cache_dtype, capture=rig.capture)
        row = Row(engine=REFERENCE, cache=cache_dtype or "float16", rows=rows)
        key = f"{row.engine}, {row.cache} cache"
        found[key] = row
        decodings[key] = LiteDecoding(part, rows=rows, context=setting.context, new_tokens=setting.new_tokens)
    seconds = time_in_turns(rig, decodings)
    for key, row in found.items():
        add(report, timed(rig, row, key, decodings, seconds, bandwidth, ours=True))
