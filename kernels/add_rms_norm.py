"""The residual addition before each norm of a decoder, and the norm, in one pass over the row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from kernels import reference
from kernels.backend import Backend, device_guard, require_backend
from kernels.checks import check_float, check_whole

if TYPE_CHECKING:
    from torch import Tensor

MAX_HIDDEN_SIZE: Final = 32768
"""Beyond it a row would no longer fit the registers of one program."""


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x + residual, and that scaled to a root mean square of one and then by `weight`.

    The sum is rounded to its dtype before it is normed, as it is without this kernel. The norm is float32 inside.

    Args:
        x: [..., hidden_size], float16, bfloat16 or float32, contiguous.
        residual: like x, contiguous.
        weight: [hidden_size], contiguous, in the dtype of x.
        eps: added to the mean square.

    Returns:
        The sum and the normed sum, each in the shape and dtype of x.
    """
    check_float("x", x)
    if x.dim() < 1 or not 0 < x.shape[-1] <= MAX_HIDDEN_SIZE:
        raise ValueError(f"got x {list(x.shape)} · expected [..., hidden_size], at most {MAX_HIDDEN_SIZE}")
    shape, hidden_size = tuple(x.shape), x.shape[-1]
    for name, tensor in (("x", x), ("residual", residual)):
        check_whole(name, tensor, shape, x.dtype, x.device)
    check_whole("weight", weight, (hidden_size,), x.dtype, x.device)
    if require_backend(x.device, backend) == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    sums, normed = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel():
        from kernels.gpu import add_rms_norm as kernels

        x, residual = x.view(-1, hidden_size), residual.view(-1, hidden_size)
        with device_guard(x.device):
            kernels.add_rms_norm(x, residual, weight, eps, sums.view(-1, hidden_size), normed.view(-1, hidden_size))
    return sums, normed
