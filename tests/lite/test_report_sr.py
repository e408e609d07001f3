"""Findings as a DICOM Basic Text SR: what is copied, what is said, and that others read it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from made_films import dicom, film

from lite import __version__
from lite.errors import ImageError
from lite.image.quiet import quietly
from lite.model import FindingsModel
from lite.studies.report import basic_text_sr
from lite.studies.results import Findings

pydicom = pytest.importorskip("pydicom")

CREATED = datetime(2026, 3, 1, 12, 30, 5, tzinfo=UTC)
UIDS = {"StudyInstanceUID": "2.25.5", "SeriesInstanceUID": "2.25.6"}
IDENTIFIERS = {
    "PatientID": "P-7", "PatientBirthDate": "19500203", "PatientSex": "F", "AccessionNumber": "A12", "StudyID": "3",
    "StudyDate": "20260228", "StudyTime": "101500.25", "IssuerOfPatientID": "Klinik",
}  # fmt: skip
LONG = "Die Lunge ist groß und übersichtlich.\n" * 1000
CASES = {
    "plain": ({}, "The lungs are clear."),
    "Latin-1, long": ({"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müßig^Jürgen"}, LONG),
    "Chinese, empty": ({"SpecificCharacterSet": "GB18030", "PatientName": "Wang^XiaoDong=王^小东"}, " \n"),
    "Japanese, escapes": (
        {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"},
        "Clear\x1b\x07, \udc80“größer”\nals 1 µm.",
    ),
}


@pytest.fixture(scope="module")
def findings(tiny_model: FindingsModel) -> Findings:
    return tiny_model.findings(film(60, 50), max_new_tokens=3)


def film_at(path: Path, **attributes: Any) -> Path:
    path.write_bytes(dicom(film(), **(UIDS | IDENTIFIERS | attributes)))
    return path


def tree(item: Any) -> list[tuple[str, str, Any]]:
    """Return name, relation and value of all items of the document."""
    found = []
    for child in item.get("ContentSequence", []):
        code = child.get("ConceptCodeSequence") or child.get("ReferencedSOPSequence")
        value = child.get("TextValue") or child.get("UID") or (code and code[0])
        found += [(child.ConceptNameCodeSequence[0].CodeMeaning, child.RelationshipType, value), *tree(child)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_report_has_the_films_patient_and_says_what_it_is(findings: Findings, case: str, tmp_path: Path) -> None:
    attributes, text = CASES[case]
    source = film_at(tmp_path / "film.dcm", **attributes)
    cut = dataclasses.replace(findings, text=text, finish_reason="length", adapter="north")
    out = tmp_path / "report.dcm"
    basic_text_sr(source, cut, created=CREATED, model="a model").save_as(out, enforce_file_format=True)
    report, original = pydicom.dcmread(out), pydicom.dcmread(source)
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert str(report.PatientName) == str(original.get("PatientName", "")) == attributes.get("PatientName", "")
    assert {name: report[name].value for name in IDENTIFIERS} == IDENTIFIERS
    assert report.StudyInstanceUID == UIDS["StudyInstanceUID"]
    assert (report.ReferringPhysicianName, report.SOPClassUID.name) == ("", "Basic Text SR Storage")
    assert (report.CompletionFlag, report.CompletionFlagDescription) == ("PARTIAL", "cut after 3 tokens")
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert (report.Manufacturer, report.ManufacturerModelName) == ("llava-rad-lite", "north, a model")
    assert (report.DeviceSerialNumber, report.SoftwareVersions) == (findings.artifact_id, __version__)
    assert (report.ContentDate, report.ContentTime, report.Modality) == ("20260301", "123005", "SR")
    assert not report.PerformedProcedureCodeSequence
    assert not report.ReferencedPerformedProcedureStepSequence
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    series = evidence.ReferencedSeriesSequence[0]
    assert (evidence.StudyInstanceUID, series.SeriesInstanceUID) == tuple(UIDS.values())
    items = tree(report)
    assert [(name, relation) for name, relation, _ in items] == [
        ("Language of Content Item and Descendants", "HAS CONCEPT MOD"),
        ("Observer Type", "HAS OBS CONTEXT"),
        ("Device Observer UID", "HAS OBS CONTEXT"),
        ("Device Observer Name", "HAS OBS CONTEXT"),
        ("Findings", "CONTAINS"),
        ("Comment", "CONTAINS"),
        ("Finding", "CONTAINS"),
        ("Best illustration of finding", "INFERRED FROM"),
    ]
    assert items[5][2] == findings.notice
    expected = {"Chinese, empty": "The draft is empty.", "Japanese, escapes": "Clear, “größer”\r\nals 1 µm."}
    assert items[6][2] == expected.get(case, text.strip().replace("\n", "\r\n"))
    assert items[7][2] == series.ReferencedSOPSequence[0]
    assert items[7][2].ReferencedSOPInstanceUID == original.SOPInstanceUID


@pytest.mark.parametrize("case", CASES)
def test_dcmtk_and_dicom3tools_find_no_error_in_it(findings: Findings, case: str, tmp_path: Path) -> None:
    if not (shutil.which("dsrdump") and shutil.which("dciodvfy")):
        pytest.skip("needs dsrdump (dcmtk) and dciodvfy (dicom3tools)")
    attributes, text = CASES[case]
    drafted = dataclasses.replace(findings, text=text, finish_reason="eos")
    report = basic_text_sr(film_at(tmp_path / "film.dcm", **attributes), drafted, created=CREATED)
    report.save_as(tmp_path / "report.dcm", enforce_file_format=True)
    dump = subprocess.run(["dsrdump", "+Pl", tmp_path / "report.dcm"], capture_output=True, check=False)
    assert (dump.returncode, [line for line in dump.stderr.splitlines() if line[:2] in (b"E:", b"F:")]) == (0, [])
    told = dump.stdout.decode()
    name = attributes.get("PatientName", "X-Ray Report")
    for words in (findings.notice, name, "COMPLETE", "UNVERIFIED", text.strip().rpartition("\n")[2]):
        assert words in told
    checked = subprocess.run(["dciodvfy", tmp_path / "report.dcm"], capture_output=True, text=True, check=False)
    said = checked.stderr + checked.stdout
    assert "BasicTextSR" in said
    assert "Error" not in said


def test_the_same_draft_is_the_same_object(findings: Findings, tmp_path: Path) -> None:
    def uids(source: Path, drafted: Findings) -> tuple[str, str]:
        report = basic_text_sr(source, drafted, created=CREATED)
        return report.SOPInstanceUID, report.SeriesInstanceUID

    source, other = film_at(tmp_path / "a.dcm"), film_at(tmp_path / "b.dcm", SOPInstanceUID="2.25.9")
    for out in ("first", "again"):
        basic_text_sr(source, findings, created=CREATED).save_as(tmp_path / out, enforce_file_format=True)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "again").read_bytes()
    others = [
        uids(source, dataclasses.replace(findings, text="Other.")),
        uids(source, dataclasses.replace(findings, artifact_id="0" * 64)),
        uids(other, findings),
        uids(source, findings),
    ]
    assert len({uid for pair in others for uid in pair}) == 8


def test_values_that_break_the_rules_are_copied_as_they_are(findings: Findings, tmp_path: Path) -> None:
    with quietly():
        source = film_at(tmp_path / "film.dcm", PatientBirthDate="19xx", PatientID="P" * 70, StudyID="3\\4")
    basic_text_sr(source, findings, created=CREATED).save_as(tmp_path / "report.dcm", enforce_file_format=True)
    with quietly():
        report = pydicom.dcmread(tmp_path / "report.dcm")
        copied = report.PatientBirthDate, report.PatientID, list(report.StudyID)
    assert copied == ("19xx", "P" * 70, ["3", "4"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"\x89PNG\r\n\x1a\n", "no DICOM file.*leave the SR out"),
        (dicom(None, SOPInstanceUID=None), "without StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID"),
        (dicom(None, **(UIDS | {"StudyInstanceUID": ""})), "without StudyInstanceUID · expected"),
        (b"\0" * 128 + b"DICM" + b"\x08\0\x05\0ZZ\xff\xff" * 9, "cannot be read|without"),
    ],
)
def test_a_film_that_no_report_can_be_of_is_refused(
    findings: Findings, tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "film.dcm").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        basic_text_sr(tmp_path / "film.dcm", findings, created=CREATED)
