"""Films that wait in a folder until their study is drafted: FOLDER/STUDY/FILM.dcm, by UIDs.

A study is drafted once all that brought films of it have gone, and nothing has come for a moment. Its films are removed
when its line is on the disk: what is in the folder when a run begins is what is left to do. Films of a study that
failed stay, for the next run.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from threading import RLock
from typing import TYPE_CHECKING, Final

from lite.console import say
from lite.errors import LiteError, QueueFull
from lite.files import write_whole
from lite.studies.results import Findings
from lite.studies.sources.folder import read_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from threading import Event

    from lite.studies.journal import Journal
    from lite.studies.sources.base import SourceOptions
    from lite.studies.study import Study

UID: Final = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)+", re.ASCII)
_LOOK_S: Final = 0.1


class Inbox:
    """The films that wait. Any thread may put films into it; one takes studies out."""

    def __init__(self, folder: Path, *, max_studies: int, max_bytes: int, settle_s: float) -> None:
        """Begin with none; studies that failed count by their bytes, and not as waiting."""
        self.folder = folder
        self.max_studies = max_studies
        self.max_bytes = max_bytes
        self.settle_s = settle_s
        self._lock = RLock()
        self._journal: Journal | None = None
        self._sizes: dict[str, dict[str, int]] = {}  # of the films in the folder, by study and film
        self._brought: dict[object, set[str]] = {}  # studies, by who brings them
        self._ready: dict[str, float] = {}  # when a study may be drafted
        self._taken: set[str] = set()  # under way, or drafted
        self._ended: set[str] = set()  # drafted, and still in the folder
        self._failed: set[str] = set()

    def take_up(self, journal: Journal) -> None:
        """Take up what an earlier run has left, but for studies that the journal has."""
        with self._lock:
            self._journal = journal
            for study in sorted(self.folder.glob("*/")):
                if study.name in journal.done or not UID.fullmatch(study.name):
                    self._ended.update({study.name} & journal.done)
                    continue
                for rest in study.glob("*.partial"):
                    rest.unlink()
                self._sizes[study.name] = {film.stem: film.stat().st_size for film in study.glob("*.dcm")}
                self._ready[study.name] = 0.0

    def put(self, study: str, film: str, content: bytes, bringer: object) -> bool:
        """Write a film; say whether it was kept: one of a study that is drafted already is not.

        Args:
            study: its UID, which becomes the name of a folder; the film's becomes that of a file.
            film: see there.
            content: the file.
            bringer: who brings it, until they are `gone`.

        Raises:
            QueueFull: as many studies or bytes wait as may.
            LiteError: it cannot be written.
        """
        with self._lock:  # also around the writing, so that no study is drafted from a part of its films
            sizes = self._sizes.get(study, {})
            if self._journal is None or study in self._journal.done or study in self._taken:
                return False
            num_bytes = sum(map(sum, (films.values() for films in self._sizes.values()))) - sizes.get(film, 0)
            if study not in self._sizes and len(self._sizes.keys() - self._failed) >= self.max_studies:
                raise QueueFull(f"got a film of study {study} · {self.max_studies} studies wait · send it again later")
            if num_bytes + len(content) > self.max_bytes:
                raise QueueFull(f"got a film of study {study} · {num_bytes} bytes wait · send it again later")
            write_whole(self.folder / study / f"{film}.dcm", content)
            self._sizes.setdefault(study, {})[film] = len(content)
            self._failed.discard(study)
            self._ready.pop(study, None)
            self._brought.setdefault(bringer, set()).add(study)
            return True

    def gone(self, bringer: object) -> None:
        """Let what they have brought be drafted, unless others bring more of it."""
        with self._lock:
            for study in self._brought.pop(bringer, set()):
                if not any(study in others for others in self._brought.values()):
                    self._ready[study] = time.monotonic() + self.settle_s

    def studies(self, options: SourceOptions, stop: Event) -> Iterator[Study | None]:
        """Yield studies once they may be drafted, and None whenever there is none, until told to stop."""
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                ready = next((study for study, since in self._ready.items() if since <= now), None)
                if ready is not None:
                    del self._ready[ready]
                    self._taken.add(ready)
            if ready is None:
                ended = set(self._ended)
                yield None  # whose lines are on the disk when this goes on
                self.tidy(ended)
                stop.wait(_LOOK_S)
                continue
            try:
                (study,) = read_folder(self.folder / ready, options)
                yield replace(study, id=ready)
            except (LiteError, ValueError) as error:
                say(f"note: {error}")
                self._failed.add(ready)
                self._taken.discard(ready)

    def ended(self, study: Study, result: Findings | LiteError) -> None:
        """Hear that a study's line is written."""
        with self._lock:
            if isinstance(result, Findings):
                self._ended.add(study.id)
            else:
                self._failed.add(study.id)
                self._taken.discard(study.id)

    def tidy(self, studies: set[str] | None = None) -> None:
        """Remove the films of studies whose lines are on the disk: of these, or all that have ended."""
        with self._lock:
            for study in set(self._ended) if studies is None else studies:
                shutil.rmtree(self.folder / study, ignore_errors=True)  # what stays is removed the next time
                self._sizes.pop(study, None)
                self._ended.discard(study)
                self._taken.discard(study)
