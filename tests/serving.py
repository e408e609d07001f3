"""A server of the runtime's own, in a thread, over a real socket; and a decoder that waits for the test."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Whatever imports this is skipped where the extra `serve` is not installed.
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import httpx
from tiny import film

from lite.model import FindingsModel
from lite.serve.server import Server
from lite.serve.settings import Settings

KEY = "a-key-of-more-than-16-letters"


class Served:
    """A server that runs."""

    def __init__(self, server: Server, client: httpx.Client) -> None:
        self.server = server
        self.client = client
        self.url = server.url
        self.port = int(server.url.rpartition(":")[2])

    @property
    def model(self) -> FindingsModel:
        assert self.server.service.model is not None
        return self.server.service.model

    def is_idle(self) -> bool:
        session = self.model.session
        return not (session.waiting or session.loop.rows.taken() or self.server.service.under_way)

    def wait_until_idle(self) -> None:
        wait_until(self.is_idle)


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(load: Callable[[], FindingsModel], **settings: Any) -> Iterator[Served]:
    """Run a server until the block is left."""
    ready = threading.Event()
    server = Server(Settings(port=0, **settings), load, ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert ready.wait(60)
        key = settings.get("key")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            yield Served(server, client)
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


class Gate:
    """Holds a model's decoder before each step until it is opened, for as many steps as it is opened for."""

    def __init__(self, model: FindingsModel, monkeypatch: Any) -> None:
        self._steps = threading.Semaphore(0)
        self._is_open = False
        self.num_waiting = 0
        decode = model.decoder.decode

        def held(*arguments: Any) -> Any:
            self.num_waiting += 1
            while not self._is_open and not self._steps.acquire(timeout=0.01):
                pass
            self.num_waiting -= 1
            return decode(*arguments)

        monkeypatch.setattr(model.decoder, "decode", held)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._steps.release()

    def open(self) -> None:
        self._is_open = True


def png(seed: int = 0) -> bytes:
    written = io.BytesIO()
    film(seed).save(written, "PNG")
    return written.getvalue()


def events(text: str) -> list[tuple[str, Any]]:
    """Read a stream of events: the name and the value of each, comments left out."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in lines:
            data = lines["data"]
            found.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


@pytest.fixture
def gate(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(served.model, monkeypatch)
    yield gate
    gate.open()
    served.wait_until_idle()
