"""How each finding looks: what it puts where air was, and the region in which it shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeVar, cast

import cv2
import numpy as np

from benchmarks.phantom.anatomy import DOME_RISE, abdomen_outline, heart_outline, lung_outline, mediastinum_outline
from benchmarks.phantom.canvas import (
    LEFT,
    RIGHT,
    SIGNS,
    Mask,
    Points,
    Sign,
    curve,
    ellipse_points,
    mirror,
    noise,
    overlap,
    union,
    without,
)
from benchmarks.phantom.findings import Finding
from benchmarks.phantom.scene import Scene
from lite.eval.labels import Label, Side, Zone

_T = TypeVar("_T")


def _sign(finding: Finding) -> Sign:
    return _signs(finding)[0]


def _signs(finding: Finding) -> tuple[Sign, ...]:
    return SIGNS[cast("Side", finding.side)]


def _by_size(finding: Finding, small: _T, moderate: _T, large: _T) -> _T:
    return small if finding.size == "small" else moderate if finding.size == "moderate" else large


def _draw_cardiomegaly(scene: Scene, _: Finding, __: np.random.Generator) -> None:
    """Mark the borders of a large heart: the heart's outline has them already."""
    _mark_sides(scene, "Cardiomegaly", heart_outline(scene.anatomy), 0.55)


def _draw_wide_mediastinum(scene: Scene, _: Finding, __: np.random.Generator) -> None:
    """Mark the sides of a wide mediastinum: its outline has them already."""
    outline, anatomy = mediastinum_outline(scene.anatomy), scene.anatomy
    above_heart = (outline[:, 1] > anatomy.apex) & (outline[:, 1] < anatomy.carina + 0.13)
    _mark_sides(scene, "Enlarged Cardiomediastinum", outline[above_heart], 0.4)


def _mark_sides(scene: Scene, label: Label, outline: Points, core: float) -> None:
    """Mark what is in an outline and not in the same drawn `core` times as wide."""
    whole, inner = (scene.canvas.fill(scene.canvas.blank(), outline * (share, 1.0)) for share in (1.0, core))
    scene.show(label, without(whole, inner))


def _draw_effusion(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a pleural effusion: fluid that blunts the angle, its upper edge a meniscus climbing the chest wall."""
    canvas, anatomy = scene.canvas, scene.anatomy
    height, sag = _by_size(finding, (0.16, 0.15), (0.33, 0.115), (0.53, 0.12))
    for sign in _signs(finding):
        top = anatomy.angle[sign] - height + rng.uniform(-0.012, 0.012)
        bottom = anatomy.angle[sign] + 0.08
        share = np.linspace(1.1, 0.05, 15)
        w = anatomy.half_width
        surface = np.stack([share * w, top + sag * (1 - np.minimum(share, 1.0) ** 2.6)], axis=1)
        outline = np.concatenate([surface, [(0.0, bottom), (1.1 * w, bottom)]])
        fluid = canvas.fill(canvas.blank(), mirror(outline, sign))
        veil = canvas.soften(fluid, 0.03)
        fluid = canvas.soften(fluid, 0.004)
        scene.displace_air(fluid, 0.95)
        scene.displace_air(veil, 0.25)
        scene.add(overlap(fluid, scene.thorax), 0.06)
        scene.vessels *= 1.0 - fluid * np.float32(0.9 / 255)
        scene.show("Pleural Effusion", overlap(fluid, scene.lungs))


def _draw_consolidation(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a consolidation: a fluffy dense patch with air bronchograms in it."""
    canvas, anatomy = scene.canvas, scene.anatomy
    sign = _sign(finding)
    y = anatomy.depth(sign, cast("Zone", finding.zone)) + rng.uniform(-0.015, 0.015)
    x = anatomy.beside_heart(sign, y, rng.uniform(0.52, 0.62) * float(anatomy.wall(y)) + 0.02, 0.08)
    patch = canvas.blank()
    long, short, turn = rng.uniform(0.085, 0.098), rng.uniform(0.064, 0.073), rng.uniform(-0.7, 0.7)
    canvas.ellipse(patch, (sign * x, y), (long, short), turn)
    # Lobules about the rim make the edge ragged.
    rim = ellipse_points((sign * x, y), (0.95 * long, 1.0 * short), turn)[rng.integers(28, size=9)]
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
        canvas.ribbon(bronchi, mirror(start + np.linspace(0, 0.095, 6)[:, None] * outward, sign), 0.0065)
    fluffy = canvas.soften(patch, 0.016)
    scene.aeration *= 1.0 - fluffy * np.float32(0.93 / 255) * np.clip(
        1.0 + 0.1 * noise(rng, 28, canvas.size), 0.6, 1.05
    )
    scene.add(fluffy, 0.05)
    scene.vessels *= 1.0 - fluffy * np.float32(0.8 / 255)
    scene.add(canvas.soften(bronchi, 0.002), -0.035)
    scene.show("Consolidation", overlap(patch, scene.lungs))


def _draw_atelectasis(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw atelectasis: dense plates lying just above a raised hemidiaphragm."""
    canvas, anatomy = scene.canvas, scene.anatomy
    for sign in _signs(finding):
        plates = canvas.blank()
        dome, w = anatomy.dome[sign], anatomy.half_width
        for row in range(3):
            y = dome - 0.035 - 0.04 * row + rng.uniform(-0.008, 0.008)
            length, tilt = rng.uniform(0.15, 0.19), rng.uniform(-0.03, 0.035)
            x0 = anatomy.beside_heart(sign, y, rng.uniform(0.50, 0.59) * w, length / 2) - length / 2
            plate = curve([(x0, y + tilt), (x0 + length / 2, y + tilt / 2 - 0.004), (x0 + length, y)])
            width = 0.017 * np.sin(np.linspace(0.35, np.pi - 0.35, len(plate)))
            canvas.ribbon(plates, mirror(plate, sign), width)
        scene.displace_air(canvas.soften(plates, 0.002), 0.8)
        scene.displace_air(canvas.soften(plates, 0.025), 0.4)
        scene.add(plates, 0.03)
        around = canvas.soften(plates, 0.008)
        dome_edge = abdomen_outline(anatomy, sign)
        usual_edge = np.add(dome_edge, (0.0, DOME_RISE))
        risen = without(canvas.fill(canvas.blank(), dome_edge), canvas.fill(canvas.blank(), usual_edge))
        plates_and_dome = cast("Mask", cv2.add(cv2.add(around, around), risen))
        scene.show("Atelectasis", overlap(plates_and_dome, scene.chest))


def _draw_edema(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw pulmonary oedema: a bat-wing haze about both hila, thick vessels, Kerley B lines at the bases."""
    canvas, anatomy = scene.canvas, scene.anatomy
    strength, reach = _by_size(finding, (0.47, 0.09), (0.66, 0.125), (0.84, 0.17))
    wings, lines = canvas.blank(), canvas.blank()
    for sign in (RIGHT, LEFT):
        y = anatomy.hilum[sign] + 0.05
        canvas.ellipse(wings, (sign * (0.05 + reach * 0.75), y), (reach, 1.3 * reach), -0.2 * sign)
        for row in range(7):
            level = anatomy.angle[sign] - 0.13 - 0.023 * row + rng.uniform(-0.003, 0.003)
            outer = float(anatomy.wall(level)) - 0.004
            line = np.array([(outer, level), (outer - 0.025, level), (outer - 0.05, level + 0.003)])
            canvas.ribbon(lines, mirror(line, sign), 0.006)
    cotton = np.clip(1.0 + 0.1 * noise(rng, 18, canvas.size), 0.6, 1.3)
    haze = canvas.soften(wings, 0.03) * np.float32(strength / 255) * cotton
    scene.aeration *= 1.0 - np.clip(haze, 0.0, 0.92)
    scene.displace_air(lines, 0.25 + 0.35 * strength)
    scene.show("Edema", overlap(wings, scene.lungs))


def _draw_pneumothorax(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a pneumothorax: a thin pleural line, and beyond it black air without any vessel."""
    canvas, anatomy = scene.canvas, scene.anatomy
    sign = _sign(finding)
    inset = _by_size(finding, 0.045, 0.105, 0.19) + rng.uniform(-0.008, 0.008)
    fall = _by_size(finding, 0.075, 0.13, 0.20) + rng.uniform(-0.008, 0.008)
    wall = anatomy.wall_points()
    # The lung hangs away from apex and wall; a small pneumothorax closes half way down.
    down = (wall[:, 1] - anatomy.apex) / (wall[-1, 1] - anatomy.apex)
    start, slope = _by_size(finding, (1.15, 1.6), (1.25, 0.85), (1.05, 0.25))
    gap = inset * np.clip(start - slope * down, 0.0, 1.0)
    edge = wall - np.stack([np.minimum(gap, wall[:, 0] - 0.09), np.zeros(len(wall))], axis=1)
    edge[:, 1] += fall * np.clip(1 - 2.2 * down, 0.0, 1.0)
    pleura = curve(np.concatenate([[(0.05, edge[0, 1] + 0.025)], edge]))
    outline = np.concatenate([pleura, [(edge[-1, 0], 1.1), (-0.05, 1.1), (-0.05, pleura[0, 1])]])
    lung = canvas.fill(canvas.blank(), mirror(outline, sign))
    half = canvas.fill(canvas.blank(), lung_outline(anatomy, sign))
    space = overlap(without(half, lung), scene.lungs)
    line = canvas.blank()
    visible = pleura[np.interp(pleura[:, 1], wall[:, 1], gap) > 0.006] if finding.size == "small" else pleura
    canvas.ribbon(line, mirror(visible, sign), 0.0085)
    line = overlap(line, scene.lungs)
    collapsed = overlap(lung, half)
    scene.vessels *= 1.0 - space * np.float32(1 / 255)
    scene.add(space, -0.095)
    scene.add(line, 0.16)
    scene.displace_air(collapsed, _by_size(finding, 0.04, 0.12, 0.38))
    scene.show("Pneumothorax", union(space, line))


def _draw_lesion(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a lung lesion: one round, sharply edged opacity, a nodule or a mass."""
    canvas, anatomy = scene.canvas, scene.anatomy
    sign = _sign(finding)
    y = anatomy.depth(sign, cast("Zone", finding.zone)) + rng.uniform(-0.02, 0.02)
    radius = rng.uniform(0.027, 0.031) if finding.size == "small" else rng.uniform(0.056, 0.066)
    outer = float(anatomy.wall(y)) - radius - 0.015
    x = anatomy.beside_heart(sign, y, rng.uniform(min(0.10 + radius, outer), outer), radius + 0.015)
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    lobes = 1 + 0.05 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.04 * np.cos(3 * angle + rng.uniform(0, 6))
    outline = np.stack([sign * x + radius * lobes * np.cos(angle), y + radius * lobes * np.sin(angle)], axis=1)
    lesion = canvas.soften(canvas.fill(canvas.blank(), outline), 0.003)
    scene.displace_air(lesion, 0.75)
    scene.add(lesion, 0.065)
    scene.show("Lung Lesion", lesion)


def _draw_tube(scene: Scene, _: Finding, rng: np.random.Generator) -> None:
    """Draw an endotracheal tube: two bright walls down the trachea, the tip above the carina."""
    canvas, anatomy = scene.canvas, scene.anatomy
    tip = anatomy.carina - rng.uniform(0.045, 0.075)
    x = anatomy.shift
    path = curve([(0.0, -0.1), (0.002, anatomy.apex), (0.7 * x, tip)])
    walls = canvas.blank()
    for side in (-0.0095, 0.0095):
        canvas.ribbon(walls, np.add(path, (side, 0.0)), 0.0075)
    canvas.ribbon(walls, path[-3:], 0.016, 120)
    scene.add(walls, 0.28)
    scene.show("Support Devices", canvas.ribbon(canvas.blank(), path, 0.04))


def _draw_line(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a central venous line: a bright thread from neck or subclavian vein into the superior vena cava."""
    canvas, anatomy = scene.canvas, scene.anatomy
    sign = _sign(finding)
    t, c, cava = anatomy.apex, anatomy.carina, anatomy.shift - 0.042
    tip = (cava, c + rng.uniform(0.05, 0.09))
    end = [(cava - 0.002, c - 0.06), (cava - 0.002, c), tip]
    if rng.random() < 0.55:
        start = [(sign * 0.40, t + 0.12), (sign * 0.31, t + 0.055), (sign * 0.2, t + 0.045), (sign * 0.1, t + 0.08)]
    else:
        start = [(sign * 0.12, -0.1), (sign * 0.095, 0.0), (sign * 0.085, t), (sign * 0.075, t + 0.07)]
    path = curve(start + ([(0.01, t + 0.125)] if sign == LEFT else []) + end)
    scene.add(canvas.ribbon(canvas.blank(), path, 0.014), 0.32)
    scene.show("Support Devices", canvas.ribbon(canvas.blank(), path, 0.03))


def _draw_pacemaker(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw a pacemaker: a metal box under the clavicle, its leads through the vena cava into atrium and ventricle."""
    canvas, anatomy = scene.canvas, scene.anatomy
    sign = _sign(finding)
    t, c, cava = anatomy.apex, anatomy.carina, anatomy.shift - 0.045
    x, y = rng.uniform(0.24, 0.28), t + rng.uniform(0.095, 0.125)
    box, shine, leads = canvas.blank(), canvas.blank(), canvas.blank()
    case = [(-1, -0.7), (-0.7, -1), (0.7, -1), (1, -0.7), (1, 0.5), (0.6, 1), (-0.6, 1), (-1, 0.5)]
    outline = curve(case, closed=True) * (0.048, 0.042) + (sign * x, y)
    canvas.fill(box, outline)
    canvas.ellipse(shine, (sign * x, y + 0.008), (0.028, 0.02))
    start = [(sign * (x - 0.04), y - 0.03), (sign * (x - 0.1), y - 0.055), (sign * 0.09, t + 0.055)]
    if sign == LEFT:
        start.append((0.0, t + 0.12))
    heart = anatomy.heart_ratio * 2 * anatomy.half_width
    bottom = anatomy.dome[LEFT]
    ventricle = [(cava, c), (cava - 0.01, c + 0.12), (cava + 0.03, bottom - 0.06), (0.1, bottom - 0.02),
                 (0.5 * heart + anatomy.shift, bottom - 0.035)]  # fmt: skip
    atrium = [(cava, c), (cava - 0.012, c + 0.13), (cava - 0.02, c + 0.2), (cava - 0.045, c + 0.17)]
    for end in (ventricle, atrium):
        canvas.ribbon(leads, curve(start + end), 0.0075)
    scene.add(leads, 0.17)
    scene.add(box, 0.5)
    scene.add(shine, 0.15)
    scene.show("Support Devices", union(canvas.soften(box, 0.004), canvas.soften(leads, 0.004)))


_DRAWINGS: Final[dict[str, Callable[[Scene, Finding, np.random.Generator], None]]] = {
    "Cardiomegaly": _draw_cardiomegaly,
    "Enlarged Cardiomediastinum": _draw_wide_mediastinum,
    "Pleural Effusion": _draw_effusion,
    "Consolidation": _draw_consolidation,
    "Atelectasis": _draw_atelectasis,
    "Edema": _draw_edema,
    "Pneumothorax": _draw_pneumothorax,
    "Lung Lesion": _draw_lesion,
    "endotracheal tube": _draw_tube,
    "central venous line": _draw_line,
    "pacemaker": _draw_pacemaker,
}


def draw_finding(scene: Scene, finding: Finding, rng: np.random.Generator) -> None:
    """Draw one finding and mark where it shows. Fractures are drawn with the ribs."""
    if finding.label != "Fracture":
        _DRAWINGS[finding.device or finding.label](scene, finding, rng)
