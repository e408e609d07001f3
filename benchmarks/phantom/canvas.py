"""The surface a film is drawn on: anti-aliased shapes in the patient's frame, soft edges, smooth curves, noise.

Everything is drawn in the patient's frame: `across` runs from the midline, positive to the patient's left (the right of
the film), `down` from the top, both in film widths. One affine map places the patient on the film.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from lite.eval.labels import Side

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Mask = NDArray[np.uint8]
Sign = Literal[-1, 1]

RIGHT: Sign = -1
LEFT: Sign = 1
SIGNS: dict[Side, tuple[Sign, ...]] = {"right": (RIGHT,), "left": (LEFT,), "bilateral": (RIGHT, LEFT)}
_SUBPIXEL_BITS = 5


class Canvas:
    """Draws anti-aliased shapes given in the patient's frame onto uint8 layers of one film."""

    def __init__(self, size: int, *, rotation: float, scale: float, offset: tuple[float, float]) -> None:
        self.size = size
        cosine, sine = math.cos(rotation) * scale * size, math.sin(rotation) * scale * size
        # The patient turns about the middle of the chest, (0, 0.5).
        self._linear = np.array([[cosine, sine], [-sine, cosine]])
        self._origin = np.array([0.5 + offset[0], 0.5 + offset[1]]) * size - 0.5

    def blank(self) -> Mask:
        """Return an empty layer."""
        return np.zeros((self.size, self.size), np.uint8)

    def place(self, points: Points) -> Points:
        """Map points of the patient's frame to pixels."""
        return np.asarray((points - (0.0, 0.5)) @ self._linear + self._origin)

    def fill(self, layer: Mask, points: Points, value: int = 255) -> Mask:
        """Fill a polygon."""
        cv2.fillPoly(layer, [self._fixed(points)], (value,), cv2.LINE_AA, _SUBPIXEL_BITS)
        return layer

    def ribbon(self, layer: Mask, path: Points, width: float | Points, value: int = 255) -> Mask:
        """Fill a band of the given width, constant or per point, along a path."""
        return self.ribbons(layer, path[None], width, value)

    def ribbons(self, layer: Mask, paths: Points, widths: float | Points, value: int = 255) -> Mask:
        """Fill many bands: paths [n, points, 2], widths that broadcast to [n, points]."""
        along = np.empty_like(paths)
        along[:, 1:-1] = paths[:, 2:] - paths[:, :-2]
        along[:, 0], along[:, -1] = paths[:, 1] - paths[:, 0], paths[:, -1] - paths[:, -2]
        # Anti-aliasing spreads each edge outward by about 0.4 px; bands too thin for that turn faint instead.
        half = np.maximum(np.asarray(widths) / 2 - 0.4 / self.size, 0.1 / self.size)
        reach = half / np.maximum(np.sqrt(along[..., 0] ** 2 + along[..., 1] ** 2), 1e-9)
        side = along[..., ::-1] * (-1.0, 1.0) * reach[..., None]
        for outline in self._fixed(np.concatenate([paths + side, (paths - side)[:, ::-1]], axis=1)):
            cv2.fillPoly(layer, [outline], (value,), cv2.LINE_AA, _SUBPIXEL_BITS)
        return layer

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        return np.rint(self.place(points) * (1 << _SUBPIXEL_BITS)).astype(np.int32)

    def ellipse(
        self, layer: Mask, centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0, value: int = 255
    ) -> Mask:
        """Fill an ellipse, turned clockwise by `turn` radians."""
        return self.fill(layer, ellipse_points(centre, radii, turn), value)

    def soften(self, layer: Mask, sigma: float) -> Mask:
        """Blur a layer by a Gaussian of `sigma` film widths."""
        pixels = sigma * self.size
        if pixels < 2:
            return cast("Mask", _blur(layer, pixels))
        # A wide blur costs less on a smaller copy.
        factor = 2 ** int(math.log2(pixels))
        small = self.size // factor
        reduced = _blur(cv2.resize(layer, (small, small), interpolation=cv2.INTER_AREA), sigma * small)
        return cast("Mask", cv2.resize(reduced, (self.size, self.size), interpolation=cv2.INTER_LINEAR))


def noise(rng: np.random.Generator, cells: int, size: int) -> Floats:
    """Return Gaussian noise on a grid of `cells`, brought to `size` pixels."""
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    if cells < 32:  # a coarse grid must not show its facets
        grid = cast("Floats", cv2.resize(grid, (64, 64), interpolation=cv2.INTER_CUBIC))
    return cast("Floats", cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR))


def overlap(first: Mask, second: Mask) -> Mask:
    """Return what both masks cover."""
    return cast("Mask", cv2.min(first, second))


def union(first: Mask, second: Mask) -> Mask:
    """Return what either mask covers."""
    return cast("Mask", cv2.max(first, second))


def without(first: Mask, second: Mask) -> Mask:
    """Return what only the first mask covers."""
    return cast("Mask", cv2.subtract(first, second))


def _blur(layer: cv2.typing.MatLike, pixels: float) -> cv2.typing.MatLike:
    reach = 2 * math.ceil(2 * pixels) + 1
    return cv2.GaussianBlur(layer, (reach, reach), pixels, borderType=cv2.BORDER_REPLICATE)


def ellipse_points(centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0) -> Points:
    """Trace an ellipse, turned clockwise by `turn` radians."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x, y = radii[0] * np.cos(angle), radii[1] * np.sin(angle)
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([centre[0] + c * x - s * y, centre[1] + s * x + c * y], axis=1)


_STEPS = np.linspace(0, 1, 6, endpoint=False)
_CATMULL_ROM = np.stack([_STEPS**0, _STEPS, _STEPS**2, _STEPS**3], axis=1) @ (
    np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
)


@cache
def _spline(knots: int, *, closed: bool) -> Points:
    """Return the matrix that takes knots to the points of their Catmull-Rom spline."""
    identity = np.eye(knots)
    if closed:
        padded = np.concatenate([identity[-1:], identity, identity[:2]])
    else:
        first, last = 2 * identity[:1] - identity[1:2], 2 * identity[-1:] - identity[-2:-1]
        padded = np.concatenate([first, identity, last])
    rows = [_CATMULL_ROM @ padded[i : i + 4] for i in range(len(padded) - 3)]
    return np.concatenate(rows if closed else [*rows, identity[-1:]])


def curve(points: Sequence[tuple[float, float]] | Points, *, closed: bool = False) -> Points:
    """Run a smooth curve through knots [..., knots, 2]."""
    knots = np.asarray(points, np.float64)
    return _spline(knots.shape[-2], closed=closed) @ knots


def mirror(points: Points, sign: Sign) -> Points:
    """Return points that are given for the patient's left on the side `sign`."""
    return points * (sign, 1.0)
