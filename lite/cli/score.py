"""`python -m lite score PREDICTIONS`: how good drafted findings are beside reports, and beside another system's."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Final

from lite.console import positive, print_line, say

HELP: Final = "say how good drafted findings are beside their references"
DESCRIPTION: Final = (
    "Say how good drafted findings are beside the reports that come with the films, of phantoms or of patients, and "
    "with --compare beside another system's: differences, whether they could be chance, and the studies that differ "
    "most. Nothing leaves this machine."
)
EPILOG: Final = """\
examples:
  python -m lite score predictions.jsonl
  python -m lite score int4.jsonl --compare fp16.jsonl --truth studies.json --html score.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "predictions",
        type=Path,
        metavar="PREDICTIONS",
        help="what python -m lite run has written, or lines of id, reference and prediction, or ReXrank's studies",
    )
    parser.add_argument(
        "--truth", type=Path, metavar="LIST", help="take the references from the films' list, not from the file"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OTHER", help="another system's predictions of the same studies"
    )
    parser.add_argument(
        "--metrics",
        type=_metrics,
        metavar="NAMES",
        default="labels,rouge,bleu",
        help="with commas between them: labels, rouge, bleu, chexbert, radgraph (default: %(default)s)",
    )
    parser.add_argument("--chexbert", type=Path, metavar="FILE", help="CheXbert's weights, with vocab.txt beside them")
    parser.add_argument("--device", default="cpu", help="what CheXbert and RadGraph run on (default: %(default)s)")
    parser.add_argument(
        "--studies", type=positive, default=5, metavar="N", help="how many to show (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, study by study")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page")


def _metrics(text: str) -> tuple[str, ...]:
    known = ("labels", "rouge", "bleu", "chexbert", "radgraph")
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in known]:
        msg = f"got {unknown[0]!r}, expected some of {', '.join(known)}"
        raise argparse.ArgumentTypeError(msg)
    return names


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.bench.report import check_packages
    from lite.bench.scores import format_scores, render_scores
    from lite.bench.table import to_json
    from lite.eval.scoring import score
    from lite.files import check_writable, write_whole

    check_writable(arguments.json, arguments.html)
    if arguments.html:
        check_packages()
    scores = score(
        arguments.predictions,
        truth=arguments.truth,
        compare_with=arguments.compare,
        metrics=arguments.metrics,
        chexbert=arguments.chexbert,
        device=arguments.device,
    )
    if scores.remark:
        say(f"{arguments.predictions}: left out {scores.remark}")
    if arguments.json:
        write_whole(arguments.json, json.dumps(to_json(scores), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    if arguments.html:
        command = shlex.join(["python", "-m", "lite", *sys.argv[1:]])
        write_whole(arguments.html, render_scores(scores, command=command, num_studies=arguments.studies))
    print_line(format_scores(scores, num_studies=arguments.studies))
    return 0
