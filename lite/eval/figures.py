"""Figures: an estimate with its interval, times as quantiles, and what stands where a figure is missing.

An estimate comes with a bootstrap interval: the studies are drawn again with replacement, 500 times, and the middle
95 % of the results is the interval. Every figure is a function of sums over studies (of true positives, of matched
n-grams, of lengths), so each study is measured once and a resample only adds rows of a small table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure, its 95 % bootstrap interval, and how many cases it was measured on."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Stands where a figure would be."""

    why: str  # a few words for a table's cell: "not installed", "no reference"
    todo: str = ""  # how to get it, a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """How long something took, in seconds, over `count` times."""

    p20: float
    p50: float
    p80: float
    p90: float
    p99: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """A figure before it is one: what each study adds to each of k sums, and the figure as a function of these.

    Rows of two systems about the same studies can be exchanged or drawn together: see `lite.eval.paired`.
    """

    per_study: Floats  # [num_studies, k]
    statistic: Callable[[Floats], Floats]  # sums [n, k] to figures [n], row by row
    count: int | None = None  # what it was measured on; the number of studies when None
    lower_is_better: bool = False
    own_cases: bool = (
        False  # what it is measured on is up to the system: the findings that it shares with the reference
    )

    def estimate(self) -> Estimate:
        """Return the figure with its interval."""
        return bootstrap_interval(self.per_study, self.statistic, count=self.count)


def quantiles(values: Sequence[float]) -> Quantiles:
    """Summarise how long something took: at least one value."""
    p20, p50, p80, p90, p99 = np.percentile(values, (20, 50, 80, 90, 99)).tolist()
    return Quantiles(p20=p20, p50=p50, p80=p80, p90=p90, p99=p99, count=len(values))


def bootstrap_interval(
    per_study: Floats,
    statistic: Callable[[Floats], Floats],
    *,
    count: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Measure `statistic` on all studies, with the middle 95 % of its values on resampled ones.

    Resamples on which the statistic is undefined (NaN) are left out of the interval.

    Args:
        per_study: [num_studies, k], what each study adds to each of k sums.
        statistic: maps sums [n, k] to figures [n], row by row.
        count: what the estimate says it was measured on; the number of studies when not given.
        resamples: how many times the studies are drawn again, with replacement.
        seed: the same seed draws the same studies, whatever the statistic.
    """
    num_studies = len(per_study)
    rng = np.random.default_rng(seed)
    sums = np.empty((1 + resamples, per_study.shape[1]))
    sums[0] = per_study.sum(axis=0)
    for row in range(1, 1 + resamples):
        sums[row] = np.bincount(rng.integers(num_studies, size=num_studies), minlength=num_studies) @ per_study
    figures = statistic(sums)
    resampled = figures[1:][~np.isnan(figures[1:])]
    low, high = np.percentile(resampled, (2.5, 97.5)) if resampled.size else (np.nan, np.nan)
    return Estimate(
        value=float(figures[0]), low=float(low), high=float(high), count=num_studies if count is None else count
    )


def ratio(part: Floats, whole: Floats) -> Floats:
    """Divide, NaN where there is nothing to divide by."""
    divided: Floats = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return divided


def mean_sums(values: Sequence[float]) -> Sums:
    """Average one value a study."""
    return Sums(per_study=np.array([[value, 1.0] for value in values]), statistic=lambda sums: sums[:, 0] / sums[:, 1])


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Average one value a study, with the interval."""
    return mean_sums(values).estimate()


def f1(counts: Floats) -> Floats:
    """Turn true positives, false positives and false negatives [..., 3] into F1 [...], NaN where there are none."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    return ratio(2 * tp, 2 * tp + fp + fn)


def check_paired(references: Sequence[object], predictions: Sequence[object]) -> None:
    """Require one prediction for each reference, and at least one.

    Raises:
        ValueError: there are not.
    """
    if len(references) != len(predictions) or not references:
        msg = (
            f"got {len(references)} references and {len(predictions)} predictions · expected one prediction for each "
            "reference, and at least one · pass them in the same order"
        )
        raise ValueError(msg)
