"""Judge drafted texts: beside the texts of a reference record, and beside the reports that come with the films."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lite.bench.results import Draft, RecordQuality, ReportQuality
from lite.errors import BackendUnavailable
from lite.eval.chexbert import chexbert_f1
from lite.eval.divergence import StudyDivergence, summarise
from lite.eval.figures import Estimate, Missing
from lite.eval.labels import read_labels
from lite.eval.metrics import bleu_1, bleu_4, label_f1, rouge_l, same_text
from lite.eval.radgraph import radgraph_f1


@dataclass(frozen=True, slots=True, kw_only=True)
class Clinical:
    """Which metrics of real reports to take; both need models that are not ours to ship."""

    radgraph: bool = False
    chexbert: Path | None = None
    device: str = "cpu"


NO_REFERENCE = Missing(why="no reference", todo="Give one with --reference; python -m lite.bench record makes it.")
NO_REPORTS = Missing(why="no reports", todo="The list of studies has no findings to compare with (conversations).")


def against_record(
    references: Sequence[str],
    drafts: Sequence[Draft],
    divergences: Sequence[StudyDivergence],
    *,
    kl_gap_limit: float,
) -> RecordQuality:
    """Judge a candidate beside the record's model.

    Args:
        references: what that wrote about each study.
        drafts: what the candidate wrote, in the same order, at least one without an error.
        divergences: along the references, for each study.
        kl_gap_limit: by how much their KL is too low at most, in the mean.
    """
    pairs = [(text, draft.text) for text, draft in zip(references, drafts, strict=True) if draft.error is None]
    theirs, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    labels = label_f1([read_labels(text) for text in theirs], [read_labels(text) for text in ours])
    return RecordQuality(
        divergence=summarise(divergences),
        kl_gap_limit=kl_gap_limit,
        same_text=same_text(theirs, ours),
        rouge_l=_if_installed(rouge_l, theirs, ours),
        bleu_1=_if_installed(bleu_1, theirs, ours),
        bleu_4=_if_installed(bleu_4, theirs, ours),
        label_f1_micro=labels.micro,
        label_f1_macro=labels.macro,
    )


def against_reports(reports: Sequence[str], drafts: Sequence[Draft], clinical: Clinical) -> ReportQuality | Missing:
    """Judge drafts beside reports; an empty report is none, and left out like a draft that failed."""
    pairs = [
        (report, draft.text)
        for report, draft in zip(reports, drafts, strict=True)
        if report.strip() and draft.error is None
    ]
    if not pairs:
        return NO_REPORTS
    theirs, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    labels = label_f1([read_labels(text) for text in theirs], [read_labels(text) for text in ours])
    return ReportQuality(
        label_f1_micro=labels.micro,
        label_f1_macro=labels.macro,
        rouge_l=_if_installed(rouge_l, theirs, ours),
        bleu_1=_if_installed(bleu_1, theirs, ours),
        bleu_4=_if_installed(bleu_4, theirs, ours),
        radgraph_f1=radgraph_f1(theirs, ours, device=clinical.device) if clinical.radgraph else _no_radgraph(),
        chexbert=chexbert_f1(theirs, ours, weights=clinical.chexbert, device=clinical.device),
    )


def _no_radgraph() -> Missing:
    if importlib.util.find_spec("radgraph") is None:
        todo = (
            'F1-RadGraph: pip install "llava-rad-lite[clinical]" into an environment without "bench", then --radgraph.'
        )
        return Missing(why="not installed", todo=todo)
    return Missing(why="not asked for", todo="--radgraph computes F1-RadGraph.")


def _if_installed(
    metric: Callable[[Sequence[str], Sequence[str]], Estimate], references: Sequence[str], predictions: Sequence[str]
) -> Estimate | Missing:
    try:
        return metric(references, predictions)
    except BackendUnavailable as error:
        return Missing(why="not installed", todo=str(error))
