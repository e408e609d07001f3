"""Scale folding: the same function with weights that round better.

A linear's input channels may be divided by any s > 0 where they are made, if its columns are multiplied by s:

    input_layernorm ÷ s  ▶  q, k, v columns × s          up rows ÷ s  ▶  down columns × s
    post_attention_layernorm ÷ s  ▶  gate, up columns × s      v rows ÷ s  ▶  o columns × s

Nothing changes in exact arithmetic, and the decoder stays a plain Llama. But a group of inputs shares the scale it is
rounded with, so a column of large weights coarsens its neighbours, and a column of large inputs makes its own rounding
count. AWQ (Lin et al. 2023) and SmoothQuant (Xiao et al. 2022) balance the two by s = x^α / w^(1−α), x and w being the
size of a channel's inputs and of its weights; α = 1 looks at the inputs alone, and leaving everything as it is, is a
choice too. Of a few α, the one is proposed with which rounding to nearest changes the outputs least. GPTQ makes up for
much of what that balances, so it decides: a proposal is folded in when GPTQ of some rows ends much better with it. (A
trained decoder takes next to none; the phantom, whose channels were made uneven by hand, takes most.)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from export.quantize.gptq import gptq, round_to_nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from export.quantize.gptq import Grid
    from export.settings import GptqSettings

    Heads = tuple[int, int] | None
    """(query heads that read one value head, head_dim) where the channels are those of attention: query heads that
    share a value head share its scales."""

ALPHAS: Final = tuple(step / 10 for step in range(11))
SAMPLE_ROWS: Final = 512
SMALLEST: Final = 1e-8
"""What a channel without inputs or weights counts as."""
LARGEST_FOLD: Final = 1e3
"""Bound of s and 1/s, so that a channel that is hardly ever used stays within float16."""
JUDGED_ROWS: Final = 48
WORTH: Final = 0.8
"""The share of GPTQ's objective on some rows that may be left. Folds that left 0.9 cost a trained decoder 1 % of KL."""


def propose(weights: Sequence[Tensor], mean_square: Tensor, grid: Grid, *, heads: Heads = None) -> Tensor:
    """Return the scales s of the channels with which rounding to nearest changes the outputs least.

    Args:
        weights: Of the linears that read the channels, float32 [N, K].
        mean_square: Of each channel over the calibration inputs, [K].
        grid: What the linears will be rounded to.
        heads: Who shares scales.

    Returns:
        float32 [K], fewer with `heads`: see `spread`.
    """
    # Rows are many and much alike: some of them tell what rounding costs the columns.
    sample = [_some(weight, SAMPLE_ROWS) for weight in weights]
    x = mean_square.clamp_min(SMALLEST**2)
    w = torch.stack([weight.square().mean(0) for weight in weights]).mean(0).clamp_min(SMALLEST**2)
    if heads is not None:
        x, w = _pooled(x, heads), _pooled(w, heads)
    x, w = x.sqrt(), w.sqrt()
    best = torch.ones_like(x)
    least = _error(sample, spread(best, heads), mean_square, grid)
    for alpha in ALPHAS:
        for s in (x**alpha / w ** (1 - alpha), x**alpha):
            s = _bounded(s)
            error = _error(sample, spread(s, heads), mean_square, grid)
            if error < least:
                best, least = s, error
    return best


def is_worth_it(
    weights: Sequence[Tensor], columns: Tensor, hessians: Sequence[Tensor], options: GptqSettings, grid: Grid
) -> bool:
    """Return whether GPTQ of some rows ends much better with their columns scaled.

    Args:
        weights: Of the linears, float32 [N, K].
        columns: What a proposal multiplies them by, [K].
        hessians: Of each linear, [K, K].
        options: How they will be rounded.
        grid: To what.
    """
    plainly = with_scales = 0.0
    for weight, H in zip(weights, hessians, strict=True):
        rows = _some(weight, JUDGED_ROWS)
        plainly += _objective(rows, H, grid, options)
        with_scales += _objective(rows * columns, H / columns / columns.unsqueeze(1), grid, options)
    return with_scales < WORTH * plainly


def fold(
    layer: Mapping[str, Tensor], producer: str, consumers: Sequence[str], s: Tensor, *, heads: Heads = None
) -> dict[str, Tensor]:
    """Move scales from where channels are made into the linears that read them.

    Args:
        layer: The weights of a decoder layer, float32.
        producer: A norm's vector, or the linear whose outputs the channels are.
        consumers: The linears that read them.
        s: The scales, as `propose` returns them.
        heads: Who shares them.

    Returns:
        The changed tensors: producer and consumers.
    """
    made, columns = layer[producer], spread(s, heads)
    return {producer: made / (s if made.dim() == 1 else s.unsqueeze(1))} | {
        name: layer[name] * columns for name in consumers
    }


def _some(weight: Tensor, count: int) -> Tensor:
    return weight[:: max(1, len(weight) // count)]


def _objective(weight: Tensor, H: Tensor, grid: Grid, options: GptqSettings) -> float:
    difference = weight - gptq(weight, H, grid, dataclasses.replace(options, refine=0)).dequantized()
    return float(((difference @ H) * difference).sum(dtype=torch.float64))


def _error(weights: list[Tensor], s: Tensor, mean_square: Tensor, grid: Grid) -> float:
    """Return what rounding to nearest adds to the outputs' squares, taking the inputs for uncorrelated."""
    importance = mean_square / s.square()
    total = 0.0
    for weight in weights:
        scaled = weight * s
        rounded = round_to_nearest(scaled, grid).dequantized()
        total += float((rounded - scaled).square_().sum(0) @ importance)
    return total


def _bounded(s: Tensor) -> Tensor:
    """Keep the geometric mean at one, and every scale where float16 can hold what it is folded into."""
    return (s / s.log().mean().exp()).clamp(1 / LARGEST_FOLD, LARGEST_FOLD)


def _pooled(channels: Tensor, heads: tuple[int, int]) -> Tensor:
    """Average over the query heads that share a value head: [K] to [K / sharing]."""
    return channels.view(-1, *heads).mean(1).flatten()


def spread(channels: Tensor, heads: Heads) -> Tensor:
    """Return the scales of all channels, [K]: every query head has its value head's."""
    if heads is None:
        return channels
    sharing, head_dim = heads
    return channels.view(-1, 1, head_dim).expand(-1, sharing, -1).flatten()
