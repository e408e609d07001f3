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

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lite.errors import BackendUnavailable, ImageError, LiteError

if TYPE_CHECKING:
    from lite.config import Preprocessing

Rendering = Literal["mimic-cxr-jpg", "voi-lut"]
"""What a caller can ask for; `LoadedImage.rendering` says what was done."""

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | NDArray[Any] | Image.Image"

MAX_PIXELS: Final = 80_000_000
"""Most pixels of a film, and of a film after resizing. The largest detectors have 18 million; Pillow warns at 89."""
MAX_SIDE_PX: Final = 30_000
MAX_FILE_BYTES: Final = 512 * 1024**2

_FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
_FORMATS_TEXT: Final = "PNG, JPEG, TIFF, BMP, WebP or DICOM"
_JPEG_QUALITY: Final = 95
_DICOM_EXTRA: Final = 'pip install "llava-rad-lite[dicom]"'

# DICOM says what took the picture. What is not listed (CR, DX, secondary captures, nothing at all) may be a film.
_OTHER_MODALITIES: Final = {
    "CT": "a CT slice",
    "MR": "an MR slice",
    "PT": "a PET slice",
    "NM": "a nuclear medicine image",
    "US": "an ultrasound image",
    "IVUS": "an ultrasound image",
    "MG": "a mammogram",
    "XA": "an angiogram",
    "IO": "a dental film",
    "PX": "a panoramic dental film",
    "BMD": "a bone densitometry image",
    "ES": "an endoscopy image",
    "GM": "a microscopy image",
    "SM": "a microscopy image",
    "OP": "an ophthalmic photograph",
    "OPT": "an ophthalmic tomogram",
    "XC": "a photograph",
    "ECG": "an electrocardiogram",
    "SEG": "a segmentation",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "a key object note",
    "DOC": "a document",
    "RTIMAGE": "a radiotherapy image",
    "RTDOSE": "a radiotherapy dose grid",
    "RTSTRUCT": "a radiotherapy structure set",
    "RTPLAN": "a radiotherapy plan",
}
_OTHER_SOP_CLASSES: Final = {
    "1.2.840.10008.5.1.4.1.1.1.2": "MG",
    "1.2.840.10008.5.1.4.1.1.1.2.1": "MG",
    "1.2.840.10008.5.1.4.1.1.1.3": "IO",
    "1.2.840.10008.5.1.4.1.1.1.3.1": "IO",
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.3.1": "US",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.3": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
    "1.2.840.10008.5.1.4.1.1.6.1": "US",
    "1.2.840.10008.5.1.4.1.1.6.2": "US",
    "1.2.840.10008.5.1.4.1.1.12.1": "XA",
    "1.2.840.10008.5.1.4.1.1.12.1.1": "XA",
    "1.2.840.10008.5.1.4.1.1.13.1.3": "MG",
    "1.2.840.10008.5.1.4.1.1.20": "NM",
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.104.1": "DOC",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
    "1.2.840.10008.5.1.4.1.1.481.1": "RTIMAGE",
    "1.2.840.10008.5.1.4.1.1.481.2": "RTDOSE",
}
_OBLIQUE_VIEWS: Final = frozenset({"LAO", "RAO", "LPO", "RPO", "LLO", "RLO"})
_DEFLATED: Final = "1.2.840.10008.1.2.1.99"
_GREY: Final = ("MONOCHROME1", "MONOCHROME2")
_COLOUR: Final = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedImage:
    """A film as an 8-bit RGB picture, and how it came to be one.

    `rendering` is a name of the table in this module's docstring, with a remark after a comma where something was
    lost on the way: "as-is, alpha over black", "as-is, 16-bit colour cut to 8". `view` is DICOM's ViewPosition in
    capitals ("AP", "PA"), None where the file does not say. `format` is "DICOM", "array", or Pillow's name
    ("PNG", "JPEG"; "image" for one made in memory).
    """

    image: Image.Image
    rendering: str
    format: str
    view: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, after any EXIF rotation."""
        return self.image.size


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
        raise _refusal("rendering", repr(rendering), " or ".join(get_args(Rendering)), "pass one of these")
    if isinstance(source, np.ndarray):
        return _load_array(source, rendering)
    if isinstance(source, Image.Image):
        with _decoding("<image>", "a readable Pillow image"):
            return _load_pillow(source, "<image>", rendering)
    name, data = _contents(source)
    if not data:
        raise _refusal(name, "an empty file", _FORMATS_TEXT, "copy or download the file again")
    if data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom")):
        return _load_dicom(data, name, rendering)
    with _decoding(name, "a whole image"):
        try:
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError:
            do = "check that the file is an image; an image of another kind must be converted first"
            raise _refusal(name, "a file that is no image, or one without pixels", _FORMATS_TEXT, do) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _refusal(name, str(error), f"at most {MAX_PIXELS:,} pixels", "scale the film down first") from None
        with picture:
            return _load_pillow(picture, name, rendering)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn a film into the pixel_values of one study: resize, centre crop, scale, normalise.

    Exactly open_clip 2.23's evaluation transform: shortest edge to image_size with Pillow's antialiased bicubic, the
    long one to int(image_size * long / short); a centred square, at round((long - image_size) / 2), which rounds
    halves to even; then (x / 255 - mean) / std. Since a byte has 256 values, the last step is a table, computed in
    float64 and rounded once. (torchvision's crop pads images smaller than the square; after this resize none is.)

    Args:
        image: an RGB image; one of another mode goes through `load_image` first.
        preprocessing: image_size in pixels, and the mean and std of each channel on a 0..1 scale.

    Returns:
        float32 [3, image_size, image_size].

    Raises:
        ImageError: zero-size, or so long and thin that the resized image would pass MAX_PIXELS.
    """
    if image.mode != "RGB":
        image = load_image(image).image
    _check_size("<image>", image.width, image.height)
    square = preprocessing.image_size
    short, long = sorted(image.size)
    resized_long = int(square * long / short)
    if square * resized_long > MAX_PIXELS:
        got = f"{image.width} x {image.height} px, {square * resized_long:,} pixels once resized"
        raise _refusal("<image>", got, f"at most {MAX_PIXELS:,}", "crop it: a film is not that long and thin")
    wide = image.width >= image.height
    width, height = (resized_long, square) if wide else (square, resized_long)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - square) / 2), round((height - square) / 2)
    pixels = np.asarray(resized.crop((left, top, left + square, top + square)))
    levels = np.arange(256, dtype=np.float64)[None, :] / 255
    mean, std = (np.asarray(values, dtype=np.float64)[:, None] for values in (preprocessing.mean, preprocessing.std))
    table = ((levels - mean) / std).astype(np.float32)
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])


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
    _check_stored(stored, "<array>")
    picture = _min_max(stored)
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


# -- files, arrays, Pillow -------------------------------------------------------------------------------------------


def _refusal(name: str, got: str, expected: str, do: str) -> ImageError:
    return ImageError(f"{name}: got {got} · expected {expected} · {do}")


@contextlib.contextmanager
def _decoding(name: str, expected: str) -> Iterator[None]:
    """Turn whatever a decoder raises on a damaged file into one ImageError that names the file.

    Decoders meet hostile bytes, and raise nearly everything: OSError, SyntaxError, struct.error, KeyError,
    RecursionError. Errors of our own pass through untouched.
    """
    try:
        yield
    except LiteError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        got = f"a damaged or truncated file ({type(error).__name__}: {text})"
        raise _refusal(name, got, expected, "copy or download it again, or convert it to PNG") from error


def _contents(source: object) -> tuple[str, bytes]:
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", bytes(source)
    if isinstance(source, str | os.PathLike):
        return str(source), _read_file(Path(source))
    expected = "a path, bytes, a NumPy array or a Pillow image"
    raise _refusal("<image>", f"a {type(source).__name__}", expected, "convert it to one of these")


def _read_file(path: Path) -> bytes:
    name = str(path)
    try:
        if path.is_dir():
            raise _refusal(name, "a directory", "an image file", "name the files in it one by one")
        if not path.exists():
            raise _refusal(name, "no such file", "an image file", "check the path (addresses are not fetched)")
        if not path.is_file():
            raise _refusal(name, "a device or a pipe", "an image file", "save it to a file first")
        if (num_bytes := path.stat().st_size) > MAX_FILE_BYTES:
            expected = f"at most {MAX_FILE_BYTES:,} bytes"
            raise _refusal(name, f"{num_bytes:,} bytes", expected, "check the file: no single film is that large")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise _refusal(name, f"{error}", "a readable file", "check its path and permissions") from error


def _check_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise _refusal(name, f"{width} x {height} px", "at least one pixel", "check how the image was made")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        expected = f"at most {MAX_PIXELS:,} pixels and {MAX_SIDE_PX:,} px a side"
        got = f"{width} x {height} px"
        raise _refusal(name, got, expected, "scale the film down first; nothing was decoded")


def _load_array(array: NDArray[Any], rendering: Rendering) -> LoadedImage:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    grey = array.ndim == 2
    colour = array.ndim == 3 and array.shape[2] == 3
    if not grey and not colour:
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3)
        do = "move the channels last: array.transpose(1, 2, 0)" if channels_first else "pass one film at a time"
        raise _refusal("<array>", f"shape {list(array.shape)}", "[H, W], [H, W, 1] or [H, W, 3]", do)
    _check_size("<array>", array.shape[1], array.shape[0])
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
        return LoadedImage(image=picture, rendering="as-is", format="array")
    if colour:
        do = "scale it to 0..255 and convert it to uint8, or pass one channel"
        raise _refusal("<array>", f"a colour array of {array.dtype}", "uint8 colour", do)
    picture, used = _render(array, rendering, "<array>", monochrome1=False)
    return LoadedImage(image=picture, rendering=used, format="array")


def _load_pillow(picture: Image.Image, name: str, rendering: Rendering) -> LoadedImage:
    _check_size(name, picture.width, picture.height)
    # A camera's MPO keeps a preview as a second picture; in every other format pages are images in their own right.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        got = f"{getattr(picture, 'n_frames', 1)} frames"
        raise _refusal(name, got, "one film", "save the frame you mean as a file of its own")
    cut_to_8_bits = _is_16_bit_colour(picture)
    white_is_zero = _is_white_zero_tiff(picture)
    image_format = picture.format or "image"
    picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") or upright.mode == "F":
        rendered, used = _render(np.asarray(upright), rendering, name, monochrome1=white_is_zero)
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


# -- rendering stored values -----------------------------------------------------------------------------------------


def _check_stored(stored: NDArray[Any], name: str) -> None:
    if stored.ndim != 2:
        raise _refusal(name, f"shape {list(stored.shape)}", "[H, W]", "pass one film at a time, without channels")
    _check_size(name, stored.shape[1], stored.shape[0])
    if stored.dtype.kind not in "uif":
        do = "convert the values to integers or floats"
        raise _refusal(name, f"values of type {stored.dtype}", "integers or floats", do)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        bad = int(stored.size - np.isfinite(stored).sum())
        raise _refusal(name, f"NaN or infinity in {bad:,} of {stored.size:,} pixels", "finite values", "replace them")


def _render(stored: NDArray[Any], rendering: Rendering, name: str, *, monochrome1: bool) -> tuple[Image.Image, str]:
    """Render stored values that come without a window of their own."""
    _check_stored(stored, name)
    if rendering == "mimic-cxr-jpg":
        return Image.fromarray(mimic_cxr_jpg(stored, monochrome1=monochrome1)).convert("RGB"), "mimic-cxr-jpg"
    picture = _min_max(stored)
    return Image.fromarray(255 - picture if monochrome1 else picture).convert("RGB"), "min-max"


def _min_max(stored: NDArray[Any]) -> NDArray[np.uint8]:
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


# -- DICOM -----------------------------------------------------------------------------------------------------------


def _load_dicom(data: bytes, name: str, rendering: Rendering) -> LoadedImage:
    try:
        import pydicom
    except ImportError as error:
        msg = f"{name}: got a DICOM file and no pydicom · expected pydicom · {_DICOM_EXTRA}"
        raise BackendUnavailable(msg) from error
    with _decoding(name, "a whole DICOM file"):
        # pydicom inflates such a file before anyone can ask how large it is.
        if _DEFLATED.encode() in data:
            raise _refusal(name, "a deflated DICOM file", "any other transfer syntax", "inflate it: dcmconv +te IN OUT")
        has_magic = data[128:132] == b"DICM"
        dataset = pydicom.dcmread(io.BytesIO(data), force=not has_magic)
        if not has_magic and "Rows" not in dataset and "SOPClassUID" not in dataset:
            raise _refusal(name, "a .dcm file that is not DICOM", _FORMATS_TEXT, "check what the file is")
        view = _check_film(dataset, name)
        return _render_dicom(dataset, name, rendering, view)


def _check_film(dataset: Any, name: str) -> str | None:  # noqa: ANN401 - pydicom is imported only where it is needed
    """Refuse, by its header, what is not one frontal film; return the view."""
    frontal = "a frontal chest film (CR or DX)"
    modality = str(dataset.get("Modality") or "").strip().upper()
    by_class = _OTHER_SOP_CLASSES.get(str(dataset.get("SOPClassUID") or "").strip(), "")
    other = modality if modality in _OTHER_MODALITIES else by_class
    if other:
        got = f"{_OTHER_MODALITIES[other]} (modality {modality or 'absent'})"
        raise _refusal(name, got, frontal, "pass a film of the chest; LLaVA-Rad reads nothing else")
    view = _view(dataset)
    if view and _is_not_frontal(view):
        do = "pass the PA or AP film of the study; LLaVA-Rad was trained on frontal films only"
        raise _refusal(name, f"a view that is not frontal ({view})", frontal, do)
    if (frames := int(dataset.get("NumberOfFrames") or 1)) > 1:
        raise _refusal(name, f"{frames} frames", "one film", "save the frame you mean as a file of its own")
    if "PixelData" not in dataset:
        got = "a DICOM file without pixel data"
        raise _refusal(name, got, "a film", "pass the image itself, not its report, index or header")
    for keyword in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"):
        if dataset.get(keyword) in (None, ""):
            raise _refusal(name, f"a DICOM file without {keyword}", "a complete header", "export the film again")
    _check_size(name, int(dataset.Columns), int(dataset.Rows))
    return view


def _view(dataset: Any) -> str | None:  # noqa: ANN401 - see _check_film
    if view := str(dataset.get("ViewPosition") or "").strip().upper():
        return view
    codes = dataset.get("ViewCodeSequence") or []
    meaning = str(codes[0].get("CodeMeaning") or "").strip().lower() if len(codes) else ""
    return {"antero-posterior": "AP", "postero-anterior": "PA"}.get(meaning, meaning.upper() or None)


def _is_not_frontal(view: str) -> bool:
    # A decubitus film (LLD, RLD) is taken from the front, of a patient who lies on one side.
    lateral = view in ("LL", "RL") or ("LAT" in view and "DECUB" not in view)
    return lateral or view in _OBLIQUE_VIEWS or "OBLIQUE" in view


def _render_dicom(
    dataset: Any,  # noqa: ANN401 - see _check_film
    name: str,
    rendering: Rendering,
    view: str | None,
) -> LoadedImage:
    photometric = str(dataset.PhotometricInterpretation).strip().upper()
    if photometric not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        do = "convert the film to MONOCHROME2 (dcmconv, dcmdjpeg) or to PNG"
        raise _refusal(name, f"photometric interpretation {photometric}", "MONOCHROME1 or MONOCHROME2", do)
    pixels = _stored_values(dataset, name)
    if photometric == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
    grey = photometric in _GREY
    size = (int(dataset.Rows), int(dataset.Columns))
    if pixels.shape != (size if grey else (*size, 3)):
        got = f"pixel data of shape {list(pixels.shape)}"
        raise _refusal(name, got, f"the header's {size[0]} rows and {size[1]} columns", "export the film again")
    if not grey:
        if pixels.dtype != np.uint8:
            do = "convert it to 8 bits a channel"
            raise _refusal(name, f"a colour DICOM of {pixels.dtype}", "8 bits a channel", do)
        return LoadedImage(image=Image.fromarray(pixels), rendering="as-is", format="DICOM", view=view)
    monochrome1 = photometric == "MONOCHROME1"
    if rendering == "mimic-cxr-jpg":
        picture, used = _render(pixels, rendering, name, monochrome1=monochrome1)
    else:
        picture, used = _render_voi(pixels, dataset, name, monochrome1=monochrome1)
    return LoadedImage(image=picture, rendering=used, format="DICOM", view=view)


def _stored_values(dataset: Any, name: str) -> NDArray[Any]:  # noqa: ANN401 - see _check_film
    """Decode the pixels, unused high bits masked (signed values sign-extended), colours turned into RGB.

    Bits above BitsStored may hold an old-style overlay or noise; left in, they would own the maximum and blacken the
    film. pydicom masks them, but takes the stored bits to be the lowest ones; HighBit says where they really are.
    """
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
    if not syntax:
        implicit, little = dataset.original_encoding
        native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else native
        dataset.file_meta.TransferSyntaxUID = syntax
    if syntax.is_compressed:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            do = "convert it to an uncompressed or JPEG 2000 DICOM, or to PNG"
            raise _refusal(name, f"transfer syntax {syntax.name}", "one that pydicom reads", do) from None
        if not available:
            do = f"{_DICOM_EXTRA}, or decompress it (dcmdjpeg, gdcmconv --raw)"
            raise _refusal(name, f"{syntax.name} pixel data", "an installed decoder for it", do)
        try:
            return pixel_array(dataset)
        except RuntimeError as error:
            if "does not support" not in str(error):
                raise
            do = "decompress it first (dcmdjpeg IN OUT)"
            raise _refusal(name, f"{syntax.name} pixel data of this depth", "a decoder for it", do) from error
    allocated, stored = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high_bit = int(dataset.get("HighBit") or stored - 1)
    if high_bit == stored - 1 or not stored <= high_bit + 1 <= allocated:
        return pixel_array(dataset)
    raw = np.array(pixel_array(dataset, correct_unused_bits=False))
    return (raw << (allocated - 1 - high_bit)) >> (allocated - stored)


def _render_voi(
    stored: NDArray[Any],
    dataset: Any,  # noqa: ANN401 - see _check_film
    name: str,
    *,
    monochrome1: bool,
) -> tuple[Image.Image, str]:
    """Render as a viewer first shows the film: rescale to modality units, then the first VOI LUT or window.

    Source: DICOM PS3.3 C.11.2.1.2 (LINEAR, LINEAR_EXACT and SIGMOID windows).
    """
    from pydicom.pixels.processing import apply_modality_lut

    values = np.asarray(apply_modality_lut(stored, dataset))
    used = "voi-lut"
    if dataset.get("VOILUTSequence"):
        shown = _looked_up(values, dataset.VOILUTSequence[0], dataset.original_encoding[1])
    elif (window := _first_window(dataset)) is not None:
        shown = _windowed(values.astype(np.float64), *window, name)
    else:
        used = "min-max"
        _check_stored(values, name)
        shown = _min_max(values) / 255
    if monochrome1:
        shown = 1 - shown
    picture = np.rint(shown.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(picture).convert("RGB"), used


def _looked_up(values: NDArray[Any], item: Any, little_endian: bool) -> NDArray[np.float64]:  # noqa: ANN401
    """Map values through one item of a VOI LUT sequence, to 0..1.

    pydicom 3.0's apply_voi keeps the index in the type of the entries, so that an 8-bit table wraps around at 256.
    """
    num_entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = item.LUTData
    if isinstance(entries, bytes):
        two_bytes = np.dtype("<u2" if little_endian else ">u2")
        entries = np.frombuffer(entries, np.uint8 if len(entries) <= num_entries + 1 else two_bytes)
    table = np.asarray(entries, dtype=np.float64)[: num_entries or 1 << 16] / ((1 << bits) - 1)
    return table[np.clip(values.astype(np.int64) - first, 0, len(table) - 1)]


def _first_window(dataset: Any) -> tuple[float, float, str] | None:  # noqa: ANN401 - see _check_film
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre in (None, "") or width in (None, ""):
        return None
    # Several windows make a list; the first is the one to show.
    first_centre, first_width = (float(v[0]) if isinstance(v, Sequence) else float(v) for v in (centre, width))
    return first_centre, first_width, str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()


def _windowed(
    values: NDArray[np.float64], centre: float, width: float, function: str, name: str
) -> NDArray[np.float64]:
    """Map a window to 0..1."""
    narrowest = 1 if function == "LINEAR" else 0
    if not (np.isfinite(centre) and np.isfinite(width) and width >= narrowest and width > 0):
        got = f"window centre {centre}, width {width} ({function})"
        raise _refusal(name, got, "a window of some width", 'use rendering="mimic-cxr-jpg", which needs none')
    if function == "LINEAR":
        if width == 1:
            return (values > centre - 0.5).astype(np.float64)
        return (values - (centre - 0.5)) / (width - 1) + 0.5
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    if function == "SIGMOID":
        return cast("NDArray[np.float64]", 1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700))))
    do = 'use rendering="mimic-cxr-jpg", which needs none'
    raise _refusal(name, f"VOI LUT function {function}", "LINEAR, LINEAR_EXACT or SIGMOID", do)
