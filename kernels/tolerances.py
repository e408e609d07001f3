"""How far a kernel may be from its reference, by op and by the bits of what it reads: in tests, in CI, on any card.

What is compared is the kernel's output in the dtype of its inputs with the reference's in float32, so the rounding to
that dtype is always allowed. The rest has a reason each.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

# Half a unit in the last place; of bfloat16 a whole one, as Triton's interpreter cuts off where a GPU rounds.
ROUNDING: Final = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}


class Tolerance(NamedTuple):
    """Beside the rounding."""

    rtol: float
    atol: float  # for values of the order of 1


# Sums of float32 in another order: 2^-24 of the largest partial sum for each of a few hundred to a thousand terms.
_SUMS: Final = Tolerance(rtol=1e-6, atol=1e-5)
# The weights are rounded to 16 bits before the product: 2^-12 of each, which add up at random. cuBLAS may besides add
# up partial sums in 16 bits (torch's allow_fp16_reduced_precision_reduction), half a unit for each.
_ROUNDED_WEIGHTS: Final = Tolerance(rtol=1e-3, atol=2e-3)

TOLERANCES: Final = {
    ("quant_matmul decode", 4): _SUMS,
    ("quant_matmul decode", 8): _SUMS,
    ("quant_matmul prefill", 4): _ROUNDED_WEIGHTS,
    ("quant_matmul prefill", 8): _ROUNDED_WEIGHTS,
    ("lora_add", 16): _SUMS,
    # exp() of a GPU is right to 2^-22 or so, of scores up to some tens; then sums as above.
    ("decode_attention", 16): Tolerance(rtol=1e-5, atol=1e-5),
    ("decode_attention", 8): Tolerance(rtol=1e-5, atol=1e-5),
    # Two products and their sum, fused or not: 2^-24 of each, which matters where they cancel. What a cache of int8
    # holds is exactly what the reference makes of the key that was returned: no tolerance.
    ("rotary_and_cache", 16): Tolerance(rtol=1e-6, atol=1e-6),
    # rsqrt() of a GPU is right to 2^-22 or so. The sum itself is exact: one rounding in both.
    ("add_rms_norm", 16): Tolerance(rtol=1e-6, atol=1e-6),
    # exp() and the quotient of a GPU are right to 2^-22 or so, each.
    ("silu_mul", 16): Tolerance(rtol=2e-6, atol=1e-6),
    # Log-probabilities: a difference of logits up to some tens, 2^-24 of it, and the logarithm of a sum of 32,000.
    ("sample", 16): Tolerance(rtol=1e-6, atol=1e-5),
}


def allowed(op: str, bits: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative and the absolute difference that outputs of `dtype` may have."""
    tolerance = TOLERANCES[op, bits]
    return tolerance.rtol + ROUNDING[dtype], tolerance.atol


def worst(got: Tensor, expected: Tensor, op: str, bits: int) -> float:
    """Return the largest difference from the reference's float32 as a share of what is allowed: up to 1 is right.

    A NaN is infinitely wrong.
    """
    rtol, atol = allowed(op, bits, got.dtype)
    shares = (got.float() - expected).abs() / (atol + rtol * expected.abs())
    return float(shares.nan_to_num(nan=float("inf")).max())
