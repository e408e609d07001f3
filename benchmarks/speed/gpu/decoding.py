"""Decoding, token after token, and how long each takes: ours, transformers', ONNX Runtime's, taking turns.

As `lite.session.generate` does it: a step ahead of the host, which reads every token.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Final

from benchmarks.speed.gpu import model
from benchmarks.speed.gpu.rig import HostClock, first_line
from benchmarks.speed.peers.lite_decoder import weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benchmarks.speed.gpu.rig import Clock, Rig
    from benchmarks.speed.peers.hugging_face import TransformersEngine
    from lite.engines.onnx_engine.decoder import OnnxDecoder
    from lite.engines.torch_engine.decoder import LlamaDecoder

WARM_UP: Final = 3
"""Tokens before any is timed: kernels are compiled at the first, and the second step is captured."""


class Decoding:
    """Something that decodes, with a cache that is full up to the context."""

    weight_bytes = 0  # read for a token
    cache_bytes_per_token = 0.0  # of one row
    graph: bool | None = None  # whether its steps are captured; None: not ours to say
    problem: str | None = None  # why they are not, although they should be
    waits = False  # whether a step has ended when it returns, on a stream that torch does not know

    def start(self) -> None:
        """Go back to the end of the context."""
        raise NotImplementedError

    def step(self) -> None:
        """Decode a token of every row, and do not wait for it if that is possible."""
        raise NotImplementedError

    def read(self, *, everything: bool = False) -> None:
        """Wait for the tokens that the host wants to see by now, or for all of them."""


class LiteDecoding(Decoding):
    """Our decoder, whichever linears it has."""

    def __init__(self, decoder: LlamaDecoder, *, rows: int, context: int, new_tokens: int) -> None:
        """Make a cache, fill it, compile and capture.

        Raises:
            MemoryBudgetError: it does not fit.
        """
        self.decoder, self.rows, self.context = decoder, rows, context
        self.cache = decoder.new_cache(rows, context + max(new_tokens + 1, WARM_UP))
        self.weight_bytes = weight_bytes(decoder)
        self.cache_bytes_per_token = self.cache.nbytes / (self.cache.max_seq_len * rows)
        self._unread: collections.deque[Any] = collections.deque()
        model.fill(self.cache, context)
        for _ in range(WARM_UP):
            self.step()
        self.read(everything=True)
        self.problem = model.not_captured(decoder, self.cache, rows)
        self.graph = decoder.capture is not None and self.problem is None

    def start(self) -> None:
        """Go back to the end of the context."""
        model.rewind(self.cache, self.context)

    def step(self) -> None:
        """Decode a token of every row."""
        self.decoder.decode_one_token(self.cache)
        self._unread.append(self.cache.newest())

    def read(self, *, everything: bool = False) -> None:
        """Read as `lite.session.generate` does."""
        while len(self._unread) > (0 if everything else self.decoder.run_ahead):
            self._unread.popleft().tolist()


class TransformersDecoding(Decoding):
    """transformers, as a user runs it: the token goes through the host."""

    def __init__(self, engine: TransformersEngine, *, layers: int, context: int) -> None:
        self.engine, self.layers, self.context = engine, layers, context
        self.weight_bytes, self.cache_bytes_per_token = engine.weight_bytes, float(engine.cache_bytes_per_token)
        self._newest = 0
        self.start()
        self.step()

    def start(self) -> None:
        """Make a new cache, and fill it: by a prompt, which asks nothing of what is within."""
        self.engine.start(self.layers)
        self._newest = int(self.engine.prefill([1] * self.context).argmax())

    def step(self) -> None:
        """Decode a token."""
        self._newest = int(self.engine.decode_one_token(self._newest).argmax())


class OnnxDecoding(Decoding):
    """Our other engine, on a stream of ONNX Runtime's own."""

    waits = True

    def __init__(self, decoder: OnnxDecoder, *, read_bytes: int, context: int, new_tokens: int) -> None:
        self.decoder, self.context, self.weight_bytes = decoder, context, read_bytes
        self.cache = decoder.new_cache(1, context + max(new_tokens + 1, WARM_UP))
        self.cache_bytes_per_token = self.cache.nbytes / self.cache.max_seq_len
        self.start()
        for _ in range(WARM_UP):
            self.step()

    def start(self) -> None:
        """Go back; what lies in the cache does not matter to the time."""
        self.cache.num_cached_tokens = [self.context]
        self.cache.input_ids = [1]

    def step(self) -> None:
        """Decode a token."""
        self.decoder.decode_one_token(self.cache)


def time_in_turns(rig: Rig, decodings: Mapping[str, Decoding]) -> dict[str, list[float] | str]:
    """Time tokens, each of the decodings in turn, round after round.

    Returns:
        Seconds a token by name; for one that has failed, and is left out from then on, why.
    """
    seconds: dict[str, list[float]] = {name: [] for name in decodings}
    failed: dict[str, str] = {}
    for _ in range(rig.setting.rounds):
        for name, decoding in decodings.items():
            if name not in failed:
                try:
                    seconds[name] += _time_tokens(rig, decoding)
                except Exception as error:  # noqa: BLE001 - whatever is raised is why it is not measured
                    failed[name] = f"failed ({first_line(error)})"
    return seconds | failed


def _time_tokens(rig: Rig, decoding: Decoding) -> list[float]:
    make_clock: Callable[[], Clock] = HostClock if decoding.waits else rig.clock
    clock = make_clock()
    decoding.start()
    decoding.step()  # untimed: the first after something else
    decoding.read(everything=True)
    clock.mark()
    for _ in range(rig.setting.new_tokens):
        decoding.step()
        clock.mark()
        decoding.read()
    decoding.read(everything=True)
    return clock.seconds()


def tokens_seen(context: int, new_tokens: int) -> int:
    """Return what the median of the timed tokens sees: the context, one that was not timed, half of the others."""
    return context + 1 + (new_tokens + 1) // 2
