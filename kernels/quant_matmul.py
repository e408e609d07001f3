"""The product with a weight in the GPTQ format, for GPUs: y = x Wᵀ, weight-only, 4 or 8 bits.

    decode     M ≤ 16   integers are expanded in registers as they are read; the inputs are split to fill the card
    prefill    M > 16   a part of the weight is expanded into a scratch buffer, cuBLAS multiplies, the next one follows

Decoding is bound by reading the weight. In prefill the expansion is small beside the product on every card, and cuBLAS
has tensor cores where there are any.

Linears of one input (q, k and v, or gate and up) are one weight here, their outputs side by side: one launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from kernels import reference
from kernels.backend import Backend, Card, card_of, device_guard, require_backend
from kernels.checks import check_float
from kernels.packing import from_tiles, pack, span_size, symmetric_zero, to_tiles
from kernels.weights import StoredWeight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.bnb import Int8Weight
    from kernels.gptq import GptqWeight

MAX_DECODE_ROWS: Final = 16
"""Rows of x up to which the weight is expanded in registers; with more, expanding it once is cheaper."""
GROUP_SIZES: Final = (32, 64, 128, 256, 512, 1024)
SCRATCH_VALUES: Final = 3 * 2**23
"""Weights that prefill expands at a time: 48 MiB of 16 bits. With hidden_size 4096 that is 6144 outputs, enough for a
product to fill any card, and it does not grow with the weight."""


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


class DecodePlan(NamedTuple):
    """How `quant_matmul` cuts a product with few rows into programs."""

    rows: int
    block_n: int
    splits: int
    num_warps: int


def decode_plan(M: int, weight_shape: tuple[int, int], bits: int, card: Card) -> DecodePlan:
    """Return how to cut a product of M ≤ MAX_DECODE_ROWS rows: a small table, and no measurement."""
    N, K = weight_shape
    # A program takes 4 rows at most: with 4 words of 2 outputs a thread holds 32 sums, and no register spills.
    rows = 1 if M == 1 else 2 if M == 2 else 4
    # 8 threads to an output and 128 to a program: 2 outputs a thread, which share each x that has been converted.
    block_n, num_warps = 32, 4
    programs = -(-N // block_n) * -(-M // rows)
    spans = -(-K // span_size(bits))
    # Programs of 128 threads that a multiprocessor holds at once: it has 64 Ki registers, and a thread takes 56 to 64,
    # 80 to 96, or 168 (ptxas of CUDA 12.8, for 7.5 to 12.0); Turing, the smallest, has room for 1024 threads. Rounded
    # down: one wave that is not quite full beats one and a bit.
    resident = {1: 8, 2: 5, 4: 3}[rows]
    wanted = max(1, resident * card.multiprocessors // programs)
    # Each split reads at least 2 tiles an output, else its start and end take longer than its reading; and with more
    # than 16 the partial sums begin to count beside the weight.
    splits = max(1, min(wanted, spans // 2, 16))
    # As many spans in each, and none without any.
    return DecodePlan(rows=rows, block_n=block_n, splits=-(-spans // -(-spans // splits)), num_warps=num_warps)


def quant_matmul(
    x: Tensor,
    weight: QuantWeight,
    *,
    backend: Backend | None = None,
    fp16_accumulation: bool = False,
) -> Tensor:
    """Multiply x by the transpose of a weight.

    Sums are float32, in the same order every time. In prefill weights are rounded to the dtype of x first.

    Args:
        x: [..., in], float16, bfloat16 or float32, on the weight's device.
        weight: (out, in).
        fp16_accumulation: let cuBLAS add up in float16 in prefill: faster on GeForce cards, and less exact. It takes
            torch 2.7.

    Returns:
        [..., out] in the dtype of x.
    """
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K or x.device != weight.device:
        got = f"x {list(x.shape)} on {x.device} for a weight {[N, K]} on {weight.device}"
        raise ValueError(f"got {got} · expected a last dimension of {K}, on one device · pass the input of this linear")
    check_float("x", x)
    if require_backend(x.device, backend) == "reference":
        return reference.quant_matmul(x, weight)
    M = math.prod(x.shape[:-1])
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    flat = x.reshape(M, K)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    with device_guard(x.device):
        if 0 < M <= MAX_DECODE_ROWS:
            _decode(flat, weight, y)
        elif M:
            with _accumulating(in_float16=fp16_accumulation):
                _prefill(flat, weight, y)
    return y.view(*x.shape[:-1], N)


def _kernel_group_size(weight: QuantWeight) -> int:
    """Return the group size as the kernels want it: one group for a row ends with the last span."""
    if weight.scales.shape[0] > 1:
        return weight.group_size
    return weight.tiles.shape[1] * span_size(weight.bits)


def _decode(x: Tensor, weight: QuantWeight, y: Tensor) -> None:
    from kernels.gpu import quant_matmul as kernels

    (M, _), N = x.shape, weight.shape[0]
    plan = decode_plan(M, weight.shape, weight.bits, card_of(x.device))
    partials = torch.empty(plan.splits, M, N, dtype=torch.float32, device=x.device) if plan.splits > 1 else y
    form = {"bits": weight.bits, "group_size": _kernel_group_size(weight)}
    kernels.decode(x, weight.tiles, weight.scales, y, partials, **form, **plan._asdict())


def _prefill(x: Tensor, weight: QuantWeight, y: Tensor) -> None:
    from kernels.gpu import quant_matmul as kernels

    N, K = weight.shape
    # Whole tiles, so that none is read twice.
    step = max(16, SCRATCH_VALUES // K // 16 * 16)
    values = torch.empty(min(N, step), K, dtype=x.dtype, device=x.device)
    form = {"bits": weight.bits, "group_size": _kernel_group_size(weight)}
    for begin in range(0, N, step):
        end = min(begin + step, N)
        some = values[: end - begin]
        kernels.dequantize(weight.tiles, weight.scales, some, begin=begin, end=end, **form)
        torch.matmul(x, some.t(), out=y[:, begin:end])


@contextlib.contextmanager
def _accumulating(*, in_float16: bool) -> Iterator[None]:
    """Let cuBLAS add up in float16 meanwhile, or forbid it: torch's switch is put back in any case."""
    switch: Any = torch.backends.cuda.matmul
    try:
        before = switch.allow_fp16_accumulation
    except AttributeError:
        if in_float16:
            msg = f"got fp16_accumulation with torch {torch.__version__} · expected torch 2.7 or newer · leave it out"
            raise ValueError(msg) from None
        yield
        return
    switch.allow_fp16_accumulation = in_float16
    try:
        yield
    finally:
        switch.allow_fp16_accumulation = before
