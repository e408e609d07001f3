"""Draft the findings of a frontal chest X-ray from an exported LLaVA-Rad artifact.

    import lite

    model = lite.load("artifact")
    print(model.findings("film.png", reason="Cough and fever.").text)

The text is a research draft and not for clinical use. Importing this package imports nothing heavy; `load` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lite._version import __version__
from lite.errors import (
    ArtifactError,
    BackendUnavailable,
    CheckpointError,
    ContextLengthError,
    ImageError,
    LiteError,
    MemoryBudgetError,
    PromptError,
)

if TYPE_CHECKING:
    from lite.model import Findings, FindingsModel, FindingsStream, Memory, Study, StudyError, Timings, load

__all__ = [
    "ArtifactError",
    "BackendUnavailable",
    "CheckpointError",
    "ContextLengthError",
    "Findings",
    "FindingsModel",
    "FindingsStream",
    "ImageError",
    "LiteError",
    "Memory",
    "MemoryBudgetError",
    "PromptError",
    "Study",
    "StudyError",
    "Timings",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    """Import the runtime when something of it is first asked for."""
    if name not in __all__:
        msg = f"module 'lite' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module("lite.model"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
