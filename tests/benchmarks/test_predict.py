"""Predictions for a list of films, with a stand-in for the model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lite
from benchmarks.phantom import predict as predicting
from benchmarks.phantom.score import read_predictions
from lite.errors import ImageError


def entry(number: int, **changes: object) -> dict[str, object]:
    return {
        "id": f"study-{number}",
        "image": f"{number}.png",
        "view": "PA",
        "reason": "Cough." if number % 2 else None,
        "generate_method": "rule-based",
        "conversations": [
            {"from": "human", "value": "<image>\nProvide a description."},
            {"from": "gpt", "value": f"Reference {number}."},
        ],
        **changes,
    }


@dataclass
class Draft:
    text: str


class Model:
    """Answers with what it was asked; the film named 1.png cannot be read."""

    def findings_batch(self, studies: list[tuple[Path, str | None]], *, batch_size: int) -> Iterator[object]:
        assert batch_size == 2
        for index, (image, reason) in enumerate(studies):
            if image.name == "1.png":
                yield lite.StudyError(index=index, error=ImageError("1.png: got noise"))
            else:
                yield Draft(f"{image.name}, {reason}")


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(lite, "load", lambda *_, **__: Model())
    parser = argparse.ArgumentParser()
    predicting.add_arguments(parser)
    command = ["artifact", str(tmp_path / "list.json"), "--out", str(tmp_path / "out" / "p.jsonl"), *arguments]
    return predicting.run(parser.parse_args([*command, "--batch-size", "2"]))


def test_predictions_can_be_scored_and_a_bad_film_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.json").write_text(json.dumps([entry(number) for number in range(4)]))
    assert run(tmp_path, monkeypatch) == 1
    rows = read_predictions(tmp_path / "out" / "p.jsonl")
    assert [row.id for row in rows] == ["study-0", "study-2", "study-3"]
    assert rows[2].prediction == "3.png, Cough."
    assert rows[2].reference == "Reference 3."
    assert rows[2].query == "Provide a description."
    shown = capsys.readouterr()
    assert "skipped: 1.png: got noise" in shown.err
    assert "3 predictions" in shown.out
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "p.jsonl"]


def test_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.json").write_text(json.dumps([entry(number) for number in (2, 3, 1)]))
    assert run(tmp_path, monkeypatch, "--limit", "2") == 0
    assert len(read_predictions(tmp_path / "out" / "p.jsonl")) == 2
