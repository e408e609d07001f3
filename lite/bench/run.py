"""A whole bench: each artifact measured in a process of its own, then its texts judged in this one.

    run_bench ──spawn──▶ measure(artifact 1) ──pipe──▶ Measured ─┐
              ──spawn──▶ measure(artifact 2) ──pipe──▶ Measured ─┴─▶ quality ─▶ Bench

One after the other: two at a time would measure each other. A child that dies, of its memory as a rule, becomes a row
that says so, and the next one runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from lite.artifact.open import load_artifact
from lite.bench.costs import out_of_memory
from lite.bench.machine import machine, versions
from lite.bench.measure import Measured, Options, Progress, measure
from lite.bench.quality import NO_REFERENCE, NO_REPORTS, Clinical, against_record, against_reports
from lite.bench.results import Bench, Draft, FailedRow, Provenance, RecordQuality, ReportQuality, Row, StudyShown
from lite.bench.roofline import is_modelled
from lite.engines.machine import has_torch
from lite.errors import LiteError
from lite.eval.figures import RESAMPLES, Missing
from lite.eval.record import ReferenceRecord, check_studies
from lite.eval.record_file import read_record
from lite.studies.readers import sha256_of_studies
from lite.studies.study import Study

_REHEARSAL: Final = Draft(id="rehearsal", text="Small left pleural effusion. No pneumothorax.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to bench, and on what."""

    artifacts: tuple[tuple[str, Path], ...]  # each with what to call it
    studies: tuple[Study, ...]
    data: str  # where they come from, in words
    record: Path | None
    options: Options
    clinical: Clinical
    command: str
    reports_apply: bool = True  # False: the films are stand-ins, and what their reports say is of no interest


def run_bench(job: Job, on_progress: Progress) -> Bench:
    """Measure every artifact of a job.

    Args:
        job: what to do.
        on_progress: is told the artifact and the stage, how much of it is done, of how many.

    Raises:
        LiteError: the record cannot be read, or is about other studies. What is wrong with one artifact alone makes
            a `FailedRow`.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = read_record(job.record) if job.record is not None else None
    if record is not None:
        check_studies(record, job.studies)
    if job.clinical.radgraph or job.clinical.chexbert is not None:
        # Weights that cannot be used are found now, and not when every artifact has been measured.
        against_reports([_REHEARSAL.text], [_REHEARSAL], job.clinical)
    reports = [study.reference if job.reports_apply else "" for study in job.studies]
    rows = tuple(_rows(job, record, reports, on_progress))
    reference_quality: ReportQuality | Missing = NO_REFERENCE
    if record is not None:
        drafts = [Draft(id=study.id, text=study.text) for study in record.info.studies]
        reference_quality = against_reports(reports, drafts, job.clinical)
    return Bench(
        provenance=_provenance(job, record, started),
        rows=rows,
        reference_report_quality=reference_quality,
        studies=tuple(
            StudyShown(
                id=study.id,
                image=str(study.path),
                reason=study.reason,
                report=report or None,
                reference_text=None if record is None else record.texts[index],
            )
            for index, (study, report) in enumerate(zip(job.studies, reports, strict=True))
        ),
        notes=_notes(job, rows),
    )


def _rows(
    job: Job, record: ReferenceRecord | None, reports: Sequence[str], on_progress: Progress
) -> Iterator[Row | FailedRow]:
    for name, path, options in _runs(job):
        try:
            measured = _in_own_process(dataclasses.replace(job, options=options), name, path, on_progress)
            on_progress(f"{name}: judging the texts", 0, 1)
            yield _judged(measured, record, reports, job.clinical)
        except LiteError as error:
            yield FailedRow(name=name, path=str(path), error=str(error))


def _provenance(job: Job, record: ReferenceRecord | None, started: str) -> Provenance:
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - `machine` asks it for the GPU, if it is there
    return Provenance(
        command=job.command,
        started=started,
        machine=machine(),
        versions=versions(),
        data=job.data,
        data_sha256=sha256_of_studies(job.studies),
        num_studies=len(job.studies),
        reference=None if record is None else f"{record.describe()}; {record.describe_tail()}",
        seed=0,
        resamples=RESAMPLES,
    )


def _judged(measured: Measured, record: ReferenceRecord | None, reports: Sequence[str], clinical: Clinical) -> Row:
    row, divergences = measured.row, measured.divergences
    quality: RecordQuality | Missing = NO_REFERENCE
    if record is not None:
        quality = against_record(record.texts, row.drafts, divergences, kl_gap_limit=measured.kl_gap_limit)
    return dataclasses.replace(
        row, record_quality=quality, report_quality=against_reports(reports, row.drafts, clinical)
    )


def _runs(job: Job) -> Iterator[tuple[str, Path, Options]]:
    """Yield what is measured: the name of its row, the artifact, and how; for both engines twice, if there are both."""
    options = job.options
    if options.engine != "both":
        yield from ((name, path, options) for name, path in job.artifacts)
        return
    # int8 both have; of the floats each computes with its own.
    torch = dataclasses.replace(options, engine="torch", provider=None)
    if torch.cache_dtype != "int8":
        torch = dataclasses.replace(torch, cache_dtype=None)
    onnx = dataclasses.replace(options, engine="onnx", device="auto", dtype=None)
    for name, path in job.artifacts:
        try:
            has_onnx = load_artifact(path).manifest.parts.decoder_onnx is not None
        except LiteError:  # told of where it is measured
            has_onnx = False
        if not has_onnx:
            yield name, path, torch
            continue
        if has_torch():
            yield f"{name} torch", path, torch
        yield f"{name} onnx", path, onnx


def _notes(job: Job, rows: Sequence[Row | FailedRow]) -> tuple[str, ...]:
    """Return how to get the figures that are missing, each once."""
    notes: dict[str, None] = {}
    if job.options.engine == "both":
        without = [name for name, path in job.artifacts if load_artifact(path).manifest.parts.decoder_onnx is None]
        notes |= dict.fromkeys(f"{name}: by torch alone, as it has no decoder.onnx." for name in without)
        if not has_torch() and len(without) < len(job.artifacts):
            notes["By onnx alone, as torch is not installed."] = None
    if any(isinstance(row, Row) and row.engine == "onnx" and is_modelled(row.plan.decoder_bytes) for row in rows):
        notes["Other cards are modelled for the torch engine only: --engine torch, or both."] = None
    for row in rows:
        if isinstance(row, FailedRow):
            continue
        figures: list[object] = [row.energy_j, row.traffic, row.record_quality, row.report_quality]
        for part in (row.record_quality, row.report_quality):
            if not isinstance(part, Missing):
                figures += [getattr(part, field.name) for field in dataclasses.fields(part)]
        for figure in figures:
            if isinstance(figure, Missing) and figure is not NO_REPORTS and figure.todo:
                notes[f"{figure.why}: {figure.todo}"] = None
    return tuple(notes)


# -- A process for each artifact -------------------------------------------------------------------------------------


def _in_own_process(job: Job, name: str, path: Path, on_progress: Progress) -> Measured:
    # Spawned, not forked: a fork would begin with all that this process holds.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, job, name, path), daemon=True)
    child.start()
    sender.close()  # the child's end: with it closed here, its death ends the pipe
    try:
        return _await(receiver, name, on_progress)
    except EOFError as error:
        child.join()
        code = child.exitcode or 0
        if code == -signal.SIGINT:  # Ctrl-C reaches both, and the child's end may be seen first
            raise KeyboardInterrupt from error
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
        hint = " (out of memory, as a rule)" if code == -signal.SIGKILL else ""
        msg = f"{path}: got a process that {ended}{hint} · expected figures · see above, or give it a --memory-limit"
        raise LiteError(msg) from error
    finally:
        child.terminate()
        child.join()
        receiver.close()


def _await(receiver: Connection, name: str, on_progress: Progress) -> Measured:
    while True:
        message = receiver.recv()
        if isinstance(message, Measured):
            return message
        if isinstance(message, LiteError):
            raise message
        stage, done, total = message
        on_progress(f"{name}: {stage}", done, total)


def _end_with_parent() -> None:
    """Wait until the bench has gone, however it went: nobody would read what this process still measured."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(sender: Connection, job: Job, name: str, path: Path) -> None:
    """Run in the child: send progress, then the figures or the error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches both: this one just ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        measured = measure(
            path,
            job.studies,
            job.options,
            name=name,
            record=job.record,
            on_progress=lambda stage, done, total: sender.send((stage, done, total)),
        )
    except LiteError as error:
        # Its class may carry more than text; the text is what is shown.
        sender.send(LiteError(str(error)))
        return
    except (MemoryError, RuntimeError) as error:
        what = out_of_memory(error)
        sender.send(LiteError(f"{path}: got {what} · expected room for one study · take an artifact of fewer bits"))
        return
    sender.send(measured)
