"""`/v1`: OpenAI's chat completions, as its clients want them. How a request is understood: see `lite.serve.protocol`.

A stream has the role once, `finish_reason: null` inside, a last delta that is empty, then perhaps the usage, `[DONE]`,
and comments while there is nothing to say yet. What OpenAI has no word for stands in `llava_rad_lite`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from lite.serve.findings import json_body
from lite.serve.images import film_of
from lite.serve.models import adapter_of, entries, model_names
from lite.serve.protocol import Chat, read_chat
from lite.serve.refusal import Refusal, json_response
from lite.serve.service import Live, event, streamed, unless_gone
from lite.serve.stops import Choice
from lite.studies.results import SHORT_NOTICE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sse_starlette import ServerSentEvent
    from starlette.requests import Request
    from starlette.responses import Response

    from lite.model import FindingsModel
    from lite.prompt import Tokenizer
    from lite.serve.logs import Record
    from lite.serve.service import Service
    from lite.session.draft import Draft
    from lite.session.request import Token


async def models(_: Request, service: Service) -> Response:
    """Answer `GET /v1/models`."""
    return json_response({"object": "list", "data": entries(model_names(service.model_or_refuse()))})


async def chat_completions(request: Request, service: Service) -> Response:
    """Answer `POST /v1/chat/completions`."""
    record: Record = request.state.record
    model, settings = service.model_or_refuse(), service.settings
    value, names = await json_body(request), model_names(model)

    def submit() -> tuple[Chat, list[Draft]]:
        chat = read_chat(value, models=names, max_drafts=settings.max_drafts)
        record.model = chat.model
        film = film_of(chat.film, settings, param="messages")
        return chat, model.submit_each(
            film,
            chat.reason,
            query=chat.query,
            max_new_tokens=chat.max_new_tokens,
            samplings=[chat.sampling(index) for index in range(chat.n)],
            top_logprobs=chat.top_logprobs,
            timeout_s=settings.timeout_s,
            request_id=record.id,
            adapter=adapter_of(chat.model, names),
        )

    chat, drafts = await unless_gone(request, service.in_thread(submit))
    value.clear()  # it holds the film
    record.texts |= {"reason": chat.reason, "query": chat.query}
    answer = _Answer(model, chat, drafts, record)
    if chat.stream:
        return streamed(answer.events(), settings)
    return json_response(await unless_gone(request, answer.whole()))


class _Answer:
    """The answer to one request."""

    def __init__(self, model: FindingsModel, chat: Chat, drafts: Sequence[Draft], record: Record) -> None:
        self._model = model
        self._chat = dataclasses.replace(chat, film="")
        self._record = record
        self._live = Live(drafts, record)
        self._choices = [Choice(chat.stop, model.tokenizer) for _ in drafts]
        self._created = int(time.time())

    async def _pieces(self) -> AsyncIterator[tuple[int, str, list[Token], bool]]:
        """Yield index, text and tokens of one draft after another, and whether that was all."""
        async for index, text, tokens, is_all in self._live.pieces():
            piece, said, has_ended = self._choices[index].push(text, tokens, is_all=is_all)
            if has_ended and not is_all:
                self._live.stop(index)
            yield index, piece, said, has_ended

    async def whole(self) -> dict[str, Any]:
        """Return the answer when all of it is there."""
        texts: list[list[str]] = [[] for _ in self._choices]
        logprobs: list[list[Token]] = [[] for _ in self._choices]
        with self._live:
            async for index, piece, tokens, _ in self._pieces():
                texts[index].append(piece)
                logprobs[index] += tokens
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts[index]), "refusal": None},
                "logprobs": self._logprobs(logprobs[index]),
                "finish_reason": self._finish_reason(index),
            }
            for index in range(len(texts))
        ]
        self._end(["".join(text) for text in texts])
        return self._object("chat.completion", choices) | {"usage": self._usage(), "llava_rad_lite": self._about()}

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        """Yield the answer as it is made."""
        texts = [""] * len(self._choices)
        try:
            with self._live:
                for index in range(len(texts)):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
                async for index, piece, tokens, has_ended in self._pieces():
                    texts[index] += piece
                    if piece or tokens:
                        yield self._chunk(index, {"content": piece}, tokens)
                    if has_ended:
                        reason, about = self._finish_reason(index), self._about()
                        yield self._chunk(index, {}, finish_reason=reason, llava_rad_lite=about)
            self._end(texts)
            if self._chat.include_usage:
                yield event(self._object("chat.completion.chunk", []) | {"usage": self._usage()})
            yield event("[DONE]")
        except Refusal as refusal:
            yield event(refusal.body)

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        tokens: Sequence[Token] = (),
        *,
        finish_reason: str | None = None,
        **more: object,
    ) -> ServerSentEvent:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._chat.include_usage else {}
        return event(self._object("chat.completion.chunk", [choice]) | usage | more)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self._record.id}",
            "object": kind,
            "created": self._created,
            "model": self._chat.model,
            "system_fingerprint": self._model.artifact.id,
            "choices": choices,
        }

    def _finish_reason(self, index: int) -> str:
        if self._choices[index].is_cut:
            return "stop"
        return "length" if self._live.drafts[index].so_far().finish_reason == "length" else "stop"

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._chat.top_logprobs is None:
            return None
        tokenizer = self._model.tokenizer
        content = [
            _told(tokenizer, token.id, token.logprob)
            | {"top_logprobs": [_told(tokenizer, *other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, Any]:
        first = self._live.drafts[0].so_far()
        num_new_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": first.num_prompt_tokens,
            "completion_tokens": num_new_tokens,
            "total_tokens": first.num_prompt_tokens + num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": first.num_reused_tokens},
        }

    def _about(self) -> dict[str, Any]:
        """Return what OpenAI has no word for."""
        first, chat = self._live.drafts[0].so_far(), self._chat
        return {
            "notice": SHORT_NOTICE,
            "artifact_id": first.artifact_id,
            "adapter": first.adapter,
            "asked": chat.asked,
            "left_out": chat.left_out,
            "seed": chat.seed if chat.temperature else None,
            "rendering": first.rendering,
            "remarks": first.film.remarks if first.film is not None else (),
            "fallbacks": first.fallbacks,
        }

    def _end(self, texts: list[str]) -> None:
        self._record.texts["text"] = texts
        self._record.queued_s = self._live.drafts[0].so_far().timings.queued_s


def _told(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.bytes_of(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
