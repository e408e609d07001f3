"""The header of a film's file, read without its pixels: which study it is of, and whether it can be drafted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from lite.errors import BackendUnavailable
from lite.image.dicom import is_dicom
from lite.image.header import not_a_film, not_chest, not_frontal, text_of, view_of
from lite.image.quiet import quietly
from lite.image.stored import DICOM_EXTRA

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom.dataset import Dataset

_DIRECTORY: Final = "1.2.840.10008.1.3.10"  # a DICOMDIR: the index of a medium
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
REASONS: Final = ("ReasonForTheRequestedProcedure", "ReasonForStudy", "StudyDescription")
_IDENTIFIERS: Final = (
    *("PatientID", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID", "StudyDate", "StudyTime", "Modality"),
    *("ViewPosition", "BodyPartExamined", "StudyDescription", "SeriesDescription"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmHeader:
    """What a DICOM file says of its film before its pixels are read."""

    study_uid: str | None
    view: str | None  # "AP", "PA", "FRONTAL"; None: it does not say
    not_frontal: str | None  # which other view it is: "a lateral view (ViewPosition LL)"
    not_chest: str | None  # what else it is: "body part HIP (BodyPartExamined)", "a CT slice (modality CT)"
    reason: str | None  # for the exam: the first of REASONS that there is
    row: dict[str, str]  # its identifiers, by DICOM's keywords

    @property
    def refused(self) -> str | None:
        """What the rules of films refuse it for; None: nothing that a header tells."""
        return self.not_chest or self.not_frontal


def read_header(file: Path) -> FilmHeader | None:
    """Read the header of a DICOM file; None for a file of another kind, or the index of a medium.

    One that cannot be read says nothing: it is refused when its film is to be drafted from, with the reason.

    Raises:
        BackendUnavailable: it is a DICOM file, and pydicom is not installed.
    """
    try:
        with file.open("rb") as opened:
            beginning = opened.read(144)
    except OSError:
        return None
    if not is_dicom(beginning):
        return None
    try:
        import pydicom
    except ImportError as error:
        msg = f"{file}: got a DICOM file and no pydicom · expected pydicom · {DICOM_EXTRA}"
        raise BackendUnavailable(msg) from error
    dataset = pydicom.Dataset()
    try:
        with quietly():
            meta = pydicom.filereader.read_file_meta_info(file) if beginning[128:132] == b"DICM" else None
            # pydicom would inflate it before anyone can ask how large it is.
            if meta is None or text_of(meta, "TransferSyntaxUID") != _DEFLATED:
                dataset = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    except Exception:  # noqa: BLE001 - pydicom raises whatever a damaged file leads it to
        dataset = pydicom.Dataset()
    return None if text_of(dataset, "SOPClassUID") == _DIRECTORY else header_of(dataset, str(file))


def header_of(dataset: Dataset, path: str) -> FilmHeader:
    """Return what a data set says of its film; `path` is what its row calls it."""
    view = view_of(dataset)[0]
    return FilmHeader(
        study_uid=text_of(dataset, "StudyInstanceUID") or None,
        view=view if view in ("AP", "PA", "FRONTAL") else None,
        not_frontal=not_frontal(dataset),
        not_chest=not_a_film(dataset) or not_chest(dataset),
        reason=next((text for name in REASONS if (text := text_of(dataset, name))), None),
        row={"path": path} | {name: text for name in _IDENTIFIERS if (text := text_of(dataset, name))},
    )
