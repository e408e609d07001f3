"""The engines and their caches, side by side on one artifact: they compute the same integers and round otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import lite
from benchmarks.quality.compare import BATCH_SIZE, Candidate, Row, compare
from lite.studies.study import Study

ENGINES: Final[dict[str, dict[str, Any]]] = {
    "torch": {"engine": "torch", "device": "cpu"},
    "torch-int8-cache": {"engine": "torch", "device": "cpu", "cache_dtype": "int8"},
    "onnx": {"engine": "onnx", "cache_dtype": "float32"},
    "onnx-int8-cache": {"engine": "onnx", "cache_dtype": "int8"},
}
"""What is compared, by how it is loaded."""
BESIDE: Final = {"torch": ("torch-int8-cache", "onnx", "onnx-int8-cache"), "onnx": ("onnx-int8-cache",)}
"""References, and what is asked along their texts."""


def compare_engines(path: Path, studies: Sequence[Study], *, batch_size: int = BATCH_SIZE) -> dict[str, list[Row]]:
    """Compare `ENGINES` on an artifact: a table for each reference of `BESIDE`.

    Raises:
        LiteError: the artifact has no `decoder.onnx`, or a reference cannot be measured.
    """
    tables = {}
    for reference, others in reversed(BESIDE.items()):  # onnx first: an artifact without it is found at once
        candidates = [Candidate(name=name, load=partial(_load, path, name)) for name in (reference, *others)]
        tables[f"beside {reference}"] = list(compare(candidates, studies, batch_size=batch_size))
    return tables


def _load(path: Path, name: str) -> tuple[lite.FindingsModel, None]:
    return lite.load(path, **ENGINES[name]), None
