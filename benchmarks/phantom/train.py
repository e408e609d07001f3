"""Grow the phantom model: draw films, teach the tower to see, teach the whole to write, publish the checkpoint.

Stage 1 trains the tower alone with a head that exists during training only: per patch, which finding lies there (the
generator knows), and per film, which findings, sides, sizes and zones. Stage 2 trains everything on the findings
texts, the tower at a quarter of the rate, while the stage-1 loss fades out. Labels come before sides, sides
before sizes. Everything is seeded; films and state are kept in the work folder, so that an interrupted run goes on
where it was.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.phantom.dataset import GRID, IMAGE_SIZE, draw_films
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.loop import Plan, Training
from benchmarks.phantom.network import LLAMA_CONFIG, PhantomNetwork, study_attributes
from benchmarks.phantom.publish import publish
from benchmarks.phantom.texts import Texts
from benchmarks.phantom.tokenizer import train_tokenizer
from lite.config import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from lite.files import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan(Plan):
    """Everything that decides the model."""

    films: int = 18_000
    see_steps: int = 1_600
    write_steps: int = 1_050
    learning_rate: float = 1.5e-3
    tower_rate: float = 0.25  # share of the learning rate in stage 2
    warm_up_steps: int = 60
    weight_decay: float = 0.02
    lora_rank: int = 8
    scale_sigma: float = 0.8


def _pixel_values(grey: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Turn grey levels [B, S, S] into pixel_values [B, 3, S, S], shifted and re-exposed a little at random."""
    rows = []
    for film in grey:
        down, across = rng.integers(-4, 5, size=2)
        padded = np.pad(film, 4, mode="edge")
        rows.append(padded[4 + down : 4 + down + IMAGE_SIZE, 4 + across : 4 + across + IMAGE_SIZE])
    levels = np.stack(rows).astype(np.float32) / 255
    gain = rng.uniform(0.9, 1.1, size=(len(grey), 1, 1))
    bias = rng.uniform(-0.05, 0.05, size=(len(grey), 1, 1))
    levels = np.clip((levels - 0.5) * gain + 0.5 + bias, 0, 1).astype(np.float32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (torch.from_numpy(levels)[:, None] - mean) / std


class Trainer(Training):
    """Both stages: what is learnt in each, and from what."""

    NOT_OF_TRAINING: ClassVar = frozenset({"lora_rank", "scale_sigma"})  # published again with another sigma, say

    plan: TrainingPlan
    network: PhantomNetwork

    def __init__(self, plan: TrainingPlan, work: Path, device: torch.device) -> None:
        self.device = device
        torch.manual_seed(plan.seed)
        self.films = draw_films(work / "films", count=plan.films, seed=plan.seed)
        tokenizer = work / "tokenizer.model"
        if not tokenizer.exists():
            tokenizer.write_bytes(train_tokenizer(seed=plan.seed))
        self.tokenizer_model = tokenizer.read_bytes()
        self.texts = Texts(
            self.films, tokenizer, seed=plan.seed, batch_size=plan.batch_size, num_image_tokens=GRID * GRID
        )
        self.before = self.texts.before.to(device)
        self.attributes = np.stack([study_attributes(sample_study(int(seed))) for seed in self.films.seeds])
        network = PhantomNetwork(
            patch_prior=torch.from_numpy(self.films.regions.mean(axis=(0, 2, 3), dtype=np.float32)),
            attribute_prior=torch.from_numpy(self.attributes.mean(axis=0, dtype=np.float32)),
        ).to(device)
        stages = {"see": plan.see_steps, "write": plan.write_steps}
        super().__init__(plan, network, stages=stages, state=work / "state.pt")

    def _see_loss(self, features: Tensor, rows: NDArray[np.intp]) -> Tensor:
        patches, film = self.network.recognise(features)
        regions = torch.from_numpy(self.films.regions[rows]).flatten(2).transpose(1, 2).float().to(self.device)
        attributes = torch.from_numpy(self.attributes[rows]).to(self.device)
        patch_loss = F.binary_cross_entropy_with_logits(patches, regions)
        film_loss = F.binary_cross_entropy_with_logits(film, attributes)
        return 4 * patch_loss + 2 * film_loss

    def _loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        if self.stage == "see":
            rows, rng = self.texts.rows(self.stage, step, self.plan.batch_size)
        else:
            rows, after, mask = self.texts.batch(step)
            rng = np.random.default_rng([self.plan.seed, step])
        features = self.network.see(_pixel_values(self.films.pixels[rows], rng).to(self.device))
        see_loss = self._see_loss(features, rows)
        if self.stage == "see":
            return see_loss, {"see": float(see_loss.detach())}
        after, mask = after.to(self.device), mask.to(self.device)
        text_loss = F.cross_entropy(self.network.writer(features, self.before, after, mask), after[mask])
        fading = max(0.0, 1 - step / (0.8 * self.plan.write_steps))
        losses = {"text": float(text_loss.detach()), "see": float(see_loss.detach())}
        return text_loss + fading * see_loss, losses

    def _parts(self) -> Iterator[tuple[Iterator[nn.Parameter], float]]:
        network, write = self.network, self.stage == "write"
        seeing = (network.tower, network.norm, network.patch_head, network.attribute_head)
        yield (weight for part in seeing for weight in part.parameters()), self.plan.tower_rate if write else 1.0
        if write:
            yield network.writer.parameters(), 1.0


def train(out: Path, *, plan: TrainingPlan, work: Path) -> int:
    """Train the phantom model and publish it in LLaVA-Rad's layout.

    Args:
        out: Folder that receives `llava-rad-phantom/` and `base/`.
        plan: What to do.
        work: Folder for films and state; a run that was interrupted continues from it.

    Returns:
        Bytes of the published checkpoint.

    Raises:
        LiteError: `work` holds a run of another plan.
    """
    work.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(plan, work, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    trainer.run()
    network = trainer.network.cpu()
    size = publish(
        out,
        trunk=network.trunk(),
        projector=network.writer.projector.state_dict(),
        llama=network.writer.decoder.state_dict(),
        llama_config=LLAMA_CONFIG,
        image_size=IMAGE_SIZE,
        tokenizer_model=trainer.tokenizer_model,
        lora_rank=plan.lora_rank,
        scale_sigma=plan.scale_sigma,
        seed=plan.seed,
    )
    write_whole(out / "training.json", json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
    return size
