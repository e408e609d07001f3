"""Studies drafted into a journal: the loop that all doors of a cohort share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from lite.console import say
from lite.errors import Cancelled, ImageError, LiteError
from lite.files import disk_errors_explained, partial_name, safe_name, write_whole
from lite.session.draft import as_they_end
from lite.studies.results import SHORT_NOTICE, Findings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from lite.model import FindingsModel
    from lite.studies.journal import Journal
    from lite.studies.results import Result
    from lite.studies.study import Study

DRAFTING: Final = ("max_new_tokens", "rendering", "any_film", "adapter")
"""What a run asks for beside its studies, by the names of `lite.session.prepare.Asked`'s fields."""


class Listener(Protocol):
    """Whoever is told of each study as it ends."""

    def __call__(self, study: Study, result: Findings | LiteError) -> None:
        """Take it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What is made of a study's line: a text, and a DICOM report where its film is a DICOM file.

    They are not sent to the disk one by one, unless they are to last: what a power cut has taken is made again when the
    run goes on.
    """

    text_dir: Path | None = None
    sr_dir: Path | None = None
    outbox: Path | None = None  # where a report is put, too, until it is sent
    lasting: bool = False  # each is on the disk before the line is: of films that do not stay

    def mend(self, result: Result) -> None:
        """Write what is not there, of a study that is done.

        Raises:
            LiteError: it cannot be written.
        """
        findings = result.findings
        if findings is not None and not all(_is_there(file) for file in self._files(result.study, findings)):
            self.write(result.study, findings)

    def write(self, study: Study, findings: Findings) -> None:
        """Write them. A film without UIDs has no report, and a note says so.

        Raises:
            LiteError: they cannot be written.
        """
        write = write_whole if self.lasting else _write
        for file in self._files(study, findings):
            if file.suffix == ".txt":
                write(file, f"{findings.text}\n\n{SHORT_NOTICE}\n".encode("utf-8", "backslashreplace"))
                continue
            from lite.studies.report import encoded_report

            try:
                report = encoded_report(study.path, findings)
            except ImageError as error:
                say(f"note: {error}")
                continue
            write(file, report)
            if self.outbox is not None:
                write(self.outbox / file.name, report)

    def _files(self, study: Study, findings: Findings) -> Iterator[Path]:
        if self.text_dir is not None:
            yield self.text_dir / safe_name(study.id, ".txt")
        if self.sr_dir is not None and findings.film is not None and findings.film.format == "DICOM":
            yield self.sr_dir / safe_name(study.id, ".dcm")


def _write(file: Path, data: bytes) -> None:
    with disk_errors_explained(file):
        partial = partial_name(file)
        try:
            partial.write_bytes(data)
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
        partial.replace(file)


def _is_there(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def draft_studies(
    model: FindingsModel,
    studies: Iterable[Study | None],
    journal: Journal,
    *,
    request: Mapping[str, Any],
    batch_size: int,
    extras: Extras,
    told: Listener,
    add_sentences: Callable[[Findings], Findings] = lambda findings: findings,
) -> None:
    """Draft what is not in the journal yet, and write each result when it is there.

    A study's extras are written before its line, so that one whose line is on the disk is whole.

    Args:
        model: loaded for as many rows.
        studies: read lazily; None: there is nothing new now, and what has ended is written.
        journal: open.
        request: DRAFTING, and what else `submit` is told.
        batch_size: how many studies decode together. Twice as many lines at most are not yet on the disk.
        extras: what is written beside.
        told: of each study, once its line is written.
        add_sentences: to findings, before they are written.

    Raises:
        LiteError: the journal is of other settings, or there is no room.
    """
    journal.expect(model.settings)

    def submit(study: Study) -> Any:  # noqa: ANN401 - a draft
        return model.submit(study.image, study.reason, query=study.query, request_id=study.id, **request)

    todo = (study for study in studies if study is None or study.id not in journal.done)
    unsynced, samples = 0, request.get("samples", 0)
    window = max(2, model.window(batch_size) // (1 + samples)) if samples else model.window(batch_size)
    for study, result in as_they_end(_ticking(todo, journal), submit, window=window):
        if isinstance(result, Cancelled):
            raise result
        if isinstance(result, Findings):
            result = add_sentences(result)
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
            journal.sync(wait=True)
        yield study


def in_shard(study_id: str, shard: tuple[int, int]) -> bool:
    """Say whether a study belongs to shard i of n, counted from 1: by its id alone, so that all machines agree."""
    number, count = shard
    digest = hashlib.sha256(study_id.encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:8], "big") % count == number - 1
