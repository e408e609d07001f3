"""GPTQ of a decoder layer, true-sequential: what is rounded next sees what has been rounded before.

    hidden ─norm─▶ q, k, v ─attention─▶ o ─ + ─norm─▶ gate, up ─silu·─▶ down ─ + ─▶ hidden of the next layer
              H₁   round        H₂   round      H₃    round      H₄   round

The calibration sequences pass through the layer once for each H, with the weights rounded so far; in the end they have
passed through the rounded layer, and are the next one's inputs. One layer, one H and one sequence are in memory.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.nn import functional

from export.quantize import attention, folding
from export.quantize.gptq import Hessian, Quantized, gptq, relative_error
from export.quantize.importance import token_weights
from export.source import forward
from export.write.decoder import grid_of, require_float16
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from export.quantize.calibration import HiddenStates
    from export.quantize.gptq import Grid
    from export.quantize.importance import Importance
    from export.settings import ExportSettings, GptqSettings
    from lite.config import DecoderConfig

    _Weights = Callable[[str, int], Tensor]
    """Of a linear's Hessian and a sequence: λ of each token."""

PASSES: Final = 6
"""Over the calibration sequences, for each layer: four to round what they go through, two to write what comes out."""
FOLD_SEQUENCES: Final = 16
"""What a fold is judged on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """A norm, the linears that read it, and the linear behind them, whose channels `producer` makes."""

    norm: str
    readers: tuple[str, ...]
    producer: str
    last: str


_ATTENTION: Final = _Half(
    norm="input_layernorm.weight",
    readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    producer="self_attn.v_proj.weight",
    last="self_attn.o_proj",
)
_MLP: Final = _Half(
    norm="post_attention_layernorm.weight",
    readers=("mlp.gate_proj", "mlp.up_proj"),
    producer="mlp.up_proj.weight",
    last="mlp.down_proj",
)


class RoundsLinear(Protocol):
    """Rounds one linear by the Hessian of its inputs, as `gptq` does."""

    def __call__(self, weight: Tensor, hessian: Tensor, grid: Grid, options: GptqSettings, *, name: str) -> Quantized:
        """Return the weight, float32 [N, K], rounded; see `gptq`."""


class LayerQuantizer:
    """A decoder layer on its way: what is still float32, and what is rounded."""

    def __init__(
        self,
        name: str,
        layer: dict[str, Tensor],
        config: DecoderConfig,
        settings: ExportSettings,
        *,
        beside: Mapping[str, Tensor] = MappingProxyType({}),
        advance: Callable[[], object] = lambda: None,
        rounds: RoundsLinear = gptq,
    ) -> None:
        """Take a layer.

        Args:
            name: Of the layer, for messages.
            layer: Its weights, float32. Emptied: what has been rounded is not kept.
            config: The decoder's shape.
            settings: How to round, and where to compute.
            beside: By the name of a weight what is added to its products unrounded, [N, K]: a LoRA that is not merged.
            advance: Called `PASSES` times.
            rounds: Rounds a linear; something else where what is not exported is measured.

        Raises:
            CheckpointError: A weight does not fit float16.
        """
        for key, tensor in layer.items():
            require_float16(f"{name}.{key}", tensor)
        self.name, self.config, self.settings, self.advance = name, config, settings, advance
        self._rounds = rounds
        self.device = torch.device(settings.device)
        self.pending = {key: tensor.to(self.device) for key, tensor in layer.items()}
        layer.clear()
        self.beside = {key: tensor.to(self.device) for key, tensor in beside.items()}
        self.norms: dict[str, Tensor] = {}  # float16
        self.linears: dict[str, Quantized] = {}
        self.errors: dict[str, float] = {}  # of each linear's outputs: see `relative_error`

    @torch.inference_mode()
    def quantize(
        self, inputs: HiddenStates, outputs: HiddenStates, kinds: Sequence[Tensor], importance: Importance
    ) -> None:
        """Round the layer.

        Args:
            inputs: The hidden states it reads.
            outputs: The same sequences in another file; receives what the rounded layer makes of them.
            kinds: Of each token of each sequence, its place in `KINDS`.
            importance: What each kind counts in this layer.

        Raises:
            CheckpointError: What it sees is not finite, or a Hessian has no factor.
        """

        def weights(linear: str, index: int) -> Tensor:
            return token_weights(importance, linear, kinds[index]).to(self.device)

        self._round_half(_ATTENTION, inputs, outputs, weights)
        self._round_half(_MLP, outputs, outputs, weights)

    def _round_half(self, half: _Half, inputs: HiddenStates, outputs: HiddenStates, weights: _Weights) -> None:
        count = len(inputs)

        def hidden(index: int) -> Tensor:
            return inputs.read(index).to(self.device)

        def normed(index: int) -> Tensor:
            weight = self.norms[half.norm] if half.norm in self.norms else self.pending[half.norm]
            return forward.rms_norm(hidden(index), weight, self.config.rms_norm_eps)

        def between(linear: forward.Linear, index: int) -> Tensor:
            x = normed(index)
            return forward.attended(self.config, linear, x) if half is _ATTENTION else forward.gated(linear, x)

        if self.settings.gptq.fold_scales:
            self._fold(half.producer, (half.last,), lambda index: between(self._source_linear, index), count, weights)
            self._fold(half.norm, half.readers, normed, count, weights)
        self._keep_norm(half.norm)
        self._round(half.readers, normed, count, weights)
        linear = self._rounded_linear()
        self._round((half.last,), lambda index: between(linear, index), count, weights)
        linear = self._rounded_linear()
        for index in range(count):
            outputs.write(index, hidden(index) + linear(half.last, between(linear, index)))
        self.advance()

    def _keep_norm(self, name: str) -> None:
        """Round a norm to what will be stored, before anything is calibrated behind it."""
        rounded = self.pending.pop(name).half()
        _require_finite(rounded, f"{self.name}.{name}", "a norm that fits float16")
        self.norms[name] = rounded

    def _fold(
        self, producer: str, consumers: tuple[str, ...], inputs: Callable[[int], Tensor], count: int, weights: _Weights
    ) -> None:
        """Balance the channels between what makes them and what reads them, where GPTQ gains by it."""
        names = tuple(f"{consumer}.weight" for consumer in consumers)
        some = range(0, count, max(1, count // FOLD_SEQUENCES))[:FOLD_SEQUENCES]
        read = [self.pending[name] for name in names]
        mean_square, counted = torch.zeros((), device=self.device), 0.0
        for index in some:
            by_token = weights(consumers[0], index)
            mean_square = mean_square + by_token @ inputs(index).square()
            counted += float(by_token.sum())
        mean_square = mean_square / (counted or 1.0)
        _require_finite(mean_square, f"{self.name}.{consumers[0]}", "finite inputs from the calibration data")
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = (group, self.config.head_dim) if producer == _ATTENTION.producer else None
        grid = grid_of(self.settings, read[0].shape[1], bits=self.settings.bits)
        s = folding.propose(read, mean_square, grid, heads=heads)
        if s is None:
            return
        hessian = self._hessian(consumers[0])
        for index in some:
            hessian.add(inputs(index), weights(consumers[0], index))
        H, columns = hessian.take(f"{self.name}.{consumers[0]}"), folding.spread(s, heads)
        if folding.is_worth_it(read, columns, H, self.settings.gptq, grid):
            self.pending |= folding.fold(self.pending, producer, names, s, heads=heads)
            for name in {producer, *names} & self.beside.keys():
                scale = 1 / s.unsqueeze(1) if name == producer else columns
                self.beside[name] = self.beside[name] * scale

    def _round(self, names: tuple[str, ...], inputs: Callable[[int], Tensor], count: int, weights: _Weights) -> None:
        """Gather the Hessians of some linears that read the same inputs, and round them."""
        grid = grid_of(self.settings, self.pending[f"{names[0]}.weight"].shape[1], bits=self.settings.bits)
        for name, H in zip(names, self._hessians(names, inputs, count, weights), strict=True):
            weight = self.pending.pop(f"{name}.weight")
            self.linears[name] = self._rounds(weight, H, grid, self.settings.gptq, name=f"{self.name}.{name}")
            self.errors[name] = relative_error(weight, self.linears[name].dequantized(), H)
        self.advance()

    def _hessians(
        self, names: tuple[str, ...], inputs: Callable[[int], Tensor], count: int, weights: _Weights
    ) -> list[Tensor]:
        """Return the Hessian of each of some linears that read the same inputs."""
        apart = names == _ATTENTION.readers and self.settings.gptq.through_attention
        found = {name: self._hessian(name) for name in (names if apart else names[:1])}
        for index in range(count):
            by_token = weights(names[0], index)
            if apart:
                attention.add_sequence(found, self.config, self._source_linear, inputs(index), by_token)
            else:
                found[names[0]].add(inputs(index), by_token)
        taken = [hessian.take(f"{self.name}.{name}") for name, hessian in found.items()]
        return taken if apart else taken * len(names)

    def _hessian(self, name: str) -> Hessian:
        return Hessian(self.pending[f"{name}.weight"].shape[1], self.device)

    def _source_linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._whole(name, self.pending[f"{name}.weight"]))

    def _whole(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight with what is beside it."""
        return weight + self.beside[f"{name}.weight"] if f"{name}.weight" in self.beside else weight

    def _rounded_linear(self) -> forward.Linear:
        """Return the linears that are rounded, each expanded once."""
        expanded: dict[str, Tensor] = {}

        def apply(name: str, x: Tensor) -> Tensor:
            if name not in expanded:
                expanded[name] = self._whole(name, self.linears[name].dequantized())
            return functional.linear(x, expanded[name])

        return apply


def _require_finite(tensor: Tensor, name: str, expected: str) -> None:
    if not bool(tensor.isfinite().all()):
        msg = f"{name}: got values that are not finite · expected {expected} · check the films of --calibration-data"
        raise CheckpointError(f"{msg}, and that the base model is the one the adapter was trained on")
