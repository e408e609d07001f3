"""`python -m lite run ARTIFACT SOURCE --out DIR`: draft the findings of a cohort, each study exactly once."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.artifact.open import load_artifact
from lite.cli.drafting import draft, draft_arriving, draft_on_cluster
from lite.cli.options import add_artifact, add_confidence, add_drafting, add_loading, load_model, request_of
from lite.cli.sources import SOURCE, add_source, source_options, tell_source
from lite.cohort.formats import FORMATS, formatted_name, iterate_results
from lite.cohort.run import Extras, in_shard
from lite.cohort.tally import Tally
from lite.console import EXIT_FAILED, positive, print_line, say
from lite.errors import LiteError
from lite.files import check_writable
from lite.studies.sources import read_source

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from threading import Event

    from lite.artifact.open import Artifact
    from lite.studies.journal import Journal
    from lite.studies.sources.base import SourceOptions
    from lite.studies.study import Study

BATCH_SIZE: Final = 8
HELP: Final = "draft the findings of a cohort: a list, a table, a folder, a public data set"
DESCRIPTION: Final = (
    "Draft the findings of many studies, each exactly once. A result is a line of JSON in the file as soon as it is "
    "there: after Ctrl-C, a crash or a failure the same command goes on behind the last one, and tries again what has "
    "failed."
)
EPILOG: Final = (
    f"{SOURCE}"
    "example: python -m lite run artifact studies.json --image-folder films --out findings.jsonl\n"
    "example: python -m lite run artifact studies.csv --reason-column Indication --out results --format csv"
)
RESULTS: Final = "results.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("source", metavar="SOURCE", help="the studies")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR|FILE.jsonl", help="the file to write, or to go on with"
    )
    _add_source(parser)
    _add_results(parser)
    _add_ray(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing on the way but what failed")
    add_confidence(parser)
    add_drafting(parser, batch_size=BATCH_SIZE)
    add_loading(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = add_source(parser)
    group.add_argument(
        "--watch", action="store_true", help="go on with what arrives in the folder, until Ctrl-C or SIGTERM"
    )
    group.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="with --watch: seconds between two looks (default 5)"
    )
    group.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only part I of N, by the studies' ids: one on each machine"
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the results")
    group.add_argument(
        "--format",
        dest="formats",
        action="append",
        choices=sorted(FORMATS),
        default=[],
        help="write them in this form, too, beside the file of lines; may be given again",
    )
    group.add_argument(
        "--columns", action="store_true", help="keep all that the source says of a study with its result"
    )
    group.add_argument("--text-dir", type=Path, metavar="DIR", help="write a text file for each study")
    group.add_argument(
        "--sr-dir", type=Path, metavar="DIR", help="write a DICOM report (Basic Text SR) for each DICOM film"
    )
    group.add_argument(
        "--mix", action="store_true", help="go on with a file that holds results of other artifacts or settings"
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many machines")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="draft on all nodes of this Ray cluster (auto: the one that runs here); without ADDRESS on this machine, "
        "with a worker for each GPU",
    )
    group.add_argument(
        "--ray-cores", type=positive, metavar="N", help="cores of a worker, where there are no GPUs (default: a node's)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.studies.journal import Journal

    if arguments.ray is not None:
        import lite.cohort.ray_run  # noqa: F401 - says now that Ray is missing

    out = journal_path(arguments.out, arguments.shard)
    for name in arguments.formats:
        FORMATS[name].check()
        check_writable(formatted_name(out, name))
    if arguments.watch:
        return _watch(arguments, out)
    listed = read_source(arguments.source, _source_options(arguments))
    studies = [study for study in listed if arguments.shard is None or in_shard(study.id, arguments.shard)]
    studies = studies[: arguments.limit]
    artifact = load_artifact(arguments.artifact)
    tell_source(arguments, listed, studies)
    request = request_of(arguments)
    extras = Extras(text_dir=arguments.text_dir, sr_dir=arguments.sr_dir)
    own = {"artifact_id": artifact.id, "request": request, "mix": arguments.mix}
    with Journal(out, listed, **own, kept=extras.mend) as journal:
        try:
            failed = _draft(arguments, studies, journal, extras)
        except KeyboardInterrupt:
            say(f"results so far, in {out}: {len(journal.done)}; the same command goes on there")
            raise
        finally:
            _write_formats(arguments, artifact, out)
        done = sum(study.id in journal.done for study in studies)
    if listed.remark and not arguments.quiet:
        say(listed.remark)
    print_line(f"{done} of {len(studies)} studies are drafted in {out}{f', {failed} failed' if failed else ''}")
    return EXIT_FAILED if failed else 0


def _watch(arguments: argparse.Namespace, out: Path) -> int:
    """Draft what arrives in a folder."""
    from lite.cohort.watch import watch_folder

    folder = Path(arguments.source)
    with_it = [name for name in ("limit", "ray") if getattr(arguments, name) is not None]
    if not folder.is_dir() or with_it:
        got = f"--{with_it[0]} with --watch" if folder.is_dir() else f"{folder}, which is no folder, with --watch"
        raise LiteError(f"got {got} · expected a folder, and all that arrives in it · correct it")

    def arriving(_journal: Journal, stop: Event) -> Generator[Study | None]:
        for study in watch_folder(folder, _source_options(arguments), stop, interval_s=arguments.interval):
            if study is None or arguments.shard is None or in_shard(study.id, arguments.shard):
                yield study

    draft_arriving(arguments, out, Extras(text_dir=arguments.text_dir, sr_dir=arguments.sr_dir), arriving)
    _write_formats(arguments, load_artifact(arguments.artifact), out)
    return 0


def journal_path(out: Path, shard: tuple[int, int] | None) -> Path:
    """Return the file of lines that `--out` asks for.

    Raises:
        LiteError: it is the name of a file that is none of lines.
    """
    if out.suffix == ".jsonl" and not out.is_dir():
        return out
    if out.suffix and not out.is_dir():
        msg = f"got --out {out} · expected a folder, or a file that ends in .jsonl · for other forms give --format, too"
        raise LiteError(msg)
    return out / (RESULTS if shard is None else f"results-{shard[0]}-of-{shard[1]}.jsonl")


def _source_options(arguments: argparse.Namespace) -> SourceOptions:
    keep_rows = arguments.columns or any(FORMATS[name].needs_rows for name in arguments.formats)
    return source_options(arguments, keep_rows=keep_rows)


def _draft(arguments: argparse.Namespace, studies: Sequence[Study], journal: Journal, extras: Extras) -> int:
    """Draft what is still to do; return how many studies failed."""
    if journal.num_others:
        say(f"note: {journal.path} also holds {journal.num_others} results of other studies or settings")
    if all(study.id in journal.done for study in studies):
        say(f"note: all {len(studies)} studies are in {journal.path} already")
        return 0
    with contextlib.nullcontext() if arguments.ray is not None else load_model(arguments, for_many=True) as model:
        if model is not None:
            say(f"note: {model.notice}")
            journal.expect(model.settings)
        todo = [study for study in studies if study.id not in journal.done]
        if len(todo) < len(studies):
            say(f"note: {len(studies) - len(todo)} of {len(studies)} studies are in {journal.path} already")
        tally = Tally(len(todo), quiet=arguments.quiet)
        if model is None:
            draft_on_cluster(arguments, todo, journal, extras=extras, tally=tally)
        else:
            draft(arguments, model, todo, journal, extras=extras, tally=tally)
    for line in () if arguments.quiet else (f"{tally.per_minute:.3g} studies/min", *tally.summary()):
        say(line)
    return tally.failed.total()


def _write_formats(arguments: argparse.Namespace, artifact: Artifact, out: Path) -> None:
    """Write the other forms of all that is in the file."""
    if not arguments.formats or not out.is_file():
        return
    from lite.loading import prompt_of

    _, prompt = prompt_of(artifact)
    for name in arguments.formats:
        FORMATS[name].write(iterate_results(out, prompt), formatted_name(out, name))


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        msg = f"got {text!r}, expected a part of so many, such as 1/4"
        raise argparse.ArgumentTypeError(msg)
    return int(number), int(count)
