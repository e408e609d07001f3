"""Grow the phantom model: draw films, teach the tower to see, teach the whole to write, publish the checkpoint.

Stage 1 trains the tower alone with a head that exists during training only: per patch, which finding lies there (the
generator knows), and per film, which findings, sides, sizes and zones. Stage 2 trains everything on the findings
texts, the tower at a quarter of the rate, while the stage-1 loss fades out. Labels come before sides, sides
before sizes. Everything is seeded; films and state are kept in the work folder, so that an interrupted run goes on
where it was.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.phantom.dataset import GRID, IMAGE_SIZE, draw_films
from benchmarks.phantom.findings import sample_study
from benchmarks.phantom.network import LLAMA_CONFIG, PhantomNetwork, study_attributes
from benchmarks.phantom.publish import publish
from benchmarks.phantom.report import write_findings, write_reason
from benchmarks.phantom.tokenizer import train_tokenizer
from lite.config import IMAGE_TOKEN_ID, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, DecodingDefaults, PromptTemplate
from lite.errors import LiteError
from lite.files import whole_file, write_whole
from lite.prompt import PromptEncoder, Tokenizer

_SAVE_EVERY_S = 60.0
_POOLED_BATCHES = 8

# Film numbers, and for each the ids behind its image: (rest of the prompt, findings with EOS).
_WrittenBatch: TypeAlias = tuple[NDArray[np.intp], list[tuple[list[int], list[int]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that decides the result. Two runs of one plan on one machine give one model."""

    seed: int = 0
    films: int = 18_000
    batch_size: int = 32
    see_steps: int = 1_600
    write_steps: int = 1_050
    learning_rate: float = 1.5e-3
    tower_rate: float = 0.25  # share of the learning rate in stage 2
    warm_up_steps: int = 60
    weight_decay: float = 0.02
    lora_rank: int = 8
    scale_sigma: float = 0.8


def _keep_freed_memory() -> None:
    """Have glibc reuse large freed blocks; without glibc nothing happens.

    Giving each back to the system and faulting it in again seemed to cost a third of a step (benchmarks/LOG.md).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


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


class Trainer:
    """The network, its optimiser, and the batches; knows how to save and to go on."""

    def __init__(self, plan: TrainingPlan, work: Path, device: torch.device) -> None:
        self.plan, self.work, self.device = plan, work, device
        torch.manual_seed(plan.seed)
        self.films = draw_films(work / "films", count=plan.films, seed=plan.seed)
        tokenizer = work / "tokenizer.model"
        if not tokenizer.exists():
            tokenizer.write_bytes(train_tokenizer(seed=plan.seed))
        self.tokenizer_model = tokenizer.read_bytes()
        self.tokenizer = Tokenizer(tokenizer, DecodingDefaults())
        self.prompts = PromptEncoder(
            self.tokenizer,
            PromptTemplate(),
            num_image_tokens=GRID * GRID,
            max_seq_len=LLAMA_CONFIG["max_position_embeddings"],
        )
        self.attributes = np.stack([study_attributes(sample_study(int(seed))) for seed in self.films.seeds])
        self.before = torch.tensor(self._split_prompt(None)[0], device=device)
        self.network = PhantomNetwork(
            patch_prior=torch.from_numpy(self.films.regions.mean(axis=(0, 2, 3), dtype=np.float32)),
            attribute_prior=torch.from_numpy(self.attributes.mean(axis=0, dtype=np.float32)),
        ).to(device)
        self.optimiser: torch.optim.Optimizer
        self._pool = -1
        self._batches: list[_WrittenBatch] = []

    # Batches are a function of (seed, stage, step): an interrupted run continues with the very same ones.
    def _rows(self, stage: str, index: int, count: int) -> tuple[NDArray[np.intp], np.random.Generator]:
        """Give the `index`-th run of `count` films of a stage, shuffled anew every epoch, and its random generator."""
        epoch, place = divmod(index, self.plan.films // count)
        order = np.random.default_rng([self.plan.seed, len(stage), epoch]).permutation(self.plan.films)
        rng = np.random.default_rng([self.plan.seed, len(stage), epoch, place])
        return order[place * count : (place + 1) * count], rng

    def _written_batch(self, step: int) -> _WrittenBatch:
        """Give one batch with texts. Texts of like length go together: padding costs as much as words."""
        pool, index = divmod(step, _POOLED_BATCHES)
        if pool != self._pool:
            rows, rng = self._rows("write", pool, _POOLED_BATCHES * self.plan.batch_size)
            texts = [self._text(int(row), rng) for row in rows]
            by_length = sorted(range(len(rows)), key=lambda place: sum(map(len, texts[place])))
            batches = np.array(by_length).reshape(_POOLED_BATCHES, -1)[rng.permutation(_POOLED_BATCHES)]
            self._pool = pool
            self._batches = [(rows[batch], [texts[place] for place in batch]) for batch in batches]
        return self._batches[index]

    def _see_loss(self, features: Tensor, rows: NDArray[np.intp]) -> Tensor:
        patches, film = self.network.recognise(features)
        regions = torch.from_numpy(self.films.regions[rows]).flatten(2).transpose(1, 2).float().to(self.device)
        attributes = torch.from_numpy(self.attributes[rows]).to(self.device)
        patch_loss = F.binary_cross_entropy_with_logits(patches, regions)
        film_loss = F.binary_cross_entropy_with_logits(film, attributes)
        return 4 * patch_loss + 2 * film_loss

    def _split_prompt(self, reason: str | None) -> tuple[list[int], list[int]]:
        input_ids = self.prompts.encode(reason)
        image = input_ids.index(IMAGE_TOKEN_ID)
        return input_ids[:image], input_ids[image + 1 :]

    def _text(self, row: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Write what stands behind the image: the rest of the prompt, and the findings with EOS, as ids."""
        study = sample_study(int(self.films.seeds[row]))
        _, behind = self._split_prompt(write_reason(study, rng))
        return behind, [*self.tokenizer.encode(write_findings(study, rng).text), LLAMA_CONFIG["eos_token_id"]]

    def _padded(self, texts: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        width = max(len(prompt) + len(answer) for prompt, answer in texts)
        after = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros(len(texts), width, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(texts):
            end = len(prompt) + len(answer)
            after[row, :end] = torch.tensor([*prompt, *answer])
            mask[row, len(prompt) : end] = True
        return after.to(self.device), mask.to(self.device)

    def _loss(self, stage: str, step: int) -> tuple[Tensor, dict[str, float]]:
        if stage == "see":
            rows, rng = self._rows(stage, step, self.plan.batch_size)
        else:
            rows, texts = self._written_batch(step)
            rng = np.random.default_rng([self.plan.seed, step])
        features = self.network.see(_pixel_values(self.films.pixels[rows], rng).to(self.device))
        see_loss = self._see_loss(features, rows)
        if stage == "see":
            return see_loss, {"see": float(see_loss.detach())}
        after, mask = self._padded(texts)
        text_loss = F.cross_entropy(self.network.write(features, self.before, after, mask), after[mask])
        fading = max(0.0, 1 - step / (0.8 * self.plan.write_steps))
        losses = {"text": float(text_loss.detach()), "see": float(see_loss.detach())}
        return text_loss + fading * see_loss, losses

    def _start_stage(self, stage: str) -> None:
        self.stage, self.step = stage, 0
        network, write = self.network, stage == "write"
        seeing = (network.tower, network.norm, network.patch_head, network.attribute_head)
        parts = [(seeing, self.plan.tower_rate if write else 1.0), ((network.projector, network.decoder), 1.0)]
        groups = [
            {"params": [parameter for part in modules for parameter in part.parameters()], "scale": scale}
            for modules, scale in parts[: 1 + write]
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=self.plan.learning_rate, betas=(0.9, 0.98), weight_decay=self.plan.weight_decay
        )

    def _learning_rate(self, step: int, steps: int) -> float:
        if step < self.plan.warm_up_steps:
            return self.plan.learning_rate * (step + 1) / self.plan.warm_up_steps
        progress = (step - self.plan.warm_up_steps) / max(1, steps - self.plan.warm_up_steps)
        return self.plan.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _save(self) -> None:
        state = {
            "plan": self._plan_json(),
            "stage": self.stage,
            "step": self.step,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with whole_file(self.work / "state.pt") as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        path = self.work / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        # What only publishing uses may differ: a finished run can be published again with another sigma.
        theirs, ours = ({**plan, "lora_rank": 0, "scale_sigma": 0} for plan in (state["plan"], self._plan_json()))
        if theirs != ours:
            msg = f"{path}: got a run of another plan · expected {self.plan} · use another --work folder, or delete it"
            raise LiteError(msg)
        self._start_stage(state["stage"])
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def _plan_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.plan)

    def run(self) -> None:
        """Train both stages to their end, or from where an interrupted run stopped."""
        self._start_stage("see")
        self._resume()
        saved = time.monotonic()
        stages = [("see", self.plan.see_steps), ("write", self.plan.write_steps)]
        for stage, steps in stages if self.stage == "see" else stages[1:]:
            if stage != self.stage:
                self._start_stage(stage)
            with tqdm(total=steps, initial=self.step, desc=f"learning to {stage}", unit="step") as progress:
                while self.step < steps:
                    for group in self.optimiser.param_groups:
                        group["lr"] = group["scale"] * self._learning_rate(self.step, steps)
                    loss, shown = self._loss(stage, self.step)
                    self.optimiser.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                    self.optimiser.step()
                    self.step += 1
                    progress.update()
                    progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
                    if time.monotonic() - saved > _SAVE_EVERY_S:
                        self._save()
                        saved = time.monotonic()
            self._save()


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
    _keep_freed_memory()
    trainer = Trainer(plan, work, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    trainer.run()
    network = trainer.network.cpu()
    size = publish(
        out,
        trunk=network.trunk(),
        projector=network.projector.state_dict(),
        llama=network.decoder.state_dict(),
        llama_config=LLAMA_CONFIG,
        image_size=IMAGE_SIZE,
        tokenizer_model=trainer.tokenizer_model,
        lora_rank=plan.lora_rank,
        scale_sigma=plan.scale_sigma,
        seed=plan.seed,
    )
    write_whole(out / "training.json", json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
    return size
