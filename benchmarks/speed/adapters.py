"""What an adapter costs a token: `python -m benchmarks speed adapters ARTIFACT`.

One film after noise, one token after the other, by the same artifact without adapters, with one that no row uses, with
one that is used, and with all of them loaded. They take turns. What each reads is counted beside its time: a token
waits for memory, so an adapter should cost what it adds to that. `benchmarks synthetic` and `export --keep-lora` make
an artifact of the real widths with an adapter of rank 64.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed.engine import Rows, random_prompt
from benchmarks.speed.harness import Clock, Record, Report, Row, in_turns, kept_apart, run_main, shown
from lite.artifact.open import Artifact, load_artifact
from lite.bench.machine import streaming_read_bandwidth
from lite.console import positive
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.protocol import NO_ADAPTER
from lite.errors import LiteError
from lite.memory.counts import ITEMSIZE, cache_bytes_per_token, onnx_adapter_bytes, onnx_read_bytes
from lite.memory.process import use_large_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.artifact.parts import CacheDtype

NONE_LOADED: Final = "none loaded"
BAR: Final = 1.08
"""Times a token without adapters, with one of `BAR_RANK` or more and the real widths."""
BAR_RANK: Final = 64


def measure(report: Report, artifact: Artifact, arguments: argparse.Namespace) -> None:
    """Time tokens in turns.

    Raises:
        LiteError: the artifact has no adapter, or none that the onnx engine could use.
    """
    parts = artifact.manifest.parts.adapters
    if not parts:
        msg = f"{artifact.path}: got no adapter · expected one to measure"
        raise LiteError(f"{msg} · export with --keep-lora, or add one: python -m export adapter")
    names, cache_dtype = tuple(parts), arguments.cache_dtype
    first = names[:1]
    asked: dict[str, tuple[tuple[str, ...], int]] = {
        NONE_LOADED: ((), NO_ADAPTER),
        f"{first[0]} loaded, not used": (first, NO_ADAPTER),
        first[0]: (first, 0),
    }
    if names[1:]:
        asked[f"{first[0]}, {len(names)} loaded"] = names, 0
    rows = {what: _rows(artifact, loaded, slot, arguments) for what, (loaded, slot) in asked.items()}
    use_large_pages()
    turns = {
        what: functools.partial(_tokens, one, arguments.prompt_tokens, arguments.tokens) for what, one in rows.items()
    }
    found = in_turns(turns, arguments.rounds)
    config, graph = artifact.decoder_config(), artifact.onnx_part(cache_dtype)
    itemsize = ITEMSIZE[graph.dtype]
    cached = arguments.rows * arguments.prompt_tokens * cache_bytes_per_token(
        config, itemsize=1 if cache_dtype == "int8" else itemsize
    )  # fmt: skip
    weights = onnx_read_bytes(config, graph) + cached
    for what, (loaded, _) in asked.items():
        factors = onnx_adapter_bytes(config, [parts[name].rank for name in loaded], itemsize=itemsize)
        row = Row(names={"adapters": what}, against=NONE_LOADED, nbytes=weights + factors)
        row.bandwidth = report.figures["bytes_per_s"]
        row.took(found[what], "" if what == NONE_LOADED else found[NONE_LOADED])
        row.cells["more bytes"] = f"{factors / weights:.1%}"
        report.add(row)
    used = report.rows[2]
    rank = parts[first[0]].rank
    if used.ratio is not None and rank >= BAR_RANK:
        report.bar(f"rank {rank}: {used.ratio.p50:.3f} times a token without", f"{BAR}", is_met=used.ratio.p50 <= BAR)


def _rows(artifact: Artifact, loaded: Sequence[str], slot: int, arguments: argparse.Namespace) -> Rows:
    """Load a decoder with adapters, and read a prompt by one of them into every row."""
    decoder = OnnxDecoder(artifact, cache_dtype=arguments.cache_dtype, adapters=loaded)
    rows = Rows(decoder, arguments.rows, arguments.prompt_tokens + arguments.tokens + 4)
    for row in range(arguments.rows):
        rows.read(random_prompt(decoder.config, arguments.prompt_tokens), row, adapter=slot)
    rows.warm_up(arguments.prompt_tokens)
    return rows


def _tokens(rows: Rows, start: int, count: int) -> list[float]:
    clock = Clock()
    rows.rewind(start)
    rows.decode()
    rows.wait()
    clock.mark()
    for _ in range(count):
        rows.decode()
        rows.wait()
        clock.mark()
    return clock.seconds()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed adapters",
        description="Time a token of the onnx engine without adapters, and with one that is used or is not.",
        epilog="exit status: 0 done, 1 it failed or costs too much, 2 wrong use, 130 interrupted.",
    )
    add: Any = parser.add_argument
    add("artifact", metavar="ARTIFACT", help="with decoder.onnx and an adapter")
    add("--cache-dtype", choices=("int8",), help="(default: that of the activations)")
    add("--rows", type=positive, default=1, metavar="N", help="decoded together (default: %(default)s)")
    add("--prompt-tokens", type=positive, default=1450, metavar="N", help="(default: %(default)s)")
    add("--tokens", type=positive, default=4, metavar="N", help="of a turn (default: %(default)s)")
    add("--rounds", type=positive, default=15, metavar="N", help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything to a JSON file, too")

    def run(arguments: argparse.Namespace, record: Record) -> int:
        artifact = load_artifact(arguments.artifact)
        cache_dtype: CacheDtype = arguments.cache_dtype or artifact.onnx_part(None).dtype
        report = Report(title=f"Adapters, {artifact.decoder_config().num_hidden_layers} layers, cache {cache_dtype}")
        report.figures["bytes_per_s"] = streaming_read_bandwidth("cpu")
        record.begin(
            f"{arguments.rows} rows of {arguments.prompt_tokens} tokens, {arguments.rounds} rounds in turns, "
            f"streaming read {shown(report.figures['bytes_per_s'] / 1e9)} GB/s."
        )
        with kept_apart(report):
            measure(report, artifact, arguments)
        record.add("adapters", report)
        return record.end()

    return run_main(parser, argv, run)
