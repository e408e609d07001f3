"""A whole bench: each artifact measured in a process of its own, one after the other.

    run_bench ──spawn──▶ measure(artifact 1) ──pipe──▶ Row ─┐
              ──spawn──▶ measure(artifact 2) ──pipe──▶ Row ─┴─▶ Bench

Two at a time would measure each other. A child that dies, of its memory as a rule, becomes a row that says so, and the
next one runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from lite.artifact.open import load_artifact, sha256_of
from lite.bench.costs import out_of_memory
from lite.bench.machine import machine, versions
from lite.bench.measure import Job, Progress, measure
from lite.bench.quality import NO_REFERENCE, NO_REPORTS, against_reports
from lite.bench.results import Bench, Draft, FailedRow, Provenance, ReportQuality, Row, StudyShown
from lite.bench.roofline import is_modelled
from lite.engines.machine import has_torch
from lite.engines.options import LoadOptions
from lite.errors import LiteError
from lite.eval.figures import RESAMPLES, Missing
from lite.eval.labels import unreadable
from lite.eval.record import check_studies
from lite.eval.record_file import read_record
from lite.studies.films import sha256_of_studies
from lite.studies.study import Study

_REHEARSAL: Final = Draft(id="rehearsal", text="Small left pleural effusion. No pneumothorax.")


def run_bench(job: Job, on_progress: Progress) -> Bench:
    """Measure every artifact of a job.

    Raises:
        LiteError: the record cannot be read, or is about other studies. What is wrong with one artifact alone makes
            a `FailedRow`.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    record = read_record(job.record) if job.record is not None else None
    if record is not None:
        check_studies(record, job.studies)
    if job.clinical.radgraph or job.clinical.chexbert is not None:
        # Weights that cannot be used are found now, and not when an artifact has been measured.
        against_reports([_REHEARSAL.text], [_REHEARSAL], job.clinical)
    rows = tuple(_row(job, name, path, options, on_progress) for name, path, options in _runs(job))
    reference_quality: ReportQuality | Missing = NO_REFERENCE
    if record is not None:
        drafts = [Draft(id=study.id, text=study.text) for study in record.info.studies]
        reference_quality = against_reports(job.reports, drafts, job.clinical)
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - `machine` asks it for the GPU, if it is there
    return Bench(
        provenance=Provenance(
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
        ),
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
            for index, (study, report) in enumerate(zip(job.studies, job.reports, strict=True))
        ),
        notes=_notes(job, rows),
    )


def _runs(job: Job) -> Iterator[tuple[str, Path, LoadOptions]]:
    """Yield what is measured: the name of its row, the artifact, and how."""
    for name, path, options in _by_adapter(job):
        if not job.image_tokens:
            yield name, path, options
        patches = _num_patches(path)
        for count in job.image_tokens:
            methods = job.image_methods if count != patches else job.image_methods[:1]
            for method in methods:
                how = f"{count}" if len(methods) == 1 else f"{count} {method}"
                changed = dataclasses.replace(options, image_tokens=count, image_method=method)
                yield f"{name} {how}", path, changed


def _num_patches(path: Path) -> int:
    try:
        return load_artifact(path).manifest.parts.vision.num_patches
    except LiteError:  # told of where it is measured
        return 0


def _by_adapter(job: Job) -> Iterator[tuple[str, Path, LoadOptions]]:
    """Yield each as it is, and with each of the adapters that it has."""
    for name, path, options in _by_engine(job):
        yield name, path, options
        has = _adapters(path)
        yield from (
            (f"{name} {a}", path, dataclasses.replace(options, adapters=(a,))) for a in job.adapters if a in has
        )


def _adapters(path: Path) -> Collection[str]:
    try:
        return load_artifact(path).manifest.parts.adapters.keys()
    except LiteError:  # told of where it is measured
        return ()


def _by_engine(job: Job) -> Iterator[tuple[str, Path, LoadOptions]]:
    """Yield each artifact; for both engines twice, if there are both."""
    for name, path in job.artifacts:
        if "" in job.ways:
            yield name, path, job.ways[""]
        elif not _has_onnx(path):
            yield name, path, job.ways["torch"]
        else:
            if has_torch():
                yield f"{name} torch", path, job.ways["torch"]
            yield f"{name} onnx", path, job.ways["onnx"]


def _has_onnx(path: Path) -> bool:
    try:
        return load_artifact(path).manifest.parts.decoder_onnx is not None
    except LiteError:  # told of where it is measured
        return False


def _calibrated_on(path: Path, studies: Sequence[Study]) -> int:
    """Count the films that an artifact's weights were rounded by, told by their bytes."""
    with contextlib.suppress(LiteError):  # told of where it is measured
        calibration = load_artifact(path).manifest.parts.decoder.calibration
        films = {*(calibration.films if calibration is not None else ())}
        return sum(sha256_of(study.path)[:16] in films for study in studies if films and study.path.is_file())
    return 0


def _notes(job: Job, rows: Sequence[Row | FailedRow]) -> tuple[str, ...]:
    """Return how to get the figures that are missing, each once."""
    notes: dict[str, None] = {}
    if "onnx" in job.ways:
        without = [name for name, path in job.artifacts if not _has_onnx(path)]
        notes |= dict.fromkeys(f"{name}: by torch alone, as it has no decoder.onnx." for name in without)
        if not has_torch() and len(without) < len(job.artifacts):
            notes["By onnx alone, as torch is not installed."] = None
    if any(isinstance(row, Row) and row.engine == "onnx" and is_modelled(row.plan.decoder_bytes) for row in rows):
        notes["Other cards are modelled for the torch engine only: --engine torch, or both."] = None
    for name, path in job.artifacts:
        if missing := [adapter for adapter in job.adapters if adapter not in _adapters(path)]:
            notes[f"{name}: has no adapter {' or '.join(missing)}."] = None
        if both := _calibrated_on(path, job.studies):
            notes[f"{name}: was calibrated on {both} of these {len(job.studies)} films: what it loses flatters."] = None
    if foreign := sum(unreadable(report) == "not in English" for report in job.reports):
        notes[f"{foreign} of {len(job.reports)} reports are not in English: they are in no figure."] = None
    for row in rows:
        if isinstance(row, FailedRow):
            continue
        figures: list[object] = [row.energy_j, row.traffic, row.record_quality, row.report_quality]
        for part in (row.record_quality, row.report_quality):
            if not isinstance(part, Missing):
                figures += [getattr(part, field.name) for field in dataclasses.fields(part)]
        for figure in figures:
            if isinstance(figure, Missing) and figure != NO_REPORTS and figure.todo:
                notes[f"{figure.why}: {figure.todo}"] = None
    return tuple(notes)


# -- A process for each artifact -------------------------------------------------------------------------------------


def _row(job: Job, name: str, path: Path, options: LoadOptions, on_progress: Progress) -> Row | FailedRow:
    # Spawned, not forked: a fork would begin with all that this process holds.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(sender, job, path, options, name), daemon=True)
    child.start()
    sender.close()  # the child's end: with it closed here, its death ends the pipe
    try:
        while isinstance(message := receiver.recv(), tuple):
            stage, done, total = message
            on_progress(f"{name}: {stage}", done, total)
    except EOFError as error:
        child.join()
        code = child.exitcode or 0
        if code == -signal.SIGINT:  # Ctrl-C reaches both, and the child's end may be seen first
            raise KeyboardInterrupt from error
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit status {code}"
        hint = " (out of memory, as a rule)" if code == -signal.SIGKILL else ""
        message = (
            f"{path}: got a process that {ended}{hint} · expected figures · see above, or give it a --memory-limit"
        )
    finally:
        child.terminate()
        child.join()
        receiver.close()
    return message if isinstance(message, Row) else FailedRow(name=name, path=str(path), error=message)


def _end_with_parent() -> None:
    """Wait until the bench has gone, however it went: nobody would read what this process still measured."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(sender: Connection, job: Job, path: Path, options: LoadOptions, name: str) -> None:
    """Run in the child: send progress, then the figures or the error's text."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches both: this one just ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        row = measure(job, path, options, name=name, on_progress=lambda *progress: sender.send(progress))
    except LiteError as error:
        sender.send(str(error))
        return
    except (MemoryError, RuntimeError) as error:
        what = out_of_memory(error)
        sender.send(f"{path}: got {what} · expected room for one study · take an artifact of fewer bits")
        return
    sender.send(row)
