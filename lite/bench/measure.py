"""One artifact, measured through the public functions alone: `lite.load`, `findings`, `findings_batch`, `score`.

    load ─▶ warm-up ─▶ studies one by one ─▶ in batches ─▶ bandwidth ─▶ scored along the reference's texts
              └ memory by stage       └ texts

It belongs into a process of its own (`lite.bench.run` gives it one): memory peaks are those of a process, and what one
artifact has warmed or loaded would be counted for the next.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from lite.artifact import load_artifact
from lite.bench.divergence import StudyDivergence
from lite.bench.machine import EnergyMeter, energy_meter, streaming_read_bandwidth
from lite.bench.record import check_record, read_record
from lite.bench.results import Draft, Latency, MemoryUse, Missing, NotRun, Quantiles, Row, Throughput, Traffic
from lite.bench.studies import ListedStudy, sha256_of_studies
from lite.errors import LiteError
from lite.memory import (
    ITEMSIZE,
    MemoryPlan,
    Peaks,
    cache_bytes_per_token,
    check_memory,
    head_bytes,
    layer_bytes,
    plan_memory,
    rss_bytes,
)

if TYPE_CHECKING:
    from lite.artifact import Artifact
    from lite.model import Findings, FindingsModel

T = TypeVar("T")

BATCH_ROUNDS: Final = 3
BATCH_SECONDS: Final = 60.0
"""Rounds of a batch size end with the first that ends after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to measure."""

    device: str = "auto"
    dtype: str | None = None
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
    studies: Sequence[ListedStudy],
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
    reference = read_record(record) if record is not None else None
    if reference is not None:
        check_record(reference, artifact, sha256_of_studies(studies))
    import lite
    from lite.decoder import check_device  # brings in torch, which is no part of the artifact's memory

    device = check_device(options.device)
    before = rss_bytes() or 0
    on_progress("loading", 0, 1)
    verify_s, _ = _timed(artifact.verify)
    load_s, model = _timed(
        lambda: lite.load(path, device=device, dtype=options.dtype, memory_limit=options.memory_limit, verify=False)
    )
    loaded = _peaks(model)
    meter = energy_meter(device)
    warm = _warm_up(model, studies, options)
    runs, drafts = _run_singly(model, studies, options, meter, on_progress)
    planned = _Planner(artifact, options, [run.findings for run in runs], libraries_bytes=before)
    usable = [study for study, draft in zip(studies, drafts, strict=True) if draft.error is None]
    batches = tuple(_batches(model, usable, options, planned, on_progress))
    on_progress("bandwidth", 0, 1)
    bandwidth = streaming_read_bandwidth(device)
    divergences: list[StudyDivergence] = []
    gaps: list[float] = []
    if reference is not None:
        for index, study in enumerate(studies):
            on_progress("scoring", index, len(studies))
            logits = model.score(study.image, reference.token_ids(index), study.reason)
            divergences.append(reference.compare(index, logits))
            gaps.extend(reference.gap_limit(index, logits))
    first = warm[0]
    manifest, plan = artifact.manifest, planned(1)
    row = Row(
        name=name,
        path=str(path),
        artifact_id=artifact.id,
        model=manifest.model,
        decoder_format=manifest.decoder.describe(),
        vision_format=manifest.vision.format,
        engine="torch",
        device=first.device,
        dtype=first.dtype,
        provider=first.provider.removesuffix("ExecutionProvider"),
        disk_bytes=artifact.nbytes,
        weight_bytes=plan.decoder_bytes + plan.vision_bytes,
        verify_s=verify_s,
        load_s=load_s,
        first_total_s=first.timings.total_s,
        latency=_latency([run.findings for run in runs]),
        num_runs=len(runs),
        num_warmup=len(warm),
        num_prompt_tokens=int(np.median([run.findings.num_prompt_tokens for run in runs])),
        tokens_per_study=float(np.mean([run.findings.num_new_tokens for run in runs])),
        batches=batches,
        plan=plan,
        memory=_memory_use(before, loaded, first),
        traffic=_traffic(model, [run.findings for run in runs], bandwidth),
        energy_j=meter if isinstance(meter, Missing) else quantiles([run.energy_j or 0.0 for run in runs]),
        record_quality=_NOT_JUDGED,
        report_quality=_NOT_JUDGED,
        drafts=drafts,
        notice=model.notice,
    )
    return Measured(row=row, divergences=tuple(divergences), kl_gap_limit=float(np.mean(gaps or [0.0])))


_NOT_JUDGED: Final = Missing(why="not judged yet")


def quantiles(values: Sequence[float]) -> Quantiles:
    """Summarise how long something took: at least one value."""
    p20, p50, p80, p90, p99 = np.percentile(values, (20, 50, 80, 90, 99)).tolist()
    return Quantiles(p20=p20, p50=p50, p80=p80, p90=p90, p99=p99, count=len(values))


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _warm_up(model: FindingsModel, studies: Sequence[ListedStudy], options: Options) -> list[Findings]:
    """Run the first studies that can be read; the very first tells what each stage adds to the memory."""
    done: list[Findings] = []
    errors: list[LiteError] = []
    for study in itertools.chain(studies, itertools.cycle(studies)):
        try:
            done.append(model.findings(study.image, study.reason, max_new_tokens=options.max_new_tokens))
        except LiteError as error:
            errors.append(error)
        if len(done) == max(1, options.num_warmup):
            return done
        if len(errors) == len(studies):
            raise errors[0]
    return done


def _run_singly(
    model: FindingsModel,
    studies: Sequence[ListedStudy],
    options: Options,
    meter: EnergyMeter | Missing,
    on_progress: Progress,
) -> tuple[list[_Run], tuple[Draft, ...]]:
    """Run every study by itself, those that can be read again until there are `min_runs`."""
    runs: list[_Run] = []
    drafts: list[Draft] = []
    usable: list[ListedStudy] = []
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


def _run(model: FindingsModel, study: ListedStudy, options: Options, meter: EnergyMeter | Missing) -> _Run:
    before = None if isinstance(meter, Missing) else meter.read()
    findings = model.findings(study.image, study.reason, max_new_tokens=options.max_new_tokens)
    used = None if isinstance(meter, Missing) or before is None else meter.read() - before
    return _Run(findings=findings, energy_j=used)


def _latency(runs: Sequence[Findings]) -> Latency:
    timings = [findings.timings for findings in runs]
    steps = [step for timing in timings for step in timing.decode_steps_s]
    return Latency(
        image=quantiles([timing.image_s for timing in timings]),
        vision=quantiles([timing.vision_s for timing in timings]),
        prefill=quantiles([timing.prefill_s for timing in timings]),
        # A text of one token has no further one: then nothing was decoded, in no time.
        decode_token=quantiles(steps or [0.0]),
        ttft=quantiles([timing.ttft_s for timing in timings]),
        total=quantiles([timing.total_s for timing in timings]),
    )


# -- Batches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Planner:
    """Plans the memory of any batch size, for prompts as long as the longest of these studies."""

    artifact: Artifact
    options: Options
    runs: Sequence[Findings]
    libraries_bytes: int

    def __call__(self, batch_size: int) -> MemoryPlan:
        return plan_memory(
            self.artifact,
            device=self.runs[0].device,
            dtype=self.options.dtype,
            batch_size=batch_size,
            num_prompt_tokens=max(findings.num_prompt_tokens for findings in self.runs),
            max_new_tokens=self.options.max_new_tokens,
            libraries_bytes=self.libraries_bytes,
        )


def _batches(
    model: FindingsModel,
    studies: Sequence[ListedStudy],
    options: Options,
    planned: _Planner,
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


def out_of_memory(error: MemoryError | RuntimeError) -> str:
    """Return what an error says of the memory that there was not; raise it again if it is about something else.

    torch's own error for a full GPU is a RuntimeError, and that for a full CPU nothing but one.
    """
    if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
        raise error
    return str(error).partition("\n")[0] or "out of memory"


def _throughput(
    model: FindingsModel, studies: Sequence[ListedStudy], batch_size: int, options: Options, plan: MemoryPlan
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
    return Throughput(
        batch_size=batch_size,
        num_studies=count,
        studies_per_min=quantiles(rates),
        tokens_per_s=float(np.median(token_rates)),
        plan=plan,
        peak_bytes=_of_kind(_peaks(model), results[0].device),
    )


def _drafted(model: FindingsModel, studies: Sequence[ListedStudy], batch_size: int, options: Options) -> list[Findings]:
    import lite

    results = model.findings_batch(
        [(study.image, study.reason) for study in studies],
        batch_size=batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    done: list[Findings] = []
    for result in results:
        if isinstance(result, lite.StudyError):
            raise result.error
        done.append(result)
    return done


# -- Memory and traffic ----------------------------------------------------------------------------------------------


def _peaks(model: FindingsModel) -> Peaks:
    from lite.memory import peak_rss_bytes

    return Peaks(rss_bytes=peak_rss_bytes(), vram_bytes=model.decoder.peak_vram_bytes())


def _of_kind(peaks: Peaks, device: str) -> int:
    """Return what counts on a device: resident memory on a CPU, that of torch's allocator on a GPU."""
    return (peaks.rss_bytes if device == "cpu" else peaks.vram_bytes) or 0


def _memory_use(before: int, loaded: Peaks, first: Findings) -> MemoryUse:
    device, memory = first.device, first.memory
    return MemoryUse(
        kind="RSS" if device == "cpu" else "VRAM",
        before_bytes=before if device == "cpu" else 0,
        load_bytes=_of_kind(loaded, device),
        image_bytes=_of_kind(memory.image, device),
        vision_bytes=_of_kind(memory.vision, device),
        prefill_bytes=_of_kind(memory.prefill, device),
        decode_bytes=_of_kind(memory.decode, device),
    )


def _traffic(model: FindingsModel, runs: Sequence[Findings], bandwidth: float) -> Traffic:
    config, itemsize = model.artifact.decoder_config(), ITEMSIZE[runs[0].dtype]
    weights = config.num_hidden_layers * layer_bytes(config, itemsize=itemsize) + head_bytes(config, itemsize=itemsize)
    context = np.median([findings.num_prompt_tokens + findings.num_new_tokens / 2 for findings in runs])
    cache = int(context * cache_bytes_per_token(config, itemsize=itemsize))
    token_s = _latency(runs).decode_token.p50
    return Traffic(
        weight_bytes=weights,
        cache_bytes=cache,
        bandwidth=bandwidth,
        achieved=(weights + cache) / token_s if token_s else 0.0,
    )
