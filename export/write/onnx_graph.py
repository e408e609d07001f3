"""An ONNX graph written node by node instead of traced: the same on every torch version, every name says what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import onnx
from onnx import helper

if TYPE_CHECKING:
    from collections.abc import Sequence

OPSET: Final = 20
"""The first opset with Gelu; ONNX Runtime reads it since 1.17."""
IR_VERSION: Final = 9
CONTRIB: Final = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""


class Graph:
    """Nodes and constants as they are added. Every method that adds a node returns the name of its output."""

    def __init__(self) -> None:
        """Begin with none."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, op_type: str, *inputs: str, name: str = "", outputs: Sequence[str] = (), **attributes: Any) -> str:
        """Add a node; of several outputs, return the first."""
        name = name or f"{op_type}_{len(self.nodes)}"
        outputs = list(outputs) or [f"{name}.out"]
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=name, **attributes))
        return outputs[0]

    def split(self, x: str, outputs: list[str], *, axis: int, name: str = "") -> list[str]:
        """Split along an axis; return all outputs."""
        self.add("Split", x, name=name, outputs=outputs, axis=axis, num_outputs=len(outputs))
        return outputs

    def model(
        self,
        name: str,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        domains: Sequence[str] = ("",),
    ) -> onnx.ModelProto:
        """Return the model of all that was added."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.constants)
        opsets = [helper.make_opsetid(domain, 1 if domain == CONTRIB else OPSET) for domain in domains]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="llava-rad-lite")
