"""The errors a caller can catch.

    LiteError
    ├── CheckpointError        a source checkpoint that is incomplete, misshapen or unsafe to read
    ├── ArtifactError          an artifact that is missing, damaged, newer than this version, or not an artifact
    ├── ImageError             a file or an array that is not a frontal film
    ├── PromptError            a reason or a query that cannot be put into the prompt
    │   └── ContextLengthError     … because it is longer than the decoder's context
    ├── MemoryBudgetError      a request that does not fit the memory it was given
    ├── QueueFull              a request more than a session keeps waiting
    ├── DeadlineExceeded       a request that has not ended in its time
    ├── Cancelled              a request that nobody wants any more
    └── BackendUnavailable     a package, a device or a provider that is not there

Every message says what was got, what was expected, and what to do about it.
"""

from __future__ import annotations


class LiteError(Exception):
    """Any error this project raises on purpose."""


class CheckpointError(LiteError):
    """A source checkpoint that is incomplete, misshapen or unsafe to read."""


class ArtifactError(LiteError):
    """An artifact that is missing, damaged, newer than this version, or not an artifact at all."""


class ImageError(LiteError):
    """A file or an array that is not a frontal film."""


class PromptError(LiteError):
    """A reason or a query that cannot be put into the prompt."""


class ContextLengthError(PromptError):
    """A prompt longer than the decoder's context."""


class MemoryBudgetError(LiteError):
    """A request that does not fit the memory it was given."""


class BackendUnavailable(LiteError):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """A package, a device or a provider that is not there."""


class QueueFull(LiteError):  # noqa: N818
    """A request more than a session keeps waiting."""


class DeadlineExceeded(LiteError):  # noqa: N818
    """A request that has not ended in its time."""


class Cancelled(LiteError):  # noqa: N818
    """A request that nobody wants any more."""
