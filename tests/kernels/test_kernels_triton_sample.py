"""The Triton kernel of `sample` against its reference, outputs poisoned; `triton_here.py` says where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_here
from triton_here import DEVICE, MARKS, NAN, Launches, full, randn
from within import assert_within

from kernels import reference
from kernels.sample import Sampled, sample

pytestmark = MARKS
launches, poisoned = triton_here.launches, triton_here.poisoned


def settings(N: int, **given: Any) -> dict[str, torch.Tensor]:
    """Rows of all kinds: greedy, hot, cold, whole and tiny nuclei, any seeds."""
    generator = torch.Generator().manual_seed(N)
    every = {
        "temperature": torch.tensor([0.7, 0.0, 1.3, 1e-6, 1e6, 1.0, 0.0, 2.0]).repeat(N)[:N],
        "top_p": torch.tensor([0.9, 0.5, 1.0, 0.9, 1.0, 1e-6, 1.0, 0.3]).repeat(N)[:N],
        "seeds": torch.randint(-(2**63), 2**63 - 1, (N,), generator=generator),
        "positions": torch.randint(0, 4096, (N,), generator=generator),
    }
    return every | {name: torch.tensor(value) for name, value in given.items()}


def check(logits: torch.Tensor, given: dict[str, torch.Tensor], launches: Launches, num_top: int = 0) -> Sampled:
    """Run the kernel, compare all it returns with the reference, and return that."""
    on_device = {name: tensor.to(DEVICE) for name, tensor in given.items()}
    got = sample(logits.to(DEVICE), **on_device, num_top=num_top)
    assert launches == [("sample_kernel", (len(logits),))]
    launches.clear()
    expected = reference.sample(logits, **given, num_top=num_top)
    for name in ("token_ids", "top_ids", "is_finite"):
        assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), name
    seen = expected.is_finite
    assert_within(got.logprobs.cpu()[seen], expected.logprobs[seen], "sample", 16)
    assert_within(got.top_logprobs.cpu()[seen], expected.top_logprobs[seen], "sample", 16)
    assert got.logprobs.cpu()[~seen].isnan().all()
    assert got.top_logprobs.cpu()[~seen].isnan().all()
    return expected


@pytest.mark.parametrize(("N", "V", "num_top"), [(1, 1, 1), (8, 257, 0), (3, 1000, 7), (8, 5001, 0), (1, 32000, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, *full(torch.bfloat16, torch.float32)])
def test_sample(dtype: torch.dtype, N: int, V: int, num_top: int, launches: Launches) -> None:
    check(randn(N, V, seed=V, dtype=dtype) * 4, settings(N), launches, num_top)


def test_rows_of_all_kinds_in_a_wide_buffer(launches: Launches) -> None:
    wide = randn(16, 700, dtype=torch.float32) * 5
    wide[:, 601:] = NAN
    check(wide[:, :601], settings(16), launches, 2)


def test_ties_are_kept_together_and_the_first_of_equals_comes_first(launches: Launches) -> None:
    """Four tokens of a quarter each: a nucleus of 0.2 holds them all; greedy takes the first."""
    logits = torch.full((6, 133), -100.0)
    logits[:, [7, 50, 51, 132]] = 1.0
    every: dict[str, Any] = {"seeds": [3] * 6, "positions": list(range(6))}
    drawn = check(logits, settings(6, temperature=[1.0] * 6, top_p=[0.2] * 6, **every), launches, 5)
    assert set(drawn.token_ids.tolist()) == {7, 50, 51, 132}
    assert drawn.top_ids[0].tolist() == [7, 50, 51, 132, 0]
    greedy = check(logits, settings(6, temperature=[0.0] * 6, **every), launches)
    assert greedy.token_ids.unique().tolist() == [7]


def test_a_sum_that_just_suffices_is_enough(launches: Launches) -> None:
    """Of 1/2, 1/4, 1/8, 1/16 and less, exact in float32, in shuffled order."""
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    logits = torch.full((12, 300), -200.0)
    logits[:, order[:5]] = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    top_p = torch.tensor([0.5, 0.500001, 0.75, 0.875]).repeat_interleave(3)
    every: dict[str, Any] = {"temperature": [1.0] * 12, "seeds": [1] * 12, "positions": list(range(12))}
    drawn = check(logits, settings(12, **every) | {"top_p": top_p}, launches).token_ids.view(4, 3)
    sizes = [int((order[:, None] == row).nonzero()[:, 0].max()) + 1 for row in drawn]
    assert sizes == [1, 2, 2, 3]


def test_weights_a_few_bits_apart_and_arrivals_near_0_are_told_apart(launches: Launches) -> None:
    """Two tokens of a half each, but for the last bits, and places where a token's 32 random bits are 10 and 23."""
    logits = torch.full((12, 64), -200.0)
    logits[:, 5], logits[:, 9] = -1e-6, 0.0
    every = {"temperature": [1.0] * 12, "top_p": [0.4] * 12, "seeds": [0] * 12, "positions": list(range(12))}
    assert check(logits, settings(12, **every), launches).token_ids.unique().tolist() == [9]
    every = {"temperature": [1.0] * 2, "top_p": [1.0] * 2, "seeds": [0] * 2, "positions": [47651, 75823]}
    assert check(torch.zeros(2, 500), settings(2, **every), launches).token_ids.tolist() == [492, 427]


def test_rows_that_are_not_finite_have_a_token_that_exists(launches: Launches) -> None:
    logits = randn(6, 130, dtype=torch.float32)
    for row, (token, value) in enumerate([(3, NAN), (129, float("inf")), (0, float("-inf")), (129, NAN)]):
        logits[row, token] = value
    logits[4] = NAN
    drawn = check(logits, settings(6), launches, 2)
    assert drawn.is_finite.tolist() == [False] * 5 + [True]
    assert not drawn.token_ids[:5].any()
    assert not drawn.top_ids[:5].any()


def test_no_rows_are_no_launch(launches: Launches) -> None:
    assert (
        sample(randn(0, 9).to(DEVICE), **{name: x.to(DEVICE) for name, x in settings(0).items()}).token_ids.numel() == 0
    )
    assert launches == []
