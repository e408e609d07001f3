"""The one loop that compares: a reference drafts, a candidate is asked along its texts and drafts by itself.

    reference ─ drafts ─▶ texts ─▶ logits on them, kept on disk ─┐
                            └────▶ candidate's logits on them ───┴▶ KL, same top token, perplexity ratio
    candidate ─ drafts ─▶ texts ─▶ equal to the reference's? label F1 against the truth, times, bytes

Token by token along the reference's text (its end, EOS, included) the candidate is asked what it would have written:
see `lite.eval.divergence`. What it is asked along may also be a recorded reference: see `lite.eval.record`.

The logits of one study are in memory at a time, the reference's unrounded in a folder: float16 would add a KL of its
own of some 1e-5, more than some candidates lose. That is 4 bytes times tokens times vocabulary: 50 MB for 600 films of
the phantom model, 2.6 GB for 200 studies of 100 tokens of a 7B one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

import lite
from lite.artifact.open import Artifact, load_artifact
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary, StudyDivergence, compare_logits, summarise
from lite.eval.figures import Estimate
from lite.eval.labels import read_labels
from lite.eval.metrics import Readings, label_f1, rouge_l, same_text
from lite.eval.record import check_belongs, settings_of
from lite.studies.study import Study

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from benchmarks.exports import Cost

BATCH_SIZE: Final = 16


class Yardstick(Protocol):
    """What a candidate is asked along: the `Drafts` of a reference, or a reference record."""

    def token_ids(self, index: int) -> tuple[int, ...]:
        """Return the tokens of a study's text."""

    def compare(self, index: int, logits: ArrayLike) -> StudyDivergence:
        """Compare a candidate's logits on `token_ids(index)` with the reference's."""


class Films(NamedTuple):
    """Studies, and the labels of each."""

    studies: Sequence[Study]
    truth: Sequence[Readings]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """What a model writes about each study when it writes freely; with its logits on that, a yardstick."""

    name: str
    artifact: Artifact
    findings: tuple[lite.Findings, ...]
    logits: Path | None = None  # a folder: see `keep_logits`

    @property
    def texts(self) -> list[str]:
        """The texts, study by study."""
        return [findings.text for findings in self.findings]

    def token_ids(self, index: int) -> tuple[int, ...]:
        """Return a text's tokens with EOS: to stop is a decision, too. A text that was cut has none."""
        findings, end = self.findings[index], self.artifact.manifest.decoding.eos_token_id
        return findings.token_ids if findings.finish_reason == "length" else (*findings.token_ids, end)

    def compare(self, index: int, logits: ArrayLike) -> StudyDivergence:
        """Compare a candidate's logits on a text with the model's own, which have been kept."""
        if self.logits is None:
            raise LiteError(f"{self.name}: got drafts without logits · expected both · keep them first")
        return compare_logits(np.load(self.logits / f"{index}.npy"), logits, self.token_ids(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What can be said of a model alone. Times are medians, NaN where several studies were drafted at once."""

    setting: str  # decoder, engine and cache
    artifact_id: str
    decoder_bytes: int  # of all files below decoder/
    micro_f1: Estimate  # of the labels read from its texts, against the truth
    macro_f1: Estimate
    decode_tokens_per_s: float
    prefill_s: float
    total_s: float  # of a study, from the file to the last token


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What can be said of a candidate beside its reference."""

    reference: str
    divergence: DivergenceSummary
    same_text: Estimate  # share of the studies whose text is the reference's, character for character
    rouge_l: Estimate  # between the two texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table. A reference has no loss, what was not exported here no cost, and what failed only an error."""

    name: str
    figures: Figures | None = None
    loss: Loss | None = None
    cost: Cost | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An artifact to compare. It is made when its turn comes, and dropped after it."""

    name: str
    make: Callable[[], tuple[Path, Cost | None]]
    drop: Callable[[], object] = lambda: None


def compare_artifacts(
    candidates: Iterable[Candidate], films: Films, *, batch_size: int = BATCH_SIZE, device: str = "auto"
) -> Iterator[Row]:
    """Compare artifacts with the first of them, one in memory at a time. One that fails does not stop the rest.

    Raises:
        LiteError: the first cannot be made or measured.
    """
    reference: Drafts | None = None
    with tempfile.TemporaryDirectory(prefix="reference-logits-") as folder:
        for candidate in candidates:
            name = candidate.name
            try:
                path, cost = candidate.make()
                if reference is not None:
                    check_comparable(path, reference.artifact)
                model = lite.load(path, device=device)
                drafts = draft(model, films.studies, name=name, batch_size=batch_size)
                lost = None
                if reference is None:
                    reference = keep_logits(model, films.studies, drafts, Path(folder))
                else:
                    lost = loss(drafts, reference, diverge(model, films.studies, reference, name=name))
                del model  # makes room for the next
                yield Row(name=name, figures=figures(drafts, films.truth), loss=lost, cost=cost)
            except LiteError as error:
                if reference is None:
                    raise
                yield Row(name=name, error=str(error))
            finally:
                candidate.drop()


def check_comparable(path: Path, reference: Artifact) -> None:
    """Refuse an artifact that reads other tokens, other words or other pixels than the reference.

    Raises:
        ArtifactError: a setting differs; it is named.
    """
    check_belongs(load_artifact(path), settings_of(reference), reference=str(reference.path))


# -- Its steps -------------------------------------------------------------------------------------------------------


def draft(model: lite.FindingsModel, studies: Sequence[Study], *, name: str, batch_size: int = BATCH_SIZE) -> Drafts:
    """Draft every study.

    Raises:
        LiteError: a study cannot be read or computed. There are no figures over the rest: they would not be comparable.
    """
    results = model.findings_batch(studies, batch_size=batch_size)
    findings: list[lite.Findings] = []
    for result in tqdm(results, total=len(studies), desc=f"{name}: drafting", unit=" films", disable=None):
        if isinstance(result, lite.StudyError):
            raise result.error
        findings.append(result)
    return Drafts(name=name, artifact=model.artifact, findings=tuple(findings))


def draft_in_turns(models: Mapping[str, lite.FindingsModel], studies: Sequence[Study]) -> dict[str, Drafts]:
    """Draft each film with each model before the next film, so that whatever slows the machine slows all of them.

    The first film comes twice, and once does not count.
    """
    findings: dict[str, list[lite.Findings]] = {name: [] for name in models}
    for study in tqdm((studies[0], *studies), desc="drafting", unit=" films", disable=None):
        for name, model in models.items():
            findings[name].append(model.findings(study.image, study.reason))
    return {
        name: Drafts(name=name, artifact=models[name].artifact, findings=tuple(found[1:]))
        for name, found in findings.items()
    }


def keep_logits(model: lite.FindingsModel, studies: Sequence[Study], drafts: Drafts, folder: Path) -> Drafts:
    """Score a model's own texts, and keep the logits in a folder.

    Raises:
        LiteError: the disk has no room.
    """
    num_tokens = sum(len(drafts.token_ids(index)) for index in range(len(studies)))
    needed = num_tokens * model.artifact.decoder_config().vocab_size * 4
    if needed > 0.95 * (free := shutil.disk_usage(folder).free):
        msg = f"{folder}: got {free / 1e9:.1f} GB of free disk · expected {needed / 1e9:.1f} GB for the reference's "
        raise LiteError(f"{msg}logits · take fewer studies with --limit, or name a larger disk in TMPDIR")
    for index, logits in enumerate(_scored(model, studies, drafts, drafts.name)):
        np.save(folder / f"{index}.npy", logits)
    return dataclasses.replace(drafts, logits=folder)


def diverge(
    model: lite.FindingsModel, studies: Sequence[Study], yardstick: Yardstick, *, name: str
) -> DivergenceSummary:
    """Ask a candidate along the texts of a yardstick."""
    logits = _scored(model, studies, yardstick, name)
    return summarise([yardstick.compare(index, found) for index, found in enumerate(logits)])


def _scored(
    model: lite.FindingsModel, studies: Sequence[Study], yardstick: Yardstick, name: str
) -> Iterator[NDArray[np.float32]]:
    for index, study in enumerate(tqdm(studies, desc=f"{name}: scoring", unit=" films", disable=None)):
        yield model.score(study.image, yardstick.token_ids(index), study.reason)


def figures(drafts: Drafts, truth: Sequence[Readings]) -> Figures:
    """Say what can be said of a model alone."""
    artifact, first = drafts.artifact, drafts.findings[0]
    scores = label_f1(truth, [read_labels(text) for text in drafts.texts])
    timings = [findings.timings for findings in drafts.findings if findings.timings.batch_size == 1]
    # A text of one token decodes nothing.
    steps = [step for timing in timings for step in timing.decode_steps_s]
    return Figures(
        setting=f"{artifact.manifest.parts.decoder.describe()}, {first.engine}, {first.cache_dtype} cache",
        artifact_id=artifact.id,
        decoder_bytes=sum(file.stat().st_size for file in (artifact.path / "decoder").rglob("*") if file.is_file()),
        micro_f1=scores.micro,
        macro_f1=scores.macro,
        decode_tokens_per_s=1 / statistics.median(steps) if steps else math.nan,
        prefill_s=statistics.median(timing.prefill_s for timing in timings) if timings else math.nan,
        total_s=statistics.median(timing.total_s for timing in timings) if timings else math.nan,
    )


def loss(drafts: Drafts, reference: Drafts, divergence: DivergenceSummary) -> Loss:
    """Say what can be said of a candidate beside its reference."""
    texts = reference.texts, drafts.texts
    return Loss(reference=reference.name, divergence=divergence, same_text=same_text(*texts), rouge_l=rouge_l(*texts))


# -- Printing --------------------------------------------------------------------------------------------------------

COLUMNS_NOTE: Final = """\
KL(reference ‖ candidate), the share of equal top tokens and the ratio of perplexities are taken along the reference's
texts. "leaves at": the median token, from 0, at which the candidate first disagrees, of the texts where it does.
"equal texts", ROUGE-L: drafted freely, beside the reference's texts. F1: the labels of the texts against the truth.
Times are medians, of films drafted in turns. [95 % interval]."""


def shown(value: float, digits: str = ".3f") -> str:
    """Return a number as text, a dash where there is none."""
    return "–" if math.isnan(value) else format(value, digits)


def _cells(row: Row) -> dict[str, str]:
    """Return what there is to say of a row, by the titles of the columns."""
    cells: dict[str, str] = {}
    if (own := row.figures) is not None:
        cells |= {"setting": own.setting, "decoder MB": f"{own.decoder_bytes / 1e6:,.2f}"}
    if row.loss is not None:
        divergence, same, kl = row.loss.divergence, row.loss.same_text, row.loss.divergence.mean_kl
        cells |= {
            "beside": row.loss.reference,
            "KL, nats/token": f"{shown(kl.value, '.3g')} [{shown(kl.low, '.3g')}, {shown(kl.high, '.3g')}]",
            "same top": shown(divergence.same_top.value, ".4f"),
            "perplexity ratio": shown(divergence.perplexity_ratio.value, ".4f"),
            "leaves at": shown(divergence.first_divergent_token.value, ".0f"),
            "equal texts": f"{round(same.value * same.count)} of {same.count}",
            "ROUGE-L": shown(row.loss.rouge_l.value, ".4f"),
        }
    if own is not None:
        cells |= {"F1 micro": shown(own.micro_f1.value), "F1 macro": shown(own.macro_f1.value)}
        if not math.isnan(own.total_s):
            cells |= {
                "tokens/s": shown(own.decode_tokens_per_s, ".0f"),
                "prefill ms": shown(own.prefill_s * 1e3, ".1f"),
            }
            cells |= {"study s": shown(own.total_s)}
    if row.cost is not None:
        cells |= {"export s": f"{row.cost.seconds:.1f}", "peak RSS MB": f"{row.cost.peak_rss_bytes / 1e6:,.0f}"}
    return cells


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as a markdown table with the columns that any of them has, and below it why others have none."""
    cells = [_cells(row) for row in rows]
    titles = list(dict.fromkeys(title for found in sorted(cells, key=len, reverse=True) for title in found))
    lines = [(row.name, *(found.get(title, "–") for title in titles)) for row, found in zip(rows, cells, strict=True)]
    failures = "".join(f"\n- {row.name} failed: {row.error}" for row in rows if row.error is not None)
    return markdown_table(("row", *titles), lines, left=2) + (f"\n{failures}" if failures else "")


def report(tables: Mapping[str, Sequence[Row]], *, films: str, command: str, as_json: bool) -> int:
    """Print tables and what they depend on, or all of it as one JSON object; return 1 when a row failed, else 0."""
    about = {"films": films, "machine": machine(), "versions": versions(), "command": command}
    if as_json:
        found = {name: [to_json(row) for row in rows] for name, rows in tables.items()} | about
        sys.stdout.write(f"{json.dumps(found, ensure_ascii=False, allow_nan=False)}\n")
    else:
        own = {row.name: row.figures.artifact_id for rows in tables.values() for row in rows if row.figures is not None}
        about["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
        about["artifacts"] = ", ".join(f"{name} {artifact_id}" for name, artifact_id in own.items())
        lines = "\n".join(f"- {name.capitalize()}: {value}." for name, value in about.items())
        sys.stdout.write("\n\n".join([*map(format_table, tables.values()), COLUMNS_NOTE, lines]) + "\n")
    return int(any(row.error is not None for rows in tables.values() for row in rows))
