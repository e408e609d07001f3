"""What all 32 layers would take, from fewer: `python -m benchmarks speed depth --layers 1 2 4`.

The real model does not fit every machine, and its weights are not here. So checkpoints of its widths with random
weights are written at several depths, exported by the exporter's command and measured by `python -m lite.bench`, each
as a user would do it. Layers are all alike, so a straight line goes through the depths:

    figure(layers) = rest + layers × each

Whatever is said in this way was computed, not measured, and is printed with a "~". From three depths on, the deepest is
also foretold from the others, and by how much that misses is printed: a line that does not hold is seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from sys import executable
from typing import Any, Final

from benchmarks.exports import measured_run
from benchmarks.speed.harness import NONE, Record, Report, run_main, shown
from benchmarks.speed.synthetic import REAL_LAYERS, export_checkpoint, write_checkpoint
from lite.console import positive, say

NUM_STUDIES: Final = 2
DECODERS: Final = ("fp16", "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8")
QUANTITIES: Final[dict[str, Callable[[dict[str, Any]], float]]] = {
    "artifact, GB": lambda row: row["disk_bytes"] / 1e9,
    "decoder in memory, GB": lambda row: row["plan"]["decoder_bytes"] / 1e9,
    "load, s": lambda row: row["load_s"],
    "vision, s": lambda row: row["latency"]["vision"]["p50"],
    "prefill, s": lambda row: row["latency"]["prefill"]["p50"],
    "decode, ms/token": lambda row: 1e3 * row["latency"]["decode_token"]["p50"],
    "peak memory, GB": lambda row: row["memory"]["decode_bytes"] / 1e9,
}
"""Figures of a bench's row, in the units that they are printed in."""


def at(num_layers: int, layers: Sequence[int], values: Sequence[float]) -> float:
    """Return what the line through figures says of another depth."""
    each, rest = statistics.linear_regression(layers, values)
    return rest + num_layers * each


def measure_depth(folder: Path, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write, export and bench a checkpoint of so many layers; return the bench's row. Nothing is left on disk.

    Raises:
        LiteError: a step failed; its last words are the message.
    """
    checkpoint, artifact, figures = folder / "checkpoint", folder / "artifact", folder / "bench.json"
    write_checkpoint(checkpoint, layers=layers, studies=NUM_STUDIES)
    export = ["--decoder", options.decoder, "--vision", options.vision]
    if options.engine == "onnx":
        export += ["--engine", "onnx"]
    if options.decoder.startswith("gptq"):
        export += ["--method", "rtn"]  # bytes and time are those of any other way of rounding
    bench = [executable, "-m", "lite.bench", artifact, "--data", checkpoint / "studies" / "studies.json"]
    bench += ["--runs", options.runs, "--max-new-tokens", options.new_tokens, "--batch-sizes", "1"]
    bench += ["--engine", options.engine, "--device", options.device, "--json", figures]
    try:
        export_checkpoint(checkpoint, artifact, *export)
        measured_run([str(word) for word in bench])
        row: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))["rows"][0]
    finally:
        for path in (checkpoint, artifact):
            shutil.rmtree(path, ignore_errors=True)
    return row


def report_of(rows: dict[int, dict[str, Any]]) -> Report:
    """Return the measured figures by depth, and what the line through them says of the real depth."""
    report, depths = Report(title=f"{REAL_LAYERS} layers, computed from fewer"), sorted(rows)
    report.notes.append("~ computed from the line through the depths, not measured.")
    report.figures |= {"kind": "computed", "benches": {str(depth): row for depth, row in rows.items()}, "lines": {}}
    for name, read in QUANTITIES.items():
        values = [read(rows[depth]) for depth in depths]
        each, rest = statistics.linear_regression(depths, values)
        real = at(REAL_LAYERS, depths, values)
        missed = at(depths[-1], depths[:-1], values[:-1]) / values[-1] - 1 if len(depths) > 2 else None
        report.figures["lines"][name] = {"each": each, "rest": rest, "missed": missed, str(REAL_LAYERS): real}
        report.lines.append(
            {
                "": name,
                **{f"{depth} layers": shown(value) for depth, value in zip(depths, values, strict=True)},
                "each layer": shown(each),
                "the rest": shown(rest),
                f"{REAL_LAYERS} layers, computed": f"~{shown(real)}",
                "the deepest foretold": NONE if missed is None else f"{missed:+.1%}",
            }
        )
    return report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed depth",
        description="Measure random weights of the real widths at a few depths; compute what all layers take.",
        epilog="exit status: 0 done, 1 it failed, 2 wrong use, 130 interrupted.",
    )
    add, depths = parser.add_argument, range(1, REAL_LAYERS + 1)
    add("--layers", type=int, nargs="+", default=[1, 2, 4], metavar="N", choices=depths, help="2 or more (1 2 4)")
    add("--decoder", choices=DECODERS, default="gptq-int4", help="its format (default: %(default)s)")
    add("--engine", choices=("torch", "onnx"), default="torch", help="onnx: of GPTQ (default: %(default)s)")
    add("--vision", choices=("fp32", "fp16", "int8"), default="fp32", help="the tower's (default: %(default)s)")
    add("--runs", type=positive, default=4, metavar="N", help="studies of each depth (default: %(default)s)")
    add("--new-tokens", type=positive, default=16, metavar="N", help="tokens of a text (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the rows and the lines as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()

    def run(arguments: argparse.Namespace, record: Record) -> int:
        depths = sorted(set(arguments.layers))
        if len(depths) < 2:
            parser.error("got one depth, expected two or more: one point gives no line")
        rows: dict[int, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory(prefix="depth-") as folder:
            for depth in depths:
                say(f"{depth} layers …")
                rows[depth] = measure_depth(Path(folder), depth, arguments)
        record.begin()
        record.add("depth", report_of(rows))
        return record.end()

    return run_main(parser, argv, run)
