"""Which artifact is to be run, by rule: on studies whose findings, and what is lost of them, are known."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import bench_rows
import pytest
from bench_rows import about, measured, no_record

from lite.bench.results import Bench, Draft, Row, StudyShown
from lite.bench.studies import Writing, filters, study_card, with_films
from lite.bench.table import format_tables
from lite.bench.verdict import RECORD, choose
from lite.eval.figures import Missing

shown, bench = bench_rows.shown, bench_rows.bench
TRUTH = "Small left pleural effusion. Moderate cardiomegaly."
MISSED = "Moderate cardiomegaly."
NOTHING = Missing(why="no reports")


def row(bench: Bench, name: str, texts: Sequence[str | None], **changes: Any) -> Row:
    drafts = tuple(
        Draft(id=f"{index}", text=text or "", error=None if text else "film.png: got nothing")
        for index, text in enumerate(texts)
    )
    return dataclasses.replace(measured(no_record(bench))[0], name=name, drafts=drafts, **changes)


def of(bench: Bench, *rows: Row, report: str | None = TRUTH, reference: str | None = None) -> Bench:
    studies = tuple(
        StudyShown(id=f"{index}", image="", reason=None, report=report, reference_text=reference)
        for index in range(len(rows[0].drafts))
    )
    return dataclasses.replace(no_record(bench), rows=rows, studies=studies)


def quick(bench: Bench, seconds: float = 1.0, weight: int = 10**9) -> dict[str, Any]:
    times = dataclasses.replace(measured(bench)[0].latency, total=about(seconds))
    return {"latency": times, "weight_bytes": weight, "disk_bytes": weight}


def test_the_fastest_is_run_unless_it_loses_more_than_chance_explains(bench: Bench) -> None:
    full = row(bench, "full", [TRUTH] * 24)
    near = row(bench, "near", [MISSED, *[TRUTH] * 23], **quick(bench))
    bad = row(bench, "bad", [MISSED] * 12 + [TRUTH] * 12, **quick(bench, 0.5))
    choice = choose(of(bench, full, near, bad))
    assert choice.name == "near"
    # 47 of 48 findings: F1 2 * 47 / 95, the yardstick's is 1.
    assert "3.1 × as fast; " in choice.verdict
    assert re.search(r", −1\.1 points \(−\d\.\d to \+0\.0\) from full\.$", choice.verdict)
    assert any(re.match(r"24 studies cannot tell that loss from none, nor rule out one of \d\.\d points", told)
               for told in choice.remarks)  # fmt: skip
    assert any(told.startswith("bad loses more than chance explains: −14.3 points") for told in choice.remarks)
    assert choose(of(bench, full, bad)).name == "full"
    assert choice.verdict in format_tables(of(bench, full, near, bad), [])


def test_of_those_as_fast_the_one_with_least_memory_is_run(bench: Bench) -> None:
    full = row(bench, "full", [TRUTH] * 24)
    small = dataclasses.replace(full.memory, decode_bytes=10**9)
    one = row(bench, "one", [TRUTH] * 24, **quick(bench))
    two = row(bench, "two", [TRUTH] * 24, **quick(bench, 1.02), memory=small)
    slow = row(bench, "slow", [TRUTH] * 24, **quick(bench, 1.5), memory=dataclasses.replace(small, decode_bytes=10**8))
    choice = choose(of(bench, full, one, two, slow))
    assert choice.name == "two"
    # 1 - 0.05 ** (1 / 24): so often a label may differ elsewhere.
    assert choice.remarks == ["In none of 24 studies a label differs; in others one may, in up to 12 % of them."]


def test_one_that_skips_studies_is_not_run_where_another_does_not(bench: Bench) -> None:
    full = row(bench, "full", [TRUTH] * 24)
    fast = row(bench, "fast", [None, *[TRUTH] * 23], **quick(bench))
    choice = choose(of(bench, full, fast))
    assert (choice.name, choice.remarks) == ("full", ["fast skipped 1 of 24 studies."])
    assert choice.verdict.startswith("Run full: 3.06 s a study, ")


def test_where_all_lose_from_the_record_the_least_is_run_and_it_is_said(bench: Bench) -> None:
    worse = row(bench, "worse", [MISSED] * 20 + [TRUTH] * 4)
    bad = row(bench, "bad", [MISSED] * 12 + [TRUTH] * 12)
    choice = choose(of(bench, worse, bad, reference=TRUTH))
    assert (choice.name, choice.yardstick) == ("bad", RECORD)
    assert (
        choice.remarks[0]
        == "Every artifact loses more than chance explains from the reference record; this one the least."
    )
    assert " from the reference record." in choice.verdict


@pytest.mark.parametrize("reference", [None, TRUTH])
def test_without_reports_the_yardstick_is_the_truth(bench: Bench, reference: str | None) -> None:
    full = row(bench, "full", [TRUTH] * 24, report_quality=NOTHING)
    bad = row(bench, "bad", [MISSED] * 12 + [TRUTH] * 12, **quick(bench), report_quality=NOTHING)
    choice = choose(of(bench, full, bad, report=None, reference=reference))
    assert choice.name == "full"
    assert any("bad loses more than chance explains: −14.3 points" in told for told in choice.remarks)
    alone = choose(of(bench, full, report=None))
    assert alone.verdict.endswith("; how good its texts are was not measured.")
    assert (alone.yardstick, alone.remarks) == ("", [])


def test_no_card_says_that_there_is_nothing_to_compare(bench: Bench) -> None:
    card = study_card("a", "", TRUTH, [Writing("x", TRUTH), Writing("y", TRUTH), Writing("z", MISSED)], marked=True)
    assert [text.names for text in card.texts] == [["x", "y"], ["z"]]
    assert [str(verdict) for verdict in card.texts[1].verdicts] == ["✓ Cardiomegaly", "✗ Pleural Effusion: missed"]
    assert card.tags == ["wrong", "differs", "Pleural Effusion"]
    # A report that cannot be read is not held against anybody: the yardstick is, and not against itself.
    other = study_card("b", "", "", [Writing("x", TRUTH), Writing("z", MISSED)], marked=True)
    assert [len(text.verdicts) for text in other.texts] == [0, 2]
    failed = study_card("c", "none.png", TRUTH, [Writing("x", "", "none.png: got no such file")], marked=False)
    cards = list(with_films([card, other, failed]))
    assert [of.film_error.split(":")[-1].split("·")[0].strip() for of in cards] == [
        "None is named.", "None is named.", "got no such file",
    ]  # fmt: skip
    assert filters(cards) == [
        ("", "all", 3), ("wrong", "a wrong finding", 2), ("differs", "texts that differ", 2), ("failed", "failed", 1),
        ("Pleural Effusion", "✗ Pleural Effusion", 2),
    ]  # fmt: skip
