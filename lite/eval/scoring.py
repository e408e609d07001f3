"""Predictions beside their references, and beside those of another system: `python -m lite score`.

predictions, references ──► pairs of texts ──► sums of each study ──► figures with intervals
another system's          the same studies                      └──► differences, p, studies better and worse
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lite.errors import LiteError
from lite.eval.figures import Estimate, Floats, Missing, Sums, f1
from lite.eval.labels import LABELS, Label, read_labels, unreadable
from lite.eval.measures import TEXT_METRICS, measure
from lite.eval.metrics import LabelScore, Readings, label_counts, label_f1
from lite.eval.paired import Comparison, compare
from lite.studies.predictions import read_predictions
from lite.studies.results import Result
from lite.studies.sources import read_source
from lite.studies.sources.base import SourceOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredStudy:
    """One study's texts, and its own figures: NaN where it has nothing to measure."""

    id: str
    reference: str
    prediction: str
    other: str | None  # the other system's text
    figures: Mapping[str, float]
    other_figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Everything that is said of a file of predictions."""

    predictions: str
    compared_with: str | None
    truth: str | None
    count: int  # studies in the figures
    left_out: Mapping[str, int]  # studies that are in no figure, by the reason
    figures: Mapping[str, Estimate | Missing]
    labels: tuple[LabelScore, ...]
    comparisons: Mapping[str, Comparison | Missing]  # of each figure
    label_comparisons: Mapping[Label, Comparison]  # of F1
    studies: tuple[ScoredStudy, ...]  # those with the most to look at first

    @property
    def remark(self) -> str:
        """What was left out, in words; empty where nothing was."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())


def score(
    predictions: Path,
    *,
    truth: Path | None = None,
    compare_with: Path | None = None,
    metrics: Collection[str] = TEXT_METRICS,
    chexbert: Path | None = None,
    device: str = "cpu",
) -> Scores:
    """Score a file of predictions.

    A reference that says nothing (empty, or not in English where its labels would have to be read) is in no figure, nor
    is a study that failed. With another system only the studies of both are scored.

    Args:
        predictions: as `read_predictions` takes it.
        truth: the studies' source. Its findings take the place of the file's references.
        compare_with: another system's predictions.
        metrics: which, see `lite.eval.measures.Metric`.
        chexbert: CheXbert's weights.
        device: what models of metrics run on.

    Raises:
        LiteError: a file is not what it should be, a predicted study is not in `truth`, the two files have other
            references, or there is nothing to compare a text with.
    """
    files = [predictions] if compare_with is None else [predictions, compare_with]
    systems = [read_predictions(file) for file in files]
    if truth is not None:
        systems = [_with_references(rows, truth, file) for rows, file in zip(systems, files, strict=True)]
    ids, references, texts, left_out = _pairs(systems, files)
    found = [measure(references, drafts, metrics, chexbert=chexbert, device=device) for drafts in texts]
    figures = {name: sums if isinstance(sums, Missing) else sums.estimate() for name, sums in found[0].items()}
    readings = [[read_labels(text) for text in of] for of in (references, *texts)] if "labels" in metrics else []
    return Scores(
        predictions=str(predictions),
        compared_with=None if compare_with is None else str(compare_with),
        truth=None if truth is None else str(truth),
        count=len(ids),
        left_out=left_out,
        figures=figures,
        labels=label_f1(readings[0], readings[1]).per_label if readings else (),
        comparisons={name: _compared(sums, found[1][name]) for name, sums in found[0].items()} if compare_with else {},
        label_comparisons=_compare_labels(*readings) if compare_with and readings else {},
        studies=_studies(ids, references, texts, found),
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


def _pairs(
    systems: Sequence[Sequence[Result]], files: Sequence[Path]
) -> tuple[list[str], list[str], list[list[str]], dict[str, int]]:
    """Return ids, references and each system's texts of the studies that can be scored, and why others cannot."""
    by_id = [{row.study.id: row for row in rows} for rows in systems]
    ids: list[str] = []
    references: list[str] = []
    left_out: Counter[str] = Counter()
    for name in dict.fromkeys(name for rows in by_id for name in rows):
        rows = [rows[name] for rows in by_id if name in rows]
        reference = _reference(rows, files)
        if len(rows) < len(by_id):
            left_out["in one of the files only"] += 1
        elif any(row.prediction is None for row in rows):
            left_out["that failed"] += 1
        elif flaw := unreadable(reference):
            left_out[f"whose reference is {flaw}"] += 1
        else:
            ids.append(name)
            references.append(reference)
    if not ids:
        msg = (
            f"{' and '.join(map(str, files))}: got {left_out.total()} studies, none with a prediction and a reference "
            "in English · expected the findings to compare each with · name the list of the films with --truth"
        )
        raise LiteError(msg)
    texts = [[rows[name].prediction or "" for name in ids] for rows in by_id]
    return ids, references, texts, dict(left_out)


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


def _compare_labels(
    truth: Sequence[Readings], drafted: Sequence[Readings], other: Sequence[Readings]
) -> dict[Label, Comparison]:
    """Compare the F1 of each label."""
    counts = label_counts(truth, drafted), label_counts(truth, other)
    return {
        label: compare(*(Sums(per_study=of[:, index], statistic=f1) for of in counts))
        for index, label in enumerate(LABELS)
    }


def _compared(system: Sums | Missing, other: Sums | Missing) -> Comparison | Missing:
    if isinstance(system, Missing):
        return system
    return other if isinstance(other, Missing) else compare(system, other)


def _studies(
    ids: Sequence[str],
    references: Sequence[str],
    texts: Sequence[Sequence[str]],
    found: Sequence[Mapping[str, Sums | Missing]],
) -> tuple[ScoredStudy, ...]:
    """Return the studies by what there is to see: where the systems differ most, or the one is furthest off.

    The first figure decides, and after it the others in their order.
    """
    measured = [{name: sums for name, sums in figures.items() if isinstance(sums, Sums)} for figures in found]
    # Only what all systems have can be compared.
    names = [name for name in measured[0] if all(name in figures for figures in measured)]
    values = [np.array([figures[name].statistic(figures[name].per_study) for name in names]).T for figures in measured]
    right = np.array([0.0 if measured[0][name].lower_is_better else 1.0 for name in names])
    # Where there is nothing to measure, nothing is wrong.
    known = [np.where(np.isnan(of), right, of) for of in values]
    interest = np.abs(known[0] - (known[1] if len(known) > 1 else right))
    studies = [
        ScoredStudy(
            id=ids[row],
            reference=references[row],
            prediction=texts[0][row],
            other=texts[1][row] if len(texts) > 1 else None,
            figures=_named(names, values[0][row]),
            other_figures=_named(names, values[1][row]) if len(values) > 1 else {},
        )
        for row in np.lexsort(-interest.T[::-1])
    ]
    return tuple(studies)


def _named(names: Sequence[str], values: Floats) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))
