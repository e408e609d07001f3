"""The engines and their caches, side by side on one artifact: they compute the same integers and round otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import lite
from benchmarks.quality.compare import Drafts, Films, Loss, diverge, keep_logits, loss

ENGINES: Final[dict[str, dict[str, Any]]] = {
    "torch": {"engine": "torch", "device": "cpu"},
    "torch-int8-cache": {"engine": "torch", "device": "cpu", "cache_dtype": "int8"},
    "onnx": {"engine": "onnx", "cache_dtype": "float32"},
    "onnx-int8-cache": {"engine": "onnx", "cache_dtype": "int8"},
}
"""What is compared, by how it is loaded."""
BESIDE: Final = {"torch": ("torch-int8-cache", "onnx", "onnx-int8-cache"), "onnx": ("onnx-int8-cache",)}
"""References, and what is asked along their texts."""


def load_engines(path: Path) -> dict[str, lite.FindingsModel]:
    """Load an artifact with each of `ENGINES`.

    Raises:
        LiteError: it has no `decoder.onnx`.
    """
    return {name: lite.load(path, **options) for name, options in ENGINES.items()}


def compare_engines(
    models: Mapping[str, lite.FindingsModel], drafts: Mapping[str, Drafts], films: Films
) -> dict[tuple[str, str], Loss]:
    """Compare what `ENGINES` have drafted: the loss of each candidate and reference of `BESIDE`."""
    losses = {}
    for reference, candidates in BESIDE.items():
        with tempfile.TemporaryDirectory(prefix="reference-logits-") as folder:
            kept = keep_logits(models[reference], films.studies, drafts[reference], Path(folder))
            for name in candidates:
                divergence = diverge(models[name], films.studies, kept, name=name)
                losses[name, reference] = loss(drafts[name], kept, divergence)
    return losses
