"""Pictures and arrays: formats, modes, depths, and what is refused."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from made_films import film, grey, noise, png_of, rgb, saved
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image.files import load_image
from lite.image.rendering import mimic_cxr_jpg


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"])
def test_ordinary_modes_are_what_convert_rgb_gives(mode: str) -> None:
    picture = Image.fromarray(noise((12, 9, 3))).convert(mode)
    image_format = "PNG" if mode in ("1", "L", "P", "RGB", "RGBA", "LA") else "TIFF"
    data = saved(picture, image_format)
    for source in (data, picture):
        loaded = load_image(source)
        assert (rgb(loaded) == np.asarray(picture.convert("RGB"))).all()
        assert loaded.rendering == "as-is"
        assert loaded.size == (9, 12)
        assert loaded.film.view is None


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"])
def test_formats_are_read_from_paths_and_bytes_as_pillow_reads_them(tmp_path: Path, image_format: str) -> None:
    data = saved(Image.fromarray(noise((16, 24))), image_format)
    path = tmp_path / "film.image"
    path.write_bytes(data)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (path, str(path), data):
        loaded = load_image(source)
        assert (rgb(loaded) == wanted).all()
        assert loaded.film.format == image_format


def test_what_is_transparent_is_black_whatever_colour_lies_under_it() -> None:
    rgba = Image.new("RGBA", (3, 1), (200, 100, 50, 255))
    rgba.putpixel((1, 0), (255, 255, 255, 0))
    rgba.putpixel((2, 0), (200, 100, 50, 128))
    loaded = load_image(saved(rgba))
    assert rgb(loaded)[0].tolist() == [[200, 100, 50], [0, 0, 0], [100, 50, 25]]
    assert loaded.rendering == "as-is, alpha over black"

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 90, 90, 90])
    palette.putpixel((1, 0), 1)
    loaded = load_image(saved(palette, transparency=0))
    assert rgb(loaded)[0].tolist() == [[0, 0, 0], [90, 90, 90]]
    assert loaded.rendering == "as-is, alpha over black"

    grey_with_key = saved(Image.fromarray(np.array([[255, 80]], np.uint8)), transparency=255)
    assert grey(load_image(grey_with_key)).tolist() == [[0, 80]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied_once(orientation: int, image_format: str) -> None:
    # Bright upper left quarter: where must it be once the picture is upright?
    upright = np.zeros((32, 48), np.uint8)
    upright[:16, :24] = 255
    turn = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).T,
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = saved(Image.fromarray(np.ascontiguousarray(turn(upright))), image_format, exif=exif, **options)
    loaded = load_image(data)
    assert loaded.size == (48, 32)
    assert np.abs(grey(loaded).astype(int) - upright).max() <= (8 if image_format == "JPEG" else 0)
    # A result that is loaded again must not turn again.
    assert (grey(load_image(loaded.image)) == grey(loaded)).all()


def _sixteen_bit_sources(stored: NDArray[np.uint16]) -> dict[str, Any]:
    big_endian = saved(Image.fromarray(stored), "TIFF")
    return {
        "PNG": saved(Image.fromarray(stored)),
        "TIFF": big_endian,
        "TIFF, big-endian": saved(Image.frombytes("I;16B", stored.shape[::-1], stored.astype(">u2").tobytes()), "TIFF"),
        "TIFF, float": saved(Image.fromarray(stored.astype(np.float32)), "TIFF"),
        "mode I": Image.fromarray(stored.astype(np.int32)),
        "mode F": Image.fromarray(stored.astype(np.float32)),
        "uint16": stored,
        "int16": stored.astype(np.int16),
        "int64": stored.astype(np.int64),
        "float64": stored.astype(np.float64),
        "[H, W, 1]": stored[:, :, None],
        "not contiguous": np.repeat(stored, 2, axis=1)[:, ::2],
    }


@pytest.mark.parametrize("kind", sorted(_sixteen_bit_sources(film())))
def test_deep_grey_images_are_stored_values(kind: str) -> None:
    stored = film()
    source = _sixteen_bit_sources(stored)[kind]
    loaded = load_image(source)
    assert loaded.rendering == "mimic-cxr-jpg"
    assert (grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    linear = load_image(source, rendering="voi-lut")
    assert linear.rendering == "min-max"
    values = stored.astype(np.float64) - stored.min()
    assert (grey(linear) == (values / values.max() * 255).astype(np.uint8)).all()


def test_a_16_bit_tiff_with_white_at_zero_is_inverted() -> None:
    stored = film()
    data = saved(Image.fromarray(stored), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert (grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=True)).all()


def _deep_colour_sources(stored: NDArray[np.uint16]) -> dict[str, Any]:
    """Put a grey film into colour files of 16 bits: PNG with and without alpha, TIFF of either order, PPM, an array."""
    height, width = stored.shape
    alpha = np.full_like(stored, 65535)

    def png(colour_type: int, *channels: NDArray[np.uint16]) -> bytes:
        rows = np.stack(channels, axis=2).astype(">u2").reshape(height, -1)
        return png_of(width, height, b"".join(b"\0" + row.tobytes() for row in rows), depth=16, colour_type=colour_type)

    cv2 = pytest.importorskip("cv2")
    return {
        "PNG": png(2, stored, stored, stored),
        "PNG with alpha": png(6, stored, stored, stored, alpha),
        "PNG, grey with alpha": png(4, stored, alpha),
        "PNG, filtered": cv2.imencode(".png", np.stack([stored] * 3, -1))[1].tobytes(),
        "TIFF": _tiff("<", stored),
        "TIFF, big-endian": _tiff(">", stored),
        "TIFF, LZW": cv2.imencode(".tif", np.stack([stored] * 3, -1))[1].tobytes(),
        "PPM": b"P6 %d %d 65535\n" % (width, height) + np.stack([stored] * 3, -1).astype(">u2").tobytes(),
        "array": np.stack([stored] * 3, axis=2),
    }


def _tiff(order: str, stored: NDArray[np.uint16]) -> bytes:
    """Write a plain colour TIFF of 16 bits."""
    data = np.stack([stored] * 3, axis=2).astype(f"{order}u2").tobytes()
    height, width = stored.shape
    shorts = {256: width, 257: height, 259: 1, 262: 2, 277: 3, 278: height, 284: 1}
    entries = [(tag, 3, 1, struct.pack(f"{order}HH", value, 0)) for tag, value in shorts.items()]
    bits_at, data_at = 8, 14
    entries += [(258, 3, 3, struct.pack(f"{order}I", bits_at)), (273, 4, 1, struct.pack(f"{order}I", data_at))]
    entries += [(279, 4, 1, struct.pack(f"{order}I", len(data)))]
    body = struct.pack(f"{order}HHH", 16, 16, 16) + data
    table = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return header + body + struct.pack(f"{order}H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize("kind", sorted(_deep_colour_sources(film())))
def test_a_grey_film_in_deep_colour_is_the_same_film(kind: str) -> None:
    stored = film()
    source = _deep_colour_sources(stored)[kind]
    loaded = load_image(source)
    assert loaded.rendering == "mimic-cxr-jpg"
    assert (grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    assert loaded.film.remarks == ()
    if isinstance(source, bytes):  # a picture that a caller has opened, and not read yet
        assert (grey(load_image(Image.open(io.BytesIO(source)))) == grey(loaded)).all()


def test_deep_colours_become_grey_and_what_is_transparent_is_left_out_of_the_scale() -> None:
    stored = film()
    half = (stored // 2).astype(np.uint16)
    loaded = load_image(np.stack([stored, half, half], axis=2))
    assert loaded.film.remarks == ("deep colours were made grey",)
    wanted = np.rint(0.299 * stored + 0.587 * half + 0.114 * half).astype(np.uint16)
    assert (grey(loaded) == mimic_cxr_jpg(wanted, monochrome1=False)).all()

    alpha = np.full_like(stored, 65535)
    alpha[:5] = 0
    white = stored.copy()
    white[:5] = 65535
    rows = np.stack([white, alpha], axis=2).astype(">u2").reshape(len(stored), -1)
    source = png_of(
        stored.shape[1], len(stored), b"".join(b"\0" + row.tobytes() for row in rows), depth=16, colour_type=4
    )
    loaded = load_image(source)
    white[:5] = white[5:].min()
    assert (grey(loaded) == mimic_cxr_jpg(white, monochrome1=False)).all()
    assert loaded.film.remarks[0].startswith("transparent in 12.5% of the film")


def test_arrays_of_8_bits_are_pictures() -> None:
    values, colour = noise((6, 5)), noise((6, 5, 3))
    assert (grey(load_image(values)) == values).all()
    assert (grey(load_image(values[:, :, None])) == values).all()
    assert (rgb(load_image(colour)) == colour).all()
    assert (rgb(load_image(colour[:, ::-1])) == colour[:, ::-1]).all()
    assert (grey(load_image(values > 127)) == np.where(values > 127, 255, 0)).all()
    loaded = load_image(values)
    assert (loaded.rendering, loaded.film.format) == ("as-is", "array")


def test_a_film_is_read_while_another_thread_imports_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds the module then finds nothing in it yet."""
    monkeypatch.setitem(sys.modules, "pydicom", ModuleType("pydicom"))
    assert load_image(saved(Image.fromarray(noise((12, 9))), "PNG")).size == (9, 12)


def test_the_source_is_left_alone() -> None:
    stored, picture = film(), Image.fromarray(noise((6, 5, 3)))
    before, pixels = stored.copy(), np.array(picture)
    load_image(stored)
    mimic_cxr_jpg(stored, monochrome1=True)
    loaded = load_image(picture)
    loaded.image.putpixel((0, 0), (1, 2, 3))
    assert (stored == before).all()
    assert (np.asarray(picture) == pixels).all()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\].*array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 8), np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \[8, 8, 4\].*\[H, W, 3\]"),
        (np.zeros((8,), np.uint8), r"shape \[8\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one film at a time"),
        (np.zeros((8, 0), np.uint8), "0 x 8 px.*at least one pixel"),
        (np.zeros((8, 8, 3), np.float32), "colour array of float32.*integers"),
        (np.full((8, 8), np.nan), "NaN or infinity in 64 of 64"),
        (np.full((8, 8), np.inf, np.float32), "NaN or infinity"),
        (np.full((8, 8), "a"), "values of type <U1"),
        (np.full((8, 8), None), "values of type object"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000)), "10000 x 10000 px.*at most 80,000,000 pixels"),
        (np.zeros((1, 30_001), np.uint8), "30,000 px a side"),
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(array: NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(array)
