"""Studies drafted into a journal: the loop that all doors of a cohort share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from lite.console import say
from lite.errors import Cancelled, ImageError, LiteError
from lite.files import safe_name, write_whole
from lite.session.draft import as_they_end
from lite.studies.results import SHORT_NOTICE, Findings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lite.model import FindingsModel
    from lite.studies.journal import Journal
    from lite.studies.study import Study

DRAFTING: Final = ("max_new_tokens", "rendering", "any_film")
"""What a run asks for beside its studies, by the names of `lite.session.prepare.Asked`'s fields."""


class Listener(Protocol):
    """Whoever is told of each study as it ends."""

    def __call__(self, study: Study, result: Findings | LiteError) -> None:
        """Take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What is written of a study beside its line: a text, and a DICOM report where its film is a DICOM file."""

    text_dir: Path | None = None
    sr_dir: Path | None = None
    outbox: Path | None = None  # where a report is put, too, until it is sent

    def write(self, study: Study, findings: Findings) -> Path | None:
        """Write them; return where the report is, if there is one. A film without UIDs has none, and a note says so.

        Raises:
            LiteError: they cannot be written.
        """
        if self.text_dir is not None:
            write_whole(self.text_dir / safe_name(study.id, ".txt"), f"{findings.text}\n\n{SHORT_NOTICE}\n")
        if self.sr_dir is None or findings.film is None or findings.film.format != "DICOM":
            return None
        from lite.cohort.report import write_report

        report = self.sr_dir / safe_name(study.id, ".dcm")
        try:
            write_report(report, study.path, findings)
        except ImageError as error:
            say(f"note: {error}")
            return None
        if self.outbox is not None:
            write_whole(self.outbox / report.name, report.read_bytes())
        return report


def draft_studies(
    model: FindingsModel,
    studies: Iterable[Study | None],
    journal: Journal,
    *,
    request: Mapping[str, Any],
    batch_size: int,
    extras: Extras,
    told: Listener,
) -> None:
    """Draft what is not in the journal yet, and write each result when it is there.

    A study's extras are written before its line, so that one whose line is on the disk is whole.

    Args:
        model: loaded for as many rows.
        studies: read lazily; None: there is nothing new now, and what has ended is written.
        journal: open.
        request: DRAFTING.
        batch_size: how many studies decode together. So many lines at most are not yet on the disk.
        extras: what is written beside.
        told: of each study, once its line is written.

    Raises:
        LiteError: the journal is of other settings, or there is no room.
    """
    journal.expect(model.settings)

    def submit(study: Study) -> Any:  # noqa: ANN401 - a draft
        return model.submit(study.image, study.reason, query=study.query, request_id=study.id, **request)

    todo = (study for study in studies if study is None or study.id not in journal.done)
    unsynced = 0
    for study, result in as_they_end(_ticking(todo, journal), submit, window=model.window(batch_size)):
        if isinstance(result, Cancelled):
            raise result
        if isinstance(result, Findings):
            extras.write(study, result)
        journal.add(study, result)
        unsynced += 1
        if unsynced >= batch_size:
            journal.sync()
            unsynced = 0
        told(study, result)


def _ticking(studies: Iterable[Study | None], journal: Journal) -> Iterable[Study | None]:
    """Have what is written on the disk while there is nothing new."""
    for study in studies:
        if study is None:
            journal.sync()
        yield study


def in_shard(study_id: str, shard: tuple[int, int]) -> bool:
    """Say whether a study belongs to shard i of n, counted from 1: by its id alone, so that all machines agree."""
    number, count = shard
    digest = hashlib.sha256(study_id.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") % count == number - 1
