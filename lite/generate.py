"""Greedy decoding of a batch: prefill once, decode one token per row until each row has its end.

Nothing here computes on tensors. An engine does, behind the small protocol below; this module decides when a row
stops, keeps the tokens, and measures the two phases.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lite.config import DecoderConfig
    from lite.engine import EngineName
    from lite.memory import Peaks

FinishReason = Literal["eos", "length"]


class Cache(Protocol):
    """What an engine remembers of a batch."""

    num_cached_tokens: list[int]

    @property
    def max_seq_len(self) -> int:
        """The number of tokens a row can hold."""

    @property
    def nbytes(self) -> int:
        """The memory it takes."""


class Engine(Protocol):
    """What turns prompts and image features into the logits of the next token.

    `Any` stands for the engine's own types: its cache, image_features [B, P, hidden_size] in any array it takes, and
    logits [B, vocab_size] in any array that has `argmax` and `tolist` and that numpy takes.
    """

    engine: EngineName
    config: DecoderConfig

    @property
    def device(self) -> object:
        """Where it computes: as text "cpu", "cuda" and the like."""

    @property
    def dtype(self) -> object:
        """What it computes in: as text "float32" and the like, perhaps with "torch." before it."""

    @property
    def cache_dtype(self) -> str:
        """What keys and values are stored as."""

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory that it has held on a GPU; None without one, or where that cannot be told."""

    def new_cache(self, batch_size: int, max_seq_len: int) -> Any:  # noqa: ANN401 - see above
        """Allocate a cache."""

    def prefill(self, prompts: Sequence[Sequence[int]], image_features: Any, cache: Any) -> Any:  # noqa: ANN401
        """Fill the cache with the prompts; return the logits after the last token of each row."""

    def decode_one_token(self, input_ids: Sequence[int], cache: Any, active: Sequence[bool]) -> Any:  # noqa: ANN401
        """Append one token to each active row; return the logits of the next."""

    def score(self, input_ids: Sequence[int], target_ids: Sequence[int], image_features: Any) -> Any:  # noqa: ANN401
        """Return the logits [len(target_ids), vocab_size] that each target token is predicted from."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Row:
    """What one study of the batch has so far."""

    num_prompt_tokens: int
    token_ids: list[int] = dataclasses.field(default_factory=list)  # without EOS
    finish_reason: FinishReason | None = None  # None while it goes on


class Generation:
    """One batch being generated. Iterate over it: each item is a step, the new token of each row or None.

    A row ends with EOS ("eos", which is not among its tokens), or after max_new_tokens or with the context full (both
    "length"). It then yields None until the whole batch has ended.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        image_features: Any,  # noqa: ANN401 - the engine's business
        *,
        num_prompt_tokens: Sequence[int],
        max_new_tokens: int,
        max_seq_len: int,
        eos_token_id: int,
        peaks: Callable[[], Peaks],
    ) -> None:
        """Prepare; nothing runs before the first step is asked for.

        Args:
            engine: the decoder.
            prompts: the input_ids of each row.
            image_features: [B, P, hidden_size].
            num_prompt_tokens: the places each prompt takes in the context, the image's included.
            max_new_tokens: at least 1; the row's EOS does not count.
            max_seq_len: the decoder's context.
            eos_token_id: ends a row.
            peaks: tells the memory peaks so far; asked when the prompt has gone through.
        """
        self.rows = [Row(num_prompt_tokens=count) for count in num_prompt_tokens]
        self.prefill_s = 0.0
        self.decode_steps_s: list[float] = []
        self.cache_bytes = 0
        self.prefill_peaks: Peaks | None = None
        self._engine = engine
        self._prompts = prompts
        self._image_features = image_features
        self._max_new_tokens = max_new_tokens
        self._max_seq_len = min(max_seq_len, max(num_prompt_tokens) + max_new_tokens)
        self._eos_token_id = eos_token_id
        self._peaks = peaks

    def __iter__(self) -> Iterator[list[int | None]]:
        started = time.perf_counter()
        cache: Cache = self._engine.new_cache(len(self.rows), self._max_seq_len)
        self.cache_bytes = cache.nbytes
        newest = _greedy(self._engine.prefill(self._prompts, self._image_features, cache))
        self.prefill_s = time.perf_counter() - started
        self.prefill_peaks = self._peaks()
        while True:
            step = [self._take(row, token_id) for row, token_id in zip(self.rows, newest, strict=True)]
            yield step
            active = [row.finish_reason is None for row in self.rows]
            if not any(active):
                return
            started = time.perf_counter()
            newest = _greedy(self._engine.decode_one_token(newest, cache, active))
            self.decode_steps_s.append(time.perf_counter() - started)

    def _take(self, row: Row, token_id: int) -> int | None:
        """Give a row its newest token, or end it; return the token that belongs to its text."""
        if row.finish_reason is not None:
            return None
        if token_id == self._eos_token_id:
            row.finish_reason = "eos"
            return None
        row.token_ids.append(token_id)
        # The newest token is in no cache slot yet; to go on it needs one.
        context_full = row.num_prompt_tokens + len(row.token_ids) > self._max_seq_len
        if len(row.token_ids) >= self._max_new_tokens or context_full:
            row.finish_reason = "length"
        return token_id


def _greedy(logits: Any) -> list[int]:  # noqa: ANN401 - any array
    """Return the most probable token of each row. Reading it waits for the engine, so the times are true."""
    token_ids: list[int] = logits.argmax(-1).tolist()
    return token_ids
