"""Lists of studies: what is read, what is refused, and what their hash sees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lite.errors import LiteError
from lite.studies.films import check_films, sha256_of_studies
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study, as_study


def entry(number: int, **changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": f"Report {number}."}]
    return {"id": f"study-{number}", "image": f"{number}.png", "reason": "Cough.", "conversations": turns} | changes


def listed(folder: Path, *entries: object) -> Path:
    path = folder / "list.json"
    path.write_text(json.dumps(entries))
    return path


def test_an_entry_is_read(tmp_path: Path) -> None:
    (study,) = read_studies(listed(tmp_path, entry(1)))
    image = tmp_path / "1.png"
    assert study == Study(image, "Cough.", id="study-1", question="Describe.", reference="Report 1.")
    (study,) = read_studies(listed(tmp_path, entry(1)), image_folder=Path("elsewhere"))
    assert study.image == Path("elsewhere/1.png")


@pytest.mark.parametrize(
    "rest", [{}, {"reason": None, "conversations": None}, {"reason": math.nan, "conversations": [{}, {}]}]
)
def test_all_but_the_image_may_be_missing_or_null(tmp_path: Path, rest: dict[str, object]) -> None:
    entries = [{"id": 7, "image": "7.png", **rest}, {"image": "a/8.png", **rest}, {"id": None, "image": "9.png"}]
    studies = read_studies(listed(tmp_path, *entries))
    assert [study.id for study in studies] == ["7", "a/8.png", "9.png"]
    assert {(study.reason, study.query, study.question, study.reference) for study in studies} == {(None, None, "", "")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "got no list, or an empty one"),
        ('{"id": 1}', "got no list, or an empty one"),
        (json.dumps([entry(1), None]), "got an entry 2 that is no study .it is null."),
        (json.dumps([entry(1), {"id": "2"}]), "got an entry 2 that is no study .it has no image."),
        (json.dumps([entry(1, id=[2])]), r"entry 1 that is no study .its id is \[2\]."),
        (json.dumps([entry(1, conversations=[{}])]), "entry 1 that is no study.*not a question and its answer"),
        (json.dumps([entry(1, conversations=[None, None])]), "entry 1 that is no study.*not a question and its answer"),
        (
            json.dumps([entry(1, conversations=[{}, {"value": 5}])]),
            "entry 1 .* .its value is 5, not text",
        ),
        (json.dumps([entry(1, reason=7)]), "got an entry 1 that is no study .its reason is 7, not text"),
        (json.dumps([entry(1), entry(2), entry(1, image="3.png")]), "entry 3: got the id study-1 again"),
        (json.dumps([entry(1, image=["1.png", "2.png"])]), "entry 1 .*it has 2 films: name the frontal one"),
        (json.dumps([entry(1, view="LATERAL")]), "no study that can be used .1 of 1 studies .* 1 of view LATERAL"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_bad_list_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(LiteError, match=message):
        read_studies(tmp_path / "list.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_tables_write_for_nothing_is_nothing(tmp_path: Path, encoding: str) -> None:
    entries = [entry(1, id=math.nan, reason="nan"), entry(2, id=7.0, reason=" "), entry(3, reason="None", view="")]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(entries), encoding=encoding)
    assert [(study.id, study.reason) for study in read_studies(path)] == [
        ("1.png", None),
        ("7", None),
        ("study-3", None),
    ]


@pytest.mark.parametrize(
    "rest",
    [
        {"report": None, "reports": "Clear."},
        {"report": "", "reports": "Clear."},
        {"report": "Clear.", "reports": "All of it."},
        {"report": "Clear.", "key_image_path": math.nan},
        {"report": "Clear.", "image_path": "a/1.png", "frontal_lateral": "Frontal"},
    ],
)
def test_a_list_of_rexrank_may_have_holes(tmp_path: Path, rest: dict[str, object]) -> None:
    path = tmp_path / "list.json"
    path.write_text(
        json.dumps({"s": {"image_path": ["a/1.png"], "frontal_lateral": ["Frontal"], "context": None} | rest})
    )
    (study,) = read_studies(path)
    assert (study.id, study.image, study.reference) == ("s", tmp_path / "a/1.png", "Clear.")


def test_ids_may_come_twice_where_nobody_needs_them(tmp_path: Path) -> None:
    assert len(read_studies(listed(tmp_path, entry(1), entry(1)), unique=False)) == 2


def report(findings: object) -> list[dict[str, object]]:
    return [{"value": "<image>\nDescribe."}, {"value": findings}]


def test_what_the_evaluation_leaves_out_is_left_out_and_counted(tmp_path: Path) -> None:
    studies = read_studies(
        listed(
            tmp_path,
            entry(1, view="PA", generate_method="rule-based"),
            entry(2, view="LATERAL"),
            entry(3, view="LL"),
            entry(4, conversations=report(None)),
            entry(5, conversations=report(math.nan)),
            entry(6, conversations=report(" ")),
            entry(7, generate_method="gpt4"),
            entry(8, view="ap"),
            entry(8, view="ap"),
            entry(9, view=None, image=["9.png"]),
            entry(10, view="AP SUPINE", generate_method="Rule-based"),
            entry(11, view="frontal"),
            entry(12, view="UNKNOWN"),
            entry(13, conversations=report("nan")),
        )
    )
    assert [study.id for study in studies] == [f"study-{number}" for number in (1, 8, 9, 10, 11)]
    assert studies.remark == (
        "9 of 14 studies of the list left out: 1 of view LATERAL, 1 of view LL, 4 without findings, "
        "1 with findings by gpt4, 1 listed before, 1 of view UNKNOWN"
    )
    assert read_studies(listed(tmp_path, entry(1))).remark is None


def test_a_film_is_found_in_the_folder_that_was_named(tmp_path: Path) -> None:
    (tmp_path / "films/p10").mkdir(parents=True)
    (tmp_path / "films/p10/2.png").touch()
    path = listed(
        tmp_path, entry(1, image="/p10/1.png"), entry(2, image="mimic/p10/2.png"), entry(3, image="p10/3.png")
    )
    films = tmp_path / "films"
    wanted = [films / "p10/1.png", films / "p10/2.png", films / "p10/3.png"]
    assert [study.path for study in read_studies(path, image_folder=films)] == wanted
    assert read_studies(path)[0].path == Path("/p10/1.png")


def test_a_list_of_rexrank_is_read(tmp_path: Path) -> None:
    context = "<context>Age:60-70.Gender:F.Indication: Cough.</context>"
    common = {"image_path": ["/a/1.jpg", "/a/2.jpg"], "frontal_lateral": ["Lateral", "Frontal"], "split": "test"}
    content = {
        "s1": common | {"key_image_path": "/a/2.jpg", "section_findings": "Clear.", "report": "R", "context": context},
        "s2": common | {"report": "Clear lungs.", "reports": "Other.", "context": {"indication": "Fever."}},
        "s3": common | {"section_findings": math.nan},
        "s4": common | {"section_findings": "Clear.", "frontal_lateral": ["Lateral", "Lateral"]},
    }
    (tmp_path / "list.json").write_text(json.dumps(content))
    studies = read_studies(tmp_path / "list.json", image_folder=tmp_path)
    film = tmp_path / "a/2.jpg"
    assert studies == [
        Study(film, "Cough.", id="s1", reference="Clear."),
        Study(film, "Fever.", id="s2", reference="Clear lungs."),
    ]
    assert studies.remark == "2 of 4 studies of the list left out: 1 without findings, 1 of view Lateral"


def test_films_that_are_not_there_are_counted_and_the_flag_is_named(tmp_path: Path) -> None:
    path = listed(tmp_path, entry(1), entry(2), entry(3))
    studies = read_studies(path)
    with pytest.raises(LiteError, match=r"got 3 of 3 films that are not there, the first .*1\.png .*--image-folder$"):
        check_films(studies, path, every=False)
    (tmp_path / "2.png").touch()
    assert check_films(studies, path, every=False) == 2
    with pytest.raises(LiteError, match="got 2 of 3 films .* with --images, or take them out of the list"):
        check_films(studies, path, option="--images", every=True)
    assert check_films(studies[1:2], path, every=True) == 0


def test_what_stands_for_a_study() -> None:
    study = Study("film.png", "Cough.")
    assert as_study(study) is study
    assert as_study(("film.png", "Cough.")) == study
    assert as_study("film.png") == as_study(("film.png",)) == Study("film.png")
    for values in ((), ("film.png", None, None, "id")):
        with pytest.raises(LiteError, match=f"got a study of {len(values)} values"):
            as_study(values)
    with pytest.raises(LiteError, match="study 7: got a film as bytes"):
        assert Study(b"", id="7").path


def test_the_hash_sees_what_the_model_sees(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"a film")
    (tmp_path / "2.png").write_bytes(b"another")
    first, second = entry(1), entry(2)

    def hashed(*entries: object) -> str:
        return sha256_of_studies(read_studies(listed(tmp_path, *entries)))

    whole = hashed(first, second)
    other_report = entry(1, conversations=[{"value": "Q"}, {"value": "Another report."}])
    assert hashed(other_report, second) == whole
    others = {hashed(second, first), hashed(first), hashed(entry(1, reason=None), second), hashed(entry(3), second)}
    (tmp_path / "1.png").write_bytes(b"a film, repainted")
    others.add(hashed(first, second))
    (tmp_path / "1.png").unlink()
    others.add(hashed(first, second))
    assert len(others) == 6
    assert whole not in others
