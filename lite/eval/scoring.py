"""Predictions beside their references, and beside those of another system: `python -m lite score`.

predictions, references ──► pairs of texts ──► sums of each study ──► figures with intervals
another system's          the same studies                      └──► differences, p, studies better and worse
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from lite.errors import LiteError
from lite.eval.figures import Estimate, Missing, Sums, f1
from lite.eval.labels import LABELS, Label, read_labels, unreadable
from lite.eval.metrics import LabelScore, Readings, label_counts, label_f1
from lite.eval.paired import Comparison, compare
from lite.studies.predictions import read_predictions
from lite.studies.results import Result
from lite.studies.sources import read_source
from lite.studies.sources.base import SourceOptions

Measure: TypeAlias = Callable[[Sequence[str], Sequence[str]], Mapping[str, Sums | Missing]]
"""Measures predictions beside references, such as `lite.eval.measures.measure`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The studies that can be scored, of one system or of two."""

    files: tuple[str, ...]  # of each system
    truth: str | None  # where the references are from, if not from the files
    ids: list[str]
    images: list[str]  # the films' paths; empty where none is named
    references: list[str]
    texts: list[list[str]]  # of each system
    left_out: dict[str, int]  # how many other studies there are, by the reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredStudy:
    """One study's texts, and its own figures: NaN where it has nothing to measure. The other system's, if any, last."""

    id: str
    image: str  # the film's path, or empty
    reference: str
    texts: tuple[str, ...]
    figures: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Everything that is said of predictions."""

    files: tuple[str, ...]
    truth: str | None
    count: int  # studies in the figures
    left_out: Mapping[str, int]  # studies that are in no figure, by the reason
    figures: Mapping[str, Estimate | Missing]
    spreads: Mapping[str, float]  # standard deviation over studies, of counts of errors
    labels: tuple[LabelScore, ...]
    comparisons: Mapping[str, Comparison | Missing]  # of each figure
    label_comparisons: Mapping[Label, Comparison]  # of F1
    studies: tuple[ScoredStudy, ...]  # those with the most to look at first
    notes: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """What was left out, in words; empty where nothing was."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())


def read_pairs(files: Sequence[Path], *, truth: Path | None = None) -> Pairs:
    """Read predictions of one system, or of two about the same studies.

    Left out is a study that failed, one that only one system has, and one whose reference says nothing: empty, or not
    in English, where its labels would have to be read.

    Args:
        files: as `read_predictions` takes them.
        truth: the studies' source. Its findings take the place of the files' references.

    Raises:
        LiteError: a file is not what it should be, a predicted study is not in `truth`, the files have other references
            than each other, or there is nothing to compare a text with.
    """
    systems = [read_predictions(file) for file in files]
    if truth is not None:
        systems = [_with_references(rows, truth, file) for rows, file in zip(systems, files, strict=True)]
    by_id = [{row.study.id: row for row in rows} for rows in systems]
    references: dict[str, str] = {}
    named = {name: [rows[name] for rows in by_id if name in rows] for rows in by_id for name in rows}
    left_out: Counter[str] = Counter()
    for name, rows in named.items():
        reference = _reference(rows, files)
        if len(rows) < len(by_id):
            left_out["in one of the files only"] += 1
        elif any(row.prediction is None for row in rows):
            left_out["that failed"] += 1
        elif flaw := unreadable(reference):
            left_out[f"whose reference is {flaw}"] += 1
        else:
            references[name] = reference
    if not references:
        msg = (
            f"{' and '.join(map(str, files))}: got {left_out.total()} studies, none with a prediction and a reference "
            "in English · expected the findings to compare each with · name the list of the films with --truth"
        )
        raise LiteError(msg)
    return Pairs(
        files=tuple(map(str, files)),
        truth=None if truth is None else str(truth),
        ids=[*references],
        images=[str(next((row.study.image for row in named[name] if row.study.image), "")) for name in references],
        references=[*references.values()],
        texts=[[rows[name].prediction or "" for name in references] for rows in by_id],
        left_out=dict(left_out),
    )


def _with_references(rows: Sequence[Result], truth: Path, predictions: Path) -> list[Result]:
    """Find each row's study in a source, by its id or its film; return the rows with the source's studies."""
    listed = {study.id: study for study in read_source(str(truth), SourceOptions())}
    films = {study.path.resolve(): study for study in listed.values()}
    found = []
    for row in rows:
        study = listed.get(row.study.id) or films.get(row.study.path.resolve())
        if study is None:
            msg = (
                f"{predictions}: got study {row.study.id!r}, which is not in {truth} · expected predictions for the "
                "films of that list · name the list that they were made from"
            )
            raise LiteError(msg)
        found.append(replace(row, study=study))
    return found


def _reference(rows: Sequence[Result], files: Sequence[Path]) -> str:
    """Return the reference of a study, which all files agree on that have one."""
    known = {" ".join(row.study.reference.split()): row.study.reference for row in rows if row.study.reference.strip()}
    if len(known) > 1:
        msg = (
            f"{' and '.join(map(str, files))}: got two references of study {rows[0].study.id!r} · expected the same "
            "studies in both · name the list of the films, whose findings are taken then, with --truth"
        )
        raise LiteError(msg)
    return next(iter(known.values()), "")


def score(pairs: Pairs, measure: Measure, *, by_label: bool = True) -> Scores:
    """Measure one system's texts, or compare those of two.

    Args:
        pairs: the texts.
        measure: which figures.
        by_label: whether to say, too, how each label fares.
    """
    found = [measure(pairs.references, texts) for texts in pairs.texts]
    readings = [[read_labels(text) for text in texts] for texts in (pairs.references, *pairs.texts)] if by_label else []
    two = len(pairs.texts) > 1
    sums = {name: figure for name, figure in found[0].items() if isinstance(figure, Sums)}
    return Scores(
        files=pairs.files,
        truth=pairs.truth,
        count=len(pairs.ids),
        left_out=pairs.left_out,
        figures={name: sums[name].estimate() if name in sums else figure for name, figure in found[0].items()},  # type: ignore[misc]
        spreads={name: _spread(figure) for name, figure in sums.items() if figure.lower_is_better and figure.own_cases},
        labels=label_f1(*readings[:2]).per_label if by_label else (),
        comparisons={name: _compared(figure, found[1][name]) for name, figure in found[0].items()} if two else {},
        label_comparisons=_compare_labels(*readings) if two and by_label else {},
        studies=_studies(pairs, found),
    )


def _spread(figure: Sums) -> float:
    values = figure.statistic(figure.per_study)
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def _compared(system: Sums | Missing, other: Sums | Missing) -> Comparison | Missing:
    if isinstance(system, Missing):
        return system
    return other if isinstance(other, Missing) else compare(system, other)


def _compare_labels(
    truth: Sequence[Readings], drafted: Sequence[Readings], other: Sequence[Readings]
) -> dict[Label, Comparison]:
    """Compare the F1 of each label."""
    counts = label_counts(truth, drafted), label_counts(truth, other)
    return {
        label: compare(*(Sums(per_study=of[:, index], statistic=f1) for of in counts))
        for index, label in enumerate(LABELS)
    }


def _studies(pairs: Pairs, found: Sequence[Mapping[str, Sums | Missing]]) -> tuple[ScoredStudy, ...]:
    """Return the studies by what there is to see: where the systems differ most, or the one is furthest off.

    The first figure decides, and after it the others in their order.
    """
    measured = [{name: sums for name, sums in figures.items() if isinstance(sums, Sums)} for figures in found]
    names = [name for name in measured[0] if name in measured[-1]]
    values = [np.array([of[name].statistic(of[name].per_study) for name in names]).T for of in measured]
    right = np.array([0.0 if measured[0][name].lower_is_better else 1.0 for name in names])
    # Where there is nothing to measure, nothing is wrong.
    known = [np.where(np.isnan(of), right, of) for of in values]
    interest = np.abs(known[0] - (known[1] if len(known) > 1 else right))
    return tuple(
        ScoredStudy(
            id=pairs.ids[row],
            image=pairs.images[row],
            reference=pairs.references[row],
            texts=tuple(texts[row] for texts in pairs.texts),
            figures={name: tuple(float(of[row, column]) for of in values) for column, name in enumerate(names)},
        )
        for row in np.lexsort(-interest.T[::-1])
    )
