"""Products with 4-bit weights by themselves, as ONNX Runtime and OpenVINO compute them: for `speed products`."""

from __future__ import annotations

import functools
import importlib
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.peers.openvino import has_vnni, int4_product, properties
from benchmarks.speed.peers.worker import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from benchmarks.speed.peers.worker import Order

    Weight = tuple[NDArray[np.int32], NDArray[np.float16]]
    Run = Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]

GROUP_SIZE: Final = 128
COPIES_BYTES: Final = 100_000_000
"""Of the copies of one real weight: three times what such processors' caches hold."""


class Products(Engine):
    """Weights of any shape, as many copies of each as no cache holds, computed by one library."""

    def __init__(self, order: Order) -> None:
        """Make none yet."""
        make = _onnxruntime if order.form == "onnxruntime" else functools.partial(_openvino, form=order.form)
        self.computes_in, self.weight_bytes, self.cache_bytes_per_token = order.form, 0, 0
        self._make = functools.cache(lambda N, K: make([_draw(N, K, copy) for copy in _copies(N, K)], order.threads))

    def multiply(self, shape: tuple[int, int], num_rows: int, calls: int) -> dict[str, list[float]]:
        """Time calls of one product, copy by copy; return seconds for each of them, one figure a call."""
        run, x = self._make(*shape), _rows(num_rows, shape[1])
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            run(x)
            seconds.append((time.perf_counter() - started) / len(_copies(*shape)))
        return {"seconds": seconds}

    def far(self, shape: tuple[int, int], num_rows: int) -> dict[str, float]:
        """Return the root mean square of the difference of a product's last row from float32's, relative."""
        N, K = shape
        qweight, scales = _draw(N, K, 0)
        fields = (qweight.view(np.uint32)[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None]) & np.uint32(15)
        weight = fields.reshape(K, N).astype(np.float32)
        weight -= np.float32(8)
        weight *= np.repeat(scales.astype(np.float32), GROUP_SIZE, axis=0)
        x = _rows(num_rows, K)
        expected = x[-1] @ weight
        return {"off": float(np.linalg.norm(self._make(N, K)(x)[0].ravel() - expected) / np.linalg.norm(expected))}


def _copies(N: int, K: int) -> range:
    return range(min(16, -(-COPIES_BYTES // (N * K // 2))))


def _rows(num_rows: int, K: int) -> NDArray[np.float32]:
    return np.random.default_rng(num_rows).standard_normal((num_rows, K), dtype=np.float32)


def _draw(N: int, K: int, copy: int) -> Weight:
    rng = np.random.default_rng([N, K, copy])
    scales = (rng.random((K // GROUP_SIZE, N), dtype=np.float32) + np.float32(0.5)) / np.float32(8 * K**0.5)
    return rng.integers(-(2**31), 2**31, (K // 8, N), dtype=np.int32), scales.astype(np.float16)


# Of each product one row is kept, so that nobody's time is that of writing all of them to new memory.


def _openvino(weights: Sequence[Weight], threads: int, form: str) -> Run:
    ov: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    x = ops.parameter([-1, 8 * len(weights[0][0])], np.float32)
    kept = [ops.gather(int4_product(x, *weight), np.array([-1]), np.array(0)) for weight in weights]
    settings = properties(threads, rounds=has_vnni() and not form.endswith("float"))
    compiled = ov.Core().compile_model(ov.Model(kept, [x]), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda rows: list(request.infer([rows]).values())


def _onnxruntime(weights: Sequence[Weight], threads: int) -> Run:
    onnx: Any = importlib.import_module("onnx")
    runtime: Any = importlib.import_module("onnxruntime")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    nodes, held, outputs = [], [array(np.array([-1]), "last")], []
    for number, (qweight, scales) in enumerate(weights):
        K, N = 8 * len(qweight), qweight.shape[1]
        blocks = np.ascontiguousarray(qweight.T).view(np.uint8).reshape(N, K // GROUP_SIZE, GROUP_SIZE // 2)
        held += [array(blocks, f"B{number}"), array(scales.T.astype(np.float32).ravel(), f"scales{number}")]
        sizes = {"K": K, "N": N, "bits": 4, "block_size": GROUP_SIZE, "accuracy_level": 4}
        inputs = ["x", f"B{number}", f"scales{number}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"all{number}"], domain="com.microsoft", **sizes))
        nodes.append(helper.make_node("Gather", [f"all{number}", "last"], [f"y{number}"], axis=0))
        outputs.append(helper.make_tensor_value_info(f"y{number}", onnx.TensorProto.FLOAT, [1, N]))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", K])
    graph = helper.make_graph(nodes, "products", [x], outputs, held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    written = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = runtime.InferenceSession(written, options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(None, {"x": rows})


def build(order: Order) -> Products:
    """Be ready for any shape."""
    return Products(order)
