"""Linear weights in the GPTQ format, version 1, symmetric: 4 or 8 bits an integer, a scale for each group of inputs.

`kernels.packing` draws how the integers lie in their words. Here they are expanded a few outputs at a time and
multiplied in the dtype of x; only what is being multiplied is ever expanded.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from kernels.packing import group_index, pack, pack_factor, symmetric_qzeros, symmetric_zero, unpack
from kernels.reference import matmul_by_rows
from kernels.weights import StoredWeight, check_forms, check_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TENSORS: Final = ("qweight", "qzeros", "scales", "g_idx")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GptqWeight(StoredWeight):
    """A linear weight of symmetric integers."""

    qweight: Tensor  # int32 [in / pack_factor, out]
    scales: Tensor  # float16 [groups, out]
    bits: int
    group_size: int

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, bits: int) -> GptqWeight:
        """Read a weight as GPTQModel, AutoGPTQ and `to_tensors` write it.

        Args:
            tensors: "qweight", "qzeros", "scales" and "g_idx". They are kept, not copied.
            bits: 4 or 8.

        Raises:
            ValueError: a tensor is missing, unknown, or of another shape or dtype; the zeros are not the symmetric ones
                of version 1; or the inputs are not in the order of their groups.
        """
        check_names(tensors, set(TENSORS))
        qweight, scales = tensors["qweight"], tensors["scales"]
        if qweight.dim() != 2 or scales.dim() != 2 or not scales.shape[0]:
            msg = f"got qweight {list(qweight.shape)} and scales {list(scales.shape)} · expected two matrices"
            raise ValueError(msg)
        in_features, out_features = qweight.shape[0] * pack_factor(bits), qweight.shape[1]
        groups = scales.shape[0]
        if in_features % groups:
            raise ValueError(f"got {in_features} inputs in {groups} groups · expected groups of one size")
        group_size = in_features // groups
        forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qweight": ((in_features // pack_factor(bits), out_features), torch.int32),
            "scales": ((groups, out_features), torch.float16),
            "qzeros": ((groups, out_features // pack_factor(bits)), torch.int32),
            "g_idx": ((in_features,), torch.int32),
        }
        check_forms(tensors, forms)
        zeros, order = symmetric_qzeros(groups, out_features, bits), group_index(in_features, group_size)
        if not torch.equal(tensors["qzeros"].cpu(), zeros):
            raise ValueError(f"got other qzeros · expected {symmetric_zero(bits)} - 1 in each field (symmetric, v1)")
        if not torch.equal(tensors["g_idx"].cpu(), order):
            raise ValueError("got inputs in another order than that of their groups · expected desc_act=False")
        return cls(qweight=qweight, scales=scales, bits=bits, group_size=group_size)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.qweight.shape[1], self.qweight.shape[0] * pack_factor(self.bits)

    def rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return rows begin … end - 1 of the weight."""
        values = unpack(self.qweight[:, begin:end], self.bits).float() - symmetric_zero(self.bits)
        groups = values.view(-1, self.group_size, end - begin)
        weight: Tensor = (groups * self.scales[:, None, begin:end].float()).flatten(0, 1).t().to(dtype)
        return weight


def to_tensors(values: Tensor, scales: Tensor, *, bits: int) -> dict[str, Tensor]:
    """Pack a symmetric weight for the disk.

    Args:
        values: q − zero, integers [out, in]; `in` and `out` multiples of the pack factor.
        scales: float16 [out, groups].
        bits: 4 or 8.

    Returns:
        "qweight", "qzeros", "scales" and "g_idx" on the CPU, contiguous.
    """
    (out_features, in_features), groups = values.shape, scales.shape[1]
    stored = values.cpu().to(torch.int32) + symmetric_zero(bits)
    return {
        # Beyond the range a field would spill into its neighbour.
        "qweight": pack(stored.clamp_(0, (1 << bits) - 1).t(), bits),
        "qzeros": symmetric_qzeros(groups, out_features, bits),
        "scales": scales.cpu().t().contiguous(),
        "g_idx": group_index(in_features, in_features // groups),
    }


def gptq_matmul(x: Tensor, weight: GptqWeight) -> Tensor:
    """Multiply x [..., in] by the transpose of a weight in the GPTQ format; see `reference.matmul_by_rows`."""
    return matmul_by_rows(x, weight.shape, lambda begin, end: weight.rows(begin, end, x.dtype))
