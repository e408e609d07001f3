"""Synthetic frontal chest films: a study's findings drawn into a thorax, as a 12-bit radiograph.

A film is a map of what the beam met on its way. Soft tissue is laid down first, the air of the lungs is taken out
of it, whatever displaces that air (heart, mediastinum, diaphragm, and most findings) puts density back, and bones
and metal are added on top. A film curve turns the sum into stored values.

Everything is drawn in the patient's frame: `across` runs from the midline, positive to the patient's left (the
right of the film), `down` from the top, both in film widths. One affine map places the patient on the film, so any
size gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.findings import DRAWN_LABELS, Finding, Study
from lite.eval.labels import Label, Side, Size, Zone

REGION_GRID = 32
"""Cells along each side of `Film.regions`."""
WHITE = 4095
"""Largest stored value of a 12-bit film."""

_Floats = NDArray[np.float32]
_Points = NDArray[np.float64]
_Mask = NDArray[np.uint8]
_Sign = Literal[-1, 1]

_RIGHT: _Sign = -1
_LEFT: _Sign = 1
_SIGNS: dict[Side, tuple[_Sign, ...]] = {"right": (_RIGHT,), "left": (_LEFT,), "bilateral": (_RIGHT, _LEFT)}
_SUBPIXEL_BITS = 5
_RIBS = 10
_DOME_RISE = 0.05
_SMALLEST_DRAWN = 200
# Depth of each zone's centre, as a fraction of the way from the lung's apex to its dome.
_ZONE_DEPTH: dict[Zone, float] = {"upper": 0.25, "mid": 0.52, "lower": 0.78}
_CARDIOTHORACIC_RATIO: dict[Size, float] = {"small": 0.56, "moderate": 0.635, "large": 0.715}
_VESSEL_SWELLING: dict[Size, float] = {"small": 1.3, "moderate": 1.55, "large": 1.8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One drawn film.

    Attributes:
        stored: uint16 [size, size], 12 bits used, bright = dense (MONOCHROME2).
        regions: bool [len(DRAWN_LABELS), 32, 32], the cells of the film in which each label's findings show.
    """

    stored: NDArray[np.uint16]
    regions: NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class _Anatomy:
    """Where things are in one patient, in the patient's frame. Findings that move organs change it before drawing."""

    apex: float
    half_width: float
    dome: dict[_Sign, float]
    angle: dict[_Sign, float]
    heart_ratio: float
    mediastinum: float
    shift: float
    carina: float
    hilum: dict[_Sign, float]
    rib_pitch: float
    clavicle: float
    scapula: float
    vessel_swelling: float = 1.0
    broken_ribs: list[_BrokenRib] = field(default_factory=list)

    def wall(self, down: float | _Points) -> _Points:
        """Return the half width of the lungs at a depth."""
        outline = self.wall_points()
        return np.asarray(np.interp(down, outline[:, 1], outline[:, 0]))

    def wall_points(self) -> _Points:
        """Return the outline of a lung from the apex to the costophrenic angle, as (across, down) with across > 0."""
        return _WALL * (self.half_width, self._height()) + (0.0, self.apex)

    def depth(self, sign: _Sign, zone: Zone) -> float:
        """Return the depth of the centre of a lung zone."""
        return self.apex + _ZONE_DEPTH[zone] * (self.dome[sign] - self.apex)

    def beside_heart(self, sign: _Sign, down: float, across: float, reach: float) -> float:
        """Move something of half width `reach` outward until it clears a left heart border, if the chest allows."""
        if sign == _RIGHT or down < self.carina + 0.12:
            return across
        border = 0.67 * self.heart_ratio * 2 * self.half_width
        return max(across, min(border + 0.5 * reach, float(self.wall(down)) - reach))

    def _height(self) -> float:
        return max(self.angle.values()) - self.apex


@dataclass(frozen=True, slots=True, kw_only=True)
class _BrokenRib:
    """A posterior rib arc with a step-off at `along` (0 spine, 1 chest wall)."""

    sign: _Sign
    index: int
    along: float
    step: float


# The chest wall: half widths (× half_width) at depths (× lung height), apex first.
_WALL = np.array(
    [(0.36, 0.0), (0.52, 0.03), (0.66, 0.11), (0.78, 0.22), (0.87, 0.36), (0.94, 0.52), (0.985, 0.70), (1.0, 0.86),
     (0.99, 1.0)]
)  # fmt: skip


class _Canvas:
    """Draws anti-aliased shapes given in the patient's frame onto uint8 layers of one film."""

    def __init__(self, size: int, *, rotation: float, scale: float, offset: tuple[float, float]) -> None:
        self.size = size
        cosine, sine = math.cos(rotation) * scale * size, math.sin(rotation) * scale * size
        # The patient turns about the middle of the chest, (0, 0.5).
        self._linear = np.array([[cosine, sine], [-sine, cosine]])
        self._origin = np.array([0.5 + offset[0], 0.5 + offset[1]]) * size - 0.5

    def blank(self) -> _Mask:
        """Return an empty layer."""
        return np.zeros((self.size, self.size), np.uint8)

    def place(self, points: _Points) -> _Points:
        """Map points of the patient's frame to pixels."""
        return np.asarray((points - (0.0, 0.5)) @ self._linear + self._origin)

    def fill(self, layer: _Mask, points: _Points, value: int = 255) -> _Mask:
        """Fill a polygon."""
        cv2.fillPoly(layer, [self._fixed(points)], (value,), cv2.LINE_AA, _SUBPIXEL_BITS)
        return layer

    def ribbon(self, layer: _Mask, path: _Points, width: float | _Points, value: int = 255) -> _Mask:
        """Fill a band of the given width, constant or per point, along a path."""
        return self.ribbons(layer, path[None], width, value)

    def ribbons(self, layer: _Mask, paths: _Points, widths: float | _Points, value: int = 255) -> _Mask:
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

    def _fixed(self, points: _Points) -> NDArray[np.int32]:
        return np.rint(self.place(points) * (1 << _SUBPIXEL_BITS)).astype(np.int32)

    def ellipse(
        self, layer: _Mask, centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0, value: int = 255
    ) -> _Mask:
        """Fill an ellipse, turned clockwise by `turn` radians."""
        return self.fill(layer, _ellipse(centre, radii, turn), value)

    def soften(self, layer: _Mask, sigma: float) -> _Mask:
        """Blur a layer by a Gaussian of `sigma` film widths."""
        pixels = sigma * self.size
        if pixels < 0.3:
            return layer
        if pixels < 2:
            return cast("_Mask", _blur(layer, pixels))
        # A wide blur costs less on a smaller copy.
        factor = 2 ** int(math.log2(pixels))
        small = max(8, self.size // factor)
        reduced = _blur(cv2.resize(layer, (small, small), interpolation=cv2.INTER_AREA), sigma * small)
        return cast("_Mask", cv2.resize(reduced, (self.size, self.size), interpolation=cv2.INTER_LINEAR))

    def noise(self, rng: np.random.Generator, cells: int) -> _Floats:
        """Return Gaussian noise on a grid of `cells`, brought to the film's size."""
        return _noise(rng, cells, self.size)


def _noise(rng: np.random.Generator, cells: int, size: int) -> _Floats:
    grid = rng.standard_normal((cells, cells), dtype=np.float32)
    if cells < 32:  # a coarse grid must not show its facets
        grid = cast("_Floats", cv2.resize(grid, (64, 64), interpolation=cv2.INTER_CUBIC))
    interpolation = cv2.INTER_AREA if size < cells else cv2.INTER_LINEAR
    return cast("_Floats", cv2.resize(grid, (size, size), interpolation=interpolation))


class _Layers:
    """The film while it is drawn: what displaces air, what adds density, and where each label shows."""

    def __init__(self, canvas: _Canvas) -> None:
        shape = (canvas.size, canvas.size)
        self.aeration = np.ones(shape, np.float32)  # multiplies the air of the lungs
        self.density = np.zeros(shape, np.float32)  # added on top of everything
        self.bones = np.zeros(shape, np.float32)  # added too, but drowned by scatter where the body is thick
        self.vessels = np.ones(shape, np.float32)  # multiplies the lung markings
        self.chest = canvas.blank()  # the inside of the rib cage
        self.thorax = canvas.blank()  # the same as `lungs`, with soft edges
        self.lungs = canvas.blank()  # air-filled chest: not heart, mediastinum or abdomen
        self.shown: dict[Label, _Mask] = {}

    def displace_air(self, mask: _Mask, strength: float) -> None:
        """Replace a share of the lung's air by tissue where `mask` is set."""
        self.aeration *= 1.0 - mask * np.float32(strength / 255)

    def add(self, mask: _Mask, density: float) -> None:
        """Put density on the film (negative takes it away) where `mask` is set."""
        self.density += mask * np.float32(density / 255)

    def show(self, label: Label, mask: _Mask) -> None:
        """Mark where a label is to be seen."""
        self.shown[label] = _union(self.shown[label], mask) if label in self.shown else mask.copy()

    def regions(self) -> NDArray[np.bool_]:
        """Bring what was marked to the grid; every drawn finding keeps at least its best cell."""
        regions = np.zeros((len(DRAWN_LABELS), REGION_GRID, REGION_GRID), np.bool_)
        for label, mask in self.shown.items():
            cells = cv2.resize(mask, (REGION_GRID, REGION_GRID), interpolation=cv2.INTER_AREA)
            regions[DRAWN_LABELS.index(label)] = cells >= max(1.0, min(60.0, 0.5 * float(cells.max())))
        return regions


def _overlap(first: _Mask, second: _Mask) -> _Mask:
    return cast("_Mask", cv2.min(first, second))


def _union(first: _Mask, second: _Mask) -> _Mask:
    return cast("_Mask", cv2.max(first, second))


def _without(first: _Mask, second: _Mask) -> _Mask:
    return cast("_Mask", cv2.subtract(first, second))


def _blur(layer: cv2.typing.MatLike, pixels: float) -> cv2.typing.MatLike:
    reach = 2 * math.ceil(2 * pixels) + 1
    return cv2.GaussianBlur(layer, (reach, reach), pixels, borderType=cv2.BORDER_REPLICATE)


def _ellipse(centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0) -> _Points:
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x, y = radii[0] * np.cos(angle), radii[1] * np.sin(angle)
    c, s = math.cos(turn), math.sin(turn)
    return np.stack([centre[0] + c * x - s * y, centre[1] + s * x + c * y], axis=1)


_STEPS = np.linspace(0, 1, 6, endpoint=False)
_CATMULL_ROM = np.stack([_STEPS**0, _STEPS, _STEPS**2, _STEPS**3], axis=1) @ (
    np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
)


@cache
def _spline(knots: int, *, closed: bool) -> _Points:
    """Return the matrix that takes knots to the points of their Catmull-Rom spline."""
    identity = np.eye(knots)
    if closed:
        padded = np.concatenate([identity[-1:], identity, identity[:2]])
    else:
        first, last = 2 * identity[:1] - identity[1:2], 2 * identity[-1:] - identity[-2:-1]
        padded = np.concatenate([first, identity, last])
    rows = [_CATMULL_ROM @ padded[i : i + 4] for i in range(len(padded) - 3)]
    return np.concatenate(rows if closed else [*rows, identity[-1:]])


def _curve(points: Sequence[tuple[float, float]] | _Points, *, closed: bool = False) -> _Points:
    """Run a smooth curve through knots [..., knots, 2]."""
    knots = np.asarray(points, np.float64)
    return _spline(knots.shape[-2], closed=closed) @ knots


def _mirror(points: _Points, sign: _Sign) -> _Points:
    return points * (sign, 1.0)


# --- anatomy -----------------------------------------------------------------------------------------------------


def _sample_anatomy(rng: np.random.Generator, *, portable: bool) -> _Anatomy:
    """Draw one healthy patient. A portable (AP) film: magnified heart, shallow breath, scapulae over the lungs."""
    apex = rng.uniform(0.115, 0.15) + 0.015 * portable
    breath = rng.uniform(0.735, 0.775) - 0.065 * portable
    left_lower = rng.uniform(0.012, 0.03)
    sulcus = rng.uniform(0.105, 0.125)
    half_width = rng.uniform(0.355, 0.385)
    carina = apex + 0.255 + rng.uniform(-0.01, 0.012) - 0.02 * portable
    return _Anatomy(
        apex=apex,
        half_width=half_width,
        dome={_RIGHT: breath - left_lower / 2, _LEFT: breath + left_lower / 2},
        angle={_RIGHT: breath + sulcus, _LEFT: breath + sulcus + 0.005},
        heart_ratio=rng.uniform(0.45, 0.505) if portable else rng.uniform(0.41, 0.485),
        mediastinum=rng.uniform(0.056, 0.068) + 0.006 * portable,
        shift=rng.uniform(-0.006, 0.006),
        carina=carina,
        hilum={_RIGHT: carina + 0.075, _LEFT: carina + 0.055},
        rib_pitch=(breath - apex) / rng.uniform(8.8, 9.8),
        clavicle=rng.uniform(-0.01, 0.015) - 0.035 * portable,
        scapula=rng.uniform(0.80, 0.92) if portable else rng.uniform(1.06, 1.16),
    )


def _body_outline(anatomy: _Anatomy, girth: float) -> _Points:
    """Trace neck, shoulders and flanks: the edge of the soft tissue."""
    w, t = anatomy.half_width, anatomy.apex
    half = _curve(
        [(0.095, -0.2), (0.10, t - 0.11), (0.15, t - 0.065), (0.28, t - 0.045), (0.39, t - 0.015), (0.47, t + 0.06),
         (0.53, t + 0.2), (w + 0.15, t + 0.29), (w + girth + 0.02, t + 0.38), (w + girth, t + 0.55),
         (w + girth + 0.005, t + 0.7), (w + girth + 0.01, 1.2)]
    )  # fmt: skip
    return np.concatenate([half, _mirror(half, -1)[::-1]])


def _lung_outline(anatomy: _Anatomy, sign: _Sign) -> _Points:
    """Trace the inside of one half of the rib cage, down to where the diaphragm cuts it off."""
    t = anatomy.apex
    wall = anatomy.wall_points()
    medial = [(0.03, anatomy.angle[sign] + 0.02), (0.03, t + 0.12), (0.06, t + 0.03), (0.095, t + 0.005)]
    return _mirror(_curve(np.concatenate([medial, wall, [(anatomy.half_width * 0.97, 1.1), (0.03, 1.1)]])), sign)


def _abdomen_outline(anatomy: _Anatomy, sign: _Sign) -> _Points:
    """Trace everything under one hemidiaphragm: a dome that falls steeply into the costophrenic angle."""
    w, dome, angle = anatomy.half_width, anatomy.dome[sign], anatomy.angle[sign]
    drop = angle - dome
    surface = _curve(
        [(-0.03, dome + 0.06), (0.1 * w, dome + 0.035), (0.25 * w, dome + 0.008), (0.45 * w, dome - 0.002),
         (0.64 * w, dome + 0.08 * drop), (0.8 * w, dome + 0.32 * drop), (0.92 * w, dome + 0.68 * drop),
         (1.0 * w, angle), (w + 0.06, angle + 0.05)]
    )  # fmt: skip
    return _mirror(np.concatenate([surface, [(w + 0.06, 1.3), (-0.03, 1.3)]]), sign)


def _heart_outline(anatomy: _Anatomy) -> _Points:
    """Trace the heart: two thirds of it left of the midline, its width the cardiothoracic ratio times the chest's."""
    width = anatomy.heart_ratio * 2 * anatomy.half_width
    right, left = 0.33 * width, 0.67 * width
    top = anatomy.carina + 0.02
    height = anatomy.dome[_LEFT] + 0.045 - top
    outline = _curve(
        [(-0.04, top), (-0.55 * right - 0.015, top + 0.16 * height), (-0.88 * right, top + 0.36 * height),
         (-right, top + 0.6 * height),
         (-0.88 * right, top + 0.9 * height), (-0.3 * right, top + 1.08 * height), (0.5 * left, top + 1.1 * height),
         (0.9 * left, top + 0.97 * height), (left, top + 0.8 * height), (0.9 * left, top + 0.56 * height),
         (0.66 * left, top + 0.3 * height), (0.38 * left, top + 0.1 * height), (0.03, top - 0.01)],
        closed=True,
    )  # fmt: skip
    return np.add(outline, (anatomy.shift, 0.0))


def _mediastinum_outline(anatomy: _Anatomy) -> _Points:
    """Trace the upper mediastinum: vena cava on the right, aortic knob and pulmonary trunk on the left."""
    m, t, c = anatomy.mediastinum, anatomy.apex, anatomy.carina
    right = [(-0.05, -0.1), (-0.055, t + 0.02), (-0.9 * m, t + 0.10), (-m, c - 0.03), (-0.97 * m, c + 0.07),
             (-0.85 * m - 0.008, c + 0.15), (-0.06, c + 0.26), (-0.05, 1.1)]  # fmt: skip
    left = [(0.05, 1.1), (0.06, c + 0.26), (0.85 * m + 0.015, c + 0.15), (m + 0.012, c + 0.09), (m, c + 0.045),
            (m + 0.014, c + 0.005), (m + 0.022, c - 0.03), (m + 0.007, c - 0.068), (0.82 * m, t + 0.09),
            (0.055, t + 0.02), (0.05, -0.1)]  # fmt: skip
    return np.add(_curve([*right, *left]), (anatomy.shift, 0.0))


def _rib_paths(anatomy: _Anatomy) -> tuple[_Points, _Points]:
    """Return the centre lines of the ribs, posterior and anterior arcs [ribs, points, 2], with across > 0."""
    index = np.arange(_RIBS)
    start = anatomy.apex - 0.005 + anatomy.rib_pitch * index
    drop = np.minimum(0.055 + 0.013 * index, 0.135)
    end = start + drop
    w = anatomy.wall(end) + 0.006
    posterior = [(0 * w + 0.035, start + 0.012), (0.25 * w, start - 0.006), (0.52 * w, start + 0.10 * drop),
                 (0.78 * w, start + 0.42 * drop), (0.95 * w, start + 0.78 * drop), (w, end + 0.02)]  # fmt: skip
    anterior = [(w, end + 0.015), (0.955 * w, end + 0.055), (0.8 * w, end + 0.10), (0.6 * w, end + 0.135),
                (0.42 * w, end + 0.145)]  # fmt: skip
    return _curve(np.array(posterior).transpose(2, 0, 1)), _curve(np.array(anterior).transpose(2, 0, 1))


def _bone(canvas: _Canvas, mask: _Mask, thickness: float) -> _Floats:
    """Turn the outline of a bone into density: a hollow tube, so denser at its edges."""
    inner = canvas.soften(mask, 0.006)
    edge = _without(mask, inner)
    return mask * np.float32(thickness / 255) + edge * np.float32(1.5 * thickness / 255)


def _draw_ribs(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Draw the ribs: posterior arcs, the brighter ones, and anterior arcs that cross them further out and lower."""
    posterior, anterior = canvas.blank(), canvas.blank()
    broken = {(rib.sign, rib.index): rib for rib in anatomy.broken_ribs}
    backs, fronts = _rib_paths(anatomy)
    for sign in (_RIGHT, _LEFT):
        whole = [index for index in range(_RIBS) if (sign, index) not in broken]
        canvas.ribbons(posterior, _mirror(backs[whole], sign), 0.021)
        canvas.ribbons(anterior, _mirror(fronts[:7], sign), np.linspace(0.02, 0.026, fronts.shape[1]))
        for index in set(range(_RIBS)).difference(whole):
            _draw_broken_rib(canvas, layers, posterior, _mirror(backs[index], sign), broken[sign, index])
    layers.bones += _bone(canvas, posterior, 0.062)
    layers.bones += _bone(canvas, canvas.soften(anterior, 0.003), 0.038)


def _draw_broken_rib(canvas: _Canvas, layers: _Layers, posterior: _Mask, path: _Points, rib: _BrokenRib) -> None:
    """Draw a rib fracture: a dark gap, the outer fragment stepped off, both ends bright with callus."""
    cut = int(rib.along * (len(path) - 1))
    inner, outer = path[:cut], np.add(path[cut + 2 :], (0.0, rib.step))
    canvas.ribbon(posterior, inner, 0.022)
    canvas.ribbon(posterior, outer, 0.022)
    ends = canvas.blank()
    swelling = np.array([0.018, 0.022, 0.026, 0.03, 0.03])
    canvas.ribbon(ends, inner[-5:], swelling)
    canvas.ribbon(ends, outer[:5], swelling[::-1])
    layers.add(canvas.soften(ends, 0.004), 0.34)
    gap = canvas.ellipse(canvas.blank(), tuple((inner[-1] + outer[0]) / 2), (0.008, 0.016))
    layers.add(canvas.soften(gap, 0.003), -0.1)
    around = canvas.ribbon(canvas.blank(), np.concatenate([inner[-7:], outer[:7]]), 0.05)
    layers.show("Fracture", around)


def _draw_shoulders(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Draw clavicles, scapulae and humeral heads."""
    clavicles, scapulae = canvas.blank(), canvas.blank()
    t, y = anatomy.apex, anatomy.apex + anatomy.clavicle
    for sign in (_RIGHT, _LEFT):
        path = _curve([(0.04, y + 0.085), (0.10, y + 0.06), (0.19, y + 0.035), (0.28, y - 0.005), (0.37, y - 0.03)])
        canvas.ribbon(clavicles, _mirror(path, sign), np.linspace(0.03, 0.018, len(path)))
        inner = anatomy.scapula * float(anatomy.wall(t + 0.25))
        blade = [(0.41, t + 0.06), (inner + 0.02, t + 0.04), (inner, t + 0.13), (inner + 0.025, t + 0.37),
                 (inner + 0.05, t + 0.40), (inner + 0.085, t + 0.30), (0.43, t + 0.12)]  # fmt: skip
        canvas.fill(scapulae, _mirror(_curve(blade, closed=True), sign))
        canvas.ellipse(clavicles, (sign * 0.455, t + 0.075), (0.042, 0.045))
    layers.bones += _bone(canvas, clavicles, 0.105)
    layers.bones += _bone(canvas, canvas.soften(scapulae, 0.002), 0.024)


def _draw_spine(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Draw the spine behind the mediastinum: vertebral bodies with darker discs between them."""
    bodies = canvas.blank()
    pitch = anatomy.rib_pitch * 0.86
    for index in range(2, 24):
        y = -0.04 + pitch * index
        half = 0.034 + 0.0006 * index
        body = [(-half, y), (-half + 0.004, y + pitch * 0.4), (-half, y + pitch * 0.8), (half, y + pitch * 0.8),
                (half - 0.004, y + pitch * 0.4), (half, y)]  # fmt: skip
        canvas.fill(bodies, np.array(body))
    layers.add(canvas.soften(bodies, 0.004), 0.045)


def _draw_airway(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Draw the air column of the trachea, down the midline to the carina, and both main bronchi."""
    airway = canvas.blank()
    c, x = anatomy.carina, anatomy.shift
    canvas.ribbon(airway, _curve([(0.0, -0.1), (0.0, anatomy.apex), (x - 0.004, c)]), 0.034)
    canvas.ribbon(airway, _curve([(x - 0.006, c - 0.01), (x - 0.03, c + 0.03), (x - 0.06, c + 0.055)]), 0.022)
    canvas.ribbon(airway, _curve([(x + 0.002, c - 0.01), (x + 0.035, c + 0.025), (x + 0.08, c + 0.045)]), 0.02)
    layers.add(canvas.soften(airway, 0.003), -0.12)


def _draw_vessels(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator) -> _Mask:
    """Draw the pulmonary vessels: hilar trunks that fan out, fork and taper, larger towards the bases."""
    vessels = canvas.blank()
    along = np.linspace(0, 1, 7)[None, :, None]
    for sign in (_RIGHT, _LEFT):
        root = np.array([0.07, anatomy.hilum[sign]])
        angle = np.linspace(-1.35, 1.42, 9) + rng.uniform(-0.13, 0.13, 9)
        length = rng.uniform(0.15, 0.25, (9, 1, 1))
        bend, fork_bend = rng.uniform(-0.07, 0.07, (2, 9, 1, 1))
        spread = rng.uniform(0.3, 0.6, (2, 9, 1))
        start = root + rng.uniform(-1, 1, (9, 1, 2)) * (0.012, 0.03)
        heading = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]
        across = heading[..., ::-1] * (-1.0, 1.0)
        calibre = (np.where(angle > 0.2, 0.0115, 0.008) * rng.uniform(0.75, 1.2, 9) * anatomy.vessel_swelling)[:, None]
        taper = 1 - 0.75 * along[..., 0]
        trunks = start + along * length * heading + along**2 * bend * across
        place, shift = np.array([sign, 1.0]), np.array([anatomy.shift, 0.0])
        for turn, at, fan in zip((-1, 1), (2, 3), spread, strict=True):
            direction = np.cos(fan)[..., None] * heading + turn * np.sin(fan)[..., None] * across
            branches = trunks[:, at : at + 1] + along * 0.62 * length * direction + along**2 * fork_bend * across
            canvas.ribbons(vessels, branches * place + shift, 0.6 * calibre * taper, 170)
        canvas.ribbons(vessels, trunks * place + shift, calibre * taper, 225)
        hilum = (sign * 0.072 + anatomy.shift, anatomy.hilum[sign])
        canvas.ellipse(vessels, hilum, (0.025 * anatomy.vessel_swelling**0.5, 0.05), sign * -0.25, 200)
    return canvas.soften(vessels, 0.0022)


def _draw_breasts(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator, layers: _Layers) -> None:
    """Draw breast shadows over the lower chest: faint, with a crescent of an edge below."""
    weight, drop = rng.uniform(0.03, 0.07), rng.uniform(0.0, 0.05)
    breasts = canvas.blank()
    for sign in (_RIGHT, _LEFT):
        canvas.ellipse(breasts, (sign * 0.62 * anatomy.half_width, 0.62 + drop), (0.135, 0.14), 0.2 * sign)
    layers.bones += canvas.soften(breasts, 0.012) * np.float32(weight / 255)


def _draw_gastric_bubble(canvas: _Canvas, anatomy: _Anatomy, rng: np.random.Generator, layers: _Layers) -> None:
    """Draw gas in the stomach, under the left dome."""
    x, width, height = rng.uniform(0.13, 0.2), rng.uniform(0.03, 0.06), rng.uniform(0.02, 0.035)
    bubble = canvas.ellipse(canvas.blank(), (x, anatomy.dome[_LEFT] + 0.03 + height), (width, height), 0.1)
    layers.add(canvas.soften(bubble, 0.008), -0.13)


# --- findings ----------------------------------------------------------------------------------------------------


def _rearrange(anatomy: _Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Change the anatomy the way a finding does, before anything is drawn."""
    if finding.label == "Cardiomegaly" and finding.size:
        anatomy.heart_ratio = _CARDIOTHORACIC_RATIO[finding.size] + rng.uniform(-0.014, 0.014)
    elif finding.label == "Enlarged Cardiomediastinum":
        anatomy.mediastinum = rng.uniform(0.115, 0.14)
    elif finding.label == "Edema" and finding.size:
        anatomy.vessel_swelling = _VESSEL_SWELLING[finding.size]
    elif finding.label == "Atelectasis" and finding.side:
        for sign in _SIGNS[finding.side]:
            anatomy.dome[sign] -= _DOME_RISE + rng.uniform(-0.01, 0.01)
    elif finding.label == "Pneumothorax" and finding.size == "large" and finding.side:
        anatomy.shift -= 0.03 * _SIGNS[finding.side][0]
    elif finding.label == "Fracture" and finding.side and finding.zone:
        _break_ribs(anatomy, _SIGNS[finding.side][0], finding.zone, rng)


def _break_ribs(anatomy: _Anatomy, sign: _Sign, zone: Zone, rng: np.random.Generator) -> None:
    """Choose two neighbouring ribs whose outer parts lie in the zone, and break them."""
    along = rng.uniform(0.60, 0.74)
    depth = anatomy.depth(sign, zone) + rng.uniform(-0.015, 0.015)
    backs = _rib_paths(anatomy)[0]
    heights = backs[:-1, round(along * (backs.shape[1] - 1)), 1] + anatomy.rib_pitch / 2
    first = int(np.argmin(np.abs(heights - depth)))
    step = rng.uniform(0.023, 0.029)
    for index, shift in ((first, 0.0), (first + 1, rng.uniform(-0.05, 0.03))):
        anatomy.broken_ribs.append(_BrokenRib(sign=sign, index=index, along=along + shift, step=step))


def _draw_cardiomegaly(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Mark the borders of a large heart: the heart's outline has them already."""
    heart = canvas.fill(canvas.blank(), _heart_outline(anatomy))
    core = canvas.fill(canvas.blank(), _heart_outline(anatomy) * (0.55, 1.0))
    layers.show("Cardiomegaly", _without(heart, core))


def _draw_wide_mediastinum(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers) -> None:
    """Mark the sides of a wide mediastinum: its outline has them already."""
    above_heart = (_mediastinum_outline(anatomy)[:, 1] > anatomy.apex) & (
        _mediastinum_outline(anatomy)[:, 1] < anatomy.carina + 0.13
    )
    outline = _mediastinum_outline(anatomy)[above_heart]
    wide = canvas.fill(canvas.blank(), outline)
    core = canvas.fill(canvas.blank(), outline * (0.4, 1.0))
    layers.show("Enlarged Cardiomediastinum", _without(wide, core))


def _draw_effusion(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw a pleural effusion: fluid that blunts the angle, its upper edge a meniscus climbing the chest wall."""
    height = {"small": 0.16, "moderate": 0.33, "large": 0.53}[cast("str", finding.size)]
    for sign in _SIGNS[cast("Side", finding.side)]:
        top = anatomy.angle[sign] - height + rng.uniform(-0.012, 0.012)
        bottom = anatomy.angle[sign] + 0.08
        sag = {"small": 0.15, "moderate": 0.115, "large": 0.12}[cast("str", finding.size)]
        share = np.linspace(1.1, 0.05, 15)
        w = anatomy.half_width
        surface = np.stack([share * w, top + sag * (1 - np.minimum(share, 1.0) ** 2.6)], axis=1)
        outline = np.concatenate([surface, [(0.0, bottom), (1.1 * w, bottom)]])
        fluid = canvas.fill(canvas.blank(), _mirror(outline, sign))
        veil = canvas.soften(fluid, 0.03)
        fluid = canvas.soften(fluid, 0.004)
        layers.displace_air(fluid, 0.95)
        layers.displace_air(veil, 0.25)
        layers.add(_overlap(fluid, layers.thorax), 0.06)
        layers.vessels *= 1.0 - fluid * np.float32(0.9 / 255)
        layers.show("Pleural Effusion", _overlap(fluid, layers.lungs))


def _draw_consolidation(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw a consolidation: a fluffy dense patch with air bronchograms in it."""
    sign = _SIGNS[cast("Side", finding.side)][0]
    y = anatomy.depth(sign, cast("Zone", finding.zone)) + rng.uniform(-0.015, 0.015)
    x = anatomy.beside_heart(sign, y, rng.uniform(0.52, 0.62) * float(anatomy.wall(y)) + 0.02, 0.08)
    patch = canvas.blank()
    long, short, turn = rng.uniform(0.085, 0.098), rng.uniform(0.064, 0.073), rng.uniform(-0.7, 0.7)
    canvas.ellipse(patch, (sign * x, y), (long, short), turn)
    # Lobules about the rim make the edge ragged.
    rim = _ellipse((sign * x, y), (0.95 * long, 1.0 * short), turn)[rng.integers(28, size=9)]
    rim += rng.uniform(-0.018, 0.018, rim.shape)
    for (across, down), radius in zip(rim, rng.uniform(0.018, 0.04, 9), strict=True):
        canvas.ellipse(patch, (across, down), (radius, 0.8 * radius))
    bronchi = canvas.blank()
    hilum = np.array([0.075, anatomy.hilum[sign]])
    inward = (hilum - (x, y)) / np.hypot(*(hilum - (x, y)))
    for spread in (-0.35, 0.0, 0.35):
        c, s = math.cos(spread), math.sin(spread)
        outward = -np.array([c * inward[0] - s * inward[1], s * inward[0] + c * inward[1]])
        start = (x, y) + inward * 0.055 + inward[::-1] * (1.0, -1.0) * 0.06 * spread
        canvas.ribbon(bronchi, _mirror(start + np.linspace(0, 0.095, 6)[:, None] * outward, sign), 0.0065)
    fluffy = canvas.soften(patch, 0.016)
    layers.aeration *= 1.0 - fluffy * np.float32(0.93 / 255) * np.clip(1.0 + 0.1 * canvas.noise(rng, 28), 0.6, 1.05)
    layers.add(fluffy, 0.05)
    layers.vessels *= 1.0 - fluffy * np.float32(0.8 / 255)
    layers.add(canvas.soften(bronchi, 0.002), -0.035)
    layers.show("Consolidation", _overlap(patch, layers.lungs))


def _draw_atelectasis(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw atelectasis: dense plates lying just above a raised hemidiaphragm."""
    for sign in _SIGNS[cast("Side", finding.side)]:
        plates = canvas.blank()
        dome, w = anatomy.dome[sign], anatomy.half_width
        for row in range(3):
            y = dome - 0.035 - 0.04 * row + rng.uniform(-0.008, 0.008)
            length, tilt = rng.uniform(0.15, 0.19), rng.uniform(-0.03, 0.035)
            x0 = anatomy.beside_heart(sign, y, rng.uniform(0.50, 0.59) * w, length / 2) - length / 2
            plate = _curve([(x0, y + tilt), (x0 + length / 2, y + tilt / 2 - 0.004), (x0 + length, y)])
            width = 0.017 * np.sin(np.linspace(0.35, np.pi - 0.35, len(plate)))
            canvas.ribbon(plates, _mirror(plate, sign), width)
        layers.displace_air(canvas.soften(plates, 0.002), 0.8)
        layers.displace_air(canvas.soften(plates, 0.025), 0.4)
        layers.add(plates, 0.03)
        around = canvas.soften(plates, 0.008)
        dome_edge = _abdomen_outline(anatomy, sign)
        usual_edge = np.add(dome_edge, (0.0, _DOME_RISE))
        risen = _without(canvas.fill(canvas.blank(), dome_edge), canvas.fill(canvas.blank(), usual_edge))
        plates_and_dome = cast("_Mask", cv2.add(cv2.add(around, around), risen))
        layers.show("Atelectasis", _overlap(plates_and_dome, layers.chest))


def _draw_edema(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw pulmonary oedema: a bat-wing haze about both hila, thick vessels, Kerley B lines at the bases."""
    size = cast("str", finding.size)
    strength = {"small": 0.47, "moderate": 0.66, "large": 0.84}[size]
    reach = {"small": 0.09, "moderate": 0.125, "large": 0.17}[size]
    wings, lines = canvas.blank(), canvas.blank()
    for sign in (_RIGHT, _LEFT):
        y = anatomy.hilum[sign] + 0.05
        canvas.ellipse(wings, (sign * (0.05 + reach * 0.75), y), (reach, 1.3 * reach), -0.2 * sign)
        for row in range(7):
            level = anatomy.angle[sign] - 0.13 - 0.023 * row + rng.uniform(-0.003, 0.003)
            outer = float(anatomy.wall(level)) - 0.004
            line = np.array([(outer, level), (outer - 0.025, level), (outer - 0.05, level + 0.003)])
            canvas.ribbon(lines, _mirror(line, sign), 0.006)
    cotton = np.clip(1.0 + 0.1 * canvas.noise(rng, 18), 0.6, 1.3)
    haze = canvas.soften(wings, 0.03) * np.float32(strength / 255) * cotton
    layers.aeration *= 1.0 - np.clip(haze, 0.0, 0.92)
    layers.displace_air(lines, 0.25 + 0.35 * strength)
    layers.show("Edema", _overlap(wings, layers.lungs))


def _draw_pneumothorax(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw a pneumothorax: a thin pleural line, and beyond it black air without any vessel."""
    sign = _SIGNS[cast("Side", finding.side)][0]
    size = cast("str", finding.size)
    inset = {"small": 0.045, "moderate": 0.105, "large": 0.19}[size] + rng.uniform(-0.008, 0.008)
    fall = {"small": 0.075, "moderate": 0.13, "large": 0.20}[size] + rng.uniform(-0.008, 0.008)
    wall = anatomy.wall_points()
    # The lung hangs away from apex and wall; a small pneumothorax closes half way down.
    down = (wall[:, 1] - anatomy.apex) / (wall[-1, 1] - anatomy.apex)
    if size == "small":
        gap = inset * np.clip(1.15 - 1.6 * down, 0.0, 1.0)
    elif size == "moderate":
        gap = inset * np.clip(1.25 - 0.85 * down, 0.0, 1.0)
    else:
        gap = inset * np.clip(1.05 - 0.25 * down, 0.0, 1.0)
    edge = wall - np.stack([np.minimum(gap, wall[:, 0] - 0.09), np.zeros(len(wall))], axis=1)
    edge[:, 1] += fall * np.clip(1 - 2.2 * down, 0.0, 1.0)
    pleura = _curve(np.concatenate([[(0.05, edge[0, 1] + 0.025)], edge]))
    outline = np.concatenate([pleura, [(edge[-1, 0], 1.1), (-0.05, 1.1), (-0.05, pleura[0, 1])]])
    lung = canvas.fill(canvas.blank(), _mirror(outline, sign))
    half = canvas.fill(canvas.blank(), _lung_outline(anatomy, sign))
    space = _overlap(_without(half, lung), layers.lungs)
    line = canvas.blank()
    visible = pleura[np.interp(pleura[:, 1], wall[:, 1], gap) > 0.006] if size == "small" else pleura
    canvas.ribbon(line, _mirror(visible, sign), 0.0085)
    line = _overlap(line, layers.lungs)
    collapsed = _overlap(lung, half)
    layers.vessels *= 1.0 - space * np.float32(1 / 255)
    layers.add(space, -0.095)
    layers.add(line, 0.16)
    layers.displace_air(collapsed, {"small": 0.04, "moderate": 0.12, "large": 0.38}[size])
    layers.show("Pneumothorax", _union(space, line))


def _draw_lesion(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw a lung lesion: one round, sharply edged opacity, a nodule or a mass."""
    sign = _SIGNS[cast("Side", finding.side)][0]
    y = anatomy.depth(sign, cast("Zone", finding.zone)) + rng.uniform(-0.02, 0.02)
    radius = rng.uniform(0.027, 0.031) if finding.size == "small" else rng.uniform(0.056, 0.066)
    outer = float(anatomy.wall(y)) - radius - 0.015
    x = anatomy.beside_heart(sign, y, rng.uniform(min(0.10 + radius, outer), outer), radius + 0.015)
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    lobes = 1 + 0.05 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.04 * np.cos(3 * angle + rng.uniform(0, 6))
    outline = np.stack([sign * x + radius * lobes * np.cos(angle), y + radius * lobes * np.sin(angle)], axis=1)
    lesion = canvas.soften(canvas.fill(canvas.blank(), outline), 0.003)
    layers.displace_air(lesion, 0.75)
    layers.add(lesion, 0.065)
    layers.show("Lung Lesion", lesion)


def _draw_tube(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, rng: np.random.Generator) -> None:
    """Draw an endotracheal tube: two bright walls down the trachea, the tip above the carina."""
    tip = anatomy.carina - rng.uniform(0.045, 0.075)
    x = anatomy.shift
    path = _curve([(0.0, -0.1), (0.002, anatomy.apex), (0.7 * x, tip)])
    walls = canvas.blank()
    for side in (-0.0095, 0.0095):
        canvas.ribbon(walls, np.add(path, (side, 0.0)), 0.0075)
    canvas.ribbon(walls, path[-3:], 0.016, 120)
    layers.add(walls, 0.28)
    layers.show("Support Devices", canvas.ribbon(canvas.blank(), path, 0.04))


def _draw_line(canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a central venous line: a bright thread from neck or subclavian vein into the superior vena cava."""
    sign = _SIGNS[cast("Side", finding.side)][0]
    t, c, cava = anatomy.apex, anatomy.carina, anatomy.shift - 0.042
    tip = (cava, c + rng.uniform(0.05, 0.09))
    end = [(cava - 0.002, c - 0.06), (cava - 0.002, c), tip]
    if rng.random() < 0.55:
        start = [(sign * 0.40, t + 0.12), (sign * 0.31, t + 0.055), (sign * 0.2, t + 0.045), (sign * 0.1, t + 0.08)]
    else:
        start = [(sign * 0.12, -0.1), (sign * 0.095, 0.0), (sign * 0.085, t), (sign * 0.075, t + 0.07)]
    path = _curve(start + ([(0.01, t + 0.125)] if sign == _LEFT else []) + end)
    layers.add(canvas.ribbon(canvas.blank(), path, 0.014), 0.32)
    layers.show("Support Devices", canvas.ribbon(canvas.blank(), path, 0.03))


def _draw_pacemaker(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw a pacemaker: a metal box under the clavicle, its leads through the vena cava into atrium and ventricle."""
    sign = _SIGNS[cast("Side", finding.side)][0]
    t, c, cava = anatomy.apex, anatomy.carina, anatomy.shift - 0.045
    x, y = rng.uniform(0.24, 0.28), t + rng.uniform(0.095, 0.125)
    box, shine, leads = canvas.blank(), canvas.blank(), canvas.blank()
    case = [(-1, -0.7), (-0.7, -1), (0.7, -1), (1, -0.7), (1, 0.5), (0.6, 1), (-0.6, 1), (-1, 0.5)]
    outline = _curve(case, closed=True) * (0.048, 0.042) + (sign * x, y)
    canvas.fill(box, outline)
    canvas.ellipse(shine, (sign * x, y + 0.008), (0.028, 0.02))
    start = [(sign * (x - 0.04), y - 0.03), (sign * (x - 0.1), y - 0.055), (sign * 0.09, t + 0.055)]
    if sign == _LEFT:
        start.append((0.0, t + 0.12))
    heart = anatomy.heart_ratio * 2 * anatomy.half_width
    bottom = anatomy.dome[_LEFT]
    ventricle = [(cava, c), (cava - 0.01, c + 0.12), (cava + 0.03, bottom - 0.06), (0.1, bottom - 0.02),
                 (0.5 * heart + anatomy.shift, bottom - 0.035)]  # fmt: skip
    atrium = [(cava, c), (cava - 0.012, c + 0.13), (cava - 0.02, c + 0.2), (cava - 0.045, c + 0.17)]
    for end in (ventricle, atrium):
        canvas.ribbon(leads, _curve(start + end), 0.0075)
    layers.add(leads, 0.17)
    layers.add(box, 0.5)
    layers.add(shine, 0.15)
    layers.show("Support Devices", _union(canvas.soften(box, 0.004), canvas.soften(leads, 0.004)))


def _draw_finding(
    canvas: _Canvas, anatomy: _Anatomy, layers: _Layers, finding: Finding, rng: np.random.Generator
) -> None:
    """Draw one finding and mark where it shows. Fractures are drawn with the ribs."""
    if finding.label == "Cardiomegaly":
        _draw_cardiomegaly(canvas, anatomy, layers)
    elif finding.label == "Enlarged Cardiomediastinum":
        _draw_wide_mediastinum(canvas, anatomy, layers)
    elif finding.label == "Pleural Effusion":
        _draw_effusion(canvas, anatomy, layers, finding, rng)
    elif finding.label == "Consolidation":
        _draw_consolidation(canvas, anatomy, layers, finding, rng)
    elif finding.label == "Atelectasis":
        _draw_atelectasis(canvas, anatomy, layers, finding, rng)
    elif finding.label == "Edema":
        _draw_edema(canvas, anatomy, layers, finding, rng)
    elif finding.label == "Pneumothorax":
        _draw_pneumothorax(canvas, anatomy, layers, finding, rng)
    elif finding.label == "Lung Lesion":
        _draw_lesion(canvas, anatomy, layers, finding, rng)
    elif finding.device == "endotracheal tube":
        _draw_tube(canvas, anatomy, layers, rng)
    elif finding.device == "central venous line":
        _draw_line(canvas, anatomy, layers, finding, rng)
    elif finding.device == "pacemaker":
        _draw_pacemaker(canvas, anatomy, layers, finding, rng)


# --- the film ----------------------------------------------------------------------------------------------------


def _side_marker(canvas: _Canvas, rng: np.random.Generator, layers: _Layers) -> None:
    """Draw the technologist's lead letter: L by the patient's left shoulder or R by the right one."""
    letter: Literal["L", "R"] = "L" if rng.random() < 0.6 else "R"
    x, y = rng.uniform(0.435, 0.46), rng.uniform(0.04, 0.2)
    strokes = {
        "L": [[(0.0, 0.0), (0.0, 1.0), (0.6, 1.0)]],
        "R": [[(0.0, 1.0), (0.0, 0.0), (0.5, 0.02), (0.62, 0.25), (0.5, 0.5), (0.0, 0.52)], [(0.25, 0.5), (0.65, 1.0)]],
    }[letter]
    mark = canvas.blank()
    for stroke in strokes:
        points = np.array(stroke) * (0.034, 0.04) + ((x if letter == "L" else -x - 0.02), y)
        for segment in np.stack([points[:-1], points[1:]], axis=1):
            canvas.ribbon(mark, segment, 0.008)
    layers.add(mark, 0.6)


def _collimate(canvas: _Canvas, rng: np.random.Generator, density: _Floats) -> None:
    """Blacken a narrow border that the beam did not reach."""
    left, right, top, bottom = (round(float(v) * canvas.size) for v in rng.uniform(0.0, 0.035, 4))
    density[:top] = density[canvas.size - bottom :] = 0.0
    density[:, :left] = density[:, canvas.size - right :] = 0.0


def _expose(rng: np.random.Generator, density: _Floats, *, portable: bool) -> NDArray[np.uint16]:
    """Turn density into stored values: quantum noise, the film's curve, and its exposure."""
    grain, slope, gamma = rng.uniform(0.004, 0.009) + 0.003 * portable, rng.uniform(1.5, 2.2), rng.uniform(0.85, 1.2)
    black, white = rng.uniform(60, 420), rng.uniform(3300, 4000)
    density += _noise(rng, 128, len(density)) * np.float32(grain)
    absorbed = 1.0 - cv2.exp(np.maximum(density, 0.0) * np.float32(-slope))
    blackening = cv2.pow(absorbed * np.float32(1 / (1 - math.exp(-slope * 1.15))), gamma)
    stored: NDArray[np.uint16] = np.clip(np.rint(black + (white - black) * blackening), 0, WHITE).astype(np.uint16)
    return stored


def draw_film(study: Study, *, size: int = 256) -> Film:
    """Draw the film of a study.

    The patient, each label's findings and the noise have random streams of their own: leaving a finding out of a
    study leaves everything else on its film as it was.

    Args:
        study: what there is to see, and the seed.
        size: pixels along each side; the same seed at another size is the same film.

    Returns:
        The stored film and the regions in which its findings show.
    """
    keys = np.random.default_rng([study.seed, 1]).integers(1 << 63, size=3 + len(DRAWN_LABELS))
    patient, film, noise = (np.random.default_rng(key) for key in keys[:3])
    streams = {finding.label: np.random.default_rng(keys[3 + DRAWN_LABELS.index(finding.label)])
               for finding in study.findings}  # fmt: skip
    portable = study.view == "AP"
    anatomy = _sample_anatomy(patient, portable=portable)
    for finding in study.findings:
        _rearrange(anatomy, finding, streams[finding.label])
    # Small films are reduced from larger ones: one pixel of blur at every edge would be a different film.
    oversampling = math.ceil(_SMALLEST_DRAWN / size)
    canvas = _Canvas(
        size * oversampling,
        rotation=film.normal(0.0, 0.022 if portable else 0.012),
        scale=film.uniform(1.0, 1.09),
        offset=(film.normal(0.0, 0.012), film.normal(0.0, 0.012)),
    )
    layers = _Layers(canvas)

    body = canvas.fill(canvas.blank(), _body_outline(anatomy, patient.uniform(0.055, 0.12)))
    chest, abdomen = canvas.blank(), canvas.blank()
    for sign in (_RIGHT, _LEFT):
        canvas.fill(chest, _lung_outline(anatomy, sign))
        canvas.fill(abdomen, _abdomen_outline(anatomy, sign))
    heart = canvas.fill(canvas.blank(), _heart_outline(anatomy))
    mediastinum = canvas.fill(canvas.blank(), _mediastinum_outline(anatomy))
    solid = _union(_union(heart, mediastinum), abdomen)
    layers.chest, layers.thorax = chest, _without(chest, canvas.soften(solid, 0.003))
    layers.lungs = _without(chest, solid)

    vessels = _draw_vessels(canvas, anatomy, patient)
    _draw_spine(canvas, anatomy, layers)
    _draw_airway(canvas, anatomy, layers)
    _draw_ribs(canvas, anatomy, layers)
    _draw_shoulders(canvas, anatomy, layers)
    if patient.random() < 0.35:
        _draw_breasts(canvas, anatomy, patient, layers)
    if patient.random() < 0.6:
        _draw_gastric_bubble(canvas, anatomy, patient, layers)
    for finding in study.findings:
        _draw_finding(canvas, anatomy, layers, finding, streams[finding.label])
    if film.random() < 0.6:
        _side_marker(canvas, film, layers)

    # Air: the chest, less what stands in it. The heart lets a little of the lung behind it through.
    air = canvas.soften(chest, 0.0035) * np.float32(1 / 255)
    air *= 1.0 - canvas.soften(heart, 0.0035) * np.float32(0.86 / 255)
    air *= 1.0 - canvas.soften(mediastinum, 0.0045) * np.float32(0.92 / 255)
    air *= 1.0 - canvas.soften(abdomen, 0.0025) * np.float32(0.97 / 255)
    thorax = canvas.soften(chest, 0.05) * np.float32(1 / 255)
    air *= 0.72 + 0.28 * thorax
    marking = vessels * np.float32(0.36 / 255) * layers.vessels
    marking += 0.025 * canvas.noise(noise, 72) * layers.vessels
    layers.aeration *= 1.0 - np.clip(marking, -0.2, 0.6)

    air *= layers.aeration
    density = body * np.float32(0.28 / 255) + canvas.soften(body, 0.045) * np.float32(0.24 / 255)
    density += canvas.soften(solid, 0.02) * np.float32(0.10 / 255)
    density += canvas.soften(abdomen, 0.05) * np.float32(0.09 / 255)
    density += canvas.soften(mediastinum, 0.012) * np.float32(0.09 / 255)
    density += canvas.soften(heart, 0.02) * np.float32(0.06 / 255)
    density += layers.density
    density += layers.bones * (0.2 + 0.95 * air)
    density -= 0.40 * air
    density += 0.012 * canvas.noise(noise, 6)
    density = cast("_Floats", cv2.GaussianBlur(density, (3, 3), 0.0018 * canvas.size))
    if portable and film.random() < 0.5:
        _collimate(canvas, film, density)
    if oversampling > 1:
        density = cast("_Floats", cv2.resize(density, (size, size), interpolation=cv2.INTER_AREA))
    return Film(stored=_expose(noise, density, portable=portable), regions=layers.regions())
