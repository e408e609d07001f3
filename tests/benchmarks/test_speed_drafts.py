"""What drafting is worth: how passes are counted, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed.drafts import Passes, main, tokens_per_pass
from lite.artifact.open import Artifact
from lite.session.ngrams import Ngrams, join

TEXT = [5, 6, 7, 8, 9]


def test_passes_are_counted_as_an_engine_would_take_them() -> None:
    """The prompt gives the first token, and what ends the text is a token, too."""
    for table, longest, passes in (
        (None, 15, Passes(passes=5, tokens=5)),
        (Ngrams(join([TEXT], 2)), 15, Passes(passes=1, tokens=5, drafted=4, accepted=4)),
        (Ngrams(join([TEXT], 2)), 3, Passes(passes=2, tokens=5, drafted=3, accepted=3)),
        (Ngrams(join([[5, 6, 40, 8, 9]], 2)), 3, Passes(passes=3, tokens=5, drafted=4, accepted=2)),
    ):
        found = Passes()
        found.write(TEXT, 2, table, longest)
        assert found == passes


def test_no_report_is_in_the_table_that_it_is_written_by() -> None:
    report = tokens_per_pass([[number] * 2 + [50 + number] * 3 for number in range(5, 15)], 2)
    assert {figures["accepted"] for size in report.figures.values() for figures in size.values()} == {0}


def test_the_command(tiny_onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports, figures = tmp_path / "reports.txt", tmp_path / "figures.json"
    reports.write_text("The lungs are clear.\nThe heart is large.\nThe lungs are not clear.\n", encoding="utf-8")
    arguments = [str(tiny_onnx_artifact.path), "--reports", str(reports), "--rounds", "1", "--json", str(figures)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "3 reports of" in printed
    sections = json.loads(figures.read_text(encoding="utf-8"))["sections"]
    assert set(sections) == {"passes", "gpu", "costs", "wall"}
    assert [row["tokens"] for row in sections["costs"]["rows"]] == [str(count) for count in range(1, 9)]
    assert sections["wall"]["tokens"] > 0
    reports.write_text("One.\n", encoding="utf-8")
    assert main(arguments) == 1
