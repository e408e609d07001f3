"""Drafting with a word on each study, for `run` and `receive`; what arrives is drafted until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from lite.artifact.open import load_artifact
from lite.cli.notes import Notes, report
from lite.cli.options import confident, load_model, load_options, request_of
from lite.cohort.run import Extras, draft_studies
from lite.cohort.tally import Tally
from lite.console import print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

    from lite.cohort.run import Listener
    from lite.model import FindingsModel
    from lite.studies.journal import Journal
    from lite.studies.results import Findings
    from lite.studies.study import Study


def draft(
    arguments: argparse.Namespace,
    model: FindingsModel,
    studies: Iterable[Study | None],
    journal: Journal,
    *,
    extras: Extras,
    tally: Tally,
    ended: Listener | None = None,
) -> None:
    """Draft studies as `draft_studies` does, by the options of a command; say what failed and was noted, and count."""
    request = request_of(arguments)
    size, told = arguments.batch_size, _teller(arguments, tally, ended)
    own: dict[str, Any] = {"extras": extras, "told": told, "add_sentences": confident(arguments, model)}
    draft_studies(model, studies, journal, request=request, batch_size=size, **own)


def draft_on_cluster(
    arguments: argparse.Namespace, studies: Sequence[Study], journal: Journal, *, extras: Extras, tally: Tally
) -> None:
    """Do the same with workers that Ray starts."""
    from lite.cohort.ray_run import draft_on_ray
    from lite.cohort.worker import Work

    if "samples" in request_of(arguments):
        raise LiteError("got --confidence with --ray · expected one of them · use --shard on each machine")
    artifact = load_artifact(arguments.artifact)
    say(f"note: {artifact.manifest.notice}")
    work = Work(
        artifact=str(artifact.path.absolute()),
        artifact_id=artifact.id,
        options=dataclasses.asdict(load_options(arguments)),
        request=request_of(arguments),
        batch_size=arguments.batch_size,
        folder=str(Path.cwd()),
    )
    where, told = {"address": arguments.ray, "cores": arguments.ray_cores}, _teller(arguments, tally)
    draft_on_ray(work, studies, journal, **where, extras=extras, told=told)


def _teller(arguments: argparse.Namespace, tally: Tally, ended: Listener | None = None) -> Listener:
    """Say of each study what failed and was noted, and count it."""
    notes = Notes()

    def told(study: Study, result: Findings | LiteError) -> None:
        if isinstance(result, LiteError):
            report(str(study.path), result, what="failed")
        elif not arguments.quiet:
            notes.tell(str(study.path), result, cut=False)
        tally.add(study, result)
        if ended is not None:
            ended(study, result)

    return told


def draft_arriving(
    arguments: argparse.Namespace,
    out: Path,
    extras: Extras,
    arriving: Callable[[Journal, Event], Generator[Study | None]],
    ended: Listener | None = None,
) -> None:
    """Draft studies as they arrive; return once the system has asked to stop, and what was under way is done.

    Args:
        arguments: of the command.
        out: the file of lines.
        extras: what is written beside.
        arriving: gives the studies, as for `draft_studies`, until the event is set.
        ended: told of each study once its line is written.
    """
    from lite.studies.journal import Journal

    journal = Journal(
        out,
        artifact_id=load_artifact(arguments.artifact).id,
        request=request_of(arguments),
        mix=getattr(arguments, "mix", False),
        kept=(lambda _: None) if extras.lasting else extras.mend,
    )
    tally = Tally(None, quiet=arguments.quiet)
    with (
        journal,
        load_model(arguments, for_many=True) as model,
        _until_stopped() as stop,
    ):
        say(f"note: {model.notice}")
        journal.expect(model.settings)
        # Closed here, so that nobody listens any more when an error ends it.
        with contextlib.closing(arriving(journal, stop)) as studies:
            draft(arguments, model, studies, journal, extras=extras, tally=tally, ended=ended)
    failed = tally.failed.total()
    print_line(f"{tally.done} more studies are drafted in {out}{f', {failed} failed' if failed else ''}")


@contextlib.contextmanager
def _until_stopped() -> Iterator[Event]:
    """Yield an event that Ctrl-C or SIGTERM sets; the second time they do what they always do."""
    stop = Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(*_: object) -> None:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, restore)
    try:
        yield stop
    finally:
        restore()
