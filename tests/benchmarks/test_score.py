"""The predictions file, its mistakes, and what `score` prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.phantom import score as scoring
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from benchmarks.phantom.write import write_studies
from lite.errors import LiteError
from lite.eval.metrics import score_findings

ROWS = [
    {
        "id": "1",
        "query": "q",
        "reference": "There is a small left pleural effusion. No pneumothorax.",
        "prediction": "There is a small right pleural effusion. No pneumothorax.",
    },
    {
        "id": "2",
        "query": "q",
        "reference": "There is moderate cardiomegaly.",
        "prediction": "The lungs are clear.",
    },
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


def test_json_has_the_figures(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(run(capsys, str(predictions), "--json"))
    assert result["count"] == 2
    assert result["side_accuracy"] == 0.0
    assert result["size_accuracy"] == 1.0
    # Pleural effusion right, cardiomegaly missed: over the two labels of the references.
    assert result["macro_f1"] == pytest.approx(0.5)
    assert result["per_label"]["Cardiomegaly"]["f1"] == 0.0
    assert result["per_label"]["Cardiomegaly"]["precision"] is None
    assert result["per_label"]["Fracture"]["f1"] is None
    assert result["per_label"]["Pleural Effusion"]["support"] == 1
    figures = {"macro_f1", "micro_f1", "side_accuracy", "size_accuracy", "zone_accuracy", "rouge_l", "bleu_1", "bleu_4"}
    assert figures == set(result["intervals"])
    for name in ("micro_f1", "rouge_l", "bleu_1", "bleu_4"):
        low, high = result["intervals"][name]
        assert low <= result[name] <= high
        assert 0 < result[name] < 1


def test_json_is_one_strict_object(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    out = run(capsys, str(predictions), "--json")
    assert out.count("\n") == 1
    json.loads(out, parse_constant=refuse)


def test_the_table_is_aligned_and_complete(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, str(predictions))
    figures, labels, _ = out.split("\n\n")
    assert "label F1, macro  0.500" in figures
    assert "ROUGE-L" in figures
    assert "BLEU-1" in figures
    assert "BLEU-4" in figures
    rows = labels.splitlines()
    assert len(rows) == 15
    assert len(set(map(len, rows))) == 1  # the last column is flush right
    effusion = next(row for row in rows if row.startswith("Pleural Effusion"))
    assert effusion.split()[2:3] == ["1.000"]


def test_a_grammar_text_against_itself_is_perfect(tmp_path: Path) -> None:
    """Whatever the labeller reads wrongly in our own texts would show here or in its own tests."""
    texts = [write_findings(sample_study(seed), np.random.default_rng(seed)) for seed in range(40)]
    rows = [
        {"id": str(index), "query": "", "reference": report.text, "prediction": report.text}
        for index, report in enumerate(texts)
    ]
    scores = scoring.score(write_rows(tmp_path / "p.jsonl", *rows))
    drawn = score_findings(
        [row["reference"] for row in rows],
        [row["prediction"] for row in rows],
        truth=[report.readings for report in texts],
    )
    for result in (scores, drawn):
        assert result.label_f1.macro.value == result.side_accuracy.value == result.size_accuracy.value == 1.0
        assert result.side_accuracy.count > 10


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    for lines, message in (((), "got an empty file"), ((ROWS[0], "[1, 2]"), r"p\.jsonl:2: got list")):
        with pytest.raises(LiteError, match=message):
            scoring.score(write_rows(tmp_path / "p.jsonl", *lines))


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
def test_the_truth_is_what_was_drawn(tmp_path: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Let the references be silent or missing: only the list of the films knows what is there."""
    listed = write_studies(tmp_path / "films", count=4, seed=1, dicom=False)
    entries = json.loads(listed.read_text(encoding="utf-8"))
    called = {"id": [entry["id"] for entry in entries], "image": [str(listed.parent / e["image"]) for e in entries]}
    rows: list[dict[str, object]] = [
        {named: name, "prediction": entry["conversations"][1]["value"], **({"reference": "Nothing."} if silent else {})}
        for silent, (name, entry) in enumerate(zip(called[named], entries, strict=True))
    ]
    predictions = str(write_rows(tmp_path / "p.jsonl", *rows))
    scores = json.loads(run(capsys, predictions, "--json", "--truth", str(listed)))
    assert scores["macro_f1"] == 1.0
    assert 0 < scores["rouge_l"] < 1  # one reference of the list's, three silent ones


def test_a_truth_of_other_films_is_refused(tmp_path: Path, predictions: Path) -> None:
    listed = write_studies(tmp_path / "films", count=1, seed=1, dicom=False)
    with pytest.raises(LiteError, match=r"got 2 ids that are not in .*, the first '1'"):
        scoring.score(predictions, truth=listed)


@pytest.mark.parametrize("content", ["", "[{}]", '[{"id": "1", "phantom": {"labels": {"Edema": 3}}}]'])
def test_a_truth_without_labels_is_refused(tmp_path: Path, predictions: Path, content: str) -> None:
    (tmp_path / "list.json").write_text(content, encoding="utf-8")
    with pytest.raises(LiteError, match="with the drawn labels of each film"):
        scoring.score(predictions, truth=tmp_path / "list.json")
