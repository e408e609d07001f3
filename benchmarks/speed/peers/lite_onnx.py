"""Our decoder by ONNX Runtime: what `lite.load(..., engine="onnx")` computes with, on an artifact that is made here.

4-bit linears in groups of 128, the head in 8 bits; the cache is float32 or int8. There is no torch in this process.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from benchmarks.speed.peers.apart import run_apart
from benchmarks.speed.peers.engine import Unavailable
from benchmarks.speed.peers.weights import GROUP_SIZE
from lite.artifact.open import load_artifact
from lite.config import IMAGE_TOKEN_ID
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import import_onnxruntime

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.speed.peers.weights import Model


class LiteOnnxEngine:
    """`OnnxDecoder`. It has no depth that can be changed: there is an artifact for each."""

    fewest_layers = 1
    fills = False
    last_token_only = ("self_attn.o_proj.", "mlp.")
    decoder: Any = None
    cache: Any = None

    def __init__(self, model: Model, cache_dtype: Any, *, folder: Path) -> None:  # noqa: ANN401 - a CacheDtype, in JSON
        self.max_seq_len = model.max_seq_len
        self.cache_dtype = cache_dtype
        self.paths = {layers: folder / f"onnx-{layers}" for layers in (model.num_layers, self.fewest_layers)}
        if missing := {layers: path for layers, path in self.paths.items() if not path.exists()}:
            run_apart(_write, missing, model)
        import_onnxruntime()
        self.load_s = self._load(model.num_layers)
        self.computes_in = f"4-bit blocks × int8, cache {cache_dtype}"
        self.cache_bytes_per_token = self.cache.nbytes // self.max_seq_len
        self.weight_bytes = _weight_bytes(model)

    def start(self, num_layers: int) -> None:
        """Load the artifact with so many layers, unless it is loaded; empty the cache."""
        if num_layers != self.decoder.config.num_hidden_layers:
            self._load(num_layers)
        self.cache.release(0)

    def _load(self, num_layers: int) -> float:
        """Load an artifact; return how long it took."""
        # One at a time in memory.
        self.decoder = self.cache = None
        started = time.perf_counter()
        self.decoder = OnnxDecoder(load_artifact(self.paths[num_layers]), cache_dtype=self.cache_dtype)
        self.cache = self.decoder.new_cache(1, self.max_seq_len)
        self.prefill([0])
        return time.perf_counter() - started

    def prefill(self, input_ids: list[int]) -> NDArray[np.float32]:
        """Run a prompt, the first token of which takes the place of the image."""
        features = self.decoder.embed(input_ids[:1])  # [1, hidden_size]
        logits: NDArray[np.float32] = self.decoder.prefill([IMAGE_TOKEN_ID, *input_ids[1:]], features, self.cache)[0]
        return logits

    def decode_one_token(self, token_id: int) -> NDArray[np.float32]:
        """Run a token."""
        logits: NDArray[np.float32] = self.decoder.decode_one_token(self.cache, [token_id])[0]
        return logits

    def fill(self, num_tokens: int) -> None:
        """Refuse: a prefill is quick enough."""
        raise NotImplementedError


def build(form: str, model: Model, *, device: str, threads: int, folder: Path) -> LiteOnnxEngine:  # noqa: ARG001
    """Make the artifacts, unless another process of this run has, and load that of the whole model.

    Threads come from the environment: `lite.engines.cores` reads it.

    Raises:
        Unavailable: a GPU is asked for.
    """
    if device != "cpu":
        raise Unavailable("measured on CPUs only")
    return LiteOnnxEngine(model, form, folder=folder)


def _write(paths: dict[int, Path], model: Model) -> None:
    # It imports torch, which the worker must not.
    from benchmarks.speed.peers.onnx_artifact import write_artifact

    for layers, path in paths.items():
        write_artifact(path, model, num_layers=layers)


def _weight_bytes(model: Model) -> int:
    """Add up what decoding a token reads: integers, float32 scales, and norms."""
    total = 0
    for name, shape in model.shapes.items():
        count = math.prod(shape)
        if "norm" in name:
            total += 4 * count
        elif "embed_tokens" not in name:
            total += count * (8 if name == "lm_head.weight" else 4) // 8 + 4 * count // GROUP_SIZE
    return total
