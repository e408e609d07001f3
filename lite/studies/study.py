"""A study: a film, and why it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lite.image.files import ImageSource


class Study(NamedTuple):
    """One exam: a film, and why it was made. Any tuple of this form will do."""

    image: ImageSource
    reason: str | None = None
    query: str | None = None
