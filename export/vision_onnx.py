"""`vision.onnx`: the tower up to the selected block and the projector, as one ONNX graph.

    pixel_values [B,3,S,S] ─Conv 14×14─ Reshape, Transpose ─Pad one row for CLS─ + position ─▶ x
    x ─┬─LayerNorm─ qkv ─ heads ─ softmax(qkᵀ)v ─ proj ─▶ + ─┬─LayerNorm─ fc1 ─Gelu─ fc2 ─▶ +   × num_blocks
       └────────────────────────────────────────────────────┘└──────────────────────────────┘
    x ─drop CLS─ Linear ─Gelu─ Linear ─▶ image_features [B,P,C]

The graph is written node by node instead of traced: it is the same on every torch version, holds no operator the
runtime has to optimise away, and every name in it says what it is. Three short cuts, all exact up to rounding: CLS and
its position are one row of the table added after padding, LayerScale is multiplied into the linear before it, and
the softmax scale 1/√64 into the query weights.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint import VIT_HEAD_DIM
from export.forward import LAYER_NORM_EPS
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from export.checkpoint import TowerConfig
    from export.settings import VisionFormat

    Array = np.ndarray[Any, np.dtype[Any]]

OPSET: Final = 20
"""The first opset with Gelu; ONNX Runtime reads it since 1.17."""
IR_VERSION: Final = 9
_ONNX_DTYPES: Final = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def build_vision_onnx(
    tensors: Mapping[str, Tensor], tower: TowerConfig, *, vision_format: VisionFormat, model_name: str = "vision"
) -> onnx.ModelProto:
    """Build the graph of tower and projector.

    Args:
        tensors: As `Checkpoint.read_tower` returns them.
        tower: The tower's shape.
        vision_format: What weights and arithmetic are in; input and output are float32 either way.
        model_name: Name of the graph.

    Raises:
        CheckpointError: A weight does not fit into float16.
    """
    graph = _Graph(tensors, vision_format)
    dim, tokens = tower.dim, 1 + tower.num_patches
    x = graph.add("Cast", "pixel_values", to=_ONNX_DTYPES[vision_format]) if vision_format == "fp16" else "pixel_values"
    x = graph.add(
        "Conv",
        x,
        graph.weight("patch_embed.proj.weight"),
        graph.weight("patch_embed.proj.bias"),
        kernel_shape=[tower.patch_size] * 2,
        strides=[tower.patch_size] * 2,
        name="patch_embed",
    )
    x = graph.add("Reshape", x, graph.shape("patch_shape", [0, dim, tower.num_patches]))
    x = graph.add("Transpose", x, perm=[0, 2, 1])
    x = graph.add("Pad", x, graph.shape("cls_row", [0, 1, 0, 0, 0, 0]))
    position = graph.source("pos_embed")[0]
    position[0] += graph.source("cls_token")[0, 0]
    x = graph.add("Add", x, graph.constant("cls_and_position", position), name="embedding")
    for block in range(tower.num_blocks):
        x = _block(graph, x, f"blocks.{block}", dim=dim, tokens=tokens)
    ends = graph.shape("one", [1]), graph.shape("all", [tokens]), graph.shape("token_axis", [1])
    x = graph.add("Slice", x, *ends, name="drop_cls")
    x = graph.add("Gelu", graph.linear(x, "projector.0"))
    x = graph.linear(x, "projector.2")
    if vision_format == "fp16":
        graph.add("Cast", x, output="image_features", to=TensorProto.FLOAT)
    else:
        graph.add("Identity", x, output="image_features")
    return _model(graph, tower, hidden_size=tensors["projector.2.weight"].shape[0], name=model_name)


def write_vision_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check the model with ONNX's own checker and write it to one file.

    Raises:
        CheckpointError: The weights pass the 2 GB that one protobuf file can hold, or the graph is not valid.
    """
    if model.ByteSize() >= 2**31:
        msg = (
            f"got a vision tower of {model.ByteSize() / 2**30:.1f} GiB · expected less than 2 GiB, the limit of one "
            "ONNX file · export it with --vision fp16"
        )
        raise CheckpointError(msg)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"vision tower: got a graph that ONNX's checker refuses ({reason}) · expected a valid one · report this"
        raise CheckpointError(msg) from error
    path.write_bytes(model.SerializeToString())


def _block(graph: _Graph, x: str, prefix: str, *, dim: int, tokens: int) -> str:
    """Add one pre-norm block: attention, then MLP."""
    scale = np.ones(3 * dim)
    scale[:dim] = VIT_HEAD_DIM**-0.5
    heads = graph.shape("heads_shape", [0, tokens, 3, dim // VIT_HEAD_DIM, VIT_HEAD_DIM])
    normed = graph.layer_norm(x, f"{prefix}.norm1")
    qkv = graph.add("Reshape", graph.linear(normed, f"{prefix}.attn.qkv", row_scale=scale), heads)
    parts = [f"{prefix}.{name}" for name in ("q", "k", "v")]
    split = graph.split(graph.add("Transpose", qkv, perm=[2, 0, 3, 1, 4]), parts)
    q, k, v = (graph.add("Squeeze", part, graph.shape("part_axis", [0])) for part in split)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), name=f"{prefix}.attn.scores")
    attended = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v, name=f"{prefix}.attn.attend")
    merged = graph.add("Transpose", attended, perm=[0, 2, 1, 3])
    merged = graph.add("Reshape", merged, graph.shape("merged_shape", [0, tokens, dim]))
    proj = graph.linear(merged, f"{prefix}.attn.proj", row_scale=graph.source(f"{prefix}.ls1.gamma"))
    x = graph.add("Add", x, proj, name=f"{prefix}.attn.residual")
    hidden = graph.add("Gelu", graph.linear(graph.layer_norm(x, f"{prefix}.norm2"), f"{prefix}.mlp.fc1"))
    out = graph.linear(hidden, f"{prefix}.mlp.fc2", row_scale=graph.source(f"{prefix}.ls2.gamma"))
    return graph.add("Add", x, out, name=f"{prefix}.mlp.residual")


class _Graph:
    """Nodes and constants as they are added. Every method that adds a node returns the name of its output."""

    def __init__(self, tensors: Mapping[str, Tensor], vision_format: VisionFormat) -> None:
        self.tensors = tensors
        self.dtype = np.dtype(np.float16 if vision_format == "fp16" else np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, op_type: str, *inputs: str, name: str = "", output: str = "", **attributes: Any) -> str:
        name = name or f"{op_type}_{len(self.nodes)}"
        output = output or f"{name}.out"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def split(self, x: str, outputs: list[str]) -> list[str]:
        name = f"Split_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Split", [x], outputs, name=name, axis=0, num_outputs=len(outputs)))
        return outputs

    def linear(self, x: str, name: str, *, row_scale: Array | None = None) -> str:
        """Add x Wᵀ + b, with output channels multiplied by row_scale."""
        weight, bias = self.source(f"{name}.weight"), self.source(f"{name}.bias")
        if row_scale is not None:
            weight, bias = weight * row_scale[:, None], bias * row_scale
        product = self.add("MatMul", x, self.constant(f"{name}.weight", weight.T), name=name)
        return self.add("Add", product, self.constant(f"{name}.bias", bias))

    def layer_norm(self, x: str, name: str) -> str:
        affine = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, *affine, axis=-1, epsilon=LAYER_NORM_EPS, name=name)

    def source(self, name: str) -> Array:
        """Return a source tensor in float64: what is computed with it is rounded once."""
        values: Array = self.tensors[name].double().numpy().copy()
        return values

    def weight(self, name: str) -> str:
        return self.constant(name, self.source(name))

    def constant(self, name: str, values: Array) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # an overflow is reported below, with the tensor's name
            rounded = np.ascontiguousarray(values.astype(self.dtype))
        if not np.isfinite(rounded).all():
            msg = f"vision tower: got {name} up to {np.abs(values).max():.3g} · expected values that fit {self.dtype}"
            raise CheckpointError(f"{msg} · export it with --vision fp32")
        self.constants[name] = numpy_helper.from_array(rounded, name)
        return name

    def shape(self, name: str, values: list[int]) -> str:
        self.constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name


def _model(graph: _Graph, tower: TowerConfig, *, hidden_size: int, name: str) -> onnx.ModelProto:
    size = tower.image_size
    pixel_values = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, size, size])
    shape: list[str | int | None] = ["batch", tower.num_patches, hidden_size]
    image_features = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, shape)
    proto = helper.make_graph(graph.nodes, name, [pixel_values], [image_features], list(graph.constants.values()))
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(proto, opset_imports=[opset], ir_version=IR_VERSION, producer_name="llava-rad-lite")
