"""Adapting the phantom: it begins as the published model, learns, and changes LoRA and projector alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from repository import CHECKPOINT

import lite
from benchmarks.phantom.adapt import Adaptation, AdaptationPlan, adapt, published_writer
from benchmarks.phantom.dataset import training_seeds
from benchmarks.phantom.film import draw_film
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.train import TrainingPlan
from benchmarks.phantom.write import study_seed, write_studies
from export import export_artifact
from lite.artifact.open import Artifact
from lite.errors import LiteError
from lite.image.rendering import mimic_cxr_jpg
from lite.studies.sources.listed import read_studies

PUBLISHED = CHECKPOINT / "llava-rad-phantom"
PLAN = AdaptationPlan(films=32, batch_size=4, steps=12, warm_up_steps=2, image_tokens=16, image_method="mean")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, demo_artifact: Artifact) -> Path:
    """A work folder with the artifact that adapting would export, and films."""
    folder = tmp_path_factory.mktemp("adaptation")
    (folder / "artifact").symlink_to(demo_artifact.path)
    return folder


def start(work: Path, **changes: object) -> Adaptation:
    return Adaptation(dataclasses.replace(PLAN, **changes), work, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "method"), [(64, "diverse"), (16, "diverse"), (4, "mean"), (9, "attention")])
def test_it_begins_as_what_the_runtime_computes(
    work: Path, demo_artifact: Artifact, tmp_path: Path, tokens: int, method: str
) -> None:
    """With the LoRA widened and nothing trained: the same features, at the same positions, give the same logits."""
    adaptation = start(work, image_tokens=tokens, image_method=method)
    row, study = 3, sample_study(int(training_seeds(PLAN.films, PLAN.seed)[3]))
    assert adaptation.features.shape == (PLAN.films, tokens, 192)
    answer = [5, 300, 411, 7, 2]
    behind = adaptation.texts._split_prompt(None)[1]
    after, mask = torch.tensor([[*behind, *answer]]), torch.tensor([[False] * len(behind) + [True] * len(answer)])
    with torch.no_grad():
        features = torch.from_numpy(adaptation.features[[row]])
        ours = adaptation.network(features, adaptation.before, after, mask, adaptation.positions).log_softmax(-1)
    film = tmp_path / "film.png"
    Image.fromarray(mimic_cxr_jpg(draw_film(study).stored, monochrome1=False)).save(film)
    with lite.load(
        demo_artifact.path, engine="torch", device="cpu", cache_dtype="float32",
        image_tokens=tokens, image_method=method, rows=1,
    ) as model:  # fmt: skip
        theirs = torch.from_numpy(model.score(film, answer)).log_softmax(-1)
    assert float((ours - theirs).abs().max()) < 0.02


def test_training_films_are_nobody_elses() -> None:
    """Neither those that the phantom was grown on nor any that figures are measured on."""
    plan = AdaptationPlan()
    ours = set(training_seeds(plan.films, plan.seed).tolist())
    assert len(ours) == plan.films
    assert not ours & set(training_seeds(TrainingPlan().films, TrainingPlan().seed).tolist())
    assert not ours & {study_seed(seed, index) for seed in (0, 1, 5, 26_112_301) for index in range(600)}


def test_another_rank_or_number_is_refused_before_anything_is_drawn(tmp_path: Path, work: Path) -> None:
    for changes, message in (
        ({"lora_rank": 4}, "got a LoRA of rank 4 .* expected at least 8"),
        ({"image_tokens": 15}, "expected a square: 1, 4, 9, 16"),
    ):
        (tmp_path / "artifact").unlink(missing_ok=True)
        (tmp_path / "artifact").symlink_to((work / "artifact").resolve())
        with pytest.raises(LiteError, match=message):
            adapt(tmp_path / "out", plan=dataclasses.replace(PLAN, **changes), work=tmp_path)  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.fixture(scope="module")
def adapted(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted") / "checkpoint"
    adapt(folder, plan=PLAN, work=work)
    return folder


@pytest.mark.full
def test_only_lora_and_projector_change(adapted: Path, work: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before, after = files(PUBLISHED), files(adapted)
    trained = {"adapter_model.bin", "non_lora_trainables.bin"}
    assert {name for name in before if before[name] != after[name]} == {*trained, "config.json", "adapter_config.json"}
    assert set(after) - set(before) == {"training.json"}
    old, new = (torch.load(folder / "adapter_model.bin", weights_only=True) for folder in (PUBLISHED, adapted))
    assert set(old) == set(new)
    for name, tensor in old.items():
        grown = new[name] if "lora_A" in name else new[name].T
        first = grown[:8] if "lora_A" in name else grown[:8].T
        assert 0 < float((first - tensor).abs().max()) < 0.05, name
        assert len(grown) == 16
        assert bool(grown[8:].any()), name
    # A state holds all: the base in it is the base.
    state = torch.load(work / "state-home-mean-16.pt", weights_only=True)["network"]
    begun = published_writer(rank=16).state_dict()
    changed = {name for name in begun if not torch.equal(state[name], begun[name])}
    assert changed == {name for name in begun if "lora_" in name or name.startswith("projector")}


@pytest.mark.full
def test_the_loss_falls(adapted: Path, work: Path) -> None:
    """On the batches that it was trained on, before and after."""
    assert adapted.exists()
    adaptation = start(work)

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([float(adaptation._loss(step)[0]) for step in range(6)]))

    before = loss()
    adaptation._start_stage("write")
    adaptation._resume()
    assert loss() < 0.9 * before


@pytest.mark.full
def test_what_is_written_is_exported_and_read_as_any_checkpoint(adapted: Path, tmp_path: Path) -> None:
    artifact = export_artifact(adapted, CHECKPOINT / "base", tmp_path / "artifact")
    fidelity = artifact.manifest.parts.decoder.fidelity
    assert fidelity is not None
    assert fidelity.divergence.mean_kl < 1e-3
    (study,) = read_studies(write_studies(tmp_path / "studies", count=1, seed=3, dicom=False))
    with lite.load(artifact.path, device="cpu", image_tokens=16, image_method="mean", rows=1) as model:
        found = model.findings(study.path, max_new_tokens=8)
    assert found.num_image_tokens == 16
    assert found.text
