"""What a phantom study shows: its structured findings, drawn at random from clinical scenarios.

A study starts as a *scenario* (heart failure, infection, trauma, intensive care, …) because real films do not
draw their findings independently: failing hearts are large and wet, ventilated patients have tubes and collapsed
bases. The scenario also decides the view and, in `report.py`, the reason for the exam. Sides are the
patient's: the patient's right lung is on the left of the film.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

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
    """One thing on the film. Fields that mean nothing for its label are None.

    | label | side | zone | size | device |
    |---|---|---|---|---|
    | Enlarged Cardiomediastinum | – | – | – | – |
    | Cardiomegaly, Edema | – | – | small (mild), moderate, large (severe) | – |
    | Lung Lesion | left, right | upper, mid, lower | small (nodule), large (mass) | – |
    | Consolidation | left, right | upper, mid, lower | – | – |
    | Atelectasis | left, right, bilateral | lower | – | – |
    | Pneumothorax | left, right | – | small, moderate, large | – |
    | Pleural Effusion | left, right, bilateral | – | small, moderate, large | – |
    | Fracture (rib) | left, right | upper, mid, lower | – | – |
    | Support Devices | line, pacemaker: left, right | – | – | which |
    """

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


def _one_side(rng: np.random.Generator) -> Literal["left", "right"]:
    return "left" if rng.random() < 0.5 else "right"


def _any_size(rng: np.random.Generator) -> Size:
    return _SIZES[int(rng.integers(3))]


def _any_zone(rng: np.random.Generator) -> Zone:
    return _ZONES[int(rng.integers(3))]


def _cardiomegaly(rng: np.random.Generator) -> Finding:
    return Finding(label="Cardiomegaly", size=_any_size(rng))


def _edema(rng: np.random.Generator) -> Finding:
    return Finding(label="Edema", size=_any_size(rng))


def _effusion(rng: np.random.Generator) -> Finding:
    side: Side = "bilateral" if rng.random() < 0.3 else _one_side(rng)
    return Finding(label="Pleural Effusion", side=side, size=_any_size(rng))


def _consolidation(rng: np.random.Generator) -> Finding:
    return Finding(label="Consolidation", side=_one_side(rng), zone=_any_zone(rng))


def _atelectasis(rng: np.random.Generator) -> Finding:
    side: Side = "bilateral" if rng.random() < 0.3 else _one_side(rng)
    return Finding(label="Atelectasis", side=side, zone="lower")


def _pneumothorax(rng: np.random.Generator) -> Finding:
    return Finding(label="Pneumothorax", side=_one_side(rng), size=_any_size(rng))


def _lesion(rng: np.random.Generator) -> Finding:
    size: Size = "small" if rng.random() < 0.5 else "large"
    return Finding(label="Lung Lesion", side=_one_side(rng), zone=_any_zone(rng), size=size)


def _fracture(rng: np.random.Generator) -> Finding:
    return Finding(label="Fracture", side=_one_side(rng), zone=_any_zone(rng))


def _wide_mediastinum(_rng: np.random.Generator) -> Finding:
    return Finding(label="Enlarged Cardiomediastinum")


def _tube(_rng: np.random.Generator) -> Finding:
    return Finding(label="Support Devices", device="endotracheal tube")


def _line(rng: np.random.Generator) -> Finding:
    return Finding(label="Support Devices", side=_one_side(rng), device="central venous line")


def _pacemaker(rng: np.random.Generator) -> Finding:
    side: Side = "left" if rng.random() < 0.75 else "right"
    return Finding(label="Support Devices", side=side, device="pacemaker")


_Draw = Callable[[np.random.Generator], Finding]

# Probability of each finding in each scenario. Everything keeps a small chance everywhere, so that the reason for
# the exam is a hint and never the answer.
_PREVALENCE: dict[Scenario, dict[_Draw, float]] = {
    "screening": {_lesion: 0.08, _cardiomegaly: 0.06, _wide_mediastinum: 0.04, _fracture: 0.04, _pacemaker: 0.05},
    "heart failure": {_cardiomegaly: 0.8, _edema: 0.65, _effusion: 0.5, _pacemaker: 0.35, _atelectasis: 0.12},
    "infection": {_consolidation: 0.75, _effusion: 0.3, _atelectasis: 0.2, _cardiomegaly: 0.08, _line: 0.08},
    "trauma": {_fracture: 0.75, _pneumothorax: 0.45, _effusion: 0.2, _wide_mediastinum: 0.25, _tube: 0.1},
    "intensive care": {
        _tube: 0.6, _line: 0.6, _atelectasis: 0.45, _effusion: 0.3, _edema: 0.25, _pneumothorax: 0.2,
        _consolidation: 0.15,
    },
    "oncology": {_lesion: 0.75, _wide_mediastinum: 0.4, _effusion: 0.2, _line: 0.25, _consolidation: 0.08},
    "follow-up": {
        _pneumothorax: 0.25, _effusion: 0.2, _consolidation: 0.2, _wide_mediastinum: 0.2, _lesion: 0.15,
        _fracture: 0.25, _atelectasis: 0.25, _cardiomegaly: 0.2, _pacemaker: 0.12,
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
    for draw, prevalence in _PREVALENCE[scenario].items():
        chosen = rng.random() < prevalence
        finding = draw(rng)
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
