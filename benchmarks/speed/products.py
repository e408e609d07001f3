"""OpenVINO's 4-bit products beside ONNX Runtime's: `python -m benchmarks speed products`.

The four products of a layer, for few rows and for many, each library in a process of its own and in turns; OpenVINO
also with no more than AVX2, with activations in float32: told to round them, it gives arrays of no rows there
(2026.4.1). ONNX Runtime has no such switch, and goes on as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.speed.harness import Record, Report, Rounds, Row, in_turns, kept_apart, run_main, shown
from benchmarks.speed.peers.measure import start_worker
from benchmarks.speed.peers.process import SETTLE_S, Process
from benchmarks.speed.peers.specs import SPECS
from benchmarks.speed.weights import Shapes
from lite.bench.machine import streaming_read_bandwidth
from lite.console import positive
from lite.engines.cores import available_cores
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FIRST: Final = "ONNX Runtime"
LIBRARIES: Final = {
    FIRST: (replace(SPECS["lite onnx int4"], module="products", form="onnxruntime"), ()),
    "OpenVINO": (replace(SPECS["OpenVINO int4"], module="products", form="openvino"), ()),
    "OpenVINO, AVX2": (
        replace(SPECS["OpenVINO int4"], module="products", form="openvino float"),
        ("env", "ONEDNN_MAX_CPU_ISA=AVX2"),
    ),
}
ROWS: Final = (1, 2, 4, 8, 512, 1472)
_FEW: Final = 16
"""Rows up to which memory is what is waited for."""
_MAX_DIFFERENCE: Final = 0.02
"""Activations rounded to 8 bits by groups give 0.006."""


def products(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return the products of a layer, [out, in]."""
    hidden, inner = shapes.hidden_size, shapes.intermediate_size
    heads = shapes.num_attention_heads + 2 * shapes.num_key_value_heads
    return {
        "qkv": (heads * shapes.head_dim, hidden), "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden), "down": (hidden, inner),
    }  # fmt: skip


def measure(report: Report, loaded: Mapping[str, Process], shapes: Shapes, rows: Sequence[int], rounds: int) -> None:
    """Time all products in turns, and add them up to layers.

    Raises:
        LiteError: a library computes something else.
    """
    for num_rows in rows:
        layer: dict[str, list[list[float]]] = {name: [[0.0]] * rounds for name in loaded}
        for product, shape in products(shapes).items():
            for name, process in loaded.items():
                off = process.ask("far", shape=shape, num_rows=num_rows)["off"]
                if not off <= _MAX_DIFFERENCE:
                    raise LiteError(f"{name}, {product}: got {off:.2g} away from float32 · expected {_MAX_DIFFERENCE}")
            turns = {name: functools.partial(_turn, process, shape, num_rows) for name, process in loaded.items()}
            found = in_turns(turns, rounds)
            for name, seconds in found.items():
                _add(report, (f"{product} {shape[1]}→{shape[0]}", num_rows, name), seconds, found[FIRST], [shape])
                medians = map(statistics.median, [] if isinstance(seconds, str) else seconds)
                layer[name] = [[total[0] + one] for total, one in zip(layer[name], medians, strict=False)]
        for name, totals in layer.items():
            if totals:
                _add(report, ("a layer", num_rows, name), totals, layer[FIRST], [*products(shapes).values()])


def _turn(process: Process, shape: tuple[int, int], num_rows: int) -> list[float]:
    time.sleep(SETTLE_S)
    calls = 8 if num_rows <= _FEW else 1
    found: list[float] = process.ask("multiply", shape=shape, num_rows=num_rows, calls=calls)["seconds"]
    return found


def _add(
    report: Report,
    names: tuple[str, int, str],
    seconds: Rounds | str,
    first: Rounds | str,
    shapes: Sequence[tuple[int, int]],
) -> None:
    product, num_rows, library = names
    row = Row(names={"product": product, "rows": f"{num_rows}", "library": library}, against=FIRST)
    row.bandwidth = report.figures["bytes_per_s"]
    row.took(seconds, "" if library == FIRST else first)
    weights = sum(N * K for N, K in shapes)
    if num_rows <= _FEW:
        row.nbytes = weights // 2 + weights // 64  # a float16 of 128
    elif row.time is not None:
        row.cells["GOP/s"] = shown(2e-9 * num_rows * weights / row.time.p50)
    report.add(row)


def main(argv: Sequence[str] | None = None, shapes: Shapes | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed products",
        description="Time the 4-bit products of a layer by OpenVINO and by ONNX Runtime, in turns.",
        epilog="exit status: 0 done, 1 one failed, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--rows", type=positive, nargs="+", default=ROWS, metavar="M", help="(1 2 4 8 512 1472)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    threads = available_cores()
    parser.add_argument("--threads", type=positive, default=threads, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")

    def run(arguments: argparse.Namespace, record: Record) -> int:
        report = Report(title="4-bit products, groups of 128")
        report.figures["bytes_per_s"] = streaming_read_bandwidth("cpu")
        record.begin(f"{arguments.threads} threads, {arguments.rounds} rounds in turns.")
        with kept_apart(report), contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="products-")))
            loaded = {}
            about = {"threads": arguments.threads, "folder": f"{folder}", "vocab_size": 1, "max_seq_len": 1}
            for name, (spec, prefix) in LIBRARIES.items():
                log = folder / f"{name}.txt"
                loaded[name] = start_worker(spec, log=log, prefix=prefix, device="cpu", **about)
                stack.callback(loaded[name].close)
            measure(report, loaded, shapes or Shapes(), arguments.rows, arguments.rounds)
        record.add("products", report)
        return record.end()

    return run_main(parser, argv, run)
