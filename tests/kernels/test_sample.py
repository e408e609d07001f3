"""What `sample` means: the reference against its definition and its statistics, and NumPy's version against it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.sample import Sampled, sample
from lite.engines.onnx_engine import sample as in_numpy


def arguments(N: int, V: int, *, seed: int = 0, **given: Any) -> dict[str, Any]:
    """Random rows, with greedy ones, extremes and any seeds among them."""
    generator = torch.Generator().manual_seed(seed)
    every = {
        "logits": torch.randn(N, V, generator=generator) * (torch.rand(N, 1, generator=generator) * 10),
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.5, 1e-40, 1e6]).repeat(N)[:N],
        "top_p": torch.rand(N, generator=generator).clamp(min=1e-6),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (N,), generator=generator),
        "positions": torch.randint(0, 4096, (N,), generator=generator),
    }
    every["top_p"][::5] = 1.0
    return every | given


def drawn(
    probabilities: torch.Tensor, N: int, *, top_p: float = 1.0, temperature: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """Tokens at N positions of one seed."""
    return sample(
        probabilities.log().expand(N, -1),
        temperature=torch.full((N,), temperature),
        top_p=torch.full((N,), top_p),
        seeds=torch.full((N,), seed),
        positions=torch.arange(N),
    ).token_ids


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def bound(freedom: int) -> float:
    """What a chi-square exceeds once in a thousand times (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("top_p", "temperature", "kept"), [(1.0, 1.0, 40), (0.8, 1.0, 14), (0.9, 0.5, 10), (1.0, 3.0, 40)]
)
def test_20_000_draws_have_the_distribution_of_the_nucleus(top_p: float, temperature: float, kept: int) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    p = torch.arange(40).mul(-0.12).softmax(0)  # falling
    counts = drawn(p[order.argsort()], 20_000, top_p=top_p, temperature=temperature).bincount(minlength=40)[order]
    heated = (p.double() ** (1 / temperature)) / (p.double() ** (1 / temperature)).sum()
    size = int((heated.cumsum(0) < top_p).sum()) + 1 if top_p < 1 else 40
    assert size == kept
    assert not counts[kept:].any()
    assert chi_square(counts[:kept], heated[:kept]) < bound(kept - 1)


@pytest.mark.parametrize(
    ("top_p", "size"), [(1e-6, 1), (0.5, 1), (0.500001, 2), (0.75, 2), (0.875, 3), (0.9, 5), (1.0, 5)]
)
def test_the_nucleus_is_the_fewest_tokens_that_suffice_and_their_equals(top_p: float, size: int) -> None:
    """Of 1/2, 1/4, 1/8, 1/16 and 1/16, sums that are exact."""
    p = torch.tensor([0.0625, 0.125, 0.5, 0.0625, 0.25])
    tokens = drawn(p, 1000, top_p=top_p)
    assert tokens.unique().tolist() == sorted([2, 4, 1, 0, 3][:size])
    ones, integers = np.ones(1000, np.float32), np.arange(1000)
    given = {"temperature": ones, "top_p": ones * np.float32(top_p), "seeds": integers * 0, "positions": integers}
    got = in_numpy.sample(p.log().expand(1000, -1).numpy(), **given)
    assert got.token_ids.tolist() == tokens.tolist()


def test_draws_of_a_large_vocabulary_do_not_favour_any_token() -> None:
    counts = drawn(torch.ones(500), 10_000, seed=-7).bincount(minlength=500)
    assert chi_square(counts, torch.ones(500)) < bound(499)


@pytest.mark.parametrize("apart", [1, 2, 64])
def test_draws_do_not_follow_from_those_of_other_positions_and_seeds(apart: int) -> None:
    same_seed = drawn(torch.ones(8), 20_000)
    pairs = same_seed[apart:] * 8 + same_seed[:-apart]
    assert chi_square(pairs.bincount(minlength=64), torch.ones(64)) < bound(63)
    for other in (apart, apart << 32, -apart):
        pairs = same_seed * 8 + drawn(torch.ones(8), 20_000, seed=other)
        assert chi_square(pairs.bincount(minlength=64), torch.ones(64)) < bound(63)


def test_arrivals_are_the_definition_in_whole_numbers() -> None:
    """MurmurHash3's last step on Python's integers: what a replay on another machine or in another year has to draw."""
    low = 0xFFFFFFFF

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & low
        x = (x ^ x >> 13) * 0xC2B2AE35 & low
        return x ^ x >> 16

    assert mix(1) == 0x514E28B7  # as published
    for seed, position in [(0, 0), (7, 1470), (-1, 3), (2**63 - 1, 2**32 - 1), (-(2**63), 5), (3 << 32, 1)]:
        first = mix(seed & low ^ mix(position + 0x9E3779B9 & low))
        second = mix(seed >> 32 & low ^ mix(first + 0x9E3779B9 & low))
        bits = [mix(second ^ mix(first + token * 0x9E3779B9 & low)) for token in range(50)]
        expected = [-math.log1p(-(number + 0.5) / 2**32) for number in bits]
        got = reference.exponentials(torch.tensor([seed]), torch.tensor([position]), 50)[0]
        assert got.tolist() == pytest.approx(expected, rel=1e-5)
        numpys = in_numpy._exponentials(np.int64(seed), np.int64(position), 50)
        assert numpys.tolist() == pytest.approx(expected, rel=1e-5)


def test_arrivals_are_finite_and_above_0(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits, expected in [(0, 2.0**-33), (0xFFFFFFFF, 24 * math.log(2))]:
        monkeypatch.setattr(reference, "_mix", lambda x, bits=bits: torch.full_like(x, bits))
        monkeypatch.setattr(in_numpy, "_mix", lambda x, bits=bits: np.full_like(x, bits))
        one = torch.ones(1).long()
        assert float(reference.exponentials(one, one, 1)) == pytest.approx(expected)
        assert float(in_numpy._exponentials(np.int64(1), np.int64(1), 1)[0]) == pytest.approx(expected)


def test_log_probabilities_are_the_models_own() -> None:
    given = arguments(12, 333)
    got = sample(**given, num_top=4)
    expected = given["logits"].double().log_softmax(-1)
    torch.testing.assert_close(
        got.logprobs.double(), expected.gather(-1, got.token_ids[:, None])[:, 0], rtol=0, atol=1e-5
    )
    values, ids = expected.topk(4)
    assert torch.equal(got.top_ids, ids)
    torch.testing.assert_close(got.top_logprobs.double(), values, rtol=0, atol=1e-5)
    greedy = given["temperature"] == 0
    assert torch.equal(got.token_ids[greedy], given["logits"].argmax(-1)[greedy])


def test_a_replay_draws_the_same_and_rows_do_not_matter_to_one_another() -> None:
    given = arguments(9, 500, seed=1)
    whole = sample(**given, num_top=2)
    for row in range(9):
        alone = sample(**{name: tensor[row : row + 1] for name, tensor in given.items()}, num_top=2)
        for mine, theirs in zip(alone, whole, strict=True):
            assert torch.equal(mine[0], theirs[row])


# ---- in NumPy


@pytest.mark.parametrize("V", [1, 7, 600, 32000])
def test_numpy_chooses_the_same(V: int) -> None:
    N = 600 if V < 32000 else 12
    given = arguments(N, V, seed=V)
    if V > 7:
        given["logits"] = given["logits"].round(decimals=1)  # ties
    given["logits"][4, V // 2], given["logits"][-1, 0] = float("inf"), float("nan")
    num_top = min(5, V)
    expected = reference.sample(**given, num_top=num_top)
    got = in_numpy.sample(**{name: tensor.numpy() for name, tensor in given.items()}, num_top=num_top)
    for name, mine, right in zip(Sampled._fields, got, expected, strict=True):
        assert mine.dtype == right.numpy().dtype, name
        np.testing.assert_allclose(mine, right.numpy(), rtol=0, atol=1e-5, err_msg=name)
    half = given["logits"].half()
    expected = reference.sample(**given | {"logits": half})
    got = in_numpy.sample(**{name: tensor.numpy() for name, tensor in (given | {"logits": half}).items()})
    np.testing.assert_array_equal(got.token_ids, expected.token_ids.numpy())
    assert got.top_ids.shape == (N, 0)
