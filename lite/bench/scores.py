"""Scores as text for a terminal, which is markdown too, and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from lite.artifact.manifest import NOTICE
from lite.bench.columns import TITLES
from lite.bench.report import render
from lite.bench.studies import Card, Writing, filters, study_card, with_films
from lite.bench.table import markdown_table
from lite.bench.words import compare_words
from lite.console import short_names
from lite.eval.figures import RESAMPLES, Estimate, Missing
from lite.eval.paired import EXACT_STUDIES, EXCHANGES, SIGNIFICANT, Comparison
from lite.eval.scoring import ScoredStudy, Scores

_NONE = "–"
_MAX_FIGURES: Final = 5  # of a study
_Table: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows


def format_scores(scores: Scores, *, num_studies: int) -> str:
    """Return the scores as text: a table of figures, one of labels, and the studies where two systems differ most."""
    tables = [markdown_table(*table) for table in _tables(scores)]
    shown = scores.studies[:num_studies] if len(scores.files) > 1 else ()
    studies = [_study_text(study, _names(scores)) for study in shown]
    return "\n\n".join(filter(None, [_verdict(scores), *tables, " ".join(_notes(scores)), *studies]))


def render_scores(scores: Scores, *, command: str, num_studies: int) -> str:
    """Return the scores as one HTML page, with nothing to fetch.

    Raises:
        BackendUnavailable: Jinja2 is not installed.
    """
    cards = list(with_films(_card(study, _names(scores)) for study in scores.studies))
    return render(
        "score.html.j2",
        scores=scores,
        verdict=_verdict(scores),
        notice=NOTICE,
        command=command,
        tables=_tables(scores),
        notes=list(_notes(scores)),
        cards=cards,
        filters=filters(cards),
        names=_names(scores),
        num_open=num_studies,
    )


def _card(study: ScoredStudy, names: Sequence[str]) -> Card:
    """Make a study's card; of two systems the first one's words are marked beside the other's."""
    shown = [name for name, values in study.figures.items() if not name.endswith("_accuracy")][:_MAX_FIGURES]
    scores = [
        " · ".join(f"{title(name)} {_shown(study.figures[name][system])}" for name in shown)
        for system in range(len(names))
    ]
    ours, *other = (Writing(*of) for of in zip(names, study.texts, [None] * len(names), scores, strict=True))
    return study_card(study.id, study.image, study.reference, [*other, ours], marked=bool(other))


# -- Tables ----------------------------------------------------------------------------------------------------------


def _names(scores: Scores) -> list[str]:
    """Return what the systems are called: their files."""
    return short_names(list(map(Path, scores.files)))


def _tables(scores: Scores) -> list[_Table]:
    """Return the figures, and the labels where they were read."""
    whole = f"{scores.count} studies"
    if len(scores.files) > 1:
        columns = (*_names(scores), "difference", "95 % interval", "p", "better", "worse", "same")
        compared = [_versus(title(name), row) for name, row in scores.comparisons.items()]
        labels = [_versus(f"F1 {label}", row) for label, row in scores.label_comparisons.items()]
        tables: list[_Table] = [((whole, *columns), compared), (("label", *columns), labels)]
        return tables if labels else tables[:1]
    figures = [_figure(name, figure, scores.spreads.get(name)) for name, figure in scores.figures.items()]
    header = ("label", "F1", "95 % interval", "precision", "recall", "in references", "in predictions")
    lines = [
        (row.label, *_value(row.f1), *map(_shown, (row.precision, row.recall)), f"{row.support}", f"{row.predicted}")
        for row in scores.labels
    ]
    tables = [((whole, "value", "95 % interval", "over"), figures), (header, lines)]
    return tables if lines else tables[:1]


def title(name: str) -> str:
    """Return what a figure is called in a table."""
    return TITLES.get(name, name.replace("chexbert_f1", "CheXbert F1").replace("_", " "))


def _figure(name: str, figure: Estimate | Missing, spread: float | None) -> tuple[str, ...]:
    if isinstance(figure, Missing):
        return (title(name), figure.why, _NONE, _NONE)
    over = f"{figure.count} {'findings' if name.endswith('_accuracy') else 'studies'}"
    return (title(name), *_value(figure), over if spread is None else f"{over}, sd {_shown(spread)}")


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
    """Say in a sentence how good a system is, or which of two is the better one."""
    ours, *other = _names(scores)
    if not other:
        name, figure = next(iter(scores.figures.items()))
        value, between = (figure.why, _NONE) if isinstance(figure, Missing) else _value(figure)
        return f"{ours}: {title(name)} {value} ({between}) beside {scores.count} reports."
    compared = {title(name): row for name, row in scores.comparisons.items() if isinstance(row, Comparison)}
    found = {word: [name for name, row in compared.items() if row.verdict == word] for word in ("better", "worse")}
    parts = [f"{word} in {len(names)} ({'; '.join(names)})" for word, names in found.items() if names]
    versus = [_versus(*of) for of in compared.items()][:1]
    first = "".join(f"{name} {value}, {apart} ({between})" for name, value, _, apart, between, *_ in versus)
    if not parts:
        return (
            f"{ours} beside {other[0]}: {first}. None of {len(compared)} figures differs by more than chance explains."
        )
    found_in = " and ".join(parts)
    return f"{ours} beside {other[0]}: {found_in} of {len(compared)} figures, by more than chance explains; {first}."


def _notes(scores: Scores) -> Iterator[str]:
    """Yield what a reader of the tables has to know."""
    yield f"Intervals: studies drawn again {RESAMPLES} times, the middle 95 %. A dash: there is nothing to measure."
    if scores.labels:
        yield "Uncertain labels count as negative."
    if len(scores.files) > 1:
        yield (
            "Difference: the first file's figure less the second's, its interval by drawing the same studies for both. "
            f"p: how often results exchanged study by study ({EXCHANGES:,} times; all ways up to {EXACT_STUDIES} "
            f"studies) lie as far apart; below {SIGNIFICANT} is called more than chance, and is not corrected for the "
            "number of figures. Better, worse, same: studies by themselves; those with nothing to measure are in none."
        )
    if scores.remark:
        yield f"In no figure: {scores.remark}."
    yield from scores.notes
    figures = scores.comparisons or scores.figures
    yield from dict.fromkeys(figure.todo for figure in figures.values() if isinstance(figure, Missing) and figure.todo)


_MARKS = {"same": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}


def _study_text(study: ScoredStudy, names: Sequence[str]) -> str:
    """Return a study of two systems: the first one's words are marked that the other has not, and the other way."""
    figures = [f"{title(name)} {', '.join(map(_shown, values))}" for name, values in study.figures.items()]
    ours, other = study.texts
    marked = "".join(_MARKS[passage.kind].format(passage.text) for passage in compare_words(other, ours))
    texts = {"reference": study.reference, names[1]: other, names[0]: marked}
    lines = [f"  {name}: {text or '(no words)'}" for name, text in texts.items()]
    return "\n".join([": ".join([study.id, *figures[:1]]), *lines])
