"""Pixel values against a derivation from the definitions, and against recorded numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from made_films import noise
from numpy.typing import NDArray
from PIL import Image

from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, Preprocessing
from lite.errors import ImageError
from lite.image.preprocess import preprocess

CLIP_112 = Preprocessing(image_size=112)
RECORDED_ROWS = [58, 82, 106, 130, 154, 178, 202, 231]
RECORDED_COLUMNS = [13, 44, 77, 110, 142, 175, 208, 239]
RECORDED_PRODUCTS = [51, 168, 99, 147, 117, 130, 129, 119]


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
    pixels = noise((height, width, 3), seed=height * 1000 + width)
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
        pixels = noise((28, 28 + extra, 3))
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
    grey = noise((30, 20))
    wanted = preprocess(Image.fromarray(np.stack([grey] * 3, axis=2)), CLIP_112)
    assert (preprocess(Image.fromarray(grey), CLIP_112) == wanted).all()


def test_preprocess_refuses_what_would_fill_the_memory() -> None:
    strip = Image.new("RGB", (20_000, 1))
    with pytest.raises(ImageError, match=r"20000 x 1 px.*once resized.*at most 80,000,000.*crop it"):
        preprocess(strip, CLIP_112)
    with pytest.raises(ImageError, match="0 x 5 px"):
        preprocess(Image.new("RGB", (0, 5)), CLIP_112)
    assert preprocess(Image.new("RGB", (500, 1)), CLIP_112).shape == (3, 112, 112)
