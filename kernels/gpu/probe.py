"""The smallest kernel, by which `kernels.backend` finds out whether Triton works here."""

import torch
import triton
import triton.language as tl


@triton.jit
def probe_kernel(out_ptr: tl.tensor) -> None:
    """Write a one."""
    tl.store(out_ptr, 1)


def version() -> tuple[int, int]:
    """Return Triton's version, as far as it decides what cards it knows."""
    major, minor = str(triton.__version__).split(".")[:2]
    return int(major), int(minor)


def run(device: torch.device) -> None:
    """Launch it, and see that it did something.

    Raises:
        Exception: whatever Triton's compiler or the driver raises.
        RuntimeError: it ran and wrote nothing.
    """
    out = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        probe_kernel[(1,)](out)
    if int(out) != 1:
        msg = "the probe wrote nothing"
        raise RuntimeError(msg)
