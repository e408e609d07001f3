"""Our own engines, as `lite.load` makes them of an artifact: torch in 16 or 4 bits, and ONNX Runtime without torch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed.engine import Rows, prompt_of
from benchmarks.speed.peers.worker import Engine, NotHere
from lite.artifact.open import Artifact, load_artifact
from lite.vision import VisionEncoder

if TYPE_CHECKING:
    from benchmarks.speed.peers.worker import Order


class LiteEngine(Engine):
    """A decoder of ours with its own cache."""

    encoder: VisionEncoder | None = None

    def __init__(self, order: Order, artifact: Artifact, decoder: Any, weight_bytes: int, computes_in: str) -> None:  # noqa: ANN401 - of either kind
        self.artifact, self.rows = artifact, Rows(decoder, 1, order.max_seq_len)
        self.computes_in, self.weight_bytes = computes_in, weight_bytes
        self.cache_bytes_per_token = round(self.rows.bytes_per_token)

    def tower(self) -> dict[str, float]:
        """Time a film."""
        if self.encoder is None:
            self.encoder = VisionEncoder(self.artifact)
        size = self.artifact.manifest.parts.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
        started = time.perf_counter()
        self.encoder(pixels)
        return {"seconds": time.perf_counter() - started}

    def reset(self) -> None:
        """Let the next tokens be a prompt."""
        self.is_empty = True

    def read(self, input_ids: list[int]) -> Any:  # noqa: ANN401 - logits of either kind
        """Run a prompt, the first token of which takes the place of the image, or a token."""
        if not self.is_empty:
            return self.rows.decode_given(input_ids[0])[0]
        self.is_empty = False
        return self.rows.read(prompt_of(self.rows.engine, input_ids))


def build(order: Order) -> LiteEngine:
    """Load an artifact. Threads come from the environment: `lite.engines.cores` reads it.

    Raises:
        NotHere: ONNX Runtime is asked for on a GPU.
    """
    kind, cache_dtype, *prompts = f"{order.form} ".split(" ")
    artifact = load_artifact(order.folder / ("dense" if kind == "dense" else "int4"))
    decoder: Any
    if kind == "onnx":
        from lite.engines.onnx_engine.decoder import OnnxDecoder
        from lite.memory.counts import onnx_read_bytes

        if order.device != "cpu":
            raise NotHere("measured on CPUs only")
        dtype: Any = cache_dtype
        decoder = OnnxDecoder(artifact, cache_dtype=dtype, int8_prompts="prompts" in prompts)
        read = onnx_read_bytes(decoder.config, artifact.onnx_part())
        return LiteEngine(order, artifact, decoder, read, f"4-bit blocks × int8, cache {cache_dtype}")
    import torch

    from benchmarks.speed.decoders import weight_bytes
    from lite.engines.torch_engine.load import load_decoder

    torch.set_num_threads(order.threads)
    decoder = load_decoder(artifact, device=order.device)
    return LiteEngine(order, artifact, decoder, weight_bytes(decoder), str(decoder.dtype).removeprefix("torch."))
