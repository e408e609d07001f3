"""Draft findings for a JSON list of films: `python -m benchmarks.phantom predict ARTIFACT LIST.json --out FILE`.

What it writes is what `python -m benchmarks.phantom score` reads. Only lite's public functions are used, so the
figures are those of the runtime that users have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

import lite
from benchmarks.phantom.score import Prediction
from lite.errors import LiteError
from lite.files import check_writable, whole_file
from lite.studies.readers import read_studies
from lite.studies.study import Study

BATCH_SIZE = 8


def predict(
    model: lite.FindingsModel, studies: Sequence[Study], *, batch_size: int = BATCH_SIZE
) -> Iterator[Prediction | LiteError]:
    """Draft the findings of each study, in order; an error stands in the place of one that cannot be used."""
    results = model.findings_batch([(study.image, study.reason) for study in studies], batch_size=batch_size)
    for study, result in zip(studies, results, strict=True):
        if isinstance(result, lite.StudyError):
            yield result.error
        else:
            yield Prediction(id=study.id, query=study.question, reference=study.reference, prediction=result.text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `predict`."""
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="a folder written by python -m export")
    parser.add_argument(
        "list", type=Path, metavar="LIST.json", help="the list that python -m benchmarks.phantom write made"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PREDICTIONS.jsonl", help="the file to write")
    parser.add_argument(
        "--image-folder", type=Path, metavar="DIR", help="where the films are (default: beside the list)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="films at a time (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N films")


def run(args: argparse.Namespace) -> int:
    """Write the predictions; returns 0, or 1 when films were skipped.

    Raises:
        LiteError: the list or the artifact cannot be used.
    """
    check_writable(args.out)
    studies = read_studies(args.list, image_folder=args.image_folder)[: args.limit]
    model = lite.load(args.artifact, device=args.device)
    num_skipped = 0
    with whole_file(args.out) as partial, partial.open("w", encoding="utf-8") as file:
        results = predict(model, studies, batch_size=args.batch_size)
        for result in tqdm(results, total=len(studies), unit=" films", disable=None):
            if isinstance(result, LiteError):
                num_skipped += 1
                tqdm.write(f"skipped: {result}", file=sys.stderr)
            else:
                file.write(f"{result.to_json()}\n")
    sys.stdout.write(f"{len(studies) - num_skipped} predictions in {args.out}, {num_skipped} films skipped\n")
    sys.stdout.write(f"Next: python -m benchmarks.phantom score {args.out}\n")
    return 1 if num_skipped else 0
