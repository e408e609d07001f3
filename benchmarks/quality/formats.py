"""What each way of quantising the decoder costs and takes: `python -m benchmarks quality formats`.

Every row of the table is a command line of the exporter. It is run as a user would run it, in a process of its own
whose time and peak memory are measured, on films drawn for calibration; what comes out is compared with the fp16
export on other films (see `benchmarks.quality.artifacts`). With `--ablation` a second table takes 4-bit GPTQ apart:
each trick added to the plain method, one after the other, and each taken away from the full one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.phantom.write import write_studies
from benchmarks.quality.artifacts import (
    COLUMNS_NOTE,
    LOSS_COLUMNS,
    ArtifactFigures,
    Loss,
    Reference,
    loss_cells,
    measure_loss,
    take_reference,
)
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.console import positive
from lite.errors import LiteError

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "benchmarks" / "phantom" / "checkpoint"
NUM_FILMS = 240
NUM_CALIBRATION_FILMS = 160  # as many as the exporter takes by default, and some for it to hold out
# Films of these seeds are used for nothing else: not for training, nor for the figures of the phantom's README.
SEED = 20_261_201
CALIBRATION_SEED = 20_261_202

# Run by a small Python between this process and the export: what a child is said to have had resident at its peak is
# never less than its parent's own peak, and this process holds films and models.
_LAUNCHER: Final = """\
import json, os, subprocess, sys, time
started = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps([child.returncode, time.perf_counter() - started, usage.ru_maxrss]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A way to export, by what the exporter's command line is told."""

    name: str
    options: tuple[str, ...]
    calibrated: bool = False  # is given films to calibrate on


@dataclass(frozen=True, slots=True, kw_only=True)
class Trick:
    """One choice of GPTQ: the options with it, none where it is the exporter's own, and without."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCost:
    """What an export took."""

    seconds: float  # wall clock, with Python's start and the exporter's own parity check
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished row. The reference has no loss; a row that failed has an error and nothing else."""

    name: str
    cost: ExportCost | None = None
    figures: ArtifactFigures | None = None
    loss: Loss | None = None
    error: str | None = None


REFERENCE: Final = Row(name="fp16", options=("--decoder", "fp16"))


def _gptq(bits: int, group_size: int, method: str) -> Row:
    name = f"gptq-int{bits}-" + ("channel" if group_size == -1 else f"g{group_size}")
    options = ("--decoder", f"gptq-int{bits}", "--group-size", str(group_size), "--method", method)
    if method == "gptq":
        return Row(name=name, options=options, calibrated=True)
    return Row(name=f"{name}-{method}", options=options)


ROWS: Final = (
    REFERENCE,
    _gptq(8, 128, "gptq"),
    _gptq(8, 128, "rtn"),
    *(_gptq(4, group_size, method) for group_size in (32, 64, 128, -1) for method in ("gptq", "rtn")),
    Row(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
    Row(name="bnb-int8", options=("--decoder", "bnb-int8")),
)
"""`g128`: 128 inputs share a scale; `channel`: all inputs of an output do. `rtn`: weights rounded to the nearest."""

TRICKS: Final = (
    Trick(name="order", on=("--activation-order", "group"), off=("--activation-order", "none")),
    Trick(name="clip", on=("--clip", "mse"), off=("--clip", "none")),
    Trick(name="refine", on=("--refine", "2"), off=("--refine", "0")),
    Trick(name="folding", on=("--fold-scales",), off=("--no-fold-scales",)),
    # Left to itself the exporter searches what image and prompt tokens should count.
    Trick(name="token-weights", on=(), off=("--token-weights", "1,1")),
)


def ablation_rows() -> tuple[Row, ...]:
    """Return plain GPTQ, each trick of `TRICKS` added one after the other, and the full set without each."""

    def row(name: str, on: Sequence[bool]) -> Row:
        options = [trick.on if used else trick.off for trick, used in zip(TRICKS, on, strict=True)]
        return Row(name=name, options=(*_gptq(4, 128, "gptq").options, *sum(options, ())), calibrated=True)

    count = len(TRICKS)
    # With the last trick the set is full, and full without the last is the one before: neither is exported twice.
    but_last = list(enumerate(TRICKS[:-1]))
    added = [row(f"plus-{trick.name}", [i <= at for i in range(count)]) for at, trick in but_last]
    removed = [row(f"full-without-{trick.name}", [i != at for i in range(count)]) for at, trick in but_last]
    return row("plain", [False] * count), *added, row("full", [True] * count), *removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all rows have in common."""

    checkpoint: Path
    base: Path
    held_out: Path  # lists of films
    calibration: Path
    artifacts: Path
    device: str
    keep: bool  # leave the artifacts where they are


def measured_run(command: Sequence[str]) -> ExportCost:
    """Run a command in the repository's root and measure it.

    Raises:
        LiteError: it failed; the message is the last line it wrote to stderr.
    """
    launcher = [sys.executable, "-c", _LAUNCHER, *command]
    done = subprocess.run(launcher, cwd=ROOT, check=False, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        msg = f"{command[0]}: got no start ({_last_line(done.stderr)}) · expected a command · check the name"
        raise LiteError(msg)
    returncode, seconds, peak = json.loads(done.stdout)
    if returncode:
        ended = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        raise LiteError(f"{ended}: {_last_line(done.stderr)}")
    # Linux counts in KiB, macOS in bytes.
    return ExportCost(seconds=seconds, peak_rss_bytes=peak if sys.platform == "darwin" else peak * 1024)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "it says nothing"


def export_command(row: Row, setting: Setting, out: Path) -> list[str]:
    """Return the command line of a row's export."""
    command = [sys.executable, "-m", "export", *row.options, "--quiet", "--device", setting.device]
    # What the exporter measures of itself, and refuses when it is too bad, it measures on films of this kind.
    command += ["--verify-data", str(setting.held_out)]
    if row.calibrated:
        command += ["--calibration-data", str(setting.calibration)]
    return [*command, "--checkpoint", str(setting.checkpoint), "--base", str(setting.base), "--out", str(out)]


def measure_rows(rows: Sequence[Row], setting: Setting) -> Iterator[Result]:
    """Export and measure each row, and first and always `REFERENCE`, which is none of them.

    Yields:
        The result of the reference, and that of each other row, in order. A row that fails does not stop the rest.

    Raises:
        LiteError: the reference cannot be exported or measured.
    """
    path = setting.artifacts / REFERENCE.name
    cost = measured_run(export_command(REFERENCE, setting, path))
    with take_reference(path, setting.held_out, name=REFERENCE.name, device=setting.device) as reference:
        yield Result(name=REFERENCE.name, cost=cost, figures=reference.figures)
        for row in rows:
            try:
                yield _measure_row(row, reference, setting)
            except LiteError as error:
                yield Result(name=row.name, error=str(error))


def _measure_row(row: Row, reference: Reference, setting: Setting) -> Result:
    path = setting.artifacts / row.name
    cost = measured_run(export_command(row, setting, path))
    loss = measure_loss(reference, path, name=row.name)
    if not setting.keep:
        shutil.rmtree(path)
    return Result(name=row.name, cost=cost, figures=loss.figures, loss=loss)


# -- Printing --------------------------------------------------------------------------------------------------------


def _cells(result: Result) -> tuple[str, ...]:
    if result.figures is None or result.cost is None:
        return (result.name, "failed", *("–",) * (len(LOSS_COLUMNS) + 1))
    took = f"{result.cost.seconds:.1f}", f"{result.cost.peak_rss_bytes / 1e6:,.0f}"
    return (result.name, *loss_cells(result.figures, result.loss), *took)


def format_table(results: Sequence[Result]) -> str:
    """Return finished rows as a markdown table, and below it why others have no figures."""
    table = markdown_table(("row", *LOSS_COLUMNS, "export s", "peak RSS MB"), [_cells(result) for result in results])
    failures = [f"- {result.name} failed: {result.error}" for result in results if result.error is not None]
    return "\n".join([table, *(["", *failures] if failures else [])])


def _provenance(results: Sequence[Result], command: str) -> str:
    artifacts = [f"{result.name} {result.figures.artifact_id}" for result in results if result.figures is not None]
    return "\n".join(
        [
            f"- Machine: {machine()}.",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.",
            f"- Command: `{command}`.",
            f"- Artifacts: {', '.join(artifacts)}.",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality formats",
        description="Export a checkpoint in every decoder format and print what each loses against fp16, as markdown.",
        epilog="exit status: 0 done, 1 a row failed or nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "--films", type=positive, default=NUM_FILMS, metavar="N", help="films to measure on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help="which ones (default: %(default)s)")
    parser.add_argument(
        "--calibration-films", type=positive, default=NUM_CALIBRATION_FILMS, metavar="N",
        help=f"films to calibrate on, always those of seed {CALIBRATION_SEED} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="a new folder that keeps films and artifacts (default: a temporary one, and each artifact goes when it "
        "has been measured)",
    )  # fmt: skip
    names = [row.name for row in (*ROWS, *ablation_rows())]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME",
        help=f"only these rows, beside fp16: {', '.join(names)}".replace("%", "%%"),
    )  # fmt: skip
    parser.add_argument("--ablation", action="store_true", help="a second table: what each trick of 4-bit GPTQ buys")
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT / "llava-rad-phantom", metavar="DIR",
        help="another LLaVA-Rad download (default: the demo's)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, default=CHECKPOINT / "base", metavar="DIR", help="its base model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser


def _print_row(result: Result) -> None:
    """Say on stderr that a row is finished: the tables come at the end."""
    line = f"{result.name}: failed: {result.error}"
    if result.cost is not None:
        line = f"{result.name}: exported in {result.cost.seconds:.1f} s"
    if result.loss is not None:
        line += f", KL {result.loss.divergence.mean_kl.value:.3g}"
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _chosen(arguments: argparse.Namespace) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return the rows of the first table and those of the ablation, without the reference."""
    only = arguments.only
    rows = tuple(row for row in ROWS if row != REFERENCE and (only is None or row.name in only))
    tricks = tuple(row for row in ablation_rows() if (arguments.ablation if only is None else row.name in only))
    return rows, tricks


def _run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    if arguments.seed == CALIBRATION_SEED:
        msg = (
            f"got --seed {arguments.seed}, the films to calibrate on · expected other films to measure on · "
            "choose another seed"
        )
        raise LiteError(msg)
    setting = Setting(
        checkpoint=arguments.checkpoint.resolve(),
        base=arguments.base.resolve(),
        held_out=write_studies(folder / "held-out", count=arguments.films, seed=arguments.seed, dicom=False),
        calibration=write_studies(
            folder / "calibration", count=arguments.calibration_films, seed=CALIBRATION_SEED, dicom=False
        ),
        artifacts=folder / "artifacts",
        device=arguments.device,
        keep=arguments.out is not None,
    )
    rows, tricks = _chosen(arguments)
    results: list[Result] = []
    for result in measure_rows([*rows, *tricks], setting):
        _print_row(result)
        results.append(result)
    split = 1 + len(rows)
    tables = {"formats": results[:split]} if rows or not tricks else {}
    if tricks:
        tables["ablation"] = [results[0], *results[split:]]
    films = (
        f"{arguments.films} films of seed {arguments.seed}; calibrated on {arguments.calibration_films} films of seed "
        f"{CALIBRATION_SEED}."
    )
    if arguments.json:
        values = {name: [to_json(result) for result in table] for name, table in tables.items()}
        about = {"films": films, "machine": machine(), "versions": versions(), "command": command}
        sys.stdout.write(f"{json.dumps(values | about, ensure_ascii=False, allow_nan=False)}\n")
    else:
        for table in tables.values():
            sys.stdout.write(f"{format_table(table)}\n\n")
        sys.stdout.write(f"{films}\n\n{COLUMNS_NOTE}\n\n{_provenance(results, command)}\n")
    return 1 if any(result.error is not None for result in results) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    command = shlex.join(
        ["python", "-m", "benchmarks", "quality", "formats", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        with contextlib.ExitStack() as stack:
            if arguments.out is not None:
                folder = arguments.out.resolve()
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantisation-")))
            return _run(arguments, folder, command)
    except LiteError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
