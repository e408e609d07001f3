"""One artifact, measured through the public functions alone: `lite.load`, `findings`, `findings_batch`, `score`.

    load ─▶ warm-up ─▶ studies one by one ─▶ in batches ─▶ bandwidth ─▶ along the reference's texts ─▶ texts judged
              └ memory by stage       └ texts

It wants a process of its own (`lite.bench.run` gives it one): memory peaks are those of a process, and what one
artifact has warmed or loaded would be counted for the next.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from lite.artifact.open import load_artifact
from lite.bench.costs import counted, disk_bytes, latency_of, memory_use, out_of_memory, peak_now, traffic_of
from lite.bench.machine import energy_meter
from lite.bench.quality import NO_REFERENCE, Clinical, against_record, against_reports
from lite.bench.results import Draft, NotRun, Row, Throughput
from lite.engines.machine import look
from lite.engines.options import LoadOptions
from lite.engines.protocol import EngineName
from lite.engines.resolve import resolve
from lite.errors import LiteError, MemoryBudgetError
from lite.eval.calibration import find_calibration, with_sentences
from lite.eval.confidence import TOP
from lite.eval.figures import Missing, quantiles
from lite.eval.record import ReferenceRecord, check_record
from lite.eval.record_file import read_record
from lite.memory.plan import MemoryPlan, check_memory
from lite.memory.process import rss_bytes, use_large_pages
from lite.studies.study import Study

if TYPE_CHECKING:
    from typing import Unpack

    from lite.artifact.open import Artifact
    from lite.artifact.parts import ImageMethod
    from lite.eval.calibration import Calibration
    from lite.model import FindingsModel
    from lite.session.prepare import Options
    from lite.studies.results import Findings, Sentence

T = TypeVar("T")

NUM_WARMUP: Final = 2
BATCH_ROUNDS: Final = 3
BATCH_SECONDS: Final = 60.0
"""Rounds of a batch size end with the first that ends after so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to bench, on what, and how."""

    artifacts: tuple[tuple[str, Path], ...]  # each with what to call it
    ways: dict[str, LoadOptions]  # to load each: one, "", or one by the name of each engine
    image_tokens: tuple[int, ...] = ()  # and each of these so often: with so many image tokens; none: all patches
    image_methods: tuple[ImageMethod, ...] = ("diverse",)  # made in each of these ways
    adapters: tuple[str, ...] = ()  # and again with each of these
    studies: tuple[Study, ...]  # at least one; a film that cannot be read is counted and left out
    data: str  # where they come from, in words
    record: Path | None = None  # to score against
    batch_sizes: tuple[int, ...]
    min_runs: int  # studies one by one; fewer studies are gone through several times
    max_new_tokens: int | None = None
    clinical: Clinical
    command: str

    @property
    def reports(self) -> list[str]:
        """What the data says of each study."""
        return [study.reference for study in self.studies]


Progress = Callable[[str, int, int], None]
"""Is told what is done, how much of it, of how many."""


def measure(job: Job, path: Path, options: LoadOptions, *, name: str, on_progress: Progress) -> Row:
    """Measure an artifact in this process, which should do nothing else.

    Raises:
        LiteError: nothing can be measured: it cannot be loaded, takes more than the memory limit even for one study,
            does not belong to the record, or none of the films can be read.
    """
    artifact = load_artifact(path)
    reference = _reference(job, artifact)
    import lite

    # To look imports the engine's packages: they are no part of the artifact's memory, nor of its load time.
    found = resolve(options, artifact, look(options, artifact))
    engine, adapters = found.engine, found.adapters
    before = rss_bytes() or 0
    on_progress("loading", 0, 1)
    verify_s, _ = _timed(lambda: artifact.verify(engine=engine, adapters=adapters))
    load_s, model = _timed(lambda: lite.load(path, **dataclasses.asdict(options)))
    loaded = peak_now(model)
    use_large_pages()  # as whatever drafts many studies
    adapter = next(iter(options.adapters), None)
    calibration = find_calibration("auto", model, adapter)  # is refused now, and not when all is measured
    loop = _Loop(model=model, job=job, on_progress=on_progress, adapter=adapter, calibration=calibration)
    warm = loop.warm_up()
    runs, energy_j, drafts = loop.one_by_one()
    longest = max(findings.num_prompt_tokens for findings in runs)
    usable = [study for study, draft in zip(job.studies, drafts, strict=True) if draft.error is None]
    batches = tuple(loop.batches(usable, longest))
    on_progress("bandwidth", 0, 1)
    traffic = traffic_of(artifact, runs, adapters)
    plan = loop.planned(1, longest)
    quality = NO_REFERENCE if reference is None else against_record(reference, drafts, loop.scores(reference))
    on_progress("judging the texts", 0, 1)
    return Row(
        **_what_ran(artifact, engine, adapters, warm[0]),
        name=name,
        path=str(path),
        weight_bytes=plan.decoder_bytes + plan.adapter_bytes + plan.vision_bytes,
        verify_s=verify_s,
        load_s=load_s,
        first_total_s=warm[0].timings.total_s,
        latency=latency_of(runs),
        num_runs=len(runs),
        num_prompt_tokens=int(np.median([findings.num_prompt_tokens for findings in runs])),
        tokens_per_study=float(np.mean([findings.num_new_tokens for findings in runs])),
        num_warmup=len(warm),
        batches=batches,
        plan=plan,
        memory=memory_use(before, loaded, warm[0]),
        traffic=traffic,
        energy_j=energy_j if isinstance(energy_j, Missing) else quantiles(energy_j),
        record_quality=quality,
        report_quality=against_reports(job.reports, drafts, job.clinical),
        drafts=drafts,
    )


def _reference(job: Job, artifact: Artifact) -> ReferenceRecord | None:
    if job.record is None:
        return None
    reference = read_record(job.record)
    check_record(reference, artifact, job.studies)
    return reference


def _what_ran(artifact: Artifact, engine: EngineName, adapters: Sequence[str], first: Findings) -> dict[str, Any]:
    """Return what a row says of the artifact and its settings."""
    parts = artifact.manifest.parts
    names = (
        "artifact_id",
        "engine",
        "device",
        "dtype",
        "cache_dtype",
        "prompt_weights",
        "adapter",
        "backend",
        "fallbacks",
        "notice",
    )
    return {field: getattr(first, field) for field in names} | {
        "model": artifact.manifest.model,
        "decoder_format": parts.decoder.describe(),
        "vision_format": parts.vision.format,
        "image_tokens": f"{first.num_image_tokens}{f' by {first.image_method}' if first.image_method else ''}",
        "provider": first.provider.removesuffix("ExecutionProvider"),
        "disk_bytes": disk_bytes(artifact, engine, adapters),
    }


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loop:
    """Runs the studies of a job through a model."""

    model: FindingsModel
    job: Job
    on_progress: Progress
    adapter: str | None = None
    calibration: Calibration | None = None

    def draft(self, study: Study) -> Findings:
        """Run one study by itself."""
        return self.model.findings(study.image, study.reason, **self._asking(reuse=False))

    def _asking(self, **more: Unpack[Options]) -> Options:
        """Return what every study is asked for, and more."""
        return {"max_new_tokens": self.job.max_new_tokens, "adapter": self.adapter, **more}

    def warm_up(self) -> list[Findings]:
        """Run the first studies that can be read; the very first tells what each stage adds to the memory."""
        done: list[Findings] = []
        errors: list[LiteError] = []
        for study in itertools.cycle(self.job.studies):
            try:
                done.append(self.draft(study))
            except LiteError as error:
                errors.append(error)
            if len(done) == NUM_WARMUP:
                break
            if len(errors) == len(self.job.studies):
                raise errors[0]
        return done

    def one_by_one(self) -> tuple[list[Findings], list[float] | Missing, tuple[Draft, ...]]:
        """Run every study by itself, those that can be read again until there are `min_runs`."""
        job, device = self.job, str(self.model.decoder.device)
        meter = energy_meter(device)
        if self.model.plan.engine == "onnx" and device != "cpu":
            meter = Missing(why="not read", todo="Energy is read of the GPU that torch names, not of ONNX Runtime's.")
        runs: list[Findings] = []
        joules: list[float] = []
        drafts: list[Draft] = []

        def run(study: Study) -> str:
            self.on_progress("one by one", len(runs), max(job.min_runs, len(job.studies)))
            before = 0.0 if isinstance(meter, Missing) else meter()
            findings = self.draft(study)
            joules.append(0.0 if isinstance(meter, Missing) else meter() - before)
            runs.append(findings)
            return findings.text

        usable: list[Study] = []
        for study in job.studies:
            try:
                drafts.append(Draft(id=study.id, text=run(study)))
                usable.append(study)
            except LiteError as error:
                drafts.append(Draft(id=study.id, text="", error=str(error)))
        for study in itertools.islice(itertools.cycle(usable), max(job.min_runs - len(runs), 0)):
            run(study)
        return runs, meter if isinstance(meter, Missing) else joules, self._with_confidence(drafts)

    def _with_confidence(self, drafts: Sequence[Draft]) -> tuple[Draft, ...]:
        """Say how likely each sentence is true, where a calibration lies beside the artifact: nothing is timed here."""
        if self.calibration is None:
            return tuple(drafts)
        found = []
        for study, draft in zip(self.job.studies, drafts, strict=True):
            told: tuple[Sentence, ...] = ()
            if draft.error is None:
                findings = self.model.findings(study.image, study.reason, **self._asking(top_logprobs=TOP))
                told = with_sentences(findings, self.model.tokenizer, self.calibration).sentences or ()
            likely = tuple((" ".join(one.text.split()), one.probability) for one in told if one.probability is not None)
            found.append(dataclasses.replace(draft, sentences=likely))
        return tuple(found)

    def scores(self, reference: ReferenceRecord) -> Iterator[NDArray[np.float32]]:
        """Yield the model's logits along the reference's texts."""
        for index, study in enumerate(self.job.studies):
            self.on_progress("scoring", index, len(self.job.studies))
            yield self.model.score(study.image, reference.token_ids(index), study.reason, adapter=self.adapter)

    def planned(self, batch_size: int, num_prompt_tokens: int) -> MemoryPlan:
        """Return what so many studies at a time take. A GPU holds the cache of all rows from the first study on."""
        plan = self.model.plan
        return self._with_rows(batch_size if plan.device == "cpu" else max(batch_size, plan.rows), num_prompt_tokens)

    def _with_rows(self, rows: int, num_prompt_tokens: int) -> MemoryPlan:
        lengths = {"num_prompt_tokens": num_prompt_tokens, "max_new_tokens": self.job.max_new_tokens}
        return self.model.plan.with_rows(rows, **lengths)

    def batches(self, studies: Sequence[Study], num_prompt_tokens: int) -> Iterator[Throughput | NotRun]:
        """Yield what each batch size gives, the small ones first: the process's peak belongs to the largest so far."""
        limit = self.model.plan.limit
        for batch_size in sorted(set(self.job.batch_sizes)):
            what = f"batches of {batch_size}"
            try:
                if limit is not None:
                    check_memory(self._with_rows(batch_size, num_prompt_tokens), limit, what=what)
                self.on_progress(what, 0, 1)
                yield self._throughput(studies, batch_size, self.planned(batch_size, num_prompt_tokens))
            except LiteError as error:
                yield NotRun(batch_size=batch_size, why=str(error))
            except (MemoryError, RuntimeError) as error:
                yield NotRun(batch_size=batch_size, why=out_of_memory(error))

    def _throughput(self, studies: Sequence[Study], batch_size: int, plan: MemoryPlan) -> Throughput:
        """Run all studies in batches, some rounds of it. Whole batches only: a half-empty one would tell nothing."""
        count = max(len(studies) // batch_size, 1) * batch_size
        chosen = list(itertools.islice(itertools.cycle(studies), count))
        rates: list[float] = []
        started = time.perf_counter()
        while len(rates) < BATCH_ROUNDS and (not rates or time.perf_counter() - started < BATCH_SECONDS):
            seconds, results = _timed(lambda: self._drafted(chosen, batch_size))
            rates.append(60.0 * count / seconds)
            if (rows := min(findings.timings.batch_size for findings in results)) < batch_size:
                msg = f"got a batch of {batch_size} · expected {rows}, all that fit into the memory · take fewer"
                raise MemoryBudgetError(f"{msg} at a time")
        return Throughput(
            batch_size=batch_size,
            num_studies=count,
            studies_per_min=quantiles(rates),
            plan=plan,
            peak_bytes=counted(peak_now(self.model)),
        )

    def _drafted(self, studies: Sequence[Study], batch_size: int) -> list[Findings]:
        import lite

        done: list[Findings] = []
        for result in self.model.findings_batch(
            [(study.image, study.reason) for study in studies],
            batch_size=batch_size,
            **self._asking(reuse=False),
        ):
            if isinstance(result, lite.StudyError):
                raise result.error
            done.append(result)
        return done
