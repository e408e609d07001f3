"""Our decoder by ONNX Runtime: what `lite.load(..., engine="onnx")` computes with, on an artifact that is made here.

4-bit linears in groups of 128, the head in 8 bits; the cache is float32 or int8. There is no torch in this process.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from benchmarks.speed.engine import Rows, prompt_of
from benchmarks.speed.peers.engine import Engine, NotHere, run_apart
from benchmarks.speed.weights import GROUP_SIZE, Model
from lite.artifact.open import load_artifact
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import import_onnxruntime

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.speed.peers.worker import Order


class LiteOnnxEngine(Engine):
    """`OnnxDecoder`. It has no depth that can be changed: there is an artifact for each."""

    fewest_layers = 1
    last_token_only = ("self_attn.o_proj.", "mlp.")
    rows: Any = None
    num_layers = 0

    def __init__(self, order: Order) -> None:
        model = order.model
        self.order = order
        self.paths = {layers: order.folder / f"onnx-{layers}" for layers in (model.num_layers, self.fewest_layers)}
        if missing := {layers: path for layers, path in self.paths.items() if not path.exists()}:
            run_apart(_write, missing, model)
        import_onnxruntime()
        self.load_s = self._load(model.num_layers)
        self.computes_in = f"4-bit blocks × int8, cache {order.form}"
        self.cache_bytes_per_token = round(self.rows.bytes_per_token)
        self.weight_bytes = _weight_bytes(model)

    def start(self, num_layers: int) -> None:
        """Load the artifact with so many layers, unless it is loaded; empty the cache."""
        if num_layers != self.num_layers:
            self._load(num_layers)
        self.is_empty = True

    def _load(self, num_layers: int) -> float:
        """Load an artifact; return how long it took."""
        self.rows, self.num_layers = None, num_layers  # one at a time in memory
        started = time.perf_counter()
        cache_dtype: Any = self.order.form
        decoder = OnnxDecoder(load_artifact(self.paths[num_layers]), cache_dtype=cache_dtype)
        self.rows = Rows(decoder, 1, self.order.max_seq_len)
        self.is_empty = True
        self.read([0])
        return time.perf_counter() - started

    def read(self, input_ids: list[int]) -> NDArray[np.float32]:
        """Run a prompt, the first token of which takes the place of the image, or a token."""
        begins, self.is_empty = self.is_empty, False
        logits: NDArray[np.float32] = (
            self.rows.read(prompt_of(self.rows.engine, input_ids))
            if begins
            else self.rows.decode_given(input_ids[0])[0]
        )
        return logits


def build(order: Order) -> LiteOnnxEngine:
    """Make the artifacts, unless another process of this run has, and load that of the whole model.

    Threads come from the environment: `lite.engines.cores` reads it.

    Raises:
        NotHere: a GPU is asked for.
    """
    if order.device != "cpu":
        raise NotHere("measured on CPUs only")
    return LiteOnnxEngine(order)


def _write(paths: dict[int, Path], model: Model) -> None:
    # It imports torch, which the worker must not.
    from benchmarks.speed.peers.onnx_artifact import write_artifact

    for layers, path in paths.items():
        write_artifact(path, model, num_layers=layers)


def _weight_bytes(model: Model) -> int:
    """Add up what decoding a token reads: integers, float32 scales, and norms."""
    total = 0
    for name, shape in model.tensor_shapes.items():
        count = math.prod(shape)
        if "norm" in name:
            total += 4 * count
        elif "embed_tokens" not in name:
            total += count * (8 if name == "lm_head.weight" else 4) // 8 + 4 * count // GROUP_SIZE
    return total
