"""`vision.onnx`, the tower up to the selected block, and `projector.onnx` behind it.

    pixel_values [B,3,S,S] ─Conv 14×14─ Reshape, Transpose ─Pad one row for CLS─ + position ─▶ x
    x ─┬─LayerNorm─ qkv ─ heads ─ softmax(qkᵀ)v ─ proj ─▶ + ─┬─LayerNorm─ fc1 ─Gelu─ fc2 ─▶ +   × num_blocks
       └────────────────────────────────────────────────────┘└──────────────────────────────┘
    x ─drop CLS─▶ patch_features [B,P,D]
    softmax(qkᵀ) of CLS in the last block, mean of heads ─▶ class_attention [B,P]

    patch_features [B,T,D] ─ Linear ─Gelu─ Linear ─▶ image_features [B,T,C]

There are two so that patches can become fewer in between: see `lite.image_tokens`.

Three short cuts, all exact up to rounding: CLS and its position are one row of the table added after padding,
LayerScale is multiplied into the linear before it, and the softmax scale 1/√64 into the query weights.

With `int8` the linears of the blocks, three quarters of the tower's operations, multiply integers: weights int8 with
one scale for an output channel, activations uint8 with one scale for a token, found as the graph runs:

    x ─┬─Abs─ ReduceMax─ Div─▶ step [B,T,1] ──────────────────────┐
       └─Div─ Add zero─ Cast─▶ uint8 ─MatMulInteger─▶ int32 ─Cast─ Mul─ Mul scales─ Add bias─▶

One scale for a tensor, the usual dynamic quantisation, would let a film's features depend on its neighbours in a batch.
Attention, LayerNorm, Gelu and residuals stay float32, as do patch embedding, positions and projector, which are
stored as float16. All operators are plain ONNX. What decides the accuracy:

- *Rotation.* A tower concentrates much of its residual stream in a few channels; they set a token's scale and leave the
  others a few steps. `rotate_residual` turns the stream so that they spread over all channels: exact, and free.
- *Saturation.* x86 without VNNI adds two neighbouring uint8 × int8 products in 16 bits, and what does not fit is
  clipped without a word (relative error 0.08 instead of 0.01 on the demo tower). `quantise_linear` chooses scales with
  which no pair can pass 16 bits. The other ways out cost more: weights of 7 bits lose a tenth to a third more, and
  uint8 weights, which are widened first, take a quarter more time.
- *Gelu.* Its output begins at -0.17, so that a symmetric scale would waste half of the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.source.forward import LAYER_NORM_EPS
from export.source.tower import VIT_HEAD_DIM
from export.write.onnx_graph import Graph
from lite.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from export.source.tower import TowerConfig
    from lite.config import VisionFormat

    Array = np.ndarray[Any, np.dtype[Any]]

GELU_MIN: Final = -0.17
"""A bound from below of Gelu, which has its minimum of -0.16997 at -0.75."""

_INTEGER: Final = ("blocks.", "encoder.")
"""How the names of linears begin that int8 is for: those of the blocks, of a film's tower and a text's."""
_SYMMETRIC_ZERO: Final = 128
# With 32 steps below zero Gelu's whole negative side fits once the largest value passes 1.2; it loses 1 step in 8.
_GELU_ZERO: Final = 32
# A row of zeros would be 0/0, and Cast of NaN is anything. Far below any activation, and no subnormal number.
_MIN_STEP: Final = 1e-20


def build_vision_onnx(
    tensors: Mapping[str, Tensor], tower: TowerConfig, *, vision_format: VisionFormat, model_name: str = "vision"
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Build the graphs of tower and projector.

    Args:
        tensors: As `Checkpoint.read_tower` returns them.
        tower: The tower's shape.
        vision_format: What weights and arithmetic are in; input and output are float32 either way.
        model_name: Name of the graph.

    Raises:
        CheckpointError: A weight does not fit into float16.
    """
    if vision_format == "int8":
        tensors = rotate_residual(tensors, tower)
    graph, _ = tower_graph(tensors, tower, vision_format)
    patches: list[str | int | None] = ["batch", tower.num_patches]
    model = graph.model(
        model_name,
        [float_value("pixel_values", ["batch", 3, tower.image_size, tower.image_size])],
        [float_value("patch_features", [*patches, tower.dim]), float_value("class_attention", patches)],
    )
    return model, _build_projector(tensors, tower, vision_format, f"{model_name}-projector")


def tower_graph(
    tensors: Mapping[str, Tensor], tower: TowerConfig, vision_format: VisionFormat
) -> tuple[TowerGraph, str]:
    """Build the nodes of the tower; return them, and the name of the last hidden states [B, 1 + P, D]."""
    graph = TowerGraph(tensors, vision_format)
    dim, tokens = tower.dim, 1 + tower.num_patches
    x = graph.add("Cast", "pixel_values", to=TensorProto.FLOAT16) if vision_format == "fp16" else "pixel_values"
    x = graph.add(
        "Conv",
        x,
        graph.matrix("patch_embed.proj.weight", graph.source("patch_embed.proj.weight")),
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
    x = graph.add("Add", x, graph.matrix("cls_and_position", position), name="embedding")
    attention = ""
    for block in range(tower.num_blocks):
        x, attention = vit_block(graph, x, f"blocks.{block}", dim=dim, tokens=tokens)
    ends = graph.shape("one", [1]), graph.shape("all", [tokens])
    graph.give("patch_features", graph.add("Slice", x, *ends, graph.shape("token_axis", [1]), name="drop_cls"))
    first = graph.shape("none", [0]), graph.shape("one", [1])
    seen = graph.add("Slice", attention, *first, graph.shape("queries", [2]))
    seen = graph.add("Slice", seen, *ends, graph.shape("keys", [3]))
    graph.give("class_attention", graph.add("ReduceMean", seen, graph.shape("heads_and_query", [1, 2]), keepdims=0))
    return graph, x


def _build_projector(
    tensors: Mapping[str, Tensor], tower: TowerConfig, vision_format: VisionFormat, model_name: str
) -> onnx.ModelProto:
    graph = TowerGraph(tensors, vision_format)
    x = "patch_features"
    x = graph.add("Cast", x, to=TensorProto.FLOAT16) if vision_format == "fp16" else x
    x = graph.linear(graph.add("Gelu", graph.linear(x, "projector.0")), "projector.2")
    graph.give("image_features", x)
    hidden_size = tensors["projector.2.weight"].shape[0]
    return graph.model(
        model_name,
        [float_value("patch_features", ["batch", "tokens", tower.dim])],
        [float_value("image_features", ["batch", "tokens", hidden_size])],
    )


def float_value(name: str, shape: list[str | int | None]) -> onnx.ValueInfoProto:
    """Name a float32 input or output."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write_vision_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Check the model with ONNX's own checker and write it to one file.

    Raises:
        CheckpointError: The weights pass the 2 GB that one protobuf file can hold, or the graph is not valid.
    """
    if model.ByteSize() >= 2**31:
        msg = f"got a vision tower of {model.ByteSize() / 2**30:.1f} GiB · expected less than 2 GiB,"
        raise CheckpointError(f"{msg} the limit of one ONNX file · export it with --vision fp16")
    checked(model)
    path.write_bytes(model.SerializeToString())


def checked(model: onnx.ModelProto | bytes) -> None:
    """Check a model with ONNX's own checker.

    Raises:
        CheckpointError: The graph is not valid.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        msg = f"tower: got a graph that ONNX's checker refuses ({reason}) · expected a valid one · report this"
        raise CheckpointError(msg) from error


def rotate_residual(tensors: Mapping[str, Tensor], tower: TowerConfig) -> dict[str, Tensor]:
    """Turn the residual stream by an orthogonal matrix Q without changing what tower and projector compute.

    What writes to the stream (embedding, proj, fc2) is multiplied by Q, what reads it (qkv, fc1, the projector) by Qᵀ.
    LayerNorm's weight and bias and LayerScale move into the linears beside them. What is left of LayerNorm, subtracting
    the mean and dividing by the standard deviation, commutes with Q because Q leaves the vector of ones where it is.

    A channel that is larger than the others becomes a ±1/√dim part of every channel. Q is C·diag(±1)·Cᵀ with C the
    orthonormal cosine transform, whose first column is constant, and fixed random signs, the first a plus: orthogonal
    by construction, the same on every machine, and with no row along an axis.

    The tensors keep their names, and become float64.

    Source:
        QuaRot (arXiv 2404.00456) rotates the stream of a model with RMSNorm; SliceGPT (arXiv 2401.15024) moves
        LayerNorm's affine part into the linears.
    """
    rotated = {name: tensor.detach().cpu().double() for name, tensor in tensors.items()}
    q = torch.from_numpy(_rotation(tower.dim))

    def scale_and_turn_output(name: str, scale: Tensor) -> None:
        rotated[f"{name}.weight"] = q.T @ (scale[:, None] * rotated[f"{name}.weight"])
        rotated[f"{name}.bias"] = (scale * rotated[f"{name}.bias"]) @ q

    rotated["patch_embed.proj.weight"] = torch.einsum("oihw,op->pihw", rotated["patch_embed.proj.weight"], q)
    for name in ("patch_embed.proj.bias", "pos_embed", "cls_token"):
        rotated[name] = rotated[name] @ q
    for block in range(tower.num_blocks):
        prefix = f"blocks.{block}."
        for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            weight, gain, shift = (
                rotated[prefix + name] for name in (f"{linear}.weight", f"{norm}.weight", f"{norm}.bias")
            )
            rotated[f"{prefix}{linear}.bias"] = rotated[f"{prefix}{linear}.bias"] + weight @ shift
            rotated[f"{prefix}{linear}.weight"] = (weight * gain) @ q
            rotated[f"{prefix}{norm}.weight"] = torch.ones_like(gain)
            rotated[f"{prefix}{norm}.bias"] = torch.zeros_like(shift)
        for layer_scale, linear in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = rotated[f"{prefix}{layer_scale}.gamma"]
            scale_and_turn_output(prefix + linear, gamma)
            rotated[f"{prefix}{layer_scale}.gamma"] = torch.ones_like(gamma)
    rotated["projector.0.weight"] = rotated["projector.0.weight"] @ q
    return rotated


def quantise_linear(weight: Array) -> tuple[Array, Array]:
    """Round a weight [N, K] to q int8 [N, K] and scales float32 [N] for uint8 × int8 products: weight ≈ q · scales.

    The scale is the finest with which a channel's largest weight is within ±127, and the largest sum of two neighbours
    (inputs 2j and 2j+1) of one sign too: 255 · 128 is below 2¹⁵, so that `vpmaddubsw`, which adds the products of two
    neighbours in 16 bits and clips, has nothing to clip whatever the activations are. Rounding adds at most 1 to a sum.
    """
    num_outputs, num_inputs = weight.shape
    pairs = np.pad(weight, ((0, 0), (0, num_inputs % 2))).reshape(num_outputs, -1, 2)
    of_one_sign = pairs[..., 0] * pairs[..., 1] > 0
    reach = np.where(of_one_sign, np.abs(pairs.sum(-1)), np.abs(pairs).max(-1)).max(-1)
    # A channel without weights has no scale: any other than zero will do.
    scales = (np.where(reach > 0, reach, 1.0) / 127).astype(np.float32)
    return np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8), scales


def _rotation(dim: int) -> Array:
    """Return Q, float64 [dim, dim]: orthogonal, with Q·1 = 1."""
    frequency, position = np.arange(dim)[:, None], np.arange(dim)[None]
    cosines = np.cos(np.pi * (position + 0.5) * frequency / dim) * np.sqrt(2 / dim)
    cosines[0] = dim**-0.5
    signs = np.random.default_rng(0).choice([-1.0, 1.0], dim)
    signs[0] = 1
    rotation: Array = cosines.T @ (signs[:, None] * cosines)
    return rotation


def vit_block(graph: TowerGraph, x: str, prefix: str, *, dim: int, tokens: int) -> tuple[str, str]:
    """Add one pre-norm block, attention, then MLP; return its output, and how much each token looks at each."""
    scale = np.ones(3 * dim)
    scale[:dim] = VIT_HEAD_DIM**-0.5
    heads = graph.shape("heads_shape", [0, tokens, 3, dim // VIT_HEAD_DIM, VIT_HEAD_DIM])
    normed = graph.layer_norm(x, f"{prefix}.norm1")
    merged, attention = attend(graph, normed, prefix, heads, dim=dim, tokens=tokens, row_scale=scale)
    proj = graph.linear(merged, f"{prefix}.attn.proj", row_scale=graph.source(f"{prefix}.ls1.gamma"))
    x = graph.add("Add", x, proj, name=f"{prefix}.attn.residual")
    hidden = graph.add("Gelu", graph.linear(graph.layer_norm(x, f"{prefix}.norm2"), f"{prefix}.mlp.fc1"))
    out = graph.linear(hidden, f"{prefix}.mlp.fc2", row_scale=graph.source(f"{prefix}.ls2.gamma"), after_gelu=True)
    return graph.add("Add", x, out, name=f"{prefix}.mlp.residual"), attention


def attend(
    graph: TowerGraph, x: str, prefix: str, heads: str, *, dim: int, tokens: int, row_scale: Array, hidden: str = ""
) -> tuple[str, str]:
    """Add the attention of all tokens to all.

    Args:
        graph: To add to.
        x: What is looked at, [B, T, D].
        prefix: What has `attn.qkv`.
        heads: The shape [B, T, 3, heads, head_dim].
        dim: D.
        tokens: T; 0: as many as x has.
        row_scale: Of the output channels of `attn.qkv`.
        hidden: Bool [B, 1, 1, T], the tokens that nobody looks at; empty: there are none.

    Returns:
        What was seen, [B, T, D], and how much each token looks at each, [B, heads, T, T].
    """
    qkv = graph.add("Reshape", graph.linear(x, f"{prefix}.attn.qkv", row_scale=row_scale), heads)
    parts = [f"{prefix}.{name}" for name in ("q", "k", "v")]
    split = graph.split(graph.add("Transpose", qkv, perm=[2, 0, 3, 1, 4]), parts, axis=0)
    q, k, v = (graph.add("Squeeze", part, graph.shape("part_axis", [0])) for part in split)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]), name=f"{prefix}.attn.scores")
    if hidden:
        scores = graph.add("Where", hidden, graph.once("hidden_score", np.array(-np.inf, graph.dtype)), scores)
    attention = graph.add("Softmax", scores, axis=-1)
    attended = graph.add("MatMul", attention, v, name=f"{prefix}.attn.attend")
    merged = graph.add("Transpose", attended, perm=[0, 2, 1, 3])
    return graph.add("Reshape", merged, graph.shape("merged_shape", [0, tokens, dim])), attention


class TowerGraph(Graph):
    """The tower's, with the linears and constants of a format."""

    def __init__(self, tensors: Mapping[str, Tensor], vision_format: VisionFormat) -> None:
        super().__init__()
        self.tensors = tensors
        self.vision_format = vision_format
        self.dtype = np.dtype(np.float16 if vision_format == "fp16" else np.float32)
        self.named: set[str] = set()

    def give(self, output: str, x: str) -> None:
        """Make a value an output of the graph, in float32."""
        if self.vision_format == "fp16":
            self.add("Cast", x, outputs=[output], to=TensorProto.FLOAT)
        else:
            self.add("Identity", x, outputs=[output])

    def linear(self, x: str, name: str, *, row_scale: Array | None = None, after_gelu: bool = False) -> str:
        """Add x Wᵀ + b, with output channels multiplied by row_scale; after_gelu says that x is at least GELU_MIN."""
        weight, bias = self.source(f"{name}.weight"), None
        if f"{name}.bias" in self.tensors:
            bias = self.source(f"{name}.bias") if row_scale is None else self.source(f"{name}.bias") * row_scale
        if row_scale is not None:
            weight = weight * row_scale[:, None]
        if self.vision_format == "int8" and name.startswith(_INTEGER):
            product = self.integer_product(x, name, weight, after_gelu=after_gelu)
        else:
            product = self.add("MatMul", x, self.matrix(f"{name}.weight", weight.T), name=name)
        return product if bias is None else self.add("Add", product, self.constant(f"{name}.bias", bias))

    def integer_product(self, x: str, name: str, weight: Array, *, after_gelu: bool) -> str:
        """Add x Wᵀ in uint8 × int8: u = round(x / step) + zero, y = (u - zero) · q · step · scales."""
        q, scales = quantise_linear(weight)
        last = self.shape("last_axis", [-1])
        if after_gelu:
            zero, min_step, largest = _GELU_ZERO, -GELU_MIN / _GELU_ZERO, self.add("ReduceMax", x, last)
        else:
            zero, min_step, largest = _SYMMETRIC_ZERO, _MIN_STEP, self.add("ReduceMax", self.add("Abs", x), last)
        steps = self.constant(f"steps_above_{zero}", np.array(255 - zero))
        step = self.add("Max", self.add("Div", largest, steps), self.constant(f"min_step_{zero}", np.array(min_step)))
        # Cast truncates: of a number that is at least zero, and half more, that is rounding.
        shifted = self.add("Add", self.add("Div", x, step), self.constant(f"half_above_{zero}", np.array(zero + 0.5)))
        u = self.add("Cast", shifted, to=TensorProto.UINT8)
        zero_point = self.integers(f"zero_{zero}", np.array(zero, np.uint8))
        product = self.add("MatMulInteger", u, self.integers(f"{name}.weight", q.T), zero_point, name=name)
        # One Mul after the other: ONNX Runtime (1.32) fuses a Mul by the product of both into an operator of its own,
        # which leaves out the bias where there is a step for every token.
        product = self.add("Mul", self.add("Cast", product, to=TensorProto.FLOAT), step)
        return self.add("Mul", product, self.constant(f"{name}.scales", scales))

    def layer_norm(self, x: str, name: str, eps: float = LAYER_NORM_EPS) -> str:
        """Add the LayerNorm of a name."""
        affine = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, *affine, axis=-1, epsilon=eps, name=name)

    def source(self, name: str) -> Array:
        """Return a source tensor in float64: what is computed with it is rounded once."""
        values: Array = self.tensors[name].double().numpy().copy()
        return values

    def weight(self, name: str) -> str:
        """Add a source tensor as a constant."""
        return self.constant(name, self.source(name))

    def matrix(self, name: str, values: Array) -> str:
        """Add a large constant; beside int8 weights it is stored as float16 and widened once, when it is loaded."""
        if self.vision_format != "int8":
            return self.constant(name, values)
        return self.add("Cast", self.constant(name, values, np.dtype(np.float16)), to=TensorProto.FLOAT)

    def integers(self, name: str, values: Array) -> str:
        """Add a constant of whole numbers."""
        return self.once(name, np.ascontiguousarray(values))

    def once(self, name: str, values: Array) -> str:
        """Add a constant as it is, unless it is there: shapes and zero points are those of all blocks."""
        if name not in self.named:
            self.named.add(name)
            self.constants.append(numpy_helper.from_array(values, name))
        return name

    def constant(self, name: str, values: Array, dtype: np.dtype[Any] | None = None) -> str:
        """Add a constant in the format's dtype, or another."""
        dtype = dtype or self.dtype
        with np.errstate(over="ignore"):  # it is reported below, with the tensor's name
            rounded = values.astype(dtype, order="C")
        if not np.isfinite(rounded).all():
            msg = f"vision tower: got {name} up to {np.abs(values).max():.3g} · expected values that fit {dtype}"
            raise CheckpointError(f"{msg} · export it with --vision fp32")
        return self.once(name, rounded)

    def shape(self, name: str, values: list[int]) -> str:
        """Add a shape, or places along an axis."""
        return self.integers(name, np.array(values, np.int64))
