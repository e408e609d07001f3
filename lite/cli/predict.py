"""`python -m lite predict ARTIFACT STUDIES.json --out FILE.jsonl`: draft the findings of a list of studies."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.artifact.open import load_artifact
from lite.cli.notes import Notes, report
from lite.cli.options import add_artifact, add_drafting, add_image_folder, add_loading, load_model
from lite.console import EXIT_FAILED, ProgressLine, positive, print_line, say
from lite.studies.films import check_films
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.studies.journal import Journal
    from lite.studies.study import Study

BATCH_SIZE: Final = 8
HELP: Final = "draft the findings of a list of studies, into a file"
DESCRIPTION: Final = (
    "Draft the findings of a list of studies. Each result is a line of JSON in the file as soon as it is there: after "
    "Ctrl-C or a failure the same command goes on behind the last one, and tries again what has failed."
)
EPILOG: Final = (
    "STUDIES.json is a list in LLaVA-Rad's evaluation format:\n"
    '  [{"id": "s1", "image": "p10/film.png", "reason": "Cough."}, …]\n'
    "Only image is needed. A line of the file has id, image, reason, query, reference, prediction or\n"
    "error, and how it was made.\n\n"
    "example: python -m lite predict artifact studies.json --image-folder films --out findings.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("studies", type=Path, metavar="STUDIES.json", help="the list")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help="the file to write, or to go on with"
    )
    add_image_folder(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N studies")
    add_drafting(parser, batch_size=BATCH_SIZE)
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.studies.journal import Journal

    listed = read_studies(arguments.studies, image_folder=arguments.image_folder)
    studies = listed[: arguments.limit]
    missing = check_films(studies, arguments.studies, every=False)
    request = {name: getattr(arguments, name) for name in ("max_new_tokens", "rendering")}
    request |= {"any_film": True} if arguments.any_film else {}  # older files do not say
    artifact = load_artifact(arguments.artifact)
    with Journal(arguments.out, listed, artifact_id=artifact.id, request=request) as journal:
        todo = [study for study in studies if study.id not in journal.done]
        if len(todo) < len(studies):
            say(f"note: {len(studies) - len(todo)} of {len(studies)} studies are in {arguments.out} already")
        if missing:
            say(f"note: {missing} of {len(studies)} films are not there, and will be skipped")
        try:
            failed = _draft(arguments, todo, journal) if todo else 0
        except KeyboardInterrupt:
            if journal.done:
                say(f"results so far, in {arguments.out}: {len(journal.done)}; the same command goes on there")
            raise
    if listed.remark:
        say(f"note: {listed.remark}")
    print_line(f"{len(studies) - failed} predictions in {arguments.out}, {failed} skipped")
    return EXIT_FAILED if failed else 0


def _draft(arguments: argparse.Namespace, studies: Sequence[Study], journal: Journal) -> int:
    """Draft what is still to do; return how many studies failed."""
    from lite.studies.results import StudyError

    failed, notes, progress = 0, Notes(), ProgressLine("drafting", len(studies))
    with load_model(arguments) as model:
        say(f"note: {model.notice}")
        results = model.findings_batch(
            studies,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            rendering=arguments.rendering,
            any_film=arguments.any_film,
        )
        for done, (study, result) in enumerate(zip(studies, results, strict=True), start=1):
            if isinstance(result, StudyError):
                failed += 1
                report(str(study.path), result.error, what="skipped")
                journal.add(study, result.error)
            else:
                journal.add(study, result)
                notes.tell(str(study.path), result, cut=False)
            progress.show(done)
    return failed
