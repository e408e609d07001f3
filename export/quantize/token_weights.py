"""The search for what image and prompt tokens count in the Hessian, against a findings token.

Each candidate rounds the first layers with its own weights, and what that does to findings that are held out of the
calibration decides: their mean KL from the source, in nats per token. For a small decoder the first layers are all of
it; for a large one they are a sample, and the layers behind them stay as they are, since rounding all 32 layers for
each of a few candidates would take as many times as long as the export itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from export.progress import progress_bar
from export.quantize.calibration import HiddenStates, start_states, token_weights
from export.quantize.layerwise import PASSES, LayerQuantizer
from export.settings import TokenWeights
from export.source import forward

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from export.quantize.calibration import CalibrationStudies
    from export.settings import ExportSettings
    from export.source.checkpoint import Checkpoint
    from export.studies import EncodedStudy

CANDIDATES: Final = tuple(
    TokenWeights(image=image, prompt=prompt)
    for image, prompt in ((1.0, 1.0), (1.0, 0.1), (0.3, 0.1), (0.1, 0.03), (0.03, 0.01))
)
"""From the plain Hessian to one of hardly anything but findings. A prompt is a few words that never change."""
SEARCH_LAYERS: Final = 4
SEARCH_STUDIES: Final = 32
"""Of the calibration studies, how many a search takes at most."""


def search_token_weights(
    checkpoint: Checkpoint,
    calibration: CalibrationStudies,
    features: Callable[[EncodedStudy], Tensor],
    folder: Path,
    settings: ExportSettings,
) -> tuple[TokenWeights, dict[str, float]]:
    """Return the best candidate, and the mean KL of each in nats per token.

    `features` runs the tower on a study's film: [P, hidden_size]. `folder` is for hidden states, deleted in the end.
    """
    fitted, judged = calibration.studies[:SEARCH_STUDIES], calibration.held_out
    P, layers, show = checkpoint.tower.num_patches, checkpoint.decoder.num_hidden_layers, settings.show_progress
    embeddings = checkpoint.read_base("model.embed_tokens.weight")
    inputs = start_states(folder / "search-inputs", [*fitted, *judged], features, embeddings, P, show=show)
    del embeddings
    source = _last_of(inputs, len(judged), folder / "search-source")
    rounded = {}
    passes = len(CANDIDATES) * min(SEARCH_LAYERS, layers) * PASSES
    with progress_bar("choosing λ", total=passes, unit="pass", show=show) as bar:
        for weights in CANDIDATES:
            by_token = [token_weights(study, P, weights) for study in fitted]
            by_token += [torch.zeros(inputs.lengths[len(fitted) + place]) for place in range(len(judged))]
            ahead = _rounded_ahead(checkpoint, inputs, by_token, settings, bar.update)
            rounded[weights] = _last_of(ahead, len(judged), folder / f"search-{weights}")
            ahead.remove()
    inputs.remove()
    for index in progress_bar("comparing them", range(layers), unit="layer", show=show):
        behind = rounded.values() if index >= SEARCH_LAYERS else ()
        _pass_through(checkpoint, index, [source, *behind], settings)
    kl = _mean_kl(checkpoint, judged, source, rounded, settings)
    for states in (source, *rounded.values()):
        states.remove()
    return min(kl, key=lambda weights: kl[weights]), {str(weights): value for weights, value in kl.items()}


def _rounded_ahead(
    checkpoint: Checkpoint,
    inputs: HiddenStates,
    by_token: Sequence[Tensor],
    settings: ExportSettings,
    advance: Callable[[], object],
) -> HiddenStates:
    """Return what the first layers, rounded, make of the sequences."""
    states = inputs
    for index in range(min(SEARCH_LAYERS, checkpoint.decoder.num_hidden_layers)):
        outputs = inputs.beside(inputs.file.with_name(f"search-layer-{index}"))
        layer, name = checkpoint.read_layer(index).merged(), f"model.layers.{index}"
        quantizer = LayerQuantizer(name, layer, checkpoint.decoder, settings, advance=advance)
        quantizer.quantize(states, outputs, by_token)
        if states is not inputs:
            states.remove()
        states = outputs
    return states


def _last_of(states: HiddenStates, count: int, file: Path) -> HiddenStates:
    """Copy the last sequences into a file of their own."""
    first = len(states) - count
    last = HiddenStates(file, states.lengths[first:], states.hidden_size)
    last.fill(states.read(first + place) for place in range(count))
    return last


@torch.inference_mode()
def _pass_through(
    checkpoint: Checkpoint, index: int, all_states: Sequence[HiddenStates], settings: ExportSettings
) -> None:
    """Run sequences through a layer as the source has it."""
    layer = {name: weight.to(settings.device) for name, weight in checkpoint.read_layer(index).merged().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, layer[f"{name}.weight"])

    for states in all_states:
        for place in range(len(states)):
            hidden = states.read(place).to(settings.device)
            states.write(place, forward.decoder_layer(checkpoint.decoder, layer, linear, hidden))


@torch.inference_mode()
def _mean_kl(
    checkpoint: Checkpoint,
    studies: Sequence[EncodedStudy],
    source: HiddenStates,
    rounded: Mapping[TokenWeights, HiddenStates],
    settings: ExportSettings,
) -> dict[TokenWeights, float]:
    """Return the mean KL of each candidate's predictions of the findings from the source's."""
    norm = checkpoint.read_base("model.norm.weight").to(settings.device)
    head = checkpoint.read_base("lm_head.weight").to(settings.device, torch.float32)

    def log_probs(states: HiddenStates, place: int) -> Tensor:
        hidden = states.read(place)[-len(studies[place].target_ids) :].to(settings.device)
        logits = functional.linear(forward.rms_norm(hidden, norm, checkpoint.decoder.rms_norm_eps), head)
        return logits.double().log_softmax(-1)

    total = dict.fromkeys(rounded, 0.0)
    tokens = 0
    for place in range(len(studies)):
        p = log_probs(source, place)
        tokens += len(p)
        for weights, states in rounded.items():
            total[weights] += float((p.exp() * (p - log_probs(states, place))).sum())
    return {weights: value / tokens for weights, value in total.items()}
