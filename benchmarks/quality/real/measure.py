"""The loop: each way rounds the decoder, layer by layer, and what comes out is set beside the decoder in float32.

    blocks to judge by ─▶ embeddings ─┬─ float layers ──────▶ last hidden states ─┐  norm, head, a block at a time
                                      └─ rounded layers … ──▶ last hidden states ─┴─▶ KL, same top token, perplexity

A layer at a time goes through rounding and judging, so one layer of each is in memory, and the hidden states of the
blocks (512 tokens of SmolLM2 are 1.2 MB). Logits are never kept: those of 20,480 tokens would be 4 GB.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from benchmarks.quality.real.decoder import EMBEDDINGS, FINAL_NORM, HEAD
from benchmarks.quality.real.rounding import Setup, Skipped
from export.quantize.layerwise import PASSES
from export.source import forward
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary, StudyDivergence, compare_logits, summarise
from lite.eval.figures import Estimate, bootstrap_interval, ratio

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.quality.real.decoder import RealDecoder
    from benchmarks.quality.real.rounding import Way
    from benchmarks.quality.real.texts import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A rounded decoder beside the float one."""

    bits: float  # stored for a weight of the layers' linears, in the mean
    divergence: DivergenceSummary
    kl_ratio: Estimate | None  # to the exporter's default; the same blocks drawn for both
    seconds: float  # of rounding, and of what calibrating takes
    errors: Mapping[str, float]  # of each linear's outputs over the calibration, relative to them


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table. What was skipped or failed says why."""

    name: str
    judged: Judged | None = None
    skipped: str | None = None
    error: str | None = None


class States:
    """The hidden states of some blocks on their way through a decoder, float32 [T, C] each."""

    def __init__(self, decoder: RealDecoder, blocks: Sequence[Block], device: str) -> None:
        """Embed the blocks."""
        embeddings = decoder.read(EMBEDDINGS)
        self._config, self._device = decoder.config, device
        self.hidden = [embeddings[torch.tensor(block)].to(device) for block in blocks]

    @torch.inference_mode()
    def through(
        self,
        norms: Mapping[str, Tensor],
        linears: Mapping[str, Tensor],
        product: Callable[[Tensor, Tensor], Tensor] = functional.linear,
    ) -> None:
        """Go through a layer; its linears [N, K] by name without ".weight", each computed by a product."""
        here = {name: weight.to(self._device, torch.float32) for name, weight in linears.items()}
        for place, hidden in enumerate(self.hidden):
            self.hidden[place] = forward.decoder_layer(
                self._config, norms, lambda name, x: product(x, here[name]), hidden
            )


class Judge:
    """The float decoder's last hidden states on some blocks, and how far others' lead from its distributions."""

    def __init__(self, decoder: RealDecoder, blocks: Sequence[Block], device: str) -> None:
        """Run the float decoder."""
        self.decoder, self.blocks, self.device = decoder, blocks, device
        self._head = decoder.read(HEAD).to(device)
        self._norm = decoder.read(FINAL_NORM)
        states = self.start()
        for index in tqdm(range(decoder.config.num_hidden_layers), desc="float32", unit=" layers", disable=None):
            layer = decoder.read_layer(index)
            states.through(layer, {name.removesuffix(".weight"): tensor for name, tensor in layer.items()})
        self._hidden = states.hidden
        losses = [
            functional.cross_entropy(self._logits(hidden), torch.tensor(block[1:], device=device), reduction="sum")
            for hidden, block in zip(self._hidden, blocks, strict=True)
        ]
        self.perplexity = math.exp(sum(map(float, losses)) / sum(len(block) - 1 for block in blocks))

    def start(self) -> States:
        """Return the blocks' embeddings."""
        return States(self.decoder, self.blocks, self.device)

    def compare(self, states: States, begin: int = 1, beside: States | None = None) -> list[StudyDivergence]:
        """Return each block's divergence from the float decoder or other states, of all tokens from `begin` on."""
        logits = functools.partial(self._logits, begin=begin - 1)
        reference = self._hidden if beside is None else beside.hidden
        return [
            compare_logits(logits(own).cpu().numpy(), logits(other).cpu().numpy(), block[begin:])
            for own, other, block in zip(reference, states.hidden, self.blocks, strict=True)
        ]

    @torch.inference_mode()
    def _logits(self, hidden: Tensor, begin: int = 0) -> Tensor:
        normed = forward.rms_norm(hidden[begin:-1], self._norm, self.decoder.config.rms_norm_eps)
        return functional.linear(normed, self._head)


def measure(ways: Sequence[Way], judge: Judge, calibration: Sequence[Block]) -> Iterator[Row]:
    """Round and judge in every way; the first is what the others are set beside. One that fails stops no other.

    Raises:
        LiteError: the first fails.
    """
    beside: list[StudyDivergence] = []
    errors: Mapping[str, float] = {}
    for way in ways:
        try:
            judged, blocks = _judge(way, judge, calibration, beside, errors)
        except LiteError as error:
            if not beside:
                raise
            said = str(error)
            skipped = isinstance(error, Skipped)
            yield Row(name=way.name, skipped=said) if skipped else Row(name=way.name, error=said)
        else:
            beside, errors = beside or blocks, errors or judged.errors
            yield Row(name=way.name, judged=judged)


def _judge(
    way: Way,
    judge: Judge,
    calibration: Sequence[Block],
    beside: Sequence[StudyDivergence],
    default_errors: Mapping[str, float],
) -> tuple[Judged, list[StudyDivergence]]:
    decoder, states = judge.decoder, judge.start()
    num_layers = decoder.config.num_hidden_layers
    bits, weights = 0.0, 0
    with (
        tempfile.TemporaryDirectory(prefix="real-") as folder,
        tqdm(total=num_layers * PASSES, desc=way.name, unit=" passes", disable=None) as bar,
    ):
        setup = Setup(
            decoder=decoder,
            blocks=calibration,
            folder=Path(folder),
            device=judge.device,
            default_errors=default_errors,
            advance=bar.update,
        )
        rounding = way.make(setup)
        for index in range(num_layers):
            layer = rounding.round(index, decoder.read_layer(index))
            states.through(layer.norms, layer.linears)
            bits += sum(layer.bits.values())
            weights += sum(linear.numel() for linear in layer.linears.values())
            bar.update((index + 1) * PASSES - bar.n)
        blocks = judge.compare(states)
    judged = Judged(
        bits=bits / weights,
        divergence=summarise(blocks),
        kl_ratio=kl_ratio(blocks, beside) if beside else None,
        seconds=rounding.seconds,
        errors=rounding.errors,
    )
    return judged, blocks


def kl_ratio(blocks: Sequence[StudyDivergence], beside: Sequence[StudyDivergence]) -> Estimate:
    """Return the ratio of two mean KLs on the same blocks, its interval over blocks drawn for both at once."""
    sums = np.array([(ours.kl.sum(), theirs.kl.sum()) for ours, theirs in zip(blocks, beside, strict=True)])
    tokens = sum(block.num_tokens for block in blocks)
    return bootstrap_interval(sums, lambda drawn: ratio(drawn[:, 0], drawn[:, 1]), count=tokens)
