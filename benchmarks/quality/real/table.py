"""What is printed: a line for each way to round, and what the figures depend on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from benchmarks.quality.compare import shown
from benchmarks.quality.real.rows import DEFAULT
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json

if TYPE_CHECKING:
    from benchmarks.quality.real.measure import Row
    from lite.eval.figures import Estimate

_HEADER: Final = (
    "row",
    "bits",
    "KL mean, nats/token",
    "median",
    "p99",
    "same top",
    "perplexity ratio",
    f"KL × {DEFAULT}",
    "seconds",
)
NOTE: Final = f"""\
KL(float32 ‖ rounded) on text that nothing was calibrated on. bits: a weight of the layers' linears, with scales and
zeros as the files hold them (a group of symmetric integers: 16 bits, and a zero). KL × {DEFAULT}: the ratio of the mean
KLs, both on the same blocks. seconds: of rounding and calibrating. [95 % interval over blocks]."""


def _interval(estimate: Estimate, digits: str) -> str:
    return f"{shown(estimate.value, digits)} [{shown(estimate.low, digits)}, {shown(estimate.high, digits)}]"


def cells_of(row: Row) -> tuple[str, ...]:
    """Return a line of the table."""
    judged = row.judged
    if judged is None:
        return (row.name, *["–"] * (len(_HEADER) - 1))
    divergence = judged.divergence
    return (
        row.name,
        f"{judged.bits:.2f}",
        _interval(divergence.mean_kl, "#.3g"),
        shown(divergence.median_kl.value, ".2g"),
        shown(divergence.p99_kl.value, ".3g"),
        f"{divergence.same_top.value:.1%}",
        shown(divergence.perplexity_ratio.value),
        "1" if judged.kl_ratio is None else _interval(judged.kl_ratio, "#.2g"),
        f"{judged.seconds:.0f}",
    )


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as a markdown table, and below it why some have no figures."""
    missing = [f"- {row.name} skipped: {row.skipped}" for row in rows if row.skipped is not None]
    missing += [f"- {row.name} failed: {row.error}" for row in rows if row.error is not None]
    return "\n".join([markdown_table(_HEADER, [*map(cells_of, rows)], left=1), *(["", *missing] if missing else [])])


def report(rows: Sequence[Row], about: Mapping[str, Any], *, command: str, as_json: bool) -> int:
    """Print rows and what they depend on, or all of it as one JSON object; return 1 when a row failed, else 0."""
    tell(to_json(list(rows)), f"{format_table(rows)}\n\n{NOTE}", about, command=command, as_json=as_json)
    return int(any(row.error is not None for row in rows))


def tell(rows: Any, table: str, about: Mapping[str, Any], *, command: str, as_json: bool) -> None:  # noqa: ANN401 - JSON
    """Print a table, or its rows as one JSON object, and what they depend on."""
    known: dict[str, Any] = {**about, "machine": machine(), "versions": versions(), "command": command}
    if as_json:
        sys.stdout.write(f"{json.dumps({'rows': rows, **known}, ensure_ascii=False, allow_nan=False)}\n")
        return
    known["versions"] = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = "\n".join(f"- {name.capitalize()}: {value}." for name, value in known.items())
    sys.stdout.write(f"{table}\n\n{lines}\n")
