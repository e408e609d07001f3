"""`decoder.int8_cache.onnx`: the graph of `decoder.onnx` once more, its keys and values in int8.

A step of a channel stands for a scale of its own, which `export.write.cache_scales` finds on studies. While tokens are
decoded, GroupQueryAttention computes with the integers: a quarter of float32's bytes, and bytes are what a token costs.
While a prompt is read, arithmetic is what costs, and there its kernel for integers takes 2.5 times as long as that for
float32. So on a CPU each layer has two ways, and `is_prefill` says which is taken:

    is_prefill ── If ─┬─ prompt   past int8 ─▶ float32 ─┐                       ┌─▶ out
                      │                   q k v ────────┴─ GroupQueryAttention ─┴─ new keys, values ─▶ int8 ─▶ present
                      └─ decode   q k v, past int8 ─────── GroupQueryAttention ───▶ out, present int8

Both write into the one buffer that past and present share. A prompt's tokens see one another as they are, unrounded;
what is decoded sees all of them rounded. In float16, for GPUs, there is the second way only: there the kernels for
integers are the fast ones, and `If` is not an operator of every provider.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.write.cache_scales import STEPS
from export.write.decoder_onnx import GRAPH_NAME
from export.write.onnx_graph import Graph
from lite.engines.onnx_engine.decoder import PREFILL_INPUT

if TYPE_CHECKING:
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

INT8_CACHE_GRAPH_NAME: Final = "decoder.int8_cache.onnx"
_SCALES_AT: Final = 12
"""The place of k_scale among the inputs of GroupQueryAttention; some before it stay empty."""


def write_int8_cache_graph(folder: Path, k_scales: Array, v_scales: Array) -> None:
    """Write the graph with an int8 cache: decoder.onnx, in the same folder, in all but attention.

    `k_scales` and `v_scales` are those of `find_cache_scales`.
    """
    model = onnx.load(folder / GRAPH_NAME, load_external_data=False)
    graph = model.graph
    (embeds,) = (value for value in graph.input if value.name == "inputs_embeds")
    two_ways = embeds.type.tensor_type.elem_type == TensorProto.FLOAT
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    nodes: list[onnx.NodeProto] = []
    if two_ways:
        graph.input.append(helper.make_tensor_value_info(PREFILL_INPUT, TensorProto.BOOL, []))
        graph.initializer.extend(_constants())
        nodes += _num_past()
    scales = zip(k_scales, v_scales, strict=True)
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            layer = _Layer(node)
            graph.initializer.extend(layer.scales(*next(scales)))
            nodes.append(layer.either() if two_ways else layer.int8)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    (folder / INT8_CACHE_GRAPH_NAME).write_bytes(model.SerializeToString())


def _constants() -> list[TensorProto]:
    values = {
        "first": np.array([0]),
        "end": np.array([np.iinfo(np.int64).max]),
        "of_tokens": np.array([2]),  # the axis of a cache
        "least": np.float32(-STEPS - 1),
        "most": np.float32(STEPS),
    }
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _num_past() -> list[onnx.NodeProto]:
    """Count the tokens in the cache, int64 [1]. The rows of a prompt's batch would have to agree; there is one row."""
    total, flat = "total_sequence_length", "num_total.scalar"
    return [
        helper.make_node("Shape", ["inputs_embeds"], ["num_new"], name="num_new", start=1, end=2),
        helper.make_node("Cast", [total], [flat], name=flat, to=TensorProto.INT64),
        helper.make_node("Unsqueeze", [flat, "first"], ["num_total"], name="num_total"),
        helper.make_node("Sub", ["num_total", "num_new"], ["num_past"], name="num_past"),
    ]


class _Layer:
    """A layer's attention: the node of decoder.onnx, and what becomes of it."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self.node = node
        self.name = node.name.removesuffix(".attention")
        self.past = {"k": node.input[3], "v": node.input[4]}

    def scales(self, k: Array, v: Array) -> list[TensorProto]:
        """Return the scales of keys and values [kv_heads, head_dim], as constants."""
        return [
            numpy_helper.from_array(values[None, :, None].astype(np.float32), self._scale(kind))
            for kind, values in (("k", k), ("v", v))
        ]

    def _scale(self, kind: str) -> str:
        return f"{self.name}.{kind}_scale"

    @property
    def int8(self) -> onnx.NodeProto:
        """The node, computing with integers."""
        node = onnx.NodeProto()
        node.CopyFrom(self.node)
        node.input.extend([*[""] * (_SCALES_AT - len(node.input)), self._scale("k"), self._scale("v")])
        for kind in ("k", "v"):
            node.attribute.append(helper.make_attribute(f"{kind}_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
        return node

    def either(self) -> onnx.NodeProto:
        """Return the node that takes one of the two ways."""
        ways = {"then_branch": self._prompt(), "else_branch": self._decode()}
        return helper.make_node("If", [PREFILL_INPUT], list(self.node.output), name=self.node.name, **ways)

    def _decode(self) -> onnx.GraphProto:
        node = self.int8
        node.name = f"{self.node.name}.decode"
        node.output[:] = [f"{node.name}.{place}" for place in ("out", "k", "v")]
        return _way(node.name, [node])

    def _prompt(self) -> onnx.GraphProto:
        """Attend in float32 over the cache and the new tokens, and round what is new."""
        name, graph = f"{self.node.name}.prompt", Graph()

        def add(op_type: str, *inputs: str, output: str, **attributes: Any) -> str:
            output = f"{name}.{output}"
            return graph.add(op_type, *inputs, name=output, outputs=[output], **attributes)

        old: dict[str, str] = {}
        past: list[str] = []
        for kind, cache in self.past.items():
            old[kind] = add("Slice", cache, "first", "num_past", "of_tokens", output=f"{kind}_old")
            values = add("Cast", old[kind], output=f"{kind}_old.float", to=TensorProto.FLOAT)
            past.append(add("Mul", values, self._scale(kind), output=f"{kind}_past"))
        attention = onnx.NodeProto()
        attention.CopyFrom(self.node)
        attention.name = f"{name}.attention"
        attention.input[3:5] = past
        attention.output[:] = [f"{name}.out", f"{name}.k_all", f"{name}.v_all"]
        graph.nodes.append(attention)
        for kind, cache in self.past.items():
            new = add("Slice", f"{name}.{kind}_all", "num_past", "end", "of_tokens", output=f"{kind}_new")
            steps = add("Div", new, self._scale(kind), output=f"{kind}_steps")
            clipped = add(
                "Clip", add("Round", steps, output=f"{kind}_round"), "least", "most", output=f"{kind}_clipped"
            )
            rounded = add("Cast", clipped, output=f"{kind}_int8", to=TensorProto.INT8)
            # The buffer that is written is the one that is read: all of it is copied before.
            rest = add("Slice", cache, "num_total", "end", "of_tokens", output=f"{kind}_rest")
            add("Concat", old[kind], rounded, rest, output=kind, axis=2)
        return _way(name, graph.nodes)


def _way(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
    outputs = [onnx.ValueInfoProto(name=f"{name}.{place}") for place in ("out", "k", "v")]
    return helper.make_graph(nodes, name, [], outputs)
