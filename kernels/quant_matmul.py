"""The product with a weight in the GPTQ format, for GPUs: y = x Wᵀ, weight-only, 4 or 8 bits.

    decode     M ≤ 16   integers are expanded in registers as they are read; the inputs are split to fill the card
    prefill    M > 16   a part of the weight is expanded into a scratch buffer, cuBLAS multiplies, the next one follows

Decoding is bound by reading the weight. In prefill the expansion is small beside the product on every card, and cuBLAS
has tensor cores where there are any.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from kernels import reference
from kernels.backend import Backend, Card, card_of, device_guard, require_backend
from kernels.checks import check_float
from kernels.packing import span_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from kernels.quant_weight import QuantWeight

MAX_DECODE_ROWS: Final = 16
"""Rows of x up to which the weight is expanded in registers; with more, expanding it once is cheaper."""
SCRATCH_VALUES: Final = 3 * 2**23
"""Weights that prefill expands at a time: 48 MiB of 16 bits. With hidden_size 4096 that is 6144 outputs, enough for a
product to fill any card, and it does not grow with the weight."""


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
