"""`python -m lite receive ARTIFACT --out DIR`: draft the findings of films that are sent by DICOM."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lite.cli.drafting import draft_arriving
from lite.cli.options import add_artifact, add_drafting, add_loading, size
from lite.cohort.inbox import Inbox
from lite.cohort.receive import Node, listening, send_reports
from lite.cohort.run import Extras
from lite.console import positive, say
from lite.studies.sources.base import SourceOptions

if TYPE_CHECKING:
    from collections.abc import Generator

    from lite.studies.journal import Journal
    from lite.studies.study import Study

BATCH_SIZE: Final = 8
HELP: Final = "draft the findings of chest films that a PACS or a modality sends (DICOM C-STORE)"
DESCRIPTION: Final = (
    "Take chest films by DICOM C-STORE (CR and DX), and draft each study once, when its sender has gone: a line of "
    "JSON in OUT/results.jsonl, and a DICOM report (Basic Text SR, unverified). Ctrl-C or SIGTERM ends it when what is "
    "under way is done; the same command goes on with what waits."
)
EPILOG: Final = (
    "DICOM as it is here has neither encryption nor passwords: an AE title is a name that anyone can give.\n\n"
    "example: python -m lite receive artifact --out inbox --port 11112 --ae-title LITE --send-to PACS@127.0.0.1:104"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where films wait and results are")
    group = parser.add_argument_group("the node")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    group.add_argument("--port", type=int, default=11112, metavar="N", help="the port (default %(default)s)")
    group.add_argument("--ae-title", type=_ae_title, default="LITE", metavar="AET", help="its name (default LITE)")
    group.add_argument(
        "--allow", action="append", type=_ae_title, default=[], metavar="AET", help="a name that may call; repeatable"
    )
    group.add_argument(
        "--max-studies", type=positive, default=1000, metavar="N", help="that may wait (default %(default)s)"
    )
    group.add_argument(
        "--max-waiting", type=size, default="8GiB", metavar="SIZE", help="what films that wait may take (default 8GiB)"
    )
    group.add_argument(
        "--settle", type=float, default=2.0, metavar="S", help="draft a study S seconds after its last film (default 2)"
    )
    group.add_argument(
        "--reason-from-header",
        dest="header_reason",
        action="store_true",
        help="take the reason for the exam from there",
    )
    group.add_argument("--sr-dir", type=Path, metavar="DIR", help="where reports are written (default: OUT/sr)")
    group.add_argument("--send-to", type=_node, metavar="AET@HOST:PORT", help="send each report to this node")
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing on the way but what failed")
    add_drafting(parser, batch_size=BATCH_SIZE)
    add_loading(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    out: Path = arguments.out
    bounds = {"max_studies": arguments.max_studies, "max_bytes": arguments.max_waiting}
    inbox = Inbox(out / "incoming", **bounds, settle_s=arguments.settle)
    outbox = out / "outbox" if arguments.send_to else None

    def arriving(journal: Journal, stop: threading.Event) -> Generator[Study | None]:
        inbox.take_up(journal)
        names = ("host", "port", "ae_title", "allow")
        with listening(inbox, **{name: getattr(arguments, name) for name in names}) as port:
            say(f"{arguments.ae_title} listens at {arguments.host}, port {port}")
            yield from inbox.studies(SourceOptions(header_reason=arguments.header_reason), stop)

    no_more = threading.Event()
    options = {"ae_title": arguments.ae_title, "stop": no_more}
    sender = threading.Thread(target=send_reports, args=(outbox, arguments.send_to), kwargs=options, daemon=True)
    if outbox is not None:
        sender.start()
    try:
        extras = Extras(sr_dir=arguments.sr_dir or out / "sr", outbox=outbox, lasting=True)
        draft_arriving(arguments, out / "results.jsonl", extras, arriving, inbox.ended)
        inbox.tidy()
    finally:
        no_more.set()
        if outbox is not None:
            sender.join()
    return 0


def _ae_title(text: str) -> str:
    if not (text.strip() == text and 1 <= len(text) <= 16 and text.isascii() and text.isprintable()) or "\\" in text:
        msg = f"got {text!r}, expected an AE title: 1 to 16 letters"
        raise argparse.ArgumentTypeError(msg)
    return text


def _node(text: str) -> Node:
    ae_title, _, address = text.rpartition("@")
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        msg = f"got {text!r}, expected AET@HOST:PORT"
        raise argparse.ArgumentTypeError(msg)
    return Node(_ae_title(ae_title), host.strip("[]"), int(port))
