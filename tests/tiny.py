"""A tiny model with random weights: its parts, its artifact, and films and features to feed it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import sentencepiece
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from random_weights import of_either_sign
from safetensors.torch import save_file

from export.quantize.gptq import Grid, round_to_nearest
from kernels.gptq import to_tensors
from lite.artifact.manifest import Manifest
from lite.artifact.open import Artifact, sha256_of
from lite.artifact.parts import (
    DecoderConfigPart,
    DecoderFidelity,
    DecoderPart,
    Divergence,
    Int8CacheGraph,
    OnnxFloat,
    OnnxPart,
    Parts,
    TokenizerPart,
    TowerShape,
    VisionPart,
    unhashed,
)
from lite.artifact.write import staged_artifact
from lite.config import IMAGE_TOKEN_ID, DecodingDefaults, Preprocessing
from lite.vision import FEATURES, PATCHES

IMAGE_SIZE = 28
NUM_IMAGE_TOKENS = 4
HIDDEN_SIZE = 64
CONTEXT = 640  # the template alone takes a few hundred of the tiny tokenizer's short pieces
VOCAB_SIZE = 300
PROMPTS = [
    [1, 20, 30, IMAGE_TOKEN_ID, 40, 50, 60],
    [1, IMAGE_TOKEN_ID, 41],
    [1, 9, 8, 7, 6, 5, IMAGE_TOKEN_ID, 12, 13, 14, 15, 16, 17, 18, 19],
]
# Of a tower that is not there: the tiny vision.onnx is a convolution.
TINY_TOWER = TowerShape(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)

TINY_FILES = ("tokenizer.model", "vision.onnx", "projector.onnx", "decoder/config.json", "decoder/model.safetensors")


def tiny_llama_config(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A Llama with grouped-query attention, as transformers writes its config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    } | changes


def random_llama(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, large enough that what the model writes depends on what it reads."""
    generator = torch.Generator().manual_seed(seed)
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size = config["num_attention_heads"] * config["head_dim"]
    kv_size = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q_size, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_size, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_size, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    weights = {
        name: torch.randn(shape, generator=generator) * (1.0 if "embed" in name else 2.0 / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }
    for i in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
    weights["model.norm.weight"] = 1 + 0.2 * torch.randn(hidden, generator=generator)
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    return {name: weight.half() for name, weight in weights.items()}


def gptq_llama(
    config: dict[str, Any], *, bits: int = 4, group_size: int = 32, lm_head_bits: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A random Llama rounded to nearest into GPTQ's form, with scales of either sign: config.json and tensors.

    A head of None bits has 16.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in random_llama(config).items():
        head = name == "lm_head.weight"
        if "_proj." not in name and not (head and lm_head_bits):
            tensors[name] = weight
            continue
        width = lm_head_bits if head and lm_head_bits else bits
        grid = Grid(bits=width, group_size=weight.shape[1] if group_size == -1 else group_size)
        rounded = round_to_nearest(weight.float(), grid)
        for part, tensor in to_tensors(*of_either_sign(rounded.values, rounded.scales, width), bits=width).items():
            tensors[f"{name.removesuffix('.weight')}.{part}"] = tensor
    quantization: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    quantization |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": lm_head_bits is not None}
    if lm_head_bits is not None:
        quantization["dynamic"] = {"lm_head": {"bits": lm_head_bits, "group_size": group_size}}
    return config | {"quantization_config": quantization}, tensors


def tiny_vision_onnx(*, seed: int = 0) -> bytes:
    """A tower of the right signature: a convolution makes the patches; their first channel is how they are seen."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((HIDDEN_SIZE, 3, 14, 14), dtype=np.float32) * 0.1
    nodes = [
        helper.make_node("Conv", ["pixel_values", "weight"], ["patches"], strides=[14, 14]),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patch_features"], perm=[0, 2, 1]),
        helper.make_node("Slice", ["flat", "zero", "one", "one"], ["first"]),
        helper.make_node("Squeeze", ["first", "one"], ["class_attention"]),
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["B", 3, IMAGE_SIZE, IMAGE_SIZE])
    patches = ["B", NUM_IMAGE_TOKENS]
    outputs = [
        helper.make_tensor_value_info("patch_features", TensorProto.FLOAT, [*patches, HIDDEN_SIZE]),
        helper.make_tensor_value_info("class_attention", TensorProto.FLOAT, patches),
    ]
    constants = [
        *(numpy_helper.from_array(np.array([number]), name) for name, number in (("zero", 0), ("one", 1))),
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([0, HIDDEN_SIZE, NUM_IMAGE_TOKENS]), "shape"),
    ]
    return _serialised(helper.make_graph(nodes, "tiny", [pixels], outputs, constants))


def tiny_projector_onnx() -> bytes:
    """A projector that changes nothing."""
    shape = ["B", "T", HIDDEN_SIZE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (PATCHES, FEATURES)]
    nodes = [helper.make_node("Identity", [PATCHES], [FEATURES])]
    return _serialised(helper.make_graph(nodes, "tiny", ends[:1], ends[1:]))


def _serialised(graph: onnx.GraphProto) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))


def tiny_parts(*, vision: VisionPart | None = None, decoder: DecoderPart | None = None, **parts: Any) -> Parts:
    """The parts of a tiny artifact, its files named and not hashed."""
    tokenizer, graph, projector, config, weights = TINY_FILES
    tower = VisionPart(
        graph=graph,
        projector=projector,
        num_patches=NUM_IMAGE_TOKENS,
        format="fp32",
        image_size=IMAGE_SIZE,
        num_image_tokens=NUM_IMAGE_TOKENS,
        hidden_size=HIDDEN_SIZE,
        tower=TINY_TOWER,
    )
    return Parts(
        tokenizer=TokenizerPart(files=unhashed(tokenizer)),
        vision=replace(vision or tower, files=unhashed(graph, projector)),
        decoder_config=DecoderConfigPart(files=unhashed(config)),
        decoder=replace(decoder or DecoderPart(format="fp16"), files=unhashed(weights), weights=(weights,)),
        **parts,
    )


def tiny_manifest(*, parts: Parts | None = None, **changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": "tiny",
        "created_by": "tests",
        "sources": {},
        "preprocessing": Preprocessing(image_size=IMAGE_SIZE),
        "decoding": DecodingDefaults(max_new_tokens=24),
        "notice": "For tests. Not for clinical use.",
        "parts": parts or tiny_parts(),
    }
    return Manifest(**(values | changes))


def tiny_onnx_part(dtype: OnnxFloat = "float32", *, int8_cache: bool = False) -> OnnxPart:
    """What `decoder.onnx` is, its files named and not hashed."""
    names = ("decoder.onnx", "decoder.onnx.data", "embed_tokens.npy")
    part = OnnxPart(
        files=unhashed(*names),
        graph=names[0],
        data=names[1],
        embeddings=names[2],
        dtype=dtype,
        accuracy_level=4,
        lm_head_bits=8,
    )
    if not int8_cache:
        return part
    graph = Int8CacheGraph(graph="decoder.int8_cache.onnx", data="none", sha256="0" * 64, studies=1, tokens=1)
    return replace(part, files=part.files | unhashed(graph.graph), int8_cache=graph)


def cache_fidelity(kl: float) -> DecoderFidelity:
    """What an export has measured, of a decoder whose int8 cache loses this much."""
    measured = Divergence(
        studies=4,
        tokens=200,
        mean_kl=kl,
        max_kl=kl,
        same_top=1.0,
        perplexity_ratio=1.0,
        first_divergent_token=None,
        studies_without_divergence=1.0,
    )
    return DecoderFidelity(data="built-in", divergence=measured, int8_cache=measured)


def write_tiny_artifact(
    out: Path, tokenizer_model: bytes, *, llama_changes: dict[str, Any] | None = None, **manifest_changes: Any
) -> Artifact:
    config = tiny_config(tokenizer_model) | (llama_changes or {})
    return _write(out, tokenizer_model, config, random_llama(config), tiny_manifest(**manifest_changes))


def write_tiny_gptq_artifact(out: Path, tokenizer_model: bytes, **llama_changes: Any) -> Artifact:
    """The tiny artifact, its decoder rounded to 4 bits."""
    decoder = DecoderPart(format="gptq-int4", group_size=32, method="rtn")
    quantized = gptq_llama(tiny_config(tokenizer_model) | llama_changes)
    return _write(out, tokenizer_model, *quantized, tiny_manifest(parts=tiny_parts(decoder=decoder)))


def tiny_config(tokenizer_model: bytes) -> dict[str, Any]:
    return tiny_llama_config(sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size())


def _write(
    out: Path, tokenizer_model: bytes, config: dict[str, Any], weights: dict[str, torch.Tensor], manifest: Manifest
) -> Artifact:
    with staged_artifact(out) as staged:
        (staged.path / "decoder").mkdir()
        (staged.path / "decoder" / "config.json").write_text(json.dumps(config))
        save_file(weights, staged.path / "decoder" / "model.safetensors")
        (staged.path / "tokenizer.model").write_bytes(tokenizer_model)
        (staged.path / "vision.onnx").write_bytes(tiny_vision_onnx())
        (staged.path / "projector.onnx").write_bytes(tiny_projector_onnx())
        return staged.finish(manifest)


def decoder_folder(out: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], *, shards: int = 1) -> Artifact:
    """Write only a decoder; wrap it as an artifact whose other files nobody opens."""
    folder = out / "decoder"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files = []
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        files.append("decoder/model.safetensors")
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(weight_map.values())):
            save_file({name: weights[name] for name in names if weight_map[name] == shard}, folder / shard)
            files.append(f"decoder/{shard}")
    parts = tiny_parts()
    decoder = replace(parts.decoder, files=unhashed(*files), weights=tuple(files))
    return Artifact(path=out, manifest=tiny_manifest(parts=replace(parts, decoder=decoder)), id="0" * 16)


def relist(folder: Path, name: str, **part_changes: Any) -> None:
    """Make the manifest agree with a changed file: only the content is wrong then."""
    file = folder / "manifest.json"
    value = json.loads(file.read_text())
    (owner,) = (part for part in value["parts"].values() if part and name in part["files"])
    owner["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    for part, changes in part_changes.items():
        value["parts"][part] |= changes
    file.write_text(json.dumps(value))


def features(rows: int, *, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 5, HIDDEN_SIZE), dtype=np.float32)


def film(seed: int, *, height: int = 40, width: int = 36) -> Image.Image:
    """A picture of noise: to a random model as good as any."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def with_cache_kl(artifact: Artifact, kl: float | None, *, onnx: float | None = None) -> Artifact:
    """Say what an int8 cache loses, with either engine, or with onnx something else."""
    decoder, decoder_onnx = artifact.manifest.parts.decoder, artifact.manifest.parts.decoder_onnx
    assert decoder_onnx is not None
    fidelity, of_onnx = (None if lost is None else cache_fidelity(lost) for lost in (kl, kl if onnx is None else onnx))
    return artifact.with_parts(
        decoder=dataclasses.replace(decoder, fidelity=fidelity),
        decoder_onnx=dataclasses.replace(decoder_onnx, fidelity=of_onnx),
    )
