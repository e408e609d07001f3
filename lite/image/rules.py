"""The rules of a film: what it has to be, read where, and what happens when it is not.

`RULES` is the whole list, and `docs/films.md` shows it as a table. A rule that looks at the header has a `header`
function, one that looks at the values a `values` function; both return what they found, in words, or None. The others
are followed where the pixels are read: they stand here so that the list is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.image.header import not_a_film, not_chest, not_frontal, not_upright, one_side, unclear_part, unclear_view
from lite.image.rendering import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom.dataset import Dataset

    from lite.image.levels import Levels

_FEWEST_LEVELS: Final = 32
_MOST_COMMON: Final = 0.98
_TAIL: Final = 0.001  # of the pixels, at each end
_TAIL_SPENDS: Final = 0.75
_THIN: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A row of the table."""

    rule: str
    source: str
    happens: str
    override: str = "—"
    header: Callable[[Dataset], str | None] | None = None
    values: Callable[[Levels], str | None] | None = None
    expected: str = ""  # of a refusal
    do: str = ""


def _one_level(levels: Levels) -> str | None:
    return "one grey level" if levels.num_levels == 1 else None


def _few_levels(levels: Levels) -> str | None:
    if levels.num_levels < _FEWEST_LEVELS:
        return f"only {levels.num_levels} grey levels: hardly a picture"
    if levels.most_common >= _MOST_COMMON:
        return f"one grey level takes {levels.most_common:.1%} of the film: hardly a picture"
    return None


def _spent_scale(levels: Levels) -> str | None:
    if (spent := levels.spent(_TAIL)) < _TAIL_SPENDS:
        return None
    what = "a border and values" if levels.border else "values"
    return f"the grey scale is eaten by {what} that hardly occur: they take {spent:.0%} of it"


def _border(levels: Levels) -> str | None:
    last = len(levels.counts) - 1
    if levels.border >= 0.5 or (levels.border >= 0.01 and levels.border_level > last // 2):
        return f"a border of one grey level takes {levels.border:.0%} of the film: crop it"
    return None


def _thin(levels: Levels) -> str | None:
    short, long = sorted(levels.shape)
    return f"{long} px by {short}: only the middle of it is seen" if long > _THIN * short else None


_ANY_FILM: Final = "`--any-film`, `any_film=True`"
_FRONTAL_FILM: Final = "a frontal chest film (CR or DX)"
RULES: Final = (
    Rule(
        rule="a DICOM file is known by its content",
        source='"DICM" at byte 128, or a data set\'s first element at byte 0; the name does not matter',
        happens="read as DICOM",
    ),
    Rule(
        rule="it is whole",
        source="the last element, Rows x Columns against PixelData, the codestream's own header",
        happens="refused: cut short, empty, or a codestream that disagrees with the header",
    ),
    Rule(
        rule="it is one film",
        source="NumberOfFrames, and the frames that are there; pages of a TIFF or GIF",
        happens="refused: 0 frames, or several",
    ),
    Rule(
        rule="it is a film",
        source="Modality, else SOPClassUID: CT, MR, US, MG, …",
        happens="refused",
        override=_ANY_FILM,
        header=not_a_film,
        expected=_FRONTAL_FILM,
        do="pass a film of the chest; LLaVA-Rad reads nothing else",
    ),
    Rule(
        rule="it shows the chest",
        source="BodyPartExamined (words), AnatomicRegionSequence (code values, else words); "
        "where both are silent, SeriesDescription, ProtocolName, StudyDescription",
        happens="refused: body part HIP",
        override=_ANY_FILM,
        header=not_chest,
        expected=_FRONTAL_FILM,
        do="pass a film of the chest, or --any-film (any_film=True) if the file is wrong about it",
    ),
    Rule(
        rule="the file says that it shows the chest",
        source="BodyPartExamined UNKNOWN, OTHER, BODY, …",
        happens="noted",
        header=unclear_part,
    ),
    Rule(
        rule="it is frontal",
        source="ViewPosition (words), ViewCodeSequence and its modifiers (code values, else words), "
        "PatientOrientationCodeSequence, PatientPosition, PatientOrientation with A or P; "
        "where these are silent, SeriesDescription, ProtocolName, StudyDescription",
        happens="refused: a lateral, oblique, axial or decubitus view",
        override=_ANY_FILM,
        header=not_frontal,
        expected="a frontal view",
        do="pass the PA or AP film of the study, or --any-film (any_film=True) if the file is wrong about it",
    ),
    Rule(
        rule="the file says which view it is",
        source="a description that names a frontal view and another, and no code",
        happens="noted",
        header=unclear_view,
    ),
    Rule(
        rule="it is upright, its left side on the right",
        source="PatientOrientation other than L\\F",
        happens="turned and noted; noted where it is nonsense",
        override=f"{_ANY_FILM} does not change it: correct the file",
        header=not_upright,
    ),
    Rule(
        rule="both sides are on it",
        source="ImageLaterality, Laterality, FrameLaterality L or R",
        happens="noted",
        header=one_side,
    ),
    Rule(
        rule="unused bits are no values",
        source="BitsStored, HighBit, PixelRepresentation; the same after every transfer syntax",
        happens="left out",
    ),
    Rule(
        rule="padding is no value",
        source="PixelPaddingValue, PixelPaddingRangeLimit",
        happens="left out of minimum and maximum, then black; noted",
    ),
    Rule(
        rule="it has more than one grey level",
        source="the values of a film, the grey of a picture",
        happens="refused: one grey level",
        override=_ANY_FILM,
        values=_one_level,
        expected="a film with something on it",
        do="check how it was exported",
    ),
    Rule(
        rule="it has grey levels enough",
        source=f"fewer than {_FEWEST_LEVELS}, or one that takes {_MOST_COMMON:.0%} of the film",
        happens="noted",
        values=_few_levels,
    ),
    Rule(
        rule="the scale is spent on the film",
        source=f"stored values: the outermost {_TAIL:.1%} at each end, and a border, or one gap, take "
        f"{_TAIL_SPENDS:.0%} of the span",
        happens="noted",
        values=_spent_scale,
    ),
    Rule(
        rule="it fills the picture",
        source="a frame of one grey level that is bright and takes 1% of the film, or takes half of it",
        happens="noted",
        values=_border,
    ),
    Rule(
        rule="it has the shape of a film",
        source=f"one side more than {_THIN} times the other",
        happens="noted",
        values=_thin,
    ),
    Rule(
        rule="the window holds the film",
        source="WindowCenter and WindowWidth, VOILUTSequence, with `--rendering voi-lut`",
        happens="noted where the picture they make is blank, or nearly",
        override="the default rendering needs no window",
    ),
    Rule(
        rule="it takes a bounded time and memory",
        source="width x height against 80,000,000 pixels, 30,000 a side, and 200 pixels for each byte of the file",
        happens="refused before it is decoded",
    ),
)


def check_header(dataset: Dataset, name: str, *, any_film: bool) -> list[str]:
    """Follow the rules that look at the header.

    Returns:
        Remarks.

    Raises:
        ImageError: one of them refuses the film, and `any_film` does not override that.
    """
    found = ((rule, rule.header(dataset)) for rule in RULES if rule.header)
    return [_remark(rule, got, name, any_film) for rule, got in found if got]


def check_values(levels: Levels, name: str, *, any_film: bool, stored: bool) -> list[str]:
    """Follow the rules that look at the values; for `stored` ones, which are yet to be rendered, all of them.

    Returns:
        Remarks.

    Raises:
        ImageError: as `check_header`.
    """
    rules = (rule for rule in RULES if rule.values and (stored or rule.values is not _spent_scale))
    found = [(rule, rule.values(levels)) for rule in rules if rule.values]
    remarks = [_remark(rule, got, name, any_film) for rule, got in found if got]
    return remarks[:1] if levels.num_levels == 1 else remarks


def _remark(rule: Rule, got: str, name: str, any_film: bool) -> str:
    if not rule.expected:
        return got
    if not any_film:
        raise refusal(name, got, rule.expected, rule.do)
    return f"drafted although it is {got}: --any-film"
