"""Score predicted findings against their references: `python -m benchmarks.phantom score PREDICTIONS.jsonl`.

A prediction is one line of JSON, in the form of the reference evaluation: {"id", "query", "reference", "prediction"}.
Labels are read from both texts by `lite.eval.labels`, which is exact on the grammar's own texts; with the JSON list
of the films (`--truth`) the reference's labels are what was drawn, and the labeller only reads the predictions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite.errors import LiteError
from lite.eval.figures import Estimate
from lite.eval.labels import LABELS, Label, Reading
from lite.eval.metrics import FindingsScores, Readings, score_findings

_KEYS = ("id", "query", "reference", "prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One line of a predictions file."""

    id: str
    query: str
    reference: str
    prediction: str

    def to_json(self) -> str:
        """Return the line, without its end."""
        return json.dumps({key: getattr(self, key) for key in _KEYS}, ensure_ascii=False)


def _parse_line(line: str, where: str) -> Prediction:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"{where}: got a line that is not JSON ({error.msg}) · expected one JSON object per line · write it again"
        raise LiteError(msg) from error
    if not isinstance(value, dict):
        msg = f"{where}: got {type(value).__name__} · expected an object with {', '.join(_KEYS)} · write it again"
        raise LiteError(msg)
    missing = [key for key in _KEYS if key not in value]
    if missing:
        msg = f"{where}: got no {', '.join(missing)} · expected {', '.join(_KEYS)} · write it again"
        raise LiteError(msg)
    wrong = [key for key in _KEYS[1:] if not isinstance(value[key], str)]
    if wrong or not isinstance(value["id"], (str, int)):
        msg = f"{where}: got {', '.join(wrong) or 'id'} that is not text · expected strings · write it again"
        raise LiteError(msg)
    return Prediction(**{key: str(value[key]) for key in _KEYS})


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file; keys beyond the four are allowed and ignored.

    Raises:
        LiteError: no such file, no line in it, or a line that is malformed or repeats an id (its number is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = (
            f"{path}: got a file that cannot be read ({error}) · expected a JSONL file of predictions · check the path"
        )
        raise LiteError(msg) from error
    predictions: list[Prediction] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        prediction = _parse_line(line, f"{path}:{number}")
        if prediction.id in first_line:
            msg = (
                f"{path}:{number}: got id {prediction.id!r} again, as on line {first_line[prediction.id]} · expected "
                "each study once · remove one of them"
            )
            raise LiteError(msg)
        first_line[prediction.id] = number
        predictions.append(prediction)
    if not predictions:
        msg = f"{path}: got an empty file · expected a line per study · see: python -m benchmarks.phantom predict -h"
        raise LiteError(msg)
    return predictions


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

    Args:
        predictions: JSONL, as `read_predictions` takes it.
        truth: the JSON list of the films; the labels drawn there take the place of those read from the references.

    Raises:
        LiteError: a file is not what it should be, or a predicted study is not in `truth`.
    """
    rows = read_predictions(predictions)
    readings = None
    if truth is not None:
        drawn = read_truth(truth)
        unknown = [row.id for row in rows if row.id not in drawn]
        if unknown:
            msg = (
                f"{predictions}: got {len(unknown)} ids that are not in {truth}, the first {unknown[0]!r} · expected "
                "predictions for the films of that list · name the list that they were made from"
            )
            raise LiteError(msg)
        readings = [drawn[row.id] for row in rows]
    return score_findings(
        [row.reference for row in rows],
        [row.prediction for row in rows],
        truth=readings,
    )


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
    return "\n".join([*_aligned(figures), "", *_aligned(by_label), "", note])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS.jsonl", help="lines of id, query, reference, prediction"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="LIST.json",
        help="take the labels from the films' list, not from the references' text",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Print the scores; returns the exit code.

    Raises:
        LiteError: a file is not what it should be.
    """
    scores = score(args.predictions, truth=args.truth)
    text = json.dumps(to_json(scores), ensure_ascii=False) if args.json else format_table(scores)
    sys.stdout.write(f"{text}\n")
    return 0
