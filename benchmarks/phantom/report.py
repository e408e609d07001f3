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
# mild/moderate/severe, {thing} nodule/mass, or a device with its side, {article} what goes before it.
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
    "Lung Lesion": (
        "{size} {thing} in the {side} {zone} zone",
        "there is a {size} {thing} in the {side} {zone} lung",
        "a {size} {side} {zone} zone {thing} is seen",
    ),
    "Fracture": (
        "displaced fracture of a {side} {zone} rib",
        "there is a displaced {side} {zone} rib fracture",
        "{side} {zone} rib fracture",
    ),
    "Support Devices": ("{thing} in place", "{article} {thing} is present", "there is {article} {thing}"),
}

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
# What is denied in a list, and how often where it is absent.
_DENIALS: Mapping[Label, tuple[str, float]] = {
    "Consolidation": ("focal consolidation", 0.3),
    "Edema": ("pulmonary edema", 0.2),
    "Pleural Effusion": ("pleural effusion", 0.8),
    "Pneumothorax": ("pneumothorax", 0.8),
}


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
    key = f"{finding.label}, bilateral" if finding.side == "bilateral" else finding.label
    thing = "nodule" if finding.size == "small" else "mass"
    if finding.device:
        thing = f"{finding.side} {finding.device}" if finding.side else finding.device
    return _choose(rng, _PHRASES[key]).format(
        side=finding.side,
        zone=finding.zone,
        size=finding.size,
        degree=_DEGREE[finding.size] if finding.size else None,
        thing=thing,
        article="an" if thing.startswith("e") else "a",
    )


def state_finding(finding: Finding, rng: np.random.Generator) -> str:
    """Write the sentence that states a finding."""
    return _sentence(_state(finding, rng))


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
    sections = [[_state(finding, rng) for finding in study.findings if finding.label in labels] for labels in _SECTIONS]
    denied: set[Label] = set()

    def deny(section: int, sentence: str, *labels: Label) -> None:
        sections[section].append(sentence)
        denied.update(labels)

    heart, mediastinum = (not study.has(label) for label in _SECTIONS[1])
    if heart and mediastinum and rng.random() < 0.5:
        deny(1, _NORMAL_BOTH, *_SECTIONS[1])
    else:
        if heart and rng.random() < 0.5:
            deny(1, _choose(rng, _NORMAL_HEART), "Cardiomegaly")
        if mediastinum and rng.random() < 0.3:
            deny(1, _choose(rng, _NORMAL_MEDIASTINUM), "Enlarged Cardiomediastinum")
    if not any(study.has(label) for label in _SECTIONS[2]) and rng.random() < 0.7:
        deny(2, _choose(rng, _CLEAR_LUNGS), "Lung Opacity")
    absent = [label for label, (_, chance) in _DENIALS.items() if not study.has(label) and rng.random() < chance]
    if absent:
        opening = _choose(rng, ("no", "there is no", "no evidence of"))
        deny(3, f"{opening} {_list_with_or([_DENIALS[label][0] for label in absent])}", *absent)
    if not study.has("Fracture") and rng.random() < 0.2:
        deny(4, _choose(rng, ("no rib fracture", "no acute fracture")), "Fracture")
    order = _ORDERS[int(rng.integers(len(_ORDERS)))]
    sentences = [sentence for section in order for sentence in sections[section]]
    text = " ".join(_sentence(words) for words in sentences or ["no acute cardiopulmonary abnormality"])
    return Report(text=text, readings=MappingProxyType(expected_readings(study, frozenset(denied))))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


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
    return _sentence(complaint if form == 1 else f"{complaint} in a {age}-year-old {person}")
