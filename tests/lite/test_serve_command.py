"""The command as a process of its own: what it says, when it listens, how it ends."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from repository import ROOT
from serving import KEY, Gate, png, serving, wait_until

from lite.__main__ import main
from lite.artifact.open import Artifact
from lite.loading import load


class Running:
    """A server in a process of its own, and all that it says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        self.printed: list[str] = []
        for stream, lines in ((process.stderr, self.said), (process.stdout, self.printed)):
            threading.Thread(target=lambda s, ls: ls.extend(iter(s.readline, "")), args=(stream, lines)).start()
        wait_until(lambda: any("listens at" in line for line in self.said) or process.poll() is not None)

    @property
    def url(self) -> str:
        return re.search(r"listens at (\S+),", "".join(self.said))[1]  # type: ignore[index]

    def ask(self, **fields: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/findings", files={"film": png()}, data=fields, timeout=60)


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "lite", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield Running(process)
        finally:
            process.kill()


def test_it_says_what_it_is_for_listens_logs_no_text_and_ends_at_once(tiny_onnx_artifact: Artifact) -> None:
    with running(tiny_onnx_artifact.path, "--rows", "2") as server:
        assert "not for clinical use" in server.said[0].lower() or "research" in server.said[0].lower()
        assert (
            server.said[0]
            .rstrip()
            .endswith("For your own group on your own machine: the published model's licence forbids a hosted service.")
        )
        wait_until(lambda: server.printed)
        assert server.printed == [f"{server.url}\n"]
        answer = server.ask(reason="A secret reason.", max_new_tokens=4)
        value = answer.json()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    lines = [json.loads(line) for line in server.said if line.startswith("{")]
    (line,) = [line for line in lines if line["route"] == "/findings"]
    assert (line["id"], line["status"], line["tokens"]) == (answer.headers["x-request-id"], 200, 4)
    assert {"time", "seconds", "queued_s", "ttft_s"} < line.keys()
    assert "secret" not in "".join(server.said)
    assert value["prediction"] not in "".join(server.said)


def test_texts_are_logged_on_request(tiny_onnx_artifact: Artifact) -> None:
    with running(tiny_onnx_artifact.path, "--log-texts") as server:
        wait_until(lambda: server.printed)
        text = server.ask(reason="A secret reason.", max_new_tokens=4).json()["prediction"]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    (line,) = [json.loads(line) for line in server.said if "/findings" in line]
    assert (line["reason"], line["text"]) == ("A secret reason.", text)


def test_it_answers_while_it_loads_and_may_be_stopped_then(tiny_onnx_artifact: Artifact) -> None:
    with running(tiny_onnx_artifact.path) as server:
        os.kill(server.process.pid, signal.SIGSTOP)  # the sooner it asks, the likelier it is still loading
        os.kill(server.process.pid, signal.SIGCONT)
        with contextlib.suppress(httpx.TransportError):
            health = httpx.get(f"{server.url}/health", timeout=60)
            assert health.status_code in (200, 503)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("none",), "none: got"),
        (("ARTIFACT", "--memory-limit", "1MiB"), "memory"),
        (("ARTIFACT", "--host", "0.0.0.0"), "no key"),  # noqa: S104
        (("ARTIFACT", "--api-key-file", "/dev/null"), "got a key that is empty"),
        (("ARTIFACT", "--host", "203.0.113.9", "--api-key-file", "KEY"), "203.0.113.9, port 0"),
    ],
)
def test_what_cannot_be_served_ends_with_one_line(
    tiny_onnx_artifact: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: Any, words: str
) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    given = {"ARTIFACT": str(tiny_onnx_artifact.path), "KEY": str(key)}
    assert main(["serve", *(given.get(option, option) for option in options), "--port", "0"]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("error: ")
    assert words in said[-1]
    assert not any("Traceback" in line for line in said)


def test_what_runs_may_end_and_the_rest_is_refused(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to stop, it answers what runs, and 503 to what is new, over connections that there are and new ones."""
    body = json.dumps({"film": base64.b64encode(png()).decode(), "max_new_tokens": 9})
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=1)) as served:
        gate = Gate(served.model, monkeypatch)
        session = served.model.session
        answers: list[httpx.Response] = []
        runs = threading.Thread(target=lambda: answers.append(served.client.post("/findings", content=body)))
        runs.start()
        wait_until(lambda: len(session.loop.rows.taken()) == 1)
        served.server.stop()
        wait_until(lambda: served.server.service.is_stopping)
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        for path in ("/findings", "/v1/chat/completions"):
            connection.request("POST", path, body)
            refused = connection.getresponse()
            assert (refused.status, json.load(refused)["error"]["code"]) == (503, "stopping")
            assert refused.headers["retry-after"]
            connection.close()
        assert httpx.get(f"{served.url}/health").status_code == 503
        gate.open()
        runs.join()
        assert (answers[0].status_code, len(answers[0].json()["token_ids"])) == (200, 9)


def test_what_does_not_end_within_the_grace_is_told_so(
    tiny_onnx_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda: load(tiny_onnx_artifact.path, device="cpu", rows=1), grace_s=0.0) as served:
        gate = Gate(served.model, monkeypatch)
        body = {"film": base64.b64encode(png()).decode(), "stream": True, "max_new_tokens": 400}
        with served.client.stream("POST", "/findings", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: start"
            served.server.stop()
            wait_until(lambda: served.model.session._closed)
            gate.open()
            assert '"code":"stopping"' in list(lines)[-2]
