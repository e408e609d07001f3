"""What a token counts: how much the findings feel an error in what a layer makes of it.

A change Δy of a linear's output at one token changes the cross-entropy of the findings by g·Δy, with g its gradient
there, and their KL by about the mean of (g·Δy)²/2 over labels that the model draws itself (Fisher). So a token's weight
λ in the Hessian Σ λ x xᵀ is the mean of ‖g‖², measured on some of the calibration studies by one pass back through the
source's layers. It differs by layer and by kind of token, and is taken for each of these:

    first     position 0: what makes it an attention sink is its size, which the norms take out again. Only its key and
              its value count, and these do beyond all others: see `export.quantize.attention`
    prompt    the other tokens before the findings
    image     nine tenths of all tokens of the published model
    findings  these count 1

‖g‖² takes the tokens' errors for independent. Those of image tokens, much alike, are not: what many of them cost
together is more than the sum. Image and prompt count ‖g‖, half-way (on the phantom ‖g‖² cost a third more KL); the
first token is one, and counts ‖g‖² (on a trained decoder ‖g‖ cost 6 % more).

MBQ (arXiv 2412.19509) weighs the modalities so, and GuidedQuant (arXiv 2505.07004) every token.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from export.progress import progress_bar
from export.quantize.calibration import FINDINGS, KINDS, HiddenStates
from export.source import forward

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from lite.config import DecoderConfig

IMPORTANCE_STUDIES: Final = 8
OUTPUTS: Final = {
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""By the linear whose Hessian it is for: where the gradient is taken. Queries count as attention's outputs."""

Importance = dict[str, list[float]]
"""Of a layer: by the names of `OUTPUTS`, λ of each of `KINDS`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceDecoder:
    """The source's decoder behind the embeddings, float32, a layer at a time."""

    config: DecoderConfig
    read_layer: Callable[[int], dict[str, Tensor]]
    norm: Tensor
    head: Tensor


def uniform(image: float, prompt: float) -> Importance:
    """Return the importance of fixed weights."""
    return {key: [prompt, prompt, image, 1.0] for key in OUTPUTS}


def token_weights(importance: Importance, linear: str, kinds: Tensor) -> Tensor:
    """Return λ of each token of a sequence for a linear's Hessian, float32 [T]; `kinds` are places in `KINDS`.

    q, k and v count as what the attention makes of them.
    """
    return torch.tensor(importance.get(linear, importance["self_attn.o_proj"]))[kinds]


def measure_importance(
    source: SourceDecoder, states: HiddenStates, kinds: Sequence[Tensor], *, device: str = "cpu", show: bool = False
) -> list[Importance]:
    """Return the importance of each layer's tokens.

    Args:
        source: The decoder.
        states: What its first layer reads: the sequences to measure on. Files are written beside it, as many as there
            are layers, and deleted.
        kinds: Of each token of each sequence, its place in `KINDS`.
        device: Where to compute.
        show: Whether to draw progress bars.
    """
    config, folder = source.config, states.file.parent
    num_layers, places = config.num_hidden_layers, range(len(states))
    before = [states]
    with progress_bar("what tokens count", total=2 * num_layers, unit="layer", show=show) as bar:
        for index in range(num_layers):
            before.append(states.beside(folder / f"importance-{index + 1:04d}"))
            run = _Layer(config, source.read_layer(index), device)
            with torch.no_grad():
                before[-1].fill(run(before[-2].read(place).to(device)) for place in places)
            bar.update()
        gradients = _gradients_of_findings(source, before[-1], kinds, folder / "importance-gradients", device)
        found = []
        for index in reversed(range(num_layers)):
            before.pop().remove()
            run = _Layer(config, source.read_layer(index), device)
            found.append(_back_through(run, before[-1], gradients, kinds))
            bar.update()
    gradients.remove()
    return found[::-1]


class _Layer:
    """A decoder layer that keeps what its linears make, to be asked for gradients."""

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor], device: str) -> None:
        self.config = config
        self.device = device
        self.weights = {name: weight.to(device, torch.float32) for name, weight in weights.items()}
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, hidden: Tensor) -> Tensor:
        return forward.decoder_layer(self.config, self.weights, self._linear, hidden)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        self.outputs[name] = functional.linear(x, self.weights[f"{name}.weight"])
        return self.outputs[name]


def _gradients_of_findings(
    source: SourceDecoder, last: HiddenStates, kinds: Sequence[Tensor], file: Path, device: str
) -> HiddenStates:
    """Return the gradients behind the last layer of the cross-entropy of labels drawn from the model's own words."""
    norm, head = source.norm.to(device, torch.float32), source.head.to(device, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def gradient(place: int) -> Tensor:
        hidden = last.read(place).to(device).requires_grad_()
        scored = hidden[kinds[place].to(device) == FINDINGS]
        logits = functional.linear(forward.rms_norm(scored, norm, source.config.rms_norm_eps), head)
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(device)
        (found,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), hidden)
        return found

    gradients = last.beside(file)
    gradients.fill(gradient(place) for place in range(len(last)))
    return gradients


def _back_through(run: _Layer, inputs: HiddenStates, gradients: HiddenStates, kinds: Sequence[Tensor]) -> Importance:
    """Take the gradients from behind a layer to before it, and return what the tokens of its linears count."""
    sums = {name: torch.zeros(len(KINDS)) for name in OUTPUTS}
    count = torch.zeros(len(KINDS))
    for place, kind in enumerate(kinds):
        hidden = inputs.read(place).to(run.device).requires_grad_()
        behind = run(hidden)
        named = [(name, run.outputs[output]) for name, outputs in OUTPUTS.items() for output in outputs]
        wanted = [hidden, *(output for _, output in named)]
        before, *found = torch.autograd.grad(behind, wanted, gradients.read(place).to(run.device))
        gradients.write(place, before)
        count += torch.bincount(kind, minlength=len(KINDS))
        for (name, _), gradient in zip(named, found, strict=True):
            sums[name].index_add_(0, kind, gradient.square().sum(1).cpu())
    means = {name: total / count.clamp_min(1) for name, total in sums.items()}
    return {name: _weights(mean / mean[FINDINGS].clamp_min(1e-30)) for name, mean in means.items()}


def _weights(squares: Tensor) -> list[float]:
    """Return λ of each kind of token, from the mean squares of the gradients relative to a findings token's."""
    return [float(squares[0]), *squares[1:].sqrt().tolist()]
