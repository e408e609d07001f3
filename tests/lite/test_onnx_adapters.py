"""Adapters in the onnx engine: each row computes with its own, or with none, whatever the others do."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from driving import IMAGES, PROMPTS, TARGETS
from exported import made_once
from safetensors.numpy import save_file

from benchmarks.speed.decoders import dequantized
from export import OnnxSettings, add_onnx
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import AdapterPart, FileRecord
from lite.engines.adapters import Adapters
from lite.engines.onnx_engine.adapted import Adapted
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import adds_int8_exactly
from lite.engines.protobuf import message
from lite.engines.protocol import NO_ADAPTER, Segment
from lite.engines.segments import divide, expand_image, score
from lite.engines.torch_engine.linear import linears_of
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError, LiteError
from lite.memory.counts import layer_linear_shapes

NAMES = ("all", "some", "wide")
SOME = ("q_proj", "up_proj", "down_proj")
GRAPHS = ["float32", "int8 cache", "int8 prompts", "float16"]
Factors = dict[str, np.ndarray]


def factors(artifact: Artifact, rank: int, seed: int, names: tuple[str, ...]) -> Factors:
    """Draw an adapter that is about as large as the weights."""
    config, rng, drawn = artifact.decoder_config(), np.random.default_rng(seed), Factors()
    for layer in range(config.num_hidden_layers):
        for name, (out_features, in_features) in layer_linear_shapes(config).items():
            if name in names:
                linear = f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
                a = rng.standard_normal((rank, in_features)) * in_features**-0.5
                b = rng.standard_normal((out_features, rank)) * rank**-0.5
                drawn |= {f"{linear}.lora_A": a.astype(np.float16), f"{linear}.lora_B": b.astype(np.float16)}
    return drawn


def with_adapters(artifact: Artifact, out: Path) -> Artifact:
    """Return a copy of an artifact with three adapters, of other ranks and linears."""
    shutil.copytree(artifact.path, out)
    parts = {}
    everything = tuple(layer_linear_shapes(artifact.decoder_config()))
    for name, rank, linears in zip(NAMES, (8, 20, 40), (everything, SOME, everything), strict=True):
        file = f"adapters/{name}/factors.safetensors"
        (out / file).parent.mkdir(parents=True)
        save_file(factors(artifact, rank, rank, linears), out / file)
        record = FileRecord(bytes=(out / file).stat().st_size, sha256="0" * 64)
        parts[name] = AdapterPart(factors=file, on="base", rank=rank, files={file: record})
    manifest = artifact.manifest
    listed = dataclasses.replace(manifest, parts=dataclasses.replace(manifest.parts, adapters=parts))
    return dataclasses.replace(artifact, path=out, manifest=listed)


@pytest.fixture(scope="module")
def artifact(tiny_onnx_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return with_adapters(tiny_onnx_artifact, tmp_path_factory.mktemp("adapted") / "artifact")


@pytest.fixture(scope="module", params=GRAPHS)
def graphs(
    request: pytest.FixtureRequest,
    tiny_gptq_artifact: Artifact,
    artifact: Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What makes a decoder of the artifact in one of the forms of its graph."""
    form = request.param
    if form in ("float32", "int8 cache"):
        cache_dtype: Any = "int8" if form == "int8 cache" else None
        return functools.partial(OnnxDecoder, artifact, cache_dtype=cache_dtype)
    quick: Any = {"verify_studies": 1, "verify_tokens": 4, "device": "cpu", "show_progress": False}
    quick |= {"activations": "float16"} if form == "float16" else {"prompt_weights": "int8"}
    export = functools.partial(add_onnx, tiny_gptq_artifact.path, OnnxSettings(**quick))
    exported = load_artifact(made_once(f"tiny-{form}", lambda out: export(out=out), tiny_gptq_artifact.id))
    part = exported.onnx_part().prompts
    if part is not None and not adds_int8_exactly(exported.file(part.exactness)):
        pytest.skip("this CPU does not add int8 products up exactly")
    own = with_adapters(exported, tmp_path_factory.mktemp(form) / "artifact")
    return functools.partial(OnnxDecoder, own, int8_prompts=part is not None)


def begin(decoder: OnnxDecoder, cache: Any, study: int, adapter: int, row: int = 0) -> np.ndarray:
    """Read the prompt of a study with an adapter; return the logits behind it."""
    prompt = expand_image(PROMPTS[study], len(IMAGES[study]))
    for segment in divide(prompt, row=row, chunk_size=8, image_features=IMAGES[study], adapter=adapter):
        decoder.extend(segment, cache)
    return np.array(cache.last_logits[0, -1])


def off_by(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the root mean square of a difference, relative."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def tokens(decoder: OnnxDecoder, cache: Any, count: int = 8) -> list[dict[int, int]]:
    """Decode; return the tokens of each step by row."""
    steps = [decoder.decode(cache).wait() for _ in range(count)]
    return [{row: chosen.token_ids[0] for row, chosen in step.items()} for step in steps]


def test_without_an_adapter_a_row_is_what_it_was(graphs: Any) -> None:
    """To the last bit: logits of prompts, tokens and drafts, and what the cache holds."""
    found = []
    for decoder in (graphs(), graphs(adapters=NAMES)):
        cache = decoder.new_cache(2, 40)
        for buffer in cache.buffers.values():
            buffer.numpy()[...] = 0
        logits = [begin(decoder, cache, row, NO_ADAPTER, row) for row in range(2)]
        for drafts in ({}, {0: TARGETS[:4]}, {1: TARGETS[:1]}, {}):
            decoder.decode(cache, drafts)
            logits.append(np.array(cache.last_logits))
        found.append([*logits, *(buffer.numpy().copy() for buffer in cache.buffers.values())])
    for without, unused in zip(*found, strict=True):
        if (
            decoder.dtype == "float16"
        ):  # of whose operators a CPU lacks some: these are cast, and casts between them left out
            assert off_by(unused, without) <= 0.05
        else:
            np.testing.assert_array_equal(without, unused)
    assert decoder.adapters == NAMES


@pytest.mark.parametrize("slot", range(len(NAMES)))
def test_an_adapter_is_what_its_factors_say(graphs: Any, artifact: Artifact, slot: int) -> None:
    """Beside torch with the product of its factors added to the weights."""
    exact = load_decoder(artifact, device="cpu")
    adapters = Adapters(artifact, [NAMES[slot]])
    for name, linear in linears_of(exact).items():
        owner = name.rpartition(".")[0]
        stack = adapters.stack({f"{owner}.{part}": n for part, n in linear.parts.items()}, linear.in_features)
        dense = dequantized(linear)
        if stack is not None:
            each = zip(
                np.split(stack.b[0], np.cumsum(stack.parts)[:-1]), np.split(stack.a[0], len(stack.parts)), strict=True
            )
            dense = dense + torch.from_numpy(np.concatenate([np.float32(b) @ np.float32(a) for b, a in each]))
        linear.weights = (dense,)
    decoder = graphs(adapters=NAMES[: slot + 1])  # without the wide one linears have different ranks
    for study in range(3):
        image, ids = IMAGES[study], PROMPTS[study]
        expected = np.array(score(exact, ids, TARGETS, torch.from_numpy(image), num_image_tokens=len(image)))
        got, plain = (
            score(decoder, ids, TARGETS, image, num_image_tokens=len(image), adapter=adapter)
            for adapter in (slot, NO_ADAPTER)
        )
        # The tiny model's int8 cache alone is off by up to 0.24.
        assert off_by(got, expected) <= (0.5 if decoder.cache_dtype == "int8" else 0.1)
        assert off_by(plain, expected) > 0.9, "an adapter that changes little would prove nothing"


def test_rows_of_a_batch_are_the_rows_alone(graphs: Any) -> None:
    slots, decoder = (0, NO_ADAPTER, 2, 1), graphs(adapters=NAMES)
    together = decoder.new_cache(len(slots), 40)
    for row, slot in enumerate(slots):
        begin(decoder, together, 0, slot, row)
    assert together.adapters == list(slots)
    batch = tokens(decoder, together)
    for row, slot in enumerate(slots):
        alone = decoder.new_cache(1, 40)
        begin(decoder, alone, 0, slot)
        assert [step[0] for step in tokens(decoder, alone)] == [step[row] for step in batch]
    assert len({tuple(step[row] for step in batch) for row in range(len(slots))}) == len(slots)


def test_another_adapter_loaded_changes_nothing(graphs: Any) -> None:
    """Not even by its rank, to which the others are padded: blocks have other borders then, and that is all."""
    alone, beside = graphs(adapters=["all"]), graphs(adapters=["wide", "all"])
    logits = [begin(decoder, decoder.new_cache(1, 20), 0, slot) for decoder, slot in ((alone, 0), (beside, 1))]
    assert off_by(logits[0], logits[1]) <= 0.1


def test_drafts_and_a_second_question_have_the_adapter_of_their_row(graphs: Any) -> None:
    decoder = graphs(adapters=NAMES)
    cache, other = decoder.new_cache(2, 40), decoder.new_cache(1, 40)
    begin(decoder, cache, 0, 0, 1)
    begin(decoder, other, 0, 0)
    right = [step[0] for step in tokens(decoder, other, 4)]
    begun = int(cache.input_ids[1])
    chosen = decoder.decode(cache, {1: right[:3]}).wait()[1]
    assert list(chosen.token_ids) == right
    cache.truncate(1, cache.num_cached_tokens[1] - 4, newest=begun)
    segment = Segment(row=1, start=cache.num_cached_tokens[1], input_ids=[begun], num_logits=1, adapter=NO_ADAPTER)
    assert not np.allclose(decoder.logits(segment, cache), other.last_logits[0])
    assert cache.adapters == [NO_ADAPTER, NO_ADAPTER]


def test_what_cannot_be_loaded_says_why(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LiteError, match="got the adapter 'none' · expected one of all, some, wide"):
        OnnxDecoder(artifact, adapters=["none"])
    adapted = Adapted(Adapters(artifact, ["some"]), artifact.decoder_config(), "float32")
    model = onnx.load(artifact.path / "decoder.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = node.name.replace("layers.1.down", "layers.1.other")
    with pytest.raises(ArtifactError, match=r"got no layers\.1\.down · expected it, as an adapter changes it"):
        adapted.change(model.SerializeToString())
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(LiteError, match="got no file for the factors of adapters .* set TMPDIR"):
        OnnxDecoder(artifact, adapters=["all"])


def test_messages_are_those_of_onnx(artifact: Artifact) -> None:
    """Read by the package that the runtime does without: and the graph is what it was, but for what was added."""
    node = onnx.NodeProto.FromString(message((1, "x"), (1, ""), (2, "y" * 300), (4, "Add")))
    assert (list(node.input), list(node.output), node.op_type) == (["x", ""], ["y" * 300], "Add")
    content = (artifact.path / "decoder.onnx").read_bytes()
    adapted = Adapted(Adapters(artifact, ["some"]), artifact.decoder_config(), "float32")
    before, after = (onnx.ModelProto.FromString(graph).graph for graph in (content, adapted.change(content)))
    kept = [*after.node][: len(before.node)]
    assert [(node.name, *node.input) for node in kept] == [(node.name, *node.input) for node in before.node]
    assert [value.name for value in after.input][-1] == "adapter"
    changed = [a.name for a, b in zip(kept, before.node, strict=True) if a.output != b.output]
    assert changed == [f"layers.{layer}.{name}" for layer in range(2) for name in ("qkv", "gate_up", "down")]
