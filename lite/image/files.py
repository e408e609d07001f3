"""Films in, pixel_values out: PNG, JPEG, TIFF, DICOM and arrays, rendered the way LLaVA-Rad's training films were.

Two kinds of input exist, and one rule tells them apart. A *picture* has 8 bits a channel: someone has already decided
what black and white mean, so it is kept as it is, like the reference's `Image.open(...).convert("RGB")` does. *Stored
values* have more than 8 bits: detector readings from a DICOM file, or from a 16-bit PNG or TIFF, which is nearly
always such a file's pixel array saved by another tool. They have no agreed black and white yet, so they are rendered:

    rendering       from            steps
    as-is           picture         none (`.convert("RGB")`)
    mimic-cxr-jpg   stored values   minimum to 0, maximum to 255, truncate, invert MONOCHROME1, equalise, JPEG q95
    voi-lut         DICOM           modality LUT, then the file's first VOI LUT or window, invert MONOCHROME1
    min-max         stored values   asked for voi-lut, but there is none in the file: minimum to 0, maximum to 255

mimic-cxr-jpg is the default because MIMIC-CXR-JPG, on which the model was trained, was made that way; a windowed film
looks different from anything the model has seen. `LoadedImage.rendering` always says which one was used. What a film
has to be besides is in `lite.image.rules`.

Nothing here runs code from a file, opens a network address, or believes a header without a bound: formats that can
carry programs (EPS, NumPy pickles) are not read, and sizes are checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lite.errors import ImageError
from lite.image.deep import is_deep_colour, read_deep_colour
from lite.image.dicom import is_dicom, load_dicom
from lite.image.film import FilmInfo, LoadedImage, Rendering
from lite.image.layout import check_density, several_frames
from lite.image.levels import count_levels
from lite.image.quiet import quietly
from lite.image.rendering import FORMATS_TEXT, MAX_PIXELS, check_size, check_stored, decoding, grey_of, refusal, render
from lite.image.rules import check_values

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | NDArray[Any] | Image.Image | Dataset"
MAX_FILE_BYTES: Final = 512 * 1024**2

EXTENSIONS: Final = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".dcm")
"""How the names of films end, where a folder is searched for them; DICOM is known by its content."""
_FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")


def load_image(source: ImageSource, *, rendering: Rendering = "mimic-cxr-jpg", any_film: bool = False) -> LoadedImage:
    """Read one film.

    Transparent pixels become black: black is what a film shows outside its exposed field, and what somebody erased
    stays erased. (The reference drops the alpha channel, which brings back whatever colour lies under it; opaque
    images come out the same either way.) EXIF rotation is applied.

    Args:
        source: a path; the bytes of a file, or one that is open to be read as bytes; a pydicom data set; a Pillow
            image; or an array. An array is a picture if it is uint8 (or bool: False black, True white), shaped [H, W],
            [H, W, 1] or [H, W, 3]. Any other integer or float array is stored values, [H, W] or [H, W, 1] (integers
            also [H, W, 3]), higher = brighter, of any range, and is rendered as such, also if it happens to lie within
            0..1. DICOM is known by its content, and needs the `dicom` extra.
        rendering: how stored values are rendered. Pictures are kept whatever this says.
        any_film: read also what the rules take for another film than a frontal one of the chest; the remarks say so.

    Raises:
        ImageError: not a readable image; not a frontal film (see `lite.image.rules`); larger than MAX_PIXELS,
            MAX_SIDE_PX or MAX_FILE_BYTES; an array of another shape or with NaN in it; a compressed DICOM whose
            decoder is not installed.
        BackendUnavailable: a DICOM file, and pydicom is not installed.
    """
    if rendering not in get_args(Rendering):
        raise refusal("rendering", repr(rendering), " or ".join(get_args(Rendering)), "pass one of these")
    loader = _Loader(rendering, any_film)
    if isinstance(source, np.ndarray):
        return loader.array(source, "<array>", "array")
    if isinstance(source, Image.Image):
        with decoding("<image>", "a readable Pillow image"):
            return loader.pillow(source, "<image>")
    # Another thread may be importing pydicom: then it has no data sets yet, and nobody can have given one.
    if (dataset := getattr(sys.modules.get("pydicom"), "Dataset", None)) and isinstance(source, dataset):
        return load_dicom(source, "<dataset>", rendering, any_film=any_film)
    name, data = _contents(source)
    if not data:
        raise refusal(name, "an empty file", FORMATS_TEXT, "copy or download the file again")
    if is_dicom(data):
        return load_dicom(data, name, rendering, any_film=any_film)
    with decoding(name, "a whole image"):
        try:
            with quietly():
                picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            if name.lower().endswith((".dcm", ".dicom")):
                return load_dicom(data, name, rendering, any_film=any_film)
            do = "check that the file is an image; an image of another kind must be converted first"
            raise refusal(name, "a file that is not an image, or has no pixels", FORMATS_TEXT, do) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise refusal(name, str(error), f"at most {MAX_PIXELS:,} pixels", "scale the film down first") from None
        with picture:
            return loader.pillow(picture, name, num_bytes=len(data))


def _contents(source: object) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", bytes(source)
    if isinstance(source, str | os.PathLike):
        return str(source), _read_file(Path(source))
    expected = "a path, bytes, a NumPy array, a Pillow image, a file open for bytes or a pydicom data set"
    if callable(read := getattr(source, "read", None)):
        name = str(getattr(source, "name", "<file>"))
        data = read(MAX_FILE_BYTES + 1)
        if not isinstance(data, bytes):
            raise refusal(name, "a file open for text", expected, 'open it with "rb"')
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(name, f"more than {MAX_FILE_BYTES:,}")
        return name, data
    raise refusal("<image>", f"a value of type {type(source).__name__}", expected, "convert it to one of these")


def _too_large(name: str, num_bytes: str) -> ImageError:
    expected = f"at most {MAX_FILE_BYTES:,} bytes"
    return refusal(name, f"{num_bytes} bytes", expected, "check the file: no single film is that large")


def _read_file(path: Path) -> bytes:
    name = str(path)
    try:
        if path.is_dir():
            raise refusal(name, "a directory", "an image file", "name the files in it one by one")
        if not path.exists():
            raise refusal(name, "no such file", "an image file", "check the path (addresses are not fetched)")
        if not path.is_file():
            raise refusal(name, "a device or a pipe", "an image file", "save it to a file first")
        if (num_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            raise _too_large(name, f"{num_bytes:,}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise refusal(name, f"{error}", "a readable file", "check its path and permissions") from error


@dataclass(frozen=True, slots=True)
class _Loader:
    """Arrays and pictures, read as one caller asked for."""

    rendering: Rendering
    any_film: bool

    def array(self, array: NDArray[Any], name: str, image_format: str) -> LoadedImage:
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        grey = array.ndim == 2
        colour = array.ndim == 3 and array.shape[2] == 3
        if not grey and not colour:
            channels_first = array.ndim == 3 and array.shape[0] in (1, 3)
            do = "move the channels last: array.transpose(1, 2, 0)" if channels_first else "pass one film at a time"
            raise refusal(name, f"shape {list(array.shape)}", "[H, W], [H, W, 1] or [H, W, 3]", do)
        check_size(name, array.shape[1], array.shape[0])
        if array.dtype == np.bool_:
            array = array.astype(np.uint8) * np.uint8(255)
        if array.dtype == np.uint8:
            return self._picture(Image.fromarray(np.ascontiguousarray(array)), name, image_format)
        remarks: list[str] = []
        if colour:
            if array.dtype.kind not in "ui":
                do = "scale it to 0..255 and convert it to uint8, or pass one channel"
                raise refusal(name, f"a colour array of {array.dtype}", "integers, such as uint8", do)
            array, remarks = grey_of(array)
        return self._stored(array, name, image_format, remarks)

    def pillow(self, picture: Image.Image, name: str, *, num_bytes: int | None = None) -> LoadedImage:
        check_size(name, picture.width, picture.height)
        if num_bytes is not None:
            # Deep colours take as many times the memory, and are not stored at 100:1.
            times = 2 * len(picture.getbands()) if is_deep_colour(picture) else 1
            check_density(name, picture.width * picture.height * times, num_bytes)
        image_format, cut_to_8_bits = picture.format or "image", is_deep_colour(picture)
        white_is_zero = _is_white_zero_tiff(picture)
        with quietly() as complaints:
            _check_pages(picture, name)
            deep = read_deep_colour(picture) if cut_to_8_bits else None
            upright = picture if deep is not None else ImageOps.exif_transpose(picture)
        remarks = [f"its decoder says: {complaints[0]}"] if complaints else []
        if deep is not None:
            return self._deep(deep, name, image_format, remarks)
        if upright.mode.startswith("I") or upright.mode == "F":
            return self._stored(np.asarray(upright), name, image_format, remarks, monochrome1=white_is_zero)
        used = "as-is"
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            if rgba.getchannel("A").getextrema() != (255, 255):
                used = "as-is, alpha over black"
                rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
            upright = rgba.convert("RGB")
        if cut_to_8_bits:
            used += ", 16-bit colour cut to 8"
        return self._picture(upright, name, image_format, used, remarks)

    def _deep(self, samples: NDArray[np.uint16], name: str, image_format: str, remarks: Sequence[str]) -> LoadedImage:
        """Take colours of 16 bits for stored values; what is transparent is left out of the scale, and black."""
        num_channels = samples.shape[2]
        values, made_grey = grey_of(samples[:, :, :3]) if num_channels > 2 else (samples[:, :, 0], [])
        remarks = [*remarks, *made_grey]
        alpha = samples[:, :, -1] if num_channels in (2, 4) else None
        if alpha is not None and (clear := alpha < 1 << 15).any():
            values = values.copy()
            values[clear] = 0 if clear.all() else values[~clear].min()
            remarks.append(f"transparent in {clear.mean():.1%} of the film, left out of the scale: black")
        return self._stored(values, name, image_format, remarks)

    def _stored(
        self,
        values: NDArray[Any],
        name: str,
        image_format: str,
        remarks: Sequence[str] = (),
        *,
        monochrome1: bool = False,
    ) -> LoadedImage:
        check_stored(values, name)
        levels = count_levels(values, monochrome1=monochrome1)
        remarks = (*remarks, *check_values(levels, name, any_film=self.any_film, stored=True))
        picture, used = render(values, self.rendering, name, monochrome1=monochrome1)
        film = FilmInfo(format=image_format, grey_levels=levels.num_levels, remarks=remarks)
        return LoadedImage(image=picture, rendering=used, film=film)

    def _picture(
        self, picture: Image.Image, name: str, image_format: str, used: str = "as-is", remarks: Sequence[str] = ()
    ) -> LoadedImage:
        levels = count_levels(np.asarray(picture.convert("L")))
        remarks = (*remarks, *check_values(levels, name, any_film=self.any_film, stored=False))
        film = FilmInfo(format=image_format, grey_levels=levels.num_levels, remarks=remarks)
        return LoadedImage(image=picture.convert("RGB"), rendering=used, film=film)


def _check_pages(picture: Image.Image, name: str) -> None:
    # A camera's MPO keeps a preview as a second picture; in every other format pages are images in their own right.
    if (frames := getattr(picture, "n_frames", 1)) > 1 and picture.format != "MPO":
        raise several_frames(name, frames)


def _is_white_zero_tiff(picture: Image.Image) -> bool:
    """Say whether a TIFF stores white as 0. Pillow turns such 8-bit files round, but not deeper ones."""
    tags: dict[int, Any] = getattr(picture, "tag_v2", None) or {}
    return picture.mode.startswith("I") and tags.get(262) == 0
