"""Where the onnx engine's time goes: ONNX Runtime's profile, summed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import profile
from benchmarks.speed.profile import main, profile_decoder, reports, split_runs
from lite.artifact.open import Artifact, load_artifact
from lite.memory.counts import onnx_linear_bytes, onnx_linear_shapes


def event(name: str, ts: int, dur: int, op: str | None = None) -> dict[str, Any]:
    if op is None:
        return {"cat": "Session", "name": name, "ts": ts, "dur": dur, "args": {}}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}


def test_nodes_belong_to_the_run_they_begin_in() -> None:
    events = [
        event("session_initialization", 0, 90),
        event("model_run", 200, 50),
        event("model_run", 100, 40),
        event("layers.0.qkv", 100, 10, "MatMulNBits"),
        event("layers.0.attention", 110, 29, "If"),
        event("layers.0.attention.decode", 111, 20, "GroupQueryAttention"),
        event("layers.0.qkv", 200, 30, "MatMulNBits"),
        {"cat": "Node", "name": "layers.0.qkv_fence_before", "ts": 101, "dur": 1, "args": {"op_name": "MatMulNBits"}},
        event("lm_head", 250, 5, "MatMulNBits"),
    ]
    first, second = split_runs(events)
    assert (first.seconds, second.seconds) == (pytest.approx(40e-6), pytest.approx(50e-6))
    assert [(name, op) for name, op, _ in first.nodes] == [
        ("layers.0.qkv", "MatMulNBits"),
        ("layers.0.attention", "If"),
        ("layers.0.attention.decode", "GroupQueryAttention"),
    ]
    assert second.nodes == (("layers.0.qkv", "MatMulNBits", pytest.approx(30e-6)),)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both take a while, and have tests and uses of their own."""
    monkeypatch.setattr(profile, "streaming_read_bandwidth", lambda _: 30e9)
    monkeypatch.setattr(profile, "_PRODUCT", (16, 64, 32))


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_profile_is_all_of_the_time(tiny_onnx_artifact: Artifact, cache_dtype: str) -> None:
    config, part = tiny_onnx_artifact.decoder_config(), tiny_onnx_artifact.manifest.parts.decoder_onnx
    assert part is not None
    found = profile_decoder(tiny_onnx_artifact, cache_dtype=cache_dtype, num_prompt_tokens=40, num_new_tokens=5)
    assert found.cache_dtype == cache_dtype
    for phase in (found.prefill, found.decode):
        parts = {part.name: part for part in phase.parts}
        assert {*onnx_linear_shapes(config), "GroupQueryAttention", "between operators"} <= parts.keys()
        assert "If" not in parts, "its time is that of its branch"
        assert sum(part.seconds for part in phase.parts) == pytest.approx(phase.seconds)
        assert [part.seconds for part in phase.parts] == sorted((part.seconds for part in phase.parts), reverse=True)
        runs = 2 if phase is found.prefill else 1  # a prompt is its film, with what comes before it, and its question
        calls = [parts[name].calls for name in ("qkv", "lm_head", "GroupQueryAttention")]
        assert calls == [2 * runs, runs, 2 * runs]
        assert ("the cache's rounding" in parts) == (cache_dtype == "int8" and phase is found.prefill)
    decode = {part.name: part for part in found.decode.parts}
    for name in onnx_linear_shapes(config):
        layers = 1 if name == "lm_head" else 2
        assert decode[name].bytes_read == layers * onnx_linear_bytes(name, config, part, bytes_per_block=4)
    # 43 tokens on average, keys and values of 2 layers, 2 heads of 16.
    assert decode["GroupQueryAttention"].bytes_read == 43 * 2 * 2 * 2 * 16 * (4 if cache_dtype == "float32" else 1)
    prefill = {part.name: part for part in found.prefill.parts}
    out, inputs = onnx_linear_shapes(config)["qkv"]
    assert prefill["qkv"].operations == 2 * 40 * out * inputs * 2
    out, inputs = onnx_linear_shapes(config)["down"]
    assert prefill["down"].operations == 2 * 40 * out * inputs, "the last layer's is for one token"
    assert prefill["lm_head"].operations is None
    assert found.int8_rate > 0


@pytest.mark.usefixtures("limits")
def test_a_prompt_of_several_chunks_is_one(tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite.engines.onnx_engine.decoder.ONNX_CHUNK_SIZE", 16)
    found = profile_decoder(tiny_onnx_artifact, cache_dtype=None, num_prompt_tokens=40, num_new_tokens=3)
    (qkv,) = (part for part in found.prefill.parts if part.name == "qkv")
    assert qkv.calls == (2 + 2) * 2, "21 tokens with the film, and 19 of the question"


@pytest.mark.usefixtures("limits")
def test_the_command_line(
    tiny_onnx_artifact: Artifact, tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    path = str(tiny_onnx_artifact.path)
    assert main([path, "--new-tokens", "4", "--cache-dtype", "int8", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(file.read_text())
    # As long a prompt as the context holds.
    context = tiny_onnx_artifact.decoder_config().max_position_embeddings
    assert f"A prompt of {context - 4} tokens, cache int8." in printed
    assert "| gate_up " in printed
    assert written["artifact_id"] == load_artifact(path).id
    assert written["num_prompt_tokens"] == context - 4
    assert {part["name"] for part in written["sections"]["decode"]["parts"]} >= {"qkv", "lm_head"}
    for wrong, message in (
        ([str(tiny_artifact.path)], "got an artifact without decoder.onnx"),
        ([path, "--new-tokens", "1"], "expected 2 of each at least"),
        ([path, "--prompt-tokens", str(context)], f"{context} in all at most"),
        ([str(tmp_path / "nowhere")], "got a path that does not exist"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err


def test_shares_are_of_the_limits() -> None:
    part = profile.Part(name="qkv", calls=2, seconds=0.5, operations=40_000_000_000)
    read = profile.Part(name="qkv", calls=2, seconds=0.01, bytes_read=150_000_000)
    found = reports(
        profile.Profile(
            artifact_id="0",
            cache_dtype="int8",
            num_prompt_tokens=40,
            prefill=profile.Phase(seconds=1.0, parts=(part,)),
            decode=profile.Phase(seconds=0.02, parts=(read,)),
            bandwidth=30e9,
            int8_rate=160e9,
        )
    )
    assert list(found["prefill"].lines[0].values()) == ["qkv", "2", "500.00", "50.0%", "80.0", "50%"]
    assert list(found["decode"].lines[0].values()) == ["qkv", "2", "10.00", "50.0%", "15.0", "50%"]
    assert found["decode"].notes == ["7.5 GB/s in all, bandwidth alone: 30.0."]
    assert found["prefill"].title == "Prefill: 1,000 ms"
