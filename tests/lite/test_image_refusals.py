"""Files that are no films, or damaged, or too large: each is refused by name, and what is doubtful is noted."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_films import film, noise, png_of, rgb, saved
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image import files as image_module
from lite.image.files import load_image


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
        written("zero.png", png_of(0, 4, b"")): "has no pixels",
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
        load_image(png_of(width, height, b"\0" * 100))


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
    zeros = png_of(8_000, 8_000, b"\0" * 8_001 * 8_000)
    assert len(zeros) < 100_000
    with pytest.raises(ImageError, match=r"64,000,000 pixels in 6.,... bytes.*at most 200 pixels a byte"):
        load_image(zeros)


def test_an_unknown_rendering_is_refused() -> None:
    with pytest.raises(ImageError, match="'window' · expected mimic-cxr-jpg or voi-lut"):
        load_image(film(), rendering="window")  # type: ignore[arg-type]
