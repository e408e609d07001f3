"""Judge drafted texts: beside the texts of a reference record, and beside the reports that come with the films."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite.bench.results import Draft, RecordQuality, ReportQuality
from lite.errors import BackendUnavailable
from lite.eval.chexbert import chexbert_f1
from lite.eval.divergence import StudyDivergence, summarise
from lite.eval.figures import Missing
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
    return RecordQuality(
        divergence=summarise(divergences),
        kl_gap_limit=kl_gap_limit,
        same_text=same_text(theirs, ours),
        **_text_figures(theirs, ours),
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
    return ReportQuality(
        radgraph_f1=radgraph_f1(theirs, ours, device=clinical.device) if clinical.radgraph else _no_radgraph(),
        chexbert=chexbert_f1(theirs, ours, weights=clinical.chexbert, device=clinical.device),
        **_text_figures(theirs, ours),
    )


def _text_figures(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a `TextQuality`."""
    labels = label_f1([read_labels(text) for text in theirs], [read_labels(text) for text in ours])
    figures: dict[str, Any] = {"label_f1_micro": labels.micro, "label_f1_macro": labels.macro}
    for metric in (rouge_l, bleu_1, bleu_4):
        try:
            figures[metric.__name__] = metric(theirs, ours)
        except BackendUnavailable as error:
            figures[metric.__name__] = Missing(why="not installed", todo=str(error))
    return figures


def _no_radgraph() -> Missing:
    if importlib.util.find_spec("radgraph") is None:
        todo = (
            'F1-RadGraph: pip install "llava-rad-lite[clinical]" into an environment without "bench", then --radgraph.'
        )
        return Missing(why="not installed", todo=todo)
    return Missing(why="not asked for", todo="--radgraph computes F1-RadGraph.")
