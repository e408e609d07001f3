"""Our decoder of random weights, other libraries' linears in it, and what it should compute, on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from recording import record
from test_speed_gpu import CPU, SHAPES, SMALL, rig

from benchmarks.speed.decoders import dequantized, part_of, random_decoder, swapped, weight_bytes
from benchmarks.speed.engine import far, greedy, random_prompt
from benchmarks.speed.gpu import decode
from benchmarks.speed.harness import Unavailable
from benchmarks.speed.linears import PEERS, Tinygemm, gemlite, round_to_groups
from benchmarks.speed.weights import Shapes
from kernels.gptq import GptqWeight
from lite.engines.torch_engine.decoder import LlamaDecoder
from lite.engines.torch_engine.linear import linears_of
from lite.memory.counts import decoder_bytes, layer_bytes


def decoder(bits: int | None = 4, shapes: Shapes = SHAPES) -> LlamaDecoder:
    torch.manual_seed(0)
    return random_decoder(rig(dataclasses.replace(SMALL, shapes=shapes)).config(bits), CPU)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_random_decoder_takes_what_a_loaded_one_does(bits: int | None) -> None:
    made = decoder(bits)
    assert made.nbytes == decoder_bytes(made.config, itemsize=4)
    for name, linear in linears_of(made).items():
        (weight,) = linear.weights
        assert weight.shape == (sum(linear.parts.values()), linear.in_features)
        assert isinstance(weight, GptqWeight) == (bits is not None and name != "lm_head")
        assert dequantized(linear).mean().abs() < 0.1 * dequantized(linear).std(), name
    config = made.config
    head, norms = 4 * config.vocab_size * config.hidden_size, 4 * 5 * config.hidden_size
    assert weight_bytes(made) == config.num_hidden_layers * layer_bytes(config, itemsize=4) + head + norms


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_plain_logits_are_what_the_decoder_computes(bits: int | None, rows: int) -> None:
    made = decoder(bits)
    expected = decode.expected_logits(made)
    for capture in (None, record):
        assert far(part_of(made, capture=capture), *expected, rows) < 1e-5
    assert 1e-5 < far(part_of(made, cache_dtype="int8"), *expected, rows) < 0.03
    assert far(decoder(bits, dataclasses.replace(SHAPES, num_key_value_heads=4)), *expected, rows) > 0.3


def test_the_text_depends_on_the_prompt_and_on_its_own_tokens() -> None:
    """Else captured and launched steps would agree for no reason, and a KL would say nothing."""
    made = decoder()
    texts = [greedy(made, random_prompt(made.config, 30, CPU, seed=seed), 12)[0] for seed in range(3)]
    assert len({tuple(text) for text in texts}) == 3
    assert all(len(set(text)) > 3 for text in texts)
    assert [random_prompt(made.config, count, CPU).num_tokens for count in (2, 18, 1420)] == [2, 18, 1420]


@pytest.mark.parametrize("name", [name for name in PEERS if name != "gemlite int4"])
def test_a_peer_computes_our_model(name: str) -> None:
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    ours = decoder(4, dataclasses.replace(SHAPES, hidden_size=256, intermediate_size=256, num_key_value_heads=4))
    theirs = swapped(ours, PEERS[name][0], torch.float32)
    is_dense = name == decode.DENSE
    assert far(theirs, *decode.expected_logits(ours), 1) < (1e-5 if is_dense else decode.ALLOWED["4 bits"])
    dense = 4 * 2 * (3 * 256 * 256 + 256 * 256 + 3 * 256 * 256)
    assert weight_bytes(theirs) > dense if is_dense else weight_bytes(theirs) < dense / 4


def test_tinygemm_multiplies_with_the_integers_of_gptq() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_groups(weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = values.float().view(256, 2, 128) * scales.bfloat16().float().unsqueeze(-1)
    expected = x.float() @ rounded.flatten(1).T
    product = Tinygemm(weight)(x).float()
    assert float((product - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert float((rounded.flatten(1) - weight).abs().max()) < 0.6 * float(scales.max())


def test_what_is_not_installed_says_so() -> None:
    with pytest.raises(Unavailable, match="not installed"):
        gemlite(torch.zeros(1, 1))
