"""What a phantom study shows: its structured findings, drawn at random from clinical scenarios.

A study starts as a *scenario* (heart failure, infection, trauma, intensive care, …) because real films do not
draw their findings independently: failing hearts are large and wet, ventilated patients have tubes and collapsed
bases. The scenario also decides the view and, in `report.py`, the reason for the exam. Sides are the
patient's: the patient's right lung is on the left of the film.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from lite.eval.labels import Label, Side, Size, Zone

View = Literal["PA", "AP"]
Device = Literal["endotracheal tube", "central venous line", "pacemaker"]
Scenario = Literal["screening", "heart failure", "infection", "trauma", "intensive care", "oncology", "follow-up"]

DRAWN_LABELS: tuple[Label, ...] = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Fracture",
    "Support Devices",
)
"""The CheXpert labels that are drawn. Lung Opacity, Pneumonia and Pleural Other have no picture of their own."""

SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
_SIZES: tuple[Size, ...] = get_args(Size)
_ZONES: tuple[Zone, ...] = get_args(Zone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing on the film. Fields that mean nothing for its label are None: see `_KINDS`."""

    label: Label
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    device: Device | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One synthetic exam: the seed that made it, how it was taken, and everything there is to see."""

    seed: int
    scenario: Scenario
    view: View
    findings: tuple[Finding, ...]

    def has(self, label: Label) -> bool:
        """Say whether any finding carries `label` ("No Finding" follows CheXpert: devices do not count)."""
        if label == "No Finding":
            return all(finding.label == "Support Devices" for finding in self.findings)
        return any(finding.label == label for finding in self.findings)


def _side(rng: np.random.Generator) -> Side:
    return "left" if rng.random() < 0.5 else "right"


def _side_or_both(rng: np.random.Generator) -> Side:
    return "bilateral" if rng.random() < 0.3 else _side(rng)


def _mostly_left(rng: np.random.Generator) -> Side:
    return "left" if rng.random() < 0.75 else "right"


def _zone(rng: np.random.Generator) -> Zone:
    return _ZONES[int(rng.integers(3))]


def _size(rng: np.random.Generator) -> Size:
    return _SIZES[int(rng.integers(3))]


def _nodule_or_mass(rng: np.random.Generator) -> Size:
    return "small" if rng.random() < 0.5 else "large"


# The fields of a `Finding`, given or drawn in this order. Of heart and oedema small is mild, and large severe.
_KINDS: dict[str, dict[str, Any]] = {
    "wide mediastinum": {"label": "Enlarged Cardiomediastinum"},
    "cardiomegaly": {"label": "Cardiomegaly", "size": _size},
    "edema": {"label": "Edema", "size": _size},
    "lesion": {"label": "Lung Lesion", "size": _nodule_or_mass, "side": _side, "zone": _zone},
    "consolidation": {"label": "Consolidation", "side": _side, "zone": _zone},
    "atelectasis": {"label": "Atelectasis", "side": _side_or_both, "zone": "lower"},
    "pneumothorax": {"label": "Pneumothorax", "side": _side, "size": _size},
    "effusion": {"label": "Pleural Effusion", "side": _side_or_both, "size": _size},
    "fracture": {"label": "Fracture", "side": _side, "zone": _zone},
    "tube": {"label": "Support Devices", "device": "endotracheal tube"},
    "line": {"label": "Support Devices", "device": "central venous line", "side": _side},
    "pacemaker": {"label": "Support Devices", "device": "pacemaker", "side": _mostly_left},
}


def _draw(kind: str, rng: np.random.Generator) -> Finding:
    return Finding(**{name: value(rng) if callable(value) else value for name, value in _KINDS[kind].items()})


# Probability of each finding in each scenario. Everything keeps a small chance everywhere, so that the reason for
# the exam is a hint and never the answer.
_PREVALENCE: dict[Scenario, dict[str, float]] = {
    "screening": {"lesion": 0.08, "cardiomegaly": 0.06, "wide mediastinum": 0.04, "fracture": 0.04, "pacemaker": 0.05},
    "heart failure": {"cardiomegaly": 0.8, "edema": 0.65, "effusion": 0.5, "pacemaker": 0.35, "atelectasis": 0.12},
    "infection": {"consolidation": 0.75, "effusion": 0.3, "atelectasis": 0.2, "cardiomegaly": 0.08, "line": 0.08},
    "trauma": {"fracture": 0.75, "pneumothorax": 0.45, "effusion": 0.2, "wide mediastinum": 0.25, "tube": 0.1},
    "intensive care": {
        "tube": 0.6, "line": 0.6, "atelectasis": 0.45, "effusion": 0.3, "edema": 0.25, "pneumothorax": 0.2,
        "consolidation": 0.15,
    },
    "oncology": {"lesion": 0.75, "wide mediastinum": 0.4, "effusion": 0.2, "line": 0.25, "consolidation": 0.08},
    "follow-up": {
        "pneumothorax": 0.25, "effusion": 0.2, "consolidation": 0.2, "wide mediastinum": 0.2, "lesion": 0.15,
        "fracture": 0.25, "atelectasis": 0.25, "cardiomegaly": 0.2, "pacemaker": 0.12,
    },
}  # fmt: skip
_SCENARIO_WEIGHTS = np.array([0.15, 0.14, 0.14, 0.17, 0.14, 0.13, 0.13])
_PORTABLE: dict[Scenario, float] = {"intensive care": 0.95, "trauma": 0.6, "heart failure": 0.5, "infection": 0.35}


def _shares_a_side(first: Finding, second: Finding) -> bool:
    if first.side is None or second.side is None:
        return False
    return first.side == second.side or "bilateral" in (first.side, second.side)


def _hidden_by(finding: Finding, others: list[Finding]) -> bool:
    """Say whether `finding` could not be seen beside `others`: no reader could be blamed for missing it."""
    for other in others:
        if not _shares_a_side(finding, other):
            continue
        pair = {finding.label, other.label}
        opaque_base = any(f.label == "Pleural Effusion" and f.size in ("moderate", "large") for f in (finding, other))
        if opaque_base and (finding.zone == "lower" or other.zone == "lower"):
            return True
        if "Pneumothorax" in pair and pair & {"Lung Lesion", "Consolidation", "Pleural Effusion"}:
            return True
        if pair in ({"Consolidation", "Lung Lesion"}, {"Consolidation", "Atelectasis"}) and finding.zone == other.zone:
            return True
    return False


def sample_study(seed: int) -> Study:
    """Draw the structured findings of one study.

    Args:
        seed: any non-negative integer; the same seed gives the same study for ever.
    """
    rng = np.random.default_rng([seed, 0])
    scenario = SCENARIOS[int(rng.choice(len(SCENARIOS), p=_SCENARIO_WEIGHTS))]
    view: View = "AP" if rng.random() < _PORTABLE.get(scenario, 0.1) else "PA"
    findings: list[Finding] = []
    for kind, prevalence in _PREVALENCE[scenario].items():
        chosen = rng.random() < prevalence
        finding = _draw(kind, rng)
        if not chosen or _hidden_by(finding, findings):
            continue
        # Severe oedema whites out the lungs: beside a focal finding it stays mild.
        focal = any(other.label in ("Consolidation", "Lung Lesion", "Pneumothorax") for other in findings)
        if finding.label == "Edema" and focal:
            finding = replace(finding, size="small")
        if finding.label in ("Consolidation", "Lung Lesion", "Pneumothorax") and any(
            other.label == "Edema" and other.size != "small" for other in findings
        ):
            continue
        findings.append(finding)
    return Study(seed=seed, scenario=scenario, view=view, findings=tuple(findings))
