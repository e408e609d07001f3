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
from benchmarks.phantom.report import Report
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


def reports() -> list[tuple[int, Report]]:
    return [(seed, write_items(sample_study(seed), np.random.default_rng([seed, 2]))) for seed in range(500)]


def test_the_labeller_reads_its_texts_back() -> None:
    for _, report in reports():
        assert read_labels(report.text) == dict(report.readings), report.text


def test_its_texts_are_lists_in_millimetres_that_the_tokenizer_spells() -> None:
    tokenizer = Tokenizer(CHECKPOINT / "base" / "tokenizer.model", DecodingDefaults())
    texts = [(seed, report.text) for seed, report in reports()]
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
    assert (ours.dtype, ours.shape) == (film.dtype, film.shape)
    step = np.repeat([1000, 2000], 128)[None].repeat(256, axis=0).astype(np.uint16)
    edge = sharpen(step)[128].astype(int)
    assert (edge[0], edge[-1]) == (1000, 2000)
    assert edge.min() == pytest.approx(1000 - 0.9 * 0.47 * 1000, abs=30)
    assert edge.max() == pytest.approx(2000 + 0.9 * 0.47 * 1000, abs=30)
    home, north = (
        json.loads(write_studies(tmp_path / name, count=3, seed=3, dicom=True, hospital=name).read_text())
        for name in HOSPITALS
    )
    for one, other in zip(home, north, strict=True):
        assert {**one, "conversations": 0, "phantom": 0} == {**other, "conversations": 0, "phantom": 0}
        assert one["phantom"]["findings"] == other["phantom"]["findings"]
        for file in (one["image"], one["phantom"]["dicom"]):
            assert (tmp_path / "home" / file).read_bytes() != (tmp_path / "northside" / file).read_bytes()
    seen = [draw_films(tmp_path / f"{name}-films", count=2, seed=1, hospital=name).pixels for name in HOSPITALS]
    assert (seen[0] != seen[1]).mean() > 0.5
    measured = {study_seed(seed, index) for seed in (771, 772, 26_120_101) for index in range(150)}
    assert not measured & set(training_seeds(4_000, 1).tolist())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, demo_artifact: Artifact) -> Path:
    folder = tmp_path_factory.mktemp("northside")
    (folder / "artifact").symlink_to(demo_artifact.path)
    return folder


def read_adapter(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    projector = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return load_file(folder / "adapter_model.safetensors"), projector


def test_adapting_writes_a_plain_peft_folder(work: Path, tmp_path: Path) -> None:
    size = adapt(tmp_path / "north", plan=PLAN, work=work, peft=True)
    files = {path.name: path for path in (tmp_path / "north").iterdir()}
    assert set(files) == {
        "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "training.json",
    }  # fmt: skip
    assert size == sum(files[name].stat().st_size for name in ("adapter_model.safetensors", "non_lora_trainables.bin"))
    assert json.loads(files["training.json"].read_text()) == dataclasses.asdict(PLAN)
    published = CHECKPOINT / "llava-rad-phantom"
    lora, projector = read_adapter(tmp_path / "north")
    old_lora = torch.load(published / "adapter_model.bin", weights_only=True)
    old_projector = torch.load(published / "non_lora_trainables.bin", weights_only=True)
    assert set(lora) == set(old_lora)
    for name, tensor in lora.items():
        factor, rank = (tensor, 0) if "lora_A" in name else (tensor.T, 1)
        assert (factor.dtype, tensor.shape[rank], tensor.shape[1 - rank]) == (
            torch.bfloat16, 16, old_lora[name].shape[1 - rank],
        )  # fmt: skip
        # Three steps: it still begins with the published factors.
        assert 0 < float((factor[:8] - (old_lora[name] if rank == 0 else old_lora[name].T)).abs().max()) < 0.05, name
    assert {name: (t.shape, t.dtype) for name, t in projector.items()} == {
        name: (t.shape, t.dtype) for name, t in old_projector.items()
    }
    assert any(not torch.equal(tensor, old_projector[name]) for name, tensor in projector.items())


def test_the_committed_adapter_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in NORTHSIDE.iterdir()) <= 1_000_000
    config = json.loads((NORTHSIDE / "adapter_config.json").read_text())
    plan = AdaptationPlan(**json.loads((NORTHSIDE / "training.json").read_text()))
    lora, projector = read_adapter(NORTHSIDE)
    assert (config["r"], config["lora_alpha"]) == (plan.lora_rank, 2 * plan.lora_rank)
    assert config["base_model_name_or_path"] == "llava-rad-phantom/base"
    assert (plan.hospital, len(lora), len(projector)) == ("northside", 4 * 7 * 2, 4)
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in (*lora.values(), *projector.values()))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1. Heart not enlarged. 2. Nodule of 12 mm, left upper zone.", True),
        ("1. Heart not enlarged. 3. No pneumothorax.", False),
        ("Heart not enlarged. 1. No pneumothorax.", False),
        ("1. Heart not enlarged. 2. . 3. No pneumothorax.", False),
        ("1. Heart not enlarged. 2. No pneumothorax", False),
        ("1. Heart not enlarged.\n2. No pneumothorax.", False),
        ("The lungs are clear.", False),
    ],
)
def test_what_counts_as_a_numbered_list(text: str, wanted: bool) -> None:
    assert is_numbered(text) is wanted


def test_style_is_measured_beside_the_hospitals_reports(tmp_path: Path) -> None:
    reference = "1. Heart not enlarged. 2. Nodule of 12 mm, left upper zone. 3. Right effusion of 40 mm."
    drafts = [
        "1. Heart not enlarged. 2. Nodule of 6 mm, left upper zone. 3. Right pleural fluid, 15 mm.",
        "There is a small nodule in the left upper zone. No pleural effusion. No pneumothorax of 9 mm.",
        reference,
    ]
    study = {"image": "film.png", "reference": reference}
    rows = [{"id": str(n), **study, "prediction": draft} for n, draft in enumerate(drafts)]
    file = tmp_path / "predictions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = measure_style(file)
    # Five findings are in both texts: two, one that was given no number, and two.
    assert (found["given in mm"].value, found["given in mm"].count) == (4 / 5, 5)
    assert found["mm of the right size"].value == 3 / 5
    assert found["numbered list"].value == 2 / 3
    assert 0.5 < found["ROUGE-L"].value < 0.9
    assert found["label F1, macro"].value == pytest.approx((1 + 0.8) / 2)
    assert [band("Lung Lesion", mm) for mm in (5, 6, 14, 20, 35, 60, None)] == [
        None, "small", "small", None, "large", "large", None,
    ]  # fmt: skip
    assert [line.count("|") for line in style_table([file, file]).splitlines()] == [4] * 7
