"""`python -m lite score PREDICTIONS`: how good drafted findings are beside reports, and beside another system's."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli import judging
from lite.console import positive, print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.eval.chexprompt import Counts
    from lite.eval.judge import Judge
    from lite.eval.scoring import Measure

HELP: Final = "say how good drafted findings are beside their references"
DESCRIPTION: Final = (
    "Say how good drafted findings are beside the reports that come with the films, of phantoms or of patients, and "
    "with --compare beside another system's: differences, whether they could be chance, and the studies that differ "
    "most. Nothing leaves this machine, unless a judge elsewhere is named and allowed."
)
EPILOG: Final = """\
examples:
  python -m lite score predictions.jsonl
  python -m lite score int4.jsonl --compare fp16.jsonl --truth studies.json --html score.html
"""
METRICS: Final = ("labels", "rouge", "bleu", "chexbert", "radgraph", *judging.JUDGES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument
    add(
        "predictions",
        type=Path,
        nargs="?",
        metavar="PREDICTIONS",
        help="what python -m lite run has written, or lines of id, reference and prediction, or ReXrank's studies",
    )
    add("--truth", type=Path, metavar="LIST", help="take the references from the films' list, not from the file")
    add("--compare", type=Path, metavar="OTHER", help="another system's predictions of the same studies")
    add(
        "--metrics",
        type=_metrics,
        metavar="NAMES",
        default="labels,rouge,bleu",
        help=f"with commas between them: {', '.join(METRICS)} (default: %(default)s)",
    )
    add("--chexbert", type=Path, metavar="FILE", help="CheXbert's weights, with vocab.txt beside them")
    add("--device", default="cpu", help="what CheXbert and RadGraph run on (default: %(default)s)")
    add("--studies", type=positive, default=5, metavar="N", help="how many to show (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything, study by study")
    add("--html", type=Path, metavar="FILE", help="write a page")
    judging.add_arguments(parser)


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in METRICS]:
        msg = f"got {unknown[0]!r}, expected some of {', '.join(METRICS)}"
        raise argparse.ArgumentTypeError(msg)
    return names


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.bench.report import check_packages
    from lite.bench.scores import format_scores, render_scores
    from lite.bench.table import to_json
    from lite.eval import rules
    from lite.eval.scoring import read_pairs, score
    from lite.files import check_writable, write_whole

    if arguments.judge_check:
        return judging.run_check(arguments)
    if arguments.predictions is None:
        raise LiteError("got no predictions · expected a file of them · name what python -m lite run has written")
    check_writable(arguments.json, arguments.html)
    if arguments.html:
        check_packages()
    metrics = arguments.metrics
    judge = judging.open_judge(arguments) if "chexprompt" in metrics else None
    files = [file for file in (arguments.predictions, arguments.compare) if file is not None]
    pairs = read_pairs(files, truth=arguments.truth)
    if judge and arguments.dry_run:
        judging.say_cost(judge, [(pairs.references, texts) for texts in pairs.texts], arguments.price)
        return 0
    scores = score(pairs, _measure(arguments, judge), by_label="labels" in metrics)
    notes = [*([f"{rules.LABEL}."] if "rules" in metrics else []), *(judging.judge_notes(judge) if judge else [])]
    scores = replace(scores, notes=tuple(notes))
    if scores.remark:
        say(f"{arguments.predictions}: left out {scores.remark}")
    if arguments.json:
        write_whole(arguments.json, json.dumps(to_json(scores), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if arguments.html:
        command = shlex.join(["python", "-m", "lite", *sys.argv[1:]])
        write_whole(arguments.html, render_scores(scores, command=command, num_studies=arguments.studies))
    print_line(format_scores(scores, num_studies=arguments.studies))
    return 0


def _measure(arguments: argparse.Namespace, judge: Judge | None) -> Measure:
    """Return what measures all metrics that were asked for."""
    from lite.eval.chexprompt import error_sums
    from lite.eval.figures import Missing, Sums
    from lite.eval.measures import model_sums, text_sums

    metrics = arguments.metrics

    def measure(references: Sequence[str], predictions: Sequence[str]) -> dict[str, Sums | Missing]:
        figures = text_sums(references, predictions, metrics)
        figures |= model_sums(references, predictions, metrics, chexbert=arguments.chexbert, device=arguments.device)
        counts: dict[str, Sequence[Counts | None]] = {}
        if "rules" in metrics:
            counts["rules"] = judging.by_rules(references, predictions)
        if judge:
            counts["chexprompt"] = judge.judge(references, predictions)
        for name, of in counts.items():
            figures |= {f"{name}: {figure}": sums for figure, sums in error_sums(of).items()}
        return figures

    return measure
