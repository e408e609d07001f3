"""What the header of a DICOM file says of its film: what it is, which part, which view, which way up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lite.image.words import (
    CHEST_CODES,
    FRONTAL,
    UNKNOWN_PART_CODES,
    VIEW_CODES,
    View,
    names_other,
    other_part_in,
    part_of_words,
    view_of_words,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom.dataset import Dataset


# DICOM says what took the picture. What is not listed (CR, DX, secondary captures, nothing at all) may be a film.
def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in words.split()}


_OTHER_MODALITIES: Final = _by_word(
    {
        "a CT slice": "CT",
        "an MR slice": "MR",
        "a PET slice": "PT",
        "a nuclear medicine image": "NM",
        "an ultrasound image": "US IVUS BDUS",
        "a mammogram": "MG",
        "an angiogram": "XA",
        "a dental film": "IO PX",
        "a bone densitometry image": "BMD",
        "an endoscopy or microscopy image": "ES GM SM CFM",
        "an ophthalmic image": "OP OPT OCT OPV OPM KER LEN AR VA SRF IOL",
        "an intravascular image": "IVOCT",
        "a photograph": "XC DMS BI TG",
        "a recording": "ECG EPS HD AU",
        "a segmentation": "SEG",
        "a structured report": "SR",
        "a document": "PR KO DOC PLAN REG FID ANN SMR ASMT STAIN TEXTUREMAP",
        "a radiotherapy image": "RTIMAGE RTDOSE RTSTRUCT RTPLAN RTRECORD",
    }
)
_CLASS_ROOT: Final = "1.2.840.10008.5.1.4.1.1."
_OTHER_SOP_CLASSES: Final = _by_word(  # by how they begin; of several the longest
    {
        "MG": "1.2 13.1.3 13.1.4 13.1.5",
        "IO": "1.3",
        "CT": "2",
        "US": "3 6",
        "MR": "4",
        "ECG": "9",
        "PR": "11 66 104",
        "XA": "12.1 13.1",
        "NM": "20",
        "SEG": "66.4",
        "XC": "77.1",
        "SR": "88",
        "PT": "128 130",
        "RTIMAGE": "481",
    }
)
_DESCRIPTIONS: Final = ("SeriesDescription", "ProtocolName", "StudyDescription")


def text_of(dataset: Dataset, keyword: str) -> str:
    """Return an attribute as text, without spaces around it; "" where there is none."""
    value = dataset.get(keyword)
    return "" if value is None else str(value).strip()


def _items(dataset: Dataset, keyword: str) -> list[Dataset]:
    return list(dataset.get(keyword) or [])


def _code(item: Dataset) -> tuple[str, str]:
    """Return the value and the meaning of a code."""
    value = text_of(item, "CodeValue") or text_of(item, "LongCodeValue")
    return value, text_of(item, "CodeMeaning")


def directions(dataset: Dataset) -> tuple[str, str] | None:
    """Return the main directions of rows and columns, such as ("L", "F"); None where the file says nothing."""
    value = dataset.get("PatientOrientation")
    if not value:
        return None
    values = [value] if isinstance(value, str) else [str(v) for v in value]
    letters = [v.strip().upper()[:1] for v in values]
    if not any(letters):
        return None
    return (letters[0], letters[1]) if len(letters) == 2 else ("?", "?")


def orientation_of(dataset: Dataset) -> str | None:
    """Return PatientOrientation as it is in the file."""
    value = dataset.get("PatientOrientation")
    return None if not value else value if isinstance(value, str) else "\\".join(str(v) for v in value)


def _coded_views(dataset: Dataset) -> Iterator[tuple[View | None, str, str]]:
    """Yield what each coded attribute says of the view: the view, the attribute, its words."""
    if position := text_of(dataset, "ViewPosition").upper():
        yield view_of_words(position), "ViewPosition", position
    for item in _items(dataset, "ViewCodeSequence"):
        for modifier in (item, *_items(item, "ViewModifierCodeSequence")):
            value, meaning = _code(modifier)
            yield VIEW_CODES.get(value) or view_of_words(meaning), "ViewCodeSequence", meaning.upper() or value
    for item in _items(dataset, "PatientOrientationCodeSequence"):
        for modifier in (item, *_items(item, "PatientOrientationModifierCodeSequence")):
            value, meaning = _code(modifier)
            if VIEW_CODES.get(value) == "DECUBITUS" or view_of_words(meaning) == "DECUBITUS":
                yield "DECUBITUS", "PatientOrientationCodeSequence", meaning.upper() or value
    if (position := text_of(dataset, "PatientPosition").upper()).endswith(("DL", "DR")):
        yield "DECUBITUS", "PatientPosition", position
    if (ways := directions(dataset)) and {"A", "P"} & set(ways):
        yield "LATERAL", "PatientOrientation", str(orientation_of(dataset))


def view_of(dataset: Dataset) -> tuple[View | None, str, str]:
    """Return the view, the attribute that says so, and its words; (None, "", "") where nothing does.

    Any coded attribute that names a view which is not frontal has the word; descriptions have it only where no coded
    one decides.
    """
    coded = list(_coded_views(dataset))
    for view, source, words in coded:
        if view is not None and view not in FRONTAL:
            return view, source, words
    described = ((view_of_words(text_of(dataset, name)), name, text_of(dataset, name)) for name in _DESCRIPTIONS)
    said = [found for found in coded if found[0]] or [found for found in described if found[0]]
    said.sort(key=lambda found: found[0] == "SEVERAL")
    return (said or coded or [(None, "", "")])[0]


def not_a_film(dataset: Dataset) -> str | None:
    """Say what else than a film it is."""
    modality = text_of(dataset, "Modality").upper()
    sop_class = text_of(dataset, "SOPClassUID").removeprefix(_CLASS_ROOT) + "."
    begun = (start for start in _OTHER_SOP_CLASSES if sop_class.startswith(f"{start}."))
    by_class = _OTHER_SOP_CLASSES.get(max(begun, key=len, default=""), "")
    other = modality if modality in _OTHER_MODALITIES else by_class
    return f"{_OTHER_MODALITIES[other]} (modality {modality or 'absent'})" if other else None


def not_frontal(dataset: Dataset) -> str | None:
    """Say which other view it is."""
    view, source, words = view_of(dataset)
    if view == "SEVERAL" and source not in _DESCRIPTIONS:
        return f"a view that is not only frontal, or oblique or lateral ({source} {words})"
    if view is None or view in (*FRONTAL, "SEVERAL"):
        return None
    article = "an" if view[0] in "AO" else "a"
    return f"{article} {view.lower()} view ({source} {words})"


def unclear_view(dataset: Dataset) -> str | None:
    """Say that only a description of the exam names views."""
    view, source, words = view_of(dataset)
    if view == "SEVERAL":
        return f"the file does not say which view this is ({source} {words}): make sure that it is the frontal one"
    return None


def body_part_of(dataset: Dataset) -> str | None:
    """Return the part of the body in the file's words."""
    meanings = [" ".join(filter(None, _code(item)[1:])) for item in _items(dataset, "AnatomicRegionSequence")]
    return next(filter(None, (text_of(dataset, "BodyPartExamined"), *meanings)), None)


def not_chest(dataset: Dataset) -> str | None:
    """Say which other part of the body it shows."""
    name = text_of(dataset, "BodyPartExamined")
    if name and part_of_words(name) == "other":
        return f"body part {name} (BodyPartExamined)"
    known = bool(name) and part_of_words(name) == "chest"
    for item in _items(dataset, "AnatomicRegionSequence"):
        value, meaning = _code(item)
        if not (value or meaning):
            continue
        if value in CHEST_CODES or (value not in UNKNOWN_PART_CODES and part_of_words(meaning) == "chest"):
            known = True
        elif value not in UNKNOWN_PART_CODES:
            return f"body part {meaning or value} (AnatomicRegionSequence {value})"
    described = {name: text_of(dataset, name) for name in _DESCRIPTIONS}
    # Of "chest and abdomen" this may be the film of the abdomen.
    if not known and not any(part_of_words(text) == "chest" and not names_other(text) for text in described.values()):
        for name, text in described.items():
            if other_part_in(text):
                return f"body part {text} ({name})"
    return None


def unclear_part(dataset: Dataset) -> str | None:
    """Say that BodyPartExamined names no part."""
    name = text_of(dataset, "BodyPartExamined")
    if name and part_of_words(name) == "unknown":
        return f"BodyPartExamined {name} does not say chest"
    return None


def one_side(dataset: Dataset) -> str | None:
    """Say that it claims to show one side."""
    for keyword in ("ImageLaterality", "Laterality", "FrameLaterality"):
        if (value := text_of(dataset, keyword).upper()).startswith(("L", "R")):
            return f"{keyword} {value}: a chest film shows both sides"
    return None


def not_upright(dataset: Dataset) -> str | None:
    """Say how it lies, and that it is turned if it can be."""
    ways = directions(dataset)
    if ways is None or ways == ("L", "F"):
        return None
    named = f"PatientOrientation {orientation_of(dataset)}"
    if turn_of(ways) is None:
        return f"{named}: no way that a frontal film can lie; left as it is"
    return f"{named}; turned so that it is L\\F"


# What brings rows and columns to run to the patient's left and feet: transpose, then flip left-right, then up-down.
_TURNS: Final = {
    "RF": ("left and right swapped", False, True, False),
    "LH": ("top and bottom swapped", False, False, True),
    "RH": ("turned by 180°", False, True, True),
    "FL": ("rows and columns swapped", True, False, False),
    "FR": ("turned by 90° clockwise", True, True, False),
    "HL": ("turned by 90° counterclockwise", True, False, True),
    "HR": ("rows and columns swapped, turned by 180°", True, True, True),
}


def turn_of(ways: tuple[str, str]) -> tuple[str, bool, bool, bool] | None:
    """Return what to do to a film whose rows and columns run these ways, in words and steps; None: nothing to do."""
    return _TURNS.get("".join(ways))
