"""What stands before every route: who may ask, by which name, from which page, how much, and how much at a time.

    Door ──▶ (CORS, for pages that are named) ──▶ Guard ──▶ routes
    host, origin, headers, log                    key, counts, bodies

Other pages that are open in a browser of this machine can reach a server that listens on it. What stops them: the name
in `Host` (a foreign one that resolves to this machine), and `Origin` or `Sec-Fetch-Site` (a foreign page).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import time
from typing import TYPE_CHECKING, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect

from lite.serve.logs import Record
from lite.serve.refusal import Refusal, refusal_of
from lite.serve.settings import digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from lite.serve.service import Service
    from lite.serve.settings import Settings

HEALTH: Final = ("/health", "/v1/health")
_CLIENT_GONE: Final = 499  # what logs call it; nobody is left to read it
_MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 32 * 1024
_DRAIN_S: Final = 1.0
_DRAIN_BYTES: Final = 16 * 1024**2
_CONTENT: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _CONTENT,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}


class Door:
    """Refuses foreign names and foreign pages, and writes down what became of each request."""

    def __init__(self, app: ASGIApp, *, service: Service, routes: frozenset[str]) -> None:
        """Stand before an application.

        Args:
            app: what answers.
            service: whose settings, log and metrics these are.
            routes: paths that logs and metrics tell apart.
        """
        self._app = app
        self._service = service
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        known = path if path in self._routes else "/static" if path.startswith("/static/") else "other"
        record = Record(route=known)
        scope.setdefault("state", {})["record"] = record

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers["x-request-id"] = record.id
            await send(message)

        try:
            with _answering(record):
                self._check(scope)
                await self._app(scope, receive, answer)
        except Refusal as refusal:
            await _refuse(refusal, record, scope, receive, answer)
        finally:
            self._service.log.write(record)
            self._service.metrics.count(record)

    def _check(self, scope: Scope) -> None:
        """Refuse what calls the server by a foreign name, or comes from a foreign page."""
        headers = Headers(scope=scope)
        if len(headers) > _MAX_HEADERS or sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            msg = f"got {len(headers)} headers · expected at most {_MAX_HEADERS}, of {MAX_HEADER_BYTES:,} bytes"
            raise Refusal(431, f"{msg} · send fewer", code="headers")
        hosts = headers.getlist("host")
        name = _name_of(hosts[0]) if len(hosts) == 1 else ""
        if not self._service.settings.knows_host(name):
            msg = "got a Host that is not this server's · expected localhost, its address, or a name it was given"
            raise Refusal(421, f"{msg} · start it with --allow-host NAME", code="host")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "")
        if origin is not None:
            if origin.lower().partition("://")[2] == hosts[0].lower():
                return
            if origin.lower() in self._service.settings.allow_origins:
                return
        elif site not in ("cross-site", "same-site") or _is_visit(scope, headers):
            return
        msg = "got a request from a page of another origin · expected one of this server's"
        raise Refusal(403, f"{msg} · start it with --allow-origin ORIGIN", code="origin")


class Guard:
    """Asks for the key, bounds what is under way, and bounds bodies while they arrive."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        """Stand before an application."""
        self._app = app
        self._service = service
        self._key = digest(service.settings.key) if service.settings.key is not None else None
        self._num_bytes = 0  # of bodies that are held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: Record = scope["state"]["record"]
        body = _Body(self, receive, self._service.settings, Headers(scope=scope))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and not body.is_whole:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            with _answering(record), self._under_way(scope), body:
                await self._app(scope, body.receive, answer)
        except Refusal as refusal:
            await body.drain()
            await _refuse(refusal, record, scope, receive, answer)

    @contextlib.contextmanager
    def _under_way(self, scope: Scope) -> Iterator[None]:
        """Count a request that takes work, or refuse it."""
        headers = Headers(scope=scope)
        if scope["path"] not in HEALTH:
            self._check_key(headers.get("authorization", ""))
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            yield
            return
        service, client = self._service, (scope.get("client") or ("", 0))[0]
        service.model_or_refuse()
        under_way = service.under_way
        for count, most in (
            (under_way.total(), service.max_under_way),
            (under_way[client], service.settings.max_per_client),
        ):
            if count >= most:
                msg = f"got a request while {count} are under way · expected at most {most}"
                raise Refusal(429, f"{msg} · try again when some have ended", code="too_many_requests")
        under_way[client] += 1
        try:
            yield
        finally:
            under_way[client] -= 1
            if not under_way[client]:
                del under_way[client]

    def _check_key(self, given: str) -> None:
        if self._key is None:
            return
        scheme, _, value = given.partition(" ")
        if scheme.lower() == "basic":  # any user; a browser asks for both
            try:
                value = base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
            except (binascii.Error, ValueError):
                value = ""
        elif scheme.lower() != "bearer":
            value = ""
        if not hmac.compare_digest(digest(value.strip()), self._key):
            headers = {"www-authenticate": 'Basic realm="llava-rad-lite", charset="UTF-8"'}
            msg = "got no key, or a wrong one · expected the server's · send Authorization: Bearer KEY"
            raise Refusal(401, f"{msg} (a browser: any user, and the key as password)", code="key", headers=headers)

    def hold(self, num_bytes: int) -> None:
        """Note that so many bytes of bodies are held, or no more.

        Raises:
            Refusal: there are too many.
        """
        self._num_bytes += num_bytes
        if num_bytes > 0 and self._num_bytes > (most := self._service.settings.max_held_bytes):
            msg = f"got requests that hold more than {most:,} bytes together · expected fewer at a time"
            raise Refusal(429, f"{msg} · try again when some have ended", code="too_many_bytes")


class _Body:
    """The body of a request, bounded in size and time while it arrives."""

    def __init__(self, guard: Guard, receive: Receive, settings: Settings, headers: Headers) -> None:
        self._guard = guard
        self._receive = receive
        self._settings = settings
        self._declared = headers.get("content-length", "0")
        self._asks_first = headers.get("expect", "").lower() == "100-continue"  # and so sends nothing unasked
        self._num_bytes = 0
        self._started = time.monotonic()
        self.is_whole = self._declared == "0" and "transfer-encoding" not in headers

    def __enter__(self) -> None:
        if not (self._declared.isdecimal() and int(self._declared[:20]) <= self._settings.max_body_bytes):
            raise self._too_large()

    def __exit__(self, *_: object) -> None:
        self._guard.hold(-self._num_bytes)
        self._num_bytes = 0

    def _too_large(self) -> Refusal:
        most = self._settings.max_body_bytes
        msg = f"got a body of more than {most:,} bytes · expected at most as many"
        return Refusal(413, f"{msg} · send a smaller film, or start the server with --max-body", code="body_too_large")

    async def receive(self) -> Message:
        """Return the next part of it; behind it, what uvicorn says of the client."""
        if self.is_whole:
            return await self._receive()
        settings = self._settings
        until = self._started + settings.body_grace_s + self._num_bytes / settings.min_body_rate
        try:
            message = await asyncio.wait_for(self._receive(), max(0.01, until - time.monotonic()))
        except TimeoutError:
            msg = f"got {self._num_bytes:,} bytes of a body, and then too little · expected all of it"
            raise Refusal(408, f"{msg} · send it faster", code="body_too_slow") from None
        size = len(message.get("body", b""))
        self._num_bytes += size
        self._guard.hold(size)
        self.is_whole = not message.get("more_body", False)
        if self._num_bytes > settings.max_body_bytes:
            raise self._too_large()
        return message

    async def drain(self) -> None:
        """Read on for a moment: who is still sending would not see an answer, but a connection that breaks."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                left = 2 * self._settings.max_body_bytes + _DRAIN_BYTES
                while not self.is_whole and not self._asks_first and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self.is_whole = not message.get("more_body", False)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_visit(scope: Scope, headers: Headers) -> bool:
    """Say whether somebody follows a link to the page."""
    wanted = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest"))
    return scope["method"] == "GET" and scope["path"] == "/" and wanted == ("navigate", "document")


@contextlib.contextmanager
def _answering(record: Record) -> Iterator[None]:
    """Turn whatever goes wrong into a refusal, and note it; a client that has gone gets none."""
    try:
        yield
    except Refusal as refusal:
        record.fail(refusal.failure)
        raise
    except ClientDisconnect:
        record.status = _CLIENT_GONE
        record.fail("client_gone")
    except Exception as error:
        record.fail("fault", error)
        raise refusal_of(error, before_work=False) from error


async def _refuse(refusal: Refusal, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an error, unless an answer is under way: then there is nothing left but to break it off."""
    if record.status is None:
        await refusal.response()(scope, receive, send)
