"""A server from its socket to its end: it listens first, loads in a thread, and ends what runs before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from lite.errors import LiteError
from lite.serve.app import make_app
from lite.serve.guard import MAX_HEADER_BYTES
from lite.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lite.model import FindingsModel
    from lite.serve.settings import Settings

T = TypeVar("T")
_LAST_WORDS_S: Final = 2
_SILENCE_S: Final = 20
_KEEP_ALIVE_S: Final = 30  # longer than clients keep a connection (httpx: 5 s): none is closed while it is taken up


class Server:
    """A socket that listens, and what answers there."""

    def __init__(
        self, settings: Settings, load: Callable[[], FindingsModel], *, ready: Callable[[str], None] = lambda _: None
    ) -> None:
        """Listen.

        Args:
            settings: how.
            load: makes the model; called in a thread.
            ready: told the address once the model is there.

        Raises:
            LiteError: nobody can listen there.
        """
        self._socket = _listen(settings.host, settings.port)
        self.service = Service(settings)
        self._load = load
        self._ready = ready
        self._stopping: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                make_app(self.service),
                http=_Protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,  # an address is what the socket says, not what a header says
                limit_concurrency=settings.max_connections,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_LAST_WORDS_S,
            )
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        host = self.service.settings.host if self.service.settings.is_loopback else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Load, and answer until SIGTERM, Ctrl-C or `stop`; then what runs has the grace to end.

        Raises:
            LiteError: the model cannot be loaded.
        """
        try:
            asyncio.run(self._run())
        finally:
            self._socket.close()
            self.service.log.close()

    def stop(self) -> None:
        """Have it end; any thread may call this."""
        if self._stopping is not None:
            loop, event = self._stopping
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(event.set)

    async def _run(self) -> None:
        stop = asyncio.Event()
        self._stopping = asyncio.get_running_loop(), stop
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))
        loading, stopped = _in_daemon(self._load), asyncio.create_task(stop.wait())
        try:
            with _signals(stop):
                awaited: set[asyncio.Future[Any]] = {serving, loading, stopped}
                await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if loading.done():
                    self.service.take(loading.result())
                    self._ready(self.url)
                    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
                await self._end()
        finally:
            self._uvicorn.should_exit = True
            stopped.cancel()
            loading.cancel()
            await serving
            if self.service.model is not None:
                self.service.model.close()

    async def _end(self) -> None:
        """Refuse what is new, and wait for what runs; what is left then is cancelled."""
        service = self.service
        service.is_stopping = True
        until = time.monotonic() + service.settings.grace_s
        while service.under_way and time.monotonic() < until:
            await asyncio.sleep(0.02)
        if service.model is not None:
            await asyncio.to_thread(service.model.close)


class _Protocol(H11Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Have who connects ask for something before long."""
        super().connection_made(transport)
        self._silence = self.loop.call_later(_SILENCE_S, self._close_unless_asked)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave nothing behind that holds the connection: a client may come with a new one for each request."""
        self._silence.cancel()
        super().connection_lost(exc)

    def _close_unless_asked(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None:
            self.transport.close()


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `_signals`: uvicorn would stop listening at once, and raise them again at its end."""
        yield


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM set an event; the second time they do what they always do."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in numbers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

    def first() -> None:
        stop.set()
        restore()

    for number in numbers:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        restore()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        msg = f"got {error.strerror or error} at {host}, port {port} · expected to listen there"
        raise LiteError(f"{msg} · choose another port, 0 takes any that is free") from error


def _in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Start work in a thread that does not keep the program from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001 - whoever waits has it
            error = raised
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="lite-loading", daemon=True).start()
    return future
