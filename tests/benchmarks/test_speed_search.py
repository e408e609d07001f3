"""What a search takes, measured on a small index: right answers, and figures that a reader can use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import search


def test_searches_are_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "available_cores", lambda: 1)
    monkeypatch.setattr(search, "_BAR_S", 10.0)
    file = tmp_path / "search.json"
    assert search.main(["--films", "6000", "--dim", "16", "--queries", "4", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["sections"]["search"]["rows"]
    assert row["nbytes"] == 6_000 * 16 * 4
    assert row["peak_bytes"] > row["nbytes"]
    assert row["time"]["count"] == 4
