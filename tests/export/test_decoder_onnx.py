"""decoder.onnx: the graph that is written, against the decoder of the same integers."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from driving import read_prompt, score_text
from repository import run_python
from safetensors.torch import load_file, save_file
from tiny import gptq_llama, random_llama, tiny_llama_config, tiny_manifest, tiny_onnx_part, tiny_parts

from export.write.decoder_onnx import write_decoder_onnx
from export.write.int8_cache_graph import write_int8_cache_graph
from kernels.gptq import GptqWeight
from lite.artifact.open import Artifact
from lite.artifact.parts import DecoderPart
from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.torch_engine.load import load_decoder
from lite.errors import ArtifactError
from lite.eval.divergence import compare_logits

VOCAB_SIZE = 304
OPERATORS = {"MatMulNBits", "GroupQueryAttention", "QuickGelu", "Mul", "Split", "Gather", "Cast"}
OPERATORS |= {"SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"}
"""What the provider of CUDA has, too."""
NUM_PAST = {"Shape", "Cast", "Unsqueeze", "Sub"}
PROMPT_WAY = {"Slice", "Cast", "Mul", "GroupQueryAttention", "Div", "Round", "Clip", "Concat"}

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 256}
FORMS: dict[str, dict[str, Any]] = {
    "int4, groups of 128": {"group_size": 128},
    "int4, groups of 32": {"group_size": 32},
    "int4, whole rows": {"group_size": -1},
    "int4, whole rows of odd width": {"group_size": -1, "llama": {"intermediate_size": 176}},
    "int8": {"bits": 8, "group_size": 128},
    "int8, whole rows": {"bits": 8, "group_size": -1},
    "int8 head": {"group_size": 32, "lm_head_bits": 8},
    "int8 head of a whole row": {"group_size": -1, "lm_head_bits": 8},
    "int4 head": {"group_size": 32, "lm_head_bits": 4},
    "tied": {"group_size": 32, "llama": {"tie_word_embeddings": True}},
    "one kv head": {"group_size": 32, "llama": {"num_key_value_heads": 1}},
    "no grouped queries": {"group_size": 32, "llama": {"num_key_value_heads": 4}},
    "three layers, long rope": {"group_size": 64, "llama": {"num_hidden_layers": 3, "rope_theta": 500000.0}},
    "one layer": {"group_size": 32, "llama": {"num_hidden_layers": 1}},
}
PROMPT = [1, 5, 9, IMAGE_TOKEN_ID, 20, 21, 300]
TARGETS = [7, 8, 30, 31, 100, 2]
IMAGE = np.random.default_rng(7).standard_normal((11, 128)).astype(np.float32)


def write(out: Path, *, dtype: Any = "float32", llama: dict[str, Any] | None = None, **quantization: Any) -> Artifact:
    """Write a random decoder in GPTQ, and decoder.onnx; wrap both as an artifact whose other files nobody opens."""
    config, tensors = gptq_llama(tiny_llama_config(VOCAB_SIZE, **(WIDE | (llama or {}))), **quantization)
    (out / "decoder").mkdir(parents=True)
    (out / "decoder" / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "decoder" / "model.safetensors")
    bits = quantization.get("bits", 4)
    decoder = DecoderPart(format="gptq-int4" if bits == 4 else "gptq-int8")
    parts = tiny_parts(decoder=decoder, decoder_onnx=tiny_onnx_part(dtype))
    artifact = Artifact(path=out, manifest=tiny_manifest(parts=parts), id="0" * 16)
    write_decoder_onnx(out, [out / "decoder" / "model.safetensors"], artifact.decoder_config(), dtype=dtype)
    return artifact


def with_int8_cache(artifact: Artifact, k_scale: float = 0.05, v_scale: float = 0.1) -> Artifact:
    """Add the graph with an int8 cache, every channel with the same scale."""
    config, part = artifact.decoder_config(), artifact.manifest.parts.decoder_onnx
    assert part is not None
    shape = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    write_int8_cache_graph(artifact.path, np.full(shape, k_scale, np.float32), np.full(shape, v_scale, np.float32))
    return artifact.with_parts(decoder_onnx=tiny_onnx_part(part.dtype, int8_cache=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One with both graphs. Read only."""
    return with_int8_cache(write(tmp_path_factory.mktemp("written"), group_size=32))


def both_graphs(artifact: Artifact) -> tuple[onnx.GraphProto, onnx.GraphProto]:
    """The graph with a float cache, and the one with an int8 cache."""
    names = "decoder.onnx", "decoder.int8_cache.onnx"
    plain, quantized = (onnx.load(artifact.path / name, load_external_data=False).graph for name in names)
    return plain, quantized


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def exact(artifact: Artifact) -> None:
    """Let MatMulNBits compute in float32: what else is different is an error."""
    model = onnx.load(artifact.path / "decoder.onnx", load_external_data=False)
    edited = 0
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                assert attribute.i == 4
                attribute.i = 1
                edited += 1
    assert edited == 4 * artifact.decoder_config().num_hidden_layers + 1
    (artifact.path / "decoder.onnx").write_bytes(model.SerializeToString())


def constant(artifact: Artifact, name: str) -> np.ndarray:
    """Read a constant of the graph from the data file."""
    model = onnx.load(artifact.path / "decoder.onnx")
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor)


@torch.inference_mode()
def torch_logits(artifact: Artifact) -> np.ndarray:
    """Score with the torch decoder, its 16-bit head replaced by the one that the graph has."""
    decoder = load_decoder(artifact, device="cpu", dtype="float32")
    quantization = artifact.decoder_config().quantization
    if quantization is None or quantization.lm_head_bits is None:
        values, scales = constant(artifact, "lm_head.values"), constant(artifact, "lm_head.scales").astype(np.float32)
        head = (values.astype(np.float32) - 128) * scales.reshape(*values.shape[:2], 1)
        head = head.reshape(len(values), -1)
        stored = random_llama(tiny_llama_config(VOCAB_SIZE, **WIDE))["lm_head.weight"].float().numpy()
        if not decoder.config.tie_word_embeddings:
            # It is the artifact's own, to 8 bits.
            assert np.abs(head - stored).max() <= 0.02 * np.abs(stored).max()
        decoder.lm_head = torch.nn.Linear(128, VOCAB_SIZE, bias=False)
        decoder.lm_head.weight.copy_(torch.from_numpy(head))
    return score_text(decoder, PROMPT, TARGETS, IMAGE).numpy()


def mean_kl(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float(compare_logits(reference, candidate, TARGETS).kl.mean())


@pytest.mark.parametrize("form", FORMS)
def test_the_graph_computes_what_the_decoder_does(form: str, tmp_path: Path) -> None:
    artifact = write(tmp_path, **FORMS[form])
    expected = torch_logits(artifact)
    rounded = score_text(OnnxDecoder(artifact), PROMPT, TARGETS, IMAGE)
    assert rounded.dtype == np.float32
    assert rounded.shape == (len(TARGETS), VOCAB_SIZE)
    assert mean_kl(expected, rounded) < 0.02
    # Only that the inputs of the products are rounded to int8 differs.
    exact(artifact)
    computed = score_text(OnnxDecoder(artifact), PROMPT, TARGETS, IMAGE)
    assert np.abs(computed - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(rounded - expected).max() > 1e-3 * np.abs(expected).max(), "accuracy_level does nothing here"


@pytest.mark.parametrize("form", ["int4, groups of 128", "int8", "int8 head"])
def test_in_float16(form: str, tmp_path: Path) -> None:
    artifact = write(tmp_path, dtype="float16", **FORMS[form])
    expected = torch_logits(artifact)
    decoder = OnnxDecoder(artifact)
    assert (decoder.dtype, decoder.cache_dtype) == ("float16", "float16")
    assert decoder.new_cache(1, 10).nbytes == 2 * 2 * 2 * 10 * 32 * 2
    assert mean_kl(expected, score_text(decoder, PROMPT, TARGETS, IMAGE)) < 0.02


@pytest.mark.parametrize("name", ["decoder.onnx", "decoder.int8_cache.onnx"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_operators_that_the_provider_of_cuda_has(tmp_path: Path, dtype: str, name: str) -> None:
    artifact = with_int8_cache(write(tmp_path, dtype=dtype, group_size=32))
    model = onnx.load(artifact.path / name, load_external_data=False)
    # For CPUs attention has two ways, one of which is taken.
    more = NUM_PAST | {"If"} if (dtype, name) == ("float32", "decoder.int8_cache.onnx") else set()
    assert {node.op_type for node in model.graph.node} == (
        OPERATORS - {"GroupQueryAttention"} | more if more else OPERATORS
    )
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    counts = [sum(node.op_type == wanted for node in model.graph.node) for wanted in ("MatMulNBits", "Gather")]
    assert counts == [4 * 2 + 1, 2]
    levels = {a.i for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"}
    assert levels == {4}


def test_the_data_is_written_once_aligned_and_without_gaps(written: Artifact) -> None:
    size = (written.path / "decoder.onnx.data").stat().st_size
    places: dict[str, dict[str, tuple[int, int]]] = {}
    for graph in ("decoder.onnx", "decoder.int8_cache.onnx"):
        model = onnx.load(written.path / graph, load_external_data=False)
        places[graph] = {}
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert tensor.name.endswith("_scale") or len(tensor.raw_data) <= 8, "weights are not within the graph"
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            assert entry["location"] == "decoder.onnx.data"
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            assert int(entry["length"]) == int(np.prod(tensor.dims)) * itemsize
            places[graph][tensor.name] = int(entry["offset"]), int(entry["length"])
    assert places["decoder.onnx"] == places["decoder.int8_cache.onnx"]
    ranges = sorted(places["decoder.onnx"].values())
    end = 0
    for offset, length in ranges:
        assert offset % 65536 == 0
        assert end <= offset < end + 65536, "tensors overlap, or something between them belongs to none"
        end = offset + length
    assert end == size


def test_the_integers_are_those_of_the_decoder(written: Artifact) -> None:
    tensors = load_file(written.path / "decoder" / "model.safetensors")
    rows = []
    for part in "qkv":
        name = f"model.layers.1.self_attn.{part}_proj"
        stored = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        rows.append(GptqWeight.from_tensors(stored, bits=4).dequantize(torch.float32).numpy())
    values = constant(written, "layers.1.qkv.values")
    fields = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1).astype(np.float32) - 8
    scales = constant(written, "layers.1.qkv.scales").reshape(*values.shape[:2], 1)
    np.testing.assert_array_equal((fields * scales).reshape(len(values), -1), np.concatenate(rows))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_int8_cache_is_the_only_difference_between_the_graphs(tmp_path: Path, dtype: str) -> None:
    plain, quantized = both_graphs(with_int8_cache(write(tmp_path, dtype=dtype, group_size=32)))
    added = {t.name: onnx.numpy_helper.to_array(t) for t in quantized.initializer if t.name.endswith("_scale")}
    assert {name: (array.shape, float(array.flat[0])) for name, array in added.items()} == {
        f"layers.{layer}.{kind}_scale": ((1, 2, 1, 32), pytest.approx(scale))
        for layer in range(2)
        for kind, scale in (("k", 0.05), ("v", 0.1))
    }
    others = [
        node for node in quantized.node if node.op_type not in ("Shape", "Unsqueeze", "Sub") and "num_" not in node.name
    ]
    for node, other in zip(plain.node, others, strict=True):
        if node.op_type != "GroupQueryAttention":
            assert node == other
            continue
        assert list(node.output) == list(other.output)
        if dtype == "float32":
            assert (other.op_type, list(other.input)) == ("If", ["is_prefill"])
            prompt, decode = attributes(other)["then_branch"], attributes(other)["else_branch"]
            assert {inner.op_type for inner in prompt.node} == PROMPT_WAY
            (in_float,) = (inner for inner in prompt.node if inner.op_type == "GroupQueryAttention")
            assert attributes(in_float) == attributes(node)
            (other,) = decode.node
        found = attributes(other)
        assert found["k_quant_type"] == found["v_quant_type"] == b"PER_CHANNEL"
        assert found["kv_cache_bit_width"] == 8
        assert found.items() > attributes(node).items()
    kinds = {v.name.partition(".")[0]: v.type.tensor_type.elem_type for v in quantized.input}
    assert kinds["past_key_values"] == onnx.TensorProto.INT8
    assert ("is_prefill" in kinds) == (dtype == "float32")


def prefilled(
    artifact: Artifact, *, as_decoded: bool = False, chunk_size: int = 512, at_once: bool = False
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Read PROMPT with an int8 cache; return the logits, and the cache's keys and values, layer by layer."""
    decoder = OnnxDecoder(artifact, cache_dtype="int8")
    decoder.chunk_size = chunk_size
    if as_decoded:
        run = decoder._run
        decoder._run = lambda *given, **named: run(*given, **(named | {"is_prefill": False}))  # type: ignore[method-assign]
    length = len(PROMPT) - 1 + len(IMAGE)
    cache = decoder.new_cache(1, length)
    logits = read_prompt(decoder, PROMPT, IMAGE, cache, at_once=at_once)
    return logits, [
        cache.buffers[f"{layer}.{kind}"].numpy().astype(int) for layer in range(2) for kind in ("key", "value")
    ]


def test_a_prompt_sees_itself_unrounded_and_leaves_what_is_decoded_from(written: Artifact) -> None:
    engine = OnnxDecoder(written)
    plain = read_prompt(engine, PROMPT, IMAGE, engine.new_cache(1, 40))
    logits, cache = prefilled(written, at_once=True)
    np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())
    rounded, of_the_kernel = prefilled(written, as_decoded=True, at_once=True)
    assert np.abs(rounded - plain).max() > 1e-3 * np.abs(plain).max(), "rounding the cache does nothing here"
    # The first layer's keys and values come from the same numbers: ours are rounded as ONNX Runtime's kernel does it,
    # but for ties and the last bit of a rotation.
    for ours, its in zip(cache[:2], of_the_kernel[:2], strict=True):
        assert np.abs(ours - its).max() <= 1
        assert (ours != its).mean() < 0.01
        assert len(np.unique(ours)) > 50, "a scale that leaves few steps would prove nothing"
    assert all((ours != 0).any(axis=-1).all() for ours in cache)


def test_chunks_of_a_prompt_see_those_before_rounded(written: Artifact) -> None:
    whole, cache = prefilled(written)
    for chunk_size in (1, 4, 7):
        chunked, other = prefilled(written, chunk_size=chunk_size)
        assert 0 < np.abs(chunked - whole).max() < 0.1 * np.abs(whole).max()
        for ours, its in zip(other[:2], cache[:2], strict=True):
            assert np.abs(ours - its).max() <= 1


def test_values_beyond_the_scales_are_clipped(tmp_path: Path) -> None:
    artifact = with_int8_cache(write(tmp_path, group_size=32), k_scale=1e-3, v_scale=1e-3)
    for as_decoded in (False, True):
        _, cache = prefilled(artifact, as_decoded=as_decoded)
        assert [values.min() for values in cache] == [-128] * 4
        assert [values.max() for values in cache] == [127] * 4


def test_the_embeddings_are_beside_it_in_float16(written: Artifact) -> None:
    table = np.load(written.path / "embed_tokens.npy", allow_pickle=False)
    stored = random_llama(tiny_llama_config(VOCAB_SIZE, **WIDE))["model.embed_tokens.weight"]
    assert table.dtype == np.float16
    np.testing.assert_array_equal(table, stored.numpy())


# ---- what is refused


def test_a_decoder_that_is_not_gptq(tmp_path: Path) -> None:
    config = tiny_llama_config(VOCAB_SIZE, **WIDE)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text(json.dumps(config))
    shape = Artifact(path=tmp_path, manifest=tiny_manifest(), id="0" * 16).decoder_config()
    with pytest.raises(ArtifactError, match="got a decoder in fp16 · expected gptq-int4 or gptq-int8"):
        write_decoder_onnx(tmp_path, [], shape, dtype="float32")
    assert not list(tmp_path.glob("*.onnx*"))


def test_a_tensor_that_is_missing_or_damaged_or_does_not_fit(written: Artifact, tmp_path: Path) -> None:
    tensors, file = load_file(written.path / "decoder" / "model.safetensors"), tmp_path / "damaged.safetensors"
    name, large = "model.layers.1.mlp.up_proj", {"model.norm.weight": torch.full((128,), 1e5)}
    changes: list[tuple[dict[str, Any], Any, str | None]] = [
        ({f"{name}.qzeros": tensors[f"{name}.qzeros"] + 1}, "float32", rf"{name}: got other qzeros"),
        ({f"{name}.scales": None}, "float32", rf"got no tensor {name}\.scales"),
        ({"model.norm.weight": None}, "float32", r"got no tensor model\.norm\.weight"),
        (large, "float16", r"got norm up to 1e\+05 · expected values that fit float16"),
        (large, "float32", None),
    ]
    for change, dtype, message in changes:
        save_file({key: value for key, value in (tensors | change).items() if value is not None}, file)
        with pytest.raises(ArtifactError, match=message) if message else contextlib.nullcontext():
            write_decoder_onnx(tmp_path, [file], written.decoder_config(), dtype=dtype)


def test_an_input_width_that_has_no_blocks(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="got a linear of 168 inputs · expected a multiple of 16"):
        write(tmp_path, group_size=-1, llama={"intermediate_size": 168})


# ---- memory

_WRITE = """
import sys
from pathlib import Path
from lite.config import DecoderConfig
from lite.artifact.open import read_json_object
import export.write.decoder_onnx as written
folder = Path(sys.argv[1])
config = DecoderConfig.from_hf(read_json_object(folder / "config.json"), where="config.json")
files = sorted(folder.glob("*.safetensors"))
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
written.write_decoder_onnx(Path(sys.argv[2]), files, config, dtype="float32")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_writing_takes_the_memory_of_a_linear_and_not_of_the_decoder(tmp_path: Path) -> None:
    """Of 12 layers of 7 MB each: one linear and its copies, whatever the depth."""
    layers, hidden, inner = 12, 512, 8192
    shape = {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 128, "num_key_value_heads": 4}
    config, layer = gptq_llama(tiny_llama_config(VOCAB_SIZE, **shape, num_hidden_layers=1), group_size=128)
    config["num_hidden_layers"] = layers
    shards = tmp_path / "decoder"
    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(config))
    for index in range(layers):
        renamed = {name.replace("layers.0", f"layers.{index}"): t for name, t in layer.items() if "layers.0" in name}
        save_file(renamed, shards / f"model-{index}.safetensors")
    save_file({name: t for name, t in layer.items() if "layers.0" not in name}, shards / "model-head.safetensors")
    total = sum(file.stat().st_size for file in shards.glob("*.safetensors"))
    largest = 2 * inner * hidden // 2  # gate and up, side by side
    taken = int(run_python("-c", _WRITE, shards, tmp_path))
    assert total > 80e6
    # As read, transposed, and joined; and what Python and torch take on their way.
    assert taken < 4 * largest + 25e6 < 0.6 * total
