"""Two systems on the same studies: how far apart they are, and whether that could be chance.

    paired bootstrap        the same studies are drawn for both; the interval is that of the difference
    paired randomisation    were the two alike, each study's results could be either's: they are exchanged in every
                            study by a coin, and p is how often the difference becomes at least as large as it is

A figure is a function of sums over studies, so whole rows of sums change hands: F1 of pooled counts is tested as
itself, not as a mean of F1s. Where a system decides by its text what a figure is measured on (the side of findings that
it shares with the reference), only the studies in which both have something are exchanged: that the one finds more is
another figure's business. Up to 12 studies all exchanges are made, and p is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from lite.eval.figures import Estimate, Floats, Sums, bootstrap_interval

EXCHANGES: Final = 4_999
EXACT_STUDIES: Final = 12
SIGNIFICANT: Final = 0.05
# Sums that are added in another order differ in their last digits.
_ROUNDING: Final = 1e-12
_AT_A_TIME: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of a system and of another one, on the same studies."""

    value: Estimate
    other: Estimate
    difference: Estimate  # value - other
    p_value: float  # two-sided; NaN where there is nothing to compare
    better: int  # studies on which the system is better than the other, each measured by itself
    worse: int
    same: int
    undefined: int  # studies on which one of the two has nothing to measure
    verdict: Literal["better", "worse", "no difference"]  # the first two where p < 0.05


def compare(system: Sums, other: Sums) -> Comparison:
    """Compare one figure of two systems, study by study in the same order."""
    k = system.per_study.shape[1]
    both = np.hstack([system.per_study, other.per_study])
    difference = bootstrap_interval(both, lambda sums: system.statistic(sums[:, :k]) - other.statistic(sums[:, k:]))
    sign = -1.0 if system.lower_is_better else 1.0
    gains = sign * (system.statistic(system.per_study) - other.statistic(other.per_study))
    rows = ~np.isnan(gains) if system.own_cases else np.ones(len(gains), dtype=bool)
    p_value = _randomisation(replace(system, per_study=system.per_study[rows]), other.per_study[rows])
    sided: Literal["better", "worse"] = "better" if sign * difference.value > 0 else "worse"
    return Comparison(
        value=system.estimate(),
        other=other.estimate(),
        difference=difference,
        p_value=p_value,
        better=int((gains > _ROUNDING).sum()),
        worse=int((gains < -_ROUNDING).sum()),
        same=int((np.abs(gains) <= _ROUNDING).sum()),
        undefined=int(np.isnan(gains).sum()),
        verdict=sided if p_value < SIGNIFICANT else "no difference",
    )


def _randomisation(system: Sums, other: Floats, *, seed: int = 0) -> float:
    """Return the share of exchanges after which the figures are as far apart as they are, the actual one included."""
    num_studies = len(system.per_study)
    change = other - system.per_study
    sums = system.per_study.sum(axis=0), other.sum(axis=0)

    def distance(exchanged: Floats) -> Floats:
        moved = exchanged @ change
        apart: Floats = np.abs(system.statistic(sums[0] + moved) - system.statistic(sums[1] - moved))
        return apart

    actual = float(distance(np.zeros((1, num_studies)))[0])
    if np.isnan(actual):
        return float("nan")
    drawn = np.concatenate([distance(coins) for coins in _coins(num_studies, seed)])
    drawn = drawn[~np.isnan(drawn)]
    actual_too = int(num_studies > EXACT_STUDIES)  # among all exchanges it is one already
    return (actual_too + int((drawn >= actual - _ROUNDING).sum())) / (actual_too + len(drawn))


def _coins(num_studies: int, seed: int) -> Iterator[Floats]:
    """Yield which studies are exchanged, 1 or 0, some rows at a time: all ways, or `EXCHANGES` of them."""
    if num_studies <= EXACT_STUDIES:
        yield (np.arange(2**num_studies)[:, None] >> np.arange(num_studies) & 1).astype(np.float64)
        return
    rng = np.random.default_rng(seed)
    for start in range(0, EXCHANGES, _AT_A_TIME):
        yield rng.integers(2, size=(min(_AT_A_TIME, EXCHANGES - start), num_studies)).astype(np.float64)
