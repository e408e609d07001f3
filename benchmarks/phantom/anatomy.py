"""Where things are in one patient, and how findings move them: everything that is known before anything is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.phantom.canvas import LEFT, RIGHT, SIGNS, Points, Sign, curve, mirror
from benchmarks.phantom.findings import Finding
from lite.eval.labels import Size, Zone

RIBS = 10
DOME_RISE = 0.05
# Depth of each zone's centre, as a fraction of the way from the lung's apex to its dome.
_ZONE_DEPTH: dict[Zone, float] = {"upper": 0.25, "mid": 0.52, "lower": 0.78}
_CARDIOTHORACIC_RATIO: dict[Size, float] = {"small": 0.56, "moderate": 0.635, "large": 0.715}
_VESSEL_SWELLING: dict[Size, float] = {"small": 1.3, "moderate": 1.55, "large": 1.8}


@dataclass(slots=True, kw_only=True)
class Anatomy:
    """Where things are in one patient, in the patient's frame. Findings that move organs change it before drawing."""

    apex: float
    half_width: float
    dome: dict[Sign, float]
    angle: dict[Sign, float]
    heart_ratio: float
    mediastinum: float
    shift: float
    carina: float
    hilum: dict[Sign, float]
    rib_pitch: float
    clavicle: float
    scapula: float
    vessel_swelling: float = 1.0
    broken_ribs: list[BrokenRib] = field(default_factory=list)

    def wall(self, down: float | Points) -> Points:
        """Return the half width of the lungs at a depth."""
        outline = self.wall_points()
        return np.asarray(np.interp(down, outline[:, 1], outline[:, 0]))

    def wall_points(self) -> Points:
        """Return the outline of a lung from the apex to the costophrenic angle, as (across, down) with across > 0."""
        return _WALL * (self.half_width, self._height()) + (0.0, self.apex)

    def depth(self, sign: Sign, zone: Zone) -> float:
        """Return the depth of the centre of a lung zone."""
        return self.apex + _ZONE_DEPTH[zone] * (self.dome[sign] - self.apex)

    def beside_heart(self, sign: Sign, down: float, across: float, reach: float) -> float:
        """Move something of half width `reach` outward until it clears a left heart border, if the chest allows."""
        if sign == RIGHT or down < self.carina + 0.12:
            return across
        border = 0.67 * self.heart_ratio * 2 * self.half_width
        return max(across, min(border + 0.5 * reach, float(self.wall(down)) - reach))

    def _height(self) -> float:
        return max(self.angle.values()) - self.apex


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenRib:
    """A posterior rib arc with a step-off at `along` (0 spine, 1 chest wall)."""

    sign: Sign
    index: int
    along: float
    step: float


# The chest wall: half widths (× half_width) at depths (× lung height), apex first.
_WALL = np.array(
    [(0.36, 0.0), (0.52, 0.03), (0.66, 0.11), (0.78, 0.22), (0.87, 0.36), (0.94, 0.52), (0.985, 0.70), (1.0, 0.86),
     (0.99, 1.0)]
)  # fmt: skip


def sample_anatomy(rng: np.random.Generator, *, portable: bool) -> Anatomy:
    """Draw one healthy patient. A portable (AP) film: magnified heart, shallow breath, scapulae over the lungs."""
    apex = rng.uniform(0.115, 0.15) + 0.015 * portable
    breath = rng.uniform(0.735, 0.775) - 0.065 * portable
    left_lower = rng.uniform(0.012, 0.03)
    sulcus = rng.uniform(0.105, 0.125)
    half_width = rng.uniform(0.355, 0.385)
    carina = apex + 0.255 + rng.uniform(-0.01, 0.012) - 0.02 * portable
    return Anatomy(
        apex=apex,
        half_width=half_width,
        dome={RIGHT: breath - left_lower / 2, LEFT: breath + left_lower / 2},
        angle={RIGHT: breath + sulcus, LEFT: breath + sulcus + 0.005},
        heart_ratio=rng.uniform(0.45, 0.505) if portable else rng.uniform(0.41, 0.485),
        mediastinum=rng.uniform(0.056, 0.068) + 0.006 * portable,
        shift=rng.uniform(-0.006, 0.006),
        carina=carina,
        hilum={RIGHT: carina + 0.075, LEFT: carina + 0.055},
        rib_pitch=(breath - apex) / rng.uniform(8.8, 9.8),
        clavicle=rng.uniform(-0.01, 0.015) - 0.035 * portable,
        scapula=rng.uniform(0.80, 0.92) if portable else rng.uniform(1.06, 1.16),
    )


def body_outline(anatomy: Anatomy, girth: float) -> Points:
    """Trace neck, shoulders and flanks: the edge of the soft tissue."""
    w, t = anatomy.half_width, anatomy.apex
    half = curve(
        [(0.095, -0.2), (0.10, t - 0.11), (0.15, t - 0.065), (0.28, t - 0.045), (0.39, t - 0.015), (0.47, t + 0.06),
         (0.53, t + 0.2), (w + 0.15, t + 0.29), (w + girth + 0.02, t + 0.38), (w + girth, t + 0.55),
         (w + girth + 0.005, t + 0.7), (w + girth + 0.01, 1.2)]
    )  # fmt: skip
    return np.concatenate([half, mirror(half, -1)[::-1]])


def lung_outline(anatomy: Anatomy, sign: Sign) -> Points:
    """Trace the inside of one half of the rib cage, down to where the diaphragm cuts it off."""
    t = anatomy.apex
    wall = anatomy.wall_points()
    medial = [(0.03, anatomy.angle[sign] + 0.02), (0.03, t + 0.12), (0.06, t + 0.03), (0.095, t + 0.005)]
    return mirror(curve(np.concatenate([medial, wall, [(anatomy.half_width * 0.97, 1.1), (0.03, 1.1)]])), sign)


def abdomen_outline(anatomy: Anatomy, sign: Sign) -> Points:
    """Trace everything under one hemidiaphragm: a dome that falls steeply into the costophrenic angle."""
    w, dome, angle = anatomy.half_width, anatomy.dome[sign], anatomy.angle[sign]
    drop = angle - dome
    surface = curve(
        [(-0.03, dome + 0.06), (0.1 * w, dome + 0.035), (0.25 * w, dome + 0.008), (0.45 * w, dome - 0.002),
         (0.64 * w, dome + 0.08 * drop), (0.8 * w, dome + 0.32 * drop), (0.92 * w, dome + 0.68 * drop),
         (1.0 * w, angle), (w + 0.06, angle + 0.05)]
    )  # fmt: skip
    return mirror(np.concatenate([surface, [(w + 0.06, 1.3), (-0.03, 1.3)]]), sign)


def heart_outline(anatomy: Anatomy) -> Points:
    """Trace the heart: two thirds of it left of the midline, its width the cardiothoracic ratio times the chest's."""
    width = anatomy.heart_ratio * 2 * anatomy.half_width
    right, left = 0.33 * width, 0.67 * width
    top = anatomy.carina + 0.02
    height = anatomy.dome[LEFT] + 0.045 - top
    outline = curve(
        [(-0.04, top), (-0.55 * right - 0.015, top + 0.16 * height), (-0.88 * right, top + 0.36 * height),
         (-right, top + 0.6 * height),
         (-0.88 * right, top + 0.9 * height), (-0.3 * right, top + 1.08 * height), (0.5 * left, top + 1.1 * height),
         (0.9 * left, top + 0.97 * height), (left, top + 0.8 * height), (0.9 * left, top + 0.56 * height),
         (0.66 * left, top + 0.3 * height), (0.38 * left, top + 0.1 * height), (0.03, top - 0.01)],
        closed=True,
    )  # fmt: skip
    return np.add(outline, (anatomy.shift, 0.0))


def mediastinum_outline(anatomy: Anatomy) -> Points:
    """Trace the upper mediastinum: vena cava on the right, aortic knob and pulmonary trunk on the left."""
    m, t, c = anatomy.mediastinum, anatomy.apex, anatomy.carina
    right = [(-0.05, -0.1), (-0.055, t + 0.02), (-0.9 * m, t + 0.10), (-m, c - 0.03), (-0.97 * m, c + 0.07),
             (-0.85 * m - 0.008, c + 0.15), (-0.06, c + 0.26), (-0.05, 1.1)]  # fmt: skip
    left = [(0.05, 1.1), (0.06, c + 0.26), (0.85 * m + 0.015, c + 0.15), (m + 0.012, c + 0.09), (m, c + 0.045),
            (m + 0.014, c + 0.005), (m + 0.022, c - 0.03), (m + 0.007, c - 0.068), (0.82 * m, t + 0.09),
            (0.055, t + 0.02), (0.05, -0.1)]  # fmt: skip
    return np.add(curve([*right, *left]), (anatomy.shift, 0.0))


def rib_paths(anatomy: Anatomy) -> tuple[Points, Points]:
    """Return the centre lines of the ribs, posterior and anterior arcs [ribs, points, 2], with across > 0."""
    index = np.arange(RIBS)
    start = anatomy.apex - 0.005 + anatomy.rib_pitch * index
    drop = np.minimum(0.055 + 0.013 * index, 0.135)
    end = start + drop
    w = anatomy.wall(end) + 0.006
    posterior = [(0 * w + 0.035, start + 0.012), (0.25 * w, start - 0.006), (0.52 * w, start + 0.10 * drop),
                 (0.78 * w, start + 0.42 * drop), (0.95 * w, start + 0.78 * drop), (w, end + 0.02)]  # fmt: skip
    anterior = [(w, end + 0.015), (0.955 * w, end + 0.055), (0.8 * w, end + 0.10), (0.6 * w, end + 0.135),
                (0.42 * w, end + 0.145)]  # fmt: skip
    return curve(np.array(posterior).transpose(2, 0, 1)), curve(np.array(anterior).transpose(2, 0, 1))


def rearrange(anatomy: Anatomy, finding: Finding, rng: np.random.Generator) -> None:
    """Change the anatomy the way a finding does, before anything is drawn."""
    if finding.label == "Cardiomegaly" and finding.size:
        anatomy.heart_ratio = _CARDIOTHORACIC_RATIO[finding.size] + rng.uniform(-0.014, 0.014)
    elif finding.label == "Enlarged Cardiomediastinum":
        anatomy.mediastinum = rng.uniform(0.115, 0.14)
    elif finding.label == "Edema" and finding.size:
        anatomy.vessel_swelling = _VESSEL_SWELLING[finding.size]
    elif finding.label == "Atelectasis" and finding.side:
        for sign in SIGNS[finding.side]:
            anatomy.dome[sign] -= DOME_RISE + rng.uniform(-0.01, 0.01)
    elif finding.label == "Pneumothorax" and finding.size == "large" and finding.side:
        anatomy.shift -= 0.03 * SIGNS[finding.side][0]
    elif finding.label == "Fracture" and finding.side and finding.zone:
        _break_ribs(anatomy, SIGNS[finding.side][0], finding.zone, rng)


def _break_ribs(anatomy: Anatomy, sign: Sign, zone: Zone, rng: np.random.Generator) -> None:
    """Choose two neighbouring ribs whose outer parts lie in the zone, and break them."""
    along = rng.uniform(0.60, 0.74)
    depth = anatomy.depth(sign, zone) + rng.uniform(-0.015, 0.015)
    backs = rib_paths(anatomy)[0]
    heights = backs[:-1, round(along * (backs.shape[1] - 1)), 1] + anatomy.rib_pitch / 2
    first = int(np.argmin(np.abs(heights - depth)))
    step = rng.uniform(0.023, 0.029)
    for index, shift in ((first, 0.0), (first + 1, rng.uniform(-0.05, 0.03))):
        anatomy.broken_ribs.append(BrokenRib(sign=sign, index=index, along=along + shift, step=step))
