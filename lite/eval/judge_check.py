"""What a judge sees of errors that are known: before its counts are believed, it counts these.

Pairs are results like any other, each with a "row" that says what is wrong: {"kind": "wrong side", "planted":
"incorrect_location"}; nothing is, where "planted" is null. `python -m benchmarks.phantom plant` writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lite.errors import LiteError
from lite.eval.chexprompt import ERRORS, Counts
from lite.studies.results import Result, read_results


class CheckRow(NamedTuple):
    """What the judge counted in the pairs of a kind."""

    kind: str
    num_pairs: int
    seen: list[int]  # pairs in which it counts any error of each of `ERRORS`
    exactly: int  # pairs in which it counts what was planted, once, and nothing else
    unscored: int


def read_planted(path: Path) -> list[Result]:
    """Read pairs.

    Raises:
        LiteError: no such file, or it holds something else.
    """
    pairs = read_results(path)
    if any(pair.prediction is None or pair.study.row.get("planted", "") not in (None, *ERRORS) for pair in pairs):
        msg = f"{path}: got results without planted errors · expected pairs that say in their row what is wrong"
        raise LiteError(f"{msg} · make them: python -m benchmarks.phantom plant PAIRS.jsonl")
    return pairs


def check_judge(
    pairs: Sequence[Result], judge: Callable[[Sequence[str], Sequence[str]], Sequence[Counts | None]]
) -> list[CheckRow]:
    """Let a judge count the errors of all pairs; return what it saw, kind by kind."""
    counts = judge([pair.study.reference for pair in pairs], [pair.prediction or "" for pair in pairs])
    found: dict[tuple[str, str | None], list[Counts | None]] = {}
    for pair, counted in zip(pairs, counts, strict=True):
        row = pair.study.row
        found.setdefault((str(row.get("kind")), row["planted"]), []).append(counted)
    rows = []
    for (kind, planted), of in found.items():
        totals = [tuple(map(sum, zip(*counted, strict=True))) for counted in of if counted is not None]
        seen = [sum(total[index] > 0 for total in totals) for index in range(len(ERRORS))]
        exactly = totals.count(tuple(int(name == planted) for name in ERRORS))
        rows.append(CheckRow(kind, len(of), seen, exactly, len(of) - len(totals)))
    return rows
