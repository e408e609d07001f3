"""Options of `python -m lite score` for judges of reports, and what a judge makes of planted errors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite.console import positive, print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lite.eval.chexprompt import Counts
    from lite.eval.judge import Judge

BELIEVED: Final = 0.9  # of the pairs of each kind, as planted
JUDGES: Final = ("rules", "chexprompt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    group = parser.add_argument_group("a judge, for the metric chexprompt")
    add = group.add_argument
    add("--judge-url", metavar="URL", help="an OpenAI-compatible endpoint, such as http://127.0.0.1:8080/v1")
    add("--judge-model", metavar="NAME", help="its model")
    add("--judge-key-file", type=Path, metavar="FILE", help="the file that holds the key, if it wants one")
    add("--send-reports-to", metavar="HOST", help="say that reports may be sent to this machine, another than this one")
    add("--prompt-file", type=Path, metavar="FILE", help="another prompt, with {reference} and {candidate} in it")
    add(
        "--judge-option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of each request, as JSON, null to leave it out (default: temperature=0 and max_tokens=512)",
    )
    add("--votes", type=positive, default=1, metavar="N", help="ask N times, and take the median (default: 1)")
    add("--concurrency", type=positive, default=4, metavar="N", help="requests at a time (default: %(default)s)")
    add("--judge-cache", type=Path, metavar="FILE", help="where answers are kept (default: PREDICTIONS.judged.jsonl)")
    add("--max-requests", type=positive, metavar="N", help="ask no more than that often")
    add("--dry-run", action="store_true", help="say what would be asked, and what it costs; send nothing")
    add("--price", type=_price, metavar="IN,OUT", help="of a million tokens, for --dry-run")
    add("--judge-check", type=Path, metavar="PAIRS", help="let the judge, or the rules, count planted errors instead")


def _price(text: str) -> tuple[float, float]:
    into, out = map(float, text.split(","))
    return into, out


def _option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)  # what is not JSON is a ValueError, which argparse explains


def open_judge(arguments: argparse.Namespace) -> Judge:
    """Make the judge that was asked for; nothing is sent yet.

    Raises:
        LiteError: it is not said whom to ask, or that reports may be sent there.
    """
    from lite.eval.chexprompt import read_prompt
    from lite.eval.judge import Judge, JudgeOptions

    if not (arguments.judge_url and arguments.judge_model):
        msg = "got the metric chexprompt and no judge · expected an endpoint · give --judge-url and --judge-model"
        raise LiteError(msg)
    file = arguments.judge_check or arguments.predictions
    return Judge(
        JudgeOptions(
            url=arguments.judge_url,
            model=arguments.judge_model,
            key=_read_key(arguments.judge_key_file) if arguments.judge_key_file else "",
            send_reports_to=arguments.send_reports_to,
            prompt=read_prompt(arguments.prompt_file),
            options=dict(arguments.judge_option),
            votes=arguments.votes,
            concurrency=arguments.concurrency,
            max_requests=arguments.max_requests,
            cache=arguments.judge_cache or file.with_suffix(".judged.jsonl"),
        )
    )


def _read_key(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "letters that are not ASCII"
        raise LiteError(f"{file}: got {what} · expected the judge's key on one line · check the path") from error


def say_cost(
    judge: Judge, texts: Sequence[tuple[Sequence[str], Sequence[str]]], price: tuple[float, float] | None
) -> None:
    """Print what judging would take."""
    from lite.eval.judge import Cost

    costs = [judge.cost(references, predictions) for references, predictions in texts]
    cost = Cost(*map(sum, zip(*costs, strict=True)))
    print_line(judge.options.label)
    millions = cost.input_tokens / 1e6, cost.output_tokens / 1e6
    price_shown = f": {price[0] * millions[0] + price[1] * millions[1]:.2f}" if price else ""
    print_line(
        f"{cost.requests} requests ({cost.cached} answers are there already), about {cost.input_tokens:,} tokens in, "
        f"at 4 characters each, and {cost.output_tokens:,} out{price_shown}. Nothing was sent."
    )


def judge_notes(judge: Judge) -> Iterator[str]:
    """Yield what a score has to be called, and why reports have none."""
    yield f"{judge.options.label}; compare with scores of the same prompt and judge only."
    if judge.unscored:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in judge.unscored.items())
        yield f"Unscored reports, in no mean ({reasons}). The same command asks for them again."


def by_rules(references: Sequence[str], predictions: Sequence[str]) -> list[Counts | None]:
    """Count errors by the rules."""
    from lite.eval.rules import count_errors

    return [count_errors(*texts) for texts in zip(references, predictions, strict=True)]


def run_check(arguments: argparse.Namespace) -> int:
    """Let a judge count planted errors, and print what it saw of each kind."""
    from lite.bench.table import markdown_table
    from lite.eval import rules
    from lite.eval.chexprompt import ERRORS
    from lite.eval.judge_check import check_judge, read_planted

    pairs = read_planted(arguments.judge_check)
    judge = open_judge(arguments) if arguments.judge_url else None
    if judge and arguments.dry_run:
        say_cost(judge, [([p.study.reference for p in pairs], [p.prediction or "" for p in pairs])], arguments.price)
        return 0
    rows = check_judge(pairs, judge.judge if judge else by_rules)
    header = ("planted", "pairs", *(name.replace("_", " ") for name in ERRORS), "as planted", "unscored")
    lines = [(row.kind, row.num_pairs, *row.seen, row.exactly, row.unscored) for row in rows]
    print_line(markdown_table(header, [tuple(map(str, line)) for line in lines]))
    print_line("\nPairs in which the judge counts such an error; as planted: that one, once, and nothing else.")
    right, unscored = sum(row.exactly for row in rows), sum(row.unscored for row in rows)
    believed = all(row.exactly >= BELIEVED * row.num_pairs for row in rows)
    so = "to be tried on reports of your own" if believed else "not to be believed"
    print_line(
        f"{right} of {len(pairs)} pairs as planted, {unscored} unscored: this judge is {so} "
        f"(it takes {BELIEVED:.0%} of each kind)."
    )
    for note in judge_notes(judge) if judge else [rules.LABEL]:
        say(note)
    return 0
