"""`python -m lite drafts build REPORTS...`: make a table of past reports, to guess by how a text goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from lite.console import print_line, say

HELP: Final = "make a table of past reports that texts are drafted from"
DESCRIPTION: Final = (
    "Make a table of past reports. Loaded with --drafts TABLE it guesses how a text goes on; what the decoder would "
    "not have said is not taken. The table holds the reports, as tokens: treat it as you treat them."
)
EPILOG: Final = "example: python -m lite drafts build reports.jsonl --artifact artifact --out reports.drafts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("action", choices=["build"], help="make a table")
    parser.add_argument(
        "reports",
        nargs="+",
        type=Path,
        metavar="REPORTS",
        help="results as JSON lines, whose predictions and references are taken, or a text on each line",
    )
    parser.add_argument(
        "--artifact", type=Path, required=True, metavar="ARTIFACT", help="whose tokenizer it is for, and that alone"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE", help="the file to write")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.artifact.open import load_artifact
    from lite.files import check_writable
    from lite.loading import prompt_of
    from lite.session.ngrams import join, num_texts, read_texts, tokenizer_sha256, write_table

    check_writable(arguments.out)
    artifact = load_artifact(arguments.artifact)
    tokenizer, _ = prompt_of(artifact)
    texts = [text for file in arguments.reports for text in read_texts(file)]
    tokens = join((tokenizer.encode(text) for text in texts), tokenizer.eos_token_id)
    write_table(arguments.out, tokens, tokenizer_sha256=tokenizer_sha256(artifact))
    if (left_out := len(texts) - num_texts(tokens)) > 0:
        say(f"note: the first {left_out:,} texts are left out: a table holds {len(tokens):,} tokens at most")
    print_line(f"{arguments.out}: {num_texts(tokens):,} texts, {len(tokens):,} tokens")
    return 0
