"""The HTML report, opened in headless Chromium: what a person sees, on a screen and on a phone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.phantom.write import write_studies
from lite.artifact.manifest import NOTICE
from lite.bench.plots import Point, draw_pareto, pareto_front
from lite.bench.report import render_report, write_report
from lite.bench.results import (
    Bench,
    Draft,
    FailedRow,
    Latency,
    MemoryUse,
    ModelledTable,
    NotRun,
    Provenance,
    RecordQuality,
    ReportQuality,
    Row,
    StudyShown,
    Throughput,
    Traffic,
)
from lite.bench.words import compare_words
from lite.errors import BackendUnavailable, LiteError
from lite.eval.divergence import DivergenceSummary
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.memory.plan import MemoryPlan
from lite.memory.sizes import shown_bytes
from lite.studies.readers import read_studies

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCRIPT = "<script>alert(1)</script>"
NOT_INSTALLED = Missing(why="not installed", todo="pip install radgraph, then run this again.")
NO_RECORD = Missing(why="other tokenizer", todo="Record a reference with this artifact's tokenizer.")
MODELLED = ModelledTable(
    caption="int4 at its best",
    header=("modelled on", "prefill", "token", "tokens/s", "memory", "fits"),
    rows=(
        ("RTX 3060 12GB", "~1.62 s", "~19.4 ms", "~51.5 tok/s", "~5.93 GiB", "yes"),
        ("V100 16GB", "~0.37 s", "~7.76 ms", "~129 tok/s", "~5.93 GiB", "yes"),
    ),
    note="Each stage at 60 % of the card's bandwidth or 50 % of its peak.",
    figures=[],
)


# -- Records, by hand: a 7B model on a 24 GB card ---------------------------------------------------------------------


def about(seconds: float, count: int = 24) -> Quantiles:
    shares = {"p20": 0.97, "p50": 1.0, "p80": 1.06, "p90": 1.09, "p99": 1.31}
    return Quantiles(**{name: share * seconds for name, share in shares.items()}, count=count)


def estimate(value: float, spread: float = 0.1, count: int = 24) -> Estimate:
    return Estimate(value=value, low=max(0.0, value * (1 - spread)), high=value * (1 + spread), count=count)


def share(value: float, spread: float) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - spread), high=min(1.0, value + spread), count=24)


def record_quality(kl: float, *, same_top: float, ratio: float, same_text: float) -> RecordQuality:
    divergence = DivergenceSummary(
        num_studies=24,
        num_tokens=2311,
        mean_kl=estimate(kl, 0.3, 2311),
        median_kl=estimate(kl / 40, 0.5, 2311),
        p99_kl=estimate(kl * 25, 0.4, 2311),
        same_top=Estimate(value=same_top, low=same_top - 0.4 * (1 - same_top), high=1, count=2311),
        perplexity_ratio=estimate(ratio, 0.002, 2311),
        without_divergence=share(same_text, 0.2),
        first_divergent_token=Estimate(value=math.nan, low=math.nan, high=math.nan, count=0)
        if same_text == 1
        else Estimate(value=31, low=12, high=57, count=9),
    )
    return RecordQuality(
        divergence=divergence,
        kl_gap_limit=kl / 20,
        same_text=share(same_text, 0.2),
        rouge_l=share(0.5 + same_text / 2, 0.03),
        bleu_1=share(0.5 + same_text / 2, 0.03),
        bleu_4=share(0.4 + same_text / 2, 0.05),
        label_f1_micro=share(0.9 + same_text / 10, 0.03),
        label_f1_macro=share(0.88 + same_text / 10, 0.04),
    )


def report_quality(f1: float) -> ReportQuality:
    return ReportQuality(
        label_f1_micro=estimate(f1, 0.06),
        label_f1_macro=estimate(f1 - 0.18, 0.12),
        rouge_l=estimate(0.306, 0.08),
        bleu_1=estimate(0.381, 0.09),
        bleu_4=estimate(0.154, 0.13),
        radgraph_f1=NOT_INSTALLED,
        chexbert=NOT_INSTALLED,
    )


def row(
    name: str,
    decoder_format: str,
    *,
    weight_gb: float,
    total_s: float,
    quality: RecordQuality | Missing,
    f1: float,
    drafts: tuple[Draft, ...],
) -> Row:
    weights = int(weight_gb * 1e9)
    token_s, prefill_s = weight_gb / 560, 0.35 + 0.05 * (weight_gb < 10)
    plan = MemoryPlan(
        batch_size=1,
        max_seq_len=1632,
        libraries_bytes=0,
        decoder_bytes=weights,
        vision_bytes=180_000_000,
        cache_bytes=856_000_000,
        load_work_bytes=0,
        vision_work_bytes=210_000_000,
        prefill_work_bytes=290_000_000,
    )
    four = Throughput(
        batch_size=4,
        num_studies=24,
        studies_per_min=Quantiles(p20=138 / total_s, p50=141 / total_s, p80=143 / total_s, p90=144, p99=144, count=5),
        tokens_per_s=226 / total_s,
        plan=dataclasses.replace(plan, batch_size=4, cache_bytes=4 * plan.cache_bytes),
        peak_bytes=weights + 3_900_000_000,
    )
    return Row(
        name=name,
        path=f"build/llava-rad/{name}",
        artifact_id=f"{name}-3f9a0c52d1b87e64",
        model="llava-rad",
        decoder_format=decoder_format,
        vision_format="fp16",
        engine="torch",
        device="cuda:0",
        dtype="float16",
        cache_dtype="float16",
        provider="CUDAExecutionProvider",
        backend="triton, CUDA graphs",
        fallbacks=(),
        disk_bytes=weights + 190_000_000,
        weight_bytes=weights + 180_000_000,
        verify_s=weight_gb * 0.8,
        load_s=2.1 + weight_gb * 0.4,
        first_total_s=total_s * 1.9,
        latency=Latency(
            image=about(0.041),
            vision=about(0.013),
            prefill=about(prefill_s),
            decode_token=about(token_s, 2311),
            ttft=about(0.054 + prefill_s),
            total=about(total_s),
        ),
        num_runs=24,
        num_warmup=3,
        num_prompt_tokens=1405,
        tokens_per_study=96.3,
        batches=(
            dataclasses.replace(four, batch_size=1, studies_per_min=about(58 / total_s, 5), peak_bytes=plan.peak_bytes),
            four if weight_gb < 10 else NotRun(batch_size=4, why="Needs 19.3 GiB, the limit is 16 GiB.", plan=plan),
        ),
        plan=plan,
        memory=MemoryUse(
            kind="VRAM",
            before_bytes=0,
            load_bytes=weights + 182_000_000,
            image_bytes=weights + 182_000_000,
            vision_bytes=weights + 371_000_000,
            prefill_bytes=weights + 1_240_000_000,
            decode_bytes=weights + 1_262_000_000,
        ),
        traffic=Traffic(
            weight_bytes=weights - 260_000_000, cache_bytes=390_000_000, bandwidth=812e9, achieved=weights / token_s
        ),
        energy_j=about(total_s * 210),
        record_quality=quality,
        report_quality=report_quality(f1),
        drafts=drafts,
        notice=NOTICE,
    )


TEXTS = (
    "Both lungs are clear.",
    "The heart is mildly enlarged. There is a small left pleural effusion. No pneumothorax.",
    "Right lower zone consolidation. Heart size and mediastinal contours are normal. No pleural effusion.",
    "The lungs are clear. Heart size is normal. No pleural effusion or pneumothorax is seen.",
    f"Endotracheal tube in place. {SCRIPT} Bibasilar atelectasis, 3.4 cm apart.",
)
CHANGES: dict[str, dict[int, tuple[str, str]]] = {
    "fp16": {},
    "int8": {},
    "other": {},
    "int4": {2: ("Right lower zone", "Left mid zone")},
    "nf4": {1: ("small left", "moderate right"), 2: (" No pleural effusion.", ""), 4: ("3.4 cm", "3.5 cm")},
}


def drafts_of(name: str) -> tuple[Draft, ...]:
    written = [text.replace(*CHANGES[name].get(index, ("", ""))) for index, text in enumerate(TEXTS)]
    drafts = [Draft(id=f"study-{index}", text=text) for index, text in enumerate(written)]
    if name == "nf4":
        drafts[3] = Draft(id="study-3", text="", error="films/none.png: got no such file · expected an image file")
    return tuple(drafts)


def the_bench(films: list[Path]) -> Bench:
    qualities = {
        "fp16": record_quality(0, same_top=1, ratio=1, same_text=1),
        "int8": record_quality(4.1e-5, same_top=0.9978, ratio=1.0003, same_text=1),
        "int4": record_quality(0.0061, same_top=0.971, ratio=1.0112, same_text=0.8),
        "nf4": record_quality(0.0187, same_top=0.957, ratio=1.0241, same_text=0.2),
        "other": NO_RECORD,
    }
    figures = (
        ("fp16", "fp16", 13.48, 3.06, 0.573),
        ("int8", "gptq-int8 (groups of 128)", 7.15, 1.94, 0.573),
        ("int4", "gptq-int4 (groups of 128)", 3.89, 1.21, 0.569),
        ("nf4", "bnb-nf4", 3.87, 1.38, 0.561),
        ("other", "gptq-int4 (groups of 32)", 4.2, 1.3, 0.55),
    )
    rows = (
        *(
            row(name, stored, weight_gb=gb, total_s=total_s, quality=qualities[name], f1=f1, drafts=drafts_of(name))
            for name, stored, gb, total_s, f1 in figures
        ),
        FailedRow(
            name="broken", path="build/broken", error="build/broken: got no manifest.json · expected an artifact"
        ),
    )
    studies = tuple(
        StudyShown(
            id=f"study-{index}",
            image=str(film),
            reason=None if index == 3 else f"Cough & {SCRIPT}" if index == 1 else "Fever for three days.",
            report=None if index == 0 else text.replace("small", "tiny"),
            reference_text=text,
        )
        for index, (film, text) in enumerate(zip(films, TEXTS, strict=True))
    )
    return Bench(
        provenance=Provenance(
            command="python -m lite.bench fp16 int8 int4 nf4 --data studies.json --reference v100 --html report.html",
            started="2026-11-24T02:17:09+00:00",
            machine="16 cores of an unnamed processor, 64 GB, Linux, one GPU of 24 GB",
            versions={"Python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.32.0", "llava-rad-lite": "0.1.0"},
            data="studies/studies.json",
            data_sha256="5d41402abc4b2a76b9719d911017c592ae24f1be9971b1db8c8e1f0b42d3a0c7",
            num_studies=5,
            reference="v100 (fp16-3f9a0c52d1b87e64, float16 on a V100 16GB, 2026-11-20)",
            seed=0,
            resamples=500,
        ),
        rows=rows,
        reference_report_quality=report_quality(0.573),
        studies=studies,
        notes=("RadGraph F1 and CheXbert F1 are missing: radgraph is not installed.", "5 studies are few."),
    )


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Phantom films, the first one large, the second DICOM, and one that is not there."""
    listed = write_studies(tmp_path_factory.mktemp("films") / "studies", count=4, seed=90_004, dicom=True)
    films = [study.image for study in read_studies(listed)]
    Image.open(films[0]).resize((600, 750)).save(films[0])
    films[1] = films[1].with_suffix(".dcm")
    assert films[1].is_file()
    films.insert(3, films[0].with_name("none.png"))
    return films


@pytest.fixture(scope="module")
def bench(films: list[Path]) -> Bench:
    return the_bench(films)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> Path:
    path = tmp_path_factory.mktemp("report") / "new folder" / "report.html"
    write_report(bench, path, modelled=[MODELLED])
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path


# -- What a person sees -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_page(report: Path) -> Iterator[Callable[..., Any]]:
    """Open the report in a window of some size; nothing but the file itself may be asked for, or go wrong."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"got no browser · expected one of {', '.join(BROWSERS)} on the PATH · apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        wrong: list[str] = []

        def open_page(path: Path = report, width: int = 1440) -> Any:
            page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
            page.on("request", lambda request: None if allowed(request.url, path) else wrong.append(request.url))
            page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
            page.on("console", lambda message: wrong.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            page.goto(path.as_uri())
            return page

        yield open_page
        browser.close()
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


def measured(bench: Bench) -> list[Row]:
    return [row for row in bench.rows if isinstance(row, Row)]


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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
            assert not overlap(numbers[index], bubbles[other])
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
def test_films_are_pictures(page: Any, films: list[Path]) -> None:
    images = page.locator("img").all()
    sizes = [image.evaluate("image => [image.complete, image.naturalWidth, image.naturalHeight]") for image in images]
    assert len(sizes) == 4
    assert [True, 205, 256] in sizes
    assert all(complete and 0 < width <= 256 and 0 < height <= 256 for complete, width, height in sizes)
    assert images[0].get_attribute("alt") == "The film of study study-1"
    no_film = page.locator(".no-film").inner_text()
    assert str(films[3]) in no_film
    assert "no such file" in no_film


@pytest.mark.full
def test_markup_in_texts_is_text(page: Any) -> None:
    assert page.locator("script").count() == 0
    assert page.locator("#studies").inner_text().count(SCRIPT) >= 3


@pytest.mark.full
def test_what_is_modelled_looks_modelled(page: Any) -> None:
    section = page.locator("#modelled")
    assert "modelled, not measured" in section.inner_text().lower()
    assert "~19.4 ms" in section.inner_text()
    style = section.evaluate("s => [getComputedStyle(s).borderTopStyle, getComputedStyle(s).fontStyle]")
    assert style == ["dashed", "italic"]
    assert "~" not in page.inner_text("#results")


@pytest.mark.full
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
@pytest.mark.full
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


@pytest.mark.full
def test_those_who_listen_find_their_way(page: Any) -> None:
    assert page.locator("html").get_attribute("lang") == "en-GB"
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("svg[role=img]").get_attribute("aria-label").startswith("Latency against quality")
    for region in page.locator("[role=region]").all():
        assert page.locator(f"#{region.get_attribute('aria-labelledby')}").count() == 1


# -- The file ---------------------------------------------------------------------------------------------------------


def test_the_file_refers_to_nothing_outside_itself(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    references = re.findall(r"""(?:href|src|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(references) > 20
    assert {reference.partition(":")[0] for reference in references if not reference.startswith("#")} == {"data"}
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {
        match for match in re.findall(r"url\(([^)]*)\)", page) if match.startswith("#")
    }
    assert "@import" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_records_make_the_same_page(bench: Bench, report: Path) -> None:
    assert render_report(bench, modelled=[MODELLED]) == report.read_text(encoding="utf-8")


def no_record(bench: Bench) -> Bench:
    missing = Missing(why="no reference", todo="Pass --reference.")
    rows = tuple(dataclasses.replace(row, record_quality=missing) for row in measured(bench))
    studies = tuple(dataclasses.replace(study, reference_text=None) for study in bench.studies)
    provenance = dataclasses.replace(bench.provenance, reference=None)
    return dataclasses.replace(
        bench, rows=rows, studies=studies, provenance=provenance, reference_report_quality=missing
    )


@pytest.mark.full
def test_without_a_record_quality_is_that_of_the_reports(bench: Bench, tmp_path: Path, open_page: Any) -> None:
    path = tmp_path / "report.html"
    write_report(no_record(bench), path)
    page = open_page(path)
    assert "1 − label F1" in page.inner_text("figcaption")
    assert page.locator("[id^=pareto-bubble]").count() == 5
    assert "no reference" in page.inner_text("#results")
    # No text is the yardstick: nothing is marked, and texts are the same or not.
    assert page.locator("article del, article ins").count() == 0
    assert page.locator("details summary").all_inner_texts() == ["study-0: the same from all"]


@pytest.mark.parametrize("kept", [0, 3])
def test_one_artifact_is_enough(bench: Bench, kept: int) -> None:
    page = render_report(dataclasses.replace(bench, rows=(bench.rows[kept],)))
    assert "What 1 artifact takes and loses" in page
    assert page.count('id="pareto-bubble-') == 1


def test_artifacts_that_all_failed_are_a_report_too(bench: Bench) -> None:
    page = render_report(dataclasses.replace(bench, rows=(bench.rows[-1],), studies=()))
    assert "got no manifest.json" in page
    assert NOTICE in page
    assert "There is no plot" in page
    assert "<svg" not in page


def test_figures_that_are_no_numbers_are_dashes(bench: Bench) -> None:
    nothing = Estimate(value=math.nan, low=math.nan, high=math.nan, count=0)
    row = measured(no_record(bench))[0]
    assert isinstance(row.report_quality, ReportQuality)
    quality = dataclasses.replace(row.report_quality, label_f1_micro=nothing)
    page = render_report(dataclasses.replace(bench, rows=(dataclasses.replace(row, report_quality=quality),)))
    assert "nan" not in re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL).lower()
    assert "(nothing to measure)" in page


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
    assert "胸 $x_2$ &lt;b&gt;&amp;\nnext · " in page
    assert "<b>&" not in page
    assert "Also &lt;this&gt;." in page


def test_half_a_surrogate_pair_is_no_reason_to_have_no_report(bench: Bench, tmp_path: Path) -> None:
    study = dataclasses.replace(bench.studies[0], reason="\ud83d")
    write_report(dataclasses.replace(bench, studies=(study,)), tmp_path / "report.html")
    assert "&#55357;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_is_there_whole_or_not_at_all(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the last one")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(LiteError, match=r"report.html: got No space left on device · expected"):
        write_report(bench, path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "the last one"


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
