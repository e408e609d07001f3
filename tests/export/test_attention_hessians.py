"""The Hessians of q, k and v, against what their errors really do behind the attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from export.quantize import attention
from export.quantize.gptq import Hessian
from export.source import forward
from lite.config import DecoderConfig

TOKENS = 8
SIZE = 32


def config(kv_heads: int) -> DecoderConfig:
    return DecoderConfig.from_hf(
        {
            "vocab_size": 16,
            "hidden_size": SIZE,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": 64,
        }
    )


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears(kv_heads: int) -> dict[str, torch.Tensor]:
    rows = {attention.QUERY: SIZE, attention.KEY: 8 * kv_heads, attention.VALUE: 8 * kv_heads}
    return {name: random(count, SIZE, seed=seed) / 3 for seed, (name, count) in enumerate(rows.items())}


def gathered(kv_heads: int, x: torch.Tensor, weights: torch.Tensor) -> dict[str, Hessian]:
    hessians = {name: Hessian(SIZE) for name in (attention.QUERY, attention.KEY, attention.VALUE)}
    tensors = linears(kv_heads)
    attention.add_sequence(hessians, config(kv_heads), lambda name, y: functional.linear(y, tensors[name]), x, weights)
    return hessians


def attended(kv_heads: int, x: torch.Tensor, changes: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what o_proj reads, [T, C], with something added to what q, k or v makes."""
    tensors = linears(kv_heads)

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        return functional.linear(y, tensors[name]) + changes.get(name, torch.zeros(()))

    return forward.attended(config(kv_heads), linear, x)


@pytest.fixture(autouse=True)
def blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a sequence be several blocks, the last not full."""
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_hessian_of_v_is_that_of_what_the_heads_make_of_it(kv_heads: int) -> None:
    x, weights = random(TOKENS, SIZE, seed=5), torch.rand(TOKENS, generator=torch.Generator().manual_seed(6))
    # The same error in every head: what is pooled is then exact.
    error = random(8, SIZE, seed=7) * 0.1
    changed = attended(kv_heads, x, {attention.VALUE: functional.linear(x, error.repeat(kv_heads, 1))})
    cost = float(weights @ (changed - attended(kv_heads, x, {})).square().sum(1))
    hessian = gathered(kv_heads, x, weights)[attention.VALUE]
    total = hessian._weight
    H = hessian.take("v") * total
    assert float(((error @ H) * error).sum()) == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [attention.QUERY, attention.KEY])
def test_a_query_or_key_weighs_what_its_errors_change(name: str, kv_heads: int) -> None:
    x, weights = random(TOKENS, SIZE, seed=8), torch.rand(TOKENS, generator=torch.Generator().manual_seed(9))
    plain, rows = attended(kv_heads, x, {}), len(linears(kv_heads)[name])
    wanted = torch.zeros(TOKENS)
    tries = 100
    for position in range(TOKENS):
        for noise in random(tries, rows, seed=10 + position) * 1e-3:
            change = torch.zeros(TOKENS, rows)
            change[position] = noise
            wanted[position] += weights @ (attended(kv_heads, x, {name: change}) - plain).square().sum(1)
    # The weights themselves, by inputs that are told apart: x = identity.
    H = torch.zeros(TOKENS, TOKENS)

    class Spy(Hessian):
        def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
            assert len(x) == len(weights)
            H.copy_(weights.diag())

    hessians = {other: Hessian(SIZE) for other in (attention.QUERY, attention.KEY, attention.VALUE)} | {name: Spy(SIZE)}
    tensors = linears(kv_heads)
    attention.add_sequence(hessians, config(kv_heads), lambda n, y: functional.linear(y, tensors[n]), x, weights)
    found = H.diagonal()
    # A key's error changes scores of its own only; a query's changes those of all keys, which are not independent.
    rtol = 0.3 if name == attention.KEY else 0.8
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=rtol, atol=2e-3)
    # The first token's query sees nothing but itself, whatever it is.
    assert name == attention.KEY or float(found[0]) < 1e-6 * float(found.max())


def test_a_position_that_all_look_at_counts_as_often() -> None:
    """An attention sink: the first key is what every query looks for."""
    tokens, weights = 64, torch.ones(64)
    x = random(tokens, SIZE, seed=12) * 0.3
    x[0] = 4.0 * random(SIZE, seed=13)
    hessian = gathered(4, x, weights)[attention.VALUE].take("v")
    plain = Hessian(SIZE)
    plain.add(x, weights)

    def share(H: torch.Tensor) -> float:
        """Of the first input's direction in the trace."""
        direction = x[0] / x[0].norm()
        return float(direction @ H @ direction / H.trace())

    assert share(hessian) > share(plain.take("x"))
