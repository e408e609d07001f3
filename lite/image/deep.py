"""Colour pictures of 16 bits a channel, which Pillow alone would cut to 8: PNG, TIFF and PPM.

A film saved in colour has 12 bits in 16, so that its upper bytes are nearly all black. Pillow has no such mode, but it
has raw modes for either byte of a sample: the file is decoded once for each.
"""

from __future__ import annotations

import io
import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

_NATIVE: Final = "L" if sys.byteorder == "little" else "B"


def is_deep_colour(picture: Image.Image) -> bool:
    """Say whether a file that was opened and not yet decoded has 16 bits in each of several channels."""
    tiles = getattr(picture, "tile", None) or ()
    deep_ppm = picture.format == "PPM" and picture.mode == "RGB" and any(_ppm_maximum(tile) > 255 for tile in tiles)
    return len(picture.getbands()) > 1 and (deep_ppm or any(";16" in str(tile[3]) for tile in tiles))


def read_deep_colour(picture: Image.Image) -> NDArray[np.uint16] | None:
    """Decode such a file, upright: [H, W, 3], [H, W, 4] with alpha, or [H, W, 2]; None where it cannot be done."""
    stream = getattr(picture, "fp", None)
    if stream is None or not stream.seekable():
        return None
    stream.seek(0)
    data = stream.read()
    tile = picture.tile[0]  # type: ignore[attr-defined]
    raw = str(tile[3][0] if isinstance(tile[3], tuple) else tile[3])
    if picture.format == "PPM":
        if tile[0] != "ppm":
            return None
        samples = np.frombuffer(data, ">u2", picture.width * picture.height * 3, tile[2]).astype(np.uint16)
        return samples.reshape(picture.height, picture.width, 3)
    if raw == "LA;16B":  # two samples of two bytes lie like four of one
        both = _decoded(data, "RGBA").astype(np.uint16)
        return both[:, :, ::2] * np.uint16(256) + both[:, :, 1::2]
    name, _, order = raw.partition(";16")
    order = _NATIVE if order == "N" else order
    if name not in ("RGB", "RGBA") or order not in ("L", "B"):
        return None
    upper = _decoded(data, f"{name};16{order}").astype(np.uint16)
    return upper * np.uint16(256) + _decoded(data, f"{name};16{'LB'['BL'.index(order)]}")


def _ppm_maximum(tile: Any) -> int:  # noqa: ANN401 - Pillow's own
    return tile[3][-1] if isinstance(tile[3], tuple) and isinstance(tile[3][-1], int) else 0


def _decoded(data: bytes, raw: str) -> NDArray[np.uint8]:
    """Decode a file with another raw mode of as many bytes a pixel."""
    with Image.open(io.BytesIO(data)) as picture:
        tiles: list[Any] = picture.tile
        picture.tile = [
            tile._replace(args=(raw, *tile[3][1:]) if isinstance(tile[3], tuple) else raw) for tile in tiles
        ]
        return np.asarray(ImageOps.exif_transpose(picture))
