"""Scores as text for a terminal, which is markdown too, and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lite.artifact.manifest import NOTICE
from lite.bench.columns import TITLES
from lite.bench.report import render
from lite.bench.table import markdown_table
from lite.bench.words import Passage, compare_words
from lite.console import short_names
from lite.eval.figures import RESAMPLES, Estimate, Missing
from lite.eval.paired import EXACT_STUDIES, EXCHANGES, SIGNIFICANT, Comparison
from lite.eval.scoring import ScoredStudy, Scores

_NONE = "–"


class _Table(NamedTuple):
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def format_scores(scores: Scores, *, num_studies: int) -> str:
    """Return the scores as text: a table of figures, one of labels, and the studies where two systems differ most."""
    tables = [markdown_table(*table) for table in _tables(scores)]
    studies = [_study_text(study, _names(scores)) for study in scores.studies[:num_studies] if study.other is not None]
    return "\n\n".join(
        [*([verdict] if (verdict := _verdict(scores)) else []), *tables, " ".join(_notes(scores)), *studies]
    )


def render_scores(scores: Scores, *, command: str, num_studies: int) -> str:
    """Return the scores as one HTML page, with nothing to fetch.

    Raises:
        BackendUnavailable: Jinja2 is not installed.
    """
    studies = [_PageStudy(study, list(_writings(study, _names(scores)))) for study in scores.studies[:num_studies]]
    return render(
        "score.html.j2",
        scores=scores,
        verdict=_verdict(scores),
        notice=NOTICE,
        command=command,
        tables=_tables(scores),
        notes=list(_notes(scores)),
        studies=studies,
    )


# -- Tables ----------------------------------------------------------------------------------------------------------


def _names(scores: Scores) -> list[str]:
    """Return what the systems are called: their files."""
    return short_names([Path(file) for file in (scores.predictions, scores.compared_with) if file is not None])


def _tables(scores: Scores) -> list[_Table]:
    """Return the figures, and the labels where they were read."""
    whole = f"{scores.count} studies"
    if scores.compared_with is not None:
        columns = (*_names(scores), "difference", "95 % interval", "p", "better", "worse", "same")
        compared = [_versus(title(name), row) for name, row in scores.comparisons.items()]
        labels = [_versus(f"F1 {label}", row) for label, row in scores.label_comparisons.items()]
        tables = [_Table((whole, *columns), compared), _Table(("label", *columns), labels)]
        return tables if labels else tables[:1]
    figures = [_figure(name, figure) for name, figure in scores.figures.items()]
    tables = [_Table((whole, "value", "95 % interval", "over"), figures)]
    if scores.labels:
        header = ("label", "F1", "95 % interval", "precision", "recall", "in references", "in predictions")
        lines = [
            (
                row.label,
                *_value(row.f1),
                _shown(row.precision),
                _shown(row.recall),
                str(row.support),
                str(row.predicted),
            )
            for row in scores.labels
        ]
        tables.append(_Table(header, lines))
    return tables


def title(name: str) -> str:
    """Return what a figure is called in a table."""
    return TITLES.get(name, name.replace("chexbert_f1", "CheXbert F1"))


def _figure(name: str, figure: Estimate | Missing) -> tuple[str, ...]:
    if isinstance(figure, Missing):
        return (title(name), figure.why, _NONE, _NONE)
    return (title(name), *_value(figure), f"{figure.count} {'findings' if name.endswith('_accuracy') else 'studies'}")


def _versus(name: str, comparison: Comparison | Missing) -> tuple[str, ...]:
    if isinstance(comparison, Missing):
        return (name, comparison.why, *[_NONE] * 7)
    difference = comparison.difference
    between = _NONE if math.isnan(difference.low) else f"{difference.low:+.3f} – {difference.high:+.3f}"
    p = _NONE if math.isnan(comparison.p_value) else f"{comparison.p_value:.4f}"
    counts = comparison.better, comparison.worse, comparison.same
    apart = _NONE if math.isnan(difference.value) else f"{difference.value:+.3f}"
    return (name, _shown(comparison.value.value), _shown(comparison.other.value), apart, between, p, *map(str, counts))


def _value(estimate: Estimate) -> tuple[str, str]:
    between = _NONE if math.isnan(estimate.low) else f"{estimate.low:.3f} – {estimate.high:.3f}"
    return _shown(estimate.value), between


def _shown(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.3f}"


# -- Words -----------------------------------------------------------------------------------------------------------


def _verdict(scores: Scores) -> str:
    """Say in a sentence which system is the better one, where there are two."""
    if scores.compared_with is None:
        return ""
    ours, theirs = _names(scores)
    compared = {name: row for name, row in scores.comparisons.items() if isinstance(row, Comparison)}
    named = {
        verdict: [title(name) for name, row in compared.items() if row.verdict == verdict]
        for verdict in ("better", "worse")
    }
    parts = [f"{verdict} in {len(found)} ({'; '.join(found)})" for verdict, found in named.items() if found]
    if not parts:
        return f"{ours} and {theirs}: none of {len(compared)} figures differs by more than chance explains."
    return f"{ours} beside {theirs}: {' and '.join(parts)} of {len(compared)} figures, by more than chance explains."


def _notes(scores: Scores) -> Iterator[str]:
    """Yield what a reader of the tables has to know."""
    yield "Uncertain labels count as negative; a dash is a figure with nothing to measure it on."
    yield f"Intervals: studies drawn again {RESAMPLES} times, the middle 95 %."
    if scores.compared_with is not None:
        yield (
            "Difference: the first file's figure less the second's, its interval by drawing the same studies for both. "
            f"p: how often results exchanged study by study ({EXCHANGES:,} times; all ways up to {EXACT_STUDIES} "
            f"studies) lie as far apart; below {SIGNIFICANT} is called more than chance, and is not corrected for the "
            "number of figures. Better, worse, same: studies by themselves; those with nothing to measure are in none."
        )
    if scores.remark:
        yield f"In no figure: {scores.remark}."
    figures = scores.figures if scores.compared_with is None else scores.comparisons
    yield from dict.fromkeys(figure.todo for figure in figures.values() if isinstance(figure, Missing) and figure.todo)


class _Writing(NamedTuple):
    name: str
    passages: Sequence[Passage]


class _PageStudy(NamedTuple):
    study: ScoredStudy
    texts: Sequence[_Writing]


def _writings(study: ScoredStudy, names: Sequence[str]) -> Iterator[_Writing]:
    """Yield the texts of a study: the last with its words marked that the one before it has not, and the other way."""
    texts = [("reference", study.reference)]
    texts += [(names[1], study.other)] if study.other is not None else []
    for name, text in texts:
        yield _Writing(name, [Passage(kind="same", text=text)] if text else [])
    yield _Writing(names[0], compare_words(texts[-1][1], study.prediction))


_MARKS = {"same": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}


def _study_text(study: ScoredStudy, names: Sequence[str]) -> str:
    first = next(iter(study.figures), None)
    figures = f"{title(first)} {_shown(study.figures[first])}, {_shown(study.other_figures[first])}" if first else ""
    lines = [f"{study.id}: {figures}"]
    for writing in _writings(study, names):
        text = "".join(_MARKS[passage.kind].format(passage.text) for passage in writing.passages)
        lines.append(f"  {writing.name}: {text or '(no words)'}")
    return "\n".join(lines)
