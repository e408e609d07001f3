"""The report in headless Chromium: how a test opens it, and where things are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_rows
import chromium
import pytest
from bench_rows import Shown

shown, browser = bench_rows.shown, chromium.browser


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
