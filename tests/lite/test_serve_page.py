"""The server's page in headless Chromium, as a person uses it: a film in, findings out, nothing else on the wire."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browsing
import pytest
from browsing import DROP, ask, choose, download, drop, text_of
from serving import Gate, Served, serving
from serving import gate as serving_gate

from benchmarks.phantom.write import write_studies
from lite.artifact.open import Artifact
from lite.loading import load
from lite.serve.server import Server
from lite.serve.settings import Settings
from lite.studies.results import SHORT_NOTICE, Result

MARKUP = '<img src=x onerror="alert(1)">.png'
MIDDLE = """canvas => {
    const [x, y] = [canvas.width / 2, canvas.height / 2];
    return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data.slice(0, 3)];
}"""
browser, open_page, page, gate = browsing.browser, browsing.open_page, browsing.page, serving_gate
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def served(demo_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(demo_artifact.path, device="cpu", rows=2), max_queue=1) as served:
        yield served


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PNG and DICOM of six studies, one after the other."""
    folder = tmp_path_factory.mktemp("films") / "studies"
    write_studies(folder, count=6, seed=11, dicom=True)
    return sorted(folder.rglob("*.png")) + sorted(folder.rglob("*.dcm"))


def test_a_film_that_is_dropped_is_seen_and_drafted(page: Any, served: Served, films: list[Path]) -> None:
    drop(page, ("cough & <b>fever</b>.png", films[0].read_bytes()))
    page.wait_for_selector("#draft:not(:disabled)")
    assert page.locator("#film-facts").inner_text().startswith("PNG · ")
    draft = ask(page, "Cough and fever.")
    expected = served.model.findings(films[0], "Cough and fever.", top_logprobs=0)
    assert text_of(draft) == expected.text
    assert page.locator("#list li b").inner_text() == "cough & <b>fever</b>.png"
    assert page.locator("#list small").inner_text() == "done"
    # Each sentence with its share, and what the share is not.
    shares = [int(text.strip("\xa0 %")) for text in draft.locator(".share").all_inner_texts()]
    assert len(shares) == draft.locator(".sentence").count() > 1
    assert all(0 < share <= 100 for share in shares)
    assert "not how likely they are true" in page.locator("#legend").inner_text()
    page.get_by_label("Shade sentences").uncheck()
    assert not draft.locator(".share").first.is_visible()
    assert re.search(r"First word after \d.* all \d+ after \d", draft.inner_text())
    draft.locator("summary").click()
    facts = draft.locator("dl").inner_text()
    assert expected.artifact_id in facts
    assert f"{expected.engine} ({expected.backend}) on cpu" in facts
    page.locator("summary", has_text="This server").click()
    about = page.locator("#about-facts").inner_text()
    assert expected.artifact_id in about
    assert "forbids a hosted service" in about
    assert "decoder:" in about


def test_text_streams_and_stop_frees_the_row(page: Any, served: Served, films: list[Path], gate: Gate) -> None:
    choose(page, films[1])
    page.locator("#draft").click()
    page.wait_for_selector(".draft.busy .text:not(:empty)")
    first = text_of(page.locator(".draft"))
    gate.step(4)
    page.wait_for_selector(".draft.busy .text:has-text(' ')")
    assert text_of(page.locator(".draft")).startswith(first)
    assert "writing" in page.locator("#list small").inner_text()
    said = page.locator("#said").inner_text()
    assert said == "" or said.endswith((".", "ready."))  # sentences at most, never tokens
    page.keyboard.press("Escape")
    page.wait_for_selector(".draft:not(.busy)")
    assert "Stopped." in page.locator(".draft").inner_text()
    assert "Not a whole draft." in page.locator(".draft").inner_text()
    assert text_of(page.locator(".draft")).startswith(first)
    gate.open()
    served.wait_until_idle()
    assert text_of(ask(page)) == served.model.findings(films[1]).text


def test_a_dicom_film_comes_back_as_json_text_and_report(page: Any, served: Served, films: list[Path]) -> None:
    pydicom = pytest.importorskip("pydicom")
    dicom = films[-1]
    choose(page, dicom)
    assert page.locator("#film-facts").inner_text().startswith("DICOM")
    draft = ask(page, "Dyspnoea.")
    name, content = download(page, draft.get_by_role("button", name="JSON"))
    assert name == f"{dicom.stem}.findings.json"
    result = Result.from_json(json.dumps(json.loads(content)), where=name)
    assert result.findings is not None
    assert result.prediction == served.model.findings(dicom, "Dyspnoea.").text == text_of(draft)
    name, content = download(page, draft.get_by_role("button", name="Text"))
    for part in ("Dyspnoea.", text_of(draft), "not for clinical use", result.findings.artifact_id):
        assert part in content.decode()
    name, content = download(page, draft.get_by_role("button", name="DICOM SR"))
    report = pydicom.dcmread(io.BytesIO(content))
    assert (name, report.Modality) == (f"{dicom.stem}.findings.dcm", "SR")
    assert report.StudyInstanceUID == pydicom.dcmread(dicom).StudyInstanceUID


def test_what_is_no_film_is_told_as_text(page: Any, films: list[Path]) -> None:
    drop(page, (MARKUP, b"no film at all"), ("good.png", films[0].read_bytes()))
    failure = page.locator("#empty .failure")
    failure.wait_for()
    assert "not an image" in failure.inner_text()
    assert page.locator("#list b").first.inner_text() == MARKUP
    assert page.locator("#draft").is_disabled()
    page.locator("#list .open").nth(1).click()
    page.wait_for_selector("#draft:not(:disabled)")
    page.get_by_role("button", name="Remove good.png").click()
    failure.wait_for()


def test_the_rules_of_films_are_told_and_can_be_set_aside(page: Any, films: list[Path]) -> None:
    pydicom = pytest.importorskip("pydicom")
    film, written = pydicom.dcmread(films[-1]), io.BytesIO()
    film.ViewPosition, film.ImageLaterality = "LATERAL", "L"
    film.save_as(written)
    drop(page, ("lateral.dcm", written.getvalue()))
    page.wait_for_selector("#empty .failure:has-text('frontal view')")
    page.locator("summary", has_text="More").click()
    page.get_by_label("Take any film").check()
    page.wait_for_selector("#draft:not(:disabled)")
    assert page.locator("#remarks li").count() >= 1
    assert text_of(ask(page))


def test_ask_again_takes_the_film_up(page: Any, served: Served, films: list[Path]) -> None:
    choose(page, films[2])
    ask(page, "Cough.")
    again = ask(page, "Trauma <script>alert(2)</script>")
    assert "The film was taken up where a row still held it" in again.inner_text()
    assert "Trauma <script>alert(2)</script>" in again.locator("header").inner_text()
    assert page.locator(".draft").count() == 2
    page.locator("summary", has_text="More").click()
    page.get_by_label("Another question").fill("Is there a pneumothorax?")
    assert page.get_by_label("Reason for the exam").is_disabled()
    page.get_by_label("Longest text").fill("3")
    page.locator("#draft").click()
    cut = page.locator(".draft:not(.busy)", has_text="Is there a pneumothorax?")
    cut.wait_for()
    assert "Cut at the longest text" in cut.inner_text()


def test_a_full_queue_is_told_and_asked_again(page: Any, served: Served, films: list[Path], gate: Gate) -> None:
    choose(page, *films[:6])
    page.wait_for_selector("#list li:nth-child(6).ready")
    page.get_by_label("Reason for the exam").fill("Cough.")
    page.get_by_role("button", name="This reason for all films").click()
    page.get_by_label("together").check()
    page.get_by_role("button", name="Draft all").click()
    page.wait_for_selector("#list li.failed")  # two rows and a place in the queue
    gate.open()
    page.wait_for_selector("#list:not(:has(.busy, .ready))")
    failed = page.locator("#list li.failed").count()
    assert failed + page.locator("#list li.done").count() == 6
    page.locator("#list li.failed .open").first.click()
    assert "Try again when some have ended" in page.locator(".draft .failure").inner_text()
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#list li.done .open[aria-current]")
    page.get_by_label("together").uncheck()
    page.get_by_role("button", name="Draft all").click()
    page.wait_for_selector("#list:not(:has(.failed, .busy))")
    for number, film in enumerate(films[:6]):
        page.locator("#list .open").nth(number).click()
        assert text_of(page.locator(".draft").first) == served.model.findings(film, "Cough.").text


def test_history_is_kept_only_if_asked_for(page: Any, films: list[Path]) -> None:
    choose(page, films[0])
    ask(page, "Before.")
    assert page.evaluate("Object.keys(localStorage).length") == 0
    page.locator("summary", has_text="History").click()
    page.get_by_label("Keep the last 50 drafts").check()
    text = text_of(ask(page, "After."))
    page.reload()
    page.locator("summary", has_text="History").click()
    kept = page.locator("#kept li")
    assert kept.count() == 1
    kept.locator("summary").click()
    for part in ("After.", text, films[0].name):
        assert part in kept.inner_text()
    assert page.evaluate("JSON.stringify(localStorage).length") < 2000  # no film
    page.get_by_role("button", name="Delete all").click()
    assert kept.count() == 0
    choose(page, films[0])
    ask(page)
    page.get_by_label("Keep the last 50 drafts").uncheck()
    assert "Before." not in page.evaluate("JSON.stringify(localStorage)")
    assert kept.count() == 0


def test_keys(page: Any, films: list[Path]) -> None:
    choose(page, *films[:2])
    page.wait_for_selector("#list li:nth-child(2).ready")
    page.keyboard.press("j")
    assert page.locator("#list .open").nth(1).get_attribute("aria-current")
    page.keyboard.press("k")
    page.keyboard.press("r")
    page.keyboard.type("jokers?")  # where one types, letters are letters
    assert page.get_by_label("Reason for the exam").input_value() == "jokers?"
    assert not page.locator("#help").is_visible()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".draft:not(.busy)")
    page.keyboard.press("Tab")
    page.keyboard.press("c")
    page.wait_for_selector("#said:has-text('Copied.')", state="attached")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"{text_of(page.locator('.draft'))}\n\n{SHORT_NOTICE}\n"
    page.keyboard.press("s")
    assert not page.locator(".share").first.is_visible()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.get_by_label("Keys of a single letter work").uncheck()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("?")
    assert not page.locator("#help").is_visible()


def test_window_zoom_and_place_are_the_browser_s_own(page: Any, films: list[Path]) -> None:
    choose(page, films[0])
    canvas, zoom = page.locator("#canvas"), page.locator("#zoom-is")
    page.wait_for_selector("#zoom-is:has-text('1.0 ×')")
    grey = canvas.evaluate(MIDDLE)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 240)
    page.mouse.up()
    page.wait_for_selector("#width-is:has-text('155')")
    assert page.locator("#level-is").inner_text() == "148"
    page.mouse.wheel(0, -400)
    page.wait_for_selector("#zoom-is:not(:has-text('1.0'))")
    assert float(zoom.inner_text().split()[0]) > 1.5
    canvas.focus()
    page.keyboard.press("0")
    page.wait_for_selector("#zoom-is:has-text('1.0 ×')")
    assert canvas.evaluate(MIDDLE) == grey
    page.keyboard.press("i")
    page.wait_for_selector("#invert[aria-pressed=true]")
    assert canvas.evaluate(MIDDLE) == [255 - value for value in grey]
    page.keyboard.press("Shift+ArrowUp")
    page.wait_for_selector("#level-is:has-text('124')")
    page.get_by_label("Window", exact=True).fill("40")
    page.wait_for_selector("#width-is:has-text('40')")
    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector("#width-is:has-text('255')")


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_cut_and_the_notice_is_never_covered(
    open_page: Callable[..., Any], served: Served, films: list[Path], width: int
) -> None:
    page = open_page(width)
    choose(page, *films[:3])
    ask(page, "Cough.").locator("summary").click()
    page.keyboard.press("End")
    page.mouse.wheel(0, 5000)
    shown = """() => {
        const box = document.querySelector("#notice").getBoundingClientRect();
        const seen = [[1, 1], [box.width / 2, box.height / 2], [box.width - 2, box.height - 2]].map(
            ([x, y]) => document.elementFromPoint(x, y)?.closest("#notice, dialog")?.id);
        return [box.top, seen, document.documentElement.scrollWidth, document.querySelector("#notice").textContent];
    }"""
    assert page.evaluate(shown) == [0, ["notice"] * 3, width, served.model.notice]
    page.keyboard.press("?")
    assert page.evaluate(shown)[0] == 0
    dialog, notice = page.locator("#help").bounding_box(), page.locator("#notice").bounding_box()
    assert dialog["y"] >= notice["height"]
    assert dialog["x"] >= 0
    assert dialog["x"] + dialog["width"] <= width


def test_light_and_dark(open_page: Callable[..., Any]) -> None:
    page = open_page(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_label("Theme").select_option("light")
    light = page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", dark))) < 150 < 600 < sum(map(int, re.findall(r"\d+", light)))
    page.reload()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page: Callable[..., Any], films: list[Path], scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(color_scheme=scheme, reduced_motion="reduce")

    def check(state: str) -> None:
        found = axe.run(page).response["violations"]
        told = [(one["id"], one["impact"], [node["html"][:120] for node in one["nodes"]]) for one in found]
        assert [one for one in told if one[1] in ("serious", "critical")] == [], state
        assert told == [], state

    page.wait_for_selector("#about-facts dt", state="attached")
    check("empty")
    drop(page, ("none.txt", b"none"))
    page.wait_for_selector("#empty .failure")
    check("error")
    page.set_input_files("#files", films[-1])
    page.locator("#list .open").nth(1).click()
    page.wait_for_selector("#draft:not(:disabled)")
    ask(page, "Cough.")
    for summary in page.locator("summary:visible").all():
        summary.click()
    check("done")
    page.keyboard.press("?")
    check("keys")


@pytest.mark.parametrize(("status", "said"), [(401, "eload the page and enter it"), (503, "the server stops")])
def test_what_the_server_refuses_is_told(page: Any, films: list[Path], status: int, said: str) -> None:
    choose(page, films[0])
    body = json.dumps({"error": {"message": "got a request while the server stops · expected one before · wait"}})
    page.route("**/findings", lambda route: route.fulfill(status=status, body=body, content_type="application/json"))
    page.locator("#draft").click()
    failure = page.locator(".draft .failure")
    failure.wait_for()
    assert said in failure.inner_text()
    assert failure.get_by_role("button", name="Try again").count() == (status == 503)
    assert said in page.locator("#said").inner_text()


def test_a_page_that_is_there_before_the_model_waits_for_it(
    open_page: Callable[..., Any], served: Served, films: list[Path]
) -> None:
    go = threading.Event()
    model = served.model

    def slow() -> Any:
        assert go.wait(60)
        return load(model.artifact.path, device="cpu", rows=1)

    server = Server(Settings(port=0), slow)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        page = open_page(url=server.url)
        page.wait_for_selector("#server:has-text('the model is loading')")
        page.set_input_files("#files", films[0])
        page.wait_for_selector("#list small:has-text('the model is loading')")
        go.set()
        page.wait_for_selector("#draft:not(:disabled)")
        assert text_of(ask(page)) == model.findings(films[0]).text
    finally:
        go.set()
        server.stop()
        thread.join(60)


def test_a_film_can_be_pasted(page: Any, films: list[Path]) -> None:
    data = page.evaluate_handle(DROP, [["image.png", base64.b64encode(films[0].read_bytes()).decode()]])
    paste = "clipboardData => document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}))"
    page.evaluate(paste, data)
    page.wait_for_selector("#draft:not(:disabled)")
