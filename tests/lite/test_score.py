"""`python -m lite score`: predictions in every form, their mistakes, what is left out, and what is said."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.report import write_findings
from benchmarks.phantom.write import write_studies
from lite.__main__ import main
from lite.artifact.manifest import NOTICE
from lite.bench.scores import format_scores, render_scores
from lite.bench.table import to_json
from lite.cohort.formats import write_reference, write_rexrank
from lite.errors import LiteError
from lite.eval.figures import Estimate
from lite.eval.labels import LABELS
from lite.eval.measures import text_sums
from lite.eval.paired import Comparison
from lite.eval.scoring import Scores, read_pairs, score
from lite.studies.predictions import read_predictions
from lite.studies.results import read_results

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


def scored(*files: Path, truth: Path | None = None) -> Scores:
    return score(read_pairs(files, truth=truth), text_sums)


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "predictions.jsonl", *ROWS)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["score", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_is_one_strict_object_with_the_figures(
    predictions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    run(capsys, predictions, "--json", tmp_path / "scores.json")
    result = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"), parse_constant=refuse)
    figures = result["figures"]
    assert result["count"] == 2
    assert (figures["side_accuracy"]["value"], figures["size_accuracy"]["value"]) == (0.0, 1.0)
    assert figures["zone_accuracy"]["why"] == "in no report"
    # Pleural effusion right, cardiomegaly missed: over the two labels of the references.
    assert figures["label_f1_macro"]["value"] == pytest.approx(0.5)
    labels = {row["label"]: row for row in result["labels"]}
    assert (labels["Cardiomegaly"]["f1"]["value"], labels["Cardiomegaly"]["precision"]) == (0.0, None)
    assert labels["Fracture"]["f1"]["value"] is None
    assert labels["Pleural Effusion"]["support"] == 1
    for name in ("label_f1_micro", "rouge_l", "bleu_1", "bleu_4"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
        assert 0 < figures[name]["value"] < 1
    # The study that is furthest off comes first.
    assert [study["id"] for study in result["studies"]] == ["2", "1"]
    assert result["studies"][1]["figures"]["label_f1_micro"] == [1.0]


def test_the_tables_are_complete(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, figures, labels, _ = run(capsys, predictions).strip().split("\n\n")
    assert re.fullmatch(r".*jsonl: label F1, micro 0\.\d{3} \(0\.\d{3} – 1\.000\) beside 2 reports\.", verdict)
    assert re.search(r"\| label F1, macro +\| +0\.500 \|", figures)
    assert {"ROUGE-L", "BLEU-1", "BLEU-4"} <= set(re.findall(r"\| ([\w-]+)", figures))
    rows = labels.splitlines()
    assert len(rows) == 2 + 14
    effusion = next(row for row in rows if row.startswith("| Pleural Effusion"))
    assert [cell.strip() for cell in effusion.split("|")[2:5]] == ["1.000", "1.000 – 1.000", "1.000"]


def test_a_grammar_text_against_itself_is_perfect(tmp_path: Path) -> None:
    """Whatever the labeller reads wrongly in our own texts would show here or in its own tests."""
    texts = [write_findings(sample_study(seed), np.random.default_rng(seed)).text for seed in range(40)]
    rows = [{"id": str(index), "query": "", "reference": text, "prediction": text} for index, text in enumerate(texts)]
    scores = scored(write_rows(tmp_path / "p.jsonl", *rows))
    values = [figure.value for figure in scores.figures.values() if isinstance(figure, Estimate)]
    assert values == pytest.approx([1.0] * 8)
    assert isinstance(sides := scores.figures["side_accuracy"], Estimate)
    assert sides.count > 10


FLAWED: dict[str, dict[str, object]] = {
    "none": {"id": "4", "prediction": "Lungs are clear.", "reference": None},
    "blank": {"id": "5", "prediction": "Lungs are clear.", "reference": " \n"},
    "placeholder": {"id": "6", "prediction": "Lungs are clear.", "reference": "NaN"},
    "German": {"id": "7", "prediction": "Lungs are clear.", "reference": "Kein Pneumothorax. Herz normal groß."},
}
FAILED: dict[str, object] = {"id": "3", "image": "3.png", "error": "got noise"}


def test_what_has_no_reference_is_in_no_figure_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = to_json(scored(write_rows(tmp_path / "p.jsonl", *ROWS)))
    flawed = write_rows(tmp_path / "p.jsonl", *ROWS, FAILED, *FLAWED.values())
    scores = to_json(scored(flawed))
    left_out = {"that failed": 1, "whose reference is empty": 3, "whose reference is not in English": 1}
    assert scores.pop("left_out") == left_out
    assert whole.pop("left_out") == {}
    assert scores == whole
    main(["score", str(flawed)])
    said = "1 that failed, 3 whose reference is empty, 1 whose reference is not in English"
    assert all(said in text for text in capsys.readouterr())


@pytest.mark.parametrize("rows", [(), *FLAWED.values()])
def test_predictions_without_any_reference_are_refused(tmp_path: Path, rows: dict[str, object] | tuple[()]) -> None:
    with pytest.raises(LiteError, match="none with a prediction and a reference in English .* with --truth"):
        scored(write_rows(tmp_path / "p.jsonl", FAILED, *([rows] if rows else [])))


@pytest.mark.parametrize("named", ["id", "image"])
def test_the_truth_takes_the_place_of_references(tmp_path: Path, named: str) -> None:
    """Let the references be wrong or missing: the list of the films knows what is there."""
    listed = write_studies(tmp_path / "films", count=4, seed=1, dicom=False)
    entries = json.loads(listed.read_text(encoding="utf-8"))
    called = {"id": [entry["id"] for entry in entries], "image": [str(listed.parent / e["image"]) for e in entries]}
    rows: list[dict[str, object]] = [
        {named: name, "prediction": entry["conversations"][1]["value"], **({"reference": "Nothing."} if wrong else {})}
        for wrong, (name, entry) in enumerate(zip(called[named], entries, strict=True))
    ]
    figures = scored(write_rows(tmp_path / "p.jsonl", *rows), truth=listed).figures
    assert {figures[name].value for name in ("label_f1_macro", "rouge_l")} == {1.0}  # type: ignore[union-attr]


def test_a_truth_of_other_films_is_refused(tmp_path: Path, predictions: Path) -> None:
    listed = write_studies(tmp_path / "films", count=1, seed=1, dicom=False)
    with pytest.raises(LiteError, match=r"got study '1', which is not in .* · expected predictions for the films"):
        scored(predictions, truth=listed)


# -- Forms -----------------------------------------------------------------------------------------------------------


def test_every_form_that_run_writes_is_read_alike(tmp_path: Path) -> None:
    rows = [row | {"image": f"{row['id']}.png", "reason": "Cough."} for row in ROWS]
    journal = write_rows(tmp_path / "journal.jsonl", *rows)
    results = read_results(journal)
    write_reference(results, tmp_path / "reference.jsonl")
    write_rexrank(results, tmp_path / "rexrank.json")
    read = [read_predictions(tmp_path / name) for name in ("journal.jsonl", "reference.jsonl", "rexrank.json")]
    texts = [[(row.study.id, row.study.reference, row.prediction) for row in of] for of in read]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 2
    single = write_rows(tmp_path / "one.jsonl", rows[0])  # a file that is one JSON object, too
    assert [row.study.id for row in read_predictions(single)] == ["1"]


def test_of_whole_reports_the_findings_are_taken(tmp_path: Path) -> None:
    studies = {
        "a": {
            "image_path": ["a.png"],
            "report": "FINDINGS: Clear lungs.\nIMPRESSION: Pneumothorax.",
            "model_prediction": "Findings: Clear lungs. Impression: No acute disease.",
        },
        "b": {"image_path": ["b.png"], "section_findings": "Edema.", "model_prediction": "Edema: none."},
        "c": {"image_path": ["c.png"], "section_findings": None, "model_prediction": "Edema."},
    }
    path = tmp_path / "rexrank.json"
    path.write_text(json.dumps(studies, indent=1), encoding="utf-8")
    rows = read_predictions(path)
    texts = [(row.study.reference, row.prediction) for row in rows]
    assert texts == [("Clear lungs.", "Clear lungs."), ("Edema.", "Edema: none."), ("", "Edema.")]
    assert scored(path).left_out == {"whose reference is empty": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": {"image_path": ["a.png"], "section_findings": "Edema."}}', "study 'a': got no model_prediction"),
        ('{"a": {"section_findings": 3, "image_path": [], "model_prediction": "x"}}', "texts that are none"),
        ("[1, 2]", "got list · expected an object"),
        ("{", "not JSON"),
        ("", "got an empty file"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.json").write_text(content, encoding="utf-8")
    with pytest.raises(LiteError, match=message):
        scored(tmp_path / "p.json")


# -- Two systems -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Predictions of a good system and of one that speaks of another film now and then."""
    folder = tmp_path_factory.mktemp("two")
    texts = [write_findings(sample_study(seed), np.random.default_rng(seed)).text for seed in range(30)]
    worse = [texts[index - 1] if index % 3 == 1 else text for index, text in enumerate(texts)]
    paths = []
    for name, drafts in (("good", texts), ("worse", worse)):
        rows = [
            {"id": str(index), "reference": text, "prediction": draft}
            for index, (text, draft) in enumerate(zip(texts, drafts, strict=True))
        ]
        # Not in the other's order, and a study that the other has not.
        rows = rows[::-1] if name == "worse" else [*rows, {"id": "x", "reference": "Edema.", "prediction": "Clear."}]
        paths.append(write_rows(folder / f"{name}.jsonl", *rows))
    return paths[0], paths[1]


def compared(two: tuple[Path, Path]) -> Scores:
    return scored(*two)


def test_two_systems_are_compared_study_by_study(two: tuple[Path, Path]) -> None:
    scores = compared(two)
    assert scores.count == 30
    assert scores.left_out == {"in one of the files only": 1}
    micro = scores.comparisons["label_f1_micro"]
    assert isinstance(micro, Comparison)
    alone = scored(two[1]).figures["label_f1_micro"]
    assert isinstance(alone, Estimate)
    assert (micro.value.value, micro.other.value) == (1.0, alone.value)
    assert micro.difference.value == pytest.approx(1.0 - alone.value)
    assert (micro.verdict, micro.worse) == ("better", 0)
    assert micro.better + micro.same == 30
    assert 5 <= micro.better <= 10
    assert set(scores.label_comparisons) == set(LABELS)


def test_the_studies_that_differ_most_come_first_with_their_words_marked(two: tuple[Path, Path]) -> None:
    scores = compared(two)
    gaps = [study.figures["label_f1_micro"][0] - study.figures["label_f1_micro"][1] for study in scores.studies]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > gaps[-1] == 0
    text = format_scores(scores, num_studies=2)
    *_, first, second = text.split("\n\n")
    marked = first.splitlines()[-1].partition(": ")[2]
    assert re.sub(r"\[-.*?-\]|\{\+|\+\}", "", marked) == scores.studies[0].texts[0]
    assert re.sub(r"\{\+.*?\+\}|\[-|-\]", "", marked) == scores.studies[0].texts[1]
    assert second.startswith(f"{scores.studies[1].id}: label F1, micro ")
    assert text.startswith("good.jsonl beside worse.jsonl: better in ")
    assert re.search(r"; label F1, micro 1\.000, \+0\.\d{3} \(\+0\.\d{3} – \+0\.\d{3}\)\.$", text.partition("\n")[0])


def test_files_with_other_references_are_not_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_rows(tmp_path / "o.jsonl", {"id": "3", "reference": "Clear lungs.", "prediction": "Edema."})
    with pytest.raises(LiteError, match="got two references of study '3' .* with --truth"):
        scored(two[0], other)
    bare = write_rows(tmp_path / "o.jsonl", {"id": "3", "prediction": "Edema."})
    assert scored(two[0], bare).count == 1


# -- What is not here ------------------------------------------------------------------------------------------------


def test_what_is_not_installed_says_how_to_get_it_and_the_rest_goes_on(
    predictions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["rouge_score", "rouge_score.rouge_scorer", "sacrebleu", "sacrebleu.metrics.bleu", "radgraph"]:
        monkeypatch.setitem(sys.modules, name, None)
    out = run(capsys, predictions, "--metrics", "labels,rouge,bleu,radgraph,chexbert")
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("|")}
    assert "0.500" in lines["label F1, macro"]
    for name in ("ROUGE-L", "BLEU-1", "BLEU-4", "RadGraph F1"):
        assert " not installed |" in lines[name], name
    assert " no weights |" in lines["CheXbert F1"]
    assert 'pip install "llava-rad-lite[bench]"' in out
    assert 'pip install "llava-rad-lite[clinical]"' in out
    assert "--chexbert FILE" in out


def test_unknown_metrics_are_named(predictions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", str(predictions), "--metrics", "labels,meteor"])
    assert "got 'meteor', expected some of labels, rouge" in capsys.readouterr().err


# -- The page --------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_escaped_and_asks_for_nothing(two: tuple[Path, Path], tmp_path: Path) -> None:
    hostile = write_rows(
        tmp_path / "h.jsonl",
        {"id": "<b>1</b>", "reference": "Edema <script>x</script>.", "prediction": "Clear & well."},
    )
    page = render_scores(scored(hostile), command="python -m lite score h.jsonl", num_studies=5)
    assert "<script" not in page
    assert "&lt;b&gt;1&lt;/b&gt;" in page
    assert "default-src 'none'" in page
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", page) == []
    both = render_scores(compared(two), command="x", num_studies=3)
    assert both.count("<article") == 30  # all, of which three are open
    assert len(re.findall(r"<details [^>]* open>", both)) == 3
    assert "better in" in both
    assert NOTICE in both


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("schlüssel".encode(), "not ASCII")])
def test_a_judges_key_that_cannot_be_read_is_one_line(
    predictions: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    key = predictions.with_name("key")
    if content is not None:
        key.write_bytes(content)
    asked = ("--metrics", "chexprompt", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m")
    assert main(["score", str(predictions), *asked, "--judge-key-file", str(key)]) == 1
    told = capsys.readouterr().err
    assert f"{key}: got" in told
    assert said in told
    assert "Traceback" not in told
