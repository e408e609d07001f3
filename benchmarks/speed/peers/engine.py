"""What a worker needs of an engine."""

from __future__ import annotations

from typing import Any, Protocol


class Unavailable(Exception):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """An engine that this machine cannot run; the message says why, in a few words.

    Not a `LiteError`: the peers' environment does not have all that `lite` imports.
    """


class Engine(Protocol):
    """One model in one form, with a cache for one sequence.

    `Any` stands for logits [vocab_size] in any array that has `argmax` and `tolist`.
    """

    computes_in: str
    weight_bytes: int  # read for each token, with all layers: linears, norms and head, but no embedding table
    cache_bytes_per_token: int  # keys and values of all layers
    fewest_layers: int  # 0, unless the engine needs one
    fills: bool  # whether `fill` works
    last_token_only: tuple[str, ...]  # the last layer's parts that of a prompt only the last token goes through
    load_s: float | None  # from a file to the first token; None: the weights come from no file

    def start(self, num_layers: int) -> None:
        """Compute only the first layers from now on, and empty the cache."""

    def prefill(self, input_ids: list[int]) -> Any:  # noqa: ANN401 - see above
        """Fill the empty cache with a prompt; return the logits of the next token."""

    def decode_one_token(self, token_id: int) -> Any:  # noqa: ANN401 - see above
        """Append a token; return the logits of the next."""

    def fill(self, num_tokens: int) -> None:
        """Fill the empty cache with random keys and values, as if a prompt of that length had gone through."""
