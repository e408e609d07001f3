"""An OpenAI-compatible endpoint that answers by a script: what a judge says, and everything that goes wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lite.eval.chexprompt import ERRORS, SEVERITIES

Step = Callable[[BaseHTTPRequestHandler], None]


def counts(significant: int = 0, insignificant: int = 0) -> dict[str, dict[str, Any]]:
    """An answer with so many omissions of each severity."""
    numbers = dict(zip(SEVERITIES, (significant, insignificant), strict=True))
    return {name: dict.fromkeys(ERRORS, 0) | {"omission_finding": number} for name, number in numbers.items()}


def send(body: str | bytes, status: int = 200, kind: str = "application/json", **headers: str) -> Step:
    """Answer with these bytes."""
    content = body.encode() if isinstance(body, str) else body

    def step(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return step


def say(content: object) -> Step:
    """Answer as the API does, with this as the model's words."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return send(json.dumps(reply))


def refuse(status: int, why: str = "", **headers: str) -> Step:
    return send(json.dumps({"error": {"message": f"scripted {status}{why}"}}), status, **headers)


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Promise more than is sent, and hang up."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choices": [')
    handler.close_connection = True


@dataclass
class Server:
    """A running endpoint. What `script` holds is answered in turn, and after it `default`."""

    script: list[Step] = field(default_factory=list)
    default: Step = field(default_factory=lambda: say(counts()))
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def serving() -> Iterator[Server]:
    server, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                server.times.append(time.monotonic())
                step = server.script.pop(0) if server.script else server.default
            step(self)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as the base class has it
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
