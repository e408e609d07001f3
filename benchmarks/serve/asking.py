"""Clients that ask as programs do, by the server's own route and by OpenAI's, and read the text as it is made."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import httpx

from lite.errors import LiteError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from benchmarks.serve.running import Running
    from lite.studies.study import Study

T = TypeVar("T")
FINDINGS: Final = "/findings"
CHAT: Final = "/v1/chat/completions"
ROUTES: Final = (FINDINGS, CHAT)


class Answer(NamedTuple):
    """What has come of a study."""

    text: str
    ttft_s: float  # from the request to the first text


def body_of(route: str, study: Study, max_new_tokens: int | None = None, **more: object) -> dict[str, Any]:
    """Return what asks for a study, a film that is a file, as httpx takes it."""
    film = study.path.read_bytes()
    if route == FINDINGS:
        fields = {"reason": study.reason or "", "stream": "true"}
        most = {} if max_new_tokens is None else {"max_new_tokens": str(max_new_tokens)}
        return {"files": {"film": film}, "data": fields | most | more}
    url = f"data:image/png;base64,{base64.b64encode(film).decode()}"
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
    if study.reason:
        parts.append({"type": "text", "text": f"Reason for the exam: {study.reason}"})
    message = {"role": "user", "content": parts}
    return {"json": {"messages": [message], "stream": True, "max_tokens": max_new_tokens, **more}}


async def ask(
    client: httpx.AsyncClient,
    route: str,
    study: Study,
    max_new_tokens: int | None = None,
    *,
    on_start: Callable[[], object] = lambda: None,
) -> Answer:
    """Ask for a study, and read its text to the end.

    Raises:
        LiteError: it was refused, or ended before its time.
        httpx.HTTPError: the connection broke.
    """
    started, ttft_s, text = time.perf_counter(), 0.0, ""
    async with client.stream("POST", route, **body_of(route, study, max_new_tokens)) as response:
        if response.status_code != httpx.codes.OK:
            raise LiteError(f"got {response.status_code}, {(await response.aread())!r} · expected 200 · see the log")
        async for line in response.aiter_lines():
            field, _, data = line.partition(": ")
            value = json.loads(data) if field == "data" and data.startswith("{") else {}
            if "error" in value:
                raise LiteError(value["error"]["message"])
            if data == "[DONE]" or value.get("prediction") == text != "":
                return Answer(text, ttft_s)
            if "id" in value:
                on_start()
            text += value.get("text", "") + "".join(one["delta"].get("content", "") for one in value.get("choices", ()))
            ttft_s = ttft_s or (time.perf_counter() - started if text else 0.0)
    raise LiteError(f"got a stream that ends behind {text!r} · expected to be told of its end · see the log")


async def ask_all(
    server: Running, studies: Sequence[Study], *, clients: int, max_new_tokens: int | None = None
) -> list[Answer | Exception]:
    """Ask for studies by both routes in turns, so many at a time."""

    async def one(client: httpx.AsyncClient, route: str, study: Study) -> Answer | Exception:
        try:
            return await ask(client, route, study, max_new_tokens)
        except (LiteError, httpx.HTTPError) as error:
            return error

    async with server.client() as client:
        asked = [one(client, route, study) for route, study in zip(itertools.cycle(ROUTES), studies, strict=False)]
        return await at_a_time(clients, asked)


async def at_a_time(count: int, jobs: Iterable[Awaitable[T]]) -> list[T]:
    """Wait for all jobs, so many at a time, and return what they give, in order."""
    turns = asyncio.Semaphore(count)

    async def one(job: Awaitable[T]) -> T:
        async with turns:
            return await job

    return await asyncio.gather(*map(one, jobs))
