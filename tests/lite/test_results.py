"""Results as JSON: what is written is read back, and what others have written, too."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from made_films import dicom, film

import lite
from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.errors import ImageError, LiteError
from lite.image.film import FilmInfo
from lite.model import FindingsModel
from lite.studies.results import SHORT_NOTICE, Findings, Result, Sentence, read_results
from lite.studies.study import Study


@pytest.fixture(scope="module")
def findings(tiny_model: FindingsModel, films: list[Path]) -> Findings:
    return tiny_model.findings(films[0], max_new_tokens=4)


def test_findings_survive_json(findings: Findings) -> None:
    logprobs = {"token_logprobs": (-0.5, -1.0), "top_logprobs": (((3, -0.5), (4, -2.0)), ((5, -1.0),))}
    for changes in ({}, logprobs):
        whole = dataclasses.replace(findings, notice=SHORT_NOTICE, fallbacks=("no CUDA graph",), **changes)  # type: ignore[arg-type]
        read = Findings.from_dict(json.loads(json.dumps(whole.to_dict())))
        assert read == dataclasses.replace(whole, timings=read.timings)
        assert read.timings.total_s == pytest.approx(whole.timings.total_s, abs=1e-5)
    assert findings.to_dict()["timings"]["decode_s"] == pytest.approx(findings.timings.decode_s, abs=1e-6)
    assert "token_logprobs" not in findings.to_dict()


def lateral_that_is_mirrored(folder: Path) -> Path:
    path = folder / "film.dcm"
    path.write_bytes(dicom(film(), ViewPosition="LL", PatientOrientation=["R", "F"], BodyPartExamined="CHEST"))
    return path


def test_the_result_carries_what_the_film_is(tiny_model: FindingsModel, tmp_path: Path) -> None:
    path = lateral_that_is_mirrored(tmp_path)
    with pytest.raises(ImageError, match="a lateral view"):
        tiny_model.findings(path)
    findings = tiny_model.findings(path, max_new_tokens=2, any_film=True)
    assert findings.film == FilmInfo(
        format="DICOM",
        transfer_syntax="Explicit VR Little Endian",
        view="LL",
        view_source="ViewPosition",
        body_part="CHEST",
        orientation="R\\F",
        turned="left and right swapped",
        grey_levels=len(np.unique(film())),
        remarks=(
            "drafted although it is a lateral view (ViewPosition LL): --any-film",
            "PatientOrientation R\\F; turned so that it is L\\F",
        ),
    )
    line = Result.of(Study(path, id="1"), findings).to_json()
    read = Result.from_json(line, where="here").findings
    assert read is not None
    assert read.film == findings.film
    older = json.loads(line)
    del older["film"]  # as versions before this one wrote it
    read = Result.from_json(json.dumps(older), where="here").findings
    assert read is not None
    assert read.film is None


@pytest.mark.parametrize("options", [[], ["--json"], ["--batch-size", "2"]])
def test_a_remark_is_said_once(
    options: list[str], tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lateral_that_is_mirrored(tmp_path)
    command = ["generate", str(tiny_artifact.path), str(path), "--device", "cpu", "--max-new-tokens", "2", *options]
    assert main(command) == 1
    assert "a lateral view (ViewPosition LL)" in capsys.readouterr().err
    assert main([*command, "--any-film"]) == 0
    out, err = capsys.readouterr()
    assert err.count(f"note: {path}: drafted although it is a lateral view") == 1
    assert err.count(f"note: {path}: PatientOrientation R\\F; turned so that it is L\\F") == 1
    if options == ["--json"]:
        assert len(json.loads(out)["film"]["remarks"]) == 2


def test_a_list_says_what_was_left_out_and_noted(
    tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lateral_that_is_mirrored(tmp_path)
    entries = [{"id": "1", "image": "film.dcm"}, {"id": "2", "image": "film.dcm", "view": "LATERAL"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    out = tmp_path / "out.jsonl"
    command = ["run", str(tiny_artifact.path), str(tmp_path / "list.json"), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--max-new-tokens", "2", "--any-film"]) == 0
    err = capsys.readouterr().err
    assert "note: 1 of 2 studies of the list left out: 1 of view LATERAL" in err
    assert err.count("drafted although it is a lateral view") == 1
    assert main([*command, "--max-new-tokens", "2"]) == 1
    assert (
        "got results of {'max_new_tokens': 2, 'rendering': 'mimic-cxr-jpg', 'any_film': True" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 32}, "where.dtype: got 32 · expected str · draft the study again"),
        ({"extra": 1}, "where: got an unknown key 'extra'"),
        ({"timings": None}, "where.timings: got None · expected an object"),
    ],
)
def test_other_findings_are_refused(findings: Findings, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LiteError) as raised:
        Findings.from_dict(findings.to_dict() | changes, where="where")
    assert str(raised.value).startswith(message)
    assert not isinstance(raised.value, lite.ArtifactError)


def test_a_line_survives(findings: Findings) -> None:
    study = Study(Path("a/Müller.png"), "Husten\u2028.", id="s1", question="Describe.", reference="Clear.")
    line = Result.of(study, findings, request={"rendering": "voi-lut"}).to_json()
    assert "Müller" in line
    assert "\n" not in line
    read = Result.from_json(line, where="here")
    assert dataclasses.replace(read.study, image=Path("a/Müller.png")) == study
    assert (read.prediction, read.request, read.error) == (findings.text, {"rendering": "voi-lut"}, None)
    assert read.findings is not None
    assert read.findings.token_ids == findings.token_ids
    assert json.loads(line)["notice"] == SHORT_NOTICE


def test_a_line_of_an_error_survives_whatever_the_film_is_called() -> None:
    image = os.fsdecode(b"\xff.png")
    line = Result.of(Study(image, id="1"), ImageError("got noise")).to_json()
    line.encode("utf-8")
    read = Result.from_json(line, where="here")
    assert (read.study.image, read.prediction, read.error, read.findings) == (image, None, "got noise", None)


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


ROW = {"id": "1", "query": "q", "reference": "A small effusion.", "prediction": "The lungs\u2028are clear."}


def test_lines_of_the_reference_evaluation_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", ROW, {"id": 2, "prediction": "Clear.", "more": []}, {"image": "3", "error": "e"})
    first, second, third = read_results(path)
    assert (first.study.id, first.study.question, first.study.reference) == ("1", "q", "A small effusion.")
    assert (first.prediction, first.findings) == (ROW["prediction"], None)
    assert (second.study.id, second.study.reference) == ("2", "")
    assert (third.study.id, third.prediction, third.error) == ("3", None, "e")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "got an empty file"),
        (("", "  "), "got an empty file"),
        ((ROW, "", "{not json"), r"p\.jsonl:3: got a line that is not JSON"),
        ((ROW, "[1, 2]"), r"p\.jsonl:2: got list"),
        (("[" * 100_000,), r"p\.jsonl:1: got a line that is not JSON"),
        (({"id": "1", "query": "q"},), r"p\.jsonl:1: got no prediction"),
        (({**ROW, "prediction": 3},), r"p\.jsonl:1: got prediction that is not text"),
        (({"prediction": "Clear."},), r"p\.jsonl:1: got an id that is not text"),
        ((ROW, ROW | {"id": "2"}, ROW), r"p\.jsonl:3: got id '1' again, as on line 1"),
        ((ROW | {"token_ids": [1]},), r"p\.jsonl:1: got no key 'finish_reason'"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, lines: tuple[object, ...], message: str) -> None:
    with pytest.raises(LiteError, match=message):
        read_results(write(tmp_path / "p.jsonl", *lines))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LiteError, match="cannot be read"):
        read_results(tmp_path / "none.jsonl")


def test_a_number_is_read_as_javascript_writes_it(findings: Findings) -> None:
    """A page that saves what the server has sent makes 1 of 1.0."""
    sentences = (Sentence(text=findings.text, mean_probability=1.0, score=0.0, probability=None),)
    told = json.loads(json.dumps(dataclasses.replace(findings, sentences=sentences).to_dict()))
    told["sentences"][0] |= {"mean_probability": 1, "score": 0}
    read = Findings.from_dict(told).sentences
    assert read == sentences
    assert type(read[0].score) is float
    told["sentences"][0]["score"] = True
    with pytest.raises(LiteError, match="got True|got true"):
        Findings.from_dict(told)
