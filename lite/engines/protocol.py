"""What an engine is: the one verb that everything above it is built on.

    prompt, a chunk at a time ──▶ extend(segment, cache) ──▶ Chosen     one row: reads tokens, chooses behind the last
    newest token of each row ───▶ decode(cache, drafts) ───▶ Chosen     all rows: reads one token each, or drafted ones
                                                                        too, and chooses behind each

A *row* is a place in the cache for one study. It holds the keys and values of `num_cached_tokens` tokens, and its
*newest* token: chosen, and not read yet. A row is *active* while `decode` runs it. One that is released keeps what it
holds: the prompt is `preamble <image> question`, so a second question about the same film begins behind the image.

Tokens are chosen by the op `sample` where the engine computes. `Chosen.wait` brings them to the host, and an engine may
have the next step under way by then (`Engine.run_ahead`).

The types of the cache and of image features are an engine's own. What is above is generic in them, and looks into
neither. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Generic, Literal, Protocol, TypeVar

from lite.config import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lite.config import DecoderConfig

EngineName = Literal["torch", "onnx"]
F = TypeVar("F")
C = TypeVar("C", bound="Cache")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits: see `kernels.sample`."""

    temperature: float = 0.0  # 0 takes the most probable token
    top_p: float = 1.0  # draw from the fewest tokens that have this much of the probability together
    seed: int = 0  # with a token's position it decides the draw
    num_top: int = 0  # how many of the most probable tokens to tell of


GREEDY = Sampling()
NO_ADAPTER: Final = -1
"""In the place of an adapter's number: the decoder as it is."""
NO_DRAFTS: Final[Mapping[int, Sequence[int]]] = MappingProxyType({})
MAX_TOP = 20
"""The most probable tokens that can be told of."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment(Generic[F]):
    """Some tokens of one row, one behind the other."""

    row: int
    start: int  # the position of the first; what the row holds from there on is forgotten
    input_ids: Sequence[int]  # IMAGE_TOKEN_ID in each place of the image
    image_features: F | None = None  # of the whole image, [P, hidden_size]; None where no place here is the image's
    image_start: int = 0  # places of the image before this segment
    num_logits: int  # choose behind so many of the last tokens: 0 in a prompt, 1 at its end, K + 1 to verify K drafts
    is_prompt: bool = True  # tokens of a text see the cache as if each had been decoded by itself
    sampling: Sampling = GREEDY  # of the row, from here on
    adapter: int = NO_ADAPTER  # of the row: its place in `Engine.adapters`; all that the row holds was read with it

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.input_ids)

    @property
    def image_part(self) -> slice:
        """The places of the image that are here."""
        return slice(self.image_start, self.image_start + list(self.input_ids).count(IMAGE_TOKEN_ID))


@dataclasses.dataclass(frozen=True, slots=True)
class ChosenTokens:
    """What was chosen for a row: behind one token, or behind each of several."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each, by the model's own distribution (temperature 1, all tokens)
    top: tuple[tuple[tuple[int, float], ...], ...] = ()  # for each the most probable tokens and theirs, if asked for
    is_finite: bool = True  # the logits were; if not, the tokens mean nothing


class Chosen(Protocol):
    """Chosen tokens that may still be on their way."""

    def wait(self) -> Mapping[int, ChosenTokens]:
        """Return them, by row."""


class Cache(Protocol):
    """What an engine remembers of the rows."""

    @property
    def num_rows(self) -> int:
        """The number of rows."""

    @property
    def max_seq_len(self) -> int:
        """The number of tokens a row can hold."""

    @property
    def nbytes(self) -> int:
        """The memory of all rows."""

    @property
    def num_cached_tokens(self) -> Sequence[int]:
        """How many tokens each row holds."""

    def truncate(self, row: int, length: int, *, newest: int | None = None) -> None:
        """Cut a row back to its first `length` tokens; an active row goes on with `newest`."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give a row that is not active the first `length` tokens of another."""

    def release(self, row: int, *, damaged: bool = False) -> None:
        """Let `decode` leave a row out. It keeps what it holds, unless that may not be finite: then it is cleared."""


class Engine(Protocol[C, F]):
    """What turns prompts and image features into tokens."""

    engine: EngineName
    config: DecoderConfig

    @property
    def adapters(self) -> Sequence[str]:
        """The names of the adapters that rows may use."""

    @property
    def device(self) -> object:
        """Where it computes: as text "cpu", "cuda" and the like."""

    @property
    def dtype(self) -> object:
        """What it computes in: as text "float32" and the like, perhaps with "torch." before it."""

    @property
    def cache_dtype(self) -> str:
        """What keys and values are stored as."""

    @property
    def prompt_weights(self) -> str:
        """What prompts are read by: "int8" weights of their own, or the "stored" ones."""

    @property
    def backend(self) -> str:
        """What computes, for people."""

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What is slower here than it has to be, each with its reason."""

    @property
    def overflow(self) -> str:
        """What to say where logits are not finite: got, expected, what to do."""

    @property
    def run_ahead(self) -> int:
        """How many steps may be under way before the host looks at a token."""

    @property
    def verifies_together(self) -> bool:
        """Whether rows with drafts are one step, all as long as the longest; else each is a step of its own."""

    @property
    def chunk_size(self) -> int:
        """How many tokens of a prompt go through together, at most."""

    def peak_vram_bytes(self) -> int | None:
        """Return the most memory that it has held on a GPU; None without one, or where that cannot be told."""

    def image_buffer(self, num_image_tokens: int) -> F | None:
        """Return memory for the features of an image, float32 [1, P, hidden_size]; None where it takes the host's.

        Raises:
            MemoryBudgetError: there is none.
        """

    def new_cache(self, num_rows: int, max_seq_len: int) -> C:
        """Return an empty cache.

        Raises:
            MemoryBudgetError: there is no memory for it.
        """

    def extend(self, segment: Segment[F], cache: C) -> Chosen | None:
        """Read some tokens of one row; with `num_logits` the row is active behind them, its newest token the last.

        Returns:
            The tokens chosen behind the last `num_logits` ones; None for none.

        Raises:
            ContextLengthError: the row is shorter.
            MemoryBudgetError: there is no memory for it.
            LiteError: the computation fails.
        """

    def logits(self, segment: Segment[F], cache: C) -> NDArray[np.float32]:
        """Read some tokens of one row as `extend` does, choose nothing, and return the logits.

        Returns:
            float32 [num_logits, vocab_size], of the last tokens; as they are, finite or not.
        """

    def decode(self, cache: C, drafts: Mapping[int, Sequence[int]] = NO_DRAFTS) -> Chosen:
        """Read the newest token of each active row, and choose the next.

        Args:
            cache: of any rows.
            drafts: tokens that are read behind the newest ones of some rows, which have to have room for them: tokens
                are chosen behind each. Then every row may have read more than its newest token, and is to be truncated
                to what was right.
        """
