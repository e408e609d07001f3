"""A DICOM node that takes chest films: what it is sent waits in an inbox, and reports go out to another node.

    sender ──C-STORE──▶ Inbox ──▶ draft ──▶ OUT/results.jsonl, OUT/sr, OUT/outbox ──C-STORE──▶ node

A film is answered with success when it is on the disk; with a warning when it is not kept, since its header says that
it is no frontal chest film, or its study is drafted already; and with "out of resources" when too much waits. A report
leaves the outbox when the node has it. Source: PS3.4 B.2.3 (statuses), PS3.7 C.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lite.cohort.inbox import UID
from lite.console import say
from lite.errors import BackendUnavailable, LiteError, QueueFull
from lite.image.header import text_of
from lite.image.headers import header_of
from lite.image.quiet import quietly

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from threading import Event

    from pydicom.dataset import Dataset

    from lite.cohort.inbox import Inbox

FILMS: Final = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1")  # CR, and DX for presentation
_VERIFICATION: Final = "1.2.840.10008.1.1"
_BASIC_TEXT_SR: Final = "1.2.840.10008.5.1.4.1.1.88.11"
_SYNTAXES: Final = (
    *("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.5"),
    *(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)),
)
MAX_MESSAGE: Final = 256 * 1024**2
_MAX_ASSOCIATIONS: Final = 8
_THIS_MACHINE: Final = ("127.0.0.1", "::1", "localhost")
_RETRY_S: Final = 30.0
SUCCESS, NOT_KEPT, NO_ROOM, OTHER_CLASS, NOT_UNDERSTOOD = 0x0000, 0xB006, 0xA700, 0xA900, 0xC000


class Node(NamedTuple):
    """Another DICOM node."""

    ae_title: str
    host: str
    port: int


def _pynetdicom() -> Any:  # noqa: ANN401 - a module
    try:
        import pynetdicom
    except ImportError as error:
        msg = "got no pynetdicom · expected it, to receive films · pip install 'llava-rad-lite[receive]'"
        raise BackendUnavailable(msg) from error
    return pynetdicom


@contextlib.contextmanager
def listening(
    inbox: Inbox, *, host: str, port: int, ae_title: str, allow: Sequence[str], max_message: int = MAX_MESSAGE
) -> Iterator[int]:
    """Take films into an inbox as long as the block lasts; yield the port.

    Args:
        inbox: it has taken up what was left.
        host: the address to listen at.
        port: 0 is any that is free.
        ae_title: what the node calls itself.
        allow: the AE titles that may call; none: all, on this machine.
        max_message: a message of more bytes ends its association.

    Raises:
        LiteError: anyone could call from another machine, or the port cannot be had.
        BackendUnavailable: pynetdicom is not installed.
    """
    if not allow and host not in _THIS_MACHINE:
        msg = f"got --host {host} without --allow · expected the AE titles that may send from other machines"
        raise LiteError(f"{msg} · name each with --allow, or listen at 127.0.0.1")
    pynetdicom = _pynetdicom()
    from pynetdicom import evt

    entity = pynetdicom.AE(ae_title)
    entity.require_calling_aet = list(allow)
    entity.maximum_associations = _MAX_ASSOCIATIONS
    entity.add_supported_context(_VERIFICATION)
    for film in FILMS:
        entity.add_supported_context(film, list(_SYNTAXES))
    received: dict[object, int] = {}

    def count(event: Any) -> None:  # noqa: ANN401
        received[event.assoc] = received.get(event.assoc, 0) + getattr(event.pdu, "pdu_length", 0)
        if received[event.assoc] > max_message:
            say(f"note: {_caller(event)}: got a message of more than {max_message} bytes: association ended")
            event.assoc.abort()

    def gone(event: Any) -> None:  # noqa: ANN401
        received.pop(event.assoc, None)
        inbox.gone(event.assoc)

    handlers = [
        (evt.EVT_PDU_RECV, count),
        (evt.EVT_DIMSE_RECV, lambda event: received.update({event.assoc: 0})),
        (evt.EVT_C_STORE, lambda event: _store(event, inbox)),
        (evt.EVT_CONN_CLOSE, gone),
    ]
    try:
        server = entity.start_server((host, port), block=False, evt_handlers=handlers)
    except OSError as error:
        msg = f"{host}:{port}: got {error.strerror or error} · expected a free port · give another --port or --host"
        raise LiteError(msg) from error
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def _caller(event: Any) -> str:  # noqa: ANN401
    return f"{event.assoc.requestor.ae_title}@{event.assoc.requestor.address}"


def _store(event: Any, inbox: Inbox) -> Dataset:  # noqa: ANN401
    """Answer a film."""
    from pydicom.dataset import Dataset

    status, comment = _answer(event, inbox)
    if status != SUCCESS:
        say(f"note: {_caller(event)}: {comment}")
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = comment.encode("ascii", "replace").decode().replace("\\", "/")[:64]
    return answer


def _answer(event: Any, inbox: Inbox) -> tuple[int, str]:  # noqa: ANN401
    try:
        with quietly():
            dataset = event.dataset
            header = header_of(dataset, "")
            film, sop_class = text_of(dataset, "SOPInstanceUID"), text_of(dataset, "SOPClassUID")
    except Exception as error:  # noqa: BLE001 - pydicom raises whatever damaged data lead it to
        return NOT_UNDERSTOOD, f"got data that cannot be read ({error})"
    if (film, sop_class) != (event.request.AffectedSOPInstanceUID, event.request.AffectedSOPClassUID):
        return OTHER_CLASS, "got a film of another UID or class than announced"
    study = header.study_uid or ""
    if not (UID.fullmatch(study) and UID.fullmatch(film)):
        return NOT_UNDERSTOOD, f"got {study or 'no UID'!r}, {film!r} as UIDs of study and film"
    if header.refused:
        return NOT_KEPT, f"not kept: {header.refused}"
    try:
        kept = inbox.put(study, film, event.encoded_dataset(), event.assoc)
    except QueueFull as error:
        return NO_ROOM, str(error)
    except LiteError as error:
        return NO_ROOM, f"the film cannot be written: {error}"
    return (SUCCESS, "") if kept else (NOT_KEPT, f"not kept: study {study} is drafted already")


def send_reports(outbox: Path, node: Node, *, ae_title: str, stop: Event, retry_s: float = _RETRY_S) -> None:
    """Send what is put into a folder; what the node takes is removed. Told to stop, it tries once more, and returns."""
    complaint = ""
    while True:
        stopping = stop.is_set()
        reports = sorted(outbox.glob("*.dcm"))
        failed = _send(reports, node, ae_title) if reports else ""
        if failed and failed != complaint:
            say(f"note: {node.ae_title}@{node.host}:{node.port}: {failed}; the reports stay in {outbox}")
        complaint = failed
        if stopping:
            return
        stop.wait(retry_s if failed else 1.0)


def _send(reports: list[Path], node: Node, ae_title: str) -> str:
    """Send reports; return what went wrong last, "" for nothing."""
    from pydicom import dcmread

    entity = _pynetdicom().AE(ae_title)
    entity.add_requested_context(_BASIC_TEXT_SR)
    entity.connection_timeout = 10
    association = entity.associate(node.host, node.port, ae_title=node.ae_title)
    if not association.is_established:
        return "no association"
    failed = ""
    try:
        for report in reports:
            try:
                with quietly():
                    status = association.send_c_store(dcmread(report)).get("Status")
            except (ValueError, RuntimeError) as error:  # a class that is not taken, an association that has ended
                return str(error)
            if status is not None and (status == SUCCESS or status >> 12 == 0xB):
                report.unlink()
            else:
                failed = f"status {status:#06x}" if status is not None else "no answer"
        return failed
    finally:
        association.release()
