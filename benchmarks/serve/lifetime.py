"""How a server begins, and how it ends while it has work."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Final

import httpx

from benchmarks.serve.asking import FINDINGS, ROUTES, ask, body_of
from benchmarks.serve.running import PATIENCE_S, Running
from benchmarks.speed.harness import Report
from lite.eval.figures import quantiles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lite.studies.study import Study

MAX_READY_S: Final = 2.0
_STARTS: Final = 5
_UNDER_WAY: Final = 48
_GRACE_S: Final = 30.0  # of `lite serve`, unless it is told otherwise


def measure_start(artifact: Path) -> Report:
    """Start servers one after another, and see what they load."""
    report = Report(title=f"Start, {_STARTS} times")
    ready_s, cpu_s, torch = [], [], 0
    for _ in range(_STARTS):
        with Running(artifact) as server:
            ready_s.append(server.ready_s)
            ticks = map(int, server.proc("stat").rpartition(")")[2].split()[11:13])
            cpu_s.append(sum(ticks) / os.sysconf("SC_CLK_TCK"))
            torch += server.proc("maps").count("torch")
    seconds = quantiles(ready_s)
    told = f"{seconds.p50:.2f} s ({seconds.p20:.2f}–{seconds.p80:.2f}) from process to ready"
    report.bar(f"{told}, {quantiles(cpu_s).p50:.2f} s of CPU", f"{MAX_READY_S:g} s", is_met=seconds.p50 <= MAX_READY_S)
    report.bar(f"{torch} files of torch mapped", "0", is_met=not torch)
    return report


def measure_stop(artifact: Path, studies: Sequence[Study]) -> Report:
    """Tell a server to end while some requests have rows and others wait for one, and ask on."""
    report = Report(title=f"SIGTERM with {_UNDER_WAY} requests under way")
    with Running(artifact) as server:
        ended, refused, seconds = asyncio.run(_stop(server, studies))
        status = server.process.returncode
    lost = [why for why in ended if isinstance(why, BaseException)]
    others = sorted({*refused} - {503, 0})
    report.bar(f"{len(lost)} of {_UNDER_WAY} cut off {lost[:1] or ''}".rstrip(), "0", is_met=not lost)
    told = f"{refused.count(503)} new ones refused with 503, {refused.count(0)} found nobody, others got {others}"
    report.bar(told, "no others", is_met=not others)
    report.bar(
        f"exit status {status} after {seconds:.2f} s", f"0, {_GRACE_S:g} s", is_met=not status and seconds < _GRACE_S
    )
    return report


async def _stop(server: Running, studies: Sequence[Study]) -> tuple[Sequence[object], list[int], float]:
    """Return what became of the requests under way, the statuses of new ones (0: nobody listens), and the seconds."""
    started, refused = [asyncio.Event() for _ in range(_UNDER_WAY)], []
    async with server.client() as client:
        asked = [
            ask(client, ROUTES[index % 2], studies[index % len(studies)], on_start=event.set)
            for index, event in enumerate(started)
        ]
        ended = asyncio.gather(*asked, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), PATIENCE_S)
        server.process.send_signal(signal.SIGTERM)
        since = time.perf_counter()
        await asyncio.sleep(0.05)
        while server.process.poll() is None:
            try:
                refused.append((await client.post(FINDINGS, **body_of(FINDINGS, studies[0]))).status_code)
            except httpx.HTTPError:
                refused.append(0)
            await asyncio.sleep(0.05)
        return await ended, refused, time.perf_counter() - since
