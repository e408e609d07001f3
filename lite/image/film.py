"""What a film is: the picture that a model sees, and what is known of where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL import Image

Rendering = Literal["mimic-cxr-jpg", "voi-lut"]
"""What a caller can ask for; `LoadedImage.rendering` says what was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilmInfo:
    """What a file says of its film, and what was done about it. The rules are those of `lite.image.rules`."""

    format: str  # "DICOM", "array", or Pillow's name ("PNG", "JPEG"; "image" for one made in memory)
    transfer_syntax: str | None = None  # of a DICOM file, by name
    view: str | None = None  # "AP", "PA", or in the file's words; None: it does not say
    view_source: str | None = None  # the attribute that said so
    body_part: str | None = None
    orientation: str | None = None  # PatientOrientation as it is in the file
    turned: str | None = None  # what was done so that the film stands upright, its left side on the right
    grey_levels: int | None = None  # different values, before they were rendered
    remarks: tuple[str, ...] = ()  # what a reader of the findings should know


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedImage:
    """A film as an 8-bit RGB picture.

    `rendering` is a name of the table in `lite.image.files`, with a remark after a comma where something was lost on
    the way: "as-is, alpha over black".
    """

    image: Image.Image
    rendering: str
    film: FilmInfo

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, once upright."""
        return self.image.size
