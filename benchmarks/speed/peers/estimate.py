"""What follows from the times of an engine: the real depth, modelled, and a draft from image to text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from benchmarks.speed.peers.measure import Row
from lite.bench.results import Missing, Quantiles

REAL_LAYERS: Final = 32
FINDINGS_TOKENS: Final = 100
"""Decoded for a draft, end to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a straight line through two depths says of the real one. Seconds; the first two are of what was run."""

    layer_s: float
    rest_s: float  # embedding, head, all that is there without layers
    modelled_s: float  # of REAL_LAYERS
    low_s: float  # the same through p20 of the deeper and p80 of the other
    high_s: float  # through p80 and p20


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An engine at the real depth, modelled."""

    decode: Line | Missing
    prefill: Line | Missing


def estimate(row: Row, num_layers: int) -> Estimate:
    """Continue the lines through the two depths that were timed to `REAL_LAYERS`."""
    fewer = row.shallow
    prefill: Line | Missing = Missing(why="no prefill was timed")
    if not isinstance(row.prefill, Missing) and fewer.prefill is not None:
        prefill = _line(fewer.num_layers, fewer.prefill, num_layers, row.prefill)
    return Estimate(decode=_line(fewer.num_layers, fewer.decode, num_layers, row.decode), prefill=prefill)


def _line(fewer: int, shallow: Quantiles, more: int, deep: Quantiles) -> Line | Missing:
    if fewer == more:
        return Missing(why="timed at one depth only: give it more --layers")
    layer_s = (deep.p50 - shallow.p50) / (more - fewer)
    if layer_s <= 0:
        layers = f"{more} layer{'' if more == 1 else 's'}"
        return Missing(why=f"noise: {deep.p50:.3g} s with {layers}, {shallow.p50:.3g} s with {fewer}")

    def at_real_depth(shallow_s: float, deep_s: float) -> float:
        # No further layers take less time than none.
        return deep_s + (REAL_LAYERS - more) * max(0.0, deep_s - shallow_s) / (more - fewer)

    return Line(
        layer_s=layer_s,
        rest_s=deep.p50 - more * layer_s,
        modelled_s=at_real_depth(shallow.p50, deep.p50),
        low_s=at_real_depth(shallow.p80, deep.p20),
        high_s=at_real_depth(shallow.p20, deep.p80),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What an engine takes, by medians; None where that was not measured. Less is better of each."""

    decode_s: float | None  # a token
    prefill_s: float | None
    end_to_end_s: float | None  # tower, prefill, FINDINGS_TOKENS
    peak_bytes: float | None = None


def measured_costs(row: Row, vision: Quantiles | None) -> Costs:
    """Return what a row takes with the layers it has.

    Args:
        row: an engine.
        vision: the tower's seconds, if it was timed.
    """
    prefill_s = None if isinstance(row.prefill, Missing) else row.prefill.p50
    end_to_end_s = _end_to_end_s(vision, prefill_s, row.decode.p50)
    return Costs(decode_s=row.decode.p50, prefill_s=prefill_s, end_to_end_s=end_to_end_s, peak_bytes=row.peak_bytes)


def modelled_costs(row: Row, num_layers: int, vision: Quantiles | None) -> Costs:
    """Return the same for `REAL_LAYERS`; the tower has all of its layers already."""
    found = estimate(row, num_layers)
    decode_s, prefill_s = (
        line.modelled_s if isinstance(line, Line) else None for line in (found.decode, found.prefill)
    )
    return Costs(decode_s=decode_s, prefill_s=prefill_s, end_to_end_s=_end_to_end_s(vision, prefill_s, decode_s))


def _end_to_end_s(vision: Quantiles | None, prefill_s: float | None, decode_s: float | None) -> float | None:
    if vision is None or prefill_s is None or decode_s is None:
        return None
    return vision.p50 + prefill_s + FINDINGS_TOKENS * decode_s
