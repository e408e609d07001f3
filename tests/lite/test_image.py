from __future__ import annotations

import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Preprocessing
from lite.errors import BackendUnavailable, ImageError
from lite.image import files as image_module
from lite.image import rendering as rendering_module
from lite.image.files import load_image
from lite.image.preprocess import preprocess
from lite.image.rendering import LoadedImage, equalize_hist, mimic_cxr_jpg

CLIP_112 = Preprocessing(image_size=112)
FINE = "1.2.840.10008.1.2.4."  # the JPEG family of transfer syntaxes

RECORDED_ROWS = [58, 82, 106, 130, 154, 178, 202, 231]
RECORDED_COLUMNS = [13, 44, 77, 110, 142, 175, 208, 239]
RECORDED_PRODUCTS = [51, 168, 99, 147, 117, 130, 129, 119]


def _noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _film(height: int = 40, width: int = 30, *, top: int = 4095) -> NDArray[np.uint16]:
    """Stored values with a slope and noise, minimum above 0 and maximum below `top`."""
    rng = np.random.default_rng(7)
    slope = np.linspace(0.1, 0.8, height)[:, None] + np.linspace(0, 0.1, width)
    return (top * (slope + 0.02 * rng.random((height, width)))).astype(np.uint16)


def _rgb(loaded: LoadedImage) -> NDArray[np.uint8]:
    assert loaded.image.mode == "RGB"
    return np.asarray(loaded.image)


def _grey(loaded: LoadedImage) -> NDArray[np.uint8]:
    pixels = _rgb(loaded)
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all()
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    return pixels[:, :, 0]


def _saved(picture: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


# -- preprocess ------------------------------------------------------------------------------------------------------


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _resize_axis(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    """Resample axis 0 with an antialiased bicubic in 22-bit fixed point, written from the definition."""
    old = pixels.shape[0]
    if size == old:
        return pixels
    scale = old / size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size):
        centre, reach = (i + 0.5) * scale, 2 * stretch
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
        weights = [_bicubic((k - centre + 0.5) / stretch) for k in range(first, last)]
        total = sum(weights)
        fixed = [math.trunc(w / total * (1 << 22) + math.copysign(0.5, w)) for w in weights]
        window = pixels[first:last].astype(np.int64)
        row = sum((w * line for w, line in zip(fixed, window, strict=True)), np.full(window.shape[1:], 1 << 21))
        rows.append(np.clip(row >> 22, 0, 255))
    return np.stack(rows)


def _reference_crop(pixels: NDArray[np.uint8], size: int) -> NDArray[Any]:
    """Resize and crop [H, W, 3] without Pillow: columns first, then rows, the middle square."""
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    new_height, new_width = (size, new_long) if height <= width else (new_long, size)
    by_columns = _resize_axis(pixels.swapaxes(0, 1), new_width).swapaxes(0, 1)
    resized = _resize_axis(by_columns, new_height)
    top, left = round((new_height - size) / 2.0), round((new_width - size) / 2.0)
    return resized[top : top + size, left : left + size]


SIZES = [
    (28, 28), (56, 56), (29, 28), (28, 29), (28, 31), (31, 28), (61, 37), (37, 61), (200, 100), (101, 333), (37, 50),
    (50, 37), (1, 1), (1, 50), (50, 1), (2, 3), (3, 2), (27, 28), (97, 97),
]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_preprocess_equals_a_derivation_from_the_definitions(height: int, width: int) -> None:
    settings = Preprocessing(image_size=28)
    pixels = _noise((height, width, 3), seed=height * 1000 + width)
    got = preprocess(Image.fromarray(pixels), settings)
    mean, std = np.array(OPENAI_CLIP_MEAN), np.array(OPENAI_CLIP_STD)
    wanted = (_reference_crop(pixels, 28) / 255.0 - mean) / std
    assert got.dtype == np.float32
    assert got.shape == (3, 28, 28)
    assert np.abs(got - wanted.transpose(2, 0, 1)).max() <= 1e-6


def test_preprocess_gives_recorded_numbers() -> None:
    # Recorded once from Pillow 13.0 (numbers in 0..255, before scaling); the derivation above gives the same.
    rows, columns = np.mgrid[0:53, 0:37]
    pixels = np.stack([(rows * 5) % 256, (columns * 7) % 256, (rows * columns) % 256], axis=2).astype(np.uint8)
    settings = Preprocessing(image_size=8, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    got = preprocess(Image.fromarray(pixels), settings)
    assert got[0, :, 0].round(3).tolist() == RECORDED_ROWS
    assert got[1, 0].round(3).tolist() == RECORDED_COLUMNS
    assert got[2, 3].round(3).tolist() == RECORDED_PRODUCTS


def test_crop_offsets_round_halves_to_even() -> None:
    # 5 px more than the square: 2.5 becomes 2; 3 px more: 1.5 becomes 2.
    for extra, offset in ((5, 2), (3, 2), (1, 0), (7, 4)):
        pixels = _noise((28, 28 + extra, 3))
        settings = Preprocessing(image_size=28, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        got = np.rint(preprocess(Image.fromarray(pixels), settings) * 255)
        assert (got == pixels[:, offset : offset + 28].transpose(2, 0, 1)).all()


def test_preprocess_is_within_a_millionth_of_float64_for_every_level() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got = preprocess(Image.fromarray(np.stack([ramp] * 3, axis=2)), Preprocessing(image_size=16))
    for channel in range(3):
        wanted = (ramp / np.float64(255) - OPENAI_CLIP_MEAN[channel]) / OPENAI_CLIP_STD[channel]
        assert np.abs(got[channel] - wanted).max() <= 1e-6


def test_preprocess_takes_the_other_modes_through_load_image() -> None:
    grey = _noise((30, 20))
    wanted = preprocess(Image.fromarray(np.stack([grey] * 3, axis=2)), CLIP_112)
    assert (preprocess(Image.fromarray(grey), CLIP_112) == wanted).all()


def test_preprocess_refuses_what_would_fill_the_memory() -> None:
    strip = Image.new("RGB", (20_000, 1))
    with pytest.raises(ImageError, match=r"20000 x 1 px.*once resized.*at most 80,000,000.*crop it"):
        preprocess(strip, CLIP_112)
    with pytest.raises(ImageError, match="0 x 5 px"):
        preprocess(Image.new("RGB", (0, 5)), CLIP_112)
    assert preprocess(Image.new("RGB", (500, 1)), CLIP_112).shape == (3, 112, 112)


# -- rendering -------------------------------------------------------------------------------------------------------


def test_equalize_hist_by_hand() -> None:
    # Darkest 10 (2 pixels) to 0; of the 6 others 3 lie at or below 20 (127.5, even: 128), 4 at or below 30 (170).
    image = np.array([[10, 10, 20, 20], [20, 30, 40, 40]], np.uint8)
    assert equalize_hist(image).tolist() == [[0, 0, 128, 128], [128, 170, 255, 255]]
    assert (equalize_hist(np.full((3, 4), 77, np.uint8)) == 77).all()
    assert equalize_hist(image).dtype == np.uint8


def test_equalize_hist_is_opencv_to_the_bit() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(1)
    cases = [np.full((5, 7), level, np.uint8) for level in (0, 1, 200, 255)]
    cases += [np.array([[0, 255]], np.uint8), np.array([[9]], np.uint8)]
    for _ in range(60):
        height, width = rng.integers(1, 90, 2)
        low, high = sorted(rng.integers(0, 257, 2))
        cases.append(
            rng.integers(low, max(high, low + 1), (height, width), dtype=np.uint16).clip(0, 255).astype(np.uint8)
        )
        cases.append((rng.normal(120, 40, (height, width)).clip(0, 255)).astype(np.uint8))
    for case in cases:
        assert (equalize_hist(case) == cv2.equalizeHist(case)).all()


def test_mimic_cxr_jpg_is_the_published_recipe() -> None:
    cv2 = pytest.importorskip("cv2")
    for stored in (_film(64, 48), _film(64, 48, top=65535), _film().astype(np.int16) - 2000, _film() / 4096.0):
        for monochrome1 in (False, True):
            values = stored.astype(np.float64) - float(stored.min())
            picture = (values / values.max() * 255).astype(np.uint8)
            equalised = cv2.equalizeHist(cv2.bitwise_not(picture) if monochrome1 else picture)
            encoded = cv2.imencode(".jpg", equalised, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            wanted = np.asarray(Image.open(io.BytesIO(encoded)))
            got = mimic_cxr_jpg(stored, monochrome1=monochrome1)
            # The same up to the libjpeg each library was built with: within a level, and nearly everywhere exact.
            difference = np.abs(got.astype(int) - wanted)
            assert difference.max() <= 1
            assert difference.mean() <= 0.01


def test_min_max_truncates_and_both_ways_of_computing_it_agree() -> None:
    assert rendering_module.min_max(np.array([[5, 6, 7, 8]], np.uint16)).tolist() == [[0, 85, 170, 255]]
    assert rendering_module.min_max(np.array([[0, 1, 2, 1000]], np.uint16)).tolist() == [[0, 0, 0, 255]]
    for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.int32, np.uint64, np.int64):
        limits = np.iinfo(dtype)
        # Not the whole range of the small types: a wrapped difference would then index the right cell by luck.
        low = max(int(limits.min), int(limits.max) - 65_535) + 37
        offset = np.unique(np.linspace(0, int(limits.max) - low, 9_000).astype(np.int64))
        exact = np.array([[low + int(v) for v in offset]], dtype=dtype)
        assert (rendering_module.min_max(exact) == rendering_module.min_max(offset[None].astype(np.float64))).all()
    widest = np.array([[np.iinfo(np.int64).min, 0, np.iinfo(np.int64).max]])
    assert rendering_module.min_max(widest).tolist() == [[0, 127, 255]]
    widest_float = np.array([[np.finfo(np.float64).min, 0, np.finfo(np.float64).max]])
    assert rendering_module.min_max(widest_float).tolist() == [[0, 127, 255]]


def test_a_film_of_one_value_is_black_or_white() -> None:
    for stored in (np.full((9, 9), 500, np.uint16), np.full((9, 9), 0.5)):
        assert (mimic_cxr_jpg(stored, monochrome1=False) == 0).all()
        assert (mimic_cxr_jpg(stored, monochrome1=True) == 255).all()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((4, 4, 3)), r"shape \[4, 4, 3\].*\[H, W\]"),
        (np.zeros((0, 4)), "4 x 0 px"),
        (np.array([[1.0, np.nan]]), "NaN or infinity in 1 of 2 pixels"),
        (np.array([[1.0, np.inf]]), "NaN or infinity in 1 of 2 pixels"),
        (np.zeros((4, 4), np.complex64), "complex64"),
    ],
)
def test_mimic_cxr_jpg_refuses_what_is_not_stored_values(stored: NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        mimic_cxr_jpg(stored, monochrome1=False)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"])
def test_ordinary_modes_are_what_convert_rgb_gives(mode: str) -> None:
    picture = Image.fromarray(_noise((12, 9, 3))).convert(mode)
    image_format = "PNG" if mode in ("1", "L", "P", "RGB", "RGBA", "LA") else "TIFF"
    data = _saved(picture, image_format)
    for source in (data, picture):
        loaded = load_image(source)
        assert (_rgb(loaded) == np.asarray(picture.convert("RGB"))).all()
        assert loaded.rendering == "as-is"
        assert loaded.size == (9, 12)
        assert loaded.view is None


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"])
def test_formats_are_read_from_paths_and_bytes_as_pillow_reads_them(tmp_path: Path, image_format: str) -> None:
    data = _saved(Image.fromarray(_noise((16, 24))), image_format)
    path = tmp_path / "film.image"
    path.write_bytes(data)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (path, str(path), data):
        loaded = load_image(source)
        assert (_rgb(loaded) == wanted).all()
        assert loaded.format == image_format


def test_what_is_transparent_is_black_whatever_colour_lies_under_it() -> None:
    rgba = Image.new("RGBA", (3, 1), (200, 100, 50, 255))
    rgba.putpixel((1, 0), (255, 255, 255, 0))
    rgba.putpixel((2, 0), (200, 100, 50, 128))
    loaded = load_image(_saved(rgba))
    assert _rgb(loaded)[0].tolist() == [[200, 100, 50], [0, 0, 0], [100, 50, 25]]
    assert loaded.rendering == "as-is, alpha over black"

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 90, 90, 90])
    palette.putpixel((1, 0), 1)
    loaded = load_image(_saved(palette, transparency=0))
    assert _rgb(loaded)[0].tolist() == [[0, 0, 0], [90, 90, 90]]
    assert loaded.rendering == "as-is, alpha over black"

    grey_with_key = _saved(Image.fromarray(np.array([[255, 80]], np.uint8)), transparency=255)
    assert _grey(load_image(grey_with_key)).tolist() == [[0, 80]]


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
    data = _saved(Image.fromarray(np.ascontiguousarray(turn(upright))), image_format, exif=exif, **options)
    loaded = load_image(data)
    assert loaded.size == (48, 32)
    assert np.abs(_grey(loaded).astype(int) - upright).max() <= (8 if image_format == "JPEG" else 0)
    # A result that is loaded again must not turn again.
    assert (_grey(load_image(loaded.image)) == _grey(loaded)).all()


def _sixteen_bit_sources(stored: NDArray[np.uint16]) -> dict[str, Any]:
    big_endian = _saved(Image.fromarray(stored), "TIFF")
    return {
        "PNG": _saved(Image.fromarray(stored)),
        "TIFF": big_endian,
        "TIFF, big-endian": _saved(
            Image.frombytes("I;16B", stored.shape[::-1], stored.astype(">u2").tobytes()), "TIFF"
        ),
        "TIFF, float": _saved(Image.fromarray(stored.astype(np.float32)), "TIFF"),
        "mode I": Image.fromarray(stored.astype(np.int32)),
        "mode F": Image.fromarray(stored.astype(np.float32)),
        "uint16": stored,
        "int16": stored.astype(np.int16),
        "int64": stored.astype(np.int64),
        "float64": stored.astype(np.float64),
        "[H, W, 1]": stored[:, :, None],
        "not contiguous": np.repeat(stored, 2, axis=1)[:, ::2],
    }


@pytest.mark.parametrize("kind", sorted(_sixteen_bit_sources(_film())))
def test_deep_grey_images_are_stored_values(kind: str) -> None:
    stored = _film()
    source = _sixteen_bit_sources(stored)[kind]
    loaded = load_image(source)
    assert loaded.rendering == "mimic-cxr-jpg"
    assert (_grey(loaded) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    linear = load_image(source, rendering="voi-lut")
    assert linear.rendering == "min-max"
    values = stored.astype(np.float64) - stored.min()
    assert (_grey(linear) == (values / values.max() * 255).astype(np.uint8)).all()


def test_a_16_bit_tiff_with_white_at_zero_is_inverted() -> None:
    stored = _film()
    data = _saved(Image.fromarray(stored), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == 0  # type: ignore[attr-defined]
    assert (_grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=True)).all()


def test_the_loss_of_16_bit_colour_is_said() -> None:
    rows = b"".join(b"\0" + struct.pack(">6H", 0x1234, 0, 0xFFFF, 0, 0xAB00, 1) for _ in range(2))
    loaded = load_image(_png(2, 2, rows, depth=16, colour_type=2))
    assert loaded.rendering == "as-is, 16-bit colour cut to 8"
    assert _rgb(loaded)[0].tolist() == [[0x12, 0, 0xFF], [0, 0xAB, 0]]


def _png(width: int, height: int, rows: bytes, *, depth: int = 8, colour_type: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_arrays_of_8_bits_are_pictures() -> None:
    grey, colour = _noise((6, 5)), _noise((6, 5, 3))
    assert (_grey(load_image(grey)) == grey).all()
    assert (_grey(load_image(grey[:, :, None])) == grey).all()
    assert (_rgb(load_image(colour)) == colour).all()
    assert (_rgb(load_image(colour[:, ::-1])) == colour[:, ::-1]).all()
    assert (_grey(load_image(grey > 127)) == np.where(grey > 127, 255, 0)).all()
    loaded = load_image(grey)
    assert (loaded.rendering, loaded.format) == ("as-is", "array")


def test_the_source_is_left_alone() -> None:
    stored, picture = _film(), Image.fromarray(_noise((6, 5, 3)))
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
        (np.zeros((8, 8, 3), np.float32), "colour array of float32.*uint8"),
        (np.zeros((8, 8, 3), np.uint16), "colour array of uint16.*uint8"),
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


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    def written(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    whole = _saved(Image.fromarray(_noise((64, 64))))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    cases = {
        written("empty.png", b""): "an empty file",
        written("notes.png", b"These are notes, not a film."): "no image.*PNG, JPEG, TIFF, BMP, WebP or DICOM",
        written("cut.png", whole[: len(whole) // 2]): "damaged or truncated.*copy or download it again",
        written("cut.jpg", _saved(Image.fromarray(_noise((64, 64))), "JPEG")[:900]): "damaged or truncated",
        written("cut.tif", _saved(Image.fromarray(_noise((64, 64))), "TIFF")[:900]): "damaged or truncated",
        written("array.npy", pickled.getvalue()): "no image",
        written("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"): "no image",
        written("zero.png", _png(0, 4, b"")): "one without pixels",
        tmp_path / "nowhere.png": "no such file",
        tmp_path: "a directory",
    }
    for path, message in cases.items():
        with pytest.raises(ImageError, match=message) as caught:
            load_image(path)
        assert str(path) in str(caught.value)
        assert str(caught.value).count(" · ") == 2
    with pytest.raises(ImageError, match="addresses are not fetched"):
        load_image("https://example.org/film.png")
    with pytest.raises(ImageError, match=r"no such file|null"):
        load_image("film\0.png")
    with pytest.raises(ImageError, match="empty file"):
        load_image(b"")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="a device or a pipe"):
        load_image(tmp_path / "pipe.png")


def test_a_file_too_large_for_a_film_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.png").write_bytes(_saved(Image.fromarray(_noise((8, 8)))))
    monkeypatch.setattr(image_module, "MAX_FILE_BYTES", 50)
    with pytest.raises(ImageError, match="at most 50 bytes"):
        load_image(tmp_path / "film.png")


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (9_700, 9_700), (50_000, 50_000), (40_000, 2)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="at most 80,000,000 pixels"):
        load_image(_png(width, height, b"\0" * 100))


def test_a_second_page_is_refused_but_not_the_preview_of_a_camera() -> None:
    pages = [Image.fromarray(_noise((8, 8), seed)) for seed in range(3)]
    for image_format in ("TIFF", "GIF", "PNG"):
        with pytest.raises(ImageError, match=r"3 frames.*one film"):
            load_image(_saved(pages[0], image_format, save_all=True, append_images=pages[1:]))
    preview = _saved(pages[0], "MPO", save_all=True, append_images=pages[1:])
    assert load_image(preview).size == (8, 8)


def test_damaged_files_raise_nothing_but_image_errors() -> None:
    rng = np.random.default_rng(3)
    picture = Image.fromarray(_noise((24, 24)))
    for image_format in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000"):
        whole = _saved(picture, image_format)
        for _ in range(60):
            damaged = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
            for position in rng.integers(0, len(damaged), 4):
                damaged[position] = int(rng.integers(256))
            try:
                load_image(bytes(damaged))
            except ImageError as error:
                assert " · expected " in str(error)  # noqa: PT017 - either outcome is right, nothing else is


@pytest.mark.parametrize("source", [None, 3, ["film.png"], object()])
def test_sources_of_another_type_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match="expected a path, bytes, a NumPy array or a Pillow image"):
        load_image(source)


def test_an_unknown_rendering_is_refused() -> None:
    with pytest.raises(ImageError, match="'window' · expected mimic-cxr-jpg or voi-lut"):
        load_image(_film(), rendering="window")  # type: ignore[arg-type]


# -- DICOM -----------------------------------------------------------------------------------------------------------


def _dicom(
    stored: NDArray[Any] | None,
    *,
    syntax: str = "1.2.840.10008.1.2.1",
    encapsulated: bytes | None = None,
    preamble: bool = True,
    **attributes: Any,
) -> bytes:
    """Write a small CR film; an attribute of None is left out."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    values: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.1",
        "SOPInstanceUID": "2.25.1",
        "Modality": "CR",
        "ViewPosition": "PA",
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "BitsStored": 12,
        "PixelRepresentation": 0,
    }
    if stored is not None:
        values |= {"Rows": stored.shape[0], "Columns": stored.shape[1], "BitsAllocated": stored.dtype.itemsize * 8}
    values |= attributes
    values.setdefault("HighBit", values["BitsStored"] - 1)
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if stored is not None:
        if encapsulated is None:
            big = "<>"[syntax == "1.2.840.10008.1.2.2"]
            pixels = stored.astype(stored.dtype.newbyteorder(big)).tobytes()
            dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
        else:
            dataset.PixelData = pydicom.encaps.encapsulate([encapsulated])
        dataset["PixelData"].VR = "OB" if encapsulated is not None or stored.dtype.itemsize == 1 else "OW"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=preamble)
    return buffer.getvalue()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"], ids=["implicit", "explicit", "big"]
)
def test_dicom_goes_the_way_of_mimic_cxr_jpg(tmp_path: Path, photometric: str, syntax: str) -> None:
    stored = _film()
    data = _dicom(stored, syntax=syntax, PhotometricInterpretation=photometric, ViewPosition="AP")
    path = tmp_path / "film"
    path.write_bytes(data)
    wanted = mimic_cxr_jpg(stored, monochrome1=photometric == "MONOCHROME1")
    for source in (data, path):
        loaded = load_image(source)
        assert (_grey(loaded) == wanted).all()
        assert (loaded.rendering, loaded.format, loaded.view) == ("mimic-cxr-jpg", "DICOM", "AP")


def test_monochrome1_is_the_negative_of_monochrome2() -> None:
    stored = _film()
    one = _grey(load_image(_dicom(4095 - stored, PhotometricInterpretation="MONOCHROME1")))
    two = _grey(load_image(_dicom(stored)))
    # Truncation goes the other way, so a level's worth of difference before equalisation is all there may be.
    assert np.abs(one.astype(int) - two).mean() < 4
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.999


def test_unused_high_bits_are_masked() -> None:
    stored = _film()
    noisy = stored | (_noise(stored.shape).astype(np.uint16) << 12)
    assert (noisy != stored).any()
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    assert (_grey(load_image(_dicom(noisy))) == wanted).all()


def test_stored_bits_below_the_high_bit_are_found() -> None:
    stored = _film()
    high = (stored << 3) | (_noise(stored.shape).astype(np.uint16) & 0x8007)
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    assert (_grey(load_image(_dicom(high, HighBit=14))) == wanted).all()


def test_signed_values_are_signed_and_their_unused_bits_ignored() -> None:
    stored = _film().astype(np.int16) - 2000
    wanted = mimic_cxr_jpg(stored, monochrome1=False)
    masked = (stored & 0x0FFF).astype(np.uint16)
    for pixels in (stored, masked, masked | 0x5000):
        assert (_grey(load_image(_dicom(pixels, PixelRepresentation=1))) == wanted).all()


def test_eight_bit_dicom_is_rendered_the_same_way() -> None:
    stored = (_film(41, 31) >> 5).astype(np.uint8)
    got = _grey(load_image(_dicom(stored, BitsStored=8)))
    assert (got == mimic_cxr_jpg(stored, monochrome1=False)).all()


def test_rescaling_changes_nothing_by_default() -> None:
    stored = _film()
    data = _dicom(stored, RescaleSlope="2.5", RescaleIntercept="-100", RescaleType="US", WindowCenter=9, WindowWidth=5)
    assert (_grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=False)).all()


def _window(values: NDArray[Any], centre: float, width: float) -> NDArray[np.uint8]:
    """Compute PS3.3 C.11.2.1.2.1 pixel by pixel."""

    def level(x: float) -> float:
        if x <= centre - 0.5 - (width - 1) / 2:
            return 0
        if x > centre - 0.5 + (width - 1) / 2:
            return 255
        return ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255

    return np.rint(np.vectorize(level, otypes=[float])(values.astype(float))).astype(np.uint8)


def test_the_first_window_is_applied_after_rescaling() -> None:
    stored = _film()
    data = _dicom(
        stored,
        RescaleSlope="0.5",
        RescaleIntercept="-100",
        WindowCenter=[900, 1],
        WindowWidth=[1200, 2],
        RescaleType="US",
    )
    loaded = load_image(data, rendering="voi-lut")
    assert loaded.rendering == "voi-lut"
    wanted = _window(stored * 0.5 - 100, 900, 1200)
    assert 0 < wanted.mean() < 255
    assert np.abs(_grey(loaded).astype(int) - wanted).max() == 0
    inverted = _dicom(stored, PhotometricInterpretation="MONOCHROME1", WindowCenter=2000, WindowWidth=3000)
    assert (_grey(load_image(inverted, rendering="voi-lut")) == 255 - _window(stored, 2000, 3000)).all()


def test_other_window_functions() -> None:
    stored = _film()
    exact = _dicom(stored, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    wanted = np.rint(((stored - 2000.0) / 1000 + 0.5).clip(0, 1) * 255)
    assert (_grey(load_image(exact, rendering="voi-lut")) == wanted).all()
    sigmoid = _dicom(stored, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    wanted = np.rint(255 / (1 + np.exp(-4 * (stored - 2000.0) / 1000)))
    assert (_grey(load_image(sigmoid, rendering="voi-lut")) == wanted).all()
    step = _dicom(stored, WindowCenter=2000, WindowWidth=1)
    assert (_grey(load_image(step, rendering="voi-lut")) == np.where(stored > 1999.5, 255, 0)).all()
    for wrong, message in (
        ({"WindowWidth": 0}, "window centre 2000.0, width 0.0"),
        ({"WindowWidth": 9, "VOILUTFunction": "CURVED"}, "VOI LUT function CURVED"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(_dicom(stored, WindowCenter=2000, **wrong), rendering="voi-lut")


@pytest.mark.parametrize("bits", [8, 12])
def test_a_voi_lut_goes_before_a_window(bits: int) -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = _film()
    # 3,000 entries from 500 on: below and above, the first and the last entry hold.
    table = (((1 << bits) - 1) * np.linspace(0, 1, 3000) ** 2).astype(np.uint16)
    item = pydicom.Dataset()
    item.LUTDescriptor = [3000, 500, bits]
    item["LUTDescriptor"].VR = "US"
    item.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    data = _dicom(stored, VOILUTSequence=[item], WindowCenter=5, WindowWidth=9)
    loaded = load_image(data, rendering="voi-lut")
    wanted = np.rint(table[np.clip(stored.astype(int) - 500, 0, 2999)] / ((1 << bits) - 1) * 255)
    assert loaded.rendering == "voi-lut"
    assert (_grey(loaded) == wanted).all()


def test_without_a_window_the_result_says_min_max() -> None:
    stored = _film()
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        loaded = load_image(_dicom(stored, PhotometricInterpretation=photometric), rendering="voi-lut")
        plain = rendering_module.min_max(stored)
        assert loaded.rendering == "min-max"
        assert (_grey(loaded) == (plain if photometric == "MONOCHROME2" else 255 - plain)).all()


def test_colour_dicom_is_a_picture() -> None:
    pydicom = pytest.importorskip("pydicom")
    pixels = _noise((10, 8, 3))
    data = _dicom(pixels, PhotometricInterpretation="RGB", SamplesPerPixel=3, BitsStored=8, PlanarConfiguration=0)
    loaded = load_image(data)
    assert loaded.rendering == "as-is"
    assert (_rgb(loaded) == pixels).all()

    index = _noise((10, 8)) & 3
    palette = np.array([[0, 100, 200, 255], [9, 8, 7, 6], [1, 2, 3, 4]], np.uint16)
    luts = dict(zip(("Red", "Green", "Blue"), palette, strict=True))
    descriptors = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 16] for name in luts}
    tables = {
        f"{name}PaletteColorLookupTableData": (lut * 256 + 17).astype("<u2").tobytes() for name, lut in luts.items()
    }
    data = _dicom(index, PhotometricInterpretation="PALETTE COLOR", BitsStored=8, **descriptors, **tables)
    assert (_rgb(load_image(data)) == palette[:, index].transpose(1, 2, 0)).all()
    assert pydicom.dcmread(io.BytesIO(data)).PhotometricInterpretation == "PALETTE COLOR"


def test_run_length_encoding_is_read() -> None:
    pydicom = pytest.importorskip("pydicom")
    stored = _film()
    dataset = pydicom.dcmread(io.BytesIO(_dicom(stored)))
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert (_grey(load_image(buffer.getvalue())) == mimic_cxr_jpg(stored, monochrome1=False)).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_jpeg_2000_is_read(photometric: str) -> None:
    stored = _film(64, 64, top=65535)
    codestream = _saved(Image.fromarray(stored), "JPEG2000", irreversible=False, no_jp2=True)
    attributes = {"BitsStored": 16, "PhotometricInterpretation": photometric}
    data = _dicom(stored, syntax=f"{FINE}90", encapsulated=codestream, **attributes)
    assert (_grey(load_image(data)) == mimic_cxr_jpg(stored, monochrome1=photometric == "MONOCHROME1")).all()


def test_jpeg_baseline_is_read() -> None:
    stored = (_film() >> 4).astype(np.uint8)
    jpeg = _saved(Image.fromarray(stored), "JPEG", quality=100)
    data = _dicom(stored, syntax=f"{FINE}50", encapsulated=jpeg, BitsStored=8)
    decoded = np.asarray(Image.open(io.BytesIO(jpeg)))
    assert (_grey(load_image(data)) == mimic_cxr_jpg(decoded, monochrome1=False)).all()


@pytest.mark.parametrize(("kind", "syntax"), [("JPEGLSLossless", f"{FINE}80"), ("JPEGLosslessSV1", f"{FINE}70")])
def test_lossless_jpegs_are_read_with_gdcm(tmp_path: Path, kind: str, syntax: str) -> None:
    gdcm = pytest.importorskip("gdcm")
    stored = _film()
    plain, packed = tmp_path / "plain.dcm", tmp_path / "packed.dcm"
    plain.write_bytes(_dicom(stored))
    reader = gdcm.ImageReader()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    names = {"JPEGLSLossless": "JPEGLSLossless", "JPEGLosslessSV1": "JPEGLosslessProcess14_1"}
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, names[kind])))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(packed))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert syntax.encode() in packed.read_bytes()
    assert (_grey(load_image(packed)) == mimic_cxr_jpg(stored, monochrome1=False)).all()


def test_a_missing_decoder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("pydicom.pixels.decoders.base")
    stored = _film()
    data = _dicom(stored, syntax=f"{FINE}70", encapsulated=b"\xff\xd8\xff\xd9")
    monkeypatch.setattr(base.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(ImageError, match=r'JPEG Lossless.*pip install "llava-rad-lite\[dicom\]"'):
        load_image(data)
    video = _dicom(stored, syntax=f"{FINE}102", encapsulated=b"\0\0\0\1")
    with pytest.raises(ImageError, match=r"MPEG-4.*one that pydicom reads"):
        load_image(video)


def test_twelve_bit_jpeg_says_how_to_decompress_it() -> None:
    data = _dicom(_film(), syntax=f"{FINE}51", encapsulated=b"\xff\xd8\xff\xd9")
    with pytest.raises(ImageError, match=r"JPEG Extended.*dcmdjpeg"):
        load_image(data)


def test_a_missing_pydicom_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"\0" * 128 + b"DICM" + b"\0" * 40
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "llava-rad-lite\[dicom\]"'):
        load_image(data)


CT, MAMMOGRAPHY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.2"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Modality": "CT"}, "a CT slice"),
        ({"Modality": "MR"}, "an MR slice"),
        ({"Modality": "PT"}, "a PET slice"),
        ({"Modality": "US"}, "an ultrasound"),
        ({"Modality": "NM"}, "a nuclear medicine image"),
        ({"Modality": "MG"}, "a mammogram"),
        ({"Modality": None, "SOPClassUID": CT}, r"a CT slice \(modality absent\)"),
        ({"Modality": "OT", "SOPClassUID": MAMMOGRAPHY}, "a mammogram"),
        ({"ViewPosition": "LL"}, r"not frontal \(LL\).*PA or AP"),
        ({"ViewPosition": "LATERAL"}, "not frontal"),
        ({"ViewPosition": "L LAT"}, "not frontal"),
        ({"ViewPosition": "RAO"}, "not frontal"),
        ({"ViewPosition": None, "ViewCodeSequence": "left lateral"}, r"not frontal \(LEFT LATERAL\)"),
        ({"NumberOfFrames": 7}, "7 frames"),
        ({"PhotometricInterpretation": "HSV"}, "photometric interpretation HSV"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"Rows": None}, "without Rows"),
        ({"Rows": 60_000, "Columns": 60_000}, "60000 x 60000 px.*nothing was decoded"),
        ({"Rows": 0}, "30 x 0 px"),
        ({"Rows": 41}, "damaged or truncated"),
        ({"BitsStored": 17}, "damaged or truncated"),
        ({"PixelRepresentation": 9}, "damaged or truncated"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # pydicom warns of the values that are wrong on purpose
def test_dicom_that_is_not_a_frontal_film_is_refused(tmp_path: Path, attributes: dict[str, Any], message: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    if "ViewCodeSequence" in attributes:
        code = pydicom.Dataset()
        code.CodeMeaning = attributes["ViewCodeSequence"]
        attributes = attributes | {"ViewCodeSequence": [code]}
    path = tmp_path / "other.dcm"
    path.write_bytes(_dicom(_film(), **attributes))
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("modality", ["CR", "DX", "RG", "RF", "OT", "XRAY", "", None])
@pytest.mark.filterwarnings("ignore")
def test_films_and_unknown_modalities_are_read(modality: str | None) -> None:
    assert load_image(_dicom(_film(), Modality=modality)).rendering == "mimic-cxr-jpg"


@pytest.mark.parametrize(
    ("position", "meaning", "view"),
    [
        ("PA", None, "PA"),
        (None, None, None),
        ("", "antero-posterior", "AP"),
        (None, "postero-anterior", "PA"),
        ("LLD", None, "LLD"),
        (None, "left lateral decubitus", "LEFT LATERAL DECUBITUS"),
    ],
)
def test_the_view_is_reported(position: str | None, meaning: str | None, view: str | None) -> None:
    pydicom = pytest.importorskip("pydicom")
    code = pydicom.Dataset()
    code.CodeMeaning = meaning
    codes = [code] if meaning else None
    assert load_image(_dicom(_film(), ViewPosition=position, ViewCodeSequence=codes)).view == view


def test_dicom_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match=r"without pixel data.*a film"):
        load_image(_dicom(None, Modality=None))


def test_dicom_without_a_preamble_needs_its_name(tmp_path: Path) -> None:
    stored = _film()
    bare = _dicom(stored, syntax="1.2.840.10008.1.2", preamble=True)
    # The data set alone, as some archives keep it: what follows the preamble and the file meta group.
    meta_length = struct.unpack("<I", bare[140:144])[0]
    path = tmp_path / "old.DCM"
    path.write_bytes(bare[144 + meta_length :])
    assert (_grey(load_image(path)) == mimic_cxr_jpg(stored, monochrome1=False)).all()
    path.write_bytes(b"These are notes, not a film." * 9)
    with pytest.raises(ImageError, match=r"not DICOM|damaged"):
        load_image(path)


def test_deflated_dicom_is_refused_before_it_is_inflated() -> None:
    pytest.importorskip("pydicom")
    body = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    data = _dicom(None, Modality=None)
    meta_end = 144 + struct.unpack("<I", data[140:144])[0]
    uid = b"1.2.840.10008.1.2.1.99"
    meta = data[:meta_end].replace(b"\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0", b"\x02\0\x10\0UI\x16\0" + uid)
    with pytest.raises(ImageError, match=r"deflated.*dcmconv"):
        load_image(meta + body.compress(b"\0" * 1_000_000) + body.flush())


@pytest.mark.filterwarnings("ignore")
def test_damaged_dicom_raises_nothing_but_image_errors() -> None:
    rng = np.random.default_rng(5)
    whole = _dicom(_film(), WindowCenter=2000, WindowWidth=1000)
    for case in range(150):
        damaged = bytearray(whole[: int(rng.integers(133, len(whole) + 1))])
        for position in rng.integers(132, min(len(damaged), 600), 3):
            damaged[position] = int(rng.integers(256))
        try:
            load_image(bytes(damaged), rendering="voi-lut" if case % 2 else "mimic-cxr-jpg")
        except ImageError as error:
            assert " · expected " in str(error)  # noqa: PT017 - either outcome is right, nothing else is


def test_truncated_dicom_is_refused() -> None:
    whole = _dicom(_film())
    for kept in (140, 300, len(whole) - 1000):
        with pytest.raises(ImageError, match=r"damaged or truncated|without"):
            load_image(whole[:kept])
