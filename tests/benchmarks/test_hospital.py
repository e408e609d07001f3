"""Another hospital: its texts are read back, its films are its own, and an adapter is trained and measured for it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from repository import CHECKPOINT
from safetensors.torch import load_file

from benchmarks.phantom.adapt import AdaptationPlan, adapt
from benchmarks.phantom.dataset import draw_films, training_seeds
from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.hospital import HOSPITALS, MILLIMETRES, sharpen, write_items
from benchmarks.phantom.style import band, is_numbered, measure_style, style_table, widths
from benchmarks.phantom.write import study_seed, write_studies
from lite.artifact.open import Artifact
from lite.config import DecodingDefaults
from lite.eval.labels import read_labels
from lite.prompt import Tokenizer

NORTHSIDE = CHECKPOINT.parent / "hospital" / "northside"
PLAN = AdaptationPlan(
    films=32, batch_size=4, steps=3, warm_up_steps=1, image_tokens=16, image_method="mean", hospital="northside"
)


def reports(count: int) -> list[tuple[int, str]]:
    return [(seed, write_items(sample_study(seed), np.random.default_rng([seed, 2])).text) for seed in range(count)]


def test_the_labeller_reads_its_texts_back() -> None:
    for seed, text in reports(500):
        report = write_items(sample_study(seed), np.random.default_rng([seed, 2]))
        assert read_labels(text) == dict(report.readings), text


def test_its_texts_are_lists_in_millimetres_that_the_tokenizer_spells() -> None:
    tokenizer = Tokenizer(CHECKPOINT / "base" / "tokenizer.model", DecodingDefaults())
    texts = reports(500)
    for seed, text in texts:
        assert is_numbered(text), text
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 110
        sizes = {f.label: f.size for f in sample_study(seed).findings if f.label in MILLIMETRES}
        assert {label: band(label, mm) for label, mm in widths(text).items()} == sizes, text
    assert not re.search(r"\b(?:small|large)\b", " ".join(text for _, text in texts))
    assert len({number for _, text in texts for number in re.findall(r"(\d+) mm", text)}) > 50


def test_its_films_are_sharper_and_nothing_else_differs(tmp_path: Path) -> None:
    film = draw_film(sample_study(5)).stored
    ours = sharpen(film)
    assert (ours.dtype, ours.shape, int(ours.max()) <= 4095) == (np.uint16, film.shape, True)
    flat = np.full((256, 256), 1200, np.uint16)
    assert (sharpen(flat) == flat).all()
    step = np.repeat([1000, 2000], 128)[None].repeat(256, axis=0).astype(np.uint16)
    edge = sharpen(step)[128, 120:136].astype(int)
    assert edge.min() == pytest.approx(1000 - 0.9 * 0.47 * 1000, abs=30)
    assert edge.max() == pytest.approx(2000 + 0.9 * 0.47 * 1000, abs=30)
    home, north = (
        json.loads(write_studies(tmp_path / name, count=3, seed=3, dicom=True, hospital=name).read_text())  # type: ignore[arg-type]
        for name in HOSPITALS
    )
    for one, other in zip(home, north, strict=True):
        assert {**one, "conversations": 0, "phantom": 0} == {**other, "conversations": 0, "phantom": 0}
        assert one["phantom"]["findings"] == other["phantom"]["findings"]
        for file in (one["image"], one["phantom"]["dicom"]):
            assert (tmp_path / "home" / file).read_bytes() != (tmp_path / "northside" / file).read_bytes()
    seen = [draw_films(tmp_path / f"{name}-films", count=2, seed=1, hospital=name).pixels for name in HOSPITALS]
    assert (seen[0] != seen[1]).mean() > 0.5
    assert not {study_seed(seed, i) for seed in (771, 772, 26_120_101) for i in range(150)} & set(
        training_seeds(20_000, 1).tolist()
    )
