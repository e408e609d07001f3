"""The engines of `python -m benchmarks speed peers`, each in this process: what it computes, and what it reads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_speed_peers import HEAD, LINEARS, NORMS, SPEC, tiny_model, tiny_order

from benchmarks.speed.decoders import weight_bytes
from benchmarks.speed.linears import Tinygemm, round_to_groups
from benchmarks.speed.peers import lite_decoder, lite_onnx, onnx_artifact, worker
from benchmarks.speed.peers.engine import Engine, NotHere
from benchmarks.speed.peers.lite_decoder import LiteEngine
from benchmarks.speed.peers.llamacpp import gguf_name
from lite.artifact.open import load_artifact
from lite.engines.torch_engine.load import load_decoder
from lite.errors import LiteError


def test_tinygemm_multiplies_with_the_integers_of_gptq() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    values, scales = round_to_groups(weight)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    rounded = values.float().view(256, 2, 128) * scales.bfloat16().float().unsqueeze(-1)
    expected = x.float() @ rounded.flatten(1).T
    product = Tinygemm(weight)(x).float()
    assert float((product - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert float((rounded.flatten(1) - weight).abs().max()) < 0.6 * float(scales.max())


def logits_of(engine: Engine) -> torch.Tensor:
    """Put a short text through an engine, as the workers' check does."""
    engine.start(2)
    return torch.stack([torch.as_tensor(engine.read(ids)).clone() for ids in ([1, 2, 3, 4], [5], [6])])


def difference(logits: Any, reference: Any) -> float:
    logits, reference = (torch.as_tensor(each) for each in (logits, reference))
    return float((logits - reference).norm() / reference.norm())


def lite_engine(form: str, layers: int = 2) -> LiteEngine:
    return lite_decoder.build(tiny_order(form, layers))


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return logits_of(lite_engine("dense"))


@pytest.fixture(scope="module")
def gptq() -> LiteEngine:
    return lite_engine("gptq-int4")


def test_the_swapped_decoder_is_near_the_one_with_gptq(gptq: LiteEngine, dense: torch.Tensor) -> None:
    tinygemm = lite_engine("tinygemm int4")
    assert difference(logits_of(tinygemm), logits_of(gptq)) < 0.03
    assert 0.1 < difference(logits_of(tinygemm), dense) < 0.4
    rest = 4 * (HEAD + NORMS)
    assert lite_engine("dense").weight_bytes - rest == 4 * LINEARS
    assert gptq.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 2
    assert tinygemm.weight_bytes - rest == LINEARS // 2 + LINEARS // 128 * 4


def test_the_tokens_that_are_timed_are_the_most_probable(gptq: LiteEngine) -> None:
    gptq.start(2)
    gptq.first_token([1, 2, 3, 4])
    chosen = [gptq.newest]
    for _ in range(3):
        gptq.next_token()
        chosen.append(gptq.newest)
    gptq.start(2)
    again = [int(gptq.read(ids).argmax()) for ids in ([1, 2, 3, 4], *([token] for token in chosen[:-1]))]
    assert again == chosen


def test_the_artifact_has_the_integers_of_gptq(
    gptq: LiteEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], returncode=1, stderr="a warning\nerror: no room\n")
    monkeypatch.setattr(onnx_artifact.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LiteError, match="python -m export onnx: error: no room"):
        onnx_artifact.write_artifact(tmp_path / "onnx", tiny_model(), num_layers=1)
    (written,) = tmp_path.iterdir()
    decoder = load_decoder(load_artifact(written), device="cpu")
    engine = LiteEngine(decoder, max_seq_len=40, computes_in="float32")
    for each in (gptq, engine):
        each.start(1)
    # Embeddings, norms and head are float16 there.
    assert difference(engine.read([1, 2, 3, 4]), gptq.read([1, 2, 3, 4])) < 2e-3
    assert weight_bytes(decoder) < gptq.weight_bytes


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "least", "most", "weight_bytes"),
    [
        ("transformers float32", 0, 1e-5, 4 * (HEAD + NORMS + LINEARS)),
        ("transformers bfloat16", 1e-3, 0.03, 2 * (HEAD + NORMS + LINEARS)),
        ("bitsandbytes nf4", 0.1, 0.4, None),
        # Integers, a float32 for each of a layer's 1152 outputs, and a byte for each of 14 layouts.
        ("bitsandbytes int8", 1e-3, 0.06, 4 * (HEAD + NORMS) + LINEARS + 2 * 4 * 1152 + 14),
    ],
)
def test_transformers_compute_the_same_but_for_rounding(
    name: str, least: float, most: float, weight_bytes: int | None, dense: torch.Tensor
) -> None:
    spec = SPEC[name]
    started = worker.Worker(tiny_order(spec.form, module=spec.module, packages=spec.packages))
    engine: Any = started.engine
    assert json.loads(json.dumps(started.about()))["versions"]["transformers"]
    assert least <= difference(logits_of(engine), dense) < most
    assert weight_bytes is None or engine.weight_bytes == weight_bytes
    # A cache that was filled is a cache of that length: the next token attends over it.
    engine.start(2)
    engine.fill(24)
    filled = engine.read([5])
    assert engine.position == int(engine.cache.get_seq_length()) == 25
    engine.start(2)
    assert difference(filled, engine.read([5])) > 0.05


def test_fewer_layers_are_the_first_ones() -> None:
    """The depth that tells what a layer costs has to be a real model, and the whole one comes back after it."""
    deep, shallow, whole = lite_engine("dense", 2), lite_engine("dense", 1), lite_engine("dense", 2)
    for layers, other in ((1, shallow), (2, whole)):
        for engine in (deep, other):
            engine.start(layers)
        assert torch.equal(deep.read([7, 8, 9]), other.read([7, 8, 9]))


def test_gguf_names_leave_out_the_layers_above() -> None:
    names = [gguf_name(name, 1) for name in tiny_model(2).tensor_shapes]
    assert [name for name in names if name is not None and name.startswith("blk.")] == [
        f"blk.0.{part}.weight"
        for part in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm",
        )
    ]  # fmt: skip
    assert {"token_embd.weight", "output_norm.weight", "output.weight"} <= set(names)


@pytest.mark.full
def test_our_onnx_engine_has_an_artifact_for_each_depth(gptq: LiteEngine, tmp_path: Path) -> None:
    for cache_dtype in ("float32", "int8"):
        engine = lite_onnx.build(tiny_order(cache_dtype, folder=tmp_path))
        found = {}
        for layers in (2, 1, 2):
            for each in (engine, gptq):
                each.start(layers)
            found[layers] = engine.read([1, 2, 3, 4])
            assert difference(found[layers], gptq.read([1, 2, 3, 4])) < 0.05
            assert difference(engine.read([5]), gptq.read([5])) < 0.05
        assert difference(found[1], found[2]) > 0.3
        # Started anew, it has forgotten.
        engine.start(2)
        assert np.array_equal(engine.read([1, 2, 3, 4]), found[2])
    with pytest.raises(NotHere, match="CPUs only"):
        lite_onnx.build(tiny_order("float32", device="cuda"))
