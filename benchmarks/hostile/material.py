"""Good inputs of every kind, to be spoilt."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydicom import Dataset

Reading: TypeAlias = "Callable[[], object]"
Kind: TypeAlias = "Callable[[Material, random.Random, Path], Reading]"


@dataclasses.dataclass(frozen=True)
class Material:
    """Good inputs of every kind."""

    artifact: Path
    adapted: Path  # an artifact with adapters, all of which are spoilt alike
    studies: Path  # a list of phantoms with DICOM films
    predictions: Path  # what was drafted for them

    @cached_property
    def pictures(self) -> tuple[bytes, ...]:
        """A film in the formats and depths that Pillow writes."""
        film = Image.open(next(self.studies.parent.rglob("*.png"))).convert("L").resize((64, 48))
        deep = Image.fromarray(np.asarray(film).astype(np.uint16) * 16)
        made = []
        for picture, kind, options in (
            (film, "PNG", {}),
            (deep, "PNG", {}),
            (film.convert("RGBA"), "PNG", {}),
            (film.convert("P"), "PNG", {}),
            (film, "JPEG", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
            (film.convert("RGB"), "JPEG", {"progressive": True}),
            (film, "TIFF", {}),
            (deep, "TIFF", {"compression": "tiff_lzw"}),
            (film, "TIFF", {"compression": "tiff_adobe_deflate"}),
            (film, "JPEG2000", {}),
            (film, "BMP", {}),
            (film, "GIF", {}),
            (film, "WEBP", {}),
            (film, "PPM", {}),
        ):
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            made.append(buffer.getvalue())
        return tuple(made)

    @cached_property
    def dataset(self) -> Dataset:
        """A phantom's DICOM film, small."""
        import pydicom

        film = pydicom.dcmread(next(self.studies.parent.rglob("*.dcm")))
        values = np.ascontiguousarray(film.pixel_array[::8, ::8].astype("<u2"))
        film.Rows, film.Columns, film.PixelData = *values.shape, values.tobytes()
        return film

    @cached_property
    def films(self) -> tuple[bytes, ...]:
        """The same in every transfer syntax that can be written here."""
        import copy

        from pydicom import uid

        made = []
        for syntax in (
            uid.ExplicitVRLittleEndian,
            uid.ImplicitVRLittleEndian,
            uid.DeflatedExplicitVRLittleEndian,
            uid.RLELossless,
            uid.JPEGLSLossless,
            uid.JPEG2000Lossless,
        ):
            film = copy.deepcopy(self.dataset)
            with contextlib.suppress(RuntimeError, NotImplementedError, ValueError):  # no encoder is installed
                if syntax.is_compressed and not syntax.is_deflated:
                    film.compress(syntax)
                film.file_meta.TransferSyntaxUID = syntax
                made.append(saved(film))
        return tuple(made)


def saved(film: Dataset) -> bytes:
    """Return the bytes of a DICOM file."""
    buffer = io.BytesIO()
    film.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
