"""A Llama of random weights: its shapes, and what a synthetic checkpoint holds.

A tensor depends on its name only: the first layers of a deep model are those of a shallow one. Linears keep the size of
what goes through them, but for `GAINS`, so that hidden states and logits stay of order 1 to 10 at any depth.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.phantom.layout import llama_config_json
from lite.config import DecoderConfig
from lite.memory.counts import layer_linear_shapes

GROUP_SIZE: Final = 128
"""Inputs that share a scale, in the 4 bits of our own engines and of those that take our rounding."""
EMBEDDINGS: Final = 1.0
"""Standard deviation: about what a layer adds to them, so that logits depend on every layer."""
GAINS: Final = {"q_proj": 1.5, "k_proj": 1.5, "lm_head": 3.0}
"""Standard deviation of a linear's output for inputs of 1, where it is not 1: attention that picks some ten of 1,400
positions, and logits (in nats) neither flat nor one-hot."""
_CHUNK_VALUES: Final = 1 << 20  # drawn at a time: they stay in the processor's cache, which is twice as quick


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Every size of the model but its depth; the defaults are LLaVA-Rad's."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    vocab_size: int = 32000
    max_position_embeddings: int = 4096
    lora_rank: int = 64
    image_size: int = 518
    tower_dim: int = 768
    tower_depth: int = 12

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads

    def config(self, num_hidden_layers: int, bits: int | None = None) -> dict[str, Any]:
        """Return `config.json` at some depth; with `bits` its linears are GPTQ's."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        fields = {name: getattr(self, name) for name in (*names, "max_position_embeddings")}
        plain = llama_config_json({**fields, "num_hidden_layers": num_hidden_layers})
        if bits is None:
            return plain
        # Small shapes are not made of whole groups: all inputs are one.
        whole = self.hidden_size % GROUP_SIZE == self.intermediate_size % GROUP_SIZE == 0
        gptq = {"quant_method": "gptq", "checkpoint_format": "gptq", "sym": True, "desc_act": False, "bits": bits}
        return plain | {"quantization_config": {**gptq, "group_size": GROUP_SIZE if whole else -1}}

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linears of one layer, [out, in], in the order of the files."""
        shapes = layer_linear_shapes(DecoderConfig.from_hf(self.config(1)))
        return {f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": shape for name, shape in shapes.items()}

    def tensors(self, num_hidden_layers: int) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor, in the order of the files."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.{name}.weight": shape for name, shape in self.linears().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def lora(self, num_hidden_layers: int) -> dict[str, tuple[int, int]]:
        """Return name and shape of every LoRA factor, in the order of the file."""
        shapes: dict[str, tuple[int, int]] = {}
        for layer in range(num_hidden_layers):
            for name, (rows, columns) in self.linears().items():
                module = f"base_model.model.model.layers.{layer}.{name}"
                shapes[f"{module}.lora_A.weight"] = (self.lora_rank, columns)
                shapes[f"{module}.lora_B.weight"] = (rows, self.lora_rank)
        return shapes


@dataclass(frozen=True, kw_only=True)
class Model:
    """A plain Llama of random weights."""

    shapes: Shapes
    num_layers: int

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`, in 16 bits."""
        return self.shapes.config(self.num_layers)

    @functools.cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name."""
        return self.shapes.tensors(self.num_layers)

    def tensor(self, name: str) -> NDArray[np.float16]:
        """Draw a tensor by its name in a checkpoint."""
        shape = self.tensor_shapes[name]
        if len(shape) == 1:
            return (1 + np.float32(0.1) * self.rng(name).standard_normal(shape, dtype=np.float32)).astype(np.float16)
        return self.matrix(name, shape, EMBEDDINGS if "embed_tokens" in name else gain_of(name) * shape[1] ** -0.5)

    def matrix(self, name: str, shape: tuple[int, ...], std: float) -> NDArray[np.float16]:
        """Draw any matrix by its name, a few rows at a time: it is never held in float32 as a whole."""
        height, width = shape
        matrix = np.empty(shape, dtype=np.float16)
        rng, step = self.rng(name), max(1, _CHUNK_VALUES // width)
        for start in range(0, height, step):
            part = rng.standard_normal((min(step, height - start), width), dtype=np.float32)
            matrix[start : start + step] = part * np.float32(std)
        return matrix

    def rng(self, name: str) -> np.random.Generator:
        """Return the generator of a tensor."""
        return np.random.default_rng(zlib.crc32(name.encode()))


def gain_of(name: str) -> float:
    """Return what a linear multiplies by, from any name of it."""
    return next((gain for linear, gain in GAINS.items() if linear in name), 1.0)
