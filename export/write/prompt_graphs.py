"""`decoder.prompts.onnx`: the graphs of `decoder.onnx` once more, for prompts alone, their linears in int8.

A token waits for memory, and 4 bits are what it waits for least. A prompt multiplies, and there MatMulNBits reaches
half of what int8 products do on a CPU that adds them up exactly. So the layers' weights are expanded and rounded once
more, to 8 bits with a scale for each output, and a token's inputs to 8 bits with a scale for each token:

    x [1,T,K] ─ largest of each token / 127 ─▶ scale [T] ─ QuantizeLinear ─▶ uint8 [1,T,K] ─┐
    int8 [K,N], float32 [N] ────────────────────────────────────── MatMulIntegerToFloat ────┴─▶ · scale ─▶ [1,T,N]

    decoder.prompts.onnx              decoder.onnx in all but the layers' linears
    decoder.prompts.int8_cache.onnx   the same of decoder.int8_cache.onnx
    decoder.prompts.data              the int8 weights of both: a byte for each of the layers' weights
    int8_product.onnx                 a product that shows whether this CPU adds up exactly

Norms, head and tables are those of decoder.onnx.data. The tokens of a text are decoded by `decoder.onnx`, as ever: what
8 bits lose is lost in the keys and values of the prompt, and measured at export.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.write.decoder_onnx import DATA_NAME, LM_HEAD, external_tensor
from export.write.onnx_graph import CONTRIB, Graph
from lite.engines.onnx_session import EXACT_SHAPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

PROMPTS_DATA_NAME: Final = "decoder.prompts.data"
EXACTNESS_NAME: Final = "int8_product.onnx"
_LEVELS: Final = 127
_ZERO: Final = 128
"""What stands for 0 in the uint8 that the products of a CPU take on their left."""
_ROWS: Final = 2048
"""Outputs of a linear that are expanded at a time."""
_TINY: Final = float(np.finfo(np.float32).tiny)
_SHARED: Final[Mapping[str, Array]] = {
    "prompts.last": np.array([-1]),
    "prompts.of_levels": np.array(1 / _LEVELS, np.float32),
    "prompts.least": np.array(_TINY, np.float32),
    "prompts.flat": np.array([-1]),
    "prompts.one": np.array(1, np.float32),
    "prompts.zero": np.array(_ZERO, np.uint8),
}
"""Constants of all linears."""


def write_prompt_graphs(folder: Path, graphs: Mapping[str, str]) -> None:
    """Write the graphs for prompts, their weights, and the product that shows what a CPU does.

    Args:
        folder: Where the graphs of `decoder.onnx` and their data are.
        graphs: By the name of a graph in float32 that is there, the name of the one to be made of it.
    """
    weights: dict[str, list[TensorProto]] = {}
    data = np.memmap(folder / DATA_NAME, np.uint8, mode="r")
    with (folder / PROMPTS_DATA_NAME).open("wb") as out:
        for source, target in graphs.items():
            model = onnx.load(folder / source, load_external_data=False)
            tensors = {tensor.name: tensor for tensor in model.graph.initializer}
            nodes: list[onnx.NodeProto] = []
            for node in model.graph.node:
                if node.op_type != "MatMulNBits" or node.name == LM_HEAD:
                    nodes.append(node)
                    continue
                values, scales = (tensors.pop(name) for name in node.input[1:3])
                if node.name not in weights:
                    weights[node.name] = _int8_weights(node, _read(data, values), _read(data, scales), out)
                tensors |= {tensor.name: tensor for tensor in weights[node.name]}
                nodes += _product(node)
            shared = [numpy_helper.from_array(values, name) for name, values in _SHARED.items()]
            del model.graph.node[:], model.graph.initializer[:]
            model.graph.node.extend(nodes)
            model.graph.initializer.extend([*tensors.values(), *shared])
            (folder / target).write_bytes(model.SerializeToString())
    (folder / EXACTNESS_NAME).write_bytes(_exactness().SerializeToString())


def _product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return what takes the place of a MatMulNBits: the same input and output, a token's inputs in 8 bits."""
    graph, name, x = Graph(), node.name, node.input[0]

    def add(op_type: str, *inputs: str, output: str, **attributes: Any) -> str:
        return graph.add(op_type, *inputs, name=f"{name}.{output}", outputs=[f"{name}.{output}"], **attributes)

    largest = add("ReduceMax", add("Abs", x, output="magnitudes"), "prompts.last", output="largest", keepdims=1)
    scale = add("Mul", largest, "prompts.of_levels", output="of_levels")
    scale = add("Max", scale, "prompts.least", output="x_scale")  # [1, T, 1]
    flat = add("Reshape", scale, "prompts.flat", output="x_scale.flat")  # [T]
    zeros = add("Expand", "prompts.zero", add("Shape", flat, output="num_tokens"), output="x_zeros")
    rounded = add("QuantizeLinear", x, flat, zeros, output="x_uint8", axis=1)
    product = add(
        "MatMulIntegerToFloat",
        *[rounded, f"{name}.int8", "prompts.one", f"{name}.int8_scales", "prompts.zero"],
        output="product",
        domain=CONTRIB,
    )
    graph.add("Mul", product, scale, name=name, outputs=[node.output[0]])
    return graph.nodes


def _int8_weights(node: onnx.NodeProto, values: Array, scales: Array, out: BinaryIO) -> list[TensorProto]:
    """Expand a linear, round it to 8 bits, and write it down: int8 [K, N], float32 [N]."""
    of = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    weights = np.empty((of["K"], of["N"]), np.int8)
    steps = np.empty(of["N"], np.float32)
    for begin, rows in _expanded(values, scales.reshape(of["N"], -1), of["bits"]):
        places = slice(begin, begin + len(rows))
        steps[places] = np.maximum(np.abs(rows).max(1), _TINY) / _LEVELS
        weights[:, places] = np.rint(rows / steps[places, None]).T
    return [
        external_tensor(out, f"{node.name}.{part}", array, location=PROMPTS_DATA_NAME)
        for part, array in (("int8", weights), ("int8_scales", steps))
    ]


def _expanded(values: Array, scales: Array, bits: int) -> Iterator[tuple[int, Array]]:
    """Yield the first of some outputs, and their weights float32 [n, K].

    `values` are those of MatMulNBits, uint8 [N, blocks, block_size * bits / 8], `scales` float32 [N, blocks].
    """
    for begin in range(0, len(values), _ROWS):
        part, scale = values[begin : begin + _ROWS], scales[begin : begin + _ROWS, :, None]
        integers = part if bits == 8 else np.stack((part & 15, part >> 4), axis=-1).reshape(*part.shape[:2], -1)
        expanded = (integers.astype(np.float32) - np.float32(1 << bits - 1)) * scale
        yield begin, expanded.reshape(len(part), -1)


def _read(data: Array, tensor: TensorProto) -> Array:
    """Return an external tensor of decoder.onnx.data, as a view."""
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    raw = data[place["offset"] : place["offset"] + place["length"]]
    values: Array = raw.view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))
    return values


def _exactness() -> onnx.ModelProto:
    """Return x [M, K] uint8 → x times 127s [M, N] int32: sums that some CPUs' products of two bytes do not hold."""
    rows, inner, columns = EXACT_SHAPE
    graph = Graph()
    graph.constants.append(numpy_helper.from_array(np.full((inner, columns), _LEVELS, np.int8), "w"))
    graph.add("MatMulInteger", "x", "w", name="product", outputs=["y"])
    value = helper.make_tensor_value_info
    inputs, outputs = value("x", TensorProto.UINT8, [rows, inner]), value("y", TensorProto.INT32, [rows, columns])
    return graph.model("int8_product", [inputs], [outputs])
