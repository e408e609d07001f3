"""What a file in the GPTQ format, or one beside it, could hold: roundings that the exporter does not have.

Each is judged as the exporter's own are, and counts every bit it would store:

    asymmetric     a zero of 4 bits for each group; after the same order and clip search, without folding and refining
    int8-worst     the exporter's default, but 8 bits for the three linears whose outputs it changed most
    int8-v         the exporter's default, but 8 bits for the v of every layer
    low-rank       the exporter's default, and beside each linear a float16 product of rank 8 that gives back most

GPTQModel's `dynamic` names linears of other bits; zeros are in the format's version 2; a product beside is what an
adapter is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.quality.real.rounding import Calibrated, stored_bits
from export.quantize.gptq import FIRST_DAMPING, Grid, Quantized, gptq

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.quality.real.rounding import Rounding, Setup
    from export.quantize.layerwise import RoundsLinear
    from export.settings import ExportSettings, GptqSettings

RANK: Final = 8
NUM_WORST: Final = 3
CLIP_STEPS: Final = 20
LOWEST_SHARE: Final = 0.6
"""Of the clip search for asymmetric groups: so many ranges, from all of a group's down to this share of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Beyond(Quantized):
    """A rounded weight that is more than integers and scales."""

    dense: Tensor  # float32 [N, K]
    bits: float  # all that it stores

    def dequantized(self) -> Tensor:
        """Return the weight it stands for, float32 [N, K]."""
        return self.dense


def _bits(rounded: Quantized) -> float:
    return rounded.bits if isinstance(rounded, Beyond) else stored_bits(rounded)


def rounded_beyond(setup: Setup, settings: ExportSettings, rounds: RoundsLinear) -> Rounding:
    """Return a rounding by one of the functions below."""
    return Calibrated(setup, settings, rounds=rounds, bits=_bits)


# -- Asymmetric --------------------------------------------------------------------------------------------------------


def asymmetric(weight: Tensor, hessian: Tensor, grid: Grid, options: GptqSettings, *, name: str) -> Quantized:
    """Round by GPTQ to groups of which each has a zero of its own, an integer of `grid.bits`; options do not count."""
    del options, name
    importance, size = hessian.diagonal(), grid.group_size
    grouped = importance.view(-1, size)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    first = grouped.amax(1).argsort(descending=True, stable=True)
    order = (first.unsqueeze(1) * size + inside[first]).flatten()
    U = _inverse_factor(hessian[order][:, order])
    W = weight.T[order]  # [K, N]
    rounded = torch.empty_like(W)
    for start in range(0, len(W), size):
        end = start + size
        scale, zero = _fit(W[start:end], importance[order[start:end]], grid.bits)
        errors = torch.empty_like(W[start:end])
        for place in range(start, end):
            rounded[place] = _to_grid(W[place], scale, zero, grid.bits)
            errors[place - start] = (W[place] - rounded[place]) / U[place, place]
            W[place:end].addr_(U[place, place:end], errors[place - start], alpha=-1)
        W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    dense = torch.empty_like(rounded).index_copy_(0, order, rounded).T.contiguous()
    groups = len(W) // size
    empty = torch.empty(0, dtype=torch.int8)
    bits = weight.numel() * grid.bits + groups * len(weight) * (16 + grid.bits)
    return Beyond(values=empty, scales=empty.half(), grid=grid, dense=dense, bits=bits)


def _inverse_factor(H: Tensor) -> Tensor:
    damped = H + FIRST_DAMPING * float(H.diagonal().mean()) * torch.eye(len(H), device=H.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    U: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return U


def _fit(group: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each output of a group [group_size, N]."""
    levels = 2**bits - 1
    low, high = group.amin(0).clamp_max(0), group.amax(0).clamp_min(0)
    best, least = (torch.zeros_like(low), torch.zeros_like(low)), torch.full_like(low, torch.inf)
    for step in range(CLIP_STEPS):
        share = 1 - (1 - LOWEST_SHARE) * step / (CLIP_STEPS - 1)
        scale = ((high - low) * share / levels).clamp_min(torch.finfo(torch.float16).tiny).half().float()
        zero = (-low * share / scale).round().clamp(0, levels)
        error = importance @ (_to_grid(group, scale, zero, bits) - group).square()
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    return best


def _to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale


# -- Eight bits here and there -----------------------------------------------------------------------------------------


def eight_bits(chosen: Callable[[str], bool]) -> RoundsLinear:
    """Return the exporter's GPTQ, to 8 bits for linears of some names."""

    def rounds(weight: Tensor, hessian: Tensor, grid: Grid, options: GptqSettings, *, name: str) -> Quantized:
        bits = 8 if chosen(name) else grid.bits
        return gptq(weight, hessian, Grid(bits=bits, group_size=grid.group_size), options, name=name)

    return rounds


def worst(errors: Mapping[str, float]) -> frozenset[str]:
    """Return the linears whose outputs changed most, relative to them."""
    return frozenset(sorted(errors, key=lambda name: -errors[name])[:NUM_WORST])


# -- Low rank ----------------------------------------------------------------------------------------------------------


def low_rank(weight: Tensor, hessian: Tensor, grid: Grid, options: GptqSettings, *, name: str) -> Quantized:
    """Round by the exporter's GPTQ, and add the product of `RANK` that brings the outputs nearest.

    With H = L Lᵀ what is left costs ‖(E − A B) L‖², which the largest singular values of E L make least.
    """
    rounded = gptq(weight, hessian, grid, options, name=name)
    nearest = rounded.dequantized()
    damping = FIRST_DAMPING * float(hessian.diagonal().mean())
    L = torch.linalg.cholesky(hessian + damping * torch.eye(len(hessian), device=hessian.device))
    left, values, right = torch.linalg.svd((weight - nearest) @ L, full_matrices=False)
    A = left[:, :RANK] * values[:RANK]
    B = torch.linalg.solve_triangular(L, right[:RANK], upper=False, left=False)
    # Shared between the two, so that both fit float16.
    size = A.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    A, B = (A / size).half(), (B * size.unsqueeze(1)).half()
    return Beyond(
        values=rounded.values,
        scales=rounded.scales,
        grid=grid,
        dense=nearest + A.float() @ B.float(),
        bits=stored_bits(rounded) + 16 * (A.numel() + B.numel()),
    )


_PLAINER: Final = ("--no-fold-scales", "--refine", "0")
EXPERIMENTS: Final[dict[str, tuple[tuple[str, ...], Callable[[Setup], RoundsLinear]]]] = {
    "asymmetric": (_PLAINER, lambda _: asymmetric),
    "int8-worst": ((), lambda setup: eight_bits(worst(setup.default_errors).__contains__)),
    "int8-v": ((), lambda _: eight_bits(lambda name: name.endswith("v_proj"))),
    "low-rank": ((), lambda _: low_rank),
}
"""By name: options of the exporter beside those of its default, and what rounds a linear."""
