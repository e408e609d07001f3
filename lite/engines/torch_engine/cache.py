"""The static key/value cache of the decoder, and what it has to know of each row to decode the next token.

One allocation for a batch:

    k_cache, v_cache     [num_hidden_layers, B, num_key_value_heads, max_seq_len, head_dim]
    k_scales, v_scales   [num_hidden_layers, B, num_key_value_heads, max_seq_len], of an int8 cache
    position_ids         [B]   the slot that the newest token goes to; -1: the row is free
    input_ids            [B]   the newest token

Slot p of row b holds the token at position p of study b. A query at position p sees slots 0 … p, so what an earlier
study has left behind is never seen. All of it stays where it was allocated, on the device that computes: decoding a
token takes nothing from the host, and one CUDA graph serves every token. `num_cached_tokens` is the host's own count.

An int8 cache keeps each vector (one token's key or value of one head) with a scale of its own: see
`kernels.rotary_and_cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lite.config import DecoderConfig
    from lite.engines.torch_engine.cuda_graph import GraphedStep

SCALES_DTYPE = torch.float16
NOT_FINITE = -1
"""In the place of a token whose logits are not finite."""


class LayerCache(NamedTuple):
    """Views of one layer, of some rows."""

    k_cache: Tensor  # [B, kv_heads, max_seq_len, head_dim]
    v_cache: Tensor
    k_scales: Tensor | None  # [B, kv_heads, max_seq_len]
    v_scales: Tensor | None

    def read(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first slots, [B, kv_heads, length, head_dim]: as they are, or dequantised."""
        k, v = self.k_cache[:, :, :length], self.v_cache[:, :, :length]
        if self.k_scales is None or self.v_scales is None:
            return k, v
        k = k.to(torch.float32) * self.k_scales[:, :, :length, None]
        v = v.to(torch.float32) * self.v_scales[:, :, :length, None]
        return k.to(dtype), v.to(dtype)


class NewestTokens:
    """Token ids on their way to the host; nothing waits for them before `tolist`."""

    def __init__(self, token_ids: Tensor) -> None:
        """Begin to copy token_ids [B]."""
        self._event: torch.cuda.Event | None = None
        self._host = token_ids.clone() if token_ids.device.type == "cpu" else self._begin(token_ids)

    def _begin(self, token_ids: Tensor) -> Tensor:
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        self._event = torch.cuda.current_stream(token_ids.device).record_event()
        return host

    def tolist(self) -> list[int]:
        """Wait for them, and return them."""
        if self._event is not None:
            self._event.synchronize()
        token_ids: list[int] = self._host.tolist()
        return token_ids


class KVCache:
    """Keys and values of every token so far, for a batch of studies."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        max_seq_len: int,
        device: torch.device,
        dtype: torch.dtype,
        quantized: bool = False,
    ) -> None:
        """Allocate room for `batch_size` rows of `max_seq_len` tokens.

        Args:
            config: the decoder's shape.
            batch_size: rows.
            max_seq_len: slots of a row.
            device: where.
            dtype: what the decoder computes in.
            quantized: keep keys and values as int8, half of float16.
        """
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        # Zeros, not empty: a masked slot is weighted by zero, and zero times a stray NaN is a NaN.
        stored = torch.int8 if quantized else dtype
        self.k_cache = torch.zeros(shape, device=device, dtype=stored)
        self.v_cache = torch.zeros(shape, device=device, dtype=stored)
        self.k_scales: Tensor | None = None
        self.v_scales: Tensor | None = None
        if quantized:
            self.k_scales = torch.zeros(shape[:-1], device=device, dtype=SCALES_DTYPE)
            self.v_scales = torch.zeros(shape[:-1], device=device, dtype=SCALES_DTYPE)
        self.input_ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.position_ids = torch.full((batch_size,), -1, dtype=torch.long, device=device)
        self.sampled = torch.full((batch_size,), NOT_FINITE, dtype=torch.long, device=device)
        """[B], the newest tokens as the host is told them: NOT_FINITE where the logits were not."""
        self.num_cached_tokens = [0] * batch_size
        self.steps: dict[int, GraphedStep] = {}
        """What decodes a token of the first n rows, by n."""

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
        """2 (keys, values) x layers x rows x kv_heads x max_seq_len x bytes of a vector, its scale included."""
        scales = 0 if self.k_scales is None else self.k_scales.nbytes
        return 2 * (self.k_cache.nbytes + scales)

    def layer(self, layer: int, rows: slice) -> LayerCache:
        """Return a layer's keys and values, of some rows."""
        scales = (None, None)
        if self.k_scales is not None and self.v_scales is not None:
            return LayerCache(
                self.k_cache[layer, rows],
                self.v_cache[layer, rows],
                self.k_scales[layer, rows],
                self.v_scales[layer, rows],
            )
        return LayerCache(self.k_cache[layer, rows], self.v_cache[layer, rows], *scales)

    def start(self, row: int, num_tokens: int, logits: Tensor) -> None:
        """Let a row begin: its prompt lies in the cache, its first token is the most probable one.

        Args:
            row: a free one.
            num_tokens: of the prompt.
            logits: [1, vocab_size], behind the prompt.
        """
        self.position_ids[row].fill_(num_tokens)
        self.num_cached_tokens[row] = num_tokens
        self.sample(logits, slice(row, row + 1))

    def sample(self, logits: Tensor, rows: slice) -> None:
        """Take the most probable token of each row, on the device: logits [rows, vocab_size]."""
        newest = logits.argmax(-1)
        # One infinity or NaN, and the sum is one; and what is one minus itself is not 0. Three launches, not seven.
        total = logits.sum(-1, dtype=torch.float32)
        self.input_ids[rows].copy_(newest)
        self.sampled[rows].copy_(torch.where(total - total == 0, newest, NOT_FINITE))

    def newest(self) -> NewestTokens:
        """Hand the newest tokens over, those of free rows too; NOT_FINITE where there is none."""
        return NewestTokens(self.sampled)

    def release(self, row: int, *, damaged: bool = False) -> None:
        """Let go of a row, for another study or for none.

        Args:
            row: which.
            damaged: what it holds may not be finite, and is cleared: it might be weighted by zero later on.
        """
        self.position_ids[row].fill_(-1)
        self.num_cached_tokens[row] = 0
        if damaged:
            for tensor in (self.k_cache, self.v_cache, self.k_scales, self.v_scales):
                if tensor is not None:
                    tensor[:, row].zero_()
