"""From what the sentences say of the labels to one reading of each for the whole report."""

from __future__ import annotations

from lite.eval.labels.places import SIZES, union
from lite.eval.labels.readings import LABELS, Found, Label, Reading, Status

_STATUS_ORDER: tuple[Status, ...] = ("positive", "uncertain", "negative")


def decide(found: list[Found]) -> dict[Label, Reading]:
    """Make one reading of each label, in CheXpert's order."""
    readings = {label: _decide([item for item in found if item.label == label]) for label in LABELS}
    abnormal = any(
        item.status in ("positive", "uncertain") and item.label != "Support Devices" and not item.unchanged
        for item in found
    )
    readings["No Finding"] = Reading(status="absent" if abnormal else "positive")
    return readings


def _decide(found: list[Found]) -> Reading:
    """Make one reading of a label's mentions: positive wins over uncertain, uncertain over negative."""
    for status in _STATUS_ORDER:
        deciding = [mention for mention in found if mention.status == status]
        if not deciding:
            continue
        if status == "negative":
            return Reading(status=status)
        zones = {mention.zone for mention in deciding if mention.zone}
        sizes = [mention.size for mention in deciding if mention.size]
        return Reading(
            status=status,
            side=union(mention.side for mention in deciding if mention.side),
            zone=zones.pop() if len(zones) == 1 else None,
            size=max(sizes, key=SIZES.index) if sizes else None,
        )
    return Reading(status="absent")
