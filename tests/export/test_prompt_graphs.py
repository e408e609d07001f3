"""Prompts by int8 weights of their own: what the graphs compute, what is measured of them, and when they are taken."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from driving import IMAGES, LENGTHS, PROMPTS, decode_token, read_prompt
from exported import made_once
from onnx import TensorProto, helper

import lite
from export import OnnxSettings, add_onnx
from export.__main__ import main as export_main
from export.settings import ExportSettings
from export.write.decoder_onnx import DATA_NAME, external_tensor
from export.write.onnx_graph import CONTRIB
from export.write.prompt_graphs import EXACTNESS_NAME, write_prompt_graphs
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import AdapterPart, Divergence, unhashed
from lite.engines.machine import Machine, look
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import CPU, adds_int8_exactly, open_session
from lite.engines.options import LoadOptions
from lite.engines.plan import RunPlan
from lite.engines.protocol import Segment
from lite.engines.resolve import resolve
from lite.errors import ArtifactError, LiteError

EXACT = Machine(has_torch=True, onnxruntime="1.32.0", providers=(CPU,), adds_int8_exactly=True)
QUICK = {"verify_studies": 1, "verify_tokens": 4, "device": "cpu", "show_progress": False}


@pytest.fixture(scope="module")
def artifact(tiny_gptq_artifact: Artifact) -> Artifact:
    settings: Any = QUICK
    out = made_once(
        "tiny-int8-prompts",
        lambda folder: add_onnx(tiny_gptq_artifact.path, OnnxSettings(prompt_weights="int8", **settings), out=folder),
        tiny_gptq_artifact.id,
    )
    return load_artifact(out)


def require_exact(artifact: Artifact) -> None:
    part = artifact.onnx_part().prompts
    assert part is not None
    if not adds_int8_exactly(artifact.file(part.exactness)):
        pytest.skip("this CPU does not add int8 products up exactly")


def with_divergence(artifact: Artifact, mean_kl: float | None) -> Artifact:
    part = artifact.onnx_part()
    assert part.prompts is not None
    measured = mean_kl is not None
    found = Divergence(
        studies=1, tokens=9, mean_kl=mean_kl or 0.0, max_kl=1.0, same_top=1.0, perplexity_ratio=1.0,
        first_divergent_token=None, studies_without_divergence=1.0,
    ) if measured else None  # fmt: skip
    prompts = dataclasses.replace(part.prompts, divergence=found)
    return artifact.with_parts(decoder_onnx=dataclasses.replace(part, prompts=prompts))


def plan(artifact: Artifact, machine: Machine = EXACT, **options: Any) -> RunPlan:
    return resolve(LoadOptions(**options), artifact, machine)


# -- The graph -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_is_that_of_weights_and_inputs_in_8_bits(tmp_path: Path, bits: int) -> None:
    """Against the formula in NumPy, and near the weights that it was made of; a token of zeros is zero."""
    K, N, block = 64, 5000, 32  # more outputs than are expanded at a time
    rng = np.random.default_rng(bits)
    integers = rng.integers(0, 1 << bits, (N, K // block, block), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.1, (N, K // block)).astype(np.float32)
    stored = integers if bits == 8 else integers[..., ::2] | integers[..., 1::2] << 4
    with (tmp_path / DATA_NAME).open("wb") as data:
        tensors = [
            external_tensor(data, name, values, location=DATA_NAME)
            for name, values in (("values", stored), ("scales", scales.reshape(-1)))
        ]
    node = helper.make_node(
        "MatMulNBits", ["x", "values", "scales"], ["y"], name="layers.0.o", domain=CONTRIB, K=K, N=N, bits=bits,
        block_size=block, accuracy_level=4,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, [1, "T", size]) for name, size in (("x", K), ("y", N)))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], tensors), opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "decoder.onnx")
    write_prompt_graphs(tmp_path, {"decoder.onnx": "decoder.prompts.onnx"})
    if not adds_int8_exactly(tmp_path / EXACTNESS_NAME):
        pytest.skip("this CPU does not add int8 products up exactly")
    W = ((integers.astype(np.float32) - (1 << bits - 1)) * scales[..., None]).reshape(N, K)
    given = rng.standard_normal((1, 7, K)).astype(np.float32)
    given[0, 3] = 0
    given[0, 4] *= 1000
    session = open_session(tmp_path / "decoder.prompts.onnx", provider=CPU, data=[DATA_NAME, "decoder.prompts.data"])
    (got,) = session.run(None, {"x": given})
    steps = np.abs(W).max(1) / 127
    token = np.maximum(np.abs(given).max(-1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    expected = (np.rint(given / token) @ np.rint(W / steps[:, None]).T.astype(np.float64)) * token * steps
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (got[0, 3] == 0).all()
    exact = given @ W.T
    assert np.linalg.norm(got - exact) < 0.03 * np.linalg.norm(exact)


def test_the_weights_for_tokens_stay_what_they_are(artifact: Artifact, tiny_onnx_artifact: Artifact) -> None:
    """What decodes is the same to the byte, and reads no other file; the head of both graphs is the stored one."""
    part = artifact.onnx_part()
    for name in (part.graph, part.data, part.embeddings):
        assert artifact.file(name).read_bytes() == tiny_onnx_artifact.file(name).read_bytes(), name
    assert part.prompts is not None
    for graph in (part.prompts.graph, part.prompts.int8_cache):
        assert graph is not None
        nodes = onnx.load(artifact.file(graph), load_external_data=False).graph.node
        assert [node.name for node in nodes if node.op_type == "MatMulNBits"] == ["lm_head"]
        products = sum(node.op_type == "MatMulIntegerToFloat" for node in nodes)
        assert products == 4 * artifact.decoder_config().num_hidden_layers
    assert {*part.named()} <= {*artifact.manifest.files}
    artifact.verify(engine="onnx")


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_prompts_alone_are_read_by_them(artifact: Artifact, cache_dtype: Any) -> None:
    """A prompt leaves other keys than by the stored weights, though near; behind the same keys a token is the same."""
    require_exact(artifact)
    stored = OnnxDecoder(artifact, cache_dtype=cache_dtype)
    int8 = OnnxDecoder(artifact, cache_dtype=cache_dtype, int8_prompts=True)
    assert (stored.prompt_weights, int8.prompt_weights) == ("stored", "int8")
    caches = [decoder.new_cache(1, LENGTHS[0] + 4) for decoder in (stored, int8)]
    logits = [
        read_prompt(decoder, PROMPTS[0], IMAGES[0], cache, 0)
        for decoder, cache in zip((stored, int8), caches, strict=True)
    ]
    assert not np.array_equal(*logits)
    assert np.linalg.norm(logits[1] - logits[0]) < 0.1 * np.linalg.norm(logits[0])
    for name, buffer in caches[0].buffers.items():
        caches[1].buffers[name].numpy()[...] = buffer.numpy()
    decoded = [decode_token(decoder, cache, [90]) for decoder, cache in zip((stored, int8), caches, strict=True)]
    np.testing.assert_array_equal(*decoded)
    # And so is a text that is read as a whole: a draft.
    text: Any = Segment(row=0, start=LENGTHS[0], input_ids=(80, 81, 82), num_logits=3, is_prompt=False)
    read = [decoder.logits(text, cache) for decoder, cache in zip((stored, int8), caches, strict=True)]
    np.testing.assert_array_equal(*read)


# -- What is exported, and what is refused ---------------------------------------------------------------------------


def test_an_export_measures_them_and_says_so(artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    require_exact(artifact)
    part = artifact.onnx_part().prompts
    assert part is not None
    assert part.divergence is not None
    assert 0 < part.divergence.mean_kl < 0.01
    assert lite_main_prints(["info", str(artifact.path)], capsys, "int8 weights for prompts")
    found = lite_main_prints(
        ["plan", str(artifact.path), "--prompt-weights", "int8", "--json"], capsys, "prompt_weights"
    )
    planned = json.loads(found)
    assert planned["prompt_weights"] == "int8"
    assert planned["losses"]["int8 prompts, from stored ones"] == part.divergence.mean_kl


def lite_main_prints(arguments: list[str], capsys: pytest.CaptureFixture[str], words: str) -> str:
    from lite.__main__ import main

    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert words in out
    return out


def test_a_study_tells_what_its_prompt_was_read_by(artifact: Artifact, films: list[Path]) -> None:
    require_exact(artifact)
    with lite.load(artifact.path, prompt_weights="int8") as model:
        assert model.findings(films[0]).prompt_weights == "int8"
    with lite.load(artifact.path, prompt_weights="stored") as model:
        assert model.findings(films[0]).prompt_weights == "stored"


def test_what_excludes_them(tmp_path: Path, tiny_gptq_artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ArtifactError, match="prompt_weights int8 with activations float16 · expected float32"):
        OnnxSettings(activations="float16", prompt_weights="int8")
    with pytest.raises(ArtifactError, match="prompt_weights int8 without the onnx engine"):
        ExportSettings(decoder_format="gptq-int4", prompt_weights="int8")
    with pytest.raises(LiteError, match="prompt_weights 'int8' for the torch engine"):
        LoadOptions(engine="torch", prompt_weights="int8")
    command = ["onnx", str(tiny_gptq_artifact.path), "--out", str(tmp_path / "out"), "--prompt-weights", "int8"]
    assert export_main([*command, "--activations", "float16", "--quiet"]) == 1
    assert "expected float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- When they are taken ---------------------------------------------------------------------------------------------


def test_they_are_taken_unasked_where_there_is_all_they_take(artifact: Artifact) -> None:
    measured, north = with_divergence(artifact, 1e-4), AdapterPart(factors="f", on="base", rank=4, files=unhashed("f"))
    adapted = measured.with_parts(adapters={"north": north})
    small = dataclasses.replace(EXACT, adds_int8_exactly=False)
    assert plan(measured).prompt_weights == plan(adapted).prompt_weights == "int8"
    cases: list[tuple[Artifact, Machine, dict[str, Any], str]] = [
        (measured, EXACT, {"prompt_weights": "stored"}, "asked for"),
        (measured, small, {}, "does not add int8 products up exactly"),
        (measured, dataclasses.replace(EXACT, memory_bytes=1), {}, "do not fit the memory"),
        (adapted, EXACT, {"adapters": ("north",)}, "what int8 ones lose with north was not measured"),
        (with_divergence(artifact, None), EXACT, {}, "was not measured"),
        (with_divergence(artifact, 5.0), EXACT, {}, "lost 5 nats a token at export"),
    ]
    for given, machine, options, why in cases:
        found = plan(given, machine, **options)
        assert found.prompt_weights == "stored", why
        assert why in found.choices["prompts"][1]
    # Who asks for them decides about what they lose, and not about what a CPU can do.
    assert plan(with_divergence(artifact, 5.0), prompt_weights="int8").prompt_weights == "int8"
    with pytest.raises(LiteError, match="got prompt_weights 'int8' .* does not add int8 products up exactly"):
        plan(measured, small, prompt_weights="int8")


def test_an_artifact_without_them_says_so(tiny_onnx_artifact: Artifact) -> None:
    assert plan(tiny_onnx_artifact).prompt_weights == "stored"
    with pytest.raises(LiteError, match="the artifact has no int8 weights for them .* --prompt-weights int8"):
        plan(tiny_onnx_artifact, prompt_weights="int8")
    with pytest.raises(LiteError, match="expected a graph for them"):
        OnnxDecoder(tiny_onnx_artifact, int8_prompts=True)


def test_memory_gives_them_up_before_rows(artifact: Artifact) -> None:
    measured = with_divergence(artifact, 1e-4)
    both, stored = plan(measured, rows=4), plan(measured, rows=4, prompt_weights="stored")
    more = both.memory.decoder_bytes - stored.memory.decoder_bytes
    config = artifact.decoder_config()
    per_layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    assert more > config.num_hidden_layers * per_layer
    limited = plan(measured, rows=4, memory_limit=stored.memory.card_bytes + more // 2)
    assert (limited.prompt_weights, limited.rows) == ("stored", 4)


def test_a_cpu_that_does_not_add_up_exactly_is_seen(artifact: Artifact, tmp_path: Path) -> None:
    """By a product: of other weights it is another one, as it is where sums are cut at 16 bits."""
    model = onnx.load(artifact.file(EXACTNESS_NAME))
    (weights,) = model.graph.initializer
    weights.raw_data = bytes([126]) + weights.raw_data[1:]
    onnx.save(model, tmp_path / "other.onnx")
    assert not adds_int8_exactly(tmp_path / "other.onnx")
    # It is asked only where the answer counts.
    assert look(LoadOptions(prompt_weights="stored"), artifact).adds_int8_exactly is None
    assert look(LoadOptions(engine="torch"), artifact).adds_int8_exactly is None
    assert look(LoadOptions(), artifact).adds_int8_exactly is not None
