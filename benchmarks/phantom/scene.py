"""The film while it is drawn, and all of a healthy chest: ribs, shoulders, spine, airway, vessels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.anatomy import (
    RIBS,
    Anatomy,
    BrokenRib,
    abdomen_outline,
    body_outline,
    heart_outline,
    lung_outline,
    mediastinum_outline,
    rib_paths,
)
from benchmarks.phantom.canvas import LEFT, RIGHT, Canvas, Floats, Mask, Points, curve, mirror, union, without
from benchmarks.phantom.findings import DRAWN_LABELS
from lite.eval.labels import Label

REGION_GRID = 32
"""Cells along each side of `Film.regions`."""


class Scene:
    """The film while it is drawn: what displaces air, what adds density, and where each label shows."""

    def __init__(self, canvas: Canvas, anatomy: Anatomy, *, girth: float) -> None:
        self.canvas, self.anatomy = canvas, anatomy
        shape = (canvas.size, canvas.size)
        self.aeration = np.ones(shape, np.float32)  # multiplies the air of the lungs
        self.density = np.zeros(shape, np.float32)  # added on top of everything
        self.bones = np.zeros(shape, np.float32)  # added too, but drowned by scatter where the body is thick
        self.vessels = np.ones(shape, np.float32)  # multiplies the lung markings
        self.body = canvas.fill(canvas.blank(), body_outline(anatomy, girth))
        self.chest, self.abdomen = canvas.blank(), canvas.blank()  # the inside of the rib cage, and below
        for sign in (RIGHT, LEFT):
            canvas.fill(self.chest, lung_outline(anatomy, sign))
            canvas.fill(self.abdomen, abdomen_outline(anatomy, sign))
        self.heart = canvas.fill(canvas.blank(), heart_outline(anatomy))
        self.mediastinum = canvas.fill(canvas.blank(), mediastinum_outline(anatomy))
        self.solid = union(union(self.heart, self.mediastinum), self.abdomen)
        self.lungs = without(self.chest, self.solid)  # air-filled chest
        self.thorax = without(self.chest, canvas.soften(self.solid, 0.003))  # the same with soft edges
        self.shown: dict[Label, Mask] = {}

    def displace_air(self, mask: Mask, strength: float) -> None:
        """Replace a share of the lung's air by tissue where `mask` is set."""
        self.aeration *= 1.0 - mask * np.float32(strength / 255)

    def add(self, mask: Mask, density: float) -> None:
        """Put density on the film (negative takes it away) where `mask` is set."""
        self.density += mask * np.float32(density / 255)

    def show(self, label: Label, mask: Mask) -> None:
        """Mark where a label is to be seen."""
        self.shown[label] = union(self.shown[label], mask) if label in self.shown else mask.copy()

    def regions(self) -> NDArray[np.bool_]:
        """Bring what was marked to the grid; every drawn finding keeps at least its best cell."""
        regions = np.zeros((len(DRAWN_LABELS), REGION_GRID, REGION_GRID), np.bool_)
        for label, mask in self.shown.items():
            cells = cv2.resize(mask, (REGION_GRID, REGION_GRID), interpolation=cv2.INTER_AREA)
            regions[DRAWN_LABELS.index(label)] = cells >= max(1.0, min(60.0, 0.5 * float(cells.max())))
        return regions


def draw_chest(scene: Scene, rng: np.random.Generator) -> Mask:
    """Draw what every chest has, and what some have; return the pulmonary vessels, which mark the air."""
    vessels = _draw_vessels(scene, rng)
    _draw_spine(scene)
    _draw_airway(scene)
    _draw_ribs(scene)
    _draw_shoulders(scene)
    if rng.random() < 0.35:
        _draw_breasts(scene, rng)
    if rng.random() < 0.6:
        _draw_gastric_bubble(scene, rng)
    return vessels


def _bone(canvas: Canvas, mask: Mask, thickness: float) -> Floats:
    """Turn the outline of a bone into density: a hollow tube, so denser at its edges."""
    inner = canvas.soften(mask, 0.006)
    edge = without(mask, inner)
    return mask * np.float32(thickness / 255) + edge * np.float32(1.5 * thickness / 255)


def _draw_ribs(scene: Scene) -> None:
    """Draw the ribs: posterior arcs, the brighter ones, and anterior arcs that cross them further out and lower."""
    canvas, anatomy = scene.canvas, scene.anatomy
    posterior, anterior = canvas.blank(), canvas.blank()
    broken = {(rib.sign, rib.index): rib for rib in anatomy.broken_ribs}
    backs, fronts = rib_paths(anatomy)
    for sign in (RIGHT, LEFT):
        whole = [index for index in range(RIBS) if (sign, index) not in broken]
        canvas.ribbons(posterior, mirror(backs[whole], sign), 0.021)
        canvas.ribbons(anterior, mirror(fronts[:7], sign), np.linspace(0.02, 0.026, fronts.shape[1]))
        for index in set(range(RIBS)).difference(whole):
            _draw_broken_rib(scene, posterior, mirror(backs[index], sign), broken[sign, index])
    scene.bones += _bone(canvas, posterior, 0.062)
    scene.bones += _bone(canvas, canvas.soften(anterior, 0.003), 0.038)


def _draw_broken_rib(scene: Scene, posterior: Mask, path: Points, rib: BrokenRib) -> None:
    """Draw a rib fracture: a dark gap, the outer fragment stepped off, both ends bright with callus."""
    canvas = scene.canvas
    cut = int(rib.along * (len(path) - 1))
    inner, outer = path[:cut], np.add(path[cut + 2 :], (0.0, rib.step))
    canvas.ribbon(posterior, inner, 0.022)
    canvas.ribbon(posterior, outer, 0.022)
    ends = canvas.blank()
    swelling = np.array([0.018, 0.022, 0.026, 0.03, 0.03])
    canvas.ribbon(ends, inner[-5:], swelling)
    canvas.ribbon(ends, outer[:5], swelling[::-1])
    scene.add(canvas.soften(ends, 0.004), 0.34)
    gap = canvas.ellipse(canvas.blank(), tuple((inner[-1] + outer[0]) / 2), (0.008, 0.016))
    scene.add(canvas.soften(gap, 0.003), -0.1)
    around = canvas.ribbon(canvas.blank(), np.concatenate([inner[-7:], outer[:7]]), 0.05)
    scene.show("Fracture", around)


def _draw_shoulders(scene: Scene) -> None:
    """Draw clavicles, scapulae and humeral heads."""
    canvas, anatomy = scene.canvas, scene.anatomy
    clavicles, scapulae = canvas.blank(), canvas.blank()
    t, y = anatomy.apex, anatomy.apex + anatomy.clavicle
    for sign in (RIGHT, LEFT):
        path = curve([(0.04, y + 0.085), (0.10, y + 0.06), (0.19, y + 0.035), (0.28, y - 0.005), (0.37, y - 0.03)])
        canvas.ribbon(clavicles, mirror(path, sign), np.linspace(0.03, 0.018, len(path)))
        inner = anatomy.scapula * float(anatomy.wall(t + 0.25))
        blade = [(0.41, t + 0.06), (inner + 0.02, t + 0.04), (inner, t + 0.13), (inner + 0.025, t + 0.37),
                 (inner + 0.05, t + 0.40), (inner + 0.085, t + 0.30), (0.43, t + 0.12)]  # fmt: skip
        canvas.fill(scapulae, mirror(curve(blade, closed=True), sign))
        canvas.ellipse(clavicles, (sign * 0.455, t + 0.075), (0.042, 0.045))
    scene.bones += _bone(canvas, clavicles, 0.105)
    scene.bones += _bone(canvas, canvas.soften(scapulae, 0.002), 0.024)


def _draw_spine(scene: Scene) -> None:
    """Draw the spine behind the mediastinum: vertebral bodies with darker discs between them."""
    canvas, anatomy = scene.canvas, scene.anatomy
    bodies = canvas.blank()
    pitch = anatomy.rib_pitch * 0.86
    for index in range(2, 24):
        y = -0.04 + pitch * index
        half = 0.034 + 0.0006 * index
        body = [(-half, y), (-half + 0.004, y + pitch * 0.4), (-half, y + pitch * 0.8), (half, y + pitch * 0.8),
                (half - 0.004, y + pitch * 0.4), (half, y)]  # fmt: skip
        canvas.fill(bodies, np.array(body))
    scene.add(canvas.soften(bodies, 0.004), 0.045)


def _draw_airway(scene: Scene) -> None:
    """Draw the air column of the trachea, down the midline to the carina, and both main bronchi."""
    canvas, anatomy = scene.canvas, scene.anatomy
    airway = canvas.blank()
    c, x = anatomy.carina, anatomy.shift
    canvas.ribbon(airway, curve([(0.0, -0.1), (0.0, anatomy.apex), (x - 0.004, c)]), 0.034)
    canvas.ribbon(airway, curve([(x - 0.006, c - 0.01), (x - 0.03, c + 0.03), (x - 0.06, c + 0.055)]), 0.022)
    canvas.ribbon(airway, curve([(x + 0.002, c - 0.01), (x + 0.035, c + 0.025), (x + 0.08, c + 0.045)]), 0.02)
    scene.add(canvas.soften(airway, 0.003), -0.12)


def _draw_vessels(scene: Scene, rng: np.random.Generator) -> Mask:
    """Draw the pulmonary vessels: hilar trunks that fan out, fork and taper, larger towards the bases."""
    canvas, anatomy = scene.canvas, scene.anatomy
    vessels = canvas.blank()
    along = np.linspace(0, 1, 7)[None, :, None]
    for sign in (RIGHT, LEFT):
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


def _draw_breasts(scene: Scene, rng: np.random.Generator) -> None:
    """Draw breast shadows over the lower chest: faint, with a crescent of an edge below."""
    canvas, anatomy = scene.canvas, scene.anatomy
    weight, drop = rng.uniform(0.03, 0.07), rng.uniform(0.0, 0.05)
    breasts = canvas.blank()
    for sign in (RIGHT, LEFT):
        canvas.ellipse(breasts, (sign * 0.62 * anatomy.half_width, 0.62 + drop), (0.135, 0.14), 0.2 * sign)
    scene.bones += canvas.soften(breasts, 0.012) * np.float32(weight / 255)


def _draw_gastric_bubble(scene: Scene, rng: np.random.Generator) -> None:
    """Draw gas in the stomach, under the left dome."""
    canvas, anatomy = scene.canvas, scene.anatomy
    x, width, height = rng.uniform(0.13, 0.2), rng.uniform(0.03, 0.06), rng.uniform(0.02, 0.035)
    bubble = canvas.ellipse(canvas.blank(), (x, anatomy.dome[LEFT] + 0.03 + height), (width, height), 0.1)
    scene.add(canvas.soften(bubble, 0.008), -0.13)
