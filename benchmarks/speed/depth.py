"""What all 32 layers would take, from fewer: `python -m benchmarks speed depth --layers 1 2 4`.

The real model does not fit every machine, and its weights are not here. So checkpoints of its widths with random
weights are written at several depths, exported by the exporter's command and measured by `python -m lite.bench`, each
as a user would do it. Decoder layers are all alike: what they take grows by the same for each, and a straight line
through the depths says what 32 take:

    figure(layers) = rest + layers × each

From three depths on, the deepest is also foretold from the others, and by how much that misses is printed: a line that
does not hold is seen. Every figure at 32 layers is computed, not measured, and is printed with a "~".
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.exports import measured_run
from benchmarks.speed.synthetic import MAX_LAYERS, NAME, write_checkpoint
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table
from lite.console import positive
from lite.errors import LiteError

ROOT: Final = Path(__file__).resolve().parents[2]
NUM_STUDIES: Final = 2
DECODERS: Final = ("fp16", "gptq-int4", "gptq-int8", "bnb-nf4", "bnb-int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A figure of a bench's row, in the unit it is printed in."""

    name: str
    read: Callable[[dict[str, Any]], float]


QUANTITIES: Final = (
    Quantity(name="artifact, GB", read=lambda row: row["disk_bytes"] / 1e9),
    Quantity(name="decoder in memory, GB", read=lambda row: row["plan"]["decoder_bytes"] / 1e9),
    Quantity(name="load, s", read=lambda row: row["load_s"]),
    Quantity(name="vision, s", read=lambda row: row["latency"]["vision"]["p50"]),
    Quantity(name="prefill, s", read=lambda row: row["latency"]["prefill"]["p50"]),
    Quantity(name="decode, ms/token", read=lambda row: 1e3 * row["latency"]["decode_token"]["p50"]),
    Quantity(name="peak memory, GB", read=lambda row: row["memory"]["decode_bytes"] / 1e9),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A figure as a straight line over the depth."""

    rest: float
    each: float
    missed: float | None  # by how much the line through the other depths misses the deepest, as a fraction of it

    def at(self, layers: int) -> float:
        """Return the figure at a depth."""
        return self.rest + layers * self.each


def fit(layers: Sequence[int], values: Sequence[float]) -> Line:
    """Put a straight line through figures at two depths or more, the deepest last."""
    each, rest = np.polyfit(layers, values, 1)
    missed = None
    if len(layers) > 2:
        other_each, other_rest = np.polyfit(layers[:-1], values[:-1], 1)
        missed = float((other_rest + layers[-1] * other_each) / values[-1] - 1)
    return Line(rest=float(rest), each=float(each), missed=missed)


def measure_depth(folder: Path, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """Write, export and bench a checkpoint of so many layers; return the bench's row. Nothing is left on disk.

    Raises:
        LiteError: a step failed; its last words are the message.
    """
    checkpoint, artifact, figures = folder / "checkpoint", folder / "artifact", folder / "bench.json"
    write_checkpoint(checkpoint, layers=layers, studies=NUM_STUDIES, even=True)
    export = [sys.executable, "-m", "export", "--checkpoint", checkpoint / NAME, "--base", checkpoint / "base"]
    export += ["--out", artifact, "--decoder", options.decoder, "--vision", options.vision]
    export += ["--verify-studies", "1", "--quiet"]
    if options.engine == "onnx":
        export += ["--engine", "onnx"]
    if options.decoder.startswith("gptq"):
        export += ["--method", "rtn"]  # bytes and time are those of any other way of rounding
    bench = [sys.executable, "-m", "lite.bench", artifact, "--data", checkpoint / "studies" / "studies.json"]
    bench += ["--runs", options.runs, "--max-new-tokens", options.new_tokens, "--batch-sizes", "1"]
    bench += ["--engine", options.engine, "--device", options.device, "--json", figures]
    try:
        measured_run([str(word) for word in export])
        measured_run([str(word) for word in bench])
        row: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))["rows"][0]
    finally:
        for path in (checkpoint, artifact):
            shutil.rmtree(path, ignore_errors=True)
    return row


def format_table(rows: dict[int, dict[str, Any]]) -> str:
    """Return the measured figures by depth, and what the line through them says of `MAX_LAYERS` layers."""
    depths = sorted(rows)
    header = ["", *(f"{depth} layer{'s' * (depth > 1)}" for depth in depths)]
    header += ["each layer", "the rest", f"{MAX_LAYERS} layers, computed", "the deepest foretold"]
    cells = []
    for quantity in QUANTITIES:
        values = [quantity.read(rows[depth]) for depth in depths]
        line = fit(depths, values)
        missed = "–" if line.missed is None else f"{line.missed:+.1%}"
        cells.append(
            (
                quantity.name,
                *(f"{value:.4g}" for value in values),
                f"{line.each:.3g}",
                f"{line.rest:.3g}",
                f"~{line.at(MAX_LAYERS):.4g}",
                missed,
            )
        )
    return markdown_table(header, cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed depth",
        description="Measure random weights of the real widths at a few depths; compute what all layers take.",
        epilog="exit status: 0 done, 1 it failed, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 2, 4], metavar="N", choices=range(1, MAX_LAYERS + 1),
        help="decoder layers, two depths or more (default: 1 2 4)",
    )  # fmt: skip
    parser.add_argument("--decoder", choices=DECODERS, default="gptq-int4", help="its format (default: %(default)s)")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch", help="onnx: of GPTQ (%(default)s)")
    parser.add_argument("--vision", choices=("fp32", "fp16", "int8"), default="fp32", help="the tower's (fp32)")
    parser.add_argument(
        "--runs", type=positive, default=4, metavar="N", help="studies of each depth (default: %(default)s)"
    )
    parser.add_argument(
        "--new-tokens", type=positive, default=16, metavar="N", help="tokens of a text (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the lines as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    depths = sorted(set(arguments.layers))
    if len(depths) < 2:
        parser.error("got one depth, expected two or more: one point gives no line")
    rows: dict[int, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="full-depth-") as folder:
            for depth in depths:
                sys.stderr.write(f"{depth} layer{'s' * (depth > 1)} ...\n")
                rows[depth] = measure_depth(Path(folder), depth, arguments)
    except (LiteError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    given = sys.argv[1:] if argv is None else argv
    sys.stdout.write(f"{format_table(rows)}\n\n")
    sys.stdout.write("~ computed from the line through the depths, not measured.\n")
    sys.stdout.write(f"- Machine: {machine()}.\n")
    sys.stdout.write(f"- Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.\n")
    sys.stdout.write(f"- Command: `{shlex.join(['python', '-m', 'benchmarks', 'full-depth', *given])}`.\n")
    if arguments.json is not None:
        lines = {
            quantity.name: fit(depths, [quantity.read(rows[depth]) for depth in depths]) for quantity in QUANTITIES
        }
        document = {
            "rows": {str(depth): row for depth, row in rows.items()},
            "kind": "computed",
            "lines": {
                name: {
                    "rest": line.rest,
                    "each": line.each,
                    "missed": line.missed,
                    str(MAX_LAYERS): line.at(MAX_LAYERS),
                }
                for name, line in lines.items()
            },
        }
        arguments.json.write_text(f"{json.dumps(document, indent=1)}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
