"""`python -m lite confidence ARTIFACT DATA`: learn how likely a sentence is true from studies with references."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite.artifact.open import load_artifact
from lite.cli.options import add_artifact, add_drafting, add_image_folder, add_loading, load_model, request_of
from lite.console import positive, print_line, say
from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.eval.calibration import Judged
    from lite.model import FindingsModel
    from lite.studies.results import Findings

HELP: Final = "learn from studies with references how likely a sentence of a draft is true"
DESCRIPTION: Final = (
    "Draft studies that have references, see which sentences state something false, and learn from that what the "
    "model's own probabilities mean. generate, run and serve use it with --confidence. It holds for studies like these."
)
EPILOG: Final = (
    "example: python -m lite confidence artifact studies.json --samples 5 --test others.json --html page.html"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("data", metavar="DATA", help="the studies, as for run; or FILE.jsonl of run --confidence")
    parser.add_argument("--test", metavar="DATA", help="others, to measure on (default: each study by all but a fifth)")
    parser.add_argument("--samples", type=positive, metavar="N", help="learn what the agreement of N samples says, too")
    default = "ARTIFACT.confidence.json, or of an adapter ARTIFACT.NAME.confidence.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"(default: {default})")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the diagrams")
    add_image_folder(parser)
    add_drafting(parser, batch_size=1)
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.bench.confidence import measure, render_page
    from lite.bench.report import check_packages
    from lite.bench.table import markdown_table
    from lite.eval.calibration import beside, learn
    from lite.files import check_writable, write_whole

    adapter = arguments.adapter or load_artifact(arguments.artifact).manifest.parts.default_adapter
    out: Path = arguments.out or beside(Path(arguments.artifact), adapter)
    check_writable(out, arguments.html)
    if arguments.html:
        check_packages()
    with load_model(arguments, for_many=True) as model:
        learned, settings = _judged(model, arguments, arguments.data, adapter)
        with_samples = all(one.sentence.agreement is not None for one in learned)
        calibration = learn(learned, with_samples=with_samples, settings=settings, data=Path(arguments.data).name)
        tested = None
        if arguments.test:
            tested, settings = _judged(model, arguments, arguments.test, adapter)
            calibration.check(settings, arguments.test)
    measured = measure(calibration, learned, tested)
    write_whole(out, calibration.to_json())
    if arguments.html:
        write_whole(arguments.html, render_page(measured, calibration))
    print_line(f"{measured.what}\n\n{markdown_table(*measured.table)}\n\n{out}: calibration {calibration.id}")
    return 0


def _judged(
    model: FindingsModel, arguments: argparse.Namespace, data: str, adapter: str | None
) -> tuple[list[Judged], dict[str, Any]]:
    """Return the sentences that state something, of studies that have a reference, and what drafted them.

    Raises:
        LiteError: there are none, or they were drafted in several ways.
    """
    from lite.eval.calibration import SETTINGS, Judged
    from lite.eval.confidence import TOP, stated
    from lite.eval.labels import read_mentions

    found, ways, rows = [], set(), _drafted(model, arguments, data)
    for number, (reference, made) in enumerate(rows):
        if made.token_logprobs is None or made.top_logprobs is None or len(made.top_logprobs[0]) < TOP:
            msg = f"{data}: got drafts without log-probabilities · expected some · draft them by run --confidence auto"
            raise LiteError(msg)
        if made.artifact_id != model.artifact.id:
            msg = f"{data}: got drafts of the artifact {made.artifact_id} · expected {model.artifact.id}, as named"
            raise LiteError(f"{msg} · draft them with it, or name the other one")
        if made.adapter != adapter:
            got, expected = (f"the adapter {name}" if name else "no adapter" for name in (made.adapter, adapter))
            msg = f"{data}: got drafts with {got} · expected {expected} · name theirs with --adapter"
            raise LiteError(f"{msg}, or draft them again")
        ways.add((*(getattr(made, name) for name in SETTINGS), len(made.samples or ())))
        truth = read_mentions(reference)
        sentences = (one for one in stated(made, model.tokenizer) if one.contrast is not None)
        found += [Judged(one, number, one.is_false(truth)) for one in sentences]
    if len(ways) != 1:
        got = "drafts made in several ways" if ways else "no draft beside findings to compare it with"
        raise LiteError(f"{data}: got {got} · expected one artifact, cache and number of samples · draft them again")
    return found, dict(zip(SETTINGS, ways.pop(), strict=False)) | {"adapter": adapter}


def _drafted(model: FindingsModel, arguments: argparse.Namespace, data: str) -> Iterator[tuple[str, Findings]]:
    """Yield references and drafts: of a file of results, or made now."""
    from lite.eval.confidence import TOP
    from lite.eval.labels import unreadable
    from lite.studies.results import StudyError, read_results
    from lite.studies.sources import read_source
    from lite.studies.sources.base import SourceOptions

    if data.endswith(".jsonl"):
        for row in read_results(Path(data)):
            if row.findings is not None and row.findings.token_ids and not unreadable(row.study.reference):
                yield row.study.reference, row.findings
        return
    listed = read_source(data, SourceOptions(image_folder=arguments.image_folder))
    studies = [study for study in listed if not unreadable(study.reference)]
    options = request_of(arguments) | {"top_logprobs": TOP, "samples": arguments.samples or 0}
    drafts = model.findings_batch(studies, batch_size=arguments.batch_size, **options)
    for number, (study, made) in enumerate(zip(studies, drafts, strict=True), start=1):
        if isinstance(made, StudyError):
            say(f"{study.id}: left out: {made.error}")
        elif made.token_ids:
            yield study.reference, made
        if number % 100 == 0:
            say(f"{data}: {number} of {len(studies)} studies")
