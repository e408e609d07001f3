"""`python -m benchmarks quality real`: its options, and what is done with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.quality.real.decoder import LlamaFolder
from benchmarks.quality.real.measure import Judge, measure
from benchmarks.quality.real.rows import DEFAULT, ways
from benchmarks.quality.real.smollm2 import GgufLlama, carried_file
from benchmarks.quality.real.table import cells_of, report
from benchmarks.quality.real.texts import read_blocks, sha256_of_blocks
from lite.console import say
from lite.engines.machine import check_device
from lite.errors import LiteError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks.quality.real.decoder import RealDecoder
    from benchmarks.quality.real.measure import Row
    from benchmarks.quality.real.rounding import Way
    from benchmarks.quality.real.texts import Block


BLOCK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is read, and which rows are measured."""

    block_tokens: int
    calibration_blocks: int
    evaluation_tokens: int
    rows: tuple[str, ...] | None = None  # the usual ones


WHOLE: Final = Extent(block_tokens=BLOCK_TOKENS, calibration_blocks=64, evaluation_tokens=20_480)
QUICK: Final = Extent(
    block_tokens=128,
    calibration_blocks=8,
    evaluation_tokens=1_024,
    rows=("rtn", "plain", "bnb-nf4", "q4_0"),
)


def open_decoder(model: Path | None) -> RealDecoder:
    """Open a Hugging Face folder, or else the decoder that is installed.

    Raises:
        LiteError: there is none, or not a plain Llama.
    """
    return GgufLlama(carried_file()) if model is None else LlamaFolder(model)


def run(arguments: argparse.Namespace, command: str) -> int:
    """Measure and print; return 1 when a row failed, else 0."""
    extent = QUICK if arguments.quick else WHOLE
    chosen = _chosen(ways(arguments.group_size, arguments.python), arguments.only or extent.rows)
    device = check_device(arguments.device)
    decoder = open_decoder(arguments.model)
    calibration, evaluation = read_blocks(
        decoder.encode,
        prefix=decoder.prefix,
        calibration=arguments.blocks or extent.calibration_blocks,
        evaluation=-(-(arguments.tokens or extent.evaluation_tokens) // extent.block_tokens),
        length=extent.block_tokens,
    )
    judge = Judge(decoder, evaluation, device)
    about = {
        "decoder": f"{decoder.name}, {decoder.config.num_hidden_layers} layers, perplexity {judge.perplexity:.2f}",
        "calibration": _described(calibration),
        "evaluation": _described(evaluation),
    }
    rows: list[Row] = []
    try:
        for row in measure(chosen, judge, calibration):
            say(" · ".join(cells_of(row)[:-1]) if row.judged else f"{row.name}: {row.error or row.skipped}")
            rows.append(row)
    except KeyboardInterrupt:  # hours of work may be in what is measured so far
        if rows:
            report(rows, about, command=f"{command} (interrupted)", as_json=arguments.json)
        raise
    return report(rows, about, command=command, as_json=arguments.json)


def _chosen(every: Sequence[Way], only: Sequence[str] | None) -> list[Way]:
    """Return the default and the ways of these names, or the usual ones."""
    names = [way.name for way in every]
    if unknown := [name for name in only or () if name not in names]:
        raise LiteError(f"got --only {unknown[0]} · expected some of {', '.join(names)} · name one of them")
    return [way for way in every if way.name == DEFAULT or (way.usual if only is None else way.name in only)]


def _described(blocks: Sequence[Block]) -> str:
    return f"{len(blocks)} blocks of {len(blocks[0])} tokens, sha256 {sha256_of_blocks(blocks)[:16]}…"
