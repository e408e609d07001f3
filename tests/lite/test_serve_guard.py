"""Whom a server lets in, by which name, and how much at a time: what is hostile gets 4xx, and no more."""

from __future__ import annotations

import base64
import gc
import json
import select
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from made_films import png_of
from serving import KEY, Gate, Served, png, serving, wait_until

from lite.artifact.open import Artifact
from lite.loading import load
from lite.model import FindingsModel
from lite.serve.server import _Protocol

# starlette leaves it to the collector to close the file of a form that breaks off.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
BODY = 64 * 1024


@pytest.fixture
def model(tiny_onnx_artifact: Artifact) -> FindingsModel:
    return load(tiny_onnx_artifact.path, device="cpu", rows=2)


@pytest.fixture(scope="module")
def open_one(tiny_onnx_artifact: Artifact) -> Iterator[Served]:
    """A server on this machine, as it is by default but for small limits."""
    load_it = lambda: load(tiny_onnx_artifact.path, device="cpu", rows=2)  # noqa: E731
    limits = {"max_body_bytes": BODY, "max_held_bytes": 3 * BODY, "body_grace_s": 0.3, "min_body_rate": 1 << 20}
    with serving(load_it, **limits) as served:
        yield served


@pytest.fixture(scope="module")
def locked_one(tiny_onnx_artifact: Artifact) -> Iterator[Served]:
    """A server with a key, that a page of others may ask, and that others' machines can reach."""
    load_it = lambda: load(tiny_onnx_artifact.path, device="cpu", rows=2)  # noqa: E731
    names = {"allow_hosts": ("films.example",), "allow_origins": ("https://pages.example",)}
    with serving(load_it, host="0.0.0.0", key=KEY, **names) as served:  # noqa: S104
        yield served


def raw(served: Served, data: bytes) -> bytes:
    """Send bytes as they are; return the answer."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        client.sendall(data)
        with client.makefile("rb") as answer:
            return answer.read()


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:80"}, 421),
        ({"host": "192.168.1.4"}, 421),
        ({"host": ""}, 421),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8001"}, 403),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 403),
    ],
)
def test_names_and_pages_of_others_are_refused(open_one: Served, headers: dict[str, str], expected: int) -> None:
    response = open_one.client.get("/about", headers=headers)
    assert response.status_code == expected
    if expected != 200:
        assert response.json()["error"]["code"] in ("host", "origin")


def test_a_link_to_the_page_may_be_followed(open_one: Served) -> None:
    visit = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert open_one.client.get("/", headers=visit).status_code == 200
    assert open_one.client.get("/", headers=visit | {"sec-fetch-dest": "iframe"}).status_code == 403
    assert open_one.client.post("/findings", headers=visit).status_code == 403


@pytest.mark.parametrize("path", ["/", "/about", "/health", "/metrics", "/nothing", "/v1/models"])
def test_every_answer_tells_browsers_what_it_is_not(open_one: Served, path: str) -> None:
    headers = open_one.client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert (headers["cache-control"], headers["cross-origin-resource-policy"]) == ("no-store", "same-origin")
    assert "access-control-allow-origin" not in headers
    assert "server" not in headers


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    ("given", "fits"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (basic(f"anyone:{KEY}"), True),
        (basic(f":{KEY}"), True),
        (basic(f"{KEY}:"), False),
        (basic(KEY), False),
        ("Basic !!!", False),
        (f"Bearer {KEY}x", False),
        (f"Bearer {KEY[:-1]}", False),
        ("Bearer", False),
        (KEY, False),
        (f"Digest {KEY}", False),
        ("", False),
    ],
)
def test_the_key_opens_every_route_and_no_other_does(locked_one: Served, given: str, fits: bool) -> None:
    for path in ("/", "/about", "/metrics", "/v1/models", "/static/index.html", "/nothing"):
        response = locked_one.client.get(path, headers={"authorization": given})
        assert (response.status_code == 401) != fits, path
        if not fits:
            assert response.headers["www-authenticate"].startswith("Basic realm=")
            assert response.json()["error"]["type"] == "authentication_error"
    assert locked_one.client.get("/health", headers={"authorization": given}).status_code == 200
    posted = locked_one.client.post("/findings", content=b"x", headers={"authorization": given})
    assert posted.status_code == (400 if fits else 401)


def test_a_server_for_others_is_called_by_its_addresses_and_given_names(locked_one: Served) -> None:
    for name, expected in (("10.1.2.3:8000", 200), ("films.example", 200), ("evil.example", 421), ("[fe80::1]", 200)):
        assert locked_one.client.get("/about", headers={"host": name}).status_code == expected


def test_a_page_that_is_named_may_ask(locked_one: Served) -> None:
    page = {"origin": "https://pages.example"}
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    before = locked_one.client.options("/findings", headers=page | asks | {"authorization": ""})
    assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, page["origin"])
    for headers in (page, page | {"authorization": "Bearer wrong"}):
        answer = locked_one.client.get("/about", headers=headers)
        assert answer.headers["access-control-allow-origin"] == page["origin"]
    assert locked_one.client.options("/findings", headers=asks | {"origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large_is_refused(open_one: Served, chunked: bool) -> None:
    content = iter([bytes(BODY)] * 2) if chunked else bytes(2 * BODY)
    response = open_one.client.post("/findings", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert open_one.client.post("/findings", content=bytes(BODY)).json()["error"]["code"] == "json"


@pytest.mark.parametrize("length", ["99999999999", "9" * 30, "00000000000000000000000000099999999"])
def test_a_body_that_says_that_it_is_too_large_is_not_waited_for(open_one: Served, length: str) -> None:
    head = f"POST /findings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n"
    assert raw(open_one, head.encode()).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_body_that_does_not_come_ends(open_one: Served) -> None:
    head = b"POST /findings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    answer = raw(open_one, head + b"{")
    assert status(answer) == 408
    assert b"body_too_slow" in answer
    assert b"connection: close" in answer
    wait_until(lambda: not open_one.server.service.under_way)


def test_bodies_together_are_bounded(model: FindingsModel) -> None:
    """Two that are nearly whole are more than may be held: one is refused, and the other goes on."""
    part = b"POST /findings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % BODY + bytes(BODY - 1)
    with serving(lambda: model, max_body_bytes=BODY, max_held_bytes=BODY * 3 // 2) as served, ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(2)]
        for client in clients:
            client.sendall(part)
        (refused,), _, _ = select.select(clients, [], [], 30)
        assert status(refused.recv(1 << 16)) == 429
        (other,) = (client for client in clients if client is not refused)
        other.sendall(b"x")
        assert status(other.recv(1 << 16)) == 400


@pytest.mark.parametrize("path", ["/findings", "/films", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"null", b"[]", b'"film"', b"[" * 30_000, b'{"film": ' * 5000, b"\xff\xfe", b"{" + b"1" * 5000 + b"}",
     b'{"film": NaN}', b'{"film": "' + b"\\ud800" * 20 + b'"}', b'{"\\ud800": 1}', b'{"n": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_request_is_refused(open_one: Served, path: str, body: bytes) -> None:
    response = open_one.client.post(path, content=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x",
        b'--x\r\nContent-Disposition: form-data; name="film"; filename="a"\r\n\r\nabc',
        b'--x\r\nContent-Disposition: form-data; name="film"\r\n\r\n\r\n--x--\r\n',
        b'--x\r\nContent-Disposition: form-data; name="reason"\r\n\r\n\xff\xff\r\n--x--\r\n',
        b"--x\r\n" + b"A: b\r\n" * 2000 + b"\r\n\r\n--x--\r\n",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 40 + b"--x--\r\n",
    ],
)
@pytest.mark.parametrize("boundary", ["; boundary=x", "", "; boundary=" + "y" * 5000])
def test_a_form_that_is_none_is_refused(open_one: Served, body: bytes, boundary: str) -> None:
    headers = {"content-type": f"multipart/form-data{boundary}"}
    assert open_one.client.post("/findings", content=body, headers=headers).status_code == 400


def test_bombs_are_refused_before_they_are_decoded(open_one: Served) -> None:
    wide = png_of(60_000, 60_000, b"")
    rows = zlib.compress(bytes(5_000 * 5_001), 9)
    for film in (wide, png_of(5_000, 5_000, bytes(5_000 * 5_001)), b"GIF89a" + bytes(100), rows, png()[:90]):
        response = open_one.client.post("/films", files={"film": film[: BODY - 2000]})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "image")
        assert "0x" not in response.text


@pytest.mark.parametrize(
    "path",
    ["/static/../settings.py", "/static/..%2fsettings.py", "/static/%2e%2e/guard.py", "/static/", "/static/page.js%00",
     "//etc/passwd", "/static/index.html/x", "/findings/", "/v1", "/%ff%fe", "/static/" + "a" * 5000],
)  # fmt: skip
def test_paths_lead_nowhere(open_one: Served, path: str) -> None:
    answer = raw(open_one, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert status(answer) == 404
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(10_000)) + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        + b"".join(b"X-%d: y\r\n" % i for i in range(200))
        + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"PUT /findings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    ],
)
def test_heads_that_are_none_are_refused(open_one: Served, head: bytes) -> None:
    try:
        assert 400 <= status(raw(open_one, head)) < 500
    except ConnectionError:  # it went while the rest was being sent
        assert len(head) > 32_000
    assert open_one.client.get("/health").status_code == 200


def test_who_asks_for_nothing_is_let_go(model: FindingsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite.serve.server._SILENCE_S", 0.05)
    with serving(lambda: model) as served, socket.create_connection(("127.0.0.1", served.port), timeout=30) as silent:
        assert silent.recv(1) == b""


def test_a_connection_that_has_gone_is_not_held(model: FindingsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite.serve.server._SILENCE_S", 3600)

    def num_held() -> int:
        gc.collect()
        return sum(type(item) is _Protocol for item in gc.get_objects())

    with serving(lambda: model) as served:
        before = num_held()
        connections = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(3)]
        wait_until(lambda: num_held() == before + 3)
        for connection in connections:
            connection.close()
        wait_until(lambda: num_held() == before)


def test_one_client_may_not_have_everything(model: FindingsModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda: model, max_per_client=2) as served:
        gate = Gate(model, monkeypatch)
        body = {"film": base64.b64encode(png()).decode(), "max_new_tokens": 2}
        threads = [
            threading.Thread(target=served.client.post, args=("/findings",), kwargs={"json": body}) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: served.server.service.under_way.total() == 2)
        refused = served.client.post("/findings", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert served.client.get("/about").status_code == 200
        gate.open()
        for thread in threads:
            thread.join()
