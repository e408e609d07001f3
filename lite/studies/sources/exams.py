"""Exams of several films, and the frontal one of each that is drafted from: PA before AP, upright before lying down."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lite.image.words import view_of_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lite.studies.sources.base import StudyList

_ORDER: Final = {"PA": 0, "AP": 2, "FRONTAL": 4}
_ASIDE: Final = 9
_LYING: Final = re.compile(r"supin|horiz", re.IGNORECASE)


class Film(NamedTuple):
    """A film of an exam, as its table has it. Of two, the lesser is drafted from."""

    rank: int
    name: str
    line: int
    view: str
    row: Mapping[str, Any]
    reason: str | None
    reference: str
    aside: int = 0  # films of other views in the same exam
    further: int = 0  # and frontal ones


class Exams:
    """Films by their exams; only the best one of each is kept, so that a table of many films takes little memory."""

    def __init__(self, studies: StudyList, path: Path) -> None:
        """Begin with none; `path` is the table that lists the films."""
        self._studies = studies
        self._path = path
        self._best: dict[str, Film] = {}

    def add(
        self,
        exam: str,
        name: str,
        view: str | None,
        line: int,
        row: Mapping[str, Any],
        reason: str | None = None,
        reference: str | None = None,
    ) -> None:
        """Add a film of an exam: name and view as its table has them, and reason and findings if it does."""
        view = view or "no view named"
        film = Film(rank_of_view(view), name, line, view, self._studies.remembered(row), reason, reference or "")
        before = self._best.setdefault(exam, film)
        if before is not film:
            best, other = sorted((before, film), key=lambda film: film[:3])
            is_aside = other.rank == _ASIDE
            self._best[exam] = best._replace(aside=before.aside + is_aside, further=before.further + (not is_aside))

    def chosen(self) -> Iterator[tuple[str, Film, str]]:
        """Yield each exam that is wanted and has a frontal film, that film, and the file and line that name it."""
        aside = further = 0
        for exam, film in self._best.items():
            if not self._studies.wants(film.row):
                continue
            if film.rank == _ASIDE:
                self._studies.leave_out(f"without a frontal film ({film.view[:20]})")
                continue
            aside += film.aside
            further += film.further
            yield exam, film, f"{self._path}:{film.line}"
        if aside or further:
            self._studies.notes.append(
                f"{aside} films of other views and {further} further frontal ones of the same exams are not drafted "
                "from: PA goes before AP"
            )


@functools.lru_cache(maxsize=4096)
def rank_of_view(view: str) -> int:
    """Return which of an exam's films is drafted from: the lowest; 9 is no frontal film."""
    order = _ORDER.get(view_of_words(view) or "", _ASIDE)
    return order if order == _ASIDE else order + bool(_LYING.search(view))


def note_what_is_missing(studies: StudyList) -> None:
    """Say how many studies came without findings to compare with, and without a reason."""
    for missing, what in (
        (sum(not study.reference for study in studies), "findings to compare with"),
        (sum(not study.reason for study in studies), "a reason for the exam"),
    ):
        if missing:
            studies.notes.append(f"{missing} of {len(studies)} studies come without {what}")
