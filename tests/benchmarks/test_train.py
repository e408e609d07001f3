"""Training at a toy scale: it runs, it goes on after an interruption, and what it publishes can be exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks.phantom import loop
from benchmarks.phantom.dataset import draw_films
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.network import ATTRIBUTES, study_attributes
from benchmarks.phantom.train import Trainer, TrainingPlan, train
from export import export_artifact
from lite.errors import LiteError

PLAN = TrainingPlan(films=32, batch_size=4, see_steps=3, write_steps=3, warm_up_steps=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with films and tokenizer, to be copied rather than drawn again."""
    folder = tmp_path_factory.mktemp("work")
    Trainer(PLAN, folder, torch.device("cpu"))
    return folder


def own(work: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "films").symlink_to(work / "films")
    (folder / "tokenizer.model").symlink_to(work / "tokenizer.model")
    return folder


def trained(folder: Path) -> dict[str, torch.Tensor]:
    trainer = Trainer(PLAN, folder, torch.device("cpu"))
    trainer.run()
    return trainer.network.state_dict()


@pytest.mark.full
@pytest.mark.parametrize("stop_at", [("see", 2), ("write", 1)])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: tuple[str, int]
) -> None:
    whole = trained(own(work, tmp_path))
    (tmp_path / "second").mkdir()
    folder = own(work, tmp_path / "second")
    loss = Trainer._loss

    def interrupted(self: Trainer, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        if (self.stage, step) == stop_at:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(loop, "_SAVE_EVERY_S", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(folder)
    resumed = trained(folder)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_plan_does_not_go_on_from_this_one(work: Path, tmp_path: Path) -> None:
    folder = own(work, tmp_path)
    trained(folder)
    other = dataclasses.replace(PLAN, learning_rate=1e-4)
    with pytest.raises(LiteError, match="another plan .* use another --work folder"):
        Trainer(other, folder, torch.device("cpu")).run()


def test_films_of_another_seed_are_not_taken_for_ours(work: Path) -> None:
    with pytest.raises(LiteError, match="films of another run"):
        draw_films(work / "films", count=PLAN.films, seed=PLAN.seed + 1)


def test_too_few_films_for_a_pool_are_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(LiteError, match="got 32 films · expected at least 64: 8 batches of 8"):
        Trainer(dataclasses.replace(PLAN, batch_size=8), own(work, tmp_path), torch.device("cpu"))


@pytest.mark.full
def test_what_is_published_can_be_exported(work: Path, tmp_path: Path) -> None:
    folder = own(work, tmp_path)
    size = train(tmp_path / "checkpoint", plan=PLAN, work=folder)
    assert size <= 16_000_000
    artifact = export_artifact(
        tmp_path / "checkpoint" / "llava-rad-phantom", tmp_path / "checkpoint" / "base", tmp_path / "artifact"
    )
    fidelity = artifact.manifest.parts.decoder.fidelity
    assert fidelity is not None
    assert fidelity.divergence.mean_kl < 1e-3


def test_attributes_say_what_is_on_the_film() -> None:
    study = next(s for s in map(sample_study, range(1000)) if any(f.side == "bilateral" for f in s.findings))
    label = next(f.label for f in study.findings if f.side == "bilateral")
    true = {name for name, value in zip(ATTRIBUTES, study_attributes(study), strict=True) if value}
    assert {(label, "present"), (label, "left"), (label, "right")} <= true
    assert ("No Finding", "present") not in true
