"""Judge drafted texts: beside the texts of a reference record, and beside the reports that come with the films."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lite.bench.results import Draft, RecordQuality, ReportQuality
from lite.eval.chexbert import chexbert_f1
from lite.eval.divergence import StudyDivergence, summarise
from lite.eval.figures import Missing, Sums
from lite.eval.labels import unreadable
from lite.eval.measures import text_sums
from lite.eval.metrics import same_text
from lite.eval.radgraph import radgraph_f1
from lite.eval.record import ReferenceRecord


class Clinical(NamedTuple):
    """Which metrics of real reports to take; both need models that are not ours to ship."""

    radgraph: bool = False
    chexbert: Path | None = None
    device: str = "cpu"


NO_REFERENCE = Missing(
    why="no reference", todo="Give a reference record with --reference; python -m lite.bench record makes one."
)
NO_REPORTS = Missing(why="no reports", todo="The list of studies has no findings to compare with (conversations).")

NOT_ENGLISH = Missing(why="not in English", todo="Labels are read from English reports only: docs/labels.md.")


def against_record(
    reference: ReferenceRecord, drafts: Sequence[Draft], scores: Iterable[NDArray[np.float32]]
) -> RecordQuality:
    """Judge a candidate beside the record's model.

    Args:
        reference: the record.
        drafts: what the candidate wrote about each of its studies, at least one without an error.
        scores: the candidate's logits along the reference's texts, study by study.
    """
    divergences: list[StudyDivergence] = []
    gaps: list[float] = []
    for index, logits in enumerate(scores):
        divergences.append(reference.compare(index, logits))
        gaps.extend(reference.gap_limit(index, logits))
    theirs, ours = _pairs(reference.texts, drafts)
    return RecordQuality(
        divergence=summarise(divergences),
        kl_gap_limit=float(np.mean(gaps)),
        same_text=same_text(theirs, ours),
        **_estimates(text_sums(theirs, ours)),
    )


def against_reports(reports: Sequence[str], drafts: Sequence[Draft], clinical: Clinical) -> ReportQuality | Missing:
    """Judge drafts beside reports; one that is empty or not in English is none, and left out like a failed draft."""
    theirs, ours = _pairs([None if unreadable(report) else report for report in reports], drafts)
    if not theirs:
        return NOT_ENGLISH if any(unreadable(report) == "not in English" for report in reports) else NO_REPORTS
    radgraph = radgraph_f1(theirs, ours, device=clinical.device) if clinical.radgraph else _no_radgraph()
    chexbert = chexbert_f1(theirs, ours, weights=clinical.chexbert, device=clinical.device)
    return ReportQuality(
        chexbert=chexbert if isinstance(chexbert, Missing) else _estimates(chexbert),
        **_estimates({"radgraph_f1": radgraph} | text_sums(theirs, ours)),
    )


def _pairs(texts: Sequence[str | None], drafts: Sequence[Draft]) -> tuple[list[str], list[str]]:
    """Return texts and drafts where there are both."""
    both = zip(texts, drafts, strict=True)
    pairs = [(text, draft.text) for text, draft in both if text is not None and draft.error is None]
    return [text for text, _ in pairs], [draft for _, draft in pairs]


def _estimates(figures: Mapping[str, Sums | Missing]) -> dict[str, Any]:
    return {name: figure if isinstance(figure, Missing) else figure.estimate() for name, figure in figures.items()}


def _no_radgraph() -> Missing:
    if importlib.util.find_spec("radgraph") is None:
        todo = (
            'F1-RadGraph: pip install "llava-rad-lite[clinical]" into an environment without "bench", then --radgraph.'
        )
        return Missing(why="not installed", todo=todo)
    return Missing(why="not asked for", todo="--radgraph computes F1-RadGraph.")
