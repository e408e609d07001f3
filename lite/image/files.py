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
looks different from anything the model has seen. `LoadedImage.rendering` always says which one was used.

The second half, `preprocess`, is open_clip 2.23's evaluation transform, re-written in Pillow and numpy.

Nothing here runs code from a file, opens a network address, or believes a header without a bound: formats that can
carry programs (EPS, NumPy pickles) are not read, and sizes are checked before any pixel is decoded.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    pass
from lite.image.dicom import load_dicom
from lite.image.rendering import FORMATS_TEXT, MAX_PIXELS, LoadedImage, Rendering, check_size, decoding, refusal, render

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any] | Image.Image"
MAX_FILE_BYTES: Final = 512 * 1024**2

_FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")


def load_image(source: ImageSource, *, rendering: Rendering = "mimic-cxr-jpg") -> LoadedImage:
    """Read one film.

    Transparent pixels become black: black is what a film shows outside its exposed field, and what somebody erased
    stays erased. (The reference drops the alpha channel, which brings back whatever colour lies under it; opaque
    images come out the same either way.) EXIF rotation is applied.

    Args:
        source: a path; the bytes of a file; a Pillow image; or an array. An array is a picture if it is uint8 (or
            bool: False black, True white), shaped [H, W], [H, W, 1] or [H, W, 3]. Any other integer or float array
            is stored values, [H, W] or [H, W, 1], higher = brighter, of any range, and is rendered as such, also if
            it happens to lie within 0..1. DICOM is known by its content or a .dcm name, and needs the `dicom` extra.
        rendering: how stored values are rendered. Pictures are kept whatever this says.

    Raises:
        ImageError: not a readable image; not a frontal film (a CT slice, a lateral view, several frames); larger
            than MAX_PIXELS, MAX_SIDE_PX or MAX_FILE_BYTES; an array of another shape or with NaN in it; a compressed
            DICOM whose decoder is not installed.
        BackendUnavailable: a DICOM file, and pydicom is not installed.
    """
    if rendering not in get_args(Rendering):
        raise refusal("rendering", repr(rendering), " or ".join(get_args(Rendering)), "pass one of these")
    if isinstance(source, np.ndarray):
        return _load_array(source, rendering)
    if isinstance(source, Image.Image):
        with decoding("<image>", "a readable Pillow image"):
            return _load_pillow(source, "<image>", rendering)
    name, data = _contents(source)
    if not data:
        raise refusal(name, "an empty file", FORMATS_TEXT, "copy or download the file again")
    if data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom")):
        return load_dicom(data, name, rendering)
    with decoding(name, "a whole image"):
        try:
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            do = "check that the file is an image; an image of another kind must be converted first"
            raise refusal(name, "a file that is no image, or one without pixels", FORMATS_TEXT, do) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise refusal(name, str(error), f"at most {MAX_PIXELS:,} pixels", "scale the film down first") from None
        with picture:
            return _load_pillow(picture, name, rendering)


def _contents(source: object) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", bytes(source)
    if isinstance(source, str | os.PathLike):
        return str(source), _read_file(Path(source))
    expected = "a path, bytes, a NumPy array or a Pillow image"
    raise refusal("<image>", f"a {type(source).__name__}", expected, "convert it to one of these")


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
            expected = f"at most {MAX_FILE_BYTES:,} bytes"
            raise refusal(name, f"{num_bytes:,} bytes", expected, "check the file: no single film is that large")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise refusal(name, f"{error}", "a readable file", "check its path and permissions") from error


def _load_array(array: NDArray[Any], rendering: Rendering) -> LoadedImage:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2
    colour = array.ndim == 3 and array.shape[2] == 3
    if not grey and not colour:
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3)
        do = "move the channels last: array.transpose(1, 2, 0)" if channels_first else "pass one film at a time"
        raise refusal("<array>", f"shape {list(array.shape)}", "[H, W], [H, W, 1] or [H, W, 3]", do)
    check_size("<array>", array.shape[1], array.shape[0])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
        return LoadedImage(image=picture, rendering="as-is", format="array")
    if colour:
        do = "scale it to 0..255 and convert it to uint8, or pass one channel"
        raise refusal("<array>", f"a colour array of {array.dtype}", "uint8 colour", do)
    picture, used = render(array, rendering, "<array>", monochrome1=False)
    return LoadedImage(image=picture, rendering=used, format="array")


def _load_pillow(picture: Image.Image, name: str, rendering: Rendering) -> LoadedImage:
    check_size(name, picture.width, picture.height)
    # A camera's MPO keeps a preview as a second picture; in every other format pages are images in their own right.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        got = f"{getattr(picture, 'n_frames', 1)} frames"
        raise refusal(name, got, "one film", "save the frame you mean as a file of its own")
    cut_to_8_bits = _is_16_bit_colour(picture)
    white_is_zero = _is_white_zero_tiff(picture)
    image_format = picture.format or "image"
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") or upright.mode == "F":
        rendered, used = render(np.asarray(upright), rendering, name, monochrome1=white_is_zero)
        return LoadedImage(image=rendered, rendering=used, format=image_format)
    used = "as-is"
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            used = "as-is, alpha over black"
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
        rgb = rgba.convert("RGB")
    else:
        rgb = upright.convert("RGB")
    if cut_to_8_bits:
        used += ", 16-bit colour cut to 8"
    return LoadedImage(image=rgb, rendering=used, format=image_format)


def _is_16_bit_colour(picture: Image.Image) -> bool:
    """Say whether the file has 16 bits a channel that Pillow, which has no such colour mode, cuts to 8."""
    tiles = getattr(picture, "tile", None) or ()
    return len(picture.getbands()) > 1 and any(";16" in str(tile[3]) for tile in tiles)


def _is_white_zero_tiff(picture: Image.Image) -> bool:
    """Say whether a TIFF stores white as 0. Pillow turns such 8-bit files round, but not deeper ones."""
    tags: dict[int, Any] = getattr(picture, "tag_v2", None) or {}
    return picture.mode.startswith("I") and tags.get(262) == 0
