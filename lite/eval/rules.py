"""Errors between two reports counted by rules: the judge `rules`, from the labels that are read from both texts.

Its kinds of errors are CheXprompt's, its counts are not: it sees the fourteen labels, side, zone and size, and words of
change, and nothing else. It needs no model and sends nothing anywhere. `docs/scoring.md` has what it finds of planted
errors.
"""

from __future__ import annotations

import re
from typing import Final

from lite.eval.chexprompt import ERRORS, SEVERITIES, Counts
from lite.eval.labels import Label, Reading, read_labels
from lite.eval.labels.places import SIZES

LABEL: Final = "The judge rules: labels, sides, zones, sizes and words of change, without a model"

# Small ones, and these, seldom change what is done.
_MINOR: Final[frozenset[Label]] = frozenset(
    {"Atelectasis", "Lung Opacity", "Pleural Other", "Enlarged Cardiomediastinum"}
)
_NEVER_MINOR: Final[frozenset[Label]] = frozenset({"Pneumothorax", "Lung Lesion"})
_CHANGES: Final = {
    "new": r"new(?:ly)?|interval development|developed",
    "worse": r"increas\w+|wors\w+|larger|progress\w+|enlarging",
    "better": r"decreas\w+|improv\w+|smaller|resol\w+|cleared|regress\w+",
    "same": r"unchanged|stable|similar|persist\w+|again",
}
_CHANGE: Final = {name: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for name, words in _CHANGES.items()}


def count_errors(reference: str, prediction: str) -> Counts:
    """Count the errors of a prediction by kind: significant ones, insignificant ones."""
    counts = {severity: dict.fromkeys(ERRORS, 0) for severity in SEVERITIES}

    def add(kind: str, *, significant: bool) -> None:
        counts[SEVERITIES[0] if significant else SEVERITIES[1]][kind] += 1

    truth, drafted = read_labels(reference), read_labels(prediction)
    for label in truth.keys() - {"No Finding"}:
        there, said = truth[label], drafted[label]
        if said.status == "positive" and there.status in ("negative", "absent"):
            add("false_positive_finding", significant=_matters(label, said))
        elif there.status == "positive" and said.status in ("negative", "absent"):
            add("omission_finding", significant=_matters(label, there))
        elif there.status == said.status == "positive":
            if _differ(there.side, said.side) or _differ(there.zone, said.zone):
                add("incorrect_location", significant=_differ(there.side, said.side))
            if there.size and said.size and there.size != said.size:
                steps = abs(SIZES.index(there.size) - SIZES.index(said.size))
                add("incorrect_severity", significant=steps > 1)
    told, claimed = _changes(reference), _changes(prediction)
    for kind, changes in (("false_positive_comparison", claimed - told), ("omission_comparison", told - claimed)):
        for change in changes:
            add(kind, significant=change in ("new", "worse"))
    halves = [tuple(counts[severity].values()) for severity in SEVERITIES]
    return halves[0], halves[1]


def _matters(label: Label, finding: Reading) -> bool:
    return label in _NEVER_MINOR or not (label in _MINOR or finding.size == "small")


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other


def _changes(text: str) -> set[str]:
    return {name for name, pattern in _CHANGE.items() if pattern.search(text)}
