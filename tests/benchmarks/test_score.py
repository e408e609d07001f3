"""The predictions file, its mistakes, and what `score` prints."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.phantom import score as scoring
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from benchmarks.phantom.write import write_studies
from lite.errors import LiteError

ROWS = [
    {
        "id": "1",
        "query": "q",
        "reference": "There is a small left pleural effusion. No pneumothorax.",
        "prediction": "There is a small right pleural effusion. No pneumothorax.",
    },
    {"id": "2", "query": "q", "reference": "There is moderate cardiomegaly.", "prediction": "The lungs are clear."},
]


def write_rows(path: Path, *rows: dict[str, object] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    scoring.add_arguments(parser)
    assert scoring.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "predictions.jsonl", *ROWS)


def test_json_is_one_strict_object_with_the_figures(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    out = run(capsys, str(predictions), "--json")
    assert out.count("\n") == 1
    result = json.loads(out, parse_constant=refuse)
    assert result["count"] == 2
    assert (result["side_accuracy"]["value"], result["size_accuracy"]["value"]) == (0.0, 1.0)
    # Pleural effusion right, cardiomegaly missed: over the two labels of the references.
    assert result["label_f1"]["macro"]["value"] == pytest.approx(0.5)
    labels = {row["label"]: row for row in result["label_f1"]["per_label"]}
    assert (labels["Cardiomegaly"]["f1"]["value"], labels["Cardiomegaly"]["precision"]) == (0.0, None)
    assert labels["Fracture"]["f1"]["value"] is None
    assert labels["Pleural Effusion"]["support"] == 1
    for figure in (result["label_f1"]["micro"], *(result[name] for name in ("rouge_l", "bleu_1", "bleu_4"))):
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert 0 < figure["value"] < 1


def test_the_tables_are_complete(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, labels, _ = run(capsys, str(predictions)).split("\n\n")
    assert "| label F1, macro | 0.500 |" in figures
    assert {"ROUGE-L", "BLEU-1", "BLEU-4"} <= set(re.findall(r"\| ([\w-]+)", figures))
    rows = labels.splitlines()
    assert len(rows) == 2 + 14
    effusion = next(row for row in rows if row.startswith("| Pleural Effusion"))
    assert [cell.strip() for cell in effusion.split("|")[2:5]] == ["1.000", "1.000 – 1.000", "1.000"]


def test_a_grammar_text_against_itself_is_perfect(tmp_path: Path) -> None:
    """Whatever the labeller reads wrongly in our own texts would show here or in its own tests."""
    texts = [write_findings(sample_study(seed), np.random.default_rng(seed)).text for seed in range(40)]
    rows = [{"id": str(index), "query": "", "reference": text, "prediction": text} for index, text in enumerate(texts)]
    scores = scoring.score(write_rows(tmp_path / "p.jsonl", *rows))
    assert scores.label_f1.macro.value == scores.side_accuracy.value == scores.size_accuracy.value == 1.0
    assert scores.side_accuracy.count > 10


FLAWED: dict[str, dict[str, object]] = {
    "none": {"id": "4", "prediction": "Lungs are clear.", "reference": None},
    "blank": {"id": "5", "prediction": "Lungs are clear.", "reference": " \n"},
    "placeholder": {"id": "6", "prediction": "Lungs are clear.", "reference": "NaN"},
    "German": {"id": "7", "prediction": "Lungs are clear.", "reference": "Kein Pneumothorax. Herz normal groß."},
}


def test_what_has_no_reference_is_in_no_figure_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"id": "3", "image": "3.png", "error": "got noise"}
    whole = scoring.to_json(scoring.score(write_rows(tmp_path / "p.jsonl", *ROWS)))
    flawed = write_rows(tmp_path / "p.jsonl", *ROWS, failed, *FLAWED.values())
    scores = scoring.to_json(scoring.score(flawed))
    assert scores.pop("left_out") == {"empty": 3, "not in English": 1}
    assert whole.pop("left_out") == {}
    assert scores == whole
    scoring.run(argparse.Namespace(predictions=flawed, truth=None, json=False))
    said = "3 studies whose reference is empty, 1 studies whose reference is not in English"
    assert all(said in text for text in capsys.readouterr())


@pytest.mark.parametrize("rows", [(), *FLAWED.values()])
def test_predictions_without_any_reference_are_refused(tmp_path: Path, rows: dict[str, object] | tuple[()]) -> None:
    failed = {"id": "3", "image": "3.png", "error": "got noise"}
    with pytest.raises(LiteError, match="none with a reference in English .* with --truth"):
        scoring.score(write_rows(tmp_path / "p.jsonl", failed, *([rows] if rows else [])))


@pytest.mark.parametrize("named", ["id", "image"])
def test_the_truth_takes_the_place_of_references(
    tmp_path: Path, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Let the references be wrong or missing: the list of the films knows what is there."""
    listed = write_studies(tmp_path / "films", count=4, seed=1, dicom=False)
    entries = json.loads(listed.read_text(encoding="utf-8"))
    called = {"id": [entry["id"] for entry in entries], "image": [str(listed.parent / e["image"]) for e in entries]}
    rows: list[dict[str, object]] = [
        {named: name, "prediction": entry["conversations"][1]["value"], **({"reference": "Nothing."} if wrong else {})}
        for wrong, (name, entry) in enumerate(zip(called[named], entries, strict=True))
    ]
    predictions = str(write_rows(tmp_path / "p.jsonl", *rows))
    scores = json.loads(run(capsys, predictions, "--json", "--truth", str(listed)))
    assert scores["label_f1"]["macro"]["value"] == scores["rouge_l"]["value"] == 1.0


def test_a_truth_of_other_films_is_refused(tmp_path: Path, predictions: Path) -> None:
    listed = write_studies(tmp_path / "films", count=1, seed=1, dicom=False)
    with pytest.raises(LiteError, match=r"got study '1', which is not in .* · expected predictions for the films"):
        scoring.score(predictions, truth=listed)
