"""The static key/value cache of the decoder, and what it has to know of each row to decode the next token.

One allocation for all rows:

    k_cache, v_cache     [num_hidden_layers, B, num_key_value_heads, max_seq_len, head_dim]
    k_scales, v_scales   [num_hidden_layers, B, num_key_value_heads, max_seq_len], of an int8 cache
    position_ids         [B]   the slot that the newest token goes to; -1: the row is not active
    input_ids            [B]   the newest token
    temperature …        [B]   how tokens are chosen: see `kernels.sample`
    adapters             [B]   which adapter reads them; -1: none

Slot p of row b holds the token at position p of study b. A query at position p sees slots 0 … p, so what an earlier
study has left behind is never seen. All of it stays where it was allocated, on the device that computes: decoding a
token takes nothing from the host, and one CUDA graph serves every token. `num_cached_tokens` is the host's own count.

An int8 cache keeps each vector (one token's key or value of one head) with a scale of its own: see
`kernels.rotary_and_cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from kernels.sample import sample
from lite.engines.protocol import GREEDY, MAX_TOP, NO_ADAPTER, ChosenTokens, Sampling
from lite.errors import ContextLengthError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lite.config import DecoderConfig
    from lite.engines.protocol import Segment
    from lite.engines.torch_engine.cuda_graph import GraphedStep

SCALES_DTYPE: Final = torch.float16
MAX_DRAFTS: Final = 16
"""Drafted tokens of a row that are verified in one step, at most."""


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


class TorchChosen:
    """Chosen tokens on their way to the host; nothing waits for them before `wait`."""

    def __init__(self, told: Tensor, rows: Mapping[int, int], num_tokens: int) -> None:
        """Begin to copy.

        Args:
            told: float64 [N, 3 + 2 * num_top], from `KVCache._sample`.
            rows: where in it the tokens of each row begin.
            num_tokens: of each row.
        """
        self._rows = dict(rows)
        self._num_tokens = num_tokens
        self._event: torch.cuda.Event | None = None
        self._host = told.clone() if told.device.type == "cpu" else self._begin(told)

    def _begin(self, told: Tensor) -> Tensor:
        host = torch.empty(told.shape, dtype=told.dtype, pin_memory=True)
        host.copy_(told, non_blocking=True)
        self._event = torch.cuda.current_stream(told.device).record_event()
        return host

    def wait(self) -> dict[int, ChosenTokens]:
        """Wait for them, and return them by row."""
        if self._event is not None:
            self._event.synchronize()
        told: list[list[float]] = self._host.tolist()
        return {row: _chosen_tokens(told[begin : begin + self._num_tokens]) for row, begin in self._rows.items()}


def _chosen_tokens(told: Sequence[Sequence[float]]) -> ChosenTokens:
    top = [zip(map(int, line[3::2]), line[4::2], strict=True) for line in told if len(line) > 3]
    return ChosenTokens(
        token_ids=tuple(int(line[0]) for line in told),
        logprobs=tuple(line[1] for line in told),
        top=tuple(tuple(pairs) for pairs in top),
        is_finite=all(line[2] for line in told),
    )


class KVCache:
    """Keys and values of every token so far, for several studies."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_rows: int,
        max_seq_len: int,
        device: torch.device,
        dtype: torch.dtype,
        quantized: bool = False,
    ) -> None:
        """Allocate room for `num_rows` rows of `max_seq_len` tokens, in the decoder's dtype or quantized to int8."""
        shape = (config.num_hidden_layers, num_rows, config.num_key_value_heads, max_seq_len, config.head_dim)
        # Zeros, not empty: a masked slot is weighted by zero, and zero times a stray NaN is a NaN.
        stored = torch.int8 if quantized else dtype
        self.k_cache = torch.zeros(shape, device=device, dtype=stored)
        self.v_cache = torch.zeros(shape, device=device, dtype=stored)
        self.k_scales, self.v_scales = (
            torch.zeros(shape[:-1], device=device, dtype=SCALES_DTYPE) if quantized else None for _ in range(2)
        )
        self.input_ids = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.position_ids = torch.full((num_rows,), -1, dtype=torch.long, device=device)
        self.drafts = torch.zeros(num_rows, MAX_DRAFTS, dtype=torch.long, device=device)
        self.temperature = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.top_p = torch.ones(num_rows, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.adapters = torch.full((num_rows,), NO_ADAPTER, dtype=torch.long, device=device)
        self.told = torch.zeros(num_rows * (1 + MAX_DRAFTS), 3 + 2 * MAX_TOP, dtype=torch.float64, device=device)
        self.num_cached_tokens = [0] * num_rows
        self.is_active = [False] * num_rows
        self.sampling = [GREEDY] * num_rows
        self.adapter_of = [NO_ADAPTER] * num_rows
        self.last_logits: Tensor | None = None
        """What the newest tokens were chosen from, [rows, T, vocab_size]: for whoever checks an engine."""
        self.steps: dict[tuple[int, int, int, bool], GraphedStep] = {}
        """What decodes the first n rows with K drafted tokens each, by n, K, how many top tokens are told, and whether
        with adapters."""

    # -- What it is --------------------------------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.k_cache.shape[1]

    @property
    def max_seq_len(self) -> int:
        """The number of slots of a row."""
        return self.k_cache.shape[3]

    @property
    def nbytes(self) -> int:
        """2 (keys, values) x layers x rows x kv_heads x max_seq_len x bytes of a vector, its scale included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def num_spanned(self) -> int:
        """The number of rows up to the last that is active."""
        return max((row for row, active in enumerate(self.is_active) if active), default=0) + 1

    @property
    def longest_active(self) -> int:
        """The most tokens that an active row holds."""
        held = zip(self.num_cached_tokens, self.is_active, strict=True)
        return max((count for count, active in held if active), default=0)

    @property
    def tells_top(self) -> bool:
        """Whether an active row wants to know the most probable tokens."""
        return any(active and how.num_top for active, how in zip(self.is_active, self.sampling, strict=True))

    @property
    def uses_adapters(self) -> bool:
        """Whether an active row has an adapter."""
        return any(active and slot >= 0 for active, slot in zip(self.is_active, self.adapter_of, strict=True))

    def layer(self, layer: int, rows: slice) -> LayerCache:
        """Return a layer's keys and values, of some rows."""
        scales = [None if of_all is None else of_all[layer, rows] for of_all in (self.k_scales, self.v_scales)]
        return LayerCache(self.k_cache[layer, rows], self.v_cache[layer, rows], *scales)

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.k_cache, self.v_cache, self.k_scales, self.v_scales) if t is not None]

    # -- Rows --------------------------------------------------------------------------------------------------------

    def check_room(self, end: int) -> None:
        """Refuse tokens up to a position that no row has."""
        if end > self.max_seq_len:
            msg = f"got tokens up to position {end} · expected at most {self.max_seq_len}, the cache's max_seq_len"
            raise ContextLengthError(f"{msg} · allocate a longer cache")

    def truncate(self, row: int, length: int, *, newest: int | None = None) -> None:
        """Cut a row back to its first `length` tokens; an active row goes on with `newest`."""
        self.num_cached_tokens[row] = length
        if self.is_active[row]:
            self.position_ids[row].fill_(length)
        if newest is not None:
            self.input_ids[row].fill_(newest)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give a row that is not active the first `length` tokens of another."""
        for tensor in self._tensors():
            tensor[:, target, :, :length].copy_(tensor[:, source, :, :length])
        self.num_cached_tokens[target] = length

    def release(self, row: int, *, damaged: bool = False) -> None:
        """Let `decode` leave a row out. It keeps what it holds, unless that may not be finite."""
        if self.is_active[row]:
            self.is_active[row] = False
            self.position_ids[row].fill_(-1)
        if damaged:
            self.num_cached_tokens[row] = 0
            for tensor in self._tensors():
                tensor[:, row].zero_()  # a NaN would not go away when it is weighted by zero

    # -- Choosing ----------------------------------------------------------------------------------------------------

    def begin(self, segment: Segment[Any], logits: Tensor) -> TorchChosen:
        """Choose behind the last tokens of a segment, and let its row be active: logits [num_logits, vocab_size]."""
        row, count = segment.row, len(logits)
        self.last_logits = logits[None]
        self._set_sampling(row, segment.sampling)
        if self.adapter_of[row] != segment.adapter:
            self.adapter_of[row] = segment.adapter
            self.adapters[row].fill_(segment.adapter)
        num_top = MAX_TOP if segment.sampling.num_top else 0
        positions = torch.arange(segment.end - count + 1, segment.end + 1, device=logits.device)
        token_ids, told = self._sample(logits, slice(row, row + 1), positions, num_top)
        self.input_ids[row].copy_(token_ids[-1])
        self.position_ids[row].fill_(segment.end)
        self.is_active[row] = True
        return TorchChosen(told, {row: 0}, count)

    def draft(self, drafts: Mapping[int, Sequence[int]], count: int) -> None:
        """Take drafted tokens, as many for each row: what there is not is token 0."""
        given = torch.zeros(self.num_rows, count, dtype=torch.long)
        for row, token_ids in drafts.items():
            given[row, : len(token_ids)] = torch.tensor(token_ids, dtype=torch.long)
        self.drafts[:, :count].copy_(given, non_blocking=True)

    def newest(self, rows: slice, num_drafts: int) -> tuple[Tensor, Tensor]:
        """Return the newest token of each row and drafted ones behind it, and their slots: both [rows, 1 + K]."""
        token_ids = torch.cat((self.input_ids[rows, None], self.drafts[rows, :num_drafts]), dim=1)
        first = self.position_ids[rows, None]
        slots = first + torch.arange(1 + num_drafts, device=first.device)
        return token_ids, torch.where(first < 0, first, slots).contiguous()

    def choose(self, logits: Tensor, rows: slice, num_top: int) -> None:
        """Choose behind each token, on the device: logits [rows, T, vocab_size]. Each row is then T tokens further."""
        num_rows, T, _ = logits.shape
        positions = self.position_ids[rows, None] + torch.arange(1, T + 1, device=logits.device)
        token_ids, told = self._sample(logits.flatten(0, 1), rows, positions.flatten(), num_top)
        self.input_ids[rows].copy_(token_ids.view(num_rows, T)[:, -1])
        self.told[: len(told), : told.shape[1]].copy_(told)
        self.position_ids[rows] += T * (self.position_ids[rows] >= 0).long()

    def advance(self, num_tokens: int) -> TorchChosen:
        """Note on the host that each active row is so many tokens further, and hand over what was chosen."""
        rows = {row: row * num_tokens for row, active in enumerate(self.is_active) if active}
        width = 3 + 2 * MAX_TOP * self.tells_top
        for row in rows:
            self.num_cached_tokens[row] += num_tokens
        return TorchChosen(self.told[: self.num_spanned * num_tokens, :width], rows, num_tokens)

    def _set_sampling(self, row: int, sampling: Sampling) -> None:
        before, self.sampling[row] = self.sampling[row], sampling
        for name, tensor in (("temperature", self.temperature), ("top_p", self.top_p), ("seed", self.seeds)):
            if getattr(before, name) != getattr(sampling, name):
                tensor[row].fill_(getattr(sampling, name))

    def _sample(self, logits: Tensor, rows: slice, positions: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
        """Choose behind some tokens of each row: logits [rows * T, vocab_size], positions [rows * T].

        Returns:
            token_ids [rows * T], and all that the host is told: float64 [rows * T, 3 + 2 num_top], which holds ids
            exactly.
        """
        how = self.temperature[rows], self.top_p[rows], self.seeds[rows]
        repeat = len(logits) // len(how[0])
        temperature, top_p, seeds = how if repeat == 1 else (tensor.repeat_interleave(repeat) for tensor in how)
        chosen = sample(
            logits, temperature=temperature, top_p=top_p, seeds=seeds, positions=positions, num_top=num_top
        )  # fmt: skip
        told = torch.stack((chosen.token_ids.double(), chosen.logprobs.double(), chosen.is_finite.double()), dim=-1)
        if num_top:
            top = torch.stack((chosen.top_ids.double(), chosen.top_logprobs.double()), dim=-1)
            told = torch.cat((told, top.flatten(1)), dim=-1)
        return chosen.token_ids, told
