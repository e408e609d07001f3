"""`python -m lite run` on the real loop: its file is kept line by line, gone on with, and never mixed or torn."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from repository import ROOT

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cohort.run import in_shard
from lite.errors import LiteError
from lite.studies.journal import Journal
from lite.studies.results import SHORT_NOTICE, read_results
from lite.studies.study import Study

ARGUMENTS = ("--batch-size", "2", "--max-new-tokens", "2", "--device", "cpu")


class Place:
    """A folder with a list and its films, and the command that drafts it."""

    def __init__(self, folder: Path, artifact: Path, films: list[Path]) -> None:
        self.artifact = artifact
        self.list = folder / "list.json"
        self.films = folder / "films"
        self.films.mkdir()
        self.out = folder / "new" / "out.jsonl"
        for index, film in enumerate(films):
            (self.films / f"{index}.png").write_bytes(film.read_bytes())
        (self.films / "bad.png").write_bytes(b"no film")
        self.write("0", "1", "2")

    def write(self, *names: str, reason: str = "Cough.") -> None:
        entries: list[dict[str, object]] = [{"id": n, "image": f"{n}.png", "reason": reason} for n in names]
        entries[0]["conversations"] = [{"value": "<image>\nDescribe."}, {"value": "Reference."}]
        self.list.write_text(json.dumps(entries))

    def command(self, *more: str, out: Path | None = None, source: Path | str | None = None) -> list[str]:
        source = [str(self.list), "--image-folder", str(self.films)] if source is None else [str(source)]  # type: ignore[assignment]
        return ["run", str(self.artifact), *source, "--out", str(out or self.out), *ARGUMENTS, *more]  # type: ignore[misc]

    def run(self, *more: str, out: Path | None = None, source: Path | str | None = None) -> int:
        return main(self.command(*more, out=out, source=source))

    def lines(self) -> dict[str, str]:
        return {json.loads(line)["id"]: line for line in self.out.read_text(encoding="utf-8").splitlines()}


@pytest.fixture
def place(tmp_path: Path, tiny_artifact: Artifact, films: list[Path]) -> Place:
    return Place(tmp_path, tiny_artifact.path, films)


def test_a_bad_film_is_a_line_and_the_summary_says_why(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.write("0", "bad", "2")
    assert place.run("--text-dir", str(place.out.parent / "texts")) == 1
    results = {result.study.id: result for result in read_results(place.out)}
    assert (results["0"].study.question, results["0"].study.reference) == ("Describe.", "Reference.")
    assert results["bad"].prediction is None
    assert "got a file that is not an image" in str(results["bad"].error)
    texts = {file.name: file.read_text(encoding="utf-8") for file in (place.out.parent / "texts").iterdir()}
    assert texts == {f"{n}.txt": f"{results[n].prediction}\n\n{SHORT_NOTICE}\n" for n in ("0", "2")}
    out, err = capsys.readouterr()
    assert out == f"2 of 3 studies are drafted in {place.out}, 1 failed\n"
    assert f"failed: {place.films / 'bad.png'}: got a file that is not an image" in err
    assert "failed: 1 × got a file that is not an image, or has no pixels\n" in err
    assert [line.split()[0] for line in err.splitlines()[-6:]] == ["seconds", "film", "tower", "prompt", "text", "all"]
    assert not place.out.with_name("out.jsonl.lock").exists()
    (place.out.parent / "texts" / "0.txt").unlink()
    (place.out.parent / "texts" / "2.txt").write_bytes(b"")  # as a power cut may leave it
    assert place.run("-q", "--text-dir", str(place.out.parent / "texts")) == 1
    assert {file.name: file.read_text() for file in (place.out.parent / "texts").iterdir()} == texts


def test_the_same_command_goes_on_and_mends_a_torn_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.write("0", "bad", "1", "2", "3")
    assert place.run("--limit", "3") == 1
    before = place.lines()
    with place.out.open("ab") as file:
        file.write(before["1"].replace('"1"', '"2"', 1)[:100].encode() + b"\0" * 20)  # as a power cut leaves it
    place.films.joinpath("bad.png").write_bytes(place.films.joinpath("4.png").read_bytes())
    assert place.run("-q") == 0
    assert "2 of 5 studies are in" in capsys.readouterr().err
    after = place.lines()
    assert sorted(after) == ["0", "1", "2", "3", "bad"]
    assert {name: after[name] for name in ("0", "1")} == {name: before[name] for name in ("0", "1")}
    assert Counter(json.loads(line)["id"] for line in place.out.read_text().splitlines()).most_common(1)[0][1] == 1
    content = place.out.read_bytes()
    place.write("0", "3")
    assert place.run() == 0  # a shorter list is no reason to lose what is there
    assert place.out.read_bytes() == content
    with place.out.open("ab") as file:
        file.write(content[:50])
    assert place.run() == 0
    assert place.out.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rendering", "voi-lut"], "got results of {'max_new_tokens': 2, 'rendering': 'mimic-cxr-jpg', 'any_film'"),
        ("reason", "got another film or reason for 0 · expected results of this source"),
        ("settings", "got results with engine onnx, device cpu"),
        ("artifact", "got results of the artifact 00"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(
    place: Place, change: str | list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.run("--limit", "1") == 0
    if change == "reason":
        place.write("0", "1", reason="Fever.")
    text = place.out.read_text()
    text = text.replace('"artifact_id": "', '"artifact_id": "00') if change == "artifact" else text
    text = text.replace('"engine": "torch"', '"engine": "onnx"') if change == "settings" else text
    place.out.write_text(text)
    more = change if isinstance(change, list) else []
    assert place.run(*more) == 1
    assert message in capsys.readouterr().err
    assert place.out.read_text() == text
    if change != "reason":  # which no flag makes the same study
        assert place.run(*more, "--mix") == 0
        assert place.out.read_text().startswith(text)
        ids = Counter(json.loads(line)["id"] for line in place.out.read_text().splitlines())
        assert ids == {"0": 2, "1": 1, "2": 1}
        mixed = place.out.read_bytes()
        assert place.run(*more, "--mix") == 0
        assert place.out.read_bytes() == mixed


@pytest.mark.parametrize("content", ['[{"id": "1", "image": "1.png"}]', '{"id": "1", "prediction": "Clear."}\n', "no"])
def test_a_file_of_something_else_stays_as_it_is(
    place: Place, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.parent.mkdir()
    place.out.write_text(content)
    assert place.run() == 1
    assert f"error: {place.out}:1: got " in capsys.readouterr().err
    assert place.out.read_text() == content


def test_a_second_run_names_the_first_and_a_dead_one_holds_nothing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.parent.mkdir()
    lock = place.out.with_name("out.jsonl.lock")
    lock.write_text("process 1 on a machine that lost its power\n")
    with Journal(place.out, artifact_id="", request={}):
        assert place.run() == 1
        assert f"got a file that process {os.getpid()} on " in capsys.readouterr().err
    assert not lock.exists()
    lock.touch()
    assert place.run("--limit", "1") == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit for the size of files")
def test_a_full_disk_is_one_line_and_leaves_whole_ones(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A disk that takes ten more bytes: what was begun is taken back."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(place.out, artifact_id="", request={}) as journal:
        study, bad = Study("a.png", id="a"), LiteError("x: got no film · expected one · take one")
        journal.add(study, bad)
        whole = place.out.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
        try:
            with pytest.raises(LiteError, match="got File too large · expected room for a line .* the 0 results"):
                journal.add(study, bad)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert place.out.read_bytes() == whole
    blocked = place.films / "0.png" / "out.jsonl"  # a folder that is a file
    assert place.run(out=blocked) == 1
    assert f"error: {blocked.parent}: got " in capsys.readouterr().err


def test_what_is_wrong_is_found_before_the_work(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "list.csv"
    table.write_text("film,Reason,id\nfilms/0.png,Cough,a\nfilms/9.png,Cough,b\n")
    for command, message in (
        (place.command("--image-folder", str(tmp_path)), "got 3 of 3 films that are not there"),
        (place.command("--reason-column", "reasn", source=table), "expected a column of the table: film, Reason, id"),
        (place.command(source=tmp_path / "none.csv"), "none.csv: got nothing there"),
        (place.command("--where", "splt=test", source=table), "expected one of film, Reason, id"),
        (place.command(out=tmp_path / "a.csv"), "expected a folder, or a file that ends in .jsonl"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert not place.out.parent.exists()
    assert place.run("-q", source=table) == 1  # one film that is missing fails alone, and is said before
    err = capsys.readouterr().err
    assert err.startswith("note: 1 of 2 films are not there")
    assert "failed: " in err


def test_results_come_in_the_forms_that_others_read(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "list.csv"
    rows = [["image", "study_id", "Indication", "findings", "ward", "image_path"]]
    rows += [["films/0.png", "ü/1", 'Said "cough",\nand fever.', "Clear.", "7", "old.png"]]
    rows += [["films/bad.png", "b", "", "nan", "8", ""]]
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    forms = [word for name in ("csv", "reference", "rexrank") for word in ("--format", name)]
    assert place.run("--columns", *forms, out=tmp_path / "out", source=table) == 1
    assert "columns guessed: image from image, id from study_id, reason from Indication" in capsys.readouterr().err
    (line,) = (tmp_path / "out" / "results.reference.jsonl").read_text(encoding="utf-8").splitlines()
    value = json.loads(line)
    assert set(value) == {"id", "query", "reference", "prediction"}
    assert value["query"].endswith(' indication: Said "cough", and fever.')
    assert (value["id"], value["reference"]) == ("ü/1", "Clear.")
    (study,) = json.loads((tmp_path / "out" / "results.rexrank.json").read_text(encoding="utf-8")).values()
    assert study["model_prediction"] == f"Findings: {value['prediction']}"
    assert study["image_path"] == "old.png"  # the source's own
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        by_id = {row["id"]: row for row in csv.DictReader(file)}
    good, bad = by_id["ü/1"], by_id["b"]
    assert (good["id"], good["reason"], good["ward"]) == ("ü/1", 'Said "cough",\nand fever.', "7")
    assert (bad["prediction"], bad["reference"]) == ("", "")
    assert "got a file that is not an image" in bad["error"]


def test_parquet_has_the_rows_of_csv(place: Place, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'llava-rad-lite[parquet]'")
    assert place.run("--format", "parquet", out=tmp_path / "out") == 0
    rows = parquet.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    results = {result.study.id: result.prediction for result in read_results(tmp_path / "out" / "results.jsonl")}
    assert {row["id"]: row["prediction"] for row in rows} == results


def test_shards_are_all_of_it_once(place: Place, tmp_path: Path) -> None:
    place.write("0", "1", "2", "3", "4")
    for number in (1, 2):
        assert place.run("-q", "--shard", f"{number}/2", out=tmp_path / "parts") == 0
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.name for file in files] == ["results-1-of-2.jsonl", "results-2-of-2.jsonl"]
    assert sorted(result.study.id for file in files for result in read_results(file)) == ["0", "1", "2", "3", "4"]
    counts = Counter(next(n for n in range(1, 5) if in_shard(f"study-{i}", (n, 4))) for i in range(2_000))
    assert min(counts.values()) > 400


def test_killed_at_any_point_each_study_is_there_once(place: Place) -> None:
    """The process is killed without a word as soon as so many lines are there, and then goes on."""
    place.write(*(f"{i % 5}" for i in range(5)))
    program = [sys.executable, "-m", "lite", *place.command("--text-dir", str(place.out.parent / "texts"))]
    for wanted in (1, 3):
        process = subprocess.Popen(program, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not place.out.exists() or place.out.read_bytes().count(b"\n") < wanted):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all((place.out.parent / "texts" / f"{name}.txt").is_file() for name in place.lines())
    assert place.run("--text-dir", str(place.out.parent / "texts")) == 0
    assert Counter(result.study.id for result in read_results(place.out)) == Counter("01234")
