"""The model that every engine computes: its shapes, and random weights that are the same in every process."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

GROUP_SIZE: Final = 128
"""Inputs that share a scale, in the 4 bits of our own engines and of those that take our rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A plain Llama. It is handed to workers as JSON, so it is made of plain values."""

    config: Mapping[str, Any]  # config.json
    shapes: Mapping[str, tuple[int, ...]]  # of every tensor, under Hugging Face's names
    seed: int
    max_seq_len: int  # tokens that a cache has to hold

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        layers: int = self.config["num_hidden_layers"]
        return layers

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Draw a tensor: it depends on the seed and on its name.

        Linears keep the size of what goes through them, so hidden states and logits stay of order 1.
        """
        shape = self.shapes[name]
        draws = np.random.default_rng([self.seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            draws *= np.float32(0.1)
            draws += np.float32(1.0)
        elif "embed_tokens" not in name:
            draws *= np.float32(shape[1] ** -0.5)
        return draws

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Draw all tensors, one at a time."""
        for name in self.shapes:
            yield name, self.tensor(name)

    def token_ids(self, count: int) -> list[int]:
        """Draw a prompt of `count` tokens; a shorter one is the beginning of a longer one."""
        drawn: list[int] = np.random.default_rng(self.seed).integers(self.config["vocab_size"], size=count).tolist()
        return drawn
