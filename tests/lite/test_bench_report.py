"""The report's file, its words and its plot, without a browser: see test_bench_page.py for what a person sees."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import bench_rows
import pytest
from bench_rows import MODELLED, Shown, about, estimate, measured, no_record

from lite.artifact.manifest import NOTICE
from lite.bench.plots import Point, draw_pareto, pareto_front
from lite.bench.report import render_report
from lite.bench.results import Bench, ReportQuality
from lite.bench.words import compare_words
from lite.errors import BackendUnavailable
from lite.eval.figures import Estimate, Missing
from lite.files import write_whole

shown, bench = bench_rows.shown, bench_rows.bench


def test_the_file_refers_to_nothing_outside_itself(shown: Shown) -> None:
    page = shown.path.read_text(encoding="utf-8")
    references = re.findall(r"""(?:href|src|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(references) > 20
    assert {reference.partition(":")[0] for reference in references if not reference.startswith("#")} == {"data"}
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {
        match for match in re.findall(r"url\(([^)]*)\)", page) if match.startswith("#")
    }
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_records_make_the_same_page(shown: Shown) -> None:
    assert render_report(shown.bench, modelled=[MODELLED]) == shown.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kept", [0, 3])
def test_one_artifact_is_enough(bench: Bench, kept: int) -> None:
    page = render_report(dataclasses.replace(bench, rows=(bench.rows[kept],)))
    name = bench.rows[kept].name
    assert f"<h1>What {name} takes, and how good it is</h1>" in page
    assert f'<p class="verdict">{name}: ' in page
    assert "<svg" not in page  # one point says nothing
    alone = render_report(dataclasses.replace(no_record(bench), rows=measured(no_record(bench))[:1]))
    assert "struck-through" not in alone
    assert "loss, points" not in alone
    assert alone.count("<article>") == len(bench.studies)
    assert "findings right" in alone


def test_without_a_record_nothing_is_said_of_one_but_how_to_get_it(bench: Bench) -> None:
    told = dataclasses.replace(no_record(bench), notes=("no reference: Pass --reference.", "5 studies are few."))
    page = render_report(told)
    assert page.count("<li>no reference: Pass --reference.</li>") == 0
    assert page.count("<li>5 studies are few.</li>") == 1
    assert re.findall(r'<li id="todo-\d+">Pass --reference.</li>', page)
    assert "Divergence from the reference record" not in page
    assert "Texts against the data" in page
    whole = render_report(bench)
    assert "Divergence from the reference record" in whole
    assert "struck-through" in whole


def test_the_notice_is_said_once(bench: Bench) -> None:
    row = dataclasses.replace(measured(bench)[0], notice=f"{NOTICE} And it knows phantoms only.")
    assert render_report(dataclasses.replace(bench, rows=(row,))).count(NOTICE) == 1


def test_artifacts_that_all_failed_are_a_report_too(bench: Bench) -> None:
    page = render_report(dataclasses.replace(bench, rows=(bench.rows[-1],), studies=()))
    assert "got no manifest.json" in page
    assert NOTICE in page
    assert "Nothing could be measured" in page
    assert "<svg" not in page


def test_figures_that_are_no_numbers_are_dashes(bench: Bench) -> None:
    nothing = Estimate(value=math.nan, low=math.nan, high=math.nan, count=0)
    row = measured(no_record(bench))[0]
    assert isinstance(row.report_quality, ReportQuality)
    quality = dataclasses.replace(row.report_quality, label_f1_micro=nothing)
    page = render_report(dataclasses.replace(bench, rows=(dataclasses.replace(row, report_quality=quality),)))
    assert "nan" not in re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL).lower()
    assert "how good its texts are was not measured" in page


def test_a_row_says_which_engine_ran_and_what_is_not_known_of_it(bench: Bench) -> None:
    row = measured(bench)[2]
    on_cpu = dataclasses.replace(row, name="onnx", engine="onnx", device="cpu", dtype="float32", cache_dtype="int8")
    page = render_report(dataclasses.replace(bench, rows=(row, on_cpu)))
    assert "torch on cuda:0, float16</small>" in page
    assert "onnx on cpu, float32, int8 cache</small>" in page
    assert "no plan" not in page
    unknown = Missing(why="not measured", todo="Install torch to measure the GPU.")
    on_gpu = dataclasses.replace(on_cpu, device="dml", traffic=unknown)
    page = render_report(dataclasses.replace(bench, rows=(on_gpu,)))
    assert page.count("not measured<sup>") == 2  # its GB/s, and what a token reads
    assert "Install torch to measure the GPU." in page
    assert "no plan<sup>" in page
    assert '"bar plan"' not in page


def test_names_that_are_markup_or_another_script_are_shown_as_they_are(bench: Bench, recwarn: Any) -> None:
    row = dataclasses.replace(measured(bench)[0], name="胸 $x_2$ <b>&\nnext", notice="Also <this>.")
    page = render_report(dataclasses.replace(bench, rows=(row,)))
    assert "胸 $x_2$ &lt;b&gt;&amp;\nnext: " in page
    assert "<b>&" not in page
    assert "Also &lt;this&gt;." in page


def test_half_a_surrogate_pair_is_no_reason_to_have_no_report(bench: Bench, tmp_path: Path) -> None:
    study = dataclasses.replace(bench.studies[0], reason="\ud83d")
    studies = (study, *bench.studies[1:])
    write_whole(tmp_path / "report.html", render_report(dataclasses.replace(bench, studies=studies)))
    assert "&#55357;" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(bench: Bench, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=rf'got no {package} package .*"llava-rad-lite\[bench\]"'):
        render_report(bench)


# -- Words and front --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "passages"),
    [
        ("", "", []),
        ("Clear.", "Clear.", [("same", "Clear.")]),
        ("", "Clear.", [("added", "Clear.")]),
        ("A 3.4 cm mass", "A 3.5 cm mass",
         [("same", "A "), ("removed", "3.4"), ("added", "3.5"), ("same", " cm mass")]),
        # Neighbours are one change, whatever stands between them is not.
        ("small left effusion", "large right effusion",
         [("removed", "small left"), ("added", "large right"), ("same", " effusion")]),
        ("Clear. Normal heart.", "Clear.", [("same", "Clear."), ("removed", " Normal heart.")]),
        ("a b", "a  b", [("same", "a"), ("removed", " "), ("added", "  "), ("same", "b")]),
    ],
)  # fmt: skip
def test_texts_are_compared_word_by_word(first: str, second: str, passages: list[tuple[str, str]]) -> None:
    assert [(passage.kind, passage.text) for passage in compare_words(first, second)] == passages


def test_passages_are_both_texts() -> None:
    rng = random.Random(3)
    words = ["effusion", "left", "right", ".", ",", "3.4", " ", "\n", "no", "T-tube", "<b>", "肺"]
    for _ in range(300):
        first, second = (" ".join(rng.choices(words, k=rng.randrange(12))) for _ in range(2))
        passages = compare_words(first, second)
        assert "".join(passage.text for passage in passages if passage.kind != "added") == first
        assert "".join(passage.text for passage in passages if passage.kind != "removed") == second
        assert all(passage.text for passage in passages)
        assert all(a.kind != b.kind for a, b in itertools.pairwise(passages))


def test_the_front_is_what_nothing_beats() -> None:
    rng = random.Random(4)
    for _ in range(50):
        points = [
            Point(total=about(rng.randrange(1, 6)), loss=estimate(rng.randrange(5)), peak_bytes=1) for index in range(6)
        ]
        figures = {(point.total.p50, point.loss.value) for point in points}
        expected = sorted(
            figure
            for figure in figures
            if not any(other != figure and other[0] <= figure[0] and other[1] <= figure[1] for other in figures)
        )
        assert [(point.total.p50, point.loss.value) for point in pareto_front(points)] == expected


@pytest.mark.parametrize(("slowest", "log"), [(1.9, False), (400.0, True)])
def test_times_far_apart_get_a_log_axis(slowest: float, log: bool) -> None:
    points = [
        Point(total=about(seconds), loss=estimate(kl), peak_bytes=1 << 30)
        for seconds, kl in ((0.5, 0.01), (slowest, 1e-6))
    ]
    ticks = re.findall(r">([\d.]+)</text>", draw_pareto(points, "kl"))
    assert ("0" not in ticks) == log
    assert ("100" in ticks) == log
