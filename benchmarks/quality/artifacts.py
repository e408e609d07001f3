"""What artifacts lose: `python -m benchmarks quality artifacts LIST.json --reference FP16_ARTIFACT CANDIDATE...`.

One model is in memory at a time. A candidate that cannot be measured does not stop the others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.commands import command_line
from benchmarks.quality.compare import (
    BATCH_SIZE,
    Films,
    Row,
    check_comparable,
    compare_artifact,
    report,
    take_reference,
)
from lite.artifact.open import load_artifact
from lite.console import positive, run_command, short_names
from lite.errors import LiteError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality artifacts",
        description="Measure what artifacts lose against a reference, along what that writes.",
        epilog="exit status: 0 done, 1 something could not be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "list", type=Path, metavar="LIST.json", help="the list that python -m benchmarks phantom write made"
    )
    parser.add_argument(
        "candidates", type=Path, nargs="+", metavar="CANDIDATE", help="artifacts to compare with the reference"
    )
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="ARTIFACT", help="the artifact to lose nothing against: fp16"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where the films are (default: beside the list)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N films")
    parser.add_argument(
        "--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help="films at a time (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser


def _run(arguments: argparse.Namespace, command: str) -> int:
    artifact = load_artifact(arguments.reference)
    for path in arguments.candidates:  # before anything is computed
        check_comparable(path, artifact)
    names = short_names([arguments.reference, *arguments.candidates])
    films = Films.drawn(arguments.list, image_folder=arguments.image_folder, limit=arguments.limit)
    load = {"batch_size": arguments.batch_size, "device": arguments.device}
    with tempfile.TemporaryDirectory(prefix="reference-logits-") as folder:
        reference, row = take_reference(arguments.reference, films, Path(folder), name=names[0], **load)
        rows = [row]
        for path, name in zip(arguments.candidates, names[1:], strict=True):
            try:
                rows.append(compare_artifact(path, films, reference, name=name, **load))
            except LiteError as error:
                rows.append(Row(name=name, error=str(error)))
    about = f"{len(films.studies)} of {arguments.list}"
    return report({"artifacts": rows}, films=about, command=command, as_json=arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments, command_line("quality artifacts", argv)))
