"""The HTML report, opened in headless Chromium: what a person sees, on a screen and on a phone."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_rows
import chromium
import pytest
from bench_rows import NO_RECORD, NOT_INSTALLED, SCRIPT, Shown, measured, no_record

from lite.artifact.manifest import NOTICE
from lite.bench.report import render_report
from lite.bench.results import Bench, RecordQuality
from lite.bench.scores import render_scores
from lite.eval.measures import text_sums
from lite.eval.scoring import read_pairs, score
from lite.memory.sizes import shown_bytes

OURS = {"id": "a", "reference": "Small left pleural effusion. No edema.", "prediction": "Small left pleural effusion."}
THEIRS = OURS | {
    "prediction": "Small right pleural effusion and a veryveryverylongwordthatnoscreenofaphonecouldshowinoneline."
}
pytestmark = pytest.mark.full
shown, bench, browser = bench_rows.shown, bench_rows.bench, chromium.browser


@pytest.fixture(scope="module")
def open_page(shown: Shown, browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the report in a window of some size; nothing but the file itself may be asked for, or go wrong."""
    wrong: list[str] = []

    def open_page(path: Path = shown.path, width: int = 1440) -> Any:
        page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
        page.on("request", lambda request: None if allowed(request.url, path) else wrong.append(request.url))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        return page

    yield open_page
    assert wrong == []


def allowed(url: str, path: Path) -> bool:
    return url == path.as_uri() or url.startswith("data:")


@pytest.fixture(scope="module")
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


@pytest.fixture(scope="module")
def phone(open_page: Callable[..., Any]) -> Any:
    return open_page(width=390)


def box(locator: Any) -> dict[str, float]:
    """Where something is drawn; it has a size."""
    found: dict[str, float] | None = locator.bounding_box()
    assert found is not None, "it is not shown"
    assert found["width"] > 0
    assert found["height"] > 0
    return found


def inside(a: dict[str, float], b: dict[str, float]) -> bool:
    across = b["x"] <= a["x"] and a["x"] + a["width"] <= b["x"] + b["width"]
    return across and b["y"] <= a["y"] and a["y"] + a["height"] <= b["y"] + b["height"]


def overlap(a: dict[str, float], b: dict[str, float]) -> bool:
    across = a["x"] < b["x"] + b["width"] and b["x"] < a["x"] + a["width"]
    return across and a["y"] < b["y"] + b["height"] and b["y"] < a["y"] + a["height"]


def test_the_notice_is_the_first_thing_seen(page: Any, phone: Any) -> None:
    for opened in (page, phone):
        notice = opened.locator(".notice")
        assert NOTICE in notice.inner_text()
        assert "Not for clinical use" in notice.inner_text()
        assert box(notice)["y"] + box(notice)["height"] < 450
    assert page.title() == "lite.bench: 6 artifacts, 5 studies"
    seen = page.inner_text("header")
    assert "16 cores of an unnamed processor" in seen
    assert "python -m lite.bench fp16 int8 int4 nf4" in seen
    assert "torch\xa02.13.0" in seen


def test_every_artifact_has_a_line_with_its_figures(page: Any, bench: Bench) -> None:
    lines = page.locator("#results tbody tr")
    assert lines.count() == len(bench.rows)
    headings = [text.split("\n")[0] for text in page.locator("#results thead tr:nth-child(2) th").all_inner_texts()]
    for index, row in enumerate(measured(bench)):
        assert lines.nth(index).locator("th").inner_text().startswith(row.name)
        cells = [text.split("\n") for text in lines.nth(index).locator("td").all_inner_texts()]
        shown = dict(zip(headings, cells, strict=True))
        assert shown["on disk"] == [shown_bytes(row.disk_bytes), shown_bytes(row.weight_bytes)]
        assert shown["measured"][0] == shown_bytes(row.memory.peak_bytes)
        error = 100 * (row.plan.peak_bytes / row.memory.peak_bytes - 1)
        assert shown["planned"] == [shown_bytes(row.plan.peak_bytes), f"+{error:.1f}\xa0%"]
        for heading, stage, scale in (
            ("TTFT", row.latency.ttft, 1e3),
            ("decode", row.latency.decode_token, 1e3),
            ("whole study", row.latency.total, 1),
        ):
            texts = [shown[heading][0], *re.findall(r"p9[09]\s([\d.,]+)", " ".join(shown[heading][1:]))]
            expected = [scale * seconds for seconds in (stage.p50, stage.p90, stage.p99)]
            assert [float(text.replace(",", "")) for text in texts] == pytest.approx(expected, rel=5e-3)
        assert float(shown["tokens/s"][0]) == pytest.approx(1 / row.latency.decode_token.p50, rel=5e-3)
    skipped = lines.nth(3).locator("th").inner_text()
    assert "1 of 5 studies skipped" in skipped
    last = lines.nth(len(bench.rows) - 1)
    assert "got no manifest.json" in last.inner_text()
    assert box(last.locator("td"))["width"] > 300


def test_quality_has_intervals_and_what_is_missing_says_why(page: Any) -> None:
    lines = page.locator("#results tbody tr")
    int4 = lines.nth(2).inner_text()
    assert "0.00610" in int4
    assert re.search(r"\[0\.00427,\s0\.00793\]", int4)
    assert "97.1" in int4
    other = lines.nth(4).locator("td.missing")
    assert other.count() == 4
    assert other.first.inner_text().startswith("other tokenizer")
    assert other.first.get_attribute("title") == NO_RECORD.todo
    footnotes = page.locator(".footnotes").inner_text()
    for todo in (NO_RECORD.todo, NOT_INSTALLED.todo, "Needs 19.3 GiB"):
        assert todo in footnotes
    other.first.locator("a").click()
    assert page.url.endswith("#todo-2")
    assert "not run" in lines.nth(0).inner_text()
    texts = page.locator("#texts tbody tr").nth(2).inner_text()
    assert "not installed" in texts
    assert "3.1e-4" in texts  # what the record's tail may hide
    assert "The reference's own texts" in page.inner_text("main")


def test_cells_do_not_run_into_each_other(page: Any) -> None:
    texts = """table => [...table.querySelectorAll("th, td")].map(cell => {
        const range = document.createRange();
        range.selectNodeContents(cell);
        const [inner, outer] = [range.getBoundingClientRect(), cell.getBoundingClientRect()];
        return [cell.innerText, inner.left - outer.left, outer.right - inner.right, outer.height];
    })"""
    for table in ("#results", "#texts", "#artifacts"):
        cells = page.locator(table).evaluate(texts)
        assert len(cells) > 50
        assert [text for text, left, right, height in cells if left < 0 or right < 0 or not height] == []
    headline = [box(cell) for cell in page.locator("#results tbody tr:first-child > *").all()]
    assert not any(overlap(a, b) for a, b in itertools.pairwise(headline))


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
    studies = page.locator("#studies article")
    nf4 = studies.nth(0).locator("dl > div").last
    assert nf4.locator("del").all_inner_texts() == ["small left"]
    assert nf4.locator("ins").all_inner_texts() == ["moderate right"]
    lines = [
        nf4.locator(tag).evaluate("element => getComputedStyle(element).textDecorationLine") for tag in ("del", "ins")
    ]
    assert lines == ["line-through", "underline"]
    assert "the same from fp16, int8, int4, other" in studies.nth(0).inner_text()
    assert studies.nth(1).locator("del").all_inner_texts() == ["Right lower", " No pleural effusion."]
    assert "error: films/none.png" in studies.nth(2).inner_text()


def test_studies_with_differences_come_first_and_the_others_are_folded(page: Any) -> None:
    names = [text.strip() for text in page.locator("#studies h3").all_text_contents()]
    assert names == ["study-1", "study-2", "study-3", "study-4", "study-0"]
    folded = page.locator("details")
    assert folded.count() == 1
    assert folded.locator("summary").inner_text() == "study-0: the same as the reference"
    assert not folded.locator("article").is_visible()
    folded.locator("summary").click()
    assert "Both lungs are clear." in folded.inner_text()
    assert "4 of 5 studies differ" in page.inner_text("#studies")


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
    assert "~" not in page.inner_text("#results")


def test_a_phone_scrolls_tables_and_not_the_page(phone: Any) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    table = phone.locator(".scroll").first
    assert table.evaluate("element => element.scrollWidth") > 800
    table.evaluate("element => element.scrollTo(9999, 0)")
    name, last = phone.locator("#results tbody th").first, phone.locator("#results tbody tr:first-child td").last
    assert 0 <= box(name)["x"] < box(last)["x"] < 390 - box(last)["width"]
    assert not overlap(box(name), box(last))
    assert box(phone.locator("svg.plot"))["width"] > 300


CONTRAST = """() => [...document.querySelectorAll(
    ".notice strong, .notice p, .quiet, dt, del, ins, td small, td.missing, a, .failed, figcaption, .parts li, .badge"
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
    assert "no reference" in page.inner_text("#results")
    # No text is the yardstick: nothing is marked, and texts are the same or not.
    assert page.locator("article del, article ins").count() == 0
    assert page.locator("details summary").all_inner_texts() == ["study-0: the same from all"]


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
    tables = opened.locator(".scroll")
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
