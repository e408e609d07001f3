"""An artifact of ours with the peers' weights: `decoder/` in GPTQ, and by the exporter's own command `decoder.onnx`.

Its tower is a stub that makes four tokens of an image: the exporter wants one to calibrate and to measure with.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from benchmarks.speed.linears import round_to_groups
from benchmarks.speed.peers.specs import ROOT
from benchmarks.speed.tokenizer import make_tokenizer
from benchmarks.speed.weights import GROUP_SIZE
from kernels.gptq import to_tensors
from lite.artifact.manifest import Manifest
from lite.artifact.parts import DecoderConfigPart, DecoderPart, Parts, TokenizerPart, TowerShape, VisionPart, unhashed
from lite.artifact.write import staged_artifact
from lite.config import Preprocessing
from lite.errors import LiteError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benchmarks.speed.weights import Model

_PATCH_SIZE: Final = 14
_PATCHES: Final = 2  # to a side
_IMAGE_SIZE: Final = _PATCHES * _PATCH_SIZE
# Parity is measured on few tokens, as torch takes long over them, and again by the check of all engines.
_EXPORT: Final = ("--quiet", "--device", "cpu", "--verify-studies", "1", "--verify-tokens", "16")


def write_artifact(out: Path, model: Model, *, num_layers: int) -> None:
    """Write the model with its first layers, whole or not at all; memory holds a layer.

    Raises:
        LiteError: the exporter failed, or a vocabulary is too small for a tokenizer.
    """
    plain = out.with_name(f"{out.name}-without")
    with staged_artifact(plain, overwrite=True) as staged:
        (staged.path / "vision.onnx").write_bytes(_stub_tower(model.shapes.hidden_size))
        (staged.path / "tokenizer.model").write_bytes(make_tokenizer(model.shapes.vocab_size))
        weights = _write_decoder(staged.path / "decoder", model, num_layers)
        staged.finish(_manifest(model.shapes.hidden_size, weights))
    command = [sys.executable, "-m", "export", "onnx", str(plain), "--out", str(out), *_EXPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise LiteError(f"python -m export onnx: {said[-1]}")


def _write_decoder(folder: Path, model: Model, num_layers: int) -> tuple[str, ...]:
    """Write the folder of a Hugging Face Llama in GPTQ: a file for each layer, and for each tensor of no layer.

    Returns:
        The files with weights.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.shapes.config(num_layers, 4)), encoding="utf-8")
    files: dict[str, list[str]] = {}
    for name in model.tensor_shapes:
        _, _, layer = name.partition("model.layers.")
        number = layer.partition(".")[0]
        if not layer or int(number) < num_layers:
            files.setdefault(f"layer-{number}" if layer else name, []).append(name)
    weight_map: dict[str, str] = {}
    for file, names in files.items():
        tensors = {stored: tensor for name in names for stored, tensor in _stored(name, model).items()}
        save_file(tensors, folder / f"{file}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return tuple(f"decoder/{file}.safetensors" for file in files)


def _stored(name: str, model: Model) -> dict[str, Tensor]:
    drawn = torch.from_numpy(model.tensor(name))
    if "_proj" not in name:
        return {name: drawn.half()}
    parts = to_tensors(*round_to_groups(drawn), bits=4)
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}


def _manifest(hidden_size: int, weights: tuple[str, ...]) -> Manifest:
    return Manifest(
        model="random weights, for a measurement",
        created_by="benchmarks speed peers",
        sources={},
        parts=Parts(
            tokenizer=TokenizerPart(files=unhashed("tokenizer.model")),
            vision=VisionPart(
                files=unhashed("vision.onnx"),
                format="fp32",
                image_size=_IMAGE_SIZE,
                num_image_tokens=_PATCHES**2,
                hidden_size=hidden_size,
                # Of a tower that is not there.
                tower=TowerShape(hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1),
            ),
            decoder_config=DecoderConfigPart(files=unhashed("decoder/config.json")),
            decoder=DecoderPart(
                files=unhashed(*weights, "decoder/model.safetensors.index.json"),
                weights=weights,
                format="gptq-int4",
                group_size=GROUP_SIZE,
                method="rtn",
            ),
        ),
        preprocessing=Preprocessing(image_size=_IMAGE_SIZE),
    )


def _stub_tower(hidden_size: int) -> bytes:
    """Return a graph with the signature of `vision.onnx`: of each patch one pixel, times a random matrix."""
    weight = np.random.default_rng(0).standard_normal((hidden_size, 3, 1, 1), dtype=np.float32)
    side, count = _IMAGE_SIZE, _PATCHES**2
    nodes = [
        helper.make_node("Conv", ["pixel_values", "weight"], ["patches"], strides=[_PATCH_SIZE, _PATCH_SIZE]),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["image_features"], perm=[0, 2, 1]),
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["B", 3, side, side])
    features = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["B", count, hidden_size])
    constants = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(np.array([0, hidden_size, count]), "shape"),
    ]
    graph = helper.make_graph(nodes, "stub", [pixels], [features], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(onnx.ModelProto.SerializeToString(model))
