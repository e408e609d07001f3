"""Films and reports indexed, searched, shown beside a draft and measured, by the commands, on exported towers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
import random_towers
from exported import check_unchanged, exported
from repository import ROOT

import lite
from benchmarks.phantom.write import write_studies
from export import ExportSettings, export_artifact
from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.bench.__main__ import main as bench
from lite.bench.retrieval import diagonal_ranks
from lite.retrieval.ask import ask_words
from lite.retrieval.index import FILMS, REPORTS, ROWS, STUDIES, Index
from lite.studies.sources.listed import read_studies

COUNT = 7
LONG = "There is a <b>left</b> pleural effusion. " * 60


@pytest.fixture(scope="module")
def towers_artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    """A random checkpoint, exported with its towers."""

    def make(out: Path) -> Artifact:
        folder = tmp_path_factory.mktemp("checkpoint")
        checkpoint, base = random_checkpoint.write(folder / "random")
        random_towers.add_towers(checkpoint)
        settings = ExportSettings(retrieval=True, text_vocab=random_towers.bert_folder(folder / "bert"))
        return export_artifact(checkpoint, base, out, settings)

    artifact = exported("searched", make, Path(random_towers.__file__).read_text())
    yield artifact
    check_unchanged(artifact.path.parent)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of phantoms; the third has a long report, the fourth none."""
    listed = write_studies(tmp_path_factory.mktemp("films") / "films", count=COUNT, seed=77, dicom=False)
    entries = json.loads(listed.read_text())
    entries[2]["conversations"][1]["value"] = LONG
    del entries[3]["conversations"]
    listed.write_text(json.dumps(entries))
    return listed


@pytest.fixture(scope="module")
def index(towers_artifact: Artifact, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "past"
    assert main(["index", str(towers_artifact.path), str(films), "--out", str(out), "-q"]) == 0
    return out


def found(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["search", *map(str, arguments), "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


# -- Index -----------------------------------------------------------------------------------------------------------


def test_an_index_holds_what_the_towers_make_of_films_and_reports(
    towers_artifact: Artifact, films: Path, index: Path
) -> None:
    studies = read_studies(films)
    with lite.load_retrieval(towers_artifact.path) as towers:
        made = Index(index, artifact_id=towers.artifact_id)
        assert np.array_equal(made.films, towers.embed_images([study.image for study in studies]))
        reports = [study.reference for study in studies if study.reference]
        assert np.allclose(made.reports, towers.embed_texts(reports), atol=1e-6)
    assert [(study.id, study.image, study.report or "") for study in made] == [
        (study.id, str(study.path.absolute()), study.reference.strip()) for study in studies
    ]
    assert (len(made), len(made.reports)) == (COUNT, COUNT - 1)


def test_what_fails_is_tried_again_and_nothing_else(
    towers_artifact: Artifact, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads(films.read_text())
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no film")
    entries[1]["image"] = str(bad)
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(entries))
    command = ["index", str(towers_artifact.path), str(listed), "--out", str(tmp_path / "past")]
    command += ["--image-folder", str(films.parent), "--batch-size", "2"]
    assert main([*command, "--limit", "3"]) == 1
    told = capsys.readouterr()
    assert f"failed: {bad}: got a file that is not an image" in told.err
    assert "note: reports of more tokens than " in told.err
    assert "2 of 3 studies are in" in told.out
    before = (tmp_path / "past" / STUDIES).read_bytes()
    assert main([*command, "--limit", "3"]) == 1
    assert "note: 2 of 3 studies are in" in capsys.readouterr().err
    assert (tmp_path / "past" / STUDIES).read_bytes() == before
    bad.write_bytes((films.parent / json.loads(films.read_text())[1]["image"]).read_bytes())
    assert main(command) == 0
    assert "7 films, 6 reports" in capsys.readouterr().out
    assert sorted(study.id for study in Index(tmp_path / "past")) == sorted(entry["id"] for entry in entries)
    assert main(command) == 0
    assert "7 of 7 studies are in" in capsys.readouterr().err


def test_killed_it_goes_on_to_the_same_bytes(
    towers_artifact: Artifact, films: Path, index: Path, tmp_path: Path
) -> None:
    out = tmp_path / "past"
    program = [sys.executable, "-m", "lite", "index", str(towers_artifact.path), str(films), "--out", str(out)]
    process = subprocess.Popen([*program, "--batch-size", "1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / ROWS).exists() and len(Index(out)) >= 2):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(Index(out)) < COUNT
    assert main([*program[3:], "--batch-size", "1"]) == 0
    for name in (FILMS, STUDIES, ROWS):
        assert (out / name).read_bytes() == (index / name).read_bytes()
    assert np.allclose(np.fromfile(out / REPORTS, np.float32), np.fromfile(index / REPORTS, np.float32), atol=1e-6)


# -- Search ----------------------------------------------------------------------------------------------------------


def test_words_and_films_find_what_is_nearest(
    towers_artifact: Artifact, films: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, studies = Index(index), read_studies(films)
    with lite.load_retrieval(towers_artifact.path) as towers:
        words, film = towers.embed_texts(["pleural effusion"])[0], made.films[5]
    with_report = [study for study in studies if study.reference]
    for arguments, query, matrix, of, what in (
        (("pleural effusion",), words, made.films, studies, "films"),
        (("pleural effusion", "--in", "reports"), words, made.reports, with_report, "reports"),
        (("--image", studies[5].path), film, made.reports, with_report, "reports"),
        (("--image", studies[5].path, "--in", "films"), film, made.films, studies, "films"),
    ):
        order = np.argsort(-(matrix @ query), kind="stable")[:4]
        answer = found(capsys, index, *arguments, "--top", "4")
        assert answer["in"] == what
        assert [hit["id"] for hit in answer["hits"]] == [of[row].id for row in order]
        assert [hit["similarity"] for hit in answer["hits"]] == pytest.approx((matrix @ query)[order], abs=1e-5)
    assert answer["hits"][0]["id"] == studies[5].id
    assert main(["search", str(index), "pleural effusion", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"the 2 nearest of 7 films in {index}"
    assert lines[1].split()[0] == "1"
    assert len(lines) == 4


def test_a_page_shows_films_and_what_their_reports_say(
    films: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "found.html"
    gone = read_studies(films)[0].path
    gone.rename(gone.with_suffix(".gone"))
    try:
        answer = found(capsys, index, '<i>"effusion"</i>', "--html", page)
    finally:
        gone.with_suffix(".gone").rename(gone)
    text = page.read_text()
    assert text.count("<li ") == text.count("data:image/jpeg;base64,") + 1 == COUNT
    assert f"{gone}: got no such file" in text
    assert "<i>" not in text
    assert "<b>left" not in text
    assert LONG.strip() in unescape(text)
    assert "(no report)" in text
    assert [text.index(hit["id"]) for hit in answer["hits"]] == sorted(text.index(hit["id"]) for hit in answer["hits"])
    assert "For research only. Not for clinical use." in text


def test_a_long_text_is_cut_and_said(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(index), LONG]) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: the text has ")
    assert err.endswith(" count\n")
    assert err.count("\n") == 1


def test_questions_that_cannot_be_answered(
    towers_artifact: Artifact, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "film.png").write_bytes(b"no film")
    other, moved = tmp_path / "other", tmp_path / "moved"
    for path, change in ((other, {"artifact_id": "0" * 16}), (moved, {"artifact": str(tmp_path / "gone")})):
        path.mkdir()
        for file in index.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        (path / "index.json").write_text(json.dumps(json.loads((index / "index.json").read_text()) | change))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "index.json").write_bytes((index / "index.json").read_bytes())
    for arguments, message in (
        ([index], "neither a TEXT nor an --image"),
        ([index, "effusion", "--image", "film.png"], "a TEXT and an --image"),
        ([index, " "], "a text without words"),
        ([index, "--image", tmp_path / "film.png"], "a file that is not an image"),
        ([tmp_path, "effusion"], "got no index"),
        ([other, "effusion"], "an index by the artifact 0000000000000000 · expected "),
        ([moved, "effusion"], "say where it is with --artifact"),
        ([empty, "effusion"], "an index with no study"),
    ):
        assert main(["search", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
    assert found(capsys, moved, "effusion", "--artifact", towers_artifact.path) == found(capsys, index, "effusion") | {
        "index": str(moved)
    }
    assert main(["index", str(towers_artifact.path), str(tmp_path / "film.png"), "--out", str(other)]) == 1
    assert "an index by the artifact 0000000000000000" in capsys.readouterr().err


# -- Beside a draft --------------------------------------------------------------------------------------------------


def test_past_studies_stand_beside_a_draft_that_is_the_same_without_them(
    towers_artifact: Artifact, films: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(study.path) for study in read_studies(films)[:2]]
    command = ["generate", str(towers_artifact.path), *paths, "--max-new-tokens", "12"]

    def drafted(*more: str) -> str:
        capsys.readouterr()
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    towers = lite.load_retrieval(towers_artifact.path)
    plain, beside = drafted("--json").splitlines(), drafted("--json", "--index", str(index)).splitlines()
    for before, after in zip(map(json.loads, plain), map(json.loads, beside), strict=True):
        past = after.pop("past")
        for value in (before, after):
            del value["timings"], value["memory"]
        assert after == before
        assert past["in"] == "reports"
        wanted = ask_words(Index(index), towers, before["prediction"], "reports", top=3)
        assert past["hits"] == wanted.to_dicts()
    text = drafted("--index", str(index))
    for value in map(json.loads, beside):
        part = text.partition(value["image"])[2]
        assert part.index(value["prediction"]) < part.index("past studies whose reports are nearest to the draft")
        assert part.index("the model has not seen them") < part.index(value["past"]["hits"][2]["id"])
    listed = tmp_path / "films.csv"
    listed.write_text("id,image\n" + "".join(f"film-{path[-9:-4]},{path}\n" for path in paths))
    assert main(["index", str(towers_artifact.path), str(listed), "--out", str(tmp_path / "films")]) == 0
    text = drafted("--index", str(tmp_path / "films"), "--batch-size", "2")
    assert text.count("past studies whose films are nearest to this one") == 2
    assert f"   1   1.000  film-{paths[0][-9:-4]}" in text


# -- Bench -----------------------------------------------------------------------------------------------------------


def test_ranks_are_where_the_diagonal_stands_in_a_stable_sort() -> None:
    rng = np.random.default_rng(3)
    films, reports = (rng.integers(-2, 3, (40, 6)).astype(np.float32) for _ in range(2))
    films[7], reports[11] = films[31], reports[5]  # the same films, and the same words
    cosines = reports @ films.T  # small whole numbers: exact, with many that are equal
    ranks = diagonal_ranks(films, reports)
    for way, matrix in (("text to film", cosines), ("film to text", cosines.T)):
        order = np.argsort(-matrix, axis=1, kind="stable")
        wanted = [row.tolist().index(number) + 1 for number, row in enumerate(order)]
        assert ranks[way].tolist() == wanted
    assert ranks["film to text"][11] > ranks["film to text"].min()


def test_towers_are_measured_beside_the_first(
    towers_artifact: Artifact, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = json.loads(films.read_text())
    entries[4]["image"] = "none.png"
    listed = films.with_name("some.json")
    listed.write_text(json.dumps(entries))
    (tmp_path / "same").symlink_to(towers_artifact.path)
    artifacts = [str(towers_artifact.path), str(tmp_path / "same")]
    assert bench(["retrieval", *artifacts, "--data", str(listed), "--json", str(tmp_path / "figures.json")]) == 0
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["num_pairs"] == COUNT - 2  # one has no report, one no film
    assert "In no figure: 1 films that cannot be used, such as" in out
    studies = [study for study in read_studies(listed) if study.reference and study.path.exists()]
    with lite.load_retrieval(towers_artifact.path) as towers:
        vectors = towers.embed_images([s.image for s in studies]), towers.embed_texts([s.reference for s in studies])
    ranks = diagonal_ranks(*vectors)
    for row in figures["rows"]:
        assert row["recall"]["text to film R@1"]["value"] == pytest.approx(np.mean(ranks["text to film"] <= 1))
        assert row["median_rank"]["film to text"]["value"] == np.median(ranks["film to text"])
        assert row["recall"]["film to text R@10"]["value"] == 1
        assert row["least_cosines"] == pytest.approx([1, 1], abs=1e-5)
    assert figures["rows"][1]["beside_first"]["text to film R@5"]["difference"]["value"] == 0
    assert len(figures["prevalence"]) > 2
    assert figures["rows"][0]["precision"] == pytest.approx(figures["prevalence"])  # of ten of five, all are near
    listed.write_text(json.dumps([{"id": "a", "image": entries[0]["image"]}]))
    assert bench(["retrieval", artifacts[0], "--data", str(listed)]) == 1
    assert "got no study with a report" in capsys.readouterr().err
