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
    Cancelled,
    CheckpointError,
    ContextLengthError,
    DeadlineExceeded,
    ImageError,
    LiteError,
    MemoryBudgetError,
    PromptError,
    QueueFull,
)

if TYPE_CHECKING:
    from lite.engines.protocol import Sampling
    from lite.loading import load
    from lite.model import FindingsModel
    from lite.retrieval.towers import Retrieval, load_retrieval
    from lite.session.draft import Draft, as_completed
    from lite.studies.results import Findings, Memory, StudyError, Timings
    from lite.studies.study import Study

__all__ = [
    "ArtifactError",
    "BackendUnavailable",
    "Cancelled",
    "CheckpointError",
    "ContextLengthError",
    "DeadlineExceeded",
    "Draft",
    "Findings",
    "FindingsModel",
    "ImageError",
    "LiteError",
    "Memory",
    "MemoryBudgetError",
    "PromptError",
    "QueueFull",
    "Retrieval",
    "Sampling",
    "Study",
    "StudyError",
    "Timings",
    "__version__",
    "as_completed",
    "load",
    "load_retrieval",
]


_HOMES = {
    "Draft": "lite.session.draft",
    "Findings": "lite.studies.results",
    "FindingsModel": "lite.model",
    "Memory": "lite.studies.results",
    "Retrieval": "lite.retrieval.towers",
    "Sampling": "lite.engines.protocol",
    "Study": "lite.studies.study",
    "StudyError": "lite.studies.results",
    "Timings": "lite.studies.results",
    "as_completed": "lite.session.draft",
    "load": "lite.loading",
    "load_retrieval": "lite.retrieval.towers",
}
"""What is imported when it is first asked for, and where it is."""


def __getattr__(name: str) -> object:
    """Import the runtime when something of it is first asked for."""
    if name not in _HOMES:
        msg = f"module 'lite' has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
