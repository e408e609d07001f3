"""Stored values to grey levels: against OpenCV, and the published recipe of MIMIC-CXR-JPG."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from made_films import film
from numpy.typing import NDArray
from PIL import Image

from lite.errors import ImageError
from lite.image import rendering as rendering_module
from lite.image.rendering import equalize_hist, mimic_cxr_jpg


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
    for stored in (film(64, 48), film(64, 48, top=65535), film().astype(np.int16) - 2000, film() / 4096.0):
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
