"""The Triton kernels of `lora_add` against its reference, what must not count poisoned; `triton_here.py` says where."""

from __future__ import annotations

import pytest
import torch
import triton_here
from triton_here import DEVICE, MARKS, NAN, Launches, full, randn
from within import assert_within

from kernels import reference
from kernels.backend import card_of
from kernels.lora_add import lora_add, lora_plan

pytestmark = MARKS
launches, poisoned = triton_here.launches, triton_here.poisoned

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
CASES = [  # slots, K, parts, rank: none a multiple of a tile, but for the first; the second has 11 tiles in splits
    ((1,), 4096, (32,), 64, FLOAT16),
    ((0,), 11 * 512, (8,), 2, FLOAT16),
    *(((2, -1, 0, 2, -7), 520, (7, 33, 40), 3, dtype) for dtype in (FLOAT16, BFLOAT16, FLOAT32)),
    ((0, 2), 1100, (33, 64), 20, FLOAT16),
    *full(
        ((0,), 1, (1,), 1, FLOAT16), ((-1, 1), 24, (10, 1, 1), 300, FLOAT32), ((0, 2) * 6, 37, (32, 96), 8, BFLOAT16)
    ),
]


@pytest.mark.parametrize(("slots", "K", "parts", "rank", "dtype"), CASES)
def test_lora_add(
    slots: tuple[int, ...], K: int, parts: tuple[int, ...], rank: int, dtype: torch.dtype, launches: Launches
) -> None:
    """Rows without an adapter and adapters without a row are NaNs, and the former stay what they are to the bit."""
    M, N, at = len(slots), sum(parts), torch.tensor(slots)
    y, x = randn(M, N, dtype=dtype), randn(M, K, seed=3, dtype=dtype)
    a = randn(3, len(parts) * rank, K, seed=1, dtype=dtype) / K**0.5
    b = randn(3, N, rank, seed=2, dtype=dtype) / rank**0.5
    unused = [slot for slot in range(3) if slot not in slots]
    a[unused], b[unused], y[at < 0], x[at < 0] = NAN, NAN, NAN, NAN
    got = y.to(DEVICE, copy=True)
    assert lora_add(got, *(tensor.to(DEVICE) for tensor in (x, a, b, at)), parts=parts) is got
    plan = lora_plan(M, K, len(parts), rank, card_of(DEVICE))
    assert plan.splits > 1 or K != 11 * 512
    tiles = sum(-(-part // plan.block_n) for part in parts)
    grid = (M, -(-len(parts) * rank // plan.block_rows), plan.splits)
    assert launches == [("shrink_kernel", grid), ("expand_kernel", (M, tiles))]
    assert torch.equal(got[at < 0].cpu().view(torch.uint8), y[at < 0].view(torch.uint8))
    expected = reference.lora_add(y.float(), x.float(), a.float(), b.float(), at, parts=parts)
    assert_within(got[at >= 0], expected[at >= 0], "lora_add", 16)


def test_any_number_of_axes_and_x_with_gaps(launches: Launches) -> None:
    y, wide, a, b = randn(2, 3, 1, 16), randn(2, 3, 1, 70, seed=3), randn(2, 4, 40, seed=1), randn(2, 16, 4) / 9
    at, x = torch.tensor([0, 1, -1, 1, 1, 0]), wide[..., :40]
    expected = reference.lora_add(y.float(), x.float(), a.float(), b.float(), at, parts=(16,))
    a, b, at = a.to(DEVICE), b.to(DEVICE), at.to(DEVICE)
    got = lora_add(y.to(DEVICE, copy=True), wide.to(DEVICE)[..., :40], a, b, at, parts=(16,))
    assert_within(got, expected, "lora_add", 16)
    assert lora_add(got[:0], wide.to(DEVICE)[:0, ..., :40], a, b, at[:0], parts=(16,)).numel() == 0
    assert len(launches) == 2
