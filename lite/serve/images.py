"""Films as a request brings them: data URIs and base64; addresses only of places that the server was told of.

An address is resolved once, and what it resolved to is what is connected to. A name that leads into this machine or its
own network is refused, as is every redirect: whoever wants a film from there names the address itself.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import urllib.parse
from typing import TYPE_CHECKING, Final

from lite.serve.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lite.serve.settings import Settings

_SCHEME: Final = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_SPACE: Final = re.compile(r"\s+")
_FETCH_S: Final = 30.0


def film_of(text: object, settings: Settings, *, param: str) -> bytes:
    """Return the bytes of a film that is given as text; call it in a thread.

    Args:
        text: a data URI of any media type (what a file is, its bytes say), or base64 alone.
        settings: of the server.
        param: what the request calls it.

    Raises:
        Refusal: it is neither, or an address that films are not fetched from.
    """
    if not isinstance(text, str):
        msg = f"got {type(text).__name__} for a film · expected text · send a data URI"
        raise Refusal(400, msg, code="image", param=param)
    scheme = found[1].lower() if (found := _SCHEME.match(text)) else ""
    if scheme == "data":
        head, comma, text = text.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            msg = "got a data URI without base64 · expected data:image/png;base64,… · encode the film so"
            raise Refusal(400, msg, code="image", param=param)
    elif scheme in ("http", "https") and settings.image_origins:
        return _fetched(text.strip(), settings, param)
    elif scheme:
        msg = f"got an address ({scheme}:) of a film · expected the film itself, as a data URI"
        raise Refusal(400, f"{msg} · send it, or start the server with --image-origin", code="image_url", param=param)
    try:
        return base64.b64decode(_SPACE.sub("", text), validate=True)
    except (binascii.Error, ValueError):
        msg = "got a film that is not base64 · expected a data URI · encode the whole file"
        raise Refusal(400, msg, code="image", param=param) from None


def _fetched(url: str, settings: Settings, param: str) -> bytes:
    """Fetch a film from a place that the server was told of."""

    def refuse(got: str, expected: str) -> Refusal:
        msg = f"got {got} · expected {expected} · send the film as a data URI"
        return Refusal(400, msg, code="image_url", param=param)

    parts, origin = _split(url)
    if origin not in settings.image_origins or parts.hostname is None:
        raise refuse("an address that films are not fetched from", "one that the server was started with")
    secure, name = parts.scheme == "https", parts.hostname
    port = parts.port or (443 if secure else 80)
    try:
        address = _resolved(name, port)
        if address is None:
            raise refuse("a name that leads into this machine's own network", "the address itself as --image-origin")
        sock = socket.create_connection((address, port), timeout=_FETCH_S)
        if secure:
            tls = ssl.create_default_context()
            sock = tls.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
        with contextlib.closing(sock), _ending(sock):
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
            connection = http.client.HTTPConnection(name, port, timeout=_FETCH_S)
            connection.sock = sock
            target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            connection.request("GET", target, headers={"Host": parts.netloc, "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            data = answer.read(settings.max_body_bytes + 1)
            if answer.status != 200:  # a redirect is not followed
                raise refuse(f"status {answer.status} for the film's address", "200")
    except (OSError, http.client.HTTPException, ValueError):
        raise refuse("no answer from the film's address", "the film within half a minute") from None
    if len(data) > settings.max_body_bytes:
        raise refuse(f"more than {settings.max_body_bytes:,} bytes from the film's address", "fewer")
    return data


def _split(url: str) -> tuple[urllib.parse.SplitResult, str | None]:
    """Return the parts of an address, and its origin; None where it is written in a way that could mean another."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return urllib.parse.urlsplit(""), None
    plain = url.isascii() and url.isprintable() and not set(url) & set(" \\@#") and parts.hostname is not None
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return parts, f"{parts.scheme}://{host}{f':{port}' if port is not None else ''}" if plain else None


def _resolved(name: str, port: int) -> str | None:
    """Return the one address that is connected to; None if it is not one of the wide network, nor was given as such."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(name))
    address = str(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0])
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return address if found.is_global and not found.is_multicast else None


@contextlib.contextmanager
def _ending(sock: socket.socket) -> Iterator[None]:
    """Break a connection off that takes too long as a whole, a byte at a time or not."""
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS, too, without its good-bye

    timer = threading.Timer(_FETCH_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if is_over.is_set():
        raise TimeoutError
