"""Synthetic frontal chest films: a study's findings drawn into a thorax, as a 12-bit radiograph.

A film is a map of what the beam met on its way. Soft tissue is laid down first, the air of the lungs is taken out
of it, whatever displaces that air (heart, mediastinum, diaphragm, and most findings) puts density back, and bones
and metal are added on top. A film curve turns the sum into stored values.

    canvas     shapes in the patient's frame       scene       the layers, and a healthy chest in them
    anatomy    where things are in one patient     pathology   each finding

The committed model was trained on these films: a change of the drawing is another set of films.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.anatomy import rearrange, sample_anatomy
from benchmarks.phantom.canvas import Canvas, Floats, Mask, noise
from benchmarks.phantom.findings import DRAWN_LABELS, Study
from benchmarks.phantom.pathology import draw_finding
from benchmarks.phantom.scene import Scene, draw_chest

WHITE = 4095
"""Largest stored value of a 12-bit film."""
SIZE = 256
"""Pixels along each side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Film:
    """One drawn film.

    Attributes:
        stored: uint16 [SIZE, SIZE], 12 bits used, bright = dense (MONOCHROME2).
        regions: bool [len(DRAWN_LABELS), 32, 32], the cells of the film in which each label's findings show.
    """

    stored: NDArray[np.uint16]
    regions: NDArray[np.bool_]


def _side_marker(scene: Scene, rng: np.random.Generator) -> None:
    """Draw the technologist's lead letter: L by the patient's left shoulder or R by the right one."""
    letter: Literal["L", "R"] = "L" if rng.random() < 0.6 else "R"
    x, y = rng.uniform(0.435, 0.46), rng.uniform(0.04, 0.2)
    strokes = {
        "L": [[(0.0, 0.0), (0.0, 1.0), (0.6, 1.0)]],
        "R": [[(0.0, 1.0), (0.0, 0.0), (0.5, 0.02), (0.62, 0.25), (0.5, 0.5), (0.0, 0.52)], [(0.25, 0.5), (0.65, 1.0)]],
    }[letter]
    mark = scene.canvas.blank()
    for stroke in strokes:
        points = np.array(stroke) * (0.034, 0.04) + ((x if letter == "L" else -x - 0.02), y)
        for segment in np.stack([points[:-1], points[1:]], axis=1):
            scene.canvas.ribbon(mark, segment, 0.008)
    scene.add(mark, 0.6)


def _collimate(rng: np.random.Generator, density: Floats) -> None:
    """Blacken a narrow border that the beam did not reach."""
    size = len(density)
    left, right, top, bottom = (round(float(v) * size) for v in rng.uniform(0.0, 0.035, 4))
    density[:top] = density[size - bottom :] = 0.0
    density[:, :left] = density[:, size - right :] = 0.0


def _expose(rng: np.random.Generator, density: Floats, *, portable: bool) -> NDArray[np.uint16]:
    """Turn density into stored values: quantum noise, the film's curve, and its exposure."""
    grain, slope, gamma = rng.uniform(0.004, 0.009) + 0.003 * portable, rng.uniform(1.5, 2.2), rng.uniform(0.85, 1.2)
    black, white = rng.uniform(60, 420), rng.uniform(3300, 4000)
    density += noise(rng, 128, len(density)) * np.float32(grain)
    absorbed = 1.0 - cv2.exp(np.maximum(density, 0.0) * np.float32(-slope))
    blackening = cv2.pow(absorbed * np.float32(1 / (1 - math.exp(-slope * 1.15))), gamma)
    stored: NDArray[np.uint16] = np.clip(np.rint(black + (white - black) * blackening), 0, WHITE).astype(np.uint16)
    return stored


def _absorb(scene: Scene, vessels: Mask, rng: np.random.Generator) -> Floats:
    """Sum up what the beam met, lung markings and other texture included."""
    canvas = scene.canvas
    # Air: the chest, less what stands in it. The heart lets a little of the lung behind it through.
    air = canvas.soften(scene.chest, 0.0035) * np.float32(1 / 255)
    air *= 1.0 - canvas.soften(scene.heart, 0.0035) * np.float32(0.86 / 255)
    air *= 1.0 - canvas.soften(scene.mediastinum, 0.0045) * np.float32(0.92 / 255)
    air *= 1.0 - canvas.soften(scene.abdomen, 0.0025) * np.float32(0.97 / 255)
    thorax = canvas.soften(scene.chest, 0.05) * np.float32(1 / 255)
    air *= 0.72 + 0.28 * thorax
    marking = vessels * np.float32(0.36 / 255) * scene.vessels
    marking += 0.025 * noise(rng, 72, canvas.size) * scene.vessels
    scene.aeration *= 1.0 - np.clip(marking, -0.2, 0.6)

    air *= scene.aeration
    density = scene.body * np.float32(0.28 / 255) + canvas.soften(scene.body, 0.045) * np.float32(0.24 / 255)
    density += canvas.soften(scene.solid, 0.02) * np.float32(0.10 / 255)
    density += canvas.soften(scene.abdomen, 0.05) * np.float32(0.09 / 255)
    density += canvas.soften(scene.mediastinum, 0.012) * np.float32(0.09 / 255)
    density += canvas.soften(scene.heart, 0.02) * np.float32(0.06 / 255)
    density += scene.density
    density += scene.bones * (0.2 + 0.95 * air)
    density -= 0.40 * air
    density += 0.012 * noise(rng, 6, canvas.size)
    return cast("Floats", cv2.GaussianBlur(density, (3, 3), 0.0018 * canvas.size))


def draw_film(study: Study) -> Film:
    """Draw the film of a study.

    The patient, each label's findings and the noise have random streams of their own: leaving a finding out of a
    study leaves everything else on its film as it was.
    """
    keys = np.random.default_rng([study.seed, 1]).integers(1 << 63, size=3 + len(DRAWN_LABELS))
    patient, film, grain = (np.random.default_rng(key) for key in keys[:3])
    streams = {finding.label: np.random.default_rng(keys[3 + DRAWN_LABELS.index(finding.label)])
               for finding in study.findings}  # fmt: skip
    portable = study.view == "AP"
    anatomy = sample_anatomy(patient, portable=portable)
    for finding in study.findings:
        rearrange(anatomy, finding, streams[finding.label])
    canvas = Canvas(
        SIZE,
        rotation=film.normal(0.0, 0.022 if portable else 0.012),
        scale=film.uniform(1.0, 1.09),
        offset=(film.normal(0.0, 0.012), film.normal(0.0, 0.012)),
    )
    scene = Scene(canvas, anatomy, girth=patient.uniform(0.055, 0.12))
    vessels = draw_chest(scene, patient)
    for finding in study.findings:
        draw_finding(scene, finding, streams[finding.label])
    if film.random() < 0.6:
        _side_marker(scene, film)
    density = _absorb(scene, vessels, grain)
    if portable and film.random() < 0.5:
        _collimate(film, density)
    return Film(stored=_expose(grain, density, portable=portable), regions=scene.regions())
