"""The command line of `python -m benchmarks speed gpu`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.speed import kernels as kernel_table
from benchmarks.speed.gpu import batches, decode, few_sms, int8_cache, memory, prefill
from benchmarks.speed.gpu.rig import Report, Rig, Setting, first_line
from benchmarks.speed.kernels import Unavailable, find_gpu
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.console import positive, run_command, say
from lite.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMIT_S: Final = 480
QUICK: Final = Setting(layers=4, rounds=2, new_tokens=8, scored_tokens=16, requests=10, text_tokens=(4, 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Something to measure."""

    name: str
    title: str
    measure: Callable[[Rig, Report], None]
    share: float  # of the whole time, at most


def _measure_kernels(rig: Rig, report: Report) -> None:
    """Run the kernel benchmark, as far as the time goes."""
    rig.forget_decoder()
    bandwidth = rig.measured_bandwidth()
    rows = kernel_table.measure_all((1, 8), rig.device, bandwidth=bandwidth, stop=rig.is_late)
    report.text = kernel_table.report(rows, bandwidth, find_gpu()[1].reason)
    report.figures |= {"bandwidth_bytes_per_s": bandwidth, "rows": to_json(rows)}
    if not kernel_table.is_right(rows):
        report.wrong.append("a kernel of ours computes something else: see the notes below the table")
    if rig.is_late():
        report.why = "the section's time was up before all were measured"


SECTIONS: Final = (
    Section(name="decode", title="Decoding", measure=decode.measure, share=0.45),
    Section(name="prefill", title="Prefill", measure=prefill.measure, share=0.15),
    Section(name="memory", title="Memory", measure=memory.measure, share=0.1),
    Section(name="few-sms", title="Few multiprocessors", measure=few_sms.measure, share=0.15),
    Section(name="int8-cache", title="An int8 cache", measure=int8_cache.measure, share=0.1),
    Section(name="batches", title="Batches", measure=batches.measure, share=0.2),
    Section(name="kernels", title="Kernels", measure=_measure_kernels, share=1.0),
)


def _parser() -> argparse.ArgumentParser:
    names = [section.name for section in SECTIONS]
    defaults = Setting()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed gpu",
        description="Measure the runtime on one GPU at the full size of the real model, with random weights drawn "
        "there, beside other libraries, as far as they are installed.",
        epilog="exit status: 0 all of ours is right, 1 something of ours is not or there is no GPU, 2 wrong use, 130 "
        "interrupted.",
    )
    parser.add_argument("--quick", action="store_true", help="few layers, few rounds: only to see that it works")
    parser.add_argument(
        "--layers", type=positive, metavar="N", help=f"decoder layers (default: {defaults.layers}, quick: 4)"
    )
    parser.add_argument(
        "--rows", type=positive, nargs="+", default=list(defaults.rows), metavar="B",
        help="studies that are decoded together (default: 1 2 4 8)",
    )  # fmt: skip
    parser.add_argument(
        "--memory-gb", type=_gigabytes, default=defaults.memory_bytes / 1e9, metavar="GB",
        help="what torch's allocator may have, in 1e9 bytes (default: %(default)g); where other libraries do not fit "
        "into it beside ours, they are measured outside, and the table says so",
    )  # fmt: skip
    parser.add_argument(
        "--few-sms", type=positive, default=defaults.few_sms, metavar="N",
        help="multiprocessors that decoding is restricted to (default: %(default)s, an RTX 3060's)",
    )  # fmt: skip
    parser.add_argument(
        "--artifact", type=Path, metavar="ARTIFACT",
        help="an artifact, for its vision tower, and for the onnx engine if it has float16 activations",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], metavar="SECTION", help="not these")
    parser.add_argument(
        "--limit-s", type=positive, default=LIMIT_S, metavar="S",
        help="no new measurement begins after so many seconds (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too, after each section")
    return parser


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text} · expected gigabytes above 0")
    return value


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Return what the arguments ask for."""
    base = QUICK if arguments.quick else Setting()
    return replace(
        base,
        layers=arguments.layers or base.layers,
        rows=tuple(sorted(set(arguments.rows))),
        few_sms=arguments.few_sms,
        memory_bytes=round(arguments.memory_gb * 1e9),
        artifact=arguments.artifact,
    )


def measure_sections(
    rig: Rig, sections: Sequence[Section], limit_s: float, done: Callable[[dict[str, Report]], None]
) -> dict[str, Report]:
    """Measure section after section, whatever becomes of each.

    Args:
        rig: the device.
        sections: in order.
        limit_s: of all of them; none has more than its share.
        done: gets all reports so far after each.
    """
    started = rig.now()
    end = started + limit_s
    reports: dict[str, Report] = {}
    for section in sections:
        report = reports[section.name] = Report(title=section.title)
        began = rig.now()
        rig.deadline = min(end, began + section.share * limit_s)
        say(f"{section.title} …")
        if began >= end:
            report.why = "the time was up"
        else:
            _measure_section(rig, section, report)
        report.took_s = rig.now() - began
        rig.tidy()
        done(reports)
    return reports


def _measure_section(rig: Rig, section: Section, report: Report) -> None:
    try:
        section.measure(rig, report)
    except Unavailable as reason:
        report.why = str(reason)
    except Exception as error:  # noqa: BLE001 - the other sections go on
        sys.stderr.write(traceback.format_exc())
        report.why = f"failed ({first_line(error)})"
        report.wrong.append(f"{section.title}: {report.why}")


def format_report(report: Report) -> str:
    """Return a section as markdown."""
    parts = [f"## {report.title}"]
    if report.text is not None:
        parts.append(report.text)
    if report.cells:
        parts.append(markdown_table(report.header, report.cells, left=report.left))
    lines = [*report.notes, *(f"WRONG: {line}" for line in report.wrong)]
    if report.why is not None:
        lines.append(f"Not measured{' to the end' if report.cells or report.text else ''}: {report.why}.")
    parts.append("\n".join(f"- {line}" for line in [*lines, f"Took {report.took_s:.0f} s."]))
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure, print, write; return the exit status.

    Raises:
        BackendUnavailable: there is no GPU, or the kernels do not run on it.
    """
    device, selection = find_gpu()
    setting = setting_of(arguments)
    wanted = [
        section
        for section in SECTIONS
        if (arguments.only is None or section.name in arguments.only) and section.name not in arguments.skip
    ]
    torch.manual_seed(0)
    torch.cuda.set_device(device)
    rig = Rig.of_gpu(setting, device)
    rig.limit(setting.memory_bytes)
    found = versions()
    about: dict[str, Any] = {
        "machine": machine(),
        "card": selection.reason,
        "versions": found,
        "command": command,
        "bandwidth_bytes_per_s": rig.measured_bandwidth(),
        "setting": to_json(replace(setting, artifact=None)) | {"artifact": str(setting.artifact or "") or None},
    }
    lines = (
        f"Machine: {about['machine']}; kernels on {selection.reason}.",
        f"Streaming read: {about['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in found.items())}.",
        f"Command: `{command}`; torch's allocator has {setting.memory_bytes / 1e9:g} GB.",
    )
    sys.stdout.write("\n".join(f"- {line}" for line in lines) + "\n\n")

    def done(reports: dict[str, Report]) -> None:
        sys.stdout.write(format_report(list(reports.values())[-1]) + "\n\n")
        sys.stdout.flush()
        if arguments.json is not None:
            document = about | {"sections": {name: document_of(report) for name, report in reports.items()}}
            write_whole(arguments.json, json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    reports = measure_sections(rig, wanted, arguments.limit_s, done)
    wrong = [line for report in reports.values() for line in report.wrong]
    sys.stdout.write(f"{len(wrong)} of ours wrong{': ' + '; '.join(wrong) if wrong else ''}.\n")
    return 1 if wrong else 0


def document_of(report: Report) -> dict[str, Any]:
    """Return a section for the JSON document."""
    return {
        "title": report.title,
        "took_s": round(report.took_s, 2),
        "why": report.why,
        "wrong": report.wrong,
        "notes": report.notes,
        **{name: to_json(figure) for name, figure in report.figures.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    return run_command(lambda: run(arguments, shlex.join(["python", "-m", "benchmarks", "speed", "gpu", *given])))
