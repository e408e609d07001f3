"""The static key/value cache of the decoder.

One allocation per batch, two tensors:

    k_cache, v_cache   [num_hidden_layers, B, num_key_value_heads, max_seq_len, head_dim]

Slot p of row b holds the token at position p of study b, and `num_cached_tokens[b]` says how many slots are true. The
prompts of a batch differ in length and are padded on the right: padding lands in slots at or after num_cached_tokens,
which no query sees (a query at position p sees slots 0 … p), and the generated tokens overwrite it one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lite.config import DecoderConfig


class KVCache:
    """Keys and values of every token so far, for a batch of studies."""

    def __init__(
        self, config: DecoderConfig, *, batch_size: int, max_seq_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Allocate room for `batch_size` rows of `max_seq_len` tokens."""
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        # Zeros, not empty: a masked slot is weighted by zero, and zero times a stray NaN is a NaN.
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.num_cached_tokens = [0] * batch_size
        self._rows = torch.arange(batch_size, device=device)[:, None]

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self.k_cache.shape[1]

    @property
    def max_seq_len(self) -> int:
        """The number of slots of a row."""
        return self.k_cache.shape[3]

    @property
    def nbytes(self) -> int:
        """2 (keys, values) x layers x rows x kv_heads x max_seq_len x head_dim x bytes of an element."""
        return 2 * self.k_cache.numel() * self.k_cache.element_size()

    def write(self, layer: int, position_ids: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values into their slots.

        Args:
            layer: the decoder layer.
            position_ids: [B, T], the slot of each token.
            k: [B, T, kv_heads, head_dim].
            v: like k.
        """
        # Two index tensors around a slice: the indexed view is [B, T, kv_heads, head_dim], the shape of k.
        self.k_cache[layer][self._rows, :, position_ids] = k
        self.v_cache[layer][self._rows, :, position_ids] = v
