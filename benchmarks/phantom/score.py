"""Score predicted findings against their references: `python -m benchmarks.phantom score PREDICTIONS.jsonl`.

A prediction is a line of JSON, as `python -m lite run` and `generate --json` write it; the reference evaluation's
own lines, {"id", "query", "reference", "prediction"}, will do. Labels are read from both texts by `lite.eval.labels`,
which is exact on the grammar's own texts: what it reads there is what was drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lite.bench.table import markdown_table, to_json
from lite.console import say
from lite.errors import LiteError
from lite.eval.figures import Estimate
from lite.eval.labels import unreadable
from lite.eval.metrics import FindingsScores, score_findings
from lite.studies.results import Result, read_results
from lite.studies.sources.listed import read_studies


def score(predictions: Path, *, truth: Path | None = None) -> FindingsScores:
    """Score a predictions file.

    A reference that says nothing (empty, or not in English where its labels would have to be read) is in no figure.

    Args:
        predictions: JSONL, as `read_results` takes it. Studies that failed count for nothing.
        truth: the list of the films. Its findings take the place of the file's references.

    Raises:
        LiteError: a file is not what it should be, a predicted study is not in `truth`, or there is nothing to compare
            a text with.
    """
    rows = [row for row in read_results(predictions) if row.prediction is not None]
    if truth is not None:
        rows = _with_references(rows, truth, predictions)
    flaws = [unreadable(row.study.reference) for row in rows]
    usable = [row for row, flaw in zip(rows, flaws, strict=True) if not flaw]
    if not usable:
        msg = (
            f"{predictions}: got {len(rows)} predictions, none with a reference in English · expected the findings to "
            "compare each with · name the list of the films with --truth"
        )
        raise LiteError(msg)
    scores = score_findings([row.study.reference for row in usable], [row.prediction or "" for row in usable])
    return replace(scores, left_out=dict(Counter(flaw for flaw in flaws if flaw)))


def _with_references(rows: Sequence[Result], truth: Path, predictions: Path) -> list[Result]:
    """Find each row's study in a list, by its id or its film; return the rows with the list's studies."""
    listed = {study.id: study for study in read_studies(truth)}
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


def _row(name: str, estimate: Estimate, *rest: str) -> tuple[str, ...]:
    between = "–" if math.isnan(estimate.low) else f"{estimate.low:.3f} – {estimate.high:.3f}"
    return (name, _shown(estimate.value), between, *rest)


def _shown(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _counts(scores: FindingsScores) -> str:
    return ", ".join(f"{count} studies whose reference is {flaw}" for flaw, count in scores.left_out.items())


def format_table(scores: FindingsScores) -> str:
    """Return the scores as two markdown tables, whole figures and labels."""
    labels, num_studies = scores.label_f1, f"{scores.count} studies"
    figures = [
        _row("label F1, micro", labels.micro, num_studies),
        _row("label F1, macro", labels.macro, f"{sum(row.support > 0 for row in labels.per_label)} labels"),
        _row("side accuracy", scores.side_accuracy, f"{scores.side_accuracy.count} findings"),
        _row("size accuracy", scores.size_accuracy, f"{scores.size_accuracy.count} findings"),
        _row("zone accuracy", scores.zone_accuracy, f"{scores.zone_accuracy.count} findings"),
        _row("ROUGE-L", scores.rouge_l, num_studies),
        _row("BLEU-1", scores.bleu_1, num_studies),
        _row("BLEU-4", scores.bleu_4, num_studies),
    ]
    by_label = [
        _row(row.label, row.f1, _shown(row.precision), _shown(row.recall), str(row.support), str(row.predicted))
        for row in labels.per_label
    ]
    tables = (
        markdown_table((num_studies, "value", "95 % interval", "over"), figures),
        markdown_table(
            ("label", "F1", "95 % interval", "precision", "recall", "in references", "in predictions"), by_label
        ),
    )
    note = "Uncertain labels count as negative; a dash is a figure with nothing to measure it on."
    if scores.left_out:
        note += f" In no figure: {_counts(scores)}."
    return "\n\n".join((*tables, note))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS.jsonl", help="what python -m lite run has written"
    )
    parser.add_argument(
        "--truth", type=Path, metavar="LIST.json", help="take the references from the films' list, not from the file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def run(arguments: argparse.Namespace) -> int:
    """Print the scores; return the exit status.

    Raises:
        LiteError: a file is not what it should be.
    """
    scores = score(arguments.predictions, truth=arguments.truth)
    if scores.left_out:
        say(f"{arguments.predictions}: left out {_counts(scores)}")
    text = json.dumps(to_json(scores), ensure_ascii=False) if arguments.json else format_table(scores)
    sys.stdout.write(f"{text}\n")
    return 0
