"""The rows of a session: who has which, what each still has to read, and which film a free one still holds."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

    from lite.engines.protocol import Segment
    from lite.session.request import Progress

F = TypeVar("F")


@dataclasses.dataclass(slots=True, eq=False)
class Row(Generic[F]):
    """A place for one study."""

    index: int
    progress: Progress[F] | None = None  # whose it is; None: it is free
    unread: collections.deque[Segment[F]] = dataclasses.field(default_factory=collections.deque)  # of its prompt
    num_chosen: int = 0  # tokens that the engine has chosen, known here or not
    film: Hashable = None  # whose prefix it holds, with all of it read; None: nobody's
    num_prefix_tokens: int = 0
    last_use: int = 0


class Rows(list[Row[F]]):
    """All rows of one cache."""

    def __init__(self, num_rows: int) -> None:
        """Begin with free rows that hold nothing."""
        super().__init__(Row(index) for index in range(num_rows))
        self._clock = itertools.count(1)

    def taken(self) -> list[tuple[Row[F], Progress[F]]]:
        """Return those that have a study, and that."""
        return [(row, row.progress) for row in self if row.progress is not None]

    def decoding(self) -> list[tuple[Row[F], Progress[F]]]:
        """Return those for which the engine chooses a token in each step: their prompt has been read."""
        return [(row, progress) for row, progress in self.taken() if not row.unread]

    def reading(self) -> Row[F] | None:
        """Return the one whose prompt is to be read next: of the study that came first."""
        return min((row for row in self if row.unread), key=lambda row: row.last_use, default=None)

    def holding(self, film: Hashable) -> Row[F] | None:
        """Return a row that holds a film's prefix: a free one if there is one."""
        holds = [row for row in self if film is not None and row.film == film]
        return min(holds, key=lambda row: row.progress is not None, default=None)

    def free(self, film: Hashable) -> Row[F] | None:
        """Return the free row to take: one that holds the film, or else one that nobody will miss.

        Decoding runs over the rows from the first to the last that is taken, so it is the one that leaves the fewest
        between them, and of these the one whose film was used the longest ago.
        """
        free = [row for row in self if row.progress is None]
        held = [row for row in free if film is not None and row.film == film]
        taken = [row.index for row, _ in self.taken()]

        def cost(row: Row[F]) -> tuple[int, int, int]:
            span = max([*taken, row.index]) - min([*taken, row.index])
            return (span if taken else 0, row.last_use if row.film is not None else 0, row.index)

        return min(held or free, key=cost, default=None)

    def take(self, row: Row[F], progress: Progress[F]) -> None:
        """Give a row to a study."""
        row.progress, row.last_use = progress, next(self._clock)
        row.num_chosen = len(progress.token_ids)  # those that it had before it lost another row
        if progress.request.lot is not None:
            progress.request.lot.num_rows += 1

    def give_up(self, row: Row[F]) -> None:
        """Take a row from its study; it still holds its film."""
        if row.progress is not None and row.progress.request.lot is not None:
            row.progress.request.lot.num_rows -= 1
        row.progress, row.last_use = None, next(self._clock)
        row.unread.clear()
