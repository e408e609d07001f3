"""The one loop that compares: a reference drafts, a candidate is asked along its texts and drafts by itself.

    reference ─ drafts ─▶ texts ─▶ logits on them ───────────────┐
                            └────▶ candidate's logits on them ───┴▶ KL, same top token, perplexity ratio
    candidate ─ drafts ─▶ texts ─▶ equal to the reference's? label F1 against the reports

Token by token along the reference's text (its end, EOS, included) the candidate is asked what it would have written:
see `lite.eval.divergence`. What it is asked along may also be a recorded reference: see `lite.eval.record`.

One model is in memory at a time, and the reference's logits, unrounded: float16 would add a KL of its own of some 1e-5,
more than some candidates lose. That is 4 bytes times tokens times vocabulary, 50 MB for 600 films of the phantom model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from tqdm import tqdm

import lite
from lite.artifact.open import Artifact
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.config import DecodingDefaults
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary, StudyDivergence, compare_logits, summarise
from lite.eval.figures import Estimate
from lite.eval.labels import read_labels
from lite.eval.metrics import label_f1, rouge_l, same_text
from lite.eval.record import Settings, check_belongs, settings_of
from lite.studies.study import Study

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from benchmarks.exports import Cost

BATCH_SIZE: Final = 16


class Yardstick(Protocol):
    """What a candidate is asked along: a `Reference`, or a reference record."""

    def token_ids(self, index: int) -> tuple[int, ...]:
        """Return the tokens of a study's text."""

    def compare(self, index: int, logits: ArrayLike) -> StudyDivergence:
        """Compare a candidate's logits on `token_ids(index)` with the reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a model writes about each study when it writes freely, and its logits on that."""

    name: str
    settings: Settings  # of its artifact, which may be gone by now
    findings: Sequence[lite.Findings]
    logits: Sequence[NDArray[np.float32]]

    def token_ids(self, index: int) -> tuple[int, ...]:
        """Return a text's tokens with EOS: to stop is a decision, too. A text that was cut has none."""
        return decided_tokens(self.findings[index], self.settings.decoding)

    def compare(self, index: int, logits: ArrayLike) -> StudyDivergence:
        """Compare a candidate's logits on a text with the model's own."""
        return compare_logits(self.logits[index], logits, self.token_ids(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What can be said of a model alone."""

    setting: str  # decoder, engine and cache
    artifact_id: str
    decoder_bytes: int  # of all files below decoder/
    micro_f1: Estimate  # of the labels read from its texts, against those of the reports
    macro_f1: Estimate


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
    """A model to compare. It is loaded when its turn comes, and dropped after it."""

    name: str
    load: Callable[[], tuple[lite.FindingsModel, Cost | None]]
    drop: Callable[[], object] = lambda: None


def compare(
    candidates: Iterable[Candidate], studies: Sequence[Study], *, batch_size: int = BATCH_SIZE
) -> Iterator[Row]:
    """Compare models with the first of them. One that fails does not stop the rest.

    Raises:
        LiteError: the first cannot be loaded or measured.
    """
    reference: Reference | None = None
    for candidate in candidates:
        name, lost = candidate.name, None
        try:
            model, cost = candidate.load()
            if reference is not None:
                check_belongs(model.artifact, reference.settings, reference=reference.name)
            findings = draft(model, studies, name=name, batch_size=batch_size)
            if reference is None:
                reference = as_reference(model, studies, findings, name=name)
            else:
                divergence = diverge(model, studies, reference, name=name)
                lost = _loss(findings, reference, divergence)
            yield Row(name=name, figures=figures(model.artifact, findings, studies), loss=lost, cost=cost)
            del model  # makes room for the next
        except LiteError as error:
            if reference is None:
                raise
            yield Row(name=name, error=str(error))
        finally:
            candidate.drop()


# -- Its steps -------------------------------------------------------------------------------------------------------


def draft(
    model: lite.FindingsModel, studies: Sequence[Study], *, name: str, batch_size: int = BATCH_SIZE
) -> list[lite.Findings]:
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
    return findings


def decided_tokens(findings: lite.Findings, decoding: DecodingDefaults) -> tuple[int, ...]:
    """Return what a model chose to write: its tokens, and EOS where it ended by itself."""
    return findings.token_ids if findings.finish_reason == "length" else (*findings.token_ids, decoding.eos_token_id)


def as_reference(
    model: lite.FindingsModel, studies: Sequence[Study], findings: Sequence[lite.Findings], *, name: str
) -> Reference:
    """Score a model's own texts."""
    settings = settings_of(model.artifact)
    logits = [
        model.score(study.image, decided_tokens(found, settings.decoding), study.reason)
        for study, found in zip(_shown(studies, name), findings, strict=True)
    ]
    return Reference(name=name, settings=settings, findings=findings, logits=logits)


def diverge(
    model: lite.FindingsModel, studies: Sequence[Study], yardstick: Yardstick, *, name: str
) -> DivergenceSummary:
    """Ask a candidate along the texts of a yardstick."""
    return summarise(
        [
            yardstick.compare(index, model.score(study.image, yardstick.token_ids(index), study.reason))
            for index, study in enumerate(_shown(studies, name))
        ]
    )


def _shown(studies: Sequence[Study], name: str) -> Iterable[Study]:
    return tqdm(studies, desc=f"{name}: scoring", unit=" films", disable=None)


def figures(artifact: Artifact, findings: Sequence[lite.Findings], studies: Sequence[Study]) -> Figures:
    """Say what can be said of a model alone."""
    first = findings[0]
    scores = label_f1(
        [read_labels(study.reference) for study in studies], [read_labels(found.text) for found in findings]
    )
    return Figures(
        setting=f"{artifact.manifest.parts.decoder.describe()}, {first.engine}, {first.cache_dtype} cache",
        artifact_id=artifact.id,
        decoder_bytes=sum(file.stat().st_size for file in (artifact.path / "decoder").rglob("*") if file.is_file()),
        micro_f1=scores.micro,
        macro_f1=scores.macro,
    )


def _loss(findings: Sequence[lite.Findings], reference: Reference, divergence: DivergenceSummary) -> Loss:
    texts = [found.text for found in reference.findings], [found.text for found in findings]
    return Loss(
        reference=reference.name, divergence=divergence, same_text=same_text(*texts), rouge_l=rouge_l(*texts).estimate()
    )


# -- Printing --------------------------------------------------------------------------------------------------------

COLUMNS_NOTE: Final = """\
KL(reference ‖ candidate), the share of equal top tokens and the ratio of perplexities are taken along the reference's
texts. "leaves at": the median token, from 0, at which the candidate first disagrees, of the texts where it does.
"equal texts", ROUGE-L: drafted freely, beside the reference's texts. F1: the labels of the texts against the reports.
[95 % interval]."""


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
        found = to_json(dict(tables)) | about
        sys.stdout.write(f"{json.dumps(found, ensure_ascii=False, allow_nan=False)}\n")
    else:
        own = {row.name: row.figures.artifact_id for rows in tables.values() for row in rows if row.figures is not None}
        about["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
        about["artifacts"] = ", ".join(f"{name} {artifact_id}" for name, artifact_id in own.items())
        lines = "\n".join(f"- {name.capitalize()}: {value}." for name, value in about.items())
        sys.stdout.write("\n\n".join([*map(format_table, tables.values()), COLUMNS_NOTE, lines]) + "\n")
    return int(any(row.error is not None for rows in tables.values() for row in rows))
