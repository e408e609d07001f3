"""Errors that are planted, and what the rules count of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from judge_server import counts, say, serving

from benchmarks.phantom.__main__ import main as phantom
from lite.__main__ import main
from lite.cli.score import METRICS
from lite.errors import LiteError
from lite.eval.chexprompt import ERRORS
from lite.eval.judge_check import check_judge, read_planted
from lite.eval.rules import count_errors
from lite.studies.results import Result
from lite.studies.study import Study


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "pairs.jsonl"
    assert phantom(["plant", str(path), "--count", "8", "--seed", "3"]) == 0
    return path


def test_pairs_of_each_kind_are_planted(planted: Path) -> None:
    pairs = read_planted(planted)
    kinds = {pair.study.row["kind"]: pair.study.row["planted"] for pair in pairs}
    assert list(kinds.values()) == [*ERRORS, None]
    assert len(pairs) == 8 * len(kinds)
    texts = [(pair.study.row["kind"], pair.study.reference, pair.prediction or "") for pair in pairs]
    assert len(set(texts)) > 50
    for kind, reference, prediction in texts:
        assert reference != prediction
        words = set(reference.lower().split()), set(prediction.lower().split())
        if kind == "wrong side":
            assert {word.strip(".,") for word in words[0] ^ words[1]} <= {"left", "right"}
        if kind in ("omission", "omitted comparison"):
            assert len(prediction) < len(reference)
            assert prediction.split(".")[0][:10] in reference


def test_the_rules_count_what_was_planted(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--judge-check", str(planted)]) == 0
    shown = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.out.splitlines() if line[:1] == "|"]
    for index, row in enumerate(rows[2:]):
        assert row[1:] == ["8", *("8" if column == index else "0" for column in range(6)), "8", "0"], row
    assert "56 of 56 pairs as planted, 0 unscored: this judge is to be tried on reports of your own" in shown.out
    assert "rules" in shown.err
    assert "CheXprompt" not in shown.err + shown.out


def test_a_blind_judge_is_found_out(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that sees an omission everywhere, as a weak model may."""
    with serving() as server:
        server.default = say(counts(1))
        cache = planted.with_name("c.jsonl")
        asked = ["--judge-url", server.url, "--judge-model", "m", "--judge-cache", str(cache)]
        assert main(["score", "--judge-check", str(planted), *asked]) == 0
    out = capsys.readouterr().out
    assert "8 of 56 pairs as planted, 0 unscored: this judge is not to be believed (it takes 90% of each kind)." in out
    cells = {line.split("|")[1].strip(): line.split("|")[3:-1] for line in out.splitlines() if line.startswith("|")}
    assert [cell.strip() for cell in cells["omission"]] == ["0", "8", "0", "0", "0", "0", "8", "0"]
    assert [cell.strip() for cell in cells["harmless rewording"]] == ["0", "8", "0", "0", "0", "0", "0", "0"]


def test_what_is_unscored_is_not_taken_for_right() -> None:
    study = Study("", id="a", reference="a", row={"kind": "k", "planted": None})
    (row,) = check_judge([Result(study=study, prediction="b")], lambda *_: [None])
    assert (row.exactly, row.unscored, sum(row.seen)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("reference", "prediction", "significant", "insignificant"),
    [
        ("Small left pleural effusion.", "Small right pleural effusion.", {2: 1}, {}),
        ("Right upper zone consolidation.", "Right mid zone consolidation.", {}, {2: 1}),
        ("Mild cardiomegaly.", "Severe cardiomegaly.", {3: 1}, {}),
        ("Mild cardiomegaly.", "Moderate cardiomegaly.", {}, {3: 1}),
        ("Mild cardiomegaly.", "Cardiomegaly.", {}, {}),
        ("No pneumothorax.", "Small left pneumothorax.", {0: 1}, {}),
        ("Bibasilar atelectasis. Edema.", "The lungs are clear.", {1: 1}, {1: 1}),
        ("Possible pneumonia.", "Pneumonia.", {}, {}),
        ("Edema, worse than before.", "Unchanged edema.", {5: 1}, {4: 1}),
        ("The lungs are clear.", "No focal consolidation.", {}, {}),
    ],
)
def test_the_rules_of_the_rules(
    reference: str, prediction: str, significant: dict[int, int], insignificant: dict[int, int]
) -> None:
    expected = tuple(tuple(of.get(kind, 0) for kind in range(6)) for of in (significant, insignificant))
    assert count_errors(reference, prediction) == expected


def test_rules_are_a_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "rules" in METRICS
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "reference": "Mild edema.", "prediction": "Severe edema."}', encoding="utf-8")
    assert main(["score", str(path), "--metrics", "rules"]) == 0
    out = capsys.readouterr().out
    assert "| rules: significant incorrect severity          | 1.000 |" in out
    assert "The judge rules: labels, sides" in out
    with pytest.raises(
        LiteError, match="got results without planted errors .* make them: python -m benchmarks.phantom plant"
    ):
        read_planted(path)
    assert main(["score", str(path), "--metrics", "chexprompt"]) == 1
    assert "give --judge-url and --judge-model" in capsys.readouterr().err
