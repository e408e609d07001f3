"""The server's page in headless Chromium: how a test opens it, and does what a person does there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from serving import Served

COPYING = ["clipboard-read", "clipboard-write"]
browser = chromium.browser
# What a page of ours never does: told to the window itself, before any script of it runs.
WATCH = """addEventListener("securitypolicyviolation", event => console.error(`policy: ${event.violatedDirective}`))"""
DROP = """(files) => {
    const dataTransfer = new DataTransfer();
    for (const [name, content] of files) {
        dataTransfer.items.add(new File([Uint8Array.from(atob(content), char => char.charCodeAt(0))], name));
    }
    return dataTransfer;
}"""


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Callable[..., Any]]:
    """Open the page in a new browser; no request may leave the server, no policy be broken, no script fail."""
    wrong: list[str] = []
    note: Callable[[str], Any] = wrong.append
    contexts = []

    def open_page(width: int = 1440, *, url: str = served.url, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, permissions=COPYING, **options)
        context.set_default_timeout(180_000)
        context.add_init_script(WATCH)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda sent: sent.url.startswith((url, "blob:")) or note(sent.url))
        page.on("pageerror", lambda error: note(f"error: {error}"))
        page.on("dialog", lambda dialog: (note(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: is_wrong(message) and note(message.text))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def is_wrong(message: Any) -> bool:
    """Say whether the console tells of an error that is not an answer of the server's."""
    return message.type == "error" and "responded with a status of" not in message.text


def drop(page: Any, *films: tuple[str, bytes]) -> None:
    files = [[name, base64.b64encode(content).decode()] for name, content in films]
    page.dispatch_event("main", "drop", {"dataTransfer": page.evaluate_handle(DROP, files)})


def choose(page: Any, *films: Path) -> None:
    page.set_input_files("#files", films)
    page.wait_for_selector("#draft:not(:disabled)")
    page.wait_for_selector("#canvas")


def ask(page: Any, reason: str = "") -> Any:
    """Draft the film that is shown; return its newest draft when it is done."""
    page.get_by_label("Reason for the exam").fill(reason)
    page.locator("#draft").click()
    page.wait_for_selector("#draft:visible")
    return page.locator(".draft:not(.busy)").first


def text_of(draft: Any) -> str:
    """Return the findings without the shares behind sentences."""
    return str(draft.locator(".text").evaluate(
        "text => { const copy = text.cloneNode(true); copy.querySelectorAll('.share').forEach(s => s.remove());"
        " return copy.textContent; }"
    ))  # fmt: skip


def download(page: Any, button: Any) -> tuple[str, bytes]:
    with page.expect_download() as waited:
        button.click()
    return waited.value.suggested_filename, Path(waited.value.path()).read_bytes()
