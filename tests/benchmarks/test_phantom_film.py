"""The films: same seed same film; each finding changes its film, where it says it does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from benchmarks.phantom.contact_sheet import caption, contact_sheet
from benchmarks.phantom.film import Film, draw_film
from benchmarks.phantom.findings import DRAWN_LABELS, Finding, Study, View, sample_study
from benchmarks.phantom.scene import REGION_GRID
from lite.eval.labels import Size, Zone
from lite.image.rendering import mimic_cxr_jpg

REFERENCES = ROOT / "benchmarks" / "references" / "phantom"
SIZES: tuple[Size, ...] = ("small", "moderate", "large")
ONE_SIDED = [
    *(Finding(label="Pleural Effusion", side="right", size=size) for size in SIZES),
    *(Finding(label="Pneumothorax", side="right", size=size) for size in SIZES),
    Finding(label="Consolidation", side="right", zone="upper"),
    Finding(label="Consolidation", side="right", zone="lower"),
    Finding(label="Atelectasis", side="right", zone="lower"),
    Finding(label="Lung Lesion", side="right", zone="mid", size="small"),
    Finding(label="Lung Lesion", side="right", zone="lower", size="large"),
    Finding(label="Fracture", side="right", zone="upper"),
    Finding(label="Fracture", side="right", zone="lower"),
]
CENTRAL = [
    *(Finding(label="Cardiomegaly", size=size) for size in SIZES),
    *(Finding(label="Edema", size=size) for size in SIZES),
    Finding(label="Enlarged Cardiomediastinum"),
    Finding(label="Support Devices", device="endotracheal tube"),
    Finding(label="Support Devices", side="left", device="central venous line"),
    Finding(label="Support Devices", side="left", device="pacemaker"),
]


def study(*findings: Finding, seed: int = 7, view: View = "PA") -> Study:
    return Study(seed=seed, scenario="screening", view=view, findings=findings)


def region(film: Film, finding: Finding) -> np.ndarray:
    return film.regions[DRAWN_LABELS.index(finding.label)]


def change(with_it: Film, without: Film) -> np.ndarray:
    """Mean absolute difference of two films in each cell of the region grid."""
    difference = np.abs(with_it.stored.astype(float) - without.stored.astype(float))
    cell = difference.shape[0] // REGION_GRID
    return difference.reshape(REGION_GRID, cell, REGION_GRID, cell).mean(axis=(1, 3))


def grown(cells: np.ndarray) -> np.ndarray:
    padded = np.pad(cells, 1)
    shifts = [padded[y : y + REGION_GRID, x : x + REGION_GRID] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(shifts)


def name(finding: Finding) -> str:
    return caption(finding).replace(" ", "-")


def test_same_seed_same_film_of_twelve_bits_and_another_seed_another() -> None:
    first, again, other = (draw_film(sample_study(seed)) for seed in (11, 11, 12))
    np.testing.assert_array_equal(first.stored, again.stored)
    np.testing.assert_array_equal(first.regions, again.regions)
    assert np.any(first.stored != other.stored)
    for film in (first, other):
        assert (film.stored.shape, film.stored.dtype) == ((256, 256), np.uint16)
        assert film.stored.max() <= 4095
        assert int(film.stored.max()) - int(film.stored.min()) > 2000
        assert (film.regions.shape, film.regions.dtype) == ((len(DRAWN_LABELS), REGION_GRID, REGION_GRID), np.bool_)


def test_films_are_drawn_as_they_were_when_the_model_was_trained() -> None:
    """The committed films show every kind of finding; another OpenCV changes a few pixels by a few grey levels."""
    seen = set()
    for entry in json.loads((REFERENCES / "studies.json").read_text(encoding="utf-8")):
        drawn_study = sample_study(entry["phantom"]["seed"])
        seen |= {finding.device or finding.label for finding in drawn_study.findings}
        now = mimic_cxr_jpg(draw_film(drawn_study).stored, monochrome1=False).astype(int)
        apart = np.abs(now - np.asarray(Image.open(REFERENCES / entry["image"])))
        assert apart.max() < 16
        assert apart.mean() < 0.01
    devices = {"endotracheal tube", "central venous line", "pacemaker"}
    assert seen == {*DRAWN_LABELS, *devices} - {"No Finding", "Support Devices"}


@pytest.mark.parametrize("finding", [*ONE_SIDED, *CENTRAL], ids=name)
@pytest.mark.parametrize("view", ["PA", "AP"])
def test_finding_shows_in_its_region_and_hardly_elsewhere(finding: Finding, view: View) -> None:
    with_it, without = draw_film(study(finding, view=view)), draw_film(study(view=view))
    changed, where = change(with_it, without), region(with_it, finding)
    assert where.any()
    assert not without.regions.any()
    # Every mark must be worth seeing, well over the noise of about 30 stored values.
    assert changed[where].mean() > 60
    # A tension pneumothorax pushes the mediastinum over, and a swollen lung has thick vessels all over.
    share = 0.5 if finding.size == "large" and finding.label == "Pneumothorax" else 0.7
    assert changed[grown(where)].sum() > share * changed.sum()


@pytest.mark.parametrize("finding", ONE_SIDED, ids=name)
def test_sides_are_the_patients(finding: Finding) -> None:
    for seed in (1, 2, 3):
        right = region(draw_film(study(finding, seed=seed)), finding)
        left = region(draw_film(study(replace(finding, side="left"), seed=seed)), finding)
        assert np.nonzero(right)[1].mean() < REGION_GRID / 2 - 2
        assert np.nonzero(left)[1].mean() > REGION_GRID / 2 + 2


def test_bilateral_findings_show_on_both_sides() -> None:
    for finding in (
        Finding(label="Pleural Effusion", side="bilateral", size="small"),
        Finding(label="Atelectasis", side="bilateral", zone="lower"),
    ):
        where = region(draw_film(study(finding)), finding)
        assert where[:, :12].any()
        assert where[:, 20:].any()


@pytest.mark.parametrize("label", ["Consolidation", "Lung Lesion", "Fracture"])
def test_zones_lie_one_below_the_other(label: str) -> None:
    rows: dict[Zone, list[float]] = {"upper": [], "mid": [], "lower": []}
    for zone, depths in rows.items():
        finding = Finding(label=label, side="right", zone=zone, size="small" if label == "Lung Lesion" else None)  # type: ignore[arg-type]
        for seed in range(3):
            depths.append(float(np.nonzero(region(draw_film(study(finding, seed=seed)), finding))[0].mean()))
    assert np.mean(rows["upper"]) + 3 < np.mean(rows["mid"])
    assert np.mean(rows["mid"]) + 3 < np.mean(rows["lower"])


@pytest.mark.parametrize("label", ["Cardiomegaly", "Edema", "Pleural Effusion", "Pneumothorax", "Lung Lesion"])
def test_sizes_differ_on_every_film(label: str) -> None:
    side = None if label in ("Cardiomegaly", "Edema") else "left"
    zone = "upper" if label == "Lung Lesion" else None
    sizes = [size for size in SIZES if label != "Lung Lesion" or size != "moderate"]
    for seed in range(3):
        without = draw_film(study(seed=seed))
        changes = [
            change(draw_film(study(Finding(label=label, side=side, zone=zone, size=size), seed=seed)), without).sum()  # type: ignore[arg-type]
            for size in sizes
        ]
        assert all(smaller * 1.2 < larger for smaller, larger in pairwise(changes))


def test_findings_do_not_disturb_each_other() -> None:
    lesion = Finding(label="Lung Lesion", side="left", zone="upper", size="large")
    fracture = Finding(label="Fracture", side="right", zone="lower")
    both, alone = draw_film(study(lesion, fracture)), draw_film(study(fracture))
    changed = change(both, alone)
    assert changed[~grown(region(both, lesion))].max() < 1
    np.testing.assert_array_equal(region(both, fracture), region(alone, fracture))


def test_contact_sheet_holds_the_films(tmp_path: Path) -> None:
    out = contact_sheet(tmp_path / "new" / "sheet.png", count=7, seed=3, film_size=112)
    with Image.open(out) as sheet:
        assert sheet.width == 6 * 256
        assert sheet.height > 2 * 256
    assert caption(Finding(label="Pleural Effusion", side="left", size="small")) == "small left pleural effusion"
