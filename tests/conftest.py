"""Fixtures: a tiny random artifact for most tests, and the demo model's own artifact."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import sentencepiece
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from export.gptq import Grid, round_to_nearest
from kernels.gptq import to_tensors
from lite.artifact.manifest import DecoderPart, Manifest, TowerShape, VisionPart
from lite.artifact.open import Artifact
from lite.artifact.write import staged_artifact
from lite.config import DecodingDefaults, Preprocessing
from lite.loading import load
from lite.model import FindingsModel

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "benchmarks" / "phantom" / "checkpoint"

IMAGE_SIZE = 28
NUM_IMAGE_TOKENS = 4
HIDDEN_SIZE = 64
CONTEXT = 640  # the template alone takes a few hundred of the tiny tokenizer's short pieces
SENTENCES = """The heart size is normal. The lungs are clear. No pleural effusion or pneumothorax is seen.
A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:
Provide a description of the findings in the radiology image given the following indication: cough
There is a small left pleural effusion. Mild cardiomegaly. Right lower lobe consolidation, 3.4 cm."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run what is marked `full` or `gpu`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `full` or `gpu`, unless --full asks for it."""
    if config.getoption("full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full") or item.get_closest_marker("gpu")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    """A SentencePiece model with Llama's settings: BPE, byte fallback, no normalisation, spaces kept."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES.splitlines()),
        model_writer=written,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


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


def tiny_vision_onnx(*, seed: int = 0) -> bytes:
    """A graph of the right signature: one convolution makes the patches, that is all."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((HIDDEN_SIZE, 3, 14, 14), dtype=np.float32) * 0.1
    nodes = [
        helper.make_node("Conv", ["pixel_values", "weight"], ["patches"], strides=[14, 14]),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["image_features"], perm=[0, 2, 1]),
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["B", 3, IMAGE_SIZE, IMAGE_SIZE])
    features = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["B", NUM_IMAGE_TOKENS, HIDDEN_SIZE])
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([0, HIDDEN_SIZE, NUM_IMAGE_TOKENS]), "shape"),
    ]
    graph = helper.make_graph(nodes, "tiny", [pixels], [features], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))


# Of a tower that is not there: the tiny vision.onnx is a convolution.
TINY_TOWER = TowerShape(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)


def tiny_manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "model": "tiny",
        "created_by": "tests",
        "sources": {},
        "vision": VisionPart(
            format="fp32",
            image_size=IMAGE_SIZE,
            num_image_tokens=NUM_IMAGE_TOKENS,
            hidden_size=HIDDEN_SIZE,
            tower=TINY_TOWER,
        ),
        "decoder": DecoderPart(format="fp16"),
        "preprocessing": Preprocessing(image_size=IMAGE_SIZE),
        "decoding": DecodingDefaults(max_new_tokens=24),
        "notice": "For tests. Not for clinical use.",
    }
    return Manifest(**(values | changes))


def write_tiny_artifact(
    out: Path, tokenizer_model: bytes, *, llama_changes: dict[str, Any] | None = None, **manifest_changes: Any
) -> Artifact:
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size()
    config = tiny_llama_config(vocab_size) | (llama_changes or {})
    with staged_artifact(out) as staged:
        (staged.path / "decoder").mkdir()
        (staged.path / "decoder" / "config.json").write_text(json.dumps(config))
        save_file(random_llama(config), staged.path / "decoder" / "model.safetensors")
        (staged.path / "tokenizer.model").write_bytes(tokenizer_model)
        (staged.path / "vision.onnx").write_bytes(tiny_vision_onnx())
        return staged.finish(tiny_manifest(**manifest_changes))


def gptq_llama(
    config: dict[str, Any], *, bits: int = 4, group_size: int = 32, lm_head_bits: int | None = None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A random Llama rounded to nearest into GPTQ's form: config.json and tensors. A head of None bits has 16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in random_llama(config).items():
        head = name == "lm_head.weight"
        if "_proj." not in name and not (head and lm_head_bits):
            tensors[name] = weight
            continue
        width = lm_head_bits if head and lm_head_bits else bits
        grid = Grid(bits=width, group_size=weight.shape[1] if group_size == -1 else group_size)
        rounded = round_to_nearest(weight.float(), grid)
        for part, tensor in to_tensors(rounded.values, rounded.scales, bits=width).items():
            tensors[f"{name.removesuffix('.weight')}.{part}"] = tensor
    quantization: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group_size}
    quantization |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq", "lm_head": lm_head_bits is not None}
    if lm_head_bits is not None:
        quantization["dynamic"] = {"lm_head": {"bits": lm_head_bits, "group_size": group_size}}
    return config | {"quantization_config": quantization}, tensors


def write_tiny_gptq_artifact(out: Path, tokenizer_model: bytes, **llama_changes: Any) -> Artifact:
    """The tiny artifact, its decoder rounded to 4 bits."""
    vocab_size = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model).get_piece_size()
    config, tensors = gptq_llama(tiny_llama_config(vocab_size) | llama_changes)
    with staged_artifact(out) as staged:
        (staged.path / "decoder").mkdir()
        (staged.path / "decoder" / "config.json").write_text(json.dumps(config))
        save_file(tensors, staged.path / "decoder" / "model.safetensors")
        (staged.path / "tokenizer.model").write_bytes(tokenizer_model)
        (staged.path / "vision.onnx").write_bytes(tiny_vision_onnx())
        return staged.finish(tiny_manifest(decoder=DecoderPart(format="gptq-int4", group_size=32, method="rtn")))


@pytest.fixture(scope="session")
def tiny_gptq_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """A complete artifact with random weights in 4 bits. Read only."""
    return write_tiny_gptq_artifact(tmp_path_factory.mktemp("tiny-gptq") / "artifact", tokenizer_model)


@pytest.fixture(scope="session")
def tiny_onnx_artifact(tmp_path_factory: pytest.TempPathFactory, tiny_gptq_artifact: Artifact) -> Artifact:
    """The same with decoder.onnx. Read only: take `own_onnx_artifact` to damage one."""
    from export import OnnxSettings, add_onnx

    settings = OnnxSettings(verify_studies=2, verify_tokens=16, device="cpu")
    return add_onnx(tiny_gptq_artifact.path, settings, out=tmp_path_factory.mktemp("tiny-onnx") / "artifact")


@pytest.fixture
def own_onnx_artifact(tmp_path: Path, tiny_onnx_artifact: Artifact) -> Path:
    """A copy of it that the test may damage."""
    return Path(shutil.copytree(tiny_onnx_artifact.path, tmp_path / "own-onnx"))


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: bytes) -> Artifact:
    """A complete artifact with random weights. Read only: take `own_artifact` to damage one."""
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact", tokenizer_model)


@pytest.fixture
def own_artifact(tmp_path: Path, tiny_artifact: Artifact) -> Path:
    """A copy of the tiny artifact that the test may damage."""
    return Path(shutil.copytree(tiny_artifact.path, tmp_path / "own"))


@pytest.fixture(scope="session")
def tiny_model(tiny_artifact: Artifact) -> FindingsModel:
    return load(tiny_artifact.path, device="cpu")


@pytest.fixture(scope="session")
def demo_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The demo model's artifact, exported once from the checkpoint in the repository."""
    from export import export_artifact

    out = tmp_path_factory.mktemp("demo") / "artifact"
    return export_artifact(CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base", out)


@pytest.fixture(scope="session")
def demo_model(demo_artifact: Artifact) -> FindingsModel:
    return load(demo_artifact.path, device="cpu")


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The list of the films that the demo calibrates on."""
    from benchmarks.demo import CALIBRATION_SEED, NUM_CALIBRATION_FILMS
    from benchmarks.phantom.write import write_studies

    out = tmp_path_factory.mktemp("calibration") / "studies"
    return write_studies(out, count=NUM_CALIBRATION_FILMS, seed=CALIBRATION_SEED, dicom=False)


def export_demo_gptq(out: Path, decoder_format: Any, calibration: Path, **gptq: Any) -> Artifact:
    """Export the demo model in GPTQ with the demo's weights of tokens, which a search would take long to find."""
    from export import ExportSettings, GptqSettings, TokenWeights, export_artifact

    weights = TokenWeights(image=0.3, prompt=0.1)
    settings = GptqSettings(calibration_data=calibration, token_weights=weights, **gptq)
    checkpoint = CHECKPOINT / "llava-rad-phantom", CHECKPOINT / "base"
    return export_artifact(*checkpoint, out, ExportSettings(decoder_format=decoder_format, gptq=settings))


@pytest.fixture(scope="session")
def demo_int4_artifact(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Artifact:
    """The demo model in 4 bits, as the demo exports it."""
    return export_demo_gptq(tmp_path_factory.mktemp("int4") / "artifact", "gptq-int4", calibration)


@pytest.fixture(scope="session")
def demo_onnx_artifact(
    tmp_path_factory: pytest.TempPathFactory, calibration: Path, demo_int4_artifact: Artifact
) -> Artifact:
    """The same with decoder.onnx; its own copy."""
    from export import OnnxSettings, add_onnx

    settings = OnnxSettings(calibration_data=calibration, verify_data=calibration, verify_studies=8)
    return add_onnx(demo_int4_artifact.path, settings, out=tmp_path_factory.mktemp("onnx") / "artifact")


def film(seed: int, *, height: int = 40, width: int = 36) -> Image.Image:
    """A picture of noise: to a random model as good as any."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five PNG files."""
    folder = tmp_path_factory.mktemp("films")
    paths = [folder / f"film{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        film(seed).save(path)
    return paths
