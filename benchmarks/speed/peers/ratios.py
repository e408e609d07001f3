"""Our ONNX engine against llama.cpp in 4 bits: ratios of medians of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.speed.peers.estimate import REAL_LAYERS, Costs, measured_costs, modelled_costs
from benchmarks.speed.peers.measure import Measured, Row

OURS: Final = ("lite onnx int4", "lite onnx int4 int8-cache")
THEIRS: Final = ("llama.cpp Q4_0", "llama.cpp Q4_0 flash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """One of our engines at one depth; None where a side has no figure."""

    name: str
    num_layers: int
    modelled: bool
    decode: float | None  # our tokens/s over theirs: more is better
    prefill: float | None
    end_to_end: float | None  # their seconds over ours
    peak: float | None  # our bytes over theirs: less is better


def against_llama_cpp(measured: Measured, num_layers: int) -> list[Ratios]:
    """Compare what was run, and what is modelled for the real depth, as far as both sides are there.

    Each figure stands against the better one of llama.cpp's, whichever setting that comes from.
    """
    rows = {row.name: row for row in measured.rows if isinstance(row, Row)}
    ours, theirs = ([rows[name] for name in names if name in rows] for names in (OURS, THEIRS))
    if not theirs:
        return []
    vision = measured.vision
    best = _best([measured_costs(row, vision) for row in theirs])
    best_modelled = _best([modelled_costs(row, num_layers, vision) for row in theirs])
    found: list[Ratios] = []
    for row in ours:
        found.append(_ratios(row, num_layers, measured_costs(row, vision), best))
        modelled = _ratios(row, REAL_LAYERS, modelled_costs(row, num_layers, vision), best_modelled, modelled=True)
        if modelled.decode is not None or modelled.prefill is not None:
            found.append(modelled)
    return found


def _best(costs: Sequence[Costs]) -> Costs:
    """Return the least of each."""
    return Costs(
        decode_s=_least(one.decode_s for one in costs),
        prefill_s=_least(one.prefill_s for one in costs),
        end_to_end_s=_least(one.end_to_end_s for one in costs),
        peak_bytes=_least(one.peak_bytes for one in costs),
    )


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _ratios(row: Row, num_layers: int, ours: Costs, theirs: Costs, *, modelled: bool = False) -> Ratios:
    return Ratios(
        name=row.name,
        num_layers=num_layers,
        modelled=modelled,
        decode=_times(theirs.decode_s, ours.decode_s),
        prefill=_times(theirs.prefill_s, ours.prefill_s),
        end_to_end=_times(theirs.end_to_end_s, ours.end_to_end_s),
        peak=_times(ours.peak_bytes, theirs.peak_bytes),
    )


def _times(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit
