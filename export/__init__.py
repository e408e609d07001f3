"""Checkpoint to artifact: reads LLaVA-Rad's published layout, writes what `lite` runs.

    from export import ExportSettings, export_artifact
    artifact = export_artifact("llava-rad", "vicuna-7b-v1.5", "artifact", ExportSettings(vision_format="fp16"))

or `python -m export --help`. Importing this package loads nothing heavy; the first call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from export.settings import ExportSettings, GptqSettings, TokenWeights
from lite.errors import BackendUnavailable

if TYPE_CHECKING:
    from export.pipeline import export_artifact

__all__ = ["ExportSettings", "GptqSettings", "TokenWeights", "export_artifact"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name != "export_artifact":
        msg = f"module 'export' has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        from export.pipeline import export_artifact
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"export", "lite", "kernels"}:
            raise
        msg = f'got no package {error.name!r} · expected it to export · pip install "llava-rad-lite[export]"'
        raise BackendUnavailable(msg) from error
    return export_artifact
