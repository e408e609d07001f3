"""Hospitals: how a film is developed and how its findings are written. Each could bring an adapter of its own.

`home` is where the phantom model was grown. `northside` differs from it in what hospitals differ in:

* **Films.** Its station sharpens: every pixel is moved away from the mean of what lies about it, 10 mm around (an
  unsharp mask, as radiography has had since films became numbers). Edges and grain get stronger, wide shadows stay.
  Gamma and contrast would change nothing: the histogram of every film is equalised before a model sees it.
* **Texts.** Findings are a numbered list in one line, an item each, heart first and devices last. What has a width is
  given in millimetres, heart and oedema by degree. Heart and pleura are always spoken of, lungs also when they have
  nothing, mediastinum and ribs only when they have something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.findings import Finding, Study
from benchmarks.phantom.report import Report, expected_readings, write_findings
from lite.eval.labels import Label, Size

HospitalName = Literal["home", "northside"]
_Stored: TypeAlias = NDArray[np.uint16]

_WIDTHS: Final[Mapping[Size, tuple[int, int]]] = {"small": (5, 14), "moderate": (15, 34), "large": (35, 70)}
MILLIMETRES: Final[Mapping[Label, Mapping[Size, tuple[int, int]]]] = {
    "Lung Lesion": {"small": (6, 14), "large": (35, 60)},
    "Pleural Effusion": _WIDTHS,
    "Pneumothorax": _WIDTHS,
}
"""The least and the most millimetres of a finding of a size; every number between is as likely."""

_DEGREE: Final[Mapping[Size, str]] = {"small": "slight", "moderate": "moderate", "large": "marked"}
# Placeholders: {mm}, {degree}, {thing} nodule/mass, {of} a device with its side, {side} and {zone} as drawn.
_ITEMS: Final[Mapping[str, tuple[str, ...]]] = {
    "Cardiomegaly": ("{degree} enlargement of the heart", "{degree} cardiac enlargement"),
    "Enlarged Cardiomediastinum": ("mediastinum widened",),
    "Edema": ("{degree} edema of the lungs", "{degree} lung edema"),
    "Consolidation": ("consolidation, {side} {zone} zone",),
    "Lung Lesion": ("{thing} of {mm} mm, {side} {zone} zone",),
    "Atelectasis": ("atelectasis, {side} lower zone",),
    "Atelectasis, bilateral": ("atelectasis, both lower zones",),
    "Pleural Effusion": ("{side} pleural fluid, {mm} mm", "{side} effusion of {mm} mm"),
    "Pleural Effusion, bilateral": ("bilateral pleural fluid, {mm} mm", "bilateral effusions of {mm} mm"),
    "Pneumothorax": ("{side} pneumothorax, {mm} mm", "{side} pneumothorax of {mm} mm"),
    "Fracture": ("rib fracture, {side} {zone} zone",),
    "Support Devices": ("{device}",),
    "Support Devices, sided": ("{device}, {side} side",),
}
# The items' order, and how each is denied where that is done.
_ORDER: Final[Mapping[Label, str | None]] = {
    "Cardiomegaly": "heart not enlarged",
    "Enlarged Cardiomediastinum": None,
    "Consolidation": "no consolidation",
    "Lung Lesion": None,
    "Edema": None,
    "Atelectasis": None,
    "Pleural Effusion": "no pleural fluid",
    "Pneumothorax": "no pneumothorax",
    "Fracture": None,
    "Support Devices": None,
}
_LUNGS: Final[tuple[Label, ...]] = ("Consolidation", "Lung Lesion", "Edema", "Atelectasis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospital:
    """What a hospital makes of a drawn film's stored values, and of what is on it."""

    develop: Callable[[_Stored], _Stored]
    write: Callable[[Study, np.random.Generator], Report]


def sharpen(stored: _Stored) -> _Stored:
    """Move each stored value of a film [S, S] away from its surroundings', to 1.9 times the distance; 12 bits stay."""
    film = stored.astype(np.float32)
    # 10 mm of a film of 430.
    around = cv2.GaussianBlur(film, (0, 0), len(film) * 10 / 430)
    sharpened: _Stored = np.clip(np.rint(film + np.float32(0.9) * (film - around)), 0, 4095).astype(np.uint16)
    return sharpened


def write_items(study: Study, rng: np.random.Generator) -> Report:
    """Write northside's findings text for `study`; another state of `rng` gives other numbers and phrasing."""
    items: list[str] = []
    denied: set[Label] = set()
    for label, denial in _ORDER.items():
        found = [finding for finding in study.findings if finding.label == label]
        items += [_item(finding, rng) for finding in found]
        others = _LUNGS if label in _LUNGS else (label,)
        if denial and not any(study.has(other) for other in others):
            items.append(denial)
            denied.add(label)
    text = " ".join(f"{number}. {item[0].upper()}{item[1:]}." for number, item in enumerate(items, start=1))
    readings = expected_readings(study, frozenset(denied))
    # A number of millimetres is no size in words.
    readings |= {label: replace(readings[label], size=None) for label in ("Pleural Effusion", "Pneumothorax")}
    return Report(text=text, readings=MappingProxyType(readings))


def _item(finding: Finding, rng: np.random.Generator) -> str:
    key = f"{finding.label}, bilateral" if finding.side == "bilateral" else finding.label
    if finding.device and finding.side:
        key = f"{finding.label}, sided"
    size = finding.size or "small"
    low, high = MILLIMETRES[finding.label][size] if finding.label in MILLIMETRES else (0, 0)
    phrases = _ITEMS[key]
    return phrases[int(rng.integers(len(phrases)))].format(
        side=finding.side,
        zone=finding.zone,
        degree=_DEGREE[size],
        thing="nodule" if size == "small" else "mass",
        device=finding.device,
        mm=int(rng.integers(low, high + 1)),
    )


HOSPITALS: Final[Mapping[HospitalName, Hospital]] = {
    "home": Hospital(develop=lambda stored: stored, write=write_findings),
    "northside": Hospital(develop=sharpen, write=write_items),
}
