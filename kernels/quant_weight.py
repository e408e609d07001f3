"""A weight of symmetric integers in the tiles that `kernels.quant_matmul` reads, made of stored forms at load.

Linears of one input (q, k and v, or gate and up) are one weight here, their outputs side by side: one launch.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from kernels.packing import from_tiles, pack, symmetric_zero, to_tiles
from kernels.weights import StoredWeight

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.bnb import Int8Weight
    from kernels.gptq import GptqWeight

GROUP_SIZES: Final = (32, 64, 128, 256, 512, 1024)
"""Inputs that share a scale: what the kernels know beside one group for a row."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantWeight(StoredWeight):
    """One or more linear weights of symmetric integers in tiles, their outputs side by side."""

    tiles: Tensor  # int32 [ceil(out / 16), ceil(in / span), 16, 32], see `kernels.packing`
    scales: Tensor  # float16 [groups, out]
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def from_gptq(cls, *weights: GptqWeight) -> QuantWeight:
        """Put weights of one input side by side, into new memory; let go of the old ones afterwards.

        Raises:
            ValueError: they differ in form or device, or the groups are not of a size in GROUP_SIZES or the whole row.
        """
        forms = {(weight.shape[1], weight.bits, weight.group_size, weight.qweight.device) for weight in weights}
        if len(forms) != 1:
            each = sorted(f"{k} inputs, {bits} bits, groups of {size} on {at}" for k, bits, size, at in forms)
            raise ValueError(f"got weights of {' and '.join(each) or 'none'} · expected one form · keep them apart")
        ((in_features, bits, group_size, _),) = forms
        if group_size not in GROUP_SIZES and group_size != in_features:
            msg = f"got groups of {group_size} inputs · expected one of {GROUP_SIZES} or all {in_features}"
            raise ValueError(f"{msg} · export with --group-size 128")
        return cls(
            tiles=to_tiles(torch.cat([weight.qweight for weight in weights], dim=1), bits),
            scales=torch.cat([weight.scales for weight in weights], dim=1),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
        )

    @classmethod
    def from_int8(cls, *weights: Int8Weight) -> QuantWeight:
        """Put weights of bitsandbytes' int8 side by side, into new memory: integers with one scale for each output.

        The scales become float16, as all here are: off by up to 2^-11, for a whole row.

        Raises:
            ValueError: they differ, or a row is so small, or so large, that float16 cannot hold its scale.
        """
        if len({(weight.shape[1], weight.weight.device) for weight in weights}) != 1:
            msg = "got no weights, or weights of several inputs or devices · expected one form · keep them apart"
            raise ValueError(msg)
        magnitudes = torch.cat([weight.scb for weight in weights])
        scales = (magnitudes / 127).half()
        tiny = torch.finfo(torch.float16).smallest_normal
        # Of a row of zeros the scale does not matter.
        if not bool(((magnitudes == 0) | ((scales >= tiny) & scales.isfinite())).all()):
            msg = "got rows whose scales float16 does not hold · expected them between 6e-5 and 65504"
            raise ValueError(f"{msg} · keep them in int8")
        unsigned = torch.cat([weight.weight for weight in weights]).t().to(torch.int16) + symmetric_zero(8)
        return cls(
            tiles=to_tiles(pack(unsigned, 8), 8),
            scales=scales.unsqueeze(0),
            bits=8,
            group_size=weights[0].shape[1],
            in_features=weights[0].shape[1],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all weights together."""
        return self.scales.shape[1], self.in_features

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.tiles.device

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows begin … end - 1 of the weights."""
        outputs = self.tiles.shape[2]
        first, last = begin // outputs, -(-end // outputs)
        values = from_tiles(self.tiles[first:last], self.bits, self.in_features, (last - first) * outputs)
        steps = values[begin - first * outputs : end - first * outputs].float() - symmetric_zero(self.bits)
        groups = steps.view(end - begin, -1, self.group_size)
        return (groups * self.scales[:, begin:end].float().t().unsqueeze(-1)).flatten(1).to(dtype)
