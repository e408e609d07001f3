"""What `lora_add` means, the reference against its definition; what its launcher takes; how a call is cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from kernels.backend import Card
from kernels.lora_add import lora_add, lora_plan


def good(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments that fit: 6 rows, 3 adapters, 3 parts of rank 2."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"y": (2, 3, 8), "x": (2, 3, 5), "a": (3, 6, 5), "b": (3, 8, 2)}
    drawn: dict[str, Any] = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return drawn | {"slots": torch.tensor([2, -1, 0, 2, -3, 2]), "parts": (4, 1, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_row_gets_what_its_adapter_makes_of_it(dtype: torch.dtype) -> None:
    """Number by number, in float64; rows without an adapter are not touched, and zeros pad a rank."""
    given = good(dtype)
    given["x"].view(6, 5)[[1, 4]] = float("nan")
    y, x, a, b = (given[name].double().clone() for name in ("y", "x", "a", "b"))
    wider = pad(given["a"].unflatten(1, (3, 2)), (0, 0, 0, 3)).flatten(1, 2)
    padded = lora_add(**(given | {"y": given["y"].clone(), "a": wider, "b": pad(given["b"], (0, 3))}))
    assert lora_add(**given) is given["y"]
    for (row, slot), n, j in itertools.product(enumerate(given["slots"].tolist()), range(8), range(2)):
        if slot >= 0:
            hidden = (a[slot, 2 * (0, 0, 0, 0, 1, 2, 2, 2)[n] + j] * x.view(6, 5)[row]).sum()
            y.view(6, 8)[row, n] += b[slot, n, j] * hidden
    torch.testing.assert_close(given["y"], y.to(dtype))
    torch.testing.assert_close(padded, given["y"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(8, 3, 2).permute(2, 1, 0)}, "got y with strides .* expected a contiguous tensor"),
        ({"x": torch.zeros(2, 2, 5)}, r"got x \[2, 2, 5\] .* expected \[2, 3, 5\]"),
        ({"a": torch.zeros(3, 6, 4)}, r"got a \[3, 6, 4\] .* expected \[3, 6, 5\]"),
        ({"a": torch.zeros(6, 5)}, r"a \[6, 5\] · expected"),
        ({"a": torch.zeros(3, 7, 5)}, r"got a \[3, 7, 5\] · expected parts \* rank rows an adapter, for 3 parts"),
        ({"a": torch.zeros(3, 0, 5)}, r"got a \[3, 0, 5\] · expected parts \* rank rows"),
        ({"a": torch.zeros(3, 5, 6).transpose(1, 2)}, "got a with strides"),
        ({"b": torch.zeros(2, 8, 2)}, r"got b \[2, 8, 2\] .* expected \[3, 8, 2\]"),
        ({"slots": torch.zeros(6).int()}, "got slots .* torch.int32"),
        ({"parts": (4, 3)}, r"got parts \[4, 3\] · expected 1 to 3 whose sum is 8"),
        ({"parts": (8, 0)}, "got parts .* the outputs of y"),
        ({"parts": (2, 2, 2, 2)}, "got parts .* expected 1 to 3"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_add(**(good() | change))


def test_a_plan_leaves_no_split_empty_and_fills_the_card_but_once() -> None:
    card = Card(capability=(8, 6), multiprocessors=28)
    for M, K, parts, rank in itertools.product((1, 16, 256), (1, 513, 11008), (1, 3), (1, 8, 20, 64, 300)):
        plan = lora_plan(M, K, parts, rank, card)
        tiles, programs = -(-K // plan.block_k), M * -(-parts * rank // plan.block_rows)
        assert -(-tiles // plan.splits) * (plan.splits - 1) < tiles
        assert 1 <= plan.splits <= max(1, min(8, 8 * 28 // programs))
        assert min(rank, 256) <= plan.block_rank <= 2048 // plan.block_n
    assert lora_plan(1, 4096, 1, 64, card).splits == 8  # 128 programs of one tile each
