"""A film becomes pixel_values: open_clip 2.23's evaluation transform, written in Pillow and numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from lite.config import Preprocessing
from lite.image.files import load_image
from lite.image.rendering import MAX_PIXELS, check_size, refusal


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
    check_size("<image>", image.width, image.height)
    square = preprocessing.image_size
    short, long = sorted(image.size)
    resized_long = int(square * long / short)
    if square * resized_long > MAX_PIXELS:
        got = f"{image.width} x {image.height} px, {square * resized_long:,} pixels once resized"
        raise refusal("<image>", got, f"at most {MAX_PIXELS:,}", "crop it: a film is not that long and thin")
    wide = image.width >= image.height
    width, height = (resized_long, square) if wide else (square, resized_long)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - square) / 2), round((height - square) / 2)
    pixels = np.asarray(resized.crop((left, top, left + square, top + square)))
    levels = np.arange(256, dtype=np.float64)[None, :] / 255
    mean, std = (np.asarray(values, dtype=np.float64)[:, None] for values in (preprocessing.mean, preprocessing.std))
    table = ((levels - mean) / std).astype(np.float32)
    return np.stack([table[channel][pixels[:, :, channel]] for channel in range(3)])
