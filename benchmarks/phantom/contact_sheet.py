"""Contact sheets: a page of phantom films with their findings written under them, to look at while working."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import Finding, Study, sample_study

_TILE = 256
_COLUMNS = 6
_CAPTION_LINES = 3
_CAPTION_HEIGHT = 15 * _CAPTION_LINES


def caption(finding: Finding) -> str:
    """Name a finding in a few words, e.g. "large right pleural effusion"."""
    name = finding.device or finding.label.lower()
    return " ".join(word for word in (finding.size, finding.side, finding.zone, name) if word)


def displayed(stored: NDArray[np.uint16], size: int) -> NDArray[np.uint8]:
    """Render a film as 8 bits, histogram-equalised, at `size` pixels: close to what the model is given."""
    low, high = int(stored.min()), int(stored.max())
    scaled = ((stored.astype(np.float32) - low) * (255 / max(high - low, 1))).astype(np.uint8)
    return np.asarray(cv2.resize(cv2.equalizeHist(scaled), (size, size), interpolation=cv2.INTER_AREA), np.uint8)


def page(studies: list[Study], *, film_size: int = _TILE) -> Image.Image:
    """Lay out the films of `studies` in rows, each over its caption."""
    height = _TILE + _CAPTION_HEIGHT
    sheet = Image.new("L", (_COLUMNS * _TILE, math.ceil(len(studies) / _COLUMNS) * height))
    pen = ImageDraw.Draw(sheet)
    for number, study in enumerate(studies):
        x, y = number % _COLUMNS * _TILE, number // _COLUMNS * height
        film = Image.fromarray(displayed(draw_film(study).stored, film_size))
        sheet.paste(film.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (x, y))
        words = ", ".join(caption(finding) for finding in study.findings) or "no finding"
        lines = textwrap.wrap(f"{study.seed} {study.view}: {words}", 46)[:_CAPTION_LINES]
        pen.multiline_text((x + 4, y + _TILE + 1), "\n".join(lines), fill=230, spacing=1, font_size=11)
    return sheet


def contact_sheet(out: Path, *, count: int = 24, seed: int = 0, film_size: int = _TILE) -> Path:
    """Save a page of films with their findings as captions.

    Args:
        out: the PNG to write; its folder is made where it is missing.
        count: how many studies.
        seed: the first study's seed; the others follow it.
        film_size: pixels of each film before it is printed; 112 leaves the detail that the demo model sees.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    page([sample_study(number) for number in range(seed, seed + count)], film_size=film_size).save(out)
    return out
