"""A decoder layer rounded by the exporter's own functions, with what it stores and how long that took.

Two kinds. `Plain` looks at the weights alone. `Calibrated` is the exporter's true-sequential GPTQ: its hidden states
lie in two files, one before the layer and one behind it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import torch

from benchmarks.quality.real.decoder import EMBEDDINGS, FINAL_NORM, HEAD
from export.quantize.bnb import quantize_int8, quantize_nf4
from export.quantize.calibration import FINDINGS, KINDS, HiddenStates
from export.quantize.gptq import Quantized, gptq, round_to_nearest
from export.quantize.importance import IMPORTANCE_STUDIES, Importance, SourceDecoder, measure_importance, uniform
from export.quantize.layerwise import LayerQuantizer
from export.source.lora import LINEARS
from export.write.decoder import grid_of
from kernels.bnb import Int8Weight, Nf4Weight
from lite.errors import LiteError

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.quality.real.decoder import RealDecoder
    from benchmarks.quality.real.texts import Block
    from export.quantize.layerwise import RoundsLinear
    from export.settings import ExportSettings

_NF4_BITS: Final = 4 + 8 / 64 + 32 / (64 * 256)  # a code, a block's magnitude, and that of 256 blocks


class Skipped(LiteError):  # noqa: N818 - nothing went wrong
    """Raised where a way cannot be tried here, and that is not its fault: says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLayer:
    """A layer as it would be computed with."""

    norms: Mapping[str, Tensor]
    linears: Mapping[str, Tensor]  # float32 [N, K], by name without ".weight"
    bits: Mapping[str, float]  # what each linear stores, scales and zeros counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every way to round is given."""

    decoder: RealDecoder
    blocks: Sequence[Block]  # to calibrate on
    folder: Path  # an empty one, for hidden states: twice the tokens times the hidden size, in float32
    device: str  # "cpu", "cuda" or "cuda:N"
    default_errors: Mapping[str, float]  # of each linear as the exporter's default has rounded it
    advance: Callable[[], object]  # called as `LayerQuantizer` does


class Rounding(Protocol):
    """A way to round a decoder, layer after layer."""

    errors: dict[str, float]  # of each linear's outputs over the calibration, where it is calibrated

    @property
    def seconds(self) -> float:
        """What rounding has taken so far, and calibrating."""

    def round(self, index: int, layer: dict[str, Tensor]) -> RoundedLayer:
        """Round a layer; each but the first is the one behind the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to round."""

    name: str
    make: Callable[[Setup], Rounding]
    usual: bool = True  # measured unless others are named


@dataclass(slots=True)
class Timed:
    """Counts seconds, on a GPU too."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what a block takes."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started


class Plain:
    """Rounds each linear by itself."""

    def __init__(self, one: Callable[[Tensor], tuple[Tensor, float]], device: str) -> None:
        """Take what rounds a weight, float32 [N, K], and says how many bits it takes."""
        self._one, self._device, self._timed = one, device, Timed()
        self.errors: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """See `Rounding`."""
        return self._timed.seconds

    def round(self, index: int, layer: dict[str, Tensor]) -> RoundedLayer:  # noqa: ARG002 - a layer is like another
        """See `Rounding`."""
        with self._timed.running():
            made = {name: self._one(layer[f"{name}.weight"].to(self._device)) for name in LINEARS}
        norms = {name: tensor.half() for name, tensor in layer.items() if "layernorm" in name}
        return RoundedLayer(
            norms=norms,
            linears={name: weight for name, (weight, _) in made.items()},
            bits={name: bits for name, (_, bits) in made.items()},
        )


def by_settings(settings: ExportSettings) -> Callable[[Tensor], tuple[Tensor, float]]:
    """Return how the exporter rounds a weight in a format that takes no calibration."""

    def rounded(weight: Tensor) -> tuple[Tensor, float]:
        if settings.decoder_format == "bnb-nf4":
            return Nf4Weight.from_tensors(quantize_nf4(weight.half())).dequantize(torch.float32), (
                _NF4_BITS * weight.numel()
            )
        if settings.decoder_format == "bnb-int8":
            stored = Int8Weight.from_tensors(quantize_int8(weight))
            return stored.dequantize(torch.float32), 8 * weight.numel() + 32 * len(weight)
        nearest = round_to_nearest(weight, grid_of(settings, weight.shape[1], bits=settings.bits))
        return nearest.dequantized(), stored_bits(nearest)

    return rounded


def stored_bits(rounded: Quantized) -> float:
    """Return the bits that a rounded linear takes in a GPTQ file: its integers, and a group's scale and zero."""
    bits: float = rounded.values.numel() * rounded.grid.bits + rounded.scales.numel() * (16 + rounded.grid.bits)
    return bits


class Calibrated:
    """Rounds by the exporter's GPTQ of a layer."""

    def __init__(
        self,
        setup: Setup,
        settings: ExportSettings,
        *,
        rounds: RoundsLinear = gptq,
        bits: Callable[[Quantized], float] = stored_bits,
    ) -> None:
        """Embed the calibration blocks.

        Args:
            setup: What is rounded, and on what it is calibrated.
            settings: How to round.
            rounds: Rounds one linear.
            bits: Says what its result stores.
        """
        decoder, blocks = setup.decoder, setup.blocks
        self._config, self._advance = decoder.config, setup.advance
        self._settings = dataclasses.replace(settings, device=setup.device)
        self._rounds, self._bits, self._timed = rounds, bits, Timed()
        self.errors: dict[str, float] = {}
        # As of a report's tokens: the first, and those that count 1.
        self._kinds = [torch.tensor([KINDS.index("first"), *[FINDINGS] * (len(block) - 1)]) for block in blocks]
        with self._timed.running():
            self._inputs = HiddenStates(setup.folder / "inputs", [len(b) for b in blocks], decoder.config.hidden_size)
            embeddings = decoder.read(EMBEDDINGS)
            self._inputs.fill(embeddings[torch.tensor(block)] for block in blocks)
            self._outputs = self._inputs.beside(setup.folder / "outputs")
            self._importance = self._measured(setup)

    def _measured(self, setup: Setup) -> list[Importance]:
        decoder, given = setup.decoder, self._settings.gptq.token_weights
        if given is not None:
            return [uniform(given.image, given.prompt)] * decoder.config.num_hidden_layers
        source = SourceDecoder(
            config=decoder.config, read_layer=decoder.read_layer, norm=decoder.read(FINAL_NORM), head=decoder.read(HEAD)
        )
        some = range(min(IMPORTANCE_STUDIES, len(self._kinds)))
        states = HiddenStates(
            setup.folder / "importance", [self._inputs.lengths[place] for place in some], decoder.config.hidden_size
        )
        states.fill(self._inputs.read(place) for place in some)
        found = measure_importance(source, states, [self._kinds[place] for place in some], device=setup.device)
        states.remove()
        return found

    @property
    def seconds(self) -> float:
        """See `Rounding`."""
        return self._timed.seconds

    def round(self, index: int, layer: dict[str, Tensor]) -> RoundedLayer:
        """See `Rounding`."""
        name = f"model.layers.{index}"
        with self._timed.running():
            quantizer = LayerQuantizer(
                name, layer, self._config, self._settings, advance=self._advance, rounds=self._rounds
            )
            quantizer.quantize(self._inputs, self._outputs, self._kinds, self._importance[index])
        self._inputs, self._outputs = self._outputs, self._inputs
        self.errors |= {f"{name}.{linear}": error for linear, error in quantizer.errors.items()}
        rounded = quantizer.linears
        return RoundedLayer(
            norms=quantizer.norms,
            linears={linear: made.dequantized() for linear, made in rounded.items()},
            bits={linear: self._bits(made) for linear, made in rounded.items()},
        )
