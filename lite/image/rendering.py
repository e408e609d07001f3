"""Stored values become grey levels: the way of the training films, or by the window of the file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError, LiteError

if TYPE_CHECKING:
    from lite.image.film import Rendering

MAX_PIXELS: Final = 80_000_000
"""Most pixels of a film, and of a film after resizing. The largest detectors have 18 million; Pillow warns at 89."""
FORMATS_TEXT: Final = "PNG, JPEG, TIFF, BMP, WebP or DICOM"
MAX_SIDE_PX: Final = 30_000
_JPEG_QUALITY: Final = 95


def mimic_cxr_jpg(stored: NDArray[Any], *, monochrome1: bool) -> NDArray[np.uint8]:
    """Render stored values like the films of MIMIC-CXR-JPG.

    Subtract the minimum, divide by the maximum, times 255, truncate to 8 bits; invert where MONOCHROME1; equalise the
    histogram; JPEG of quality 95 and back (by Pillow's libjpeg, baseline, greyscale). A film of one single value is
    black (white where MONOCHROME1).

    Args:
        stored: integers or finite floats [H, W], with unused high bits already masked.
        monochrome1: high stored values are dark (DICOM's MONOCHROME1).

    Returns:
        uint8 [H, W].

    Raises:
        ImageError: another shape, another dtype, no pixels, or values that are not finite.

    Source: Johnson et al., MIMIC-CXR-JPG (arXiv:1901.07042), section "JPG conversion".
    """
    check_stored(stored, "<array>")
    picture = min_max(stored)
    if monochrome1:
        picture = 255 - picture
    return _jpeg_round_trip(equalize_hist(picture))


def equalize_hist(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Equalise a histogram by OpenCV's definition, to the bit.

    The darkest level present becomes 0, the brightest 255, and each level in between the share of pixels at or
    below it, not counting the darkest ones. The scale is a float32 and halves round to even, as in OpenCV. An image
    of one level stays as it is.

    Args:
        image: uint8 of any shape, at least one pixel.

    Returns:
        uint8, same shape.

    Source: OpenCV, modules/imgproc/src/histogram.cpp, equalizeHist.
    """
    counts = np.bincount(image.ravel(), minlength=256)
    darkest = int(np.flatnonzero(counts)[0])
    rest = image.size - int(counts[darkest])
    if rest == 0:
        return image.copy()
    scale = np.float32(255) / np.float32(rest)
    counts[darkest] = 0
    at_or_below = np.cumsum(counts).astype(np.float32)
    levels = np.rint(at_or_below * scale).clip(0, 255).astype(np.uint8)
    return cast("NDArray[np.uint8]", levels[image])


def refusal(name: str, got: str, expected: str, do: str) -> ImageError:
    """Say what is wrong with a film."""
    return ImageError(f"{name}: got {got} · expected {expected} · {do}")


@contextlib.contextmanager
def decoding(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged file into one ImageError that names the file.

    Decoders meet hostile bytes, and raise nearly everything: OSError, SyntaxError, struct.error, KeyError,
    RecursionError. Errors of our own pass through untouched.
    """
    try:
        yield
    except LiteError:
        raise
    except Exception as error:
        do = "copy or download it again, or convert it to PNG"
        raise refusal(name, "a damaged or truncated file", expected, do) from error


def check_size(name: str, width: int, height: int) -> None:
    """Refuse a film of no pixels, or of too many, before any is decoded."""
    if width < 1 or height < 1:
        raise refusal(name, f"{width} x {height} px", "at least one pixel", "check how the image was made")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        expected = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE_PX:,} px a side"
        got = f"{width} x {height} px"
        raise refusal(name, got, expected, "scale the film down first; nothing was decoded")


def check_stored(stored: NDArray[Any], name: str) -> None:
    """Refuse what is not one grey film of finite numbers."""
    if stored.ndim != 2:
        raise refusal(name, f"shape {list(stored.shape)}", "[H, W]", "pass one film at a time, without channels")
    check_size(name, stored.shape[1], stored.shape[0])
    if stored.dtype.kind not in "uif":
        do = "convert the values to integers or floats"
        raise refusal(name, f"values of type {stored.dtype}", "integers or floats", do)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        bad = int(stored.size - np.isfinite(stored).sum())
        raise refusal(name, f"NaN or infinity in {bad:,} of {stored.size:,} pixels", "finite values", "replace them")


def grey_of(colours: NDArray[Any]) -> tuple[NDArray[Any], list[str]]:
    """Make grey of colours that are deeper than 8 bits, and so stored values like any others.

    Args:
        colours: integers [H, W, 3]; three equal channels are a grey film in a colour file.

    Returns:
        The grey values [H, W], and a remark where there were colours.
    """
    red, green, blue = (colours[:, :, channel] for channel in range(3))
    if (red == green).all() and (red == blue).all():
        return red, []
    grey = np.rint(0.299 * red + 0.587 * green + 0.114 * blue).astype(colours.dtype)
    return grey, ["deep colours were made grey"]


def render(stored: NDArray[Any], rendering: Rendering, name: str, *, monochrome1: bool) -> tuple[Image.Image, str]:
    """Render stored values that come without a window of their own."""
    check_stored(stored, name)
    if rendering == "mimic-cxr-jpg":
        return Image.fromarray(mimic_cxr_jpg(stored, monochrome1=monochrome1)).convert("RGB"), "mimic-cxr-jpg"
    picture = min_max(stored)
    return Image.fromarray(255 - picture if monochrome1 else picture).convert("RGB"), "min-max"


def min_max(stored: NDArray[Any]) -> NDArray[np.uint8]:
    """Spread values over 0..255: (value - minimum) / maximum of that * 255, in float64, truncated; a constant is 0."""
    low, high = stored.min(), stored.max()
    if stored.dtype.kind in "ui":
        # Python's integers: a span of int64 does not fit an int64.
        low, span = int(low), int(high) - int(low)
        if span < 1 << 16:
            # One division per value that can occur, rather than one per pixel; the result is the same.
            levels = (np.arange(span + 1, dtype=np.float64) / max(span, 1) * 255).astype(np.uint8)
            # 65535 above the minimum fits every integer type but the 8- and 16-bit ones.
            wide = stored.astype(np.int32) if stored.dtype.itemsize < 4 else stored
            return levels[wide - wide.dtype.type(low)]
        shifted = stored.astype(np.float64) - float(low)
    else:
        # Halved first, because the span of float64 need not fit a float64; min-max does not see the factor.
        values = stored.astype(np.float64) / 2
        shifted = values - values.min()
    top = shifted.max()
    if top == 0:
        return np.zeros(stored.shape, np.uint8)
    shifted /= top
    shifted *= 255
    return shifted.astype(np.uint8)


def _jpeg_round_trip(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        return np.array(decoded)
