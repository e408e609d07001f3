"""The gate of a decoder's feed-forward half, on the fused product of gate_proj and up_proj."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import reference
from kernels.backend import Backend, device_guard, require_backend
from kernels.checks import check_float

if TYPE_CHECKING:
    from torch import Tensor


def silu_mul(gate_up: Tensor, *, backend: Backend | None = None) -> Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once.

    Args:
        gate_up: [..., 2 * inner], the gate and behind it up; float16, bfloat16 or float32, contiguous.

    Returns:
        [..., inner] in the dtype of gate_up.
    """
    check_float("gate_up", gate_up)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        got = f"gate_up {list(gate_up.shape)} with strides {list(gate_up.stride())}"
        raise ValueError(f"got {got} · expected contiguous [..., 2 * inner]")
    inner = gate_up.shape[-1] // 2
    if require_backend(gate_up.device, backend) == "reference":
        return reference.silu_mul(gate_up)
    result = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    if result.numel():
        from kernels.gpu import silu_mul as kernels

        with device_guard(gate_up.device):
            kernels.silu_mul(gate_up.view(-1, 2 * inner), result.view(-1, inner))
    return result
