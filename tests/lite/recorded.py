"""What the tests of reference records share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lite.bench import recording
from lite.eval.record import ReferenceRecord
from lite.studies.study import Study


def take(model: Any, studies: list[Study], **changes: Any) -> ReferenceRecord:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "machine", lambda: "a test")
        patch.setattr(recording, "versions", lambda: {"numpy": "2"})
        return recording.take_record(model, studies, name="list.json", **changes)


def three_studies(films: list[Path]) -> list[Study]:
    reasons = ("Cough.", None, "Fever, chest pain.")
    return [
        Study(id=f"s{number}", image=film, reason=reason)
        for number, (film, reason) in enumerate(zip(films, reasons, strict=False))
    ]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def assert_equal(read: ReferenceRecord, record: ReferenceRecord) -> None:
    assert read.info == record.info
    for got, expected in (
        (read.offsets, record.offsets),
        (read.all_token_ids, record.all_token_ids),
        (read.top.ids, record.top.ids),
        (read.top.log_probs, record.top.log_probs),
        (read.top.log_tail, record.top.log_tail),
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
