"""The HTML report, opened in headless Chromium: what a person sees, on a screen and on a phone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_rows
import pytest
import report_pages
from bench_rows import NO_RECORD, NOT_INSTALLED, SCRIPT, Shown, measured, no_record
from report_pages import box, inside, overlap

from lite.artifact.manifest import NOTICE
from lite.bench.report import render_report
from lite.bench.results import Bench, RecordQuality
from lite.bench.scores import render_scores
from lite.bench.verdict import choose
from lite.eval.measures import text_sums
from lite.eval.scoring import read_pairs, score
from lite.memory.sizes import shown_bytes

OURS = {"id": "a", "reference": "Small left pleural effusion. No edema.", "prediction": "Small left pleural effusion."}
THEIRS = OURS | {
    "prediction": "Small right pleural effusion and a veryveryverylongwordthatnoscreenofaphonecouldshowinoneline."
}
pytestmark = pytest.mark.full
shown, bench, browser = bench_rows.shown, bench_rows.bench, report_pages.browser
open_page = report_pages.open_page


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


@pytest.fixture(scope="module")
def phone(open_page: Callable[..., Any]) -> Any:
    return open_page(width=390)


def test_the_notice_is_on_the_first_screen(page: Any, phone: Any) -> None:
    for opened in (page, phone):
        notice = opened.locator(".notice")
        assert NOTICE in notice.inner_text()
        assert "Not for clinical use" in notice.inner_text()
        assert box(notice)["y"] + box(notice)["height"] < 600
    assert page.title() == "lite.bench: 6 artifacts, 5 studies"
    seen = page.inner_text("#everything .facts")
    assert "16 cores of an unnamed processor" in seen
    assert "python -m lite.bench fp16 int8 int4 nf4" in seen
    assert "torch\xa02.13.0" in seen


FIGURES = """table => {
    const found = {};
    for (const line of document.querySelectorAll(`[id^=${table}-] tbody tr`)) {
        const name = line.querySelector("th").innerText.split("\\n")[0].replace(/ to be run$/, "");
        for (const cell of line.querySelectorAll("td")) (found[name] ??= {})[cell.dataset.title] = cell.innerText;
    }
    return found;
}"""


def figures(page: Any, table: str) -> dict[str, dict[str, list[str]]]:
    """Return the lines of each artifact's cells, by their titles, from all groups of a table."""
    found = page.evaluate(FIGURES, table)
    return {name: {title: text.split("\n") for title, text in cells.items()} for name, cells in found.items()}


def test_every_artifact_has_its_figures(page: Any, bench: Bench) -> None:
    found = figures(page, "results")
    assert list(found) == [row.name for row in measured(bench)]
    for row in measured(bench):
        shown = found[row.name]
        assert shown["on disk, in memory"] == [shown_bytes(row.disk_bytes), shown_bytes(row.weight_bytes)]
        assert shown["measured"][0] == shown_bytes(row.memory.peak_bytes)
        error = 100 * (row.plan.peak_bytes / row.memory.peak_bytes - 1)
        assert shown["planned, its error"] == [shown_bytes(row.plan.peak_bytes), f"+{error:.1f}\xa0%"]
        for heading, stage, scale in (
            ("TTFT, ms", row.latency.ttft, 1e3),
            ("decode, ms/token", row.latency.decode_token, 1e3),
            ("whole study, s", row.latency.total, 1),
        ):
            texts = [shown[heading][0], *re.findall(r"p9[09]\s([\d.,]+)", " ".join(shown[heading][1:]))]
            expected = [scale * seconds for seconds in (stage.p50, stage.p90, stage.p99)]
            assert [float(text.replace(",", "")) for text in texts] == pytest.approx(expected, rel=5e-3)
        assert float(shown["tokens/s"][0]) == pytest.approx(1 / row.latency.decode_token.p50, rel=5e-3)
    lines = page.locator("#weighed tbody tr")
    assert lines.count() == len(bench.rows)
    assert "1 of 5 studies skipped" in lines.nth(3).locator("th").inner_text()
    assert "got no manifest.json" in lines.last.inner_text()
    assert box(lines.last.locator("td"))["width"] > 300


def test_the_cover_says_which_to_run_and_what_it_loses(page: Any, phone: Any, bench: Bench) -> None:
    for opened in (page, phone):
        verdict = opened.locator(".verdict")
        assert box(verdict)["y"] < 150
        assert verdict.inner_text() == choose(bench).verdict
        assert verdict.inner_text().startswith("Run int4: 30 % of fp16's size, 35 % of its memory, 2.5 × as fast; ")
    assert page.locator("tr:has(.chosen) th").inner_text().startswith("int4")
    loss = page.locator("#weighed tbody tr").nth(2).locator("td").last
    assert re.sub(r"\s+", " ", loss.inner_text()) == "+0.0 (+0.0 to +0.0)"


def test_quality_has_intervals_and_what_is_missing_says_why(page: Any) -> None:
    found = figures(page, "results")
    mean_kl = found["int4"]["mean KL, nats/token, at least"]
    assert mean_kl[0] == "0.00610"
    assert re.search(r"\[0\.00427,\s0\.00793\]", " ".join(mean_kl))
    assert found["int4"]["same top token, %"][0] == "97.1"
    other = page.locator("[id^=results-] tr", has_text="other").locator("td.missing")
    assert other.count() == 4
    assert other.first.inner_text().startswith("other tokenizer")
    assert other.first.get_attribute("title") == NO_RECORD.todo
    footnotes = page.locator(".footnotes").inner_text()
    for todo in (NO_RECORD.todo, NOT_INSTALLED.todo, "Needs 19.3 GiB"):
        assert todo in footnotes
    other.first.locator("a").click()
    assert re.search(r"#todo-\d$", page.url)
    assert NO_RECORD.todo in page.locator(":target").inner_text()
    assert found["fp16"]["4 at a time"][0].startswith("not run")
    texts = figures(page, "texts")["int4"]
    assert texts["RadGraph F1"][0].startswith("not installed")
    assert texts["KL missed, mean, at most"][0] == "3.1e-4"  # what the record's tail may hide
    assert "The reference's own texts" in page.inner_text("main")


# Whatever is cut, or runs out of its place: of each thing that is shown, how far it reaches beyond: a space may.
REACHES = """() => [...document.querySelectorAll("body *:not(svg *)")].filter(element => element.checkVisibility()).map(
    element => {
        const range = document.createRange();
        range.selectNodeContents(element);
        const [inner, outer] = [range.getBoundingClientRect(), element.getBoundingClientRect()];
        const inline = getComputedStyle(element).display === "inline";
        const scrolled = inline ? 0 : element.scrollWidth - element.clientWidth;
        const reach = Math.max(scrolled, inner.right - outer.right, outer.right - innerWidth);
        return [element.outerHTML.slice(0, 90), reach];
    }).filter(([_, reach]) => reach > 6)"""


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_is_cut_at_any_width(
    open_page: Callable[..., Any], bench: Bench, shown: Shown, tmp_path: Path, width: int
) -> None:
    bare, alone = tmp_path / "bare.html", tmp_path / "alone.html"
    bare.write_text(render_report(no_record(bench)), encoding="utf-8")
    alone.write_text(render_report(dataclasses.replace(no_record(bench), rows=bench.rows[:1])), encoding="utf-8")
    for path in (shown.path, bare, alone):
        page = open_page(path, width)
        page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(REACHES) == []
        assert len(page.locator("td").all()) > 50
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, phone: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for opened in (page, phone):
        opened.emulate_media(color_scheme=scheme)
        found = axe.run(opened).response["violations"]
        assert [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found] == []


def apart(number: dict[str, float], bubble: dict[str, float]) -> bool:
    """Whether a number stands beside a bubble, which fills its box only to the circle."""
    across, down = (
        number[start] + number[size] / 2 - bubble[start] - bubble[size] / 2
        for start, size in (("x", "width"), ("y", "height"))
    )
    return math.hypot(across, down) > (bubble["width"] + number["width"]) / 2


def test_bubbles_and_their_numbers_lie_within_the_plot(page: Any, bench: Bench) -> None:
    plotted = [row for row in measured(bench) if isinstance(row.record_quality, RecordQuality)]
    plot = box(page.locator("svg.plot"))
    bubbles = [box(page.locator(f"#pareto-bubble-{index}")) for index in range(len(plotted))]
    numbers = [box(page.locator(f"#pareto-number-{index}")) for index in range(len(plotted))]
    names = [f"{row.name} · {shown_bytes(row.memory.peak_bytes)}" for row in plotted]
    assert page.locator(".numbers li").all_inner_texts() == names
    assert page.locator("[id^=pareto-bubble]").count() == len(plotted) == 4
    for index, row in enumerate(plotted):
        assert page.locator(f"#pareto-number-{index}").text_content().strip() == f"{index + 1}"
        assert inside(bubbles[index], plot)
        assert inside(numbers[index], plot)
        for other in range(len(plotted)):
            assert apart(numbers[index], bubbles[other])
            assert other == index or not overlap(numbers[index], numbers[other])
        # Area is memory.
        share = (bubbles[index]["width"] / bubbles[0]["width"]) ** 2
        assert share == pytest.approx(row.memory.peak_bytes / plotted[0].memory.peak_bytes, rel=0.1)
    # Left is faster, down is nearer to the reference, and fp16, which loses nothing, is lowest.
    by_time = sorted(range(4), key=lambda index: plotted[index].latency.total.p50)
    assert by_time == sorted(range(4), key=lambda index: bubbles[index]["x"] + bubbles[index]["width"] / 2)
    heights = [bubble["y"] + bubble["height"] / 2 for bubble in bubbles]
    assert heights == sorted(heights, reverse=True)
    assert "Not in the plot: other (other tokenizer)" in page.inner_text("figcaption")


def test_bars_are_as_long_as_what_they_show(page: Any, bench: Bench) -> None:
    widths = """group => [...group.querySelectorAll(".bar")].map(bar => [...bar.querySelectorAll("span")].map(
        segment => [segment.className, segment.getBoundingClientRect().width]))"""
    per_second, per_byte = [], []
    for group, row in zip(page.locator("#stages .bars").all(), measured(bench), strict=True):
        ((*stages, decode),) = group.evaluate(widths)
        latency = row.latency
        for (name, width), stage in zip(stages, ("image", "vision", "prefill"), strict=True):
            assert name == stage
            per_second.append(width / getattr(latency, stage).p50)
        assert decode[0] == "decode"
        per_second.append(sum(width for _, width in [*stages, decode]) / latency.total.p50)
        assert f"{1e3 * latency.prefill.p50:.0f} ms ({1e3 * latency.prefill.p20:.0f} to" in group.inner_text()
    for group, row in zip(page.locator("#memory .bars").all(), measured(bench), strict=True):
        used, plan = group.evaluate(widths)
        assert [name for name, _ in used] == ["load", "vision", "prefill", "decode"]
        reached = 0.0
        for name, width in used:
            reached += width
            per_byte.append(reached / getattr(row.memory, f"{name}_bytes"))
        per_byte.append(sum(width for _, width in plan) / row.plan.peak_bytes)
    for scale in (per_second, per_byte):
        assert min(scale) > 0
        assert max(scale) == pytest.approx(min(scale), rel=0.02)


def test_changed_words_are_marked_and_not_by_colour_alone(page: Any) -> None:
    failed, one, two = (page.locator("#studies .card").nth(index) for index in range(3))
    assert "error: films/none.png" in failed.inner_text()
    nf4 = one.locator("dl > div").last
    assert nf4.locator("del").all_inner_texts() == ["small left"]
    assert nf4.locator("ins").all_inner_texts() == ["moderate right"]
    lines = [
        nf4.locator(tag).evaluate("element => getComputedStyle(element).textDecorationLine") for tag in ("del", "ins")
    ]
    assert lines == ["line-through", "underline"]
    assert "the reference record, fp16, int8, int4, other" in one.inner_text()
    assert two.locator("del").all_inner_texts() == ["Right lower", " No pleural effusion."]


def test_every_study_shows_film_texts_and_what_is_right_of_them_the_worst_first(page: Any) -> None:
    cards = page.locator("#studies .card")
    assert cards.locator("h3").all_text_contents() == ["study-3", "study-1", "study-2", "study-4", "study-0"]
    assert page.locator("#studies .card[open]").count() == 5
    said = [re.sub(r"\s+", " ", text) for text in cards.locator("summary").all_inner_texts()]
    assert said[1] == "study-1 ✗ 1 of 2 findings wrong texts differ"
    marks = cards.nth(1).locator("dl > div").last.locator(".marks li")
    assert marks.all_inner_texts() == [
        "✓ Cardiomegaly (mild)", "✗ Pleural Effusion (left, small): right, should be left",
    ]  # fmt: skip
    assert cards.nth(1).locator(".marks .wrong").count() == 1
    assert cards.nth(1).locator("small", has_text=".dcm").count() == 1
    # The last has no report: what its texts are held against is the record's, which all of them wrote.
    assert said[-1] == "study-0 the same words from all"


def test_studies_can_be_chosen_without_a_script(page: Any) -> None:
    cards = page.locator("#studies .card:visible h3")
    for chosen, shown in (
        ("a wrong finding (2)", ["study-1", "study-2"]),
        ("failed (1)", ["study-3"]),
        ("✗ Consolidation (1)", ["study-2"]),
        ("all (5)", ["study-3", "study-1", "study-2", "study-4", "study-0"]),
    ):
        page.get_by_label(chosen).check()
        assert cards.all_text_contents() == shown


def test_films_are_pictures(page: Any, shown: Shown) -> None:
    images = page.locator("img").all()
    sizes = [image.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]") for image in images]
    assert len(sizes) == 4
    assert [True, 205, 256] in sizes
    assert all(complete and 0 < width <= 256 and 0 < height <= 256 for complete, width, height in sizes)
    assert images[0].get_attribute("alt") == "The film of study study-1"
    no_film = page.locator(".no-film").inner_text()
    assert str(shown.films[3]) in no_film
    assert "no such file" in no_film


def test_markup_in_texts_is_text(page: Any) -> None:
    assert page.locator("script").count() == 0
    assert page.locator("#studies").inner_text().count(SCRIPT) >= 3


def test_what_is_modelled_looks_modelled(page: Any) -> None:
    section = page.locator("#modelled")
    assert "modelled, not measured" in section.inner_text().lower()
    assert "~19.4 ms" in section.inner_text()
    style = section.evaluate("s => [getComputedStyle(s).borderTopStyle, getComputedStyle(s).fontStyle]")
    assert style == ["dashed", "italic"]
    assert "~" not in page.inner_text("#everything")


def test_on_a_phone_each_line_of_a_table_is_a_card_of_titled_figures(phone: Any, page: Any) -> None:
    cells = phone.locator("#results-2 tbody tr").first.locator("td")
    places = [box(cell) for cell in cells.all()]
    assert not any(overlap(a, b) for a, b in itertools.combinations(places, 2))
    assert places[0]["y"] < places[-1]["y"]
    title = "cell => getComputedStyle(cell, '::before').content"
    assert cells.first.evaluate(title) == '"load, s"'
    assert box(phone.locator("svg.plot"))["width"] > 300
    wide = page.locator("#results-2 tbody tr").first.locator("td")
    assert wide.first.evaluate(title) == "none"
    assert len({box(cell)["y"] for cell in wide.all()}) == 1


CONTRAST = """() => [...document.querySelectorAll(
    ".notice strong, .notice p, .quiet, dt, del, ins, td small, td.missing, a, .failed, figcaption, .parts li, .badge"
    + ", .marks li, summary span, .chosen"
)].filter(element => element.checkVisibility()).map(element => {
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    return [element.outerHTML.slice(0, 80), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_both_schemes(page: Any, scheme: str) -> None:
    def luminance(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    page.emulate_media(color_scheme=scheme)
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == (scheme == "dark")
    for element, colour, behind in found:
        dark, light = sorted((luminance(colour), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (element, colour, behind)


def test_those_who_listen_find_their_way(page: Any) -> None:
    assert page.locator("html").get_attribute("lang") == "en-GB"
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("svg[role=img]").get_attribute("aria-label").startswith("Latency against quality")
    for region in page.locator("[role=region]").all():
        assert page.locator(f"#{region.get_attribute('aria-labelledby')}").count() == 1


def test_without_a_record_quality_is_that_of_the_reports(bench: Bench, tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "report.html"
    path.write_text(render_report(no_record(bench)), encoding="utf-8")
    page = open_page(path)
    assert "1 − label F1" in page.inner_text("figcaption")
    assert page.locator("[id^=pareto-bubble]").count() == 5
    assert figures(page, "results")["int4"]["mean KL, nats/token, at least"][0].startswith("no reference")
    # The largest artifact's texts are the yardstick.
    assert " from fp16." in page.inner_text(".verdict")
    assert page.locator("#weighed tbody tr").first.locator("td").last.inner_text() == "the yardstick"
    assert page.locator("article del").all_inner_texts() == [
        "small left",
        "Right lower",
        " No pleural effusion.",
        "3.4",
    ]
    assert page.locator("details dt", has_text="fp16").first.inner_text() == "fp16, int8, other, int4"


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_of_scores_shows_all_without_scrolling_to_the_right(
    open_page: Callable[..., Any], tmp_path: Path, width: int
) -> None:
    files = [tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"]
    for file, row in zip(files, (OURS, THEIRS), strict=True):
        file.write_text(json.dumps(row), encoding="utf-8")
    page = tmp_path / "scores.html"
    page.write_text(render_scores(score(read_pairs(files), text_sums), command="x", num_studies=5), encoding="utf-8")
    opened = open_page(page, width)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    tables = opened.locator(".table")
    assert tables.count() == 2
    assert all(table.evaluate("table => table.scrollWidth <= table.clientWidth") for table in tables.all())
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        marked = [opened.locator(f"article {name}").first for name in ("ins", "del")]
        assert [text.inner_text() for text in marked] == ["left", "right"]
        assert all(inside(box(text), {"x": 0, "y": 0, "width": width, "height": 1e6}) for text in marked)
    row = opened.locator("tr", has_text="same side").inner_text()
    assert re.sub(r"\s+", " ", row).startswith("same side, of findings that both have")
    assert "+1.000" in row
