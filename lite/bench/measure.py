"""One artifact, measured through the public functions alone: `lite.load`, `findings`, `findings_batch`, `score`.

    load ─▶ warm-up ─▶ studies one by one ─▶ in batches ─▶ bandwidth ─▶ scored along the reference's texts
              └ memory by stage       └ texts

It belongs into a process of its own (`lite.bench.run` gives it one): memory peaks are those of a process, and what one
artifact has warmed or loaded would be counted for the next.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from lite.artifact.open import load_artifact
from lite.bench.costs import counted, disk_bytes, latency_of, memory_use, out_of_memory, peaks_of, traffic_of
from lite.bench.machine import EnergyMeter, energy_meter
from lite.bench.results import Draft, NotRun, Row, Throughput
from lite.engines.machine import look
from lite.engines.options import LoadOptions
from lite.engines.protocol import EngineName
from lite.engines.resolve import resolve
from lite.errors import LiteError, MemoryBudgetError
from lite.eval.divergence import StudyDivergence
from lite.eval.figures import Missing, quantiles
from lite.eval.record import ReferenceRecord, check_record
from lite.eval.record_file import read_record
from lite.memory.plan import MemoryPlan, check_memory
from lite.memory.process import rss_bytes
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.artifact.open import Artifact
    from lite.artifact.parts import CacheDtype
    from lite.model import FindingsModel
    from lite.studies.results import Findings

T = TypeVar("T")

BATCH_ROUNDS: Final = 3
BATCH_SECONDS: Final = 60.0
"""Rounds of a batch size end with the first that ends after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure. What is said of one engine alone does not reach the other."""

    engine: Literal["auto", "torch", "onnx", "both"] = "auto"  # `measure` takes one; "both" is for `run_bench`
    device: str = "auto"  # of torch, as the next
    dtype: str | None = None
    provider: str | None = None  # of onnx, as the next
    cache_dtype: CacheDtype | None = None
    batch_sizes: tuple[int, ...] = (1, 4)
    min_runs: int = 20  # studies one by one; fewer studies are gone through several times
    num_warmup: int = 2
    max_new_tokens: int | None = None
    memory_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row whose texts have not been judged yet, and what the judgement takes."""

    row: Row
    divergences: tuple[StudyDivergence, ...]  # for each study of the record; none without one
    kl_gap_limit: float  # see RecordQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One study through `findings`."""

    findings: Findings
    energy_j: float | None


Progress = Callable[[str, int, int], None]
"""Is told what is done, how much of it, of how many."""


def measure(
    path: Path,
    studies: Sequence[Study],
    options: Options,
    *,
    name: str,
    record: Path | None,
    on_progress: Progress,
) -> Measured:
    """Measure an artifact in this process, which should do nothing else.

    Args:
        path: the artifact.
        studies: at least one; a film that cannot be read is counted and left out.
        options: how.
        name: what to call it.
        record: the reference record, to score against.
        on_progress: see `Progress`.

    Raises:
        LiteError: nothing can be measured: it cannot be loaded, takes more than the memory limit even for one study,
            does not belong to the record, or none of the films can be read.
    """
    artifact = load_artifact(path)
    reference = _reference(record, artifact, studies)
    import lite

    chosen = _load_options(options)
    # To look imports the engine's packages: they are no part of the artifact's memory, nor of its load time.
    engine = resolve(chosen, artifact, look(chosen, artifact)).engine
    before = rss_bytes() or 0
    on_progress("loading", 0, 1)
    verify_s, _ = _timed(lambda: artifact.verify(engine=engine))
    load_s, model = _timed(lambda: lite.load(path, **dataclasses.asdict(chosen)))
    loaded = peaks_of(model)
    meter = _meter(engine, str(model.decoder.device))
    warm = _warm_up(model, studies, options)
    runs, drafts = _run_singly(model, studies, options, meter, on_progress)
    longest = max(run.findings.num_prompt_tokens for run in runs)
    planned = functools.partial(model.plan.with_rows, num_prompt_tokens=longest, max_new_tokens=options.max_new_tokens)
    usable = [study for study, draft in zip(studies, drafts, strict=True) if draft.error is None]
    batches = tuple(_batches(model, usable, options, planned, on_progress))
    on_progress("bandwidth", 0, 1)
    traffic = traffic_of(artifact, [run.findings for run in runs])
    plan = planned(1)
    row = Row(
        **_what_ran(name, artifact, engine, warm[0]),
        weight_bytes=plan.decoder_bytes + plan.vision_bytes,
        verify_s=verify_s,
        load_s=load_s,
        first_total_s=warm[0].timings.total_s,
        **_of_runs([run.findings for run in runs]),
        num_warmup=len(warm),
        batches=batches,
        plan=plan,
        memory=memory_use(before, loaded, warm[0]),
        traffic=traffic,
        energy_j=meter if isinstance(meter, Missing) else quantiles([run.energy_j or 0.0 for run in runs]),
        record_quality=_NOT_JUDGED,
        report_quality=_NOT_JUDGED,
        drafts=drafts,
    )
    divergences, kl_gap_limit = _scored(model, reference, studies, on_progress)
    return Measured(row=row, divergences=divergences, kl_gap_limit=kl_gap_limit)


def _reference(record: Path | None, artifact: Artifact, studies: Sequence[Study]) -> ReferenceRecord | None:
    if record is None:
        return None
    reference = read_record(record)
    check_record(reference, artifact, studies)
    return reference


def _scored(
    model: FindingsModel, reference: ReferenceRecord | None, studies: Sequence[Study], on_progress: Progress
) -> tuple[tuple[StudyDivergence, ...], float]:
    """Score a model along the reference's texts; return also by how much the KL is too low at most, in the mean."""
    divergences: list[StudyDivergence] = []
    gaps: list[float] = []
    if reference is None:
        return (), 0.0
    for index, study in enumerate(studies):
        on_progress("scoring", index, len(studies))
        logits = model.score(study.image, reference.token_ids(index), study.reason)
        divergences.append(reference.compare(index, logits))
        gaps.extend(reference.gap_limit(index, logits))
    return tuple(divergences), float(np.mean(gaps))


def _what_ran(name: str, artifact: Artifact, engine: EngineName, first: Findings) -> dict[str, Any]:
    """Return what a row says of the artifact and its settings."""
    parts = artifact.manifest.parts
    names = ("artifact_id", "engine", "device", "dtype", "cache_dtype", "backend", "fallbacks", "notice")
    return {field: getattr(first, field) for field in names} | {
        "name": name,
        "path": str(artifact.path),
        "model": artifact.manifest.model,
        "decoder_format": parts.decoder.describe(),
        "vision_format": parts.vision.format,
        "provider": first.provider.removesuffix("ExecutionProvider"),
        "disk_bytes": disk_bytes(artifact, engine),
    }


def _of_runs(runs: Sequence[Findings]) -> dict[str, Any]:
    return {
        "latency": latency_of(runs),
        "num_runs": len(runs),
        "num_prompt_tokens": int(np.median([findings.num_prompt_tokens for findings in runs])),
        "tokens_per_study": float(np.mean([findings.num_new_tokens for findings in runs])),
    }


_NOT_JUDGED: Final = Missing(why="not judged yet")


def _load_options(options: Options) -> LoadOptions:
    names = ("device", "dtype", "provider", "cache_dtype", "memory_limit")
    engine = "auto" if options.engine == "both" else options.engine
    return LoadOptions(engine=engine, verify=False, **{name: getattr(options, name) for name in names})


def _meter(engine: EngineName, device: str) -> EnergyMeter | Missing:
    if engine == "onnx" and device != "cpu":
        return Missing(why="not read", todo="Energy is read of the GPU that torch names, not of ONNX Runtime's.")
    return energy_meter(device)


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _warm_up(model: FindingsModel, studies: Sequence[Study], options: Options) -> list[Findings]:
    """Run the first studies that can be read; the very first tells what each stage adds to the memory."""
    done: list[Findings] = []
    errors: list[LiteError] = []
    for study in itertools.chain(studies, itertools.cycle(studies)):
        try:
            done.append(model.findings(study.image, study.reason, max_new_tokens=options.max_new_tokens, reuse=False))
        except LiteError as error:
            errors.append(error)
        if len(done) == max(1, options.num_warmup):
            return done
        if len(errors) == len(studies):
            raise errors[0]
    return done


def _run_singly(
    model: FindingsModel,
    studies: Sequence[Study],
    options: Options,
    meter: EnergyMeter | Missing,
    on_progress: Progress,
) -> tuple[list[_Run], tuple[Draft, ...]]:
    """Run every study by itself, those that can be read again until there are `min_runs`."""
    runs: list[_Run] = []
    drafts: list[Draft] = []
    usable: list[Study] = []
    total = max(options.min_runs, len(studies))
    for study in studies:
        on_progress("one by one", len(runs), total)
        try:
            run = _run(model, study, options, meter)
        except LiteError as error:
            drafts.append(Draft(id=study.id, text="", error=str(error)))
            continue
        runs.append(run)
        usable.append(study)
        drafts.append(Draft(id=study.id, text=run.findings.text))
    for study in itertools.cycle(usable):
        if len(runs) >= options.min_runs:
            break
        on_progress("one by one", len(runs), total)
        runs.append(_run(model, study, options, meter))
    return runs, tuple(drafts)


def _run(model: FindingsModel, study: Study, options: Options, meter: EnergyMeter | Missing) -> _Run:
    before = None if isinstance(meter, Missing) else meter.read()
    findings = model.findings(study.image, study.reason, max_new_tokens=options.max_new_tokens, reuse=False)
    used = None if isinstance(meter, Missing) or before is None else meter.read() - before
    return _Run(findings=findings, energy_j=used)


# -- Batches ---------------------------------------------------------------------------------------------------------


def _batches(
    model: FindingsModel,
    studies: Sequence[Study],
    options: Options,
    planned: Callable[[int], MemoryPlan],
    on_progress: Progress,
) -> Iterator[Throughput | NotRun]:
    """Yield what each batch size gives, the small ones first: the process's peak belongs to the largest so far."""
    for batch_size in sorted(set(options.batch_sizes)):
        plan = planned(batch_size)
        try:
            if options.memory_limit is not None:
                check_memory(plan, options.memory_limit, what=f"batches of {batch_size}")
            on_progress(f"batches of {batch_size}", 0, 1)
            yield _throughput(model, studies, batch_size, options, plan)
        except LiteError as error:
            yield NotRun(batch_size=batch_size, why=str(error), plan=plan)
        except (MemoryError, RuntimeError) as error:
            yield NotRun(batch_size=batch_size, why=out_of_memory(error), plan=plan)


def _throughput(
    model: FindingsModel, studies: Sequence[Study], batch_size: int, options: Options, plan: MemoryPlan
) -> Throughput:
    """Run all studies in batches, some rounds of it. Whole batches only: a last half-empty one would tell nothing."""
    count = max(len(studies) // batch_size, 1) * batch_size
    chosen = list(itertools.islice(itertools.cycle(studies), count))
    rates: list[float] = []
    token_rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < BATCH_ROUNDS and (not rates or time.perf_counter() - started < BATCH_SECONDS):
        seconds, results = _timed(lambda: _drafted(model, chosen, batch_size, options))
        rates.append(60.0 * count / seconds)
        token_rates.append(sum(findings.num_new_tokens for findings in results) / seconds)
        if (rows := min(findings.timings.batch_size for findings in results)) < batch_size:
            msg = f"got a batch of {batch_size} · expected {rows}, all that fit into the memory · take fewer at a time"
            raise MemoryBudgetError(msg)
    return Throughput(
        batch_size=batch_size,
        num_studies=count,
        studies_per_min=quantiles(rates),
        tokens_per_s=float(np.median(token_rates)),
        plan=plan,
        peak_bytes=counted(peaks_of(model)),
    )


def _drafted(model: FindingsModel, studies: Sequence[Study], batch_size: int, options: Options) -> list[Findings]:
    import lite

    results = model.findings_batch(
        [(study.image, study.reason) for study in studies],
        batch_size=batch_size,
        max_new_tokens=options.max_new_tokens,
        reuse=False,
    )
    done: list[Findings] = []
    for result in results:
        if isinstance(result, lite.StudyError):
            raise result.error
        done.append(result)
    return done
