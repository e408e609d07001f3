"""Results as JSON: what is written is read back, and what others have written, too."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

import lite
from lite.errors import ImageError, LiteError
from lite.model import FindingsModel
from lite.studies.results import SHORT_NOTICE, Findings, Result, read_results
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
