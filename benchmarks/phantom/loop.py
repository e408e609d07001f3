"""The loop that trains: steps in stages, a rate that rises and falls, and a state from which to go on.

What is learnt, and from what, is for `train` and `adapt` to say.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lite.errors import LiteError
from lite.files import whole_file

_SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What decides the result of every training. Two runs of one plan on one machine give one model."""

    seed: int = 0
    films: int
    batch_size: int = 32
    learning_rate: float
    warm_up_steps: int
    weight_decay: float
    lora_rank: int


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


class Training(ABC):
    """A network, its optimiser and its stages; knows how to save and to go on."""

    NOT_OF_TRAINING: ClassVar[frozenset[str]] = frozenset()
    """What of the plan may differ from that of the run that is gone on with."""

    def __init__(self, plan: Plan, network: nn.Module, *, stages: dict[str, int], state: Path) -> None:
        """Take a network to train.

        Args:
            plan: what to do.
            network: on the device where it is to be trained.
            stages: the steps of each.
            state: the file that an interrupted run goes on from.
        """
        self.plan, self.network, self.stages, self.state = plan, network, stages, state
        self.optimiser: torch.optim.Optimizer

    @abstractmethod
    def _loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a step of the stage, and what of it is shown: a function of plan and network alone."""

    @abstractmethod
    def _parts(self) -> Iterable[tuple[Iterable[nn.Parameter], float]]:
        """Return what learns in the stage, and at which share of the rate."""

    def _start_stage(self, stage: str) -> None:
        self.stage, self.step = stage, 0
        groups = [{"params": list(parameters), "scale": scale} for parameters, scale in self._parts()]
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
            "plan": dataclasses.asdict(self.plan),
            "stage": self.stage,
            "step": self.step,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        with whole_file(self.state) as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        if not self.state.exists():
            return
        state = torch.load(self.state, map_location="cpu", weights_only=True)
        theirs, ours = (
            {name: value for name, value in plan.items() if name not in self.NOT_OF_TRAINING}
            for plan in (state["plan"], dataclasses.asdict(self.plan))
        )
        if theirs != ours:
            msg = f"{self.state}: got a run of another plan · expected {self.plan}"
            raise LiteError(f"{msg} · use another --work folder, or delete it")
        self._start_stage(state["stage"])
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def run(self) -> None:
        """Train all stages to their end, or from where an interrupted run stopped."""
        _keep_freed_memory()
        names = list(self.stages)
        self._start_stage(names[0])
        self._resume()
        saved = time.monotonic()
        for stage in names[names.index(self.stage) :]:
            if stage != self.stage:
                self._start_stage(stage)
            steps = self.stages[stage]
            with tqdm(total=steps, initial=self.step, desc=f"learning to {stage}", unit="step") as progress:
                while self.step < steps:
                    for group in self.optimiser.param_groups:
                        group["lr"] = group["scale"] * self._learning_rate(self.step, steps)
                    loss, shown = self._loss(self.step)
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
