"""Pictures and arrays: formats, modes, depths, and what is refused."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import film, grey, noise, rgb, saved
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image import files as image_module
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


def _png(width: int, height: int, rows: bytes, *, depth: int = 8, colour_type: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _deep_colour_sources(stored: NDArray[np.uint16]) -> dict[str, Any]:
    """Put a grey film into colour files of 16 bits: PNG with and without alpha, TIFF of either order, PPM, an array."""
    height, width = stored.shape
    alpha = np.full_like(stored, 65535)

    def png(colour_type: int, *channels: NDArray[np.uint16]) -> bytes:
        rows = np.stack(channels, axis=2).astype(">u2").reshape(height, -1)
        return _png(width, height, b"".join(b"\0" + row.tobytes() for row in rows), depth=16, colour_type=colour_type)

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
    source = _png(
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


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    def written(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    whole = saved(Image.fromarray(noise((64, 64))))
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    cases = {
        written("empty.png", b""): "an empty file",
        written("notes.png", b"These are notes, not a film."): "not an image.*PNG, JPEG, TIFF, BMP, WebP or DICOM",
        written("cut.png", whole[: len(whole) // 2]): "damaged or truncated.*copy or download it again",
        written("cut.jpg", saved(Image.fromarray(noise((64, 64))), "JPEG")[:900]): "damaged or truncated",
        written("cut.tif", saved(Image.fromarray(noise((64, 64))), "TIFF")[:900]): "damaged or truncated",
        written("array.npy", pickled.getvalue()): "not an image",
        written("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"): "not an image",
        written("zero.png", _png(0, 4, b"")): "has no pixels",
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
    (tmp_path / "film.png").write_bytes(saved(Image.fromarray(noise((8, 8)))))
    monkeypatch.setattr(image_module, "MAX_FILE_BYTES", 50)
    with pytest.raises(ImageError, match="at most 50 bytes"):
        load_image(tmp_path / "film.png")


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (9_700, 9_700), (50_000, 50_000), (40_000, 2)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(ImageError, match="at most 80,000,000 pixels"):
        load_image(_png(width, height, b"\0" * 100))


def test_a_second_page_is_refused_but_not_the_preview_of_a_camera() -> None:
    pages = [Image.fromarray(noise((8, 8), seed)) for seed in range(3)]
    for image_format in ("TIFF", "GIF", "PNG"):
        with pytest.raises(ImageError, match=r"3 frames.*one film"):
            load_image(saved(pages[0], image_format, save_all=True, append_images=pages[1:]))
    preview = saved(pages[0], "MPO", save_all=True, append_images=pages[1:])
    assert load_image(preview).size == (8, 8)


def test_damaged_files_raise_nothing_but_image_errors_and_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    picture = Image.fromarray(noise((24, 24)))
    packed = {f"TIFF {kind}": {"compression": kind} for kind in ("tiff_lzw", "jpeg", "packbits")}
    for image_format in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", *packed):
        whole = saved(picture, image_format.split()[0], **packed.get(image_format, {}))
        for _ in range(60):
            damaged = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
            for position in rng.integers(0, len(damaged), 4):
                damaged[position] = int(rng.integers(256))
            try:
                load_image(bytes(damaged))
            except ImageError as error:
                assert " · expected " in str(error)  # noqa: PT017 - either outcome is right, nothing else is
    assert capfd.readouterr() == ("", "")


def test_what_a_decoder_complains_of_is_noted() -> None:
    data = bytearray(saved(Image.fromarray(noise((24, 24))), "TIFF", compression="jpeg"))
    scan = data.index(b"\xff\xda")
    data[scan + 90 : scan + 92] = b"\xff\xb1"
    loaded = load_image(bytes(data))
    assert loaded.film.remarks[0].startswith("its decoder says: ")


@pytest.mark.parametrize("source", [None, 3, ["film.png"], object()])
def test_sources_of_another_type_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match="expected a path, bytes, a NumPy array"):
        load_image(source)


def test_files_that_are_open_are_read(tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    path.write_bytes(saved(Image.fromarray(noise((12, 9)))))
    with path.open("rb") as file:
        assert (rgb(load_image(file)) == rgb(load_image(path))).all()
    assert load_image(io.BytesIO(path.read_bytes())).film.format == "PNG"
    with path.open(encoding="latin-1") as file, pytest.raises(ImageError, match=r"film\.png: got a file open for text"):
        load_image(file)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((9, 9), 700, np.uint16), "got one grey level"),
        (np.full((9, 9, 3), 40, np.uint8), "got one grey level"),
        (np.full((9, 9), 0.5), "got one grey level"),
        (Image.new("RGB", (9, 9), (0, 0, 90)), "got one grey level"),
    ],
)
def test_a_film_of_one_grey_level_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)
    assert load_image(source, any_film=True).film.remarks == ("drafted although it is one grey level: --any-film",)


def _blank(levels: int) -> NDArray[np.uint16]:
    return (700 + np.arange(64 * 64).reshape(64, 64) % levels).astype(np.uint16)


def _framed(inner: NDArray[np.uint16], value: int, width: int) -> NDArray[np.uint16]:
    framed = inner.copy()
    framed[:width] = framed[-width:] = framed[:, :width] = framed[:, -width:] = value
    return framed


@pytest.mark.parametrize(
    ("stored", "remark"),
    [
        (film(64, 64), None),
        (_framed(film(64, 64), 0, 8), None),
        (_blank(31), "only 31 grey levels"),
        (np.where(np.arange(4096).reshape(64, 64) < 4050, 0, film(64, 64)), r"one grey level takes 98\.9%"),
        (np.where(np.arange(4096).reshape(64, 64) == 99, 65535, film(64, 64)), "grey scale is eaten by values .* 9.%"),
        (np.where(np.arange(4096).reshape(64, 64) == 99, 0, film(64, 64) + 50_000), "grey scale is eaten by values"),
        (_framed(film(64, 64), 65535, 4), "grey scale is eaten by a border"),
        (np.where(np.arange(4096).reshape(64, 64) < 40, 65535, film(64, 64)), "grey scale is eaten"),  # a marker: 1%
        (film(64, 20), "64 px by 20: only the middle of it is seen"),
        (_framed(film(64, 64), 4095, 4), r"a border of one grey level takes 23% of the film"),
        (_framed(film(64, 64), 0, 16), "a border of one grey level takes 75% of the film"),
    ],
)
def test_values_that_are_hardly_a_picture_are_noted(stored: NDArray[Any], remark: str | None) -> None:
    loaded = load_image(stored.astype(np.uint16))
    if remark is None:
        assert loaded.film.remarks == ()
    else:
        assert re.search(remark, " ".join(loaded.film.remarks)), loaded.film.remarks
    assert loaded.film.grey_levels == len(np.unique(stored))


def test_a_film_that_its_file_cannot_hold_is_refused_before_it_is_decoded() -> None:
    zeros = _png(8_000, 8_000, b"\0" * 8_001 * 8_000)
    assert len(zeros) < 100_000
    with pytest.raises(ImageError, match=r"64,000,000 pixels in 6.,... bytes.*at most 200 pixels a byte"):
        load_image(zeros)


def test_an_unknown_rendering_is_refused() -> None:
    with pytest.raises(ImageError, match="'window' · expected mimic-cxr-jpg or voi-lut"):
        load_image(film(), rendering="window")  # type: ignore[arg-type]
