"""What a drafted text has right of another one's findings: label by label, in side, zone and size."""

from __future__ import annotations

from typing import Final, NamedTuple

from lite.eval.labels import Label, Reading, read_labels

# The labeller knows three sizes of everything; of these, reports say how severe they are.
_BY_DEGREE: Final[frozenset[Label]] = frozenset({"Cardiomegaly", "Edema"})
_DEGREES: Final = {"small": "mild", "large": "severe"}


class Verdict(NamedTuple):
    """What a draft makes of a label that it or the reference reports."""

    label: Label
    place: str  # such as "left, lower, small": as the reference has it, or the draft where the reference has no such
    wrong: str  # what is wrong, in a few words; empty where they agree

    def __str__(self) -> str:
        """Write it for a line of text."""
        return f"✗ {self.label}: {self.wrong}" if self.wrong else f"✓ {self.label}"


def compare_findings(reference: str, draft: str) -> list[Verdict]:
    """Judge each label that is positive in one of two findings texts.

    Where the reference names a side, zone or size, the draft has to name the same. Uncertain counts as negative.
    """
    expected, got = read_labels(reference), read_labels(draft)
    return [
        Verdict(
            label, _place(label, truth if truth.status == "positive" else got[label]), _flaw(label, truth, got[label])
        )
        for label, truth in expected.items()
        if "positive" in (truth.status, got[label].status)
    ]


def _place(label: Label, reading: Reading) -> str:
    return ", ".join(filter(None, (reading.side, reading.zone, _size(label, reading.size))))


def _size(label: Label, size: str | None) -> str | None:
    return _DEGREES.get(size or "", size) if label in _BY_DEGREE else size


def _flaw(label: Label, truth: Reading, draft: Reading) -> str:
    if draft.status != "positive":
        return "missed"
    if truth.status != "positive":
        return "not there"
    for name in ("side", "zone", "size"):
        expected, got = getattr(truth, name), getattr(draft, name)
        if expected and expected != got:
            expected, got = (_size(label, value) if name == "size" else value for value in (expected, got))
            return f"{got or f'no {name}'}, should be {expected}"
    return ""
