"""The graphs of retrieval: `film.onnx`, which goes on where `vision.onnx` ends, and `text.onnx`, a BERT.

    vision.onnx: x [B,1+P,D] ─ blocks that findings leave out ─ CLS ─LayerNorm─ head ─L2─▶ film_embeds [B,dim]

    input_ids [B,T] ─Gather─ + position ─LayerNorm─▶ x ─ q, k, v ─ softmax(qkᵀ)v ─ dense ─▶ + ─LayerNorm─┐  × layers
                                                     └─────────────────────────────────────┘              │
    CLS ─ Linear ─Gelu─ Linear ─L2─▶ text_embeds [B,dim]     +, LayerNorm ◀─ output ─Gelu─ intermediate ◀─┘

`film.onnx` holds only what `vision.onnx` lacks: nodes, weights, an output. The runtime puts its bytes behind those of
`vision.onnx`, which are one message then. So findings run the same file with or without retrieval, and the tower is
stored once.

What stands behind a text (id 0) has a score of -inf, and so a weight of exactly zero. The formats are those of
`export.write.vision_onnx`; of int8's word embeddings, which are float16, the rows of a text are widened, not all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from export.write.vision_onnx import TowerGraph, attend, float_value, rotate_residual, tower_graph, vit_block
from lite.retrieval.towers import FILM_EMBEDS, INPUT_IDS, TEXT_EMBEDS
from lite.retrieval.wordpiece import PAD_ID

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from export.source.retrieval import BertShape
    from export.source.tower import TowerConfig
    from lite.config import VisionFormat

_HEAD: Final = "head.proj"


def build_film_onnx(
    tensors: Mapping[str, Tensor], tower: TowerConfig, *, vision_format: VisionFormat
) -> onnx.ModelProto:
    """Build what follows `vision.onnx`.

    Args:
        tensors: As `Checkpoint.read_tower` and `RetrievalSource.read_film` return them.
        tower: The tower's shape.
        vision_format: That of `vision.onnx`.

    Returns:
        A model that is none by itself: its nodes refer to those of `vision.onnx`.

    Raises:
        CheckpointError: A weight does not fit into float16.
    """
    whole = dataclasses.replace(tower, num_blocks=tower.depth)
    if vision_format == "int8":
        tensors = _rotated(tensors, whole)
    graph, x = tower_graph(tensors, tower, vision_format)
    nodes, constants = len(graph.nodes), len(graph.constants)
    for block in range(tower.num_blocks, tower.depth):
        x, _ = vit_block(graph, x, f"blocks.{block}", dim=tower.dim, tokens=1 + tower.num_patches)
    x = graph.layer_norm(_class_of(graph, x), "norm")
    _give_embedding(graph, graph.linear(x, _HEAD), FILM_EMBEDS)
    tail = onnx.ModelProto()
    tail.graph.node.extend(graph.nodes[nodes:])
    tail.graph.initializer.extend(graph.constants[constants:])
    tail.graph.output.append(float_value(FILM_EMBEDS, ["batch", tensors[f"{_HEAD}.weight"].shape[0]]))
    return tail


def _rotated(tensors: Mapping[str, Tensor], tower: TowerConfig) -> dict[str, Tensor]:
    """Turn the stream of all blocks, and the head that reads it behind the last norm, as `rotate_residual` does."""
    # In the projector's place the identity comes out as what the stream is turned by.
    rotated = rotate_residual({**tensors, "projector.0.weight": torch.eye(tower.dim)}, tower)
    q = rotated["projector.0.weight"]
    head, gain, shift = (rotated[name] for name in (f"{_HEAD}.weight", "norm.weight", "norm.bias"))
    changed = {f"{_HEAD}.weight": (head * gain) @ q, f"{_HEAD}.bias": head @ shift}
    return rotated | changed | {"norm.weight": torch.ones_like(gain), "norm.bias": torch.zeros_like(shift)}


def build_text_onnx(
    tensors: Mapping[str, Tensor], bert: BertShape, *, text_format: VisionFormat, model_name: str = "text"
) -> onnx.ModelProto:
    """Build the text's tower.

    Args:
        tensors: As `RetrievalSource.read_text` returns them.
        bert: Its shape.
        text_format: What weights and arithmetic are in; the output is float32.
        model_name: Name of the graph.

    Raises:
        CheckpointError: A weight does not fit into float16.
    """
    dim, eps = bert.hidden_size, bert.layer_norm_eps
    named = dict(tensors)
    for layer in range(bert.num_hidden_layers):
        prefix = f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{prefix}.attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            named[f"{prefix}.attn.qkv.{kind}"] = torch.cat(parts)
    graph = TowerGraph(named, text_format)
    head_dim = dim // bert.num_attention_heads
    x = _embeddings(graph, bert)
    padding = graph.add("Equal", INPUT_IDS, graph.integers("padding_id", np.array(PAD_ID)))
    padding = graph.add("Unsqueeze", padding, graph.shape("heads_and_query", [1, 2]))
    scale = np.ones(3 * dim)
    scale[:dim] = head_dim**-0.5
    heads = graph.shape("heads_shape", [0, 0, 3, bert.num_attention_heads, head_dim])
    for layer in range(bert.num_hidden_layers):
        prefix = f"encoder.layer.{layer}"
        seen, _ = attend(graph, x, prefix, heads, dim=dim, tokens=0, row_scale=scale, hidden=padding)
        added = graph.add("Add", x, graph.linear(seen, f"{prefix}.attention.output.dense"))
        x = graph.layer_norm(added, f"{prefix}.attention.output.LayerNorm", eps)
        inner = graph.add("Gelu", graph.linear(x, f"{prefix}.intermediate.dense"))
        added = graph.add("Add", x, graph.linear(inner, f"{prefix}.output.dense", after_gelu=True))
        x = graph.layer_norm(added, f"{prefix}.output.LayerNorm", eps)
    x = graph.linear(graph.add("Gelu", graph.linear(_class_of(graph, x), "proj.0")), "proj.2")
    _give_embedding(graph, x, TEXT_EMBEDS)
    ids = helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ["batch", "tokens"])
    return graph.model(model_name, [ids], [float_value(TEXT_EMBEDS, ["batch", bert.dim])])


def _embeddings(graph: TowerGraph, bert: BertShape) -> str:
    """Add what the first layer reads. Every text is of the first token type, whose row is added to the positions."""
    stored = np.dtype(np.float32 if graph.vision_format == "fp32" else np.float16)
    words = graph.constant("word_embeddings", graph.source("embeddings.word_embeddings.weight"), stored)
    x = graph.add("Gather", words, INPUT_IDS)
    position = graph.source("embeddings.position_embeddings.weight")[: bert.max_tokens]
    position += graph.source("embeddings.token_type_embeddings.weight")[0]
    length = graph.add("Shape", INPUT_IDS, start=1, end=2)
    positions = graph.constant("position_and_type", position, stored)
    positions = graph.add("Slice", positions, graph.shape("none", [0]), length, graph.shape("none", [0]))
    if graph.vision_format == "int8":
        x, positions = (graph.add("Cast", rows, to=TensorProto.FLOAT) for rows in (x, positions))
    return graph.layer_norm(graph.add("Add", x, positions), "embeddings.LayerNorm", bert.layer_norm_eps)


def _class_of(graph: TowerGraph, x: str) -> str:
    """Add the cut from [B, T, D] to its first token, [B, 1, D]."""
    ends = graph.shape("none", [0]), graph.shape("one", [1])
    return graph.add("Slice", x, *ends, graph.shape("token_axis", [1]))


def _give_embedding(graph: TowerGraph, x: str, output: str) -> None:
    """Make x [B, 1, dim] an output [B, dim] of length 1."""
    x = graph.add("Squeeze", x, graph.shape("token_axis", [1]))
    x = graph.add("Cast", x, to=TensorProto.FLOAT) if graph.vision_format == "fp16" else x
    graph.add("LpNormalization", x, outputs=[output], axis=-1, p=2)
