"""GPTQ of a decoder layer, true-sequential: what is rounded next sees what has been rounded before.

    hidden ─norm─▶ q, k, v ─attention─▶ o ─ + ─norm─▶ gate, up ─silu·─▶ down ─ + ─▶ hidden of the next layer
              H₁   round        H₂   round      H₃    round      H₄   round

The calibration sequences pass through the layer once for each H, with the weights rounded so far; in the end they have
passed through the rounded layer, and are the next one's inputs. One layer, one H and one sequence are in memory.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from export.quantize.folding import fold
from export.quantize.gptq import Hessian, Options, Quantized, gptq, relative_error
from export.source import forward
from export.write.decoder import grid_of, require_float16
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from export.quantize.calibration import HiddenStates
    from export.quantize.gptq import Grid
    from export.settings import ExportSettings
    from lite.config import DecoderConfig

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
PASSES = 6
"""Over the calibration sequences, for each layer: four to round what they go through, two to write what comes out."""


@dataclasses.dataclass(slots=True, kw_only=True)
class QuantizedLayer:
    """A rounded layer."""

    norms: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # float16
    linears: dict[str, Quantized] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each linear: the root mean square of its outputs' change, relative to its outputs."""


class LayerQuantizer:
    """Rounds decoder layers by what they see."""

    def __init__(
        self, config: DecoderConfig, settings: ExportSettings, *, advance: Callable[[], object] = lambda: None
    ) -> None:
        """Keep the settings; `advance` is called PASSES times a layer."""
        gptq = settings.gptq
        self.config = config
        self.settings = settings
        self.advance = advance
        self.device = torch.device(settings.device)
        self.options = Options(order=gptq.activation_order, clip=gptq.clip, refine=gptq.refine)

    @torch.inference_mode()
    def quantize(
        self,
        name: str,
        layer: dict[str, Tensor],
        inputs: HiddenStates,
        outputs: HiddenStates,
        weights: Sequence[Tensor],
    ) -> QuantizedLayer:
        """Round a layer.

        Args:
            name: Of the layer, for messages.
            layer: Its weights, float32. Emptied: what has been rounded is not kept.
            inputs: The hidden states it reads.
            outputs: The same sequences in another file; receives what the rounded layer makes of them.
            weights: λ of each token of each sequence; a sequence of zeros is passed on and not calibrated on.

        Raises:
            CheckpointError: A weight does not fit float16, what it sees is not finite, or a Hessian has no factor.
        """
        for key, tensor in layer.items():
            require_float16(f"{name}.{key}", tensor)
        done = QuantizedLayer()
        pending = {key: tensor.to(self.device) for key, tensor in layer.items()}
        layer.clear()
        state = _State(name=name, pending=pending, done=done, weights=[w.to(self.device) for w in weights])
        self._attention(state, inputs, outputs)
        self._mlp(state, outputs)
        return done

    def _attention(self, state: _State, inputs: HiddenStates, outputs: HiddenStates) -> None:
        def normed(index: int) -> Tensor:
            return self._norm(state, NORMS[0], self._read(inputs, index))

        def attended(linear: forward.Linear) -> Callable[[int], Tensor]:
            return lambda index: forward.attended(self.config, linear, normed(index))

        if self.settings.gptq.fold_scales:
            source = state.linear(rounded=False)
            self._fold(state, "self_attn.v_proj.weight", ("self_attn.o_proj",), attended(source))
            self._fold(state, NORMS[0], QKV, normed)
        self._keep_norm(state, NORMS[0])
        self._round(state, QKV, normed)
        self._round(state, ("self_attn.o_proj",), attended(state.linear(rounded=True)))
        self._write(state, "self_attn.o_proj", attended, inputs, outputs)

    def _mlp(self, state: _State, states: HiddenStates) -> None:
        def normed(index: int) -> Tensor:
            return self._norm(state, NORMS[1], self._read(states, index))

        def gated(linear: forward.Linear) -> Callable[[int], Tensor]:
            return lambda index: forward.gated(linear, normed(index))

        if self.settings.gptq.fold_scales:
            source = state.linear(rounded=False)
            self._fold(state, "mlp.up_proj.weight", ("mlp.down_proj",), gated(source))
            self._fold(state, NORMS[1], GATE_UP, normed)
        self._keep_norm(state, NORMS[1])
        self._round(state, GATE_UP, normed)
        self._round(state, ("mlp.down_proj",), gated(state.linear(rounded=True)))
        self._write(state, "mlp.down_proj", gated, states, states)

    def _write(
        self,
        state: _State,
        name: str,
        inputs_by: Callable[[forward.Linear], Callable[[int], Tensor]],
        residuals: HiddenStates,
        outputs: HiddenStates,
    ) -> None:
        """Write what a rounded linear adds to the residual stream, and the stream."""
        rounded = state.linear(rounded=True)
        inputs = inputs_by(rounded)
        for index in range(len(residuals)):
            outputs.write(index, self._read(residuals, index) + rounded(name, inputs(index)))
        self.advance()

    def _read(self, states: HiddenStates, index: int) -> Tensor:
        return states.read(index).to(self.device)

    def _norm(self, state: _State, name: str, hidden: Tensor) -> Tensor:
        weight = state.done.norms[name] if name in state.done.norms else state.pending[name]
        return forward.rms_norm(hidden, weight, self.config.rms_norm_eps)

    def _keep_norm(self, state: _State, name: str) -> None:
        """Round a norm to what will be stored, before anything is calibrated behind it."""
        rounded = state.pending.pop(name).half()
        _require_finite(rounded, f"{state.name}.{name}", "a norm that fits float16")
        state.done.norms[name] = rounded

    def _grid(self, in_features: int) -> Grid:
        return grid_of(self.settings, in_features, bits=self.settings.bits)

    def _fold(self, state: _State, producer: str, consumers: tuple[str, ...], inputs: Callable[[int], Tensor]) -> None:
        """Balance the channels between what makes them and what reads them."""
        total, count = torch.zeros((), device=self.device), 0.0
        for index, weights in enumerate(state.weights):
            if bool(weights.any()):
                total = total + weights @ inputs(index).square()
                count += float(weights.sum())
        names = tuple(f"{consumer}.weight" for consumer in consumers)
        mean_square = total / (count or 1.0)
        _require_finite(mean_square, f"{state.name}.{consumers[0]}", "finite inputs from the calibration data")
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = (group, self.config.head_dim) if producer.endswith("v_proj.weight") else None
        grid = self._grid(state.pending[names[0]].shape[1])
        state.pending |= fold(state.pending, producer, names, mean_square, grid, heads=heads)

    def _round(self, state: _State, names: tuple[str, ...], inputs: Callable[[int], Tensor]) -> None:
        """Gather the Hessian of some linears that read the same inputs, and round them."""
        hessian = Hessian(state.pending[f"{names[0]}.weight"].shape[1], self.device)
        for index, weights in enumerate(state.weights):
            if bool(weights.any()):
                hessian.add(inputs(index), weights)
        H = hessian.take(f"{state.name}.{names[0]}")
        for name in names:
            weight = state.pending.pop(f"{name}.weight")
            rounded = gptq(weight, H, self._grid(weight.shape[1]), self.options, name=f"{state.name}.{name}")
            state.done.errors[name] = relative_error(weight, rounded.dequantized(), H)
            state.done.linears[name] = rounded
        self.advance()


@dataclasses.dataclass(slots=True, kw_only=True)
class _State:
    """A layer half-way: what is still float32, and what is done."""

    name: str
    pending: dict[str, Tensor]
    done: QuantizedLayer
    weights: list[Tensor]

    def linear(self, *, rounded: bool) -> forward.Linear:
        """Return the linears as they are now: rounded ones expanded once, or the source's."""
        if not rounded:
            return lambda name, x: functional.linear(x, self.pending[f"{name}.weight"])
        expanded: dict[str, Tensor] = {}

        def apply(name: str, x: Tensor) -> Tensor:
            if name not in expanded:
                expanded[name] = self.done.linears[name].dequantized()
            return functional.linear(x, expanded[name])

        return apply


def _require_finite(tensor: Tensor, name: str, expected: str) -> None:
    if not bool(tensor.isfinite().all()):
        msg = f"{name}: got values that are not finite · expected {expected} · check the films of --calibration-data,"
        raise CheckpointError(f"{msg} and that the base model is the one the adapter was trained on")
