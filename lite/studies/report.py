"""Drafted findings as a DICOM Basic Text SR, for a film that is a DICOM file: what a PACS keeps beside the film.

    X-Ray Report                               TID 2000, of CID 7000
    ├── language, and the device that observed
    └── Findings
        ├── Comment   the notice: research only
        └── Finding   the draft
            └── the film

Source: PS3.3 A.35.1 (Basic Text SR), C.17; PS3.16 TID 2000, 2001, 2002, 1004, 1204.
"""

from __future__ import annotations

import io
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from lite._version import __version__
from lite.errors import BackendUnavailable, ImageError
from lite.image.dicom import is_dicom
from lite.image.header import text_of
from lite.image.quiet import quietly
from lite.image.stored import DICOM_EXTRA
from lite.studies.results import SHORT_NOTICE

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom.dataset import Dataset

    from lite.studies.results import Findings

NAME: Final = "llava-rad-lite"
_BASIC_TEXT_SR: Final = "1.2.840.10008.5.1.4.1.1.88.11"
_REQUIRED: Final = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_ALWAYS: Final = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
_WHERE_THERE: Final = ("IssuerOfPatientID", "StudyDescription")
_NOT_TEXT: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def basic_text_sr(film: Path | bytes, findings: Findings, *, created: datetime, model: str = NAME) -> Dataset:
    """Make a report of drafted findings, unverified, in the study of their film.

    Its UIDs follow from the film, the artifact and the text: the same draft of the same film is the same object.

    Args:
        film: the DICOM file that the findings are of, or its bytes. Patient and study are copied from its header.
        findings: what was drafted.
        created: when; its own clock counts, not its time zone.
        model: what the artifact's model is called.

    Raises:
        ImageError: it is no DICOM file, or has no UID of its study, its series, its class or itself.
        BackendUnavailable: pydicom is not installed.
    """
    with quietly():
        header = header_of(film)
        from pydicom.dataset import FileMetaDataset
        from pydicom.multival import MultiValue
        from pydicom.uid import ExplicitVRLittleEndian, generate_uid

        origin = [f" {header.SOPInstanceUID} {findings.artifact_id} ", _clean(findings.text)]
        report = _dataset(SpecificCharacterSet="ISO_IR 192", SOPClassUID=_BASIC_TEXT_SR)
        report.file_meta = FileMetaDataset()
        report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        report.SOPInstanceUID = generate_uid(entropy_srcs=["report", *origin])
        for keyword in (*_ALWAYS, *_WHERE_THERE):
            value = header.get(keyword)  # several values where there may be one: a backslash in the text
            text = "\\".join(map(str, value)) if isinstance(value, MultiValue) else text_of(header, keyword)
            if text or keyword in _ALWAYS:
                setattr(report, keyword, text)
        report.update(
            _dataset(
                Modality="SR",
                SeriesInstanceUID=generate_uid(entropy_srcs=["series", *origin]),
                SeriesNumber=1,
                SeriesDescription=SHORT_NOTICE,
                ReferencedPerformedProcedureStepSequence=[],
                Manufacturer=NAME,
                ManufacturerModelName=(f"{findings.adapter}, {model}" if findings.adapter else model).replace(
                    "\\", "/"
                )[:64],
                DeviceSerialNumber=findings.artifact_id[:64],
                SoftwareVersions=__version__,
            )
        )
        report.update(_document(header, findings, created))
        report.update(_content(header, findings, generate_uid(entropy_srcs=["device", findings.artifact_id])))
        return report


def encoded_report(film: Path | bytes, findings: Findings) -> bytes:
    """Return the report of findings that were drafted now, as a DICOM file.

    Raises:
        ImageError: the film is one that no report can be of, see `basic_text_sr`.
    """
    file = io.BytesIO()
    report = basic_text_sr(film, findings, created=datetime.now().astimezone())
    report.save_as(file, enforce_file_format=True)
    return file.getvalue()


def header_of(film: Path | bytes) -> Dataset:
    """Read of a film's header what a report takes from it.

    Raises:
        ImageError: no report can be of this film, see `basic_text_sr`.
        BackendUnavailable: pydicom is not installed.
    """
    name = "film" if isinstance(film, bytes) else str(film)
    try:
        with _opened(film) as file:
            known = is_dicom(file.read(144))
    except OSError as error:
        msg = f"{name}: got {error.strerror} · expected the film of the findings · put it back"
        raise ImageError(msg) from error
    if not known:
        raise ImageError(f"{name}: got a film that is no DICOM file · expected one, for an SR · leave the SR out")
    try:
        import pydicom
    except ImportError as error:
        msg = f"{name}: got a DICOM file and no pydicom · expected pydicom · {DICOM_EXTRA}"
        raise BackendUnavailable(msg) from error
    try:
        wanted = [*_REQUIRED, *_ALWAYS, *_WHERE_THERE]
        with _opened(film) as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, force=True, specific_tags=wanted)
        missing = [keyword for keyword in _REQUIRED if not text_of(header, keyword)]
    except Exception as error:  # pydicom raises whatever a damaged file leads it to
        msg = f"{name}: got a header that cannot be read ({error}) · expected a DICOM file · export it again"
        raise ImageError(msg) from error
    if missing:
        msg = f"{name}: got a film without {', '.join(missing)} · expected them, for an SR in its study"
        raise ImageError(f"{msg} · export it again, or leave the SR out")
    return header


def _opened(film: Path | bytes) -> BinaryIO:
    return io.BytesIO(film) if isinstance(film, bytes) else film.open("rb")


def _document(header: Dataset, findings: Findings, created: datetime) -> Dataset:
    """Make what says how far the document is, and which film it is of."""
    cut = findings.finish_reason == "length"
    series = _dataset(SeriesInstanceUID=header.SeriesInstanceUID, ReferencedSOPSequence=[_reference(header)])
    document = _dataset(
        InstanceNumber=1,
        PreliminaryFlag="PRELIMINARY",
        CompletionFlag="PARTIAL" if cut else "COMPLETE",
        VerificationFlag="UNVERIFIED",
        ContentDate=f"{created:%Y%m%d}",
        ContentTime=f"{created:%H%M%S}",
        PerformedProcedureCodeSequence=[],
        CurrentRequestedProcedureEvidenceSequence=[
            _dataset(StudyInstanceUID=header.StudyInstanceUID, ReferencedSeriesSequence=[series])
        ],
    )
    if cut:
        document.CompletionFlagDescription = f"cut after {findings.num_new_tokens} tokens"
    return document


def _content(header: Dataset, findings: Findings, device: str) -> Dataset:
    """Make the tree of the document."""
    film = _item("INFERRED FROM", "IMAGE", _code("121080", "DCM", "Best illustration of finding"))
    film.ReferencedSOPSequence = [_reference(header)]
    draft = _text("Finding", "121071", _clean(findings.text).strip() or "The draft is empty.")
    draft.ContentSequence = [film]
    section = _item("CONTAINS", "CONTAINER", _code("59776-5", "LN", "Findings"))
    section.ContinuityOfContent = "SEPARATE"
    section.ContentSequence = [_text("Comment", "121106", findings.notice.strip() or SHORT_NOTICE), draft]
    language = _item("HAS CONCEPT MOD", "CODE", _dcm("121049", "Language of Content Item and Descendants"))
    language.ConceptCodeSequence = [_code("en", "RFC5646", "English")]
    observer = _item("HAS OBS CONTEXT", "CODE", _dcm("121005", "Observer Type"))
    observer.ConceptCodeSequence = [_dcm("121007", "Device")]
    observer_uid = _item("HAS OBS CONTEXT", "UIDREF", _dcm("121012", "Device Observer UID"))
    observer_uid.UID = device
    observer_name = _text("Device Observer Name", "121013", NAME, relation="HAS OBS CONTEXT")
    return _dataset(
        ValueType="CONTAINER",
        ContinuityOfContent="SEPARATE",
        ConceptNameCodeSequence=[_code("43468-8", "LN", "X-Ray Report")],
        ContentTemplateSequence=[_dataset(MappingResource="DCMR", TemplateIdentifier="2000")],
        ContentSequence=[language, observer, observer_uid, observer_name, section],
    )


def _dataset(**attributes: Any) -> Dataset:
    from pydicom.dataset import Dataset

    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def _reference(header: Dataset) -> Dataset:
    return _dataset(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    return _dataset(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _dcm(value: str, meaning: str) -> Dataset:
    return _code(value, "DCM", meaning)


def _item(relation: str, value_type: str, name: Dataset) -> Dataset:
    return _dataset(RelationshipType=relation, ValueType=value_type, ConceptNameCodeSequence=[name])


def _text(name: str, code: str, text: str, *, relation: str = "CONTAINS") -> Dataset:
    item = _item(relation, "TEXT", _dcm(code, name))
    item.TextValue = _clean(text)
    return item


def _clean(text: str) -> str:
    """Return a text as DICOM has it: lines end in CR LF, and other control characters are none of it."""
    return _NOT_TEXT.sub("", text).replace("\n", "\r\n")
