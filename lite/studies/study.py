"""A study: a film, why it was made, and what else is known of it."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lite.image.files import ImageSource

MODEL_FIELDS: Final = ("image", "reason", "query")
"""What the model sees of a study, in the order of a tuple that stands for one."""


@dataclass(frozen=True, slots=True)
class Study:
    """One exam. The model sees the film, and the reason or the query; the rest goes with the results."""

    image: ImageSource
    reason: str | None = None
    query: str | None = None  # asked instead of the question the model was trained with; excludes a reason
    _: KW_ONLY
    id: str = ""  # what its results are called
    question: str = ""  # what the list asks: the model is asked its own question
    reference: str = ""  # the findings that come with the film; empty where there are none
    row: Mapping[str, Any] = field(default_factory=dict, compare=False)  # what else its source says of it, if asked for

    @property
    def path(self) -> Path:
        """The film's file.

        Raises:
            LiteError: the film is not a file.
        """
        if isinstance(self.image, str | os.PathLike):
            return Path(self.image)
        msg = f"study {self.id}: got a film as {type(self.image).__name__} · expected a file's path · save it first"
        raise LiteError(msg)


def as_study(item: object) -> Study:
    """Return what a caller gives for a study: a `Study`, a tuple (image, reason, query) or its beginning, or an image.

    Raises:
        LiteError: a tuple of another length.
    """
    if isinstance(item, Study):
        return item
    if not isinstance(item, tuple):
        return Study(cast("ImageSource", item))  # whether it is an image is found out when it is read
    if not 1 <= len(item) <= len(MODEL_FIELDS):
        msg = (
            f"got a study of {len(item)} values · expected (image,), (image, reason) or (image, reason, query) · "
            "put None in the place of a reason that is not known"
        )
        raise LiteError(msg)
    return Study(*item)
