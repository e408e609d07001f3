"""OpenVINO's CPU plug-in on the integers and scales of our own artifact: a graph built here, operation by operation.

The forms are those that the plug-in looks for: a constant of 4-bit integers → float → × scales → product stays 4-bit,
with activations rounded to 8 bits by groups where the processor has VNNI; keys and values that are read, appended to
and assigned around an attention become its own cache, which it rounds to 8 bits. The head has 8 bits and a scale a row.
"""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.peers.worker import Engine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from benchmarks.speed.peers.worker import Order

    Tensors = Mapping[str, NDArray[Any]]

FUSED: Final = {"FullyConnected", "RMS", "RoPE", "ScaledDotProductAttention"}
"""What the graph becomes where everything is recognised, with no "Concatenation": the cache is the attention's own."""


def properties(threads: int, *, rounds: bool = True) -> dict[str, str]:
    """Return what a model is compiled with: float32, but for activations that products round to 8 bits, if any."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128" if rounds else "0",  # as many share a scale as in the weights
        "INFERENCE_NUM_THREADS": f"{threads}",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": "NO",  # as nobody else's threads: one tied to a core waits for whatever else runs there
    }


def has_vnni() -> bool:
    """Say whether the processor has products of 8 bits; without them OpenVINO computes in float32."""
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


class OpenVinoEngine(Engine):
    """A compiled model, and a request that has the cache."""

    def __init__(self, order: Order) -> None:
        """Build and compile the decoder of an artifact."""
        openvino: Any = importlib.import_module("openvino")
        folder = order.folder / "int4" / "decoder"
        config, tensors = json.loads((folder / "config.json").read_text(encoding="utf-8")), _tensors(folder)
        self.embeddings = tensors["model.embed_tokens.weight"]
        cache, graph, rounds = order.form.partition(" ")[2], Graph(config, tensors), has_vnni()
        settings = properties(order.threads, rounds=rounds) | {"KV_CACHE_PRECISION": cache}
        compiled = openvino.Core().compile_model(graph.model(), "CPU", settings)
        done = {
            operation.get_rt_info()["layerType"].astype(str) for operation in compiled.get_runtime_model().get_ops()
        }
        missed = sorted(FUSED - done | {"Concatenation"} & done)
        self.request = compiled.create_infer_request()
        self.computes_in = f"4-bit groups × {'int8' if rounds else 'float32'}, cache {cache}"
        self.computes_in += f", not fused ({', '.join(missed)})" if missed else ""
        # A scale and a zero point in float32 for each vector.
        vector = config["hidden_size"] + 8 * config["num_attention_heads"]
        vector = vector if cache == "u8" else 4 * config["hidden_size"]
        self.cache_bytes_per_token = 2 * config["num_hidden_layers"] * vector
        self.weight_bytes = graph.weight_bytes
        self.beam = np.zeros(1, np.int32)

    def reset(self) -> None:
        """Empty the cache."""
        self.request.reset_state()
        self.position = 0

    def read(self, input_ids: list[int]) -> NDArray[np.float32]:
        """Run some tokens."""
        count, start = len(input_ids), self.position
        self.position += count
        positions = np.arange(start, self.position)
        seen = np.arange(self.position) <= positions[:, None]
        x = self.embeddings[input_ids].astype(np.float32)[None]
        mask = np.where(seen, np.float32(0), np.float32(-1e9))[None, None]
        done = self.request.infer([x, positions.astype(np.float32)[None, :, None], mask, self.beam])
        logits: NDArray[np.float32] = next(iter(done.values())).ravel()
        return logits


class Graph:
    """A Llama, as operations."""

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        """Take `config.json` and what the files hold."""
        self.ov: Any = importlib.import_module("openvino")
        self.ops: Any = importlib.import_module("openvino.opset13")
        self.config, self.tensors, self.weight_bytes = config, tensors, 0
        self.heads, self.head_dim = config["num_attention_heads"], config["head_dim"]

    def model(self) -> Any:  # noqa: ANN401 - a module without types
        """Build all of it: embeddings in, the logits of the last token out."""
        ops, f32 = self.ops, np.float32
        x = ops.parameter([1, -1, self.config["hidden_size"]], f32, "x")
        positions, mask = ops.parameter([1, -1, 1], f32, "positions"), ops.parameter([1, 1, -1, -1], f32, "mask")
        self.beam, self.mask, self.assigned = ops.parameter([-1], np.int32, "beam"), mask, list[Any]()
        frequencies = self.config["rope_theta"] ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = ops.unsqueeze(ops.multiply(positions, np.tile(frequencies, 2).astype(f32)[None, None]), 1)
        self.cos, self.sin = ops.cos(angles), ops.sin(angles)
        parameters = [x, positions, mask, self.beam]
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.")
        last = ops.gather(x, np.array([-1]), np.array(1))
        logits = self._head(self._norm(last, "model.norm"))
        return self.ov.Model([ops.result(logits)], self.assigned, parameters, "llama")

    def _layer(self, x: Any, place: str) -> Any:  # noqa: ANN401
        ops = self.ops
        normed = self._norm(x, f"{place}input_layernorm")
        q, k, v = (self._heads(self._linear(normed, f"{place}self_attn.{name}_proj")) for name in "qkv")
        k, v = (self._cached(new, f"{place}{name}") for new, name in ((self._rotary(k), "k"), (v, "v")))
        attended = ops.scaled_dot_product_attention(self._rotary(q), k, v, self.mask)
        attended = ops.reshape(ops.transpose(attended, np.array([0, 2, 1, 3])), np.array([0, 0, -1]), special_zero=True)
        x = ops.add(x, self._linear(attended, f"{place}self_attn.o_proj"))
        normed = self._norm(x, f"{place}post_attention_layernorm")
        gate, up = (self._linear(normed, f"{place}mlp.{name}_proj") for name in ("gate", "up"))
        return ops.add(x, self._linear(ops.multiply(ops.swish(gate), up), f"{place}mlp.down_proj"))

    def _heads(self, x: Any) -> Any:  # noqa: ANN401
        split = self.ops.reshape(x, np.array([0, 0, self.heads, self.head_dim]), special_zero=True)
        return self.ops.transpose(split, np.array([0, 2, 1, 3]))

    def _rotary(self, x: Any) -> Any:  # noqa: ANN401
        ops = self.ops
        half = [[0], [self.head_dim // 2], [np.iinfo(np.int64).max]]
        first, second = (
            ops.slice(x, start, stop, np.array([1]), np.array([3]))
            for start, stop in itertools.pairwise(map(np.array, half))
        )
        turned = ops.concat([ops.multiply(second, np.full((1, 1, 1, 1), -1, np.float32)), first], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def _cached(self, new: Any, name: str) -> Any:  # noqa: ANN401
        """Append to what is kept; the choice of a beam belongs to the form that is looked for."""
        ops, util = self.ops, self.ov.op.util
        shape = self.ov.PartialShape([-1, self.heads, -1, self.head_dim])
        variable = util.Variable(_info(util, shape, self.ov.Type.f32, name))
        empty = ops.constant(np.zeros((1, self.heads, 0, self.head_dim), np.float32))
        past = ops.gather(ops.read_value(empty, variable), self.beam, np.array(0))
        whole = ops.concat([past, new], 2)
        self.assigned.append(ops.assign(whole, variable))
        return whole

    def _norm(self, x: Any, name: str) -> Any:  # noqa: ANN401
        ops, eps = self.ops, np.float32(self.config["rms_norm_eps"])
        mean = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), keep_dims=True)
        normed = ops.multiply(x, ops.divide(np.float32(1), ops.sqrt(ops.add(mean, eps))))
        return ops.multiply(normed, self.tensors[f"{name}.weight"].astype(np.float32))

    def _linear(self, x: Any, name: str) -> Any:  # noqa: ANN401
        packed, scales = self.tensors[f"{name}.qweight"], self.tensors[f"{name}.scales"]
        self.weight_bytes += packed.nbytes + scales.nbytes
        return int4_product(x, packed, scales)

    def _head(self, x: Any) -> Any:  # noqa: ANN401
        ops, weight = self.ops, self.tensors["lm_head.weight"].astype(np.float32)
        scales = np.abs(weight).max(axis=1, keepdims=True) / 127
        rounded = ops.convert(ops.constant(np.rint(weight / scales).astype(np.int8)), np.float32)
        self.weight_bytes += weight.size + 2 * len(scales)
        return ops.matmul(x, ops.multiply(rounded, scales), transpose_a=False, transpose_b=True)


def int4_product(x: Any, qweight: NDArray[np.int32], scales: NDArray[np.float16]) -> Any:  # noqa: ANN401
    """Multiply by GPTQ's symmetric 4 bits.

    Args:
        x: an operation, [..., K].
        qweight: [K / 8, N], the first of eight in the lowest bits, each 8 more than it stands for.
        scales: [K / group_size, N].
    """
    ov: Any = importlib.import_module("openvino")
    ops: Any = importlib.import_module("openvino.opset13")
    groups, N = scales.shape
    K = 8 * len(qweight)
    # Two's complement, instead of 8 more, is the other highest bit.
    signed = np.ascontiguousarray((qweight ^ np.int32(-0x77777778)).T)
    # A tensor made of an array would not keep that alive.
    integers = ov.Tensor(ov.Type.i4, ov.Shape([N, groups, K // groups]))
    integers.data[:] = signed.view(np.int8).ravel()
    by_group = np.ascontiguousarray(scales.T)[:, :, None]
    weight = ops.multiply(ops.convert(ops.constant(integers), np.float16), ops.constant(by_group))
    weight = ops.convert(ops.reshape(weight, np.array([N, K]), special_zero=False), np.float32)
    return ops.matmul(x, weight, transpose_a=False, transpose_b=True)


def _info(util: Any, shape: Any, kind: Any, name: str) -> Any:  # noqa: ANN401
    info = util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = shape, kind, name
    return info


def _tensors(folder: Path) -> dict[str, NDArray[Any]]:
    load: Any = importlib.import_module("safetensors.numpy").load_file
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load(file).items()}


def build(order: Order) -> OpenVinoEngine:
    """Load an artifact."""
    return OpenVinoEngine(order)
