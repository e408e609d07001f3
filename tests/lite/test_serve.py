"""The server's own routes: findings, films, what it says of itself; and what becomes of clients that go."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from made_films import dicom
from made_films import film as stored_film
from PIL import Image
from serving import Gate, Served, events, png, serving, wait_until
from serving import gate as serving_gate

from lite.artifact.open import Artifact
from lite.errors import LiteError
from lite.loading import load
from lite.prompt import TextStream
from lite.serve.logs import Record
from lite.serve.refusal import Refusal
from lite.serve.service import Live
from lite.session.draft import Draft
from lite.session.request import Outcome
from lite.studies.results import Result

gate = serving_gate


@pytest.fixture(scope="module")
def served(tiny_onnx_artifact: Artifact) -> Iterator[Served]:
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=4), max_queue=40) as served:
        yield served


def asked(served: Served, film: bytes, **fields: Any) -> httpx.Response:
    return served.client.post("/findings", files={"film": ("film", film)}, data=fields)


def of_dicom(**attributes: Any) -> bytes:
    uids = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.1", "SOPInstanceUID": "1.2.3.1.1"}
    return dicom(stored_film(60, 50), **(uids | attributes))


def test_samples_come_with_the_answer(served: Served) -> None:
    value = asked(served, png(), max_new_tokens="9", samples="2").json()
    assert len(value["samples"]) == 2
    assert "".join(one["text"] for one in value["sentences"]) == value["prediction"]
    assert {"mean_probability", "score", "probability", "agreement"} < value["sentences"][0].keys()
    assert not {"top_logprobs", "calibration"} & value.keys()
    refused = asked(served, png(), samples="17")
    assert (refused.status_code, "0 to 16" in refused.json()["error"]["message"]) == (400, True)


def test_the_answer_is_the_object_of_generate(served: Served) -> None:
    response = asked(served, png(), reason="Cough.", max_new_tokens=9)
    value = response.json()
    result = Result.from_json(response.text, where="answer")
    assert result.findings is not None
    expected = served.model.findings(png(), "Cough.", max_new_tokens=9, top_logprobs=0)
    assert (result.prediction, result.findings.token_ids) == (expected.text, expected.token_ids)
    assert result.findings.token_logprobs == expected.token_logprobs
    assert (value["reason"], value["query"], value["image"]) == ("Cough.", None, None)
    assert value["id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("how", ["data", "base64", "text/plain"])
def test_a_film_may_come_in_json(served: Served, how: str) -> None:
    film = base64.b64encode(png()).decode()
    body = {"film": film if how == "base64" else f"data:{how};base64,{film}", "query": "What is there?"}
    value = served.client.post("/findings", json=body | {"max_new_tokens": 4, "reason": None}).json()
    assert value["prediction"] == served.model.findings(png(), query="What is there?", max_new_tokens=4).text


def test_events_are_the_text_as_it_is_made_and_the_same_object(served: Served) -> None:
    response = asked(served, png(), stream="true", max_new_tokens=30)
    assert response.headers["content-type"].startswith("text/event-stream")
    (first, start), *pieces, (last, value) = events(response.text)
    assert (first, last, {name for name, _ in pieces}) == ("start", "findings", {"piece"})
    assert start == {"id": value["id"], "notice": value["notice"]}
    assert "".join(piece["text"] for _, piece in pieces) == value["prediction"]
    logprobs = [logprob for _, piece in pieces for logprob in piece["logprobs"]]
    assert logprobs == pytest.approx(value["token_logprobs"], abs=1e-4)
    accepting = served.client.post(
        "/findings",
        files={"film": png()},
        data={"max_new_tokens": "30"},
        headers={"accept": "text/event-stream"},
    )
    assert events(accepting.text)[-1][1]["prediction"] == value["prediction"]


def test_a_stream_shows_tokens_before_the_end_and_signs_of_life_before_the_first(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=1), ping_s=0.01) as served:
        gate = Gate(served.model, monkeypatch)
        request = {"film": base64.b64encode(png()).decode(), "stream": True, "max_new_tokens": 30}
        with served.client.stream("POST", "/findings", json=request) as response:
            lines = response.iter_lines()
            assert any(line.startswith(": reading") for line in lines)
            gate.step(12)  # some of the first tokens are bytes that are no character
            assert any(line == "event: piece" for line in lines)
            assert len(served.model.session.loop.rows.taken()) == 1
            gate.open()
            assert any(line == "event: findings" for line in lines)


def test_a_report_is_of_what_was_drafted_not_of_what_is_sent(served: Served) -> None:
    pydicom = pytest.importorskip("pydicom")
    value = asked(served, of_dicom(PatientID="P7"), sr="true", max_new_tokens=12, any_film="on").json()
    report = pydicom.dcmread(io.BytesIO(base64.b64decode(value["sr"])))
    assert (report.Modality, report.PatientID, report.StudyInstanceUID) == ("SR", "P7", "1.2.3")
    texts = [str(item.value) for item in report.iterall() if item.keyword == "TextValue"]
    assert any(value["prediction"][-3:] in text for text in texts)


def test_a_report_that_cannot_be_is_refused_before_the_work(served: Served) -> None:
    pytest.importorskip("pydicom")
    for film, words in ((png(), "no DICOM file"), (of_dicom(StudyInstanceUID=""), "without StudyInstanceUID")):
        response = asked(served, film, sr="1", any_film="1")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "image")
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"film": "AAAA"}, "image", "not an image"),
        ({"film": "no base64!"}, "image", "not base64"),
        ({"film": "data:image/png,abc"}, "image", "without base64"),
        ({"film": "file:///etc/passwd"}, "image_url", "got an address (file:)"),
        ({"film": 7}, "image", "got int"),
        ({}, "image_missing", "got no film"),
        ({"film": "", "reason": "Cough."}, "image_missing", "got no film"),
        ({"filme": "AAAA"}, "field", "'filme'"),
        ({"film": "PNG", "reason": "a", "query": "b"}, "prompt", "reason and a query"),
        ({"film": "PNG", "reason": "USER: hello"}, "prompt", "USER:"),
        ({"film": "PNG", "reason": "cough " * 400}, "context_length_exceeded", "shorten the reason"),
        ({"film": "PNG", "max_new_tokens": 0}, "value", "max_new_tokens"),
        ({"film": "PNG", "max_new_tokens": "many"}, "value", "max_new_tokens"),
        ({"film": "PNG", "max_new_tokens": True}, "value", "max_new_tokens"),
        ({"film": "PNG", "any_film": "perhaps"}, "value", "any_film"),
        ({"film": "PNG", "any_film": 2}, "value", "any_film"),
        ({"film": "PNG", "rendering": "nice"}, "value", "mimic-cxr-jpg"),
        ({"film": "PNG", "reason": 5}, "value", "reason"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(
    served: Served, fields: dict[str, Any], code: str, words: str
) -> None:
    film = base64.b64encode(png()).decode()
    response = served.client.post("/findings", json={k: film if v == "PNG" else v for k, v in fields.items()})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, code, "invalid_request_error")
    assert words in error["message"]
    assert "<bytes>" not in error["message"]


def test_a_film_is_shown_as_the_rules_render_it(served: Served) -> None:
    pytest.importorskip("pydicom")
    value = served.client.post("/films", files={"film": of_dicom(ViewPosition="PA")}).json()
    picture = Image.open(io.BytesIO(base64.b64decode(value["png"])))
    assert (picture.mode, picture.size, value["width"], value["height"]) == ("L", (50, 60), 50, 60)
    assert (value["film"]["view"], value["film"]["format"], value["rendering"]) == ("PA", "DICOM", "mimic-cxr-jpg")
    refused = served.client.post("/films", files={"film": of_dicom(ViewPosition="LL")})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "image")
    shown = served.client.post("/films", files={"film": of_dicom(ViewPosition="LL")}, data={"any_film": "true"})
    assert shown.json()["remarks"] != []


def test_a_large_film_is_shown_smaller(served: Served) -> None:
    written = io.BytesIO()
    Image.effect_noise((3000, 2000), 60).save(written, "JPEG")
    value = served.client.post("/films", files={"film": written.getvalue()}).json()
    assert Image.open(io.BytesIO(base64.b64decode(value["png"]))).size == (1536, 1024)
    assert (value["width"], value["height"]) == (3000, 2000)


def test_it_says_what_it_is(served: Served) -> None:
    about = served.client.get("/about").json()
    assert (about["artifact_id"], about["rows"], about["engine"]) == (served.model.artifact.id, 4, "onnx")
    assert "not for clinical use" in about["short_notice"]
    assert "forbids a hosted service" in about["licence"]
    assert about["limits"]["max_queue"] == 40
    assert sum(about["plan"].values()) == about["peak_bytes"]
    reason = served.model.prompt
    assert about["limits"]["max_reason_tokens"] == reason.max_seq_len - 1 - reason.num_tokens(reason.encode(None))
    for path in ("/health", "/v1/health"):
        assert served.client.get(path).json() == {"status": "ok"}
    page = served.client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert served.client.get("/static/index.html").text == page.text


def metrics(served: Served) -> dict[str, float]:
    lines = served.client.get("/metrics").text.splitlines()
    return {
        name.removeprefix("llava_rad_lite_"): float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_it_counts(served: Served, gate: Gate) -> None:
    before = metrics(served)
    answers: list[dict[str, Any]] = []

    def ask(seed: int) -> None:
        answers.append(asked(served, png(seed), max_new_tokens=40).json())

    streams = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for stream in streams:
        stream.start()
    session = served.model.session
    wait_until(lambda: len(session.waiting) + len(session.loop.rows.taken()) == 6)
    wait_until(lambda: len(session.loop.rows.taken()) == 4 or gate.step())  # which come in one after another
    busy = metrics(served)
    assert (busy["rows_busy"], busy["queue_length"]) == (4, 2)
    gate.open()
    for stream in streams:
        stream.join()
    served.client.post("/findings", json={"film": "AAAA"})
    served.wait_until_idle()
    now = metrics(served)
    assert (now["rows_busy"], now["queue_length"], now["rows"]) == (0, 0, 4)
    assert now["tokens_total"] - before.get("tokens_total", 0) == sum(len(answer["token_ids"]) for answer in answers)
    count = "time_to_first_token_seconds_count"
    assert now[count] - before[count] == 6
    failed = 'failures_total{kind="image"}'
    assert now[failed] - before.get(failed, 0) == 1
    assert now["resident_memory_bytes"] > 10**6


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["in its text", "in its prompt", "in the queue"])
def test_who_hangs_up_leaves_no_row(served: Served, gate: Gate, stream: bool, when: str) -> None:
    """Also with a text that would go on for long, and a decoder that is waiting meanwhile."""
    body = {"film": base64.b64encode(png(1)).decode(), "stream": stream, "max_new_tokens": 300}
    others = [served.model.submit(png(seed), max_new_tokens=300) for seed in range(2, 6)] if "queue" in when else []
    text = json.dumps(body).encode()
    head = f"POST /findings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
    for client in clients:
        client.sendall(head + text)
    session = served.model.session
    wait_until(lambda: len(session.waiting) + len(session.loop.rows.taken()) == 3 + len(others))
    known = {*session.waiting, *(progress for _, progress in session.loop.rows.taken())}
    if when == "in its text":
        gate.step(8)
    for client in clients:
        client.close()
    wait_until(lambda: served.server.service.under_way.total() == 0)
    wait_until(lambda: sum(progress.cancelled for progress in known) == 3)
    gate.step()  # the one that the decoder is in
    wait_until(lambda: len(session.waiting) + len(session.loop.rows.taken()) == len(others))
    assert len(others) == sum(not other.done() for other in others)
    for other in others:
        other.cancel()


def test_many_streams_at_a_time_are_neither_lost_nor_crossed(served: Served) -> None:
    expected = {seed: served.model.findings(png(seed), f"Cough {seed}.", max_new_tokens=12).text for seed in range(24)}
    texts: dict[int, str] = {}

    def ask(seed: int) -> None:
        response = asked(served, png(seed), reason=f"Cough {seed}.", max_new_tokens=12, stream="1")
        texts[seed] = events(response.text)[-1][1]["prediction"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == expected


def test_a_full_queue_refuses_and_a_deadline_ends(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_queue": 1, "timeout_s": 0.5}
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=1), **settings) as served:
        gate = Gate(served.model, monkeypatch)
        answers: list[httpx.Response] = []
        threads = []
        session = served.model.session
        for number in (1, 2, 3):
            thread = threading.Thread(target=lambda: answers.append(asked(served, png(), max_new_tokens=300)))
            thread.start()
            threads.append(thread)
            wait_until(lambda: len(session.waiting) + len(session.loop.rows.taken()) == min(number, 2))  # noqa: B023
            wait_until(lambda: not session.waiting or number > 1)  # noqa: B023 - the first has its row
        threads[2].join()
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (429, "queue_full")
        assert answers[0].headers["retry-after"] == "1"
        time.sleep(0.5)  # nothing moves before the next step
        wait_until(lambda: gate.step() or len(answers) == 3)
        assert [answer.json()["error"]["code"] for answer in answers[1:]] == ["timeout"] * 2
        assert [answer.status_code for answer in answers[1:]] == [504] * 2


def test_an_error_right_behind_the_last_tokens_is_told(served: Served) -> None:
    """Nothing tells of it a second time."""
    outcome = Outcome("s1")
    outcome.token_ids, outcome.logprobs, outcome.error = [30, 31], [-1.0, -1.0], LiteError("got an overflow")
    outcome._has_ended = True
    finish = lambda: served.model.findings(png())  # noqa: E731
    draft = Draft(outcome, TextStream(served.model.tokenizer), cancel=lambda: None, finish=finish)

    async def read() -> list[Any]:
        live = Live([draft], Record(route="/"))
        await asyncio.sleep(0)  # what tells of the end has told
        async with asyncio.timeout(30):
            return [piece async for piece in live.pieces()]

    with pytest.raises(Refusal, match="got an overflow"):
        asyncio.run(read())


def test_what_fails_in_a_stream_is_its_last_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("0xdeadbeef")

    monkeypatch.setattr(served.model.decoder, "decode", fail)
    name, value = events(asked(served, png(), stream="1").text)[-1]
    assert (name, value["error"]["code"], value["error"]["type"]) == ("error", "fault", "server_error")
    whole = asked(served, png())
    assert (whole.status_code, whole.json()) == (500, value)
    assert "0xdeadbeef" not in whole.text
    monkeypatch.undo()
    served.wait_until_idle()
    assert asked(served, png(), max_new_tokens=2).status_code == 200
