"""Tables in any encoding, folders, DICOM trees and patterns become studies; what is left out is counted."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from made_films import dicom, film

from lite.errors import LiteError
from lite.studies.sources import read_source
from lite.studies.sources.base import SourceOptions, StudyList, Where
from lite.studies.study import Study

TEXT = 'Film;Studie;Indikation\na.png;1;"Größe, ""alt""\nund neu"\n\nb.png;2;nan\n;3;Husten\n'


def read(source: Path | str, **options: object) -> StudyList:
    return read_source(str(source), SourceOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("t.csv", TEXT.encode(), None),
        ("t.csv", TEXT.encode("utf-8-sig"), None),
        ("t.csv", TEXT.replace("\n", "\r\n").encode("utf-16"), "t.csv is not in UTF-8; read as utf-16"),
        ("t.csv", TEXT.encode("cp1252"), "t.csv is not in UTF-8; read as cp1252"),
        ("t.tsv.gz", gzip.compress(TEXT.replace(";", "\t").encode(), mtime=0), None),
    ],
    ids=["utf-8", "utf-8 with a mark", "utf-16", "cp1252", "gzip"],
)
def test_a_table_is_read_in_its_encoding(tmp_path: Path, name: str, data: bytes, note: str | None) -> None:
    (tmp_path / name).write_bytes(data)
    studies = read(tmp_path / name, image_column="Film", id_column="Studie", reason_column="Indikation", keep_rows=True)
    reason = 'Größe, "alt"\r\nund neu' if "utf-16" in (note or "") else 'Größe, "alt"\nund neu'
    assert studies == [Study(tmp_path / "a.png", reason, id="1"), Study(tmp_path / "b.png", id="2")]
    assert studies[1].row == {"Film": "b.png", "Studie": "2", "Indikation": "nan"}
    assert studies.left_out == {"without a film": 1}
    assert [n for n in studies.notes if "UTF-8" in n] == (
        [n for n in studies.notes if n.startswith(note)] if note else []
    )
    assert len(studies.notes) == (1 if note else 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,id\na.png,1\nb.png,2,3\n", "t.csv:3: got 3 cells · expected 2, one a column"),
        ("image,id\na.png,1\nb.png,1\n", "t.csv:3: got the id 1 again, of other content"),
        ("image,id,id\na.png,1,1\n", "got the column id twice"),
        ("\n", "got an empty table"),
        ("image,id\n", "got no study that can be used"),
        ("bild,id\na.png,1\n", "got the columns bild, id · expected one of films"),
        ('image,id\n"a.png,1\n', "got a table that cannot be read .unexpected end of data"),
    ],
)
def test_a_bad_table_is_told_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(LiteError, match=message):
        read(tmp_path / "t.csv")


def test_conditions_choose_rows_and_name_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,View Position,split\na.png,AP,test\nb.png,LATERAL,test\nc.png,PA,train\n")
    studies = read(tmp_path / "t.csv", where=Where.parse("split=test"))
    assert [study.id for study in studies] == ["a.png"]
    assert studies.left_out == {"of view LATERAL": 1, "with another split than test": 1}
    assert studies.remark == ("2 of 3 studies of the list left out: 1 of view LATERAL, 1 with another split than test")
    with pytest.raises(LiteError, match="with the column fold · expected one of image, View Position, split"):
        read(tmp_path / "t.csv", where=Where.parse("fold=1"))
    for wrong in ("upright", "=1", ""):
        with pytest.raises(LiteError, match="expected frontal, chest or COLUMN=VALUE"):
            Where.parse(wrong)


def test_a_dicom_tree_is_a_study_for_each_exam(tmp_path: Path) -> None:
    films = {
        "x/1": {"StudyInstanceUID": "1.2.1", "ViewPosition": "AP", "ReasonForStudy": "Cough."},
        "x/2": {"StudyInstanceUID": "1.2.1", "ViewPosition": "PA", "StudyDescription": "XR CHEST"},
        "x/3": {"StudyInstanceUID": "1.2.1", "ViewPosition": "LL"},
        "y/4": {"StudyInstanceUID": "1.2.2", "ViewPosition": "LL"},
        "y/5": {"StudyInstanceUID": "1.2.3", "BodyPartExamined": "HAND"},
        ".z/6": {"StudyInstanceUID": "1.2.4"},
    }
    for name, attributes in films.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(dicom(film(), **attributes))
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "y" / "picture.PNG").write_bytes(b"\x89PNG")
    (tmp_path / "y" / "torn.dcm").write_bytes(dicom(film(), StudyInstanceUID="1.2.5")[:200])
    studies = read(tmp_path, header_reason=True, keep_rows=True)
    assert studies.kind == "DICOM tree"
    by_id = {study.id: study for study in studies}
    assert sorted(by_id) == ["1.2.1", "y/picture.PNG", "y/torn.dcm"]  # what is torn fails when its turn comes
    assert (by_id["1.2.1"].path, by_id["1.2.1"].reason) == (tmp_path / "x/2", "XR CHEST")
    assert by_id["1.2.1"].row["ViewPosition"] == "PA"
    assert studies.left_out == {
        "without a frontal chest film (a lateral view)": 1,
        "without a frontal chest film (body part HAND)": 1,
    }
    assert any(note.startswith("of the frontal films, 1 are not") for note in studies.notes)
    assert read(tmp_path)[0].reason is None
    assert [study.id for study in read(f"{tmp_path}/**/1", header_reason=True)] == ["1.2.1"]
    assert [study.reason for study in read(tmp_path / "x" / "1", header_reason=True)] == ["Cough."]


def test_where_looks_into_the_headers_of_a_table(tmp_path: Path) -> None:
    for name, attributes in (("a", {"ViewPosition": "LL"}), ("b", {"BodyPartExamined": "HAND"}), ("c", {})):
        (tmp_path / name).write_bytes(dicom(film(), **attributes))
    (tmp_path / "t.csv").write_text("path\na\nb\nc\nnone.png\n")
    for where, ids in (
        ("frontal", ["b", "c", "none.png"]),
        ("chest", ["a", "c", "none.png"]),
        ("chest,frontal", ["c", "none.png"]),
    ):
        assert [study.id for study in read(tmp_path / "t.csv", where=Where.parse(where))] == ids
    studies = read(tmp_path / "t.csv", where=Where.parse("frontal"))
    assert studies.left_out == {"that are a lateral view (ViewPosition LL)": 1}


def test_nothing_there_and_nothing_in_it_are_said(tmp_path: Path) -> None:
    for source, message in (
        (tmp_path / "none", "got nothing there"),
        (tmp_path / "*.png", "got a pattern that names no file"),
        (tmp_path, "got no study that can be used"),
    ):
        with pytest.raises(LiteError, match=message):
            read(source)
