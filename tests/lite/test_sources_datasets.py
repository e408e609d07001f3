"""Public data sets in their own layouts: look-alikes of a few rows, what becomes of them, and spoilt ones."""

from __future__ import annotations

import csv
import gzip
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lite.errors import LiteError
from lite.studies.sources import read_source
from lite.studies.sources.base import SourceOptions, StudyList, Where
from lite.studies.sources.exams import Exams
from lite.studies.sources.sections import cut_sections
from lite.studies.study import Study

METADATA = "dicom_id,subject_id,study_id,ViewPosition,StudyTime,ViewCodeSequence_CodeMeaning"
# The first exam comes in two places of the table, its lateral first; one has its view in the code only.
MIMIC_FILMS = (
    ("bb-2", 10000032, 50000001, "LATERAL", "213014.531", "lateral"),
    ("cc-1", 10000032, 50000001, "AP", "213014.531", ""),
    ("dd-1", 10000032, 50000002, "", "3014.5", "antero-posterior"),
    ("ee-1", 11000077, 50000003, "LL", "1", "left lateral"),
    ("ff-1", 11000077, 50000004, "", "1", ""),
    ("zz-1", 10000032, 50000001, "PA", "213014.531", "postero-anterior"),
    ("aa-1", 10000032, 50000001, "PA", "213014.531", "postero-anterior"),
)
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)\n
 INDICATION:  Cough for\n two weeks.\n
 FINDINGS:\n\n LUNGS: Both are clear.\n The heart is not enlarged.\n
 IMPRESSION:  Nothing acute: findings: none.
"""


def table(path: Path, header: str, *rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def read(path: Path, where: str | None = None, **options: Any) -> StudyList:
    return read_source(str(path), SourceOptions(where=Where.parse(where) if where else Where(), **options))


def refuse(match: str, path: Path, where: str | None = None) -> None:
    with pytest.raises(LiteError, match=match):
        read(path, where)


def mimic(root: Path) -> Path:
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, *MIMIC_FILMS)
    splits = [(dicom, study, "test" if study == 50000002 else "train") for dicom, _, study, *_ in MIMIC_FILMS]
    table(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,split", *splits)
    sectioned = (("s50000002", "", "Clear\n lungs."), ("s50000004", "", "Not asked."))
    table(root / "mimic_cxr_sectioned.csv", "study,impression,findings", *sectioned)
    report = root / "files/p10/p10000032/s50000001.txt"
    report.parent.mkdir(parents=True)
    report.write_text(REPORT)
    return root


def test_mimic_gives_a_study_an_exam_pa_before_ap(tmp_path: Path) -> None:
    root = mimic(tmp_path / "set")
    films, findings = root / "files/p10/p10000032", "LUNGS: Both are clear. The heart is not enlarged."
    studies = read(root)
    assert studies == [
        Study(films / "s50000001/aa-1.jpg", "Cough for two weeks.", id="50000001", reference=findings),
        Study(films / "s50000002/dd-1.jpg", id="50000002", reference="Clear lungs."),
    ]
    assert studies.kind == "MIMIC-CXR-JPG"
    assert studies.left_out == {"without a frontal film (LL)": 1, "without a frontal film (no view named)": 1}
    assert studies.notes == [
        "1 films of other views and 2 further frontal ones of the same exams are not drafted from: PA goes before AP",
        "1 of 2 studies come without a reason for the exam",
    ]
    assert read(root / "mimic-cxr-2.0.0-metadata.csv.gz") == studies
    (test,) = tests = read(root, "split=test,ViewPosition=", image_folder=tmp_path / "films", keep_rows=True)
    assert (tests.left_out, len(tests.notes)) == ({"with another split than test": 3}, 1)  # none on films of others
    assert test.path == tmp_path / "films/p10/p10000032/s50000002/dd-1.jpg"
    assert (test.row["split"], test.row["StudyTime"]) == ("test", "3014.5")
    assert studies[0].row == {}


def test_mimic_without_its_splits_or_reports_says_so(tmp_path: Path) -> None:
    table(tmp_path / "mimic-cxr-2.1.0-metadata.csv", METADATA, *MIMIC_FILMS)
    studies = read(tmp_path)
    assert [study.reference for study in studies] == ["", ""]
    assert f"{tmp_path} has no mimic-cxr-*-split.csv.gz: studies come without their split" in studies.notes
    assert "2 of 2 studies come without findings to compare with" in studies.notes
    refuse("the column split · expected one of dicom_id, subject_id, .* · name one", tmp_path, "split=test")


def test_spoilt_tables_of_mimic_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    table(path, METADATA.replace("ViewPosition", "View"), *MIMIC_FILMS)
    refuse(r"metadata\.csv\.gz:1: got the columns dicom_id, .*View, .* also ViewPosition", tmp_path)
    table(path, METADATA.replace("dicom_id,subject_id", "subject_id,dicom_id"), *MIMIC_FILMS)
    refuse(r"csv\.gz:2: got subject_id bb-2 and study_id 50000001 · expected numbers", tmp_path)
    mimic(tmp_path / "set").joinpath("mimic_cxr_sectioned.csv").write_text("study,text\n")
    refuse(r"sectioned\.csv:1: got the columns study, text · expected also findings", tmp_path / "set")
    whole = table(path, METADATA, *MIMIC_FILMS).read_bytes()
    for spoilt in (whole[:-20], whole[:40] + bytes(20) + whole[60:]):
        path.write_bytes(spoilt)
        refuse(r"metadata\.csv\.gz: got a file that cannot be read", tmp_path)


def test_rows_are_not_kept_unless_asked_for() -> None:
    class Row(dict[str, object]):
        """A row that can be watched."""

    for keep_rows in (False, True):
        exams = Exams(StudyList("set", SourceOptions(keep_rows=keep_rows)), Path("films.csv"))
        rows = []
        for line, view in enumerate(("LL", "AP", "PA", "PA")):
            row = Row(view=view)
            rows.append(weakref.ref(row))
            exams.add("exam", f"{line}.png", view, line, row)
            del row
        assert [row() for row in rows] == [None, None, {"view": "PA"} if keep_rows else None, None]


@pytest.mark.parametrize(
    ("report", "reason", "findings"),
    [
        ("Indication: Fever.\nFindings: Clear.\nImpression: None.", "Fever.", "Clear."),
        ("HISTORY: Old.\nREASON FOR THE EXAM: New.\nFINDINGS AND IMPRESSION: Clear.", "New.", "Clear."),
        ("ADDENDUM:\nFINDINGS:\n\nFINDINGS: First.\nFINDINGS: Second.", None, "First."),
        ("CLINICAL HISTORY: Pain.\nIMPRESSION: The findings: none.", "Pain.", None),
        ("No heading at all.", None, None),
        ("", None, None),
    ],
)
def test_sections_are_cut_by_headings(report: str, reason: str | None, findings: str | None) -> None:
    assert cut_sections(report) == (reason, findings)


def test_chexpert_plus_takes_the_file_that_is_there(tmp_path: Path) -> None:
    folder = "train/patient00001/study{}/view{}_{}.jpg"
    path = table(
        tmp_path / "df_chexpert_plus_240401.csv",
        "path_to_image,frontal_lateral,ap_pa,section_clinical_history,section_history,section_findings,split",
        (folder.format(1, 1, "frontal"), "Frontal", "AP", "NaN", " Cough. ", "Clear.", "train"),
        (folder.format(1, 2, "frontal"), "Frontal", "PA", "nan", "Cough.", "Clear.", "train"),
        (folder.format(1, 3, "lateral"), "Lateral", "", "", "Cough.", "Clear.", "train"),
        (folder.format(2, 1, "frontal"), "Frontal", "nan", "Pain.", "Other.", "NaN", "valid"),
        (folder.format(3, 1, "lateral"), "Lateral", "NaN", "Pain.", "", "Clear.", "valid"),
    )
    there = tmp_path / folder.format(1, 2, "frontal").replace(".jpg", ".png")
    there.parent.mkdir(parents=True)
    there.touch()
    studies = read(tmp_path)
    missing = tmp_path / folder.format(2, 1, "frontal")
    assert studies == [
        Study(there, "Cough.", id="patient00001/study1", reference="Clear."),
        Study(missing, "Pain.", id="patient00001/study2"),
    ]
    assert (studies.kind, studies.left_out) == ("CheXpert Plus", {"without a frontal film (Lateral)": 1})
    assert "1 of 2 studies come without findings to compare with" in studies.notes
    assert [study.id for study in read(path, "split=valid")] == ["patient00001/study2"]
    renamed = path.rename(tmp_path / "mine.csv")
    assert read(renamed) == studies
    assert [study.reference for study in read(renamed, reference_column="split")][-1:] == ["valid"]
    columns, _, rows = renamed.rename(path).read_text().partition(",ap_pa,")
    path.write_text(f"frontal_lateral,path_to_image,ap_pa,{rows}")
    refuse(r"240401\.csv:2: got the film Frontal in path_to_image · expected .*/patient", path)
    path.write_text(f"{columns},side,{rows}")
    refuse(r"240401\.csv:1: got the columns .*side.* · expected also ap_pa", path)


def test_the_older_chexpert_is_told_by_its_columns(tmp_path: Path) -> None:
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding"
    for split, patient in (("train", "patient00001"), ("valid", "patient64541")):
        image = f"CheXpert-v1.0-small/{split}/{patient}/study1/view1_frontal.jpg"
        table(tmp_path / f"{split}.csv", header, (image, "Female", 60, "Frontal", "AP", ""))
    film = tmp_path / "valid/patient64541/study1/view1_frontal.jpg"
    film.parent.mkdir(parents=True)
    film.touch()
    assert read(tmp_path / "valid.csv") == [Study(film, id="patient64541/study1")]
    assert [study.id for study in read(tmp_path)] == ["patient00001/study1", "patient64541/study1"]


def citation(uid: str, images: Sequence[str], **texts: str) -> str:
    labelled = "".join(f'<AbstractText Label="{label.upper()}">{text}</AbstractText>' for label, text in texts.items())
    films = "".join(f'<parentImage id="{image}"><figureId>F1</figureId></parentImage>' for image in images)
    return f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{uid}"/>{labelled}{films}</eCitation>'


def test_openi_is_read_from_xml(tmp_path: Path) -> None:
    reports = tmp_path / "ecgen-radiology"
    reports.mkdir()
    (reports / "10.xml").write_text(citation("CXR10", ["CXR10_IM-1"], findings="Clear &amp; calm.", indication="None"))
    (reports / "2.xml").write_text(citation("CXR2", ["CXR2_IM-1", "CXR2_IM-2"], findings="", indication=" Cough. "))
    (reports / "3.xml").write_text(citation("CXR3", [], findings="Clear."))
    for name in ("CXR10_IM-1.dcm", "CXR2_IM-2.png"):
        (tmp_path / name).touch()
    studies = read(tmp_path, keep_rows=True)
    assert studies == [
        Study(tmp_path / "CXR2_IM-1.png", "Cough.", id="CXR2"),
        Study(tmp_path / "CXR10_IM-1.dcm", id="CXR10", reference="Clear & calm."),
    ]
    assert studies[0].row["images"] == ["CXR2_IM-1", "CXR2_IM-2"]
    assert (studies.kind, studies.left_out) == ("Open-I", {"without a film": 1})
    assert studies.notes[0] == "the XML does not say which film is frontal: the first of each study is taken"
    assert [study.id for study in read(reports)] == ["CXR2", "CXR10"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_that_declares_entities_or_is_cut_is_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "1.xml").write_text(citation("CXR1", ["film"], findings="Clear."))
    path = tmp_path / "2.xml"
    whole = citation("CXR2", ["film"], findings="&b;").replace("utf-8", encoding)
    bomb = "".join(f'<!ENTITY {name} "{f"&{of};" * 10}">' for name, of in zip("bcdefghij", "cdefghijk", strict=True))
    outside = '<!ENTITY b SYSTEM "file:///etc/hostname">'
    for declared in (f'{bomb}<!ENTITY k "lol">', outside):
        path.write_text(whole.replace("<eC", f"<!DOCTYPE eCitation [{declared}]><eC"), encoding=encoding)
        refuse(r"2\.xml: got a report that cannot be read \(it has a document type", tmp_path)
    for spoilt in (whole, whole[:-20], ""):
        path.write_text(spoilt, encoding=encoding)
        refuse(r"2\.xml: got a report .*expected XML of Open-I · download it again", tmp_path)


def test_openi_is_read_from_its_two_tables(tmp_path: Path) -> None:
    table(
        tmp_path / "indiana_reports.csv",
        "uid,Problems,indication,findings",
        (1, "normal", "Positive test", "Clear."),
        (2, "normal", "None", ""),
        (3, "normal", "Pain", "Clear."),
    )
    table(
        tmp_path / "indiana_projections.csv",
        "uid,filename,projection",
        (1, "1_IM-2.dcm.png", "Lateral"),
        (1, "1_IM-1.dcm.png", "Frontal"),
        (2, "2_IM-1.dcm.png", "Frontal"),
        (3, "3_IM-1.dcm.png", "Lateral"),
    )
    films = tmp_path / "images/images_normalized"
    assert [study.path for study in read(tmp_path)] == [tmp_path / "1_IM-1.dcm.png", tmp_path / "2_IM-1.dcm.png"]
    films.mkdir(parents=True)
    studies = read(tmp_path, "Problems=normal")
    assert studies == [
        Study(films / "1_IM-1.dcm.png", "Positive test", id="1", reference="Clear."),
        Study(films / "2_IM-1.dcm.png", id="2"),
    ]
    assert studies.left_out == {"without a frontal film (Lateral)": 1}
    (tmp_path / "indiana_reports.csv").unlink()
    refuse(r"indiana_reports\.csv: got a file that cannot be read", tmp_path / "indiana_projections.csv")


def test_padchest_is_read_by_its_projections(tmp_path: Path) -> None:
    path = table(
        tmp_path / "PADCHEST_images_labels.csv",
        ",ImageID,ImageDir,StudyID,PatientID,Projection,Pediatric,Report",
        (0, "a.png", 0, "s1", 1, "L", "No", "sin hallazgo"),
        (1, "b.png", 0, "s1", 1, "AP_horizontal", "No", "sin hallazgo"),
        (2, "c.png", 0, "s1", 1, "AP", "No", "sin hallazgo"),
        (3, "d.png", 17, "s2", 2, "PA", "PED", "cardiomegalia"),
        (4, "e.png", 17, "s3", 3, "COSTAL", "No", "fractura"),
        (5, "f.png", 17, "s4", 4, "", "No", "fractura"),
    )
    (tmp_path / "d.png").touch()
    studies = read(path)
    assert studies == [
        Study(tmp_path / "0/c.png", id="s1", reference="sin hallazgo"),
        Study(tmp_path / "d.png", id="s2", reference="cardiomegalia"),
    ]
    assert studies.left_out == {"without a frontal film (COSTAL)": 1, "without a frontal film (no view named)": 1}
    assert any("in Spanish" in note for note in studies.notes)
    assert studies.notes[-1] == "1 of 2 studies are of children (column Pediatric)"
    assert read(tmp_path, image_folder=tmp_path / "films")[0].path == tmp_path / "films/0/c.png"
    path.write_text(path.read_text().replace("Report", "Informe"))
    refuse(r"labels\.csv:1: got the columns .*Informe · expected also Report", path)


def test_r2gen_is_read_by_its_splits(tmp_path: Path) -> None:
    path = tmp_path / "annotation.json"
    first = {"id": "CXR1", "report": "clear lungs .", "image_path": ["CXR1/0.png", "CXR1/1.png"], "split": "odd"}
    other = {"id": 2, "report": math.nan, "image_path": ["2.png"], "subject_id": 9}
    path.write_text(json.dumps({"train": [first], "val": [], "test": [other]}))
    images = tmp_path / "images"
    images.mkdir()
    studies = read(tmp_path)
    whole = Study(images / "CXR1/0.png", id="CXR1", reference="clear lungs .")
    assert studies == [whole, Study(images / "2.png", id="2")]
    assert "lower-cased" in studies.notes[0]
    assert "the first of each study is taken" in studies.notes[1]
    assert read(path, "split=train") == [whole]
    (test,) = read(path, "split=test", keep_rows=True, image_folder=tmp_path)
    assert (test.path, test.row["subject_id"]) == (tmp_path / "2.png", 9)
    for entry in (None, {"id": "3"}, {"id": "3", "image_path": [4]}, {"id": "", "image_path": ["3.png"]}):
        path.write_text(json.dumps({"train": [first, entry]}))
        refuse(r"annotation\.json: train, entry 2: got an entry with .* · expected id", path)
    refuse("no study that can be used .folder, empty.", images)
    path.write_text('{"train": [1')
    refuse("cannot be read", path)


def test_rexrank_is_read_also_from_its_output_form(tmp_path: Path) -> None:
    entry = {"image_path": ["/p10/1.jpg"], "section_findings": "Clear.", "model_prediction": "Findings: Wet."}
    contexts = ("<context>Age:60-70.Gender:F.Indication: Cough.</context>", "Age:8.Indication:nanComparison: None.")
    content = {f"s{n}": entry | {"context": context} for n, context in enumerate((*contexts, math.nan))}
    path = tmp_path / "rexrank.json"
    path.write_text(json.dumps(content | {"s9": entry | {"section_findings": math.nan}}))
    studies = read(path, image_folder=tmp_path, keep_rows=True)
    assert [(study.id, study.reason) for study in studies] == [("s0", "Cough."), ("s1", None), ("s2", None)]
    assert {(study.path, study.reference) for study in studies} == {(tmp_path / "p10/1.jpg", "Clear.")}
    assert studies[0].row == content["s0"]
    assert studies.left_out == {"without findings": 1}
