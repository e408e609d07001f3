"""Drafting: guess how texts go on, let the engine verify the guesses in one step, keep what it would have said anyway.

    past texts ─follow─▶ t1 t2 t3 ─decode─▶ what the engine chooses behind the newest token, t1, t2, t3
                                            the same up to t2: three tokens for one reading of the weights

A text does not depend on it, but for how an engine rounds products of one row and of several (see `docs/session.md`).
That holds for drawn tokens, too: a draw is decided by seed and position.

How many tokens are worth verifying follows from what K + 1 tokens take on this engine (`measure_costs`) and from how
often guesses such as these were right so far. So what does not pay is not done; while nothing pays for long, nothing is
even looked up.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import numpy as np

from lite.engines.protocol import Cache, Segment
from lite.session.ngrams import CONTEXT, Guess, Ngrams, join, num_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from lite.engines.protocol import Chosen, ChosenTokens, Engine
    from lite.session.request import Progress
    from lite.session.rows import Row

F = TypeVar("F")
C = TypeVar("C", bound=Cache)
Limit: TypeAlias = "Callable[[Progress[F]], int]"

MAX_DRAFTS: Final = 15
"""Drafted tokens of a row in one step, at most."""
MAX_OWN_TOKENS: Final = 1 << 16
"""Of this process's own texts: the last 690 of 95 tokens."""
_MEASURED: Final = (0, 1, 3, 7)
"""Drafts whose costs are measured; between and beyond them lie straight lines."""
_SECONDS, _ROUNDS = 1.0, 5
"""What measuring may take, on an engine that is fast; on any other, one round."""
_GAIN: Final = 1.02
"""What drafts have to promise, as tokens for the time: a measured cost is not exact."""
_PRIOR: Final = 4
"""Guesses that a share among past texts is worth, beside those that were made."""
_WATCH, _REST = 128, 512
"""Tokens after which it is asked whether drafts have paid, and those that then pass without any."""


# -- What a step costs -----------------------------------------------------------------------------------------------


class Costs:
    """What a step of so many tokens takes, over one of one token."""

    def __init__(self, tokens: Sequence[int], seconds: Sequence[float]) -> None:
        """Take times of some numbers of tokens, in rising order from 1; a longer step is never the cheaper one."""
        self.tokens = tuple(tokens)
        self.ratios = tuple(itertools.accumulate((one / seconds[0] for one in seconds), max))
        self._known = [0.0, *np.interp(np.arange(1, tokens[-1] + 1), self.tokens, self.ratios).tolist()]
        self._rise = (self.ratios[-1] - self.ratios[-2]) / (self.tokens[-1] - self.tokens[-2])

    def of(self, tokens: int) -> float:
        """Return it for any number; beyond the last it rises as between the last two."""
        last = self.tokens[-1]
        return self._known[tokens] if tokens <= last else self.ratios[-1] + (tokens - last) * self._rise

    def __str__(self) -> str:
        """Return them for people."""
        return ", ".join(f"{n}: {ratio:.2f}" for n, ratio in zip(self.tokens, self.ratios, strict=True))


def measure_costs(engine: Engine[C, F], num_places: int) -> Costs:
    """Time steps of one row of so many places, nearly full, in turns; each counts as its fastest.

    Raises:
        MemoryBudgetError: there is no memory for such a row.
    """
    cache, length = engine.new_cache(1, num_places), max(1, num_places - 1 - max(_MEASURED))
    # Onto itself: memory that was never written would be read from one page of zeros.
    cache.copy_prefix(0, 0, length)
    prompt: Segment[F] = Segment(row=0, start=length - 1, input_ids=(1,), num_logits=1, is_prompt=False)
    engine.extend(prompt, cache)
    seconds: dict[int, list[float]] = {count: [] for count in _MEASURED}
    # The first run of a step compiles it, and the second captures it, where there is such a thing.
    warm_up, began = 2 * engine.run_ahead, time.perf_counter()
    for number in range(warm_up + _ROUNDS):
        for count, taken in seconds.items():
            cache.truncate(0, length, newest=1)
            started = time.perf_counter()
            engine.decode(cache, {0: (1,) * count} if count else {}).wait()
            taken.append(time.perf_counter() - started)
        if number + 1 == warm_up:
            began = time.perf_counter()
        if number >= warm_up and time.perf_counter() - began > _SECONDS:
            break
    return Costs([count + 1 for count in _MEASURED], [min(taken[warm_up:]) for taken in seconds.values()])


# -- What is guessed -------------------------------------------------------------------------------------------------


class Chances:
    """How often guesses were right, by what speaks for them."""

    def __init__(self) -> None:
        """Begin with no experience: the shares among past texts alone."""
        self._made: dict[tuple[int, int, int], list[int]] = {}

    def of(self, guess: Guess) -> float:
        """Return the probability that a guess is right, if all before it are."""
        tried, right = self._made.get(_kind(guess), (0, 0))
        # One place says less than its share, which is 1.
        share = guess.share * guess.seen / (guess.seen + 1)
        return (right + _PRIOR * share) / (tried + _PRIOR)

    def note(self, guess: Guess, *, is_right: bool) -> None:
        """Remember how a guess turned out; what was long ago fades."""
        made = self._made.setdefault(_kind(guess), [0, 0])
        made[0] += 1
        made[1] += is_right
        if made[0] >= 1024:
            made[:] = made[0] // 2, made[1] // 2


def _kind(guess: Guess) -> tuple[int, int, int]:
    return min(guess.matched, CONTEXT), min(guess.seen.bit_length(), 4), int(4 * guess.share)


@dataclasses.dataclass(slots=True, kw_only=True)
class Statistics:
    """What drafting has done so far."""

    steps: int = 0  # of a row, with drafts or without
    tokens: int = 0  # that came of them
    drafted: int = 0
    accepted: int = 0

    def add(self, drafted: int, accepted: int) -> None:
        """Count a step of a row."""
        self.steps += 1
        self.tokens += 1 + accepted
        self.drafted += drafted
        self.accepted += accepted


class Plain:
    """No guesses: each token is decoded by itself."""

    @property
    def is_awake(self) -> bool:
        """Whether it has to know the newest tokens before the next step."""
        return False

    def learn(self, text: Sequence[int]) -> None:
        """Take a text that has ended."""

    def decode(
        self,
        engine: Engine[C, F],
        cache: C,
        rows: Sequence[tuple[Row[F], Progress[F]]],  # noqa: ARG002
        limit: Limit[F],  # noqa: ARG002
    ) -> Chosen:
        """Take a step of all rows, and leave each behind the tokens that are right.

        Args:
            engine: the decoder.
            cache: what its active rows are is in `rows`.
            rows: those that decode; what was chosen for them before is known, if `is_awake`.
            limit: says how many tokens a study may have.
        """
        return engine.decode(cache)


class Drafting(Plain):
    """Guesses for the rows of one session. Used by one thread at a time."""

    def __init__(self, costs: Costs, *, eos_token_id: int, texts: NDArray[np.uint16] | None = None) -> None:
        """Begin with a table of texts, if there is one; see `lite.session.ngrams`."""
        self.costs = costs
        self.statistics = Statistics()
        self._eos_token_id = eos_token_id
        self._table = None if texts is None else Ngrams(texts)
        self._own_texts: list[Sequence[int]] = []
        self._own: Ngrams | None = None
        self._num_unordered = 0  # of the own tokens
        self._chances = Chances()
        self._watched = Statistics()
        self._rest = 0  # tokens to pass without drafts

    @property
    def is_awake(self) -> bool:
        """Whether guesses are made: while none pays, it rests."""
        return self._rest == 0

    def learn(self, text: Sequence[int]) -> None:
        """Take a text that has ended."""
        self._own_texts.append(tuple(text))
        self._num_unordered += len(text) + 1
        # Ordering all of them takes milliseconds; a few of the newest may wait for it.
        if self._own is None or 8 * self._num_unordered >= len(self._own):
            tokens = join(self._own_texts, self._eos_token_id, most=MAX_OWN_TOKENS)
            self._own_texts = self._own_texts[len(self._own_texts) - num_texts(tokens) :]
            self._own, self._num_unordered = Ngrams(tokens), 0

    def guess(self, text: Sequence[int], count: int) -> list[Guess]:
        """Say how a text may go on: by the table or by the own texts, whichever match is the longer one."""
        found = [table.follow(text, count) for table in (self._own, self._table) if table is not None]
        return max(found, key=lambda guesses: guesses[0].matched if guesses else 0, default=[])

    def decode(
        self, engine: Engine[C, F], cache: C, rows: Sequence[tuple[Row[F], Progress[F]]], limit: Limit[F]
    ) -> Chosen:
        """Take a step of all rows, and leave each behind the tokens that are right."""
        if self._rest:
            self._rest = max(0, self._rest - len(rows))
            return engine.decode(cache)
        lengths, guesses = list(cache.num_cached_tokens), dict[int, list[Guess]]()
        slots = min(cache.max_seq_len - lengths[row.index] - 1 for row, _ in rows)
        for row, progress in rows:
            room = min(MAX_DRAFTS, slots, limit(progress) - row.num_chosen - 1)
            guesses[row.index] = self.guess(progress.token_ids, room) if room > 0 else []
        counts = self.counts(list(guesses.values()), together=engine.verifies_together)
        drafts = {
            index: tuple(guess.token_id for guess in of_row[:count])
            for (index, of_row), count in zip(guesses.items(), counts, strict=True)
            if count
        }
        chosen = engine.decode(cache, drafts).wait()
        if drafts and not all(chosen[row.index].is_finite for row, _ in rows):
            # Numbers that are none behind a wrong guess say nothing of a text: once more, without any.
            for row, progress in rows:
                cache.truncate(row.index, lengths[row.index], newest=progress.token_ids[-1])
            return engine.decode(cache)
        found: dict[int, ChosenTokens] = {}
        for row, progress in rows:
            index, drafted = row.index, drafts.get(row.index, ())
            num_right = self._note(guesses[index], drafted, chosen[index].token_ids)
            found[index] = _first(chosen[index], num_right + 1)
            if drafts:
                cache.truncate(index, lengths[index] + num_right + 1, newest=found[index].token_ids[-1])
            row.num_chosen += num_right  # and the one that every step gives
            progress.num_drafted_tokens += len(drafted)
            progress.num_accepted_tokens += num_right
        self._watch()
        return Known(found)

    def counts(self, guesses: Sequence[Sequence[Guess]], *, together: bool) -> list[int]:
        """Return how many guesses of each row are worth verifying.

        Args:
            guesses: of each row.
            together: whether all rows with all their drafts are one step; else each row with drafts is one of its own.
        """
        gains = [
            list(itertools.accumulate(itertools.accumulate(map(self._chances.of, of_row), float.__mul__), initial=0.0))
            for of_row in guesses
        ]
        rows = len(gains)
        plain = _GAIN * rows / self.costs.of(rows)
        if not together:
            return [self._best([of_row], plain) for of_row in gains]
        count = self._best(gains, plain)
        return [min(count, len(of_row) - 1) for of_row in gains]

    def _best(self, gains: Sequence[Sequence[float]], plain: float) -> int:
        """Return the number of drafts that promises the most tokens for the time, if it is more than `plain`."""
        best = 0
        for count in range(1, max(map(len, gains))):
            tokens = sum(1 + of_row[min(count, len(of_row) - 1)] for of_row in gains)
            speed = tokens / self.costs.of(len(gains) * (1 + count))
            if speed > plain:
                best, plain = count, speed
        return best

    def _note(self, guesses: Sequence[Guess], drafted: Sequence[int], chosen: Sequence[int]) -> int:
        """Remember which guesses were right, also of those that nobody verified; return how many drafts were."""
        right = 0
        for guess, token_id in zip(guesses, chosen[: len(drafted) + 1], strict=False):
            self._chances.note(guess, is_right=guess.token_id == token_id)
            if guess.token_id != token_id:
                break
            right += 1
        right = min(right, len(drafted))
        self._watched.add(len(drafted), right)
        self.statistics.add(len(drafted), right)
        return right

    def _watch(self) -> None:
        if self._watched.steps >= _WATCH:
            if not self._watched.drafted:
                self._rest = _REST
            self._watched = Statistics()


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """Chosen tokens, which are known already."""

    tokens: Mapping[int, ChosenTokens]

    def wait(self) -> Mapping[int, ChosenTokens]:
        """Return them, by row."""
        return self.tokens


def _first(tokens: ChosenTokens, count: int) -> ChosenTokens:
    """Return the first of the tokens that were chosen for a row."""
    changes: dict[str, Any] = {name: getattr(tokens, name)[:count] for name in ("token_ids", "logprobs", "top")}
    return dataclasses.replace(tokens, **changes)
