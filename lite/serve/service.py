"""What the routes of a server share: its model, once that is loaded, and drafts as the event loop sees them.

The event loop never waits for a film or a step: films are read in a few threads, and a session's thread tells the loop
when there is a token. However many streams there are, none has a thread of its own.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect

from lite.errors import LiteError
from lite.eval.calibration import find_calibration
from lite.serve.logs import Log
from lite.serve.metrics import Metrics
from lite.serve.refusal import Refusal, json_text, refusal_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

    from starlette.requests import Request
    from starlette.responses import Response

    from lite.eval.calibration import Calibration
    from lite.model import FindingsModel
    from lite.serve.logs import Record
    from lite.serve.settings import Settings
    from lite.session.draft import Draft
    from lite.session.request import Token
    from lite.studies.results import Findings

T = TypeVar("T")
_SEND_S: Final = 60  # a client that reads nothing for so long is gone
_FILM_THREADS: Final = 4
_TOGETHER_S: Final = 0.05  # tokens that come within it are one event: of a small model an event costs what a token does
_AHEAD: Final = 8  # requests whose film is being read, beside those that wait or have a row


class Service:
    """A server's model, settings, log and metrics."""

    def __init__(self, settings: Settings) -> None:
        """Begin without a model."""
        self.settings = settings
        self.log = Log(with_texts=settings.log_texts)
        self.metrics = Metrics()
        self.model: FindingsModel | None = None
        self._calibrations: dict[str | None, Calibration | None] = {}  # by adapter
        self.is_stopping = False
        self.under_way: collections.Counter[str] = collections.Counter()  # requests that take work, by address
        self._films = anyio.CapacityLimiter(_FILM_THREADS)

    def take(self, model: FindingsModel) -> None:
        """Be ready.

        Raises:
            LiteError: the calibration cannot be used.
        """
        own = model.artifact.manifest.parts.default_adapter
        for adapter in dict.fromkeys((own, *model.decoder.adapters)):
            self._calibrations[adapter] = find_calibration(self.settings.confidence, model, adapter)
        model.session.max_queue = self.settings.max_queue
        self.model = model

    def model_or_refuse(self) -> FindingsModel:
        """Return the model.

        Raises:
            Refusal: it is not loaded yet, or the server is being stopped.
        """
        if self.is_stopping:
            msg = "got a request while the server stops · expected one before · ask again when it is back"
            raise Refusal(503, msg, code="stopping")
        if self.model is None:
            msg = "got a request while the model is being loaded · expected one after · ask again in a moment"
            raise Refusal(503, msg, code="loading")
        return self.model

    def calibration_of(self, drafted: Findings) -> Calibration | None:
        """Return what calibrates findings: what there is for their adapter."""
        return self._calibrations.get(drafted.adapter)

    @property
    def max_under_way(self) -> int:
        """How many requests may be under way."""
        return self.settings.max_queue + _AHEAD + (self.model.session.loop.num_rows if self.model else 0)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Read a film, or do other work that takes a while; errors of the runtime become refusals."""
        try:
            return await anyio.to_thread.run_sync(work, limiter=self._films)
        except Exception as error:
            if isinstance(error, LiteError | Refusal):
                raise refusal_of(error, before_work=True) from error
            raise


class Live:
    """Drafts that were submitted together, and what comes of them, as it comes."""

    def __init__(self, drafts: Sequence[Draft], record: Record) -> None:
        """Listen to drafts; call it in the event loop."""
        self.drafts = drafts
        self._record = record
        self._left = dict(enumerate(drafts))
        self._changed = changed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            if changed.is_set():  # it will be cleared before the drafts are looked at
                return
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(changed.set)

        for draft in drafts:
            draft.on_tokens(tell)
            draft.on_end(tell)

    async def pieces(self) -> AsyncGenerator[tuple[int, str, list[Token], bool], None]:
        """Yield index, text, tokens, and whether that was all, of one draft after another.

        Raises:
            Refusal: a draft has ended with an error.
        """
        left, record = self._left, self._record
        try:
            while left:
                self._changed.clear()
                is_new = False
                for index, draft in list(left.items()):
                    text, tokens, is_all = draft.poll()
                    self._note(tokens)
                    is_new = is_new or bool(tokens)
                    if is_all:
                        del left[index]
                    if text or tokens or is_all:
                        yield index, text, tokens, is_all
                if left and is_new:  # not to wait: an error comes behind the last tokens, and tells of itself once
                    await asyncio.sleep(_TOGETHER_S)
                elif left:
                    await self._changed.wait()
        except Exception as error:
            refusal = refusal_of(error, before_work=False)
            record.fail(refusal.failure, error if refusal.code == "fault" else None)
            raise refusal from error

    def __enter__(self) -> None:
        """Want what comes, until the block is left."""

    def __exit__(self, *_: object) -> None:
        """Want no more of what has not ended: nobody is left to read it."""
        for draft in self._left.values():
            draft.cancel()
        if self._left:
            self._record.fail("client_gone")

    def stop(self, index: int) -> None:
        """Want no more of a draft."""
        self._left.pop(index).cancel()

    def _note(self, tokens: Sequence[Token]) -> None:
        record = self._record
        if tokens and record.ttft_s is None:
            record.ttft_s = record.seconds
        record.tokens = (record.tokens or 0) + len(tokens)


def event(value: object, name: str | None = None) -> ServerSentEvent:
    """Return an event of a stream: JSON, or text as it is."""
    return ServerSentEvent(value if isinstance(value, str) else json_text(value), event=name, sep="\n")


def streamed(events: AsyncIterator[ServerSentEvent], settings: Settings) -> Response:
    """Return a stream as an answer, with a comment now and then while there is nothing to say."""
    ping = functools.partial(ServerSentEvent, comment="reading", sep="\n")
    return EventSourceResponse(events, ping=settings.ping_s, ping_message_factory=ping, send_timeout=_SEND_S)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Wait for work, and end it when the client has gone. The body has been read by now.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
