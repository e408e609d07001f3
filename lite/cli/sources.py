"""The options of a source of studies, and what is said of it, for the commands that read one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli.options import add_image_folder
from lite.console import positive, say
from lite.errors import LiteError
from lite.studies.films import check_films
from lite.studies.sources.base import SourceOptions, StudyList, Where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.studies.study import Study

SOURCE: Final = (
    "SOURCE is a JSON list, a CSV or TSV table, a folder of films or a DICOM tree, a pattern in quotes, or\n"
    "a public data set in its own layout: see docs/cohorts.md.\n\n"
)


def add_source(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add how a source is read; return the group."""
    group = parser.add_argument_group("the source")
    add_image_folder(group)
    for name, what in (
        ("image", "the films"),
        ("id", "what the studies are called"),
        ("reason", "the reasons for the exams"),
        ("reference", "the findings that there are"),
    ):
        group.add_argument(f"--{name}-column", metavar="NAME", help=f"of a table: {what} (default: guessed, and said)")
    group.add_argument(
        "--reason-from-header",
        dest="header_reason",
        action="store_true",
        help="of a DICOM tree: the reason is what the header gives for the exam, else its StudyDescription",
    )
    group.add_argument(
        "--where",
        type=_where,
        default=Where(),
        metavar="WHICH",
        help="only these: frontal, chest (by DICOM headers), COLUMN=VALUE, with commas between them",
    )
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N studies")
    return group


def source_options(arguments: argparse.Namespace, *, keep_rows: bool = False) -> SourceOptions:
    """Return how the source is read."""
    names = ("image_folder", "image_column", "id_column", "reason_column", "reference_column", "header_reason", "where")
    return SourceOptions(keep_rows=keep_rows, **{name: getattr(arguments, name) for name in names})


def tell_source(arguments: argparse.Namespace, listed: StudyList, studies: Sequence[Study]) -> None:
    """Say what the source is, what was left out of it, and which films are not there, before any work."""
    missing = check_films(studies, Path(arguments.source), every=False)
    if missing:
        say(f"note: {missing} of {len(studies)} films are not there: these studies will fail")
    if arguments.quiet:
        return
    say(f"{arguments.source}: {listed.kind}, {len(listed)} studies{_part_of(listed, studies)}")
    for note in (*listed.notes, listed.remark):
        if note:
            say(f"note: {note}")


def _part_of(listed: StudyList, studies: Sequence[Study]) -> str:
    return f", {len(studies)} of them to do here" if len(studies) < len(listed) else ""


def _where(text: str) -> Where:
    try:
        return Where.parse(text)
    except LiteError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
