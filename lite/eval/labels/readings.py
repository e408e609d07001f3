"""What a report says of a label: the labels themselves, one mention, and the reading of a whole report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Label = Literal[
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
Side = Literal["left", "right", "bilateral"]
Zone = Literal["upper", "mid", "lower"]
Size = Literal["small", "moderate", "large"]
Status = Literal["positive", "negative", "uncertain", "absent"]

LABELS: tuple[Label, ...] = get_args(Label)
"""The fourteen labels in CheXpert's order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """One place where a report speaks of a label: `text` is the report's own words, `report[start:end]`."""

    label: Label
    status: Status
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a whole report says of one label. Attributes belong to the mentions that decided the status."""

    status: Status
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A mention while it is being worked out; `label` is "" for an abnormality that has no label."""

    label: Label | Literal[""]
    start: int
    end: int
    status: Status = "positive"
    doubtful: bool = False  # affirmed, it is still only uncertain
    unchanged: bool = False  # nothing is said but that it is as it was: "stable heart size"
    side: Side | None = None
    zone: Zone | None = None
    size: Size | None = None
    side_follows: bool = False  # "effusions at the left base"
