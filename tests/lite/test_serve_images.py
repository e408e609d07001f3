"""Films that are fetched, where that is allowed, and what settings of a server are refused."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving import KEY, png

from lite.errors import LiteError
from lite.serve import images
from lite.serve.images import _resolved, film_of
from lite.serve.refusal import Refusal
from lite.serve.settings import Settings, read_key

BODY = 64 * 1024


class Films(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["host"]))  # type: ignore[attr-defined]
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", "/film.png")
            self.end_headers()
            return
        body = png(3) if self.path.startswith("/film") else bytes(BODY + 1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def films() -> Iterator[Any]:
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Films))
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_film_is_fetched_from_where_it_may_be_and_nowhere_else(films: Any) -> None:
    port = films.server_port
    here = f"http://127.0.0.1:{port}"
    settings = Settings(image_origins=(here, f"http://localhost:{port}", "https://pacs.example"), max_body_bytes=BODY)
    assert film_of(f"{here}/film.png?a=b", settings, param="p") == png(3)
    assert films.asked == [("/film.png?a=b", f"127.0.0.1:{port}")]
    for url, words in (
        (f"{here}/moved", "status 302"),
        (f"{here}/large", f"more than {BODY:,} bytes"),
        (f"http://localhost:{port}/film.png", "this machine's own network"),
        (f"http://127.0.0.1:{port + 1}/film.png", "not fetched from"),
        (f"{here}@pacs.example/film.png", "not fetched from"),
        (f"http://pacs.example\\@127.0.0.1:{port}/film.png", "not fetched from"),
        (f"HTTPS://pacs.example:{port}/film.png", "not fetched from"),
        ("http://pacs.example/film.png", "not fetched from"),
        ("https://pacs.example.evil.example/", "not fetched from"),
        ("http://[::1/film.png", "not fetched from"),
        ("file:///etc/passwd", "an address (file:)"),
        ("ftp://pacs.example/film.png", "an address (ftp:)"),
    ):
        before = len(films.asked)
        with pytest.raises(Refusal, match="got") as caught:
            film_of(url, settings, param="p")
        assert words in str(caught.value), url
        assert caught.value.status == 400
        assert len(films.asked) - before == (1 if url.startswith(f"{here}/") else 0)
    with pytest.raises(Refusal, match="--image-origin"):
        film_of(f"{here}/film.png", Settings(), param="p")


def test_a_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("there is no openssl here to make a certificate")
    key, cert = tmp_path / "key", tmp_path / "cert"
    new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert]
    named = ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, *new, *named], check=True, capture_output=True)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Films) as server:
        server.asked = []  # type: ignore[attr-defined]
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        origin = f"https://127.0.0.1:{server.server_port}"
        try:
            with pytest.raises(Refusal, match="no answer"):
                film_of(f"{origin}/film.png", Settings(image_origins=(origin,)), param="p")
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
            assert film_of(f"{origin}/film.png", Settings(image_origins=(origin,)), param="p") == png(3)
        finally:
            server.shutdown()
            thread.join()


def test_who_sends_too_slowly_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and all of them would take for ever."""
    monkeypatch.setattr(images, "_FETCH_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            client, _ = listening.accept()
            with client, contextlib.suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    client.sendall(b"x")
                    time.sleep(0.01)

        thread = threading.Thread(target=trickle)
        thread.start()
        origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(Refusal, match="no answer"):
            film_of(f"{origin}/film.png", Settings(image_origins=(origin,)), param="p")
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("address", "fits"),
    [("93.184.216.34", True), ("10.0.0.1", False), ("127.0.0.1", False), ("169.254.169.254", False), ("::1", False),
     ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False), ("2606:2800:220:1::1", True), ("224.0.0.1", False)],
)  # fmt: skip
def test_what_a_name_leads_to_decides(monkeypatch: pytest.MonkeyPatch, address: str, fits: bool) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    assert (_resolved("pacs.example", 443) == address) == fits
    assert _resolved("10.0.0.1", 443) == "10.0.0.1"  # named as such


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "no key"),  # noqa: S104
        ({"host": "::"}, "no key"),
        ({"host": "films.example"}, "no key"),
        ({"allow_origins": ("*",)}, "the origin '*'"),
        ({"allow_origins": ("https://a.example/",)}, "the origin"),
        ({"image_origins": ("pacs.example",)}, "the origin"),
        ({"port": 70_000}, "port 70000"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"max_body_bytes": 10}, "max_body_bytes=10"),
    ],
)
def test_settings_that_are_not_safe_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(LiteError) as caught:
        Settings(**given)
    assert words in str(caught.value)
    assert Settings(host="0.0.0.0", key=KEY).key == KEY  # noqa: S104
    assert KEY not in repr(Settings(key=KEY))


def test_a_key_is_one_long_word_that_nobody_else_can_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    for text in ("", "short", f"{KEY}\n{KEY}\n", f"{KEY} {KEY}", "ä" * 20):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(LiteError, match="token_urlsafe"):
            read_key(file)
    file.write_text(f"{KEY}\n")
    file.chmod(0o640)
    assert read_key(file)[0] == KEY
    assert "chmod 600" in (read_key(file)[1] or "")
    file.chmod(0o600)
    assert read_key(file) == (KEY, None)
    with pytest.raises(LiteError, match="No such file"):
        read_key(tmp_path / "none")
