"""The whole runtime on one GPU, in one run: `python -m benchmarks speed gpu`.

All 32 layers at Vicuna-7B's widths, the weights drawn on the GPU:

    sections, the most important first
        decode       a token at 1,470 of context, ours beside other libraries' linears in the same decoder
        prefill      a prompt of 1,420 tokens beside cuBLAS alone at the same shapes
        memory       the plan of `lite.memory` beside what torch's allocator has held
        batches      a session beside batches that wait for their longest text
        kernels      `benchmarks.speed.kernels`

What is wrong is not timed. A section that fails says why, and the others go on; after each the JSON file is written.
On a CPU everything but the card's own features runs at small shapes: the tests do that.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed import kernels
from benchmarks.speed.gpu import batches, decode, memory, prefill
from benchmarks.speed.gpu.rig import Rig, Setting
from benchmarks.speed.harness import Record, Report, kept_apart, run_main
from lite.bench.table import to_json
from lite.console import positive, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUICK: Final = Setting(layers=4, rounds=2, new_tokens=8, requests=10, text_tokens=(4, 16))
SECTIONS: Final[dict[str, tuple[str, Callable[[Rig, Report], None]]]] = {
    "decode": ("Decoding", decode.measure),
    "prefill": ("Prefill", prefill.measure),
    "memory": ("Memory", memory.measure),
    "batches": ("Batches", batches.measure),
    "kernels": ("Kernels", kernels.measure),
}


def _parser() -> argparse.ArgumentParser:
    defaults = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed gpu",
        description="Measure the runtime on one GPU at the full size of the real model, with random weights drawn "
        "there, beside other libraries, as far as they are installed.",
        epilog="exit status: 0 all of ours is right, 1 something of ours is not or there is no GPU, 2 wrong use, 130 "
        "interrupted.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few layers, few rounds: only to see that it works")
    rows = "studies decoded together (default: 1 2 4 8; kernels fewest and most)"
    add("--rows", type=positive, nargs="+", metavar="B", help=rows)
    add("--json", type=Path, metavar="FILE", help="write everything there too, after each section")
    add("--layers", type=positive, metavar="N", help=f"decoder layers (default: {defaults.layers}, quick: 4)")
    add("--memory-gb", type=positive, default=12, metavar="GB", help="limit of the memory section (%(default)s)")
    sections = ", ".join(SECTIONS)
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION", help=f"of {sections}")
    return parser


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Return what the arguments ask for."""
    base = QUICK if arguments.quick else Setting()
    rows = tuple(sorted(set(arguments.rows or base.rows)))
    return replace(base, layers=arguments.layers or base.layers, rows=rows, memory_bytes=arguments.memory_gb * 10**9)


def measure_sections(rig: Rig, names: Sequence[str], record: Record) -> None:
    """Measure section after section, whatever becomes of each."""
    for name in names:
        title, measure = SECTIONS[name]
        report = Report(title=title)
        say(f"{title} …")
        with kept_apart(report):
            measure(rig, report)
        rig.tidy()
        record.add(name, report)


def run(arguments: argparse.Namespace, record: Record) -> int:
    """Measure, print, write; return the exit status.

    Raises:
        BackendUnavailable: there is no GPU, or the kernels do not run on it.
    """
    device, selection = kernels.find_gpu()
    setting = setting_of(arguments)
    torch.manual_seed(0)
    torch.cuda.set_device(device)
    rig = Rig.of_gpu(setting, device)
    bandwidth = rig.measured_bandwidth()
    record.begin(
        f"Kernels on {selection.reason}. Streaming read: {bandwidth / 1e9:,.0f} GB/s.",
        card=selection.reason, bandwidth_bytes_per_s=bandwidth, setting=to_json(setting),
    )  # fmt: skip
    measure_sections(rig, [name for name in SECTIONS if name in arguments.only], record)
    return record.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_main(_parser(), argv, run)
