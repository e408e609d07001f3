"""Score predicted findings against their references: `python -m benchmarks.phantom score PREDICTIONS.jsonl`.

A prediction is a line of JSON, as `python -m lite predict` and `generate --json` write it; the reference evaluation's
own lines, {"id", "query", "reference", "prediction"}, will do. Labels are read from both texts by `lite.eval.labels`,
which is exact on the grammar's own texts; with the JSON list of the films (`--truth`) the reference's labels are what
was drawn, and the labeller only reads the predictions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lite.console import say
from lite.errors import LiteError
from lite.eval.figures import Estimate
from lite.eval.labels import LABELS, Label, Reading, unreadable
from lite.eval.metrics import FindingsScores, Readings, score_findings
from lite.studies.readers import read_studies
from lite.studies.results import Result, read_results


def read_truth(path: Path) -> dict[str, Readings]:
    """Read what was drawn in each study of a JSON list written by `python -m benchmarks.phantom write`, by id.

    Raises:
        LiteError: not such a list.
    """
    try:
        studies = json.loads(path.read_text(encoding="utf-8"))
        return {str(study["id"]): _readings(study["phantom"]["labels"]) for study in studies}
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = (
            f"{path}: got something else ({type(error).__name__}: {error}) · expected the JSON list that python -m "
            "benchmarks.phantom write makes, with the drawn labels of each film · name that file"
        )
        raise LiteError(msg) from error


def _readings(labels: dict[str, dict[str, Any]]) -> dict[Label, Reading]:
    return {label: Reading(**labels[label]) for label in LABELS}


def score(predictions: Path, *, truth: Path | None = None) -> FindingsScores:
    """Score a predictions file.

    A reference that says nothing (empty, or not in English where its labels would have to be read) is in no figure.

    Args:
        predictions: JSONL, as `read_results` takes it. Studies that failed count for nothing.
        truth: the JSON list of the films. The labels drawn there take the place of those read from the references,
            and its findings that of references that the file does not have.

    Raises:
        LiteError: a file is not what it should be, a predicted study is not in `truth`, or there is nothing to compare
            a text with.
    """
    rows = [row for row in read_results(predictions) if row.prediction is not None]
    drawn = None if truth is None else read_truth(truth)
    if truth is not None:
        rows = _with_references(rows, truth, predictions)
    flaws = [unreadable(row.study.reference) for row in rows]
    if drawn:  # then only the texts are compared, in whatever language
        flaws = [flaw if flaw == "empty" else None for flaw in flaws]
    usable = [row for row, flaw in zip(rows, flaws, strict=True) if not flaw]
    if not usable:
        msg = (
            f"{predictions}: got {len(rows)} predictions, none with a reference in English · expected the findings to "
            "compare each with · name the list of the films with --truth"
        )
        raise LiteError(msg)
    scores = score_findings(
        [row.study.reference for row in usable],
        [row.prediction or "" for row in usable],
        truth=[drawn[row.study.id] for row in usable] if drawn else None,
    )
    return replace(scores, left_out=dict(Counter(flaw for flaw in flaws if flaw)))


def _with_references(rows: Sequence[Result], truth: Path, predictions: Path) -> list[Result]:
    """Find each row's study in a list, by its id or its film; return the rows with the list's ids and findings."""
    listed = {study.id: study for study in read_studies(truth)}
    films = {study.path.resolve(): study for study in listed.values()}
    found = [listed.get(row.study.id) or films.get(row.study.path.resolve()) for row in rows]
    unknown = [row.study.id for row, study in zip(rows, found, strict=True) if study is None]
    if unknown:
        msg = (
            f"{predictions}: got {len(unknown)} ids that are not in {truth}, the first {unknown[0]!r} · expected "
            "predictions for the films of that list · name the list that they were made from"
        )
        raise LiteError(msg)
    return [
        replace(row, study=replace(study, reference=row.study.reference or study.reference))
        for row, study in zip(rows, found, strict=True)
        if study is not None
    ]


def _number(value: float) -> float | None:
    """Return what JSON can hold: it has no NaN."""
    return None if math.isnan(value) else round(value, 6)


def _interval(estimate: Estimate) -> list[float | None]:
    return [_number(estimate.low), _number(estimate.high)]


def to_json(scores: FindingsScores) -> dict[str, object]:
    """Return the scores as one flat object; what could not be measured is null."""
    estimates = {
        "macro_f1": scores.label_f1.macro,
        "micro_f1": scores.label_f1.micro,
        "side_accuracy": scores.side_accuracy,
        "size_accuracy": scores.size_accuracy,
        "zone_accuracy": scores.zone_accuracy,
        "rouge_l": scores.rouge_l,
        "bleu_1": scores.bleu_1,
        "bleu_4": scores.bleu_4,
    }
    per_label = {
        row.label: {
            "f1": _number(row.f1.value),
            "f1_interval": _interval(row.f1),
            "precision": _number(row.precision),
            "recall": _number(row.recall),
            "support": row.support,
            "predicted": row.predicted,
        }
        for row in scores.label_f1.per_label
    }
    return {
        "count": scores.count,
        "left_out": dict(scores.left_out),
        **{name: _number(estimate.value) for name, estimate in estimates.items()},
        "per_label": per_label,
        "intervals": {name: _interval(estimate) for name, estimate in estimates.items()},
    }


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _row(name: str, estimate: Estimate, *rest: str) -> tuple[str, ...]:
    between = "–" if math.isnan(estimate.low) else f"{estimate.low:.3f} – {estimate.high:.3f}"
    return (name, _shown(estimate.value), between, *rest)


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows with their columns lined up: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()


def _counts(scores: FindingsScores) -> str:
    return ", ".join(f"{count} studies whose reference is {flaw}" for flaw, count in scores.left_out.items())


def format_table(scores: FindingsScores) -> str:
    """Return the scores as two aligned tables, whole figures and labels."""
    labels = scores.label_f1
    figures: list[tuple[str, ...]] = [
        (f"{scores.count} studies", "value", "95 % interval", "over"),
        _row("label F1, micro", labels.micro, f"{scores.count} studies"),
        _row("label F1, macro", labels.macro, f"{sum(row.support > 0 for row in labels.per_label)} labels"),
        _row("side accuracy", scores.side_accuracy, f"{scores.side_accuracy.count} findings"),
        _row("size accuracy", scores.size_accuracy, f"{scores.size_accuracy.count} findings"),
        _row("zone accuracy", scores.zone_accuracy, f"{scores.zone_accuracy.count} findings"),
        _row("ROUGE-L", scores.rouge_l, f"{scores.count} studies"),
        _row("BLEU-1", scores.bleu_1, f"{scores.count} studies"),
        _row("BLEU-4", scores.bleu_4, f"{scores.count} studies"),
    ]
    by_label: list[tuple[str, ...]] = [
        ("label", "F1", "95 % interval", "precision", "recall", "in references", "in predictions")
    ]
    by_label += [
        _row(row.label, row.f1, _shown(row.precision), _shown(row.recall), str(row.support), str(row.predicted))
        for row in labels.per_label
    ]
    note = "Uncertain labels count as negative; a dash is a figure with nothing to measure it on."
    if scores.left_out:
        note += f" In no figure: {_counts(scores)}."
    return "\n".join([*_aligned(figures), "", *_aligned(by_label), "", note])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS.jsonl", help="what python -m lite predict has written"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="LIST.json",
        help="take the labels from the films' list, not from the references' text, and references that are missing",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Print the scores; returns the exit code.

    Raises:
        LiteError: a file is not what it should be.
    """
    scores = score(args.predictions, truth=args.truth)
    if scores.left_out:
        say(f"{args.predictions}: left out {_counts(scores)}")
    text = json.dumps(to_json(scores), ensure_ascii=False) if args.json else format_table(scores)
    sys.stdout.write(f"{text}\n")
    return 0
