"""What one looks for in phantom films: short descriptions of a finding, and which studies answer them.

Reports say everything of a film; who looks for films says one thing, more or less exactly: "pneumothorax", "left
pleural effusion", "large mass, right upper zone". A finding answers all descriptions that leave some of it out.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final, TypeAlias

from benchmarks.phantom.findings import Finding, Study

if TYPE_CHECKING:
    import numpy as np

Query: TypeAlias = tuple[str, str | None, str | None, str | None]
"""What it is called, side, size, zone; None: whichever."""

_NAMES: Final = {
    "Enlarged Cardiomediastinum": "widening of the mediastinum",
    "Cardiomegaly": "cardiomegaly",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Fracture": "rib fracture",
}
_DEGREES: Final = {"small": "mild", "moderate": "moderate", "large": "severe"}
_NOTHING: Final = "no acute cardiopulmonary abnormality"
_KEPT: Final = {"side": 0.7, "size": 0.3, "zone": 0.4}
"""How often a description says it, where there is something to say."""
SIDES: Final = ("left", "right")
LABEL_QUERIES: Final[tuple[Query, ...]] = (
    *((name, side, None, None) for name in ("pleural effusion", "pneumothorax", "consolidation") for side in SIDES),
    *((name, None, None, None) for name in ("cardiomegaly", "pulmonary edema", "widening of the mediastinum")),
    *((name, None, None, None) for name in ("atelectasis", "rib fracture", "nodule", "mass")),
    *((name, None, None, None) for name in ("endotracheal tube", "central venous line", "pacemaker")),
    (_NOTHING, None, None, None),
)
"""What the phantom is measured by: each is looked for in films that it was not trained on."""


def name_of(finding: Finding) -> str:
    """Return what a finding is called."""
    if finding.label == "Lung Lesion":
        return "nodule" if finding.size == "small" else "mass"
    return finding.device or _NAMES[finding.label]


def answers(study: Study) -> frozenset[Query]:
    """Return all descriptions that a study answers: who is bilateral is left and right too."""
    found: set[Query] = {(_NOTHING, None, None, None)} if study.has("No Finding") else set()
    for finding in study.findings:
        sides = (*SIDES, "bilateral", None) if finding.side == "bilateral" else (finding.side, None)
        found.update(itertools.product((name_of(finding),), sides, (finding.size, None), (finding.zone, None)))
    return frozenset(found)


def describe(query: Query) -> str:
    """Write a description."""
    name, side, size, zone = query
    degree = _DEGREES[size] if size and name in ("cardiomegaly", "pulmonary edema") else size
    return " ".join(filter(None, (degree, side, f"{zone} zone" if zone else None, name)))


def draw_query(study: Study, rng: np.random.Generator) -> Query:
    """Describe one finding of a study at random, or that there is none."""
    if study.has("No Finding") and (not study.findings or rng.random() < 0.5):
        return _NOTHING, None, None, None
    finding = study.findings[int(rng.integers(len(study.findings)))]
    side, size, zone = (getattr(finding, field) if rng.random() < chance else None for field, chance in _KEPT.items())
    return name_of(finding), side, size, zone
