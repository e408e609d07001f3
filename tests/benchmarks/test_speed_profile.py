"""Where the onnx engine's time goes: ONNX Runtime's profile, summed up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import profile
from benchmarks.speed.profile import ATTENTION, BETWEEN, Run, main, report_of, split_runs
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


def test_shares_are_of_the_time_and_of_the_bandwidth() -> None:
    nodes = (
        ("layers.0.qkv", "MatMulNBits", 0.006), ("layers.1.qkv", "MatMulNBits", 0.004),
        ("layers.0.attention", "If", 0.009), ("layers.0.attention.scale", "Mul", 0.002), ("norm", "Mul", 0.001),
    )  # fmt: skip
    report = report_of(
        "decode", [Run(seconds=0.02, nodes=nodes)] * 3, over=3, nbytes={"qkv": 150_000_000}, bandwidth=30e9
    )
    assert report.title == "Decode: 20 ms"
    assert [list(line.values()) for line in report.lines] == [
        ["qkv", "2", "10.00", "50.0%", "15.0", "50%"],
        [BETWEEN, "", "7.00", "35.0%"],
        ["the cache's rounding", "1", "2.00", "10.0%"],
        ["Mul", "1", "1.00", "5.0%"],
    ]  # fmt: skip
    assert report.notes == ["7.5 GB/s in all, bandwidth alone: 30.0."]


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_the_command_accounts_for_all_of_the_time(
    cache_dtype: str, tiny_onnx_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(profile, "streaming_read_bandwidth", lambda _: 30e9)
    monkeypatch.setattr("lite.engines.onnx_engine.decoder.ONNX_CHUNK_SIZE", 16)
    file = tmp_path / "profile.json"
    arguments = [str(tiny_onnx_artifact.path), "--prompt-tokens", "40", "--new-tokens", "5", "--json", str(file)]
    assert main([*arguments, "--cache-dtype", cache_dtype]) == 0
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    assert f"A prompt of 40 tokens, cache {cache_dtype}." in printed
    assert "| gate_up " in printed
    assert written["artifact_id"] == load_artifact(tiny_onnx_artifact.path).id
    config, part = tiny_onnx_artifact.decoder_config(), tiny_onnx_artifact.manifest.parts.decoder_onnx
    assert part is not None
    for name, phase in written["sections"].items():
        parts = {part["name"]: part for part in phase["parts"]}
        assert {*onnx_linear_shapes(config), ATTENTION, BETWEEN} <= parts.keys()
        assert "If" not in parts, "its time is that of its branch"
        assert sum(part["seconds"] for part in phase["parts"]) == pytest.approx(phase["seconds"], rel=1e-3)
        runs = 1 if name == "decode" else 2 + 2  # chunks of 21 tokens with the film, and of 19 of the question
        assert [parts[name]["calls"] for name in ("qkv", "lm_head", ATTENTION)] == [2 * runs, runs, 2 * runs]
        assert ("the cache's rounding" in parts) == (cache_dtype == "int8" and name == "prefill")
    for name in onnx_linear_shapes(config):
        layers = 1 if name == "lm_head" else 2
        assert parts[name]["bytes"] == layers * onnx_linear_bytes(name, config, part, bytes_per_block=4)
    # 43 tokens on average, keys and values of 2 layers, 2 heads of 16.
    assert parts[ATTENTION]["bytes"] == 43 * 2 * 2 * 2 * 16 * (4 if cache_dtype == "float32" else 1)


def test_wrong_use(
    tiny_onnx_artifact: Artifact, tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, context = str(tiny_onnx_artifact.path), tiny_onnx_artifact.decoder_config().max_position_embeddings
    for wrong, message in (
        ([str(tiny_artifact.path)], "got an artifact without decoder.onnx"),
        ([path, "--new-tokens", "1"], f"got {context - 1} and 1 tokens · expected 2 of each at least"),
        ([path, "--prompt-tokens", str(context)], f"{context} in all at most"),
        ([str(tmp_path / "nowhere")], "got a path that does not exist"),
    ):
        assert main(wrong) == 1
        assert message in capsys.readouterr().err
