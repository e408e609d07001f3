"""Our engines as a measurement drives them. All calls of their verbs, and of the session's, are here."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.weights import EMBEDDINGS
from lite.config import IMAGE_TOKEN_ID, DecoderConfig
from lite.engines.protocol import NO_ADAPTER
from lite.engines.segments import divide, expand_image
from lite.errors import LiteError
from lite.memory.process import Peaks
from lite.session.loop import Loop
from lite.session.request import Request
from lite.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lite.engines.onnx_engine.decoder import OnnxDecoder
    from lite.engines.torch_engine.decoder import LlamaDecoder

    Engine = LlamaDecoder | OnnxDecoder

WARM_UP: Final = 3
"""Tokens before any is timed: kernels are compiled at the first, and the second step is captured."""
_QUESTION_TOKENS: Final = 50
_NEVER: Final = -2
"""No token: texts end by their length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Tokens, one of them in the place of an image."""

    input_ids: list[int]
    features: Any  # [P, hidden_size], an array of numpy's or a tensor of torch's

    @property
    def num_tokens(self) -> int:
        """The places it takes."""
        return len(self.input_ids) - 1 + len(self.features)


def random_prompt(
    config: DecoderConfig, num_tokens: int, device: torch.device | None = None, *, seed: int = 0
) -> Prompt:
    """Draw a prompt of `num_tokens` places: an image of noise, and as much text as in a real one."""
    rng = np.random.default_rng(seed)
    text = min(_QUESTION_TOKENS, num_tokens // 2)
    ids = rng.integers(config.vocab_size, size=text).tolist()
    features: Any = EMBEDDINGS * rng.standard_normal((num_tokens - text, config.hidden_size), dtype=np.float32)
    if device is not None:
        import torch

        features = torch.from_numpy(features).to(device)
    return Prompt(input_ids=[ids[0], IMAGE_TOKEN_ID, *ids[1:]], features=features)


def prompt_of(engine: Engine, input_ids: Sequence[int]) -> Prompt:
    """Return a prompt of tokens alone: the first takes the place of the image."""
    embed: Any = engine.embed
    return Prompt(input_ids=[IMAGE_TOKEN_ID, *input_ids[1:]], features=embed(input_ids[:1]))


class Rows:
    """Some rows of one engine, and the tokens that they decode."""

    def __init__(self, engine: Engine, num_rows: int, max_seq_len: int) -> None:
        """Make a cache.

        Raises:
            MemoryBudgetError: it does not fit.
        """
        self.engine: Any = engine
        self.num_rows = num_rows
        self.cache: Any = engine.new_cache(num_rows, max_seq_len)
        self.bytes_per_token = self.cache.nbytes / (self.cache.max_seq_len * num_rows)
        self.num_segments = 0  # that the last prompt was read in
        self._under_way: collections.deque[Any] = collections.deque()

    def read(self, prompt: Prompt, row: int = 0, *, adapter: int = NO_ADAPTER) -> Any:  # noqa: ANN401 - logits, of either kind of array
        """Read a prompt, and choose its first token; wait for nothing. Return the logits behind it, [vocab_size]."""
        self.cache.release(row)
        ids = expand_image(prompt.input_ids, len(prompt.features))
        chunk_size, features = self.engine.chunk_size, prompt.features
        parts = divide(ids, row=row, chunk_size=chunk_size, image_features=features, adapter=adapter)
        for self.num_segments, segment in enumerate(parts, start=1):
            chosen = self.engine.extend(segment, self.cache)
        self._under_way = collections.deque([chosen])
        return self.cache.last_logits[0, -1]

    def decode(self) -> None:
        """Decode a token of every row; wait for nothing."""
        self._under_way.append(self.engine.decode(self.cache))

    def decode_given(self, token_id: int) -> Any:  # noqa: ANN401 - see above
        """Decode a token other than the chosen one in every row; return the logits, [rows, vocab_size]."""
        for row in range(self.num_rows):
            self.cache.truncate(row, self.cache.num_cached_tokens[row], newest=token_id)
        self.engine.decode(self.cache)
        return self.cache.last_logits[:, -1]

    def wait(self, *, for_all: bool = True) -> list[int]:
        """Wait for the tokens under way, or for those that a session would wait for; return the last, of each row."""
        newest: list[int] = []
        while len(self._under_way) > (0 if for_all else self.engine.run_ahead):
            chosen = self._under_way.popleft().wait()
            newest = [chosen[row].token_ids[-1] for row in sorted(chosen)]
        return newest

    def rewind(self, num_tokens: int) -> None:
        """Let every row go on behind its first tokens; what lies in the cache does not matter to the time."""
        for row in range(self.num_rows):
            self.cache.is_active[row] = True
            self.cache.truncate(row, num_tokens, newest=1)

    def warm_up(self, num_tokens: int) -> None:
        """Compile and capture."""
        for _ in range(WARM_UP):
            self.decode()
        self.wait()
        self.rewind(num_tokens)

    @property
    def problem(self) -> str | None:
        """Why a step was not captured; None if it was, or should not have been."""
        if getattr(self.engine, "capture", None) is None:
            return None
        step = self.cache.steps.get((self.num_rows, 0, 0, self.cache.uses_adapters))
        if step is None:
            return "it has not run"
        return None if step.is_captured else step.problem or "it ran only once"


def greedy(engine: Engine, prompt: Prompt, count: int) -> tuple[list[int], str | None]:
    """Decode; return the tokens, and why the steps were not captured although they should have been."""
    rows = Rows(engine, 1, prompt.num_tokens + count)
    rows.read(prompt)
    token_ids = rows.wait()
    while len(token_ids) < count:
        rows.decode()
        token_ids += rows.wait()
    return token_ids, rows.problem


def far(engine: LlamaDecoder, input_ids: Sequence[int], expected: torch.Tensor, num_rows: int) -> float:
    """Return how far a decoder's logits are from what they should be.

    Args:
        engine: ours, with whichever linears.
        input_ids: a text; all but its last token are read as a prompt, that one is decoded.
        expected: its logits behind the last two tokens, float32 [2, vocab_size].
        num_rows: that compute it together.

    Returns:
        The root mean square of the difference, relative, of the worst; infinite where one is not finite.
    """
    rows = Rows(engine, num_rows, len(input_ids))
    prompt = prompt_of(engine, input_ids[:-1])
    behind = [off_by(rows.read(prompt, row), expected[0]) for row in range(num_rows)]
    for _ in range(2):  # the second one is a captured one, where steps are captured
        rows.rewind(len(input_ids) - 1)
        decoded = [off_by(logits, expected[1]) for logits in rows.decode_given(input_ids[-1])]
    return max(behind + decoded)


def off_by(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of a difference, relative; infinite where something is not finite."""
    expected = expected.to(got.device)
    found = float((got.float() - expected).norm() / expected.norm())
    return found if math.isfinite(found) else math.inf


def new_session(
    engine: LlamaDecoder, prompt: Prompt, *, num_rows: int, longest: int, max_queue: int
) -> Session[Any, Any]:
    """Begin a session for texts of up to `longest` tokens behind one prompt, `num_rows` under way at a time."""
    peaks = Peaks(rss_bytes=None, vram_bytes=None)
    loop = Loop(
        engine,
        num_rows=num_rows,
        max_seq_len=prompt.num_tokens + longest,
        context=engine.config.max_position_embeddings,
        eos_token_id=_NEVER,
        fits=lambda *_: True,
        peaks=lambda: peaks,
    )
    return Session(loop, max_queue=max_queue)


def draft(session: Session[Any, Any], prompt: Prompt, lengths: Sequence[int]) -> None:
    """Draft texts of given lengths, the film read anew for each, and wait for all of them.

    Raises:
        LiteError: a request failed, or has not as many tokens as it should.
    """
    input_ids = expand_image(prompt.input_ids, len(prompt.features))
    studies = [
        session.submit(
            Request(
                id=str(number),
                input_ids=input_ids,
                film=None,
                see=lambda: prompt.features,
                max_new_tokens=length,
            )
        )
        for number, length in enumerate(lengths)
    ]
    for study, length in zip(studies, lengths, strict=True):
        study.wait()
        if study.error is not None:
            raise study.error
        if len(study.token_ids) != length:
            raise LiteError(f"got {len(study.token_ids)} tokens · expected {length} · report this")
