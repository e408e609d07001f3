"""Studies that arrive: in a folder that is watched, and by DICOM C-STORE."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from made_films import dicom, film

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.cohort.inbox import Inbox
from lite.cohort.receive import Node, listening, send_reports
from lite.cohort.watch import watch_folder
from lite.errors import LiteError, QueueFull
from lite.studies.journal import Journal
from lite.studies.sources.base import SourceOptions

pydicom = pytest.importorskip("pydicom")
pynetdicom = pytest.importorskip("pynetdicom")

# pynetdicom forgets to close the socket of a node that does not answer.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CR, DX, CT = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
ARGUMENTS = ("--batch-size", "2", "--max-new-tokens", "2", "--device", "cpu")


def made(study: str, sop: str, **attributes: Any) -> bytes:
    uids = {"StudyInstanceUID": study, "SeriesInstanceUID": f"{study}.1", "SOPInstanceUID": sop}
    return dicom(film(60, 50), **(uids | {"PatientID": "P1"} | attributes))


def as_dataset(content: bytes) -> Any:
    return pydicom.dcmread(pydicom.filebase.DicomBytesIO(content))


def send(port: int, *films: bytes, title: str = "PACS", classes: tuple[str, ...] = (CR, DX)) -> list[int | str]:
    """Send films in one association; return the answers, or what became of it."""
    entity = pynetdicom.AE(title)
    for sop_class in classes:
        entity.add_requested_context(sop_class, [EXPLICIT])
    association = entity.associate("127.0.0.1", port)
    if not association.is_established:
        return ["rejected" if association.is_rejected else "aborted"]
    answers = [association.send_c_store(as_dataset(content)).get("Status", "none") for content in films]
    association.release()
    return answers


def until(said: Callable[[], Any]) -> Any:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := said():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    inbox = Inbox(tmp_path / "incoming", max_studies=2, max_bytes=30_000, settle_s=0.0)
    with Journal(tmp_path / "results.jsonl", artifact_id="", request={}) as journal:
        inbox.take_up(journal)
        yield inbox


@pytest.fixture
def port(inbox: Inbox) -> Iterator[int]:
    with listening(inbox, host="127.0.0.1", port=0, ae_title="LITE", allow=["PACS"], max_message=15_000) as port:
        yield port


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(*words: Any) -> int:
    return main([str(word) for word in (*words, *ARGUMENTS)])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []


def in_background(work: Callable[[], None]) -> threading.Thread:
    """Do something beside the command, and then end it as an operator does."""

    def then_stop() -> None:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=then_stop)
    thread.start()
    return thread


# -- The door ---------------------------------------------------------------------------------------------------------


def test_only_chest_films_of_known_callers_are_kept(
    inbox: Inbox, port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert send(port, title="OTHER") == ["rejected"]
    entity = pynetdicom.AE("PACS")
    entity.add_requested_context("1.2.840.10008.1.1")
    entity.add_requested_context(CT)
    association = entity.associate("127.0.0.1", port)
    assert association.send_c_echo().Status == 0
    assert [context.abstract_syntax for context in association.rejected_contexts] == [CT]
    association.release()
    lateral = made("1.2.3", "1.2.3.9", ViewPosition="LL")
    escape = made("1.2.77777777777", "1.2.3.8").replace(b"1.2.77777777777\0", b"1.2/../../../up\0")
    assert send(port, made("1.2.3", "1.2.3.7"), lateral, escape) == [0x0000, 0xB006, 0xC000]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.dcm")] == ["incoming/1.2.3/1.2.3.7.dcm"]
    kept = pydicom.dcmread(tmp_path / "incoming" / "1.2.3" / "1.2.3.7.dcm")
    assert (kept.PatientID, kept.file_meta.TransferSyntaxUID) == ("P1", EXPLICIT)
    assert "not kept: a lateral view (ViewPosition LL)" in capsys.readouterr().err


def test_more_than_may_wait_is_refused_and_taken_later(inbox: Inbox, port: int, capsys: Any) -> None:
    assert send(port, made("1.2.1", "1.2.1.1"), made("1.2.2", "1.2.2.1"), made("1.2.3", "1.2.3.1")) == [0, 0, 0xA700]
    assert send(port, made("1.2.1", "1.2.1.1"), made("1.2.1", "1.2.1.2")) == [0, 0]  # once more, and one more of it
    assert send(port, made("1.2.1", "1.2.1.3"), made("1.2.1", "1.2.1.4")) == [0, 0xA700]  # too many bytes
    capsys.readouterr()
    large = dicom(np.zeros((200, 150), np.uint16), StudyInstanceUID="1.2.1", SOPInstanceUID="1.2.1.5")
    assert send(port, large) in (["none"], ["aborted"])
    assert "a message of more than 15000 bytes: association ended" in capsys.readouterr().err
    stop = Event()
    studies = inbox.studies(SourceOptions(), stop)
    first = until(lambda: next(studies))
    assert (first.id, first.path.name) == ("1.2.2", "1.2.2.1.dcm")  # the first whose sender has gone for good
    inbox.put("1.2.1", "1.2.1.1", made("1.2.1", "1.2.1.1"), "somebody else")
    assert next(studies) is None  # while somebody brings films of the other
    inbox.gone("somebody else")
    assert send(port, made("1.2.2", "1.2.2.9")) == [0xB006]  # too late
    inbox.ended(first, LiteError("no"))
    assert inbox.put("1.2.3", "1.2.3.1", b"", "others")  # one that failed waits no longer
    assert send(port, made("1.2.2", "1.2.2.1")) == [0]  # one that failed may come again
    inbox.max_studies = 3
    with pytest.raises(QueueFull, match="3 studies wait"):
        inbox.put("1.2.4", "1.2.4.1", b"", "others")
    assert {until(lambda: next(studies)).id for _ in range(2)} == {"1.2.1", "1.2.2"}
    assert send(port, made("1.2.2", "1.2.2.9")) == [0xB006]


def test_what_an_earlier_run_has_left_is_taken_up(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "in", max_studies=9, max_bytes=99_999, settle_s=9.0)
    for study in ("1.2.1", "1.2.2", "notes"):
        (tmp_path / "in" / study).mkdir(parents=True)
        (tmp_path / "in" / study / "film.dcm").write_bytes(made(study if study != "notes" else "1.2.3", "1.2.3.4"))
    with Journal(tmp_path / "results.jsonl", artifact_id="", request={}) as journal:
        journal.done.add("1.2.1")  # whose films were not removed any more
        inbox.take_up(journal)
        studies = inbox.studies(SourceOptions(), Event())
        assert [study and study.id for study in (next(studies), next(studies), next(studies))] == ["1.2.2", None, None]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["1.2.2", "notes"]


def test_what_cannot_be_listened_at(inbox: Inbox, port: int) -> None:
    for host, message in (("192.0.2.1", "without --allow"), ("node.test", "without --allow"), ("127.0.0.1", "in use")):
        with pytest.raises(LiteError, match=message):
            listening(inbox, host=host, port=port, ae_title="LITE", allow=[]).__enter__()


# -- The command ------------------------------------------------------------------------------------------------------


def test_studies_are_drafted_once_and_reports_are_sent(
    tiny_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, port = tmp_path / "out", free_port()
    left = out / "incoming" / "1.2.9"
    left.mkdir(parents=True)
    (left / "1.2.9.1.dcm").write_bytes(made("1.2.9", "1.2.9.1"))  # as a run that was killed has left it
    (left / "1.2.9.0.dcm.partial").write_bytes(made("1.2.9", "1.2.9.0")[:-50])

    def work() -> None:
        until(lambda: lines(out / "results.jsonl"))
        films = made("1.2.1", "1.2.1.1", ViewPosition="AP"), made("1.2.1", "1.2.1.2"), made("1.2.2", "1.2.2.1")
        assert send(port, *films) == [0, 0, 0]
        until(lambda: len(lines(out / "results.jsonl")) == 3 and not list(out.glob("incoming/*")))
        assert send(port, films[0]) == [0xB006]

    words = ("receive", tiny_artifact.path, "--out", out, "--port", port, "--settle", "0.2")
    thread = in_background(work)
    assert command(*words, "--send-to", f"NODE@127.0.0.1:{free_port()}") == 0  # where nobody listens yet
    thread.join()
    results = {line["id"]: line for line in lines(out / "results.jsonl")}
    assert len(lines(out / "results.jsonl")) == len(results) == 3
    assert [Path(results[study]["image"]).stem for study in ("1.2.1", "1.2.9")] == ["1.2.1.2", "1.2.9.1"]  # PA, not AP
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    names = {"1.2.1.dcm", "1.2.2.dcm", "1.2.9.dcm"}
    assert {file.name for file in (out / "sr").iterdir()} == {file.name for file in (out / "outbox").iterdir()} == names
    assert "no association; the reports stay in" in capsys.readouterr().err
    gc.collect()  # what is not closed is told now, and not in another test


def test_a_report_leaves_the_outbox_when_the_node_has_it(tmp_path: Path) -> None:
    taken: list[str] = []

    def take(event: Any) -> int:
        taken.append(event.dataset.SOPInstanceUID)
        return 0xA700 if len(taken) == 1 else 0xB000

    sr = "1.2.840.10008.5.1.4.1.1.88.11"
    for number in ("1", "2"):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(None, SOPClassUID=sr, SOPInstanceUID=f"1.2.{number}"))
    entity = pynetdicom.AE("NODE")
    entity.add_supported_context(sr)
    handlers = [(pynetdicom.evt.EVT_C_STORE, take)]
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    stop = Event()
    node, options = Node("NODE", "127.0.0.1", server.server_address[1]), {"ae_title": "LITE", "stop": stop}
    sender = threading.Thread(target=send_reports, args=(tmp_path, node), kwargs={**options, "retry_s": 0.05})
    sender.start()
    try:
        until(lambda: not list(tmp_path.iterdir()))
    finally:
        stop.set()
        sender.join()
        server.shutdown()
    assert taken == ["1.2.1", "1.2.2", "1.2.1"]  # the one that was refused is sent again


def test_dcmtk_can_send_to_it(tiny_artifact: Artifact, tmp_path: Path) -> None:
    if not shutil.which("storescu"):
        pytest.skip("needs storescu (dcmtk)")
    (tmp_path / "film.dcm").write_bytes(made("1.2.1", "1.2.1.1"))
    out, port = tmp_path / "out", free_port()
    sent: list[int] = []

    def work() -> None:
        def again() -> bool:
            words = ["storescu", "-aec", "LITE", "127.0.0.1", str(port), str(tmp_path / "film.dcm")]
            sent.append(subprocess.run(words, capture_output=True, check=False).returncode)
            return sent[-1] == 0

        until(again)
        until(lambda: lines(out / "results.jsonl"))

    thread = in_background(work)
    assert command("receive", tiny_artifact.path, "--out", out, "--port", port, "--settle", "0") == 0
    thread.join()
    assert [line["id"] for line in lines(out / "results.jsonl")] == ["1.2.1"]
    assert list((out / "incoming").iterdir()) == []


# -- A folder ---------------------------------------------------------------------------------------------------------


def test_a_film_is_taken_when_it_has_stopped_growing(tmp_path: Path, films: list[Path]) -> None:
    stop = Event()
    studies = watch_folder(tmp_path, SourceOptions(), stop, interval_s=0.0)

    def look() -> list[str]:
        found = []
        while (study := next(studies)) is not None:
            found.append(f"{study.id} {study.path.name}")
        return found

    whole, pa = films[0].read_bytes(), made("1.2.1", "1.2.1.2")
    (tmp_path / "a.png").write_bytes(whole[:100])
    (tmp_path / ".hidden.png").write_bytes(whole)
    (tmp_path / "ap.dcm").write_bytes(made("1.2.1", "1.2.1.1", ViewPosition="AP"))
    assert look() == []
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "pa.dcm").write_bytes(pa[:-50])  # of a study that has begun to arrive
    (tmp_path / "empty.png").touch()
    assert look() == []
    (tmp_path / "pa.dcm").write_bytes(pa)
    assert look() == ["a.png a.png"]
    assert look() == ["1.2.1 pa.dcm"]
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "late.dcm").write_bytes(made("1.2.1", "1.2.1.3"))
    (tmp_path / "side" / "lateral.dcm").write_bytes(made("1.2.2", "1.2.2.1", ViewPosition="LL"))
    assert [look(), look(), look()] == [[], [], []]
    stop.set()
    assert list(studies) == []


def test_a_folder_is_watched_until_it_is_told_to_stop(
    tiny_artifact: Artifact, tmp_path: Path, films: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = tmp_path / "out", tmp_path / "films"
    folder.mkdir()
    words = ("run", tiny_artifact.path, folder, "--out", out, "--watch", "--interval", "0.05", "--format", "csv")

    def work(count: int) -> Callable[[], None]:
        def put() -> None:
            shutil.copy(films[count], folder / f"{count}.png")
            until(lambda: len(lines(out / "results.jsonl")) == count + 1)

        return put

    for count in range(2):
        thread = in_background(work(count))
        assert command(*words) == 0
        thread.join()
        assert f"1 more studies are drafted in {out / 'results.jsonl'}" in capsys.readouterr().out
    assert [line["id"] for line in lines(out / "results.jsonl")] == ["0.png", "1.png"]
    assert (out / "results.csv").read_text(encoding="utf-8-sig").count("png,") >= 2
    assert command(*words, "--limit", "1") == 1
    assert "got --limit with --watch · expected a folder" in capsys.readouterr().err
