"""Contact sheets: a page of phantom films with their findings written under them, to look at while working."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import Finding, sample_study
from lite.image.rendering import mimic_cxr_jpg

_TILE = 256
_COLUMNS = 6
_CAPTION_LINES = 3
_CAPTION_HEIGHT = 15 * _CAPTION_LINES


def caption(finding: Finding) -> str:
    """Name a finding in a few words, e.g. "large right pleural effusion"."""
    name = finding.device or finding.label.lower()
    return " ".join(word for word in (finding.size, finding.side, finding.zone, name) if word)


def contact_sheet(out: Path, *, count: int = 24, seed: int = 0, film_size: int = _TILE) -> Path:
    """Save a page of films with their findings as captions.

    Args:
        out: the PNG to write; its folder is made where it is missing.
        count: how many studies.
        seed: the first study's seed; the others follow it.
        film_size: pixels of each film before it is printed; 112 leaves the detail that the demo model sees.
    """
    height = _TILE + _CAPTION_HEIGHT
    sheet = Image.new("L", (_COLUMNS * _TILE, math.ceil(count / _COLUMNS) * height))
    pen = ImageDraw.Draw(sheet)
    for number in range(count):
        study = sample_study(seed + number)
        x, y = number % _COLUMNS * _TILE, number // _COLUMNS * height
        film = Image.fromarray(mimic_cxr_jpg(draw_film(study).stored, monochrome1=False))
        for size in (film_size, _TILE):
            film = film.resize((size, size), Image.Resampling.BICUBIC)
        sheet.paste(film, (x, y))
        words = ", ".join(map(caption, study.findings)) or "no finding"
        lines = textwrap.wrap(f"{study.seed} {study.view}: {words}", 46)[:_CAPTION_LINES]
        pen.multiline_text((x + 4, y + _TILE + 1), "\n".join(lines), fill=230, spacing=1, font_size=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out
