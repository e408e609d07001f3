"""The one way in which the kernels' tests compare."""

from __future__ import annotations

import torch

from kernels.tolerances import allowed


def assert_within(got: torch.Tensor, expected: torch.Tensor, op: str, bits: int) -> None:
    """Compare a kernel's output with the reference's in float32 on the CPU."""
    rtol, atol = allowed(op, bits, got.dtype)
    torch.testing.assert_close(got.cpu().float(), expected, rtol=rtol, atol=atol)
