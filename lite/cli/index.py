"""`python -m lite index ARTIFACT SOURCE --out INDEX`: make films and reports searchable, each study exactly once."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli.notes import report
from lite.cli.options import add_artifact, add_films, add_towers, load_towers
from lite.cli.sources import SOURCE, add_source, source_options, tell_source
from lite.console import EXIT_FAILED, ProgressLine, positive, print_line, say
from lite.errors import LiteError
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.retrieval.index import IndexWriter
    from lite.studies.study import Study

BATCH_SIZE: Final = 32
HELP: Final = "make an index of a cohort's films and reports, to search in"
DESCRIPTION: Final = (
    "Make an index of a cohort: the vectors of its films, and of the reports that come with them, by the towers of an "
    "artifact. Each study is in it once: after Ctrl-C, a crash or a failure the same command goes on, and another "
    "source is added. The index holds the reports: treat it as you treat them."
)
EPILOG: Final = f"{SOURCE}example: python -m lite index artifact studies.json --image-folder films --out past"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("source", metavar="SOURCE", help="the studies")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="INDEX",
        help="the folder to make, or to add to; one writes at a time",
    )
    add_source(parser)
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=positive,
        default=BATCH_SIZE,
        help="studies that are sent to the disk together: a kill loses so many at most (default %(default)s)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing on the way but what failed")
    add_films(parser, "also index what, by its file, is not a frontal chest film")
    add_towers(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.artifact.open import load_artifact
    from lite.retrieval.filling import entry_of
    from lite.retrieval.index import IndexWriter
    from lite.retrieval.towers import embeddings_id
    from lite.studies.sources import read_source

    artifact = load_artifact(arguments.artifact)
    artifact_id = embeddings_id(artifact)
    part = artifact.manifest.parts.retrieval
    listed = read_source(arguments.source, source_options(arguments))
    studies = listed[: arguments.limit]
    tell_source(arguments, listed, studies)
    where = str(artifact.path.absolute())
    with IndexWriter(arguments.out, artifact_id=artifact_id, dim=part.dim if part else 0, artifact=where) as writer:
        entries = map(entry_of, studies)
        todo = [s for s, entry in zip(studies, entries, strict=True) if not writer.has(s.id, entry.image, entry.report)]
        if len(todo) < len(studies):
            say(f"note: {len(studies) - len(todo)} of {len(studies)} studies are in {arguments.out} already")
        try:
            failed = _fill(arguments, writer, todo) if todo else 0
        except KeyboardInterrupt:
            say(f"studies so far, in {arguments.out}: {len(writer)}; the same command goes on there")
            raise
        holds = f"{len(writer):,} films, {writer.num_reports:,} reports, {shown_bytes(writer.num_bytes)}"
    done = f"{len(studies) - failed} of {len(studies)} studies are in {arguments.out}"
    print_line(f"{done}{f', {failed} failed' if failed else ''}; it holds {holds}")
    return EXIT_FAILED if failed else 0


def _fill(arguments: argparse.Namespace, writer: IndexWriter, todo: Sequence[Study]) -> int:
    """Add studies; return how many failed."""
    from lite.retrieval.filling import fill

    progress = ProgressLine("indexing", len(todo))
    failed, cut = [], []
    with load_towers(arguments, arguments.artifact) as towers:
        most = towers.wordpiece.max_tokens
        started = time.monotonic()

        def told(study: Study, result: int | LiteError) -> None:
            if isinstance(result, LiteError):
                failed.append(study.id)
                report(str(study.path), result, what="failed")
            elif result > most:
                cut.append(study.id)
            ended = len(writer) - before + len(failed)
            if not arguments.quiet:
                progress.show(ended)

        before = len(writer)
        how = {"rendering": arguments.rendering, "any_film": arguments.any_film}
        fill(writer, towers, todo, told=told, batch_size=arguments.batch_size, **how)
    if cut:
        say(f"note: reports of more tokens than the {most} that count: {len(cut)}, such as that of {cut[0]}")
    if not arguments.quiet:
        say(f"{len(todo) / (time.monotonic() - started):.3g} studies/s")
    return len(failed)
