"""Checkpoint to artifact: reads LLaVA-Rad's published layout, writes what `lite` runs.

    from export import ExportSettings, export_artifact
    artifact = export_artifact("llava-rad", "vicuna-7b-v1.5", "artifact", ExportSettings(vision_format="fp16"))

or `python -m export --help`. Importing this package loads nothing heavy; the first call does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from export.settings import AdapterSettings, ExportSettings, GptqSettings, OnnxSettings, TokenWeights
from lite.errors import BackendUnavailable

if TYPE_CHECKING:
    from export.adapter import add_adapter
    from export.pipeline import export_artifact
    from export.write.onnx_part import add_onnx

__all__ = [
    "AdapterSettings",
    "ExportSettings",
    "GptqSettings",
    "OnnxSettings",
    "TokenWeights",
    "add_adapter",
    "add_onnx",
    "export_artifact",
]
_HEAVY = {
    "add_adapter": "export.adapter",
    "add_onnx": "export.write.onnx_part",
    "export_artifact": "export.pipeline",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - PEP 562
    if name not in _HEAVY:
        msg = f"module 'export' has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        return getattr(import_module(_HEAVY[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"export", "lite", "kernels"}:
            raise
        msg = f'got no package {error.name!r} · expected it to export · pip install "llava-rad-lite[export]"'
        raise BackendUnavailable(msg) from error
