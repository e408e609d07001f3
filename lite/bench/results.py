"""What was measured of artifacts: the records that the table, the JSON file, the HTML report and the gate read.

    Bench ─┬─ Provenance                  machine, versions, command, data, reference record
           └─ Row for each artifact ─┬─ Latency, Throughput, Traffic              what it costs in time
                                     ├─ MemoryUse beside its MemoryPlan           and in memory
                                     ├─ RecordQuality                             what it loses against fp16
                                     ├─ ReportQuality                             how good its texts are
                                     └─ Draft for each study                      the texts themselves
              or FailedRow

Nothing is computed here but what follows from the fields alone. A figure that could not be taken is `Missing` and says
why: no reader of these records ever finds an unexplained gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lite.eval.divergence import DivergenceSummary
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.memory.plan import MemoryPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Stages of one study at a time, warm."""

    image: Quantiles
    vision: Quantiles
    prefill: Quantiles
    decode_token: Quantiles  # each further token, over all tokens of all runs
    ttft: Quantiles  # image + vision + prefill
    total: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Studies through `findings_batch`, `batch_size` at a time."""

    batch_size: int
    num_studies: int
    studies_per_min: Quantiles  # over rounds: here "p20" is the slow side
    plan: MemoryPlan
    peak_bytes: int  # like MemoryUse.peak_bytes, until the end of this run


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRun:
    """A batch size that was not measured."""

    batch_size: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Peaks of the process until each stage of the first study had ended, in bytes: so none is less than the last."""

    kind: str  # "VRAM" (torch's allocator) where torch computes on a GPU; else "RSS"
    before_bytes: int  # libraries imported, nothing loaded
    load_bytes: int
    image_bytes: int
    vision_bytes: int
    prefill_bytes: int
    decode_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The peak over loading and one study."""
        return self.decode_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What decoding one token reads, beside what the memory can deliver, measured in the same run."""

    weight_bytes: int  # every linear and the head, once: integers and scales where they are quantised
    cache_bytes: int  # keys and values of the context, at the middle of the median study's text
    bandwidth: float  # bytes per second, of a streaming read on the device that decodes
    achieved: float  # bytes per second at the median token

    @property
    def bytes_per_token(self) -> int:
        """What is read for a token."""
        return self.weight_bytes + self.cache_bytes

    @property
    def share(self) -> float:
        """Achieved, as a fraction of the bandwidth."""
        return self.achieved / self.bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """Texts beside others."""

    label_f1_micro: Estimate
    label_f1_macro: Estimate
    rouge_l: Estimate | Missing
    bleu_1: Estimate | Missing
    bleu_4: Estimate | Missing
    side_accuracy: Estimate | Missing  # of findings that both report: on the same side
    zone_accuracy: Estimate | Missing
    size_accuracy: Estimate | Missing


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordQuality(TextQuality):
    """A candidate beside the reference record, on the same studies: its texts beside the reference's."""

    divergence: DivergenceSummary  # teacher-forced along the reference's texts, from top-k and tail: KL is a bound
    kl_gap_limit: float  # nats per token: the mean KL over the whole vocabulary is higher by no more than this
    same_text: Estimate  # drafted freely: share of the studies whose text is the reference's, character for character


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportQuality(TextQuality):
    """Drafted texts beside the reports that come with the data."""

    radgraph_f1: Estimate | Missing
    chexbert: dict[str, Estimate] | Missing  # by "micro-14 uncertain negative" and so on


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What an artifact wrote about a study, or why it could not."""

    id: str
    text: str
    error: str | None = None
    sentences: tuple[tuple[str, float], ...] = ()  # how likely each is true, where a calibration is beside the artifact


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Everything about one artifact."""

    name: str
    path: str
    artifact_id: str
    model: str
    decoder_format: str  # such as "gptq-int4 (groups of 128)"
    vision_format: str
    image_tokens: str  # how many, and how the patches became fewer: "361 by mean"
    engine: str  # "torch" or "onnx"
    device: str  # of the decoder
    dtype: str
    cache_dtype: str
    prompt_weights: str
    adapter: str | None = None  # beside the decoder
    provider: str  # of ONNX Runtime: for the tower, and for the decoder of the onnx engine
    backend: str  # what the decoder's operations ran on, see `Findings`
    fallbacks: tuple[str, ...]  # what was slower than it has to be on such a machine
    disk_bytes: int  # of the files that the engine reads
    weight_bytes: int  # of decoder and tower, as they lie in memory
    verify_s: float  # hashing those files; not part of load_s
    load_s: float  # the files were in the page cache
    first_total_s: float  # the first study after loading, end to end
    latency: Latency
    num_runs: int  # timed studies; fewer studies are gone through several times
    num_warmup: int
    num_prompt_tokens: int  # of the median study, the image's included
    tokens_per_study: float  # generated, in the mean
    batches: tuple[Throughput | NotRun, ...]
    plan: MemoryPlan  # for one study at a time; on a GPU with the cache of all rows, which is there from the start
    memory: MemoryUse
    traffic: Traffic | Missing
    energy_j: Quantiles | Missing  # joules for a study, of the GPU
    record_quality: RecordQuality | Missing
    report_quality: ReportQuality | Missing
    drafts: tuple[Draft, ...]  # one for each study, in the order of the data
    notice: str

    @property
    def num_skipped(self) -> int:
        """How many studies could not be read or computed."""
        return sum(draft.error is not None for draft in self.drafts)

    @property
    def run_by(self) -> str:
        """The engine and its settings, in words."""
        cache = f", {self.cache_dtype} cache" if self.cache_dtype != self.dtype else ""
        prompts = ", int8 prompts" if self.prompt_weights == "int8" else ""
        adapter = f", with {self.adapter}" if self.adapter is not None else ""
        return f"{self.engine} on {self.device}, {self.dtype}{cache}{prompts}{adapter}"

    @property
    def decode_tokens_per_s(self) -> float:
        """At the median token, one study at a time."""
        return 1.0 / self.latency.decode_token.p50

    @property
    def is_planned(self) -> bool:
        """Whether the plan is of the memory that was measured: of ONNX Runtime's on a GPU neither is known."""
        return self.engine == "torch" or self.device == "cpu"

    @property
    def plan_error(self) -> float:
        """By how much the memory plan missed the measured peak, as a fraction of it; above 0: it planned too much."""
        return self.plan.peak_bytes / self.memory.peak_bytes - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRow:
    """An artifact of which nothing could be measured."""

    name: str
    path: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyShown:
    """A study as the report shows it."""

    id: str
    image: str  # a path
    reason: str | None
    report: str | None  # what the data says of it
    reference_text: str | None  # what the reference record's model wrote


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What the figures depend on, beside the artifacts."""

    command: str
    started: str  # ISO 8601, UTC
    machine: str
    versions: dict[str, str]
    data: str  # the list's path
    data_sha256: str
    num_studies: int
    reference: str | None  # which record, of which artifact, made where
    seed: int  # of the bootstrap
    resamples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One run of `python -m lite.bench`."""

    provenance: Provenance
    rows: tuple[Row | FailedRow, ...]
    reference_report_quality: ReportQuality | Missing  # of the reference record's own texts
    studies: tuple[StudyShown, ...]
    notes: tuple[str, ...]  # what a reader has to know: figures that are missing, and how to get them


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledTable:
    """Figures that nobody measured, as text: each says by its "~" that it is modelled."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # each as long as the header
    note: str  # by what they are modelled
    figures: Any  # the same for programs: what JSON can hold
