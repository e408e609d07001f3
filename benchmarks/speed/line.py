"""What 32 layers would take, from fewer: decoder layers are all alike, so a straight line through two depths or more.

    figure(layers) = rest + layers × each

Whatever is said in this way was computed, not measured, and is printed with a "~".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

REAL_LAYERS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A figure as a straight line over the depth."""

    rest: float  # what is there without layers
    each: float
    missed: float | None  # by how much the line through the other depths misses the deepest, as a fraction of it

    def at(self, layers: int) -> float:
        """Return the figure at a depth."""
        return self.rest + layers * self.each


def fit(layers: Sequence[int], values: Sequence[float]) -> Line:
    """Put a straight line through figures at two depths or more, the deepest last."""
    if len(layers) == 2:
        each = (values[1] - values[0]) / (layers[1] - layers[0])
        return Line(rest=values[1] - layers[1] * each, each=each, missed=None)
    each, rest = np.polyfit(layers, values, 1)
    missed = fit(layers[:-1], values[:-1]).at(layers[-1]) / values[-1] - 1
    return Line(rest=float(rest), each=float(each), missed=missed)
