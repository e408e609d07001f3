"""`python -m lite generate ARTIFACT IMAGE...`: draft the findings of one or more films."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from lite.cli.notes import Notes, print_pieces, print_sentences, report
from lite.cli.options import add_artifact, add_confidence, add_drafting, add_loading, confident, load_model, request_of
from lite.cli.past import Past, add_index
from lite.console import EXIT_FAILED, print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from lite.model import FindingsModel

HELP: Final = "draft the findings of one or more films"
DESCRIPTION: Final = (
    "Draft the findings of one or more films. The text is printed as it is made; with --batch-size above 1 when it is "
    "done."
)
EPILOG: Final = 'example: python -m lite generate artifact film.dcm --reason "Cough and fever for three days."'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="frontal films: PNG, JPEG, DICOM …")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--reason", metavar="TEXT", help="the reason for the exam, used for every film")
    question.add_argument("--query", metavar="TEXT", help="ask this instead of the question the model was trained with")
    parser.add_argument("--json", action="store_true", help="print one JSON object per film, one per line")
    add_confidence(parser)
    add_index(parser)
    add_drafting(parser, batch_size=1)
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    past = Past(arguments)
    with load_model(arguments) as model:
        # One reason for all films: if it cannot be used, say so once and not for each film.
        model.prompt.encode(arguments.reason, query=arguments.query)
        if arguments.json:
            return _print_results(model, arguments, past)
        say(f"note: {model.notice}")
        if arguments.batch_size == 1:
            return _print_streams(model, arguments, past)
        return _print_results(model, arguments, past)


def _print_streams(model: FindingsModel, arguments: argparse.Namespace, past: Past) -> int:
    """Print the text of each film as it is made."""
    status, notes, add_sentences = 0, Notes(), confident(arguments, model)
    for image in arguments.images:
        try:
            stream = model.stream(image, arguments.reason, query=arguments.query, **request_of(arguments))
            _print_heading(image, arguments)
            print_pieces(stream)
            print_sentences(add_sentences(stream.result()))
            past.show(image, stream.result().text)
            notes.tell(image, stream.result())
        except LiteError as error:
            report(image, error)
            status = EXIT_FAILED
    return status


def _print_results(model: FindingsModel, arguments: argparse.Namespace, past: Past) -> int:
    """Print what comes of each film, in order, when it is done: its text, or one JSON object."""
    from lite.studies.results import Result, StudyError
    from lite.studies.study import Study

    status, notes, add_sentences = 0, Notes(), confident(arguments, model)
    # Each film is called by its path.
    studies = [Study(image, arguments.reason, arguments.query, id=image) for image in arguments.images]
    results = model.findings_batch(studies, batch_size=arguments.batch_size, **request_of(arguments))
    for study, result in zip(studies, results, strict=True):
        found = result.error if isinstance(result, StudyError) else add_sentences(result)
        if isinstance(found, LiteError):
            report(study.id, found)
            status = EXIT_FAILED
        if arguments.json:
            print_line(past.added(Result.of(study, found).to_json(), study.id, found))
        elif not isinstance(found, LiteError):
            _print_heading(study.id, arguments)
            print_line(found.text)
            print_sentences(found)
            past.show(study.id, found.text)
        if not isinstance(found, LiteError):
            notes.tell(study.id, found, cut=not arguments.json)
    return status


def _print_heading(image: str, arguments: argparse.Namespace) -> None:
    """Name the film when there are several."""
    if len(arguments.images) > 1:
        print_line(f"== {image}")
