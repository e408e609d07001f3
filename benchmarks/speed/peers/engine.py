"""What a worker needs of an engine, and how an engine does what must not count in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class NotHere(Exception):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """An engine that this machine cannot run; the message says why, in a few words.

    Not a `LiteError`: the peers' environment does not have all that `lite` imports.
    """


class Engine:
    """One model in one form, with a cache for one sequence, and the newest token of it.

    `Any` stands for logits [vocab_size] in any array that has `argmax` and `tolist`.
    """

    computes_in: str
    weight_bytes: int  # read for each token, with all layers: linears, norms and head, but no embedding table
    cache_bytes_per_token: int  # keys and values of all layers
    fewest_layers = 0  # 1, if the engine needs one
    fills = False  # whether `fill` works
    last_token_only: tuple[str, ...] = ()  # the last layer's parts that of a prompt only the last token goes through
    load_s: float | None = None  # from a file to the first token; None: the weights come from no file
    newest = 0

    def start(self, num_layers: int) -> None:
        """Compute only the first layers from now on, and empty the cache."""
        raise NotImplementedError

    def read(self, input_ids: list[int]) -> Any:  # noqa: ANN401 - see above
        """Append tokens to the cache: a prompt to an empty one, else a single token; return the logits of the next."""
        raise NotImplementedError

    def fill(self, num_tokens: int) -> None:
        """Fill the empty cache with random keys and values, as if a prompt of that length had gone through."""
        raise NotImplementedError

    def first_token(self, input_ids: list[int]) -> None:
        """Read a prompt, and choose the most probable token: it waits for the engine, so that times are true."""
        self.newest = int(self.read(input_ids).argmax())

    def next_token(self) -> None:
        """Read the newest token, and choose the next."""
        self.newest = int(self.read([self.newest]).argmax())


def run_apart(function: Callable[..., None], *arguments: Any, **named: Any) -> None:
    """Run a function of a module in a new process, and raise what it raises.

    Drawing and rounding weights takes more memory than running them, and leaves libraries and fragments behind.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(function, *arguments, **named).result()
