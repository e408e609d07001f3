"""Words for a phantom study: a findings text from a small grammar, what it states, and a reason for the exam.

A report is sentences in five sections (devices, heart, lungs, pleura, bones), in one of two orders. Every finding is
said once, in one of several phrasings; some of what is absent is denied, alone or in lists. Alongside the text the
grammar returns what it stated about each CheXpert label: the truth that the labeller has to read back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from benchmarks.phantom.findings import Finding, Scenario, Study
from lite.eval.labels import LABELS, Label, Reading, Side, Size, Status

_DEGREE: Mapping[Size, str] = {"small": "mild", "moderate": "moderate", "large": "severe"}

# Placeholders: {side} left/right/bilateral, {zone} upper/mid/lower, {size} small/moderate/large, {degree} the same as
# mild/moderate/severe, {article} what goes before size or side.
_PHRASES: Mapping[str, Sequence[str]] = {
    "Cardiomegaly": (
        "the heart is {degree}ly enlarged",
        "{degree} cardiomegaly",
        "there is {degree} cardiomegaly",
    ),
    "Enlarged Cardiomediastinum": (
        "the mediastinum is widened",
        "widening of the mediastinum",
        "there is widening of the mediastinum",
    ),
    "Edema": ("{degree} pulmonary edema", "there is {degree} pulmonary edema", "{degree} pulmonary edema is present"),
    "Pleural Effusion": (
        "{size} {side} pleural effusion",
        "there is a {size} {side} pleural effusion",
        "a {size} {side} pleural effusion is present",
        "{size} pleural effusion on the {side}",
    ),
    "Pleural Effusion, bilateral": (
        "{size} bilateral pleural effusions",
        "there are {size} bilateral pleural effusions",
        "bilateral pleural effusions are {size}",
    ),
    "Pneumothorax": (
        "{size} {side} pneumothorax",
        "there is a {size} {side} pneumothorax",
        "a {size} pneumothorax is seen on the {side}",
    ),
    "Consolidation": (
        "consolidation in the {side} {zone} zone",
        "{side} {zone} zone consolidation",
        "there is consolidation in the {side} {zone} lung",
    ),
    "Atelectasis": (
        "{side} basilar atelectasis",
        "atelectasis at the {side} base",
        "there is {side} lower zone atelectasis",
    ),
    "Atelectasis, bilateral": (
        "bibasilar atelectasis",
        "atelectasis at both bases",
        "there is bilateral lower zone atelectasis",
    ),
    "Lung Lesion, small": (
        "small nodule in the {side} {zone} zone",
        "there is a small nodule in the {side} {zone} lung",
        "a small {side} {zone} zone nodule is seen",
    ),
    "Lung Lesion, large": (
        "large mass in the {side} {zone} zone",
        "there is a large mass in the {side} {zone} lung",
        "a large {side} {zone} zone mass is seen",
    ),
    "Fracture": (
        "displaced fracture of a {side} {zone} rib",
        "there is a displaced {side} {zone} rib fracture",
        "{side} {zone} rib fracture",
    ),
    "endotracheal tube": (
        "endotracheal tube in place",
        "an endotracheal tube is present",
        "there is an endotracheal tube",
    ),
    "central venous line": (
        "{side} central venous line in place",
        "a {side} central venous line is present",
        "there is a {side} central venous line",
    ),
    "pacemaker": ("{side} pacemaker in place", "a {side} pacemaker is present", "there is a {side} pacemaker"),
}  # fmt: skip

_SECTIONS: tuple[tuple[Label, ...], ...] = (
    ("Support Devices",),
    ("Cardiomegaly", "Enlarged Cardiomediastinum"),
    ("Edema", "Consolidation", "Lung Lesion", "Atelectasis"),
    ("Pleural Effusion", "Pneumothorax"),
    ("Fracture",),
)
_ORDERS = ((0, 1, 2, 3, 4), (2, 3, 1, 4, 0))

_NORMAL_HEART = ("heart size is normal", "the heart is normal in size")
_NORMAL_MEDIASTINUM = ("the mediastinal contours are normal", "no widening of the mediastinum")
_NORMAL_BOTH = "heart size and mediastinal contours are normal"
_CLEAR_LUNGS = ("the lungs are clear", "both lungs are clear")
_DENIALS: Mapping[Label, str] = {
    "Consolidation": "focal consolidation",
    "Edema": "pulmonary edema",
    "Pleural Effusion": "pleural effusion",
    "Pneumothorax": "pneumothorax",
}
_LUNG_LABELS: tuple[Label, ...] = ("Edema", "Consolidation", "Lung Lesion", "Atelectasis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A findings text and what it states about each of the 14 labels, as `lite.eval.labels.read_labels` reports it."""

    text: str
    readings: Mapping[Label, Reading]


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _list_with_or(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _state(finding: Finding, rng: np.random.Generator) -> str:
    key: str = finding.device or finding.label
    if finding.side == "bilateral":
        key = f"{finding.label}, bilateral"
    elif finding.label == "Lung Lesion":
        key = f"{finding.label}, {finding.size}"
    return _choose(rng, _PHRASES[key]).format(
        side=finding.side,
        zone=finding.zone,
        size=finding.size,
        degree=_DEGREE[finding.size] if finding.size else None,
    )


class _Writer:
    """Collects sentences per section, and the labels that they deny."""

    def __init__(self, study: Study, rng: np.random.Generator) -> None:
        self.study = study
        self.rng = rng
        self.sections: list[list[str]] = [[] for _ in _SECTIONS]
        self.denied: set[Label] = set()

    def state_findings(self) -> None:
        for section, labels in zip(self.sections, _SECTIONS, strict=True):
            section.extend(_state(finding, self.rng) for finding in self.study.findings if finding.label in labels)

    def deny_heart(self) -> None:
        heart, mediastinum = (not self.study.has(label) for label in _SECTIONS[1])
        section = self.sections[1]
        if heart and mediastinum and self.rng.random() < 0.5:
            section.append(_NORMAL_BOTH)
            self.denied |= {"Cardiomegaly", "Enlarged Cardiomediastinum"}
            return
        if heart and self.rng.random() < 0.5:
            section.append(_choose(self.rng, _NORMAL_HEART))
            self.denied.add("Cardiomegaly")
        if mediastinum and self.rng.random() < 0.3:
            section.append(_choose(self.rng, _NORMAL_MEDIASTINUM))
            self.denied.add("Enlarged Cardiomediastinum")

    def deny_lungs(self) -> None:
        if not any(self.study.has(label) for label in _LUNG_LABELS) and self.rng.random() < 0.7:
            self.sections[2].append(_choose(self.rng, _CLEAR_LUNGS))
            self.denied.add("Lung Opacity")

    def deny_in_lists(self) -> None:
        chance: dict[Label, float] = {
            "Consolidation": 0.3, "Edema": 0.2, "Pleural Effusion": 0.8, "Pneumothorax": 0.8,
        }  # fmt: skip
        absent: list[Label] = [
            label for label in _DENIALS if not self.study.has(label) and self.rng.random() < chance[label]
        ]
        if not absent:
            return
        self.denied.update(absent)
        opening = _choose(self.rng, ("no", "there is no", "no evidence of"))
        self.sections[3].append(f"{opening} {_list_with_or([_DENIALS[label] for label in absent])}")

    def deny_bones(self) -> None:
        if not self.study.has("Fracture") and self.rng.random() < 0.2:
            self.sections[4].append(_choose(self.rng, ("no rib fracture", "no acute fracture")))
            self.denied.add("Fracture")

    def text(self) -> str:
        order = _ORDERS[int(self.rng.integers(len(_ORDERS)))]
        sentences = [sentence for index in order for sentence in self.sections[index]]
        if not sentences:
            sentences = ["no acute cardiopulmonary abnormality"]
        return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _joint_side(findings: Sequence[Finding]) -> Side | None:
    sides = {finding.side for finding in findings if finding.side}
    return None if not sides else sides.pop() if len(sides) == 1 else "bilateral"


def _largest(findings: Sequence[Finding]) -> Size | None:
    order: tuple[Size, ...] = ("large", "moderate", "small")
    return next((size for size in order if any(finding.size == size for finding in findings)), None)


def expected_readings(study: Study, denied: frozenset[Label] = frozenset()) -> dict[Label, Reading]:
    """Say what a faithful text about `study` states of each label, when it denies `denied`.

    Side is the union over the findings of a label (left and right make bilateral), size the largest, zone the one
    zone that they share, else None.
    """
    readings: dict[Label, Reading] = {}
    for label in LABELS:
        findings = [finding for finding in study.findings if finding.label == label]
        zones = {finding.zone for finding in findings if finding.zone}
        positive = study.has(label) if label == "No Finding" else bool(findings)
        status: Status = "positive" if positive else "negative" if label in denied else "absent"
        readings[label] = Reading(
            status=status,
            side=_joint_side(findings),
            zone=zones.pop() if len(zones) == 1 else None,
            size=_largest(findings),
        )
    return readings


def write_findings(study: Study, rng: np.random.Generator) -> Report:
    """Write one findings text for `study`; another state of `rng` gives another phrasing, order and set of denials."""
    writer = _Writer(study, rng)
    writer.state_findings()
    writer.deny_heart()
    writer.deny_lungs()
    writer.deny_in_lists()
    writer.deny_bones()
    text = writer.text()
    return Report(text=text, readings=MappingProxyType(expected_readings(study, frozenset(writer.denied))))


_COMPLAINTS: Mapping[Scenario, Sequence[str]] = {
    "screening": ("pre-operative evaluation", "annual check", "positive tuberculosis test", "chest pain"),
    "heart failure": ("shortness of breath", "dyspnea and leg swelling", "heart failure", "chest pain"),
    "infection": ("fever and cough", "cough", "sepsis", "shortness of breath"),
    "trauma": ("fall", "motor vehicle collision", "chest pain", "chest trauma"),
    "intensive care": ("intubation", "line placement", "respiratory failure", "sepsis"),
    "oncology": ("lung cancer", "weight loss", "hemoptysis", "cough"),
    "follow-up": ("follow-up", "recent surgery", "shortness of breath", "chest pain"),
}


def write_reason(study: Study, rng: np.random.Generator) -> str | None:
    """Write a reason that fits the study's scenario and does not give the findings away; None for one in five."""
    absent = rng.random() < 0.2
    complaint = _choose(rng, _COMPLAINTS[study.scenario])
    person = _choose(rng, ("man", "woman"))
    age = int(rng.integers(2, 9)) * 10 + int(rng.integers(10))
    form = int(rng.integers(3))
    if absent:
        return None
    if form == 0:
        return f"{age}-year-old {person}, {complaint}."
    opening = f"{complaint[0].upper()}{complaint[1:]}"
    return f"{opening}." if form == 1 else f"{opening} in a {age}-year-old {person}."
