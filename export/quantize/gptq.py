"""GPTQ: weights rounded one input column at a time, the columns not yet rounded making up for the error so far.

A linear computes y = W x. Rounding W to Ŵ on a grid costs, over the calibration inputs,

    Σ_t λ_t ‖(W − Ŵ) x_t‖² = tr (W − Ŵ) H (W − Ŵ)ᵀ,        H = Σ_t λ_t x_t x_tᵀ

Rounding each weight to its nearest value ignores that inputs are correlated. GPTQ (Frantar et al. 2022) rounds column
after column and after each moves the columns that are still free to where they compensate best; what that takes is the
upper triangular U with H⁻¹ = Uᵀ U.

The grid is ŵ = s · (q − 2^(bits−1)), with one scale s for each output and group of `group_size` inputs, in float16 as
it will be stored. What else is done here, each a choice of `GptqSettings`:

- *activation order*: columns with large inputs are rounded first, while many are left to compensate: whole groups in
  order of importance, and columns in order inside each, so that a group's scale is chosen when its turn comes, from
  weights that carry the compensation. It is undone before writing: the file has natural order, and the runtime needs
  no g_idx.
- *clip*: a scale smaller than the largest weight needs, which cuts that weight off and rounds all others finer.
- *signs*: 4 bits hold −8 to 7. A scale below zero gives the level that is left over to the positive side, where the
  group's largest weight may lie. Every reader multiplies by the scale as it is.
- *refine*: passes over the finished columns that round each anew given all others (coordinate descent on the same
  objective), with the scales fitted again by least squares before each. GPTQ cannot go back; this does.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from kernels.packing import symmetric_zero
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from export.settings import ActivationOrder, Clip, GptqSettings, Signs

BLOCK_INPUTS: Final = 128
"""Inputs whose effect on those behind them is applied at once: a matrix product instead of many outer ones."""
CLIP_STEPS: Final = 40
CLIP_LOWEST: Final = 0.6
"""The clip grid: this many scales from 1 down to this share of what the largest weight needs."""
FIRST_DAMPING: Final = 0.01
LAST_DAMPING: Final = 10.0
"""The diagonal is raised by this share of its mean; ten times as much whenever the factorisation fails."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values a weight may be rounded to."""

    bits: int
    group_size: int  # inputs that share a scale; a divisor of the inputs

    @property
    def lowest(self) -> int:
        """The smallest q − zero."""
        return -symmetric_zero(self.bits)

    @property
    def highest(self) -> int:
        """The largest q − zero."""
        return symmetric_zero(self.bits) - 1

    def round(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the nearest q − zero, in float; the shapes broadcast."""
        return (weight / scales).round_().clamp_(self.lowest, self.highest)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A rounded weight."""

    values: Tensor  # q - zero, int8 [N, K]
    scales: Tensor  # float16 [N, groups]
    grid: Grid

    def dequantized(self) -> Tensor:
        """Return the weight it stands for, float32 [N, K]."""
        groups = self.values.float().view(len(self.values), -1, self.grid.group_size)
        weight: Tensor = (groups * self.scales.float().unsqueeze(-1)).flatten(1)
        return weight


class Hessian:
    """H = Σ λ_t x_t x_tᵀ / Σ λ_t over the inputs of a linear, float32 [K, K]."""

    def __init__(self, in_features: int, device: str | torch.device = "cpu") -> None:
        """Begin with no inputs."""
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._weight = 0.0

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Count inputs x float32 [T, K] with their weights λ_t [T], not negative."""
        scaled = x * weights.sqrt().unsqueeze(1)
        self._sum.addmm_(scaled.T, scaled)
        self._weight += float(weights.sum())

    def add_joint(self, x: Tensor, joint: Tensor) -> None:
        """Count inputs x float32 [T, K] with a weight for each two of them, [T, T], positive semidefinite."""
        self._sum.addmm_(x.T, joint @ x)
        self._weight += float(joint.trace())

    def take(self, name: str) -> Tensor:
        """Return H, leaving nothing here (it is the largest thing in memory).

        Raises:
            CheckpointError: Nothing but zeros was counted, or it is not finite.
        """
        mean, self._sum = self._sum.div_(self._weight or 1.0), torch.empty(0)
        finite = bool(mean.isfinite().all())
        if not finite or not bool((mean.diagonal() > 0).any()):
            got = "no inputs but zeros" if finite else "a Hessian that is not finite"
            raise CheckpointError(
                f"{name}: got {got} from the calibration data · expected finite activations · check the films of "
                "--calibration-data, and that the base model is the one the adapter was trained on"
            )
        return mean


def round_to_nearest(
    weight: Tensor, grid: Grid, *, clip: Clip = "none", signs: Signs = "positive", importance: Tensor | None = None
) -> Quantized:
    """Round each weight of a matrix, float32 [N, K], by itself.

    `importance` [K] is what the squared errors of each input count when a scale is chosen; all the same by default.
    """
    groups = weight.reshape(len(weight), -1, grid.group_size)
    weights = torch.ones_like(weight[0]) if importance is None else importance
    parts = zip(groups.unbind(1), weights.view(-1, grid.group_size), strict=True)
    scales = torch.stack([_scales(group.T.contiguous(), grid, clip, signs, part) for group, part in parts], dim=1)
    values = grid.round(groups, scales.unsqueeze(-1)).flatten(1)
    return Quantized(values=values.to(torch.int8), scales=scales.half(), grid=grid)


def gptq(weight: Tensor, hessian: Tensor, grid: Grid, options: GptqSettings, *, name: str = "weight") -> Quantized:
    """Round a weight so that its outputs change as little as it can find.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K]; not changed.
        grid: Where to.
        options: How; its group size and method are not looked at.
        name: Of the weight, for messages.

    Raises:
        CheckpointError: The Hessian cannot be factorised.
    """
    importance = hessian.diagonal().clone()
    order = _order(importance, grid, options.activation_order)
    U = _inverse_factor(hessian, order, name)
    whole_row = grid.group_size == weight.shape[1]
    # Inputs first from here on, [K, N]: the weights of one input, which are rounded together, lie together in memory.
    W = weight.T[order]
    values = torch.empty_like(W)
    scales = W.new_empty(len(W) // grid.group_size, W.shape[1])
    if whole_row:  # its scale is known before any column is rounded, and blocks need not be groups
        nearest = round_to_nearest(weight, grid, clip=options.clip, signs=options.signs, importance=importance)
        scales = nearest.scales.float().T.contiguous()
    group_of = (order // grid.group_size).tolist()
    block = BLOCK_INPUTS if whole_row else max(BLOCK_INPUTS, grid.group_size)
    for start in range(0, len(W), block):
        end = min(start + block, len(W))
        errors = torch.empty_like(W[start:end])
        for place in range(start, end):
            group = group_of[place]
            if not whole_row and place % grid.group_size == 0:
                here = slice(place, place + grid.group_size)
                scales[group] = _scales(W[here], grid, options.clip, options.signs, importance[order[here]])
            values[place] = grid.round(W[place], scales[group])
            errors[place - start] = (W[place] - values[place] * scales[group]) / U[place, place]
            W[place:end].addr_(U[place, place:end], errors[place - start], alpha=-1)
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    del U, W
    natural = torch.empty_like(values).index_copy_(0, order, values)
    if options.refine:
        _refine(weight, natural, scales, hessian, grid, order, options.refine)
    return Quantized(values=natural.T.contiguous().to(torch.int8), scales=scales.T.contiguous().half(), grid=grid)


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the root mean square of the outputs' change, relative to that of the outputs."""
    difference = weight - rounded
    changed = ((difference @ hessian) * difference).sum(dtype=torch.float64)
    whole = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float((changed / whole.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(0).sqrt())


def _scales(weight: Tensor, grid: Grid, clip: Clip, signs: Signs, importance: Tensor) -> Tensor:
    """Choose the scale of each output for one group [group_size, N], as float16 will hold it, in float32."""
    all_covering = [weight.abs().amax(0) / grid.highest]
    if signs == "either":
        low, high = weight.amin(0), weight.amax(0)
        upright = torch.maximum(high / grid.highest, low / grid.lowest)
        mirrored = torch.maximum(-low / grid.highest, -high / grid.lowest)
        all_covering = [upright, -mirrored]
    best, least = _as_stored(all_covering[0]), None
    if clip == "none" and signs == "positive":
        return best
    steps = CLIP_STEPS if clip == "mse" else 1
    for covering in all_covering:
        for step in range(steps):
            scales = _as_stored(covering * (1 - (1 - CLIP_LOWEST) * step / (CLIP_STEPS - 1)))
            error = _rounding_error(weight, scales, grid, importance)
            if least is None:
                least = error
                continue
            better = error < least
            best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best


def _rounding_error(weight: Tensor, scales: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    return importance @ (grid.round(weight, scales).mul_(scales) - weight).square_()


def _as_stored(scales: Tensor) -> Tensor:
    """Round to float16; a group of zeros, or nearly, gets a scale that can be divided by."""
    size = scales.abs().clamp(torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max)
    return size.copysign(scales).half().float()


def _order(importance: Tensor, grid: Grid, order: ActivationOrder) -> Tensor:
    """Return the columns in the order they are rounded."""
    columns = torch.arange(len(importance), device=importance.device)
    if order == "none":
        return columns
    groups = importance.view(-1, grid.group_size)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    first = groups.amax(1).argsort(descending=True, stable=True)
    return (first.unsqueeze(1) * grid.group_size + inside[first]).flatten()


def _inverse_factor(hessian: Tensor, order: Tensor, name: str) -> Tensor:
    """Return the upper triangular U with H⁻¹ = Uᵀ U for H in that order, damped as much as it takes.

    With J the reversal of rows or columns, J H J = L Lᵀ gives H = R Rᵀ with the upper triangular R = J L J, and then
    U = R⁻¹ = J L⁻¹ J: one factorisation and one triangular inverse, and H⁻¹ itself is never formed.
    """
    backwards = order.flip(0)
    mean = float(hessian.diagonal().mean()) or 1.0
    damping = FIRST_DAMPING
    while damping <= LAST_DAMPING:
        flipped = hessian[backwards][:, backwards]
        # It also gives an input that was never seen something to divide by.
        flipped.diagonal().add_(damping * mean)
        L, failed = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not int(failed):
            eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
            inverse = torch.linalg.solve_triangular(L, eye, upper=False)
            del L, eye
            if bool(inverse.isfinite().all()):
                U: Tensor = inverse.flip(0, 1)
                return U
        damping *= 10
    msg = f"{name}: got a Hessian that cannot be factorised, even damped by {LAST_DAMPING:g} times its mean"
    raise CheckpointError(f"{msg} · expected a positive one · use more or other calibration studies, or --method rtn")


def _refine(
    weight: Tensor, values: Tensor, scales: Tensor, hessian: Tensor, grid: Grid, order: Tensor, passes: int
) -> None:
    """Improve values [K, N] and scales [groups, N] in place: scales by least squares, then the inputs one by one.

    Both are coordinate descent on the objective of each output, which never rises. `gradient` is H (W − Ŵ)ᵀ throughout.
    """
    groups = values.view(-1, grid.group_size, values.shape[1])
    gradient = hessian @ (weight.T - (groups * scales.unsqueeze(1)).flatten(0, 1))
    for _ in range(passes):
        for group in range(len(scales)):
            _fit_scale(values, scales, gradient, hessian, grid, group)
        for inputs in torch.split(order, BLOCK_INPUTS):
            _round_again(values, scales, gradient, hessian, grid, inputs)


def _fit_scale(values: Tensor, scales: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid, group: int) -> None:
    """Move the scales of one group to where the objective of each output is least."""
    here = slice(group * grid.group_size, (group + 1) * grid.group_size)
    q, old = values[here], scales[group].clone()
    curvature = (q * (hessian[here, here] @ q)).sum(0)
    wanted = old + (q * gradient[here]).sum(0) / curvature.clamp_min(torch.finfo(torch.float32).tiny)
    moved = torch.where((curvature > 0) & (wanted * old > 0), _as_stored(wanted), old)
    # float16 has its own idea of where: only when that is better than staying. The change of the objective is
    # curvature * (d² - 2 d d*), with d the step and d* the best one.
    moved = torch.where((moved - old).abs() < 2 * (wanted - old).abs(), moved, old)
    scales[group] = moved
    gradient.addmm_(hessian[:, here], (moved - old) * q, alpha=-1)


def _round_again(values: Tensor, scales: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid, inputs: Tensor) -> None:
    """Round the weights of some inputs anew, one input after the other."""
    H = hessian[inputs]
    among = H[:, inputs]
    importance = among.diagonal().clamp_min(torch.finfo(torch.float32).tiny).tolist()
    local = gradient[inputs]
    changes = torch.empty_like(local)
    for place, (index, group) in enumerate(zip(inputs.tolist(), (inputs // grid.group_size).tolist(), strict=True)):
        s = scales[group]
        old = values[index] * s
        values[index] = grid.round(old + local[place] / importance[place], s)
        changes[place] = values[index] * s - old
        local.addr_(among[place], changes[place], alpha=-1)
    gradient.addmm_(H.T, changes, alpha=-1)
