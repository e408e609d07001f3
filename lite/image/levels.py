"""What the values of a film tell of themselves: how many grey levels there are, and what the scale is spent on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_BINS: Final = 1 << 16
_CHUNK: Final = 1 << 20  # values that are counted at a time: counting makes int64 of each


@dataclass(frozen=True, slots=True)
class Levels:
    """How often each value occurs, and how the edge of the film looks.

    Attributes:
        counts: int64 [levels], from the darkest value to the brightest; wide or broken values fall into 65,536 steps.
        shape: height and width in pixels.
        border: the share of the film that a frame of one single value takes; 0 without one.
        border_level: the place of that value in `counts`.
    """

    counts: NDArray[np.int64]
    shape: tuple[int, int]
    border: float = 0.0
    border_level: int = 0

    @property
    def num_levels(self) -> int:
        """Different values."""
        return int(np.count_nonzero(self.counts))

    @property
    def most_common(self) -> float:
        """The share of the commonest value."""
        return float(self.counts.max() / self.counts.sum())

    def spent(self, share: float) -> float:
        """Return how much of the scale is lost: to `share` of the values at each end and a border, or to one gap."""
        counts = self.counts.copy()
        if self.border and counts.sum() > counts[self.border_level]:
            counts[self.border_level] = 0
        total = np.cumsum(counts)
        low, high = np.searchsorted(total, (share * total[-1], (1 - share) * total[-1]))
        gap = int(np.diff(np.flatnonzero(self.counts)).max(initial=0))
        return max(1 - float(high - low) / max(len(counts) - 1, 1), gap / len(counts))


def count_levels(stored: NDArray[Any], *, monochrome1: bool = False) -> Levels:
    """Count the values of a film [H, W], integers or finite floats; high ones are dark where `monochrome1`."""
    low, high = stored.min(), stored.max()
    exact = stored.dtype.kind in "ui" and int(high) - int(low) < _BINS
    counts = np.zeros(int(high) - int(low) + 1 if exact else _BINS, np.int64)

    def levels(values: NDArray[Any]) -> NDArray[np.int64]:
        if exact:
            return values.astype(np.int64) - int(low)
        half = float(low) / 2  # halved: the span of float64 need not fit a float64
        place = (values.astype(np.float64) / 2 - half) / max(float(high) / 2 - half, np.finfo(np.float64).tiny)
        return (place * (_BINS - 1)).astype(np.int64)

    rows = max(1, _CHUNK // stored.shape[1])
    for top in range(0, len(stored), rows):
        counts += np.bincount(levels(stored[top : top + rows]).ravel(), minlength=len(counts))
    border = _border(stored)
    corner = int(levels(stored[:1, :1])[0, 0]) if border else 0
    if monochrome1:
        counts, corner = counts[::-1], len(counts) - 1 - corner
    return Levels(counts, stored.shape, border, corner)


def _border(stored: NDArray[Any]) -> float:
    """Return the share of the rows and columns along the edges that hold nothing but the corner's value."""
    height, width = stored.shape
    rows, columns = (stored != stored[0, 0]).any(axis=1), (stored != stored[0, 0]).any(axis=0)
    if not rows.any():
        return 0.0
    inner_rows = height - int(rows.argmax()) - int(rows[::-1].argmax())
    inner_columns = width - int(columns.argmax()) - int(columns[::-1].argmax())
    return float(1 - inner_rows * inner_columns / (height * width))
