"""Kernel of `kernels.add_rms_norm`: one program for one row, read once and kept in registers."""

import torch
import triton
import triton.language as tl

from kernels.gpu import OPTIONS


@triton.jit
def add_rms_norm_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor, weight_ptr: tl.tensor, sum_ptr: tl.tensor, out_ptr: tl.tensor,
    hidden_size: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write x + residual, and that normed. All of a row is read before any of it is written."""
    i = tl.arange(0, BLOCK)
    mask = i < hidden_size
    at = tl.program_id(0).to(tl.int64) * hidden_size + i
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + i, mask=mask, other=0.0).to(tl.float32)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    total_32 = total.to(tl.float32)
    mean_square = tl.sum(total_32 * total_32, axis=0) / hidden_size
    tl.store(sum_ptr + at, total, mask=mask)
    tl.store(out_ptr + at, total_32 * tl.rsqrt(mean_square + eps) * weight, mask=mask)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, sums: torch.Tensor, out: torch.Tensor
) -> None:
    """Launch the kernel: x, residual, sums and out contiguous [rows, hidden_size]."""
    rows, hidden_size = x.shape
    block = triton.next_power_of_2(hidden_size)
    # 16 numbers for each thread of a row of 4,096: 8 warps; never more than 16 of them, nor less than one.
    num_warps = min(max(block // 512, 1), 16)
    add_rms_norm_kernel[(rows,)](
        x, residual, weight, sums, out, hidden_size, eps, BLOCK=block, num_warps=num_warps, **OPTIONS
    )
