"""What a request of OpenAI's chat completions asks for, and by which rules it is understood.

The model was trained with one question about one film, with the reason for the exam in it or without:

    text of the user                                      what the model is asked
    none                                                  its own question
    "Reason for the exam: cough." ("Indication:" …)       its own question, with this reason
    any other                                             the text itself, word for word
    a field `reason` or `query` beside the messages       that, whatever the text says

The last is what `extra_body` of the openai package is for. System messages are left out, and the answer says so: the
model has no place for them. An earlier answer is refused, and so is a request without exactly one film: front ends ask
for titles and tags that way, and findings of nothing would be invented.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

from lite.engines.protocol import MAX_TOP, Sampling
from lite.serve.models import asked_model
from lite.serve.refusal import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_REASON: Final = re.compile(
    r"\s*((reason|indication)( for (the )?exam(ination)?)?|clinical (indication|history|information)|history)\s*:\s*",
    re.IGNORECASE,
)
_MAX_STOPS: Final = 4
_SEEDS: Final = 1 << 63


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What is asked for."""

    model: str  # one of those that there are
    film: str  # a URI
    reason: str | None
    query: str | None
    left_out: tuple[str, ...]  # what of the request is not used, and what it might have meant
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    n: int
    top_logprobs: int | None  # None: no log-probabilities
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def asked(self) -> Literal["reason", "query", "question"]:
        """Say which of the two it is, or that it is the model's own question."""
        return "query" if self.query is not None else "reason" if self.reason is not None else "question"

    def sampling(self, index: int) -> Sampling:
        """Return how one of the drafts is drawn: each with a seed of its own."""
        seed = (self.seed + index) % _SEEDS
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed)


def read_chat(value: dict[str, Any], *, models: Sequence[str], max_drafts: int) -> Chat:
    """Read a request; unknown fields are ignored, and so is null.

    Args:
        value: the object that was sent.
        models: the names of those that there are; a request without one means the first.
        max_drafts: the most that a request may ask for.

    Raises:
        Refusal: it cannot be answered; what is wrong is named.
    """
    value = {name: item for name, item in value.items() if item is not None}
    model = asked_model(value.get("model"), models)
    film, text, left_out = _read_messages(value.get("messages"))
    reason, query = _read(value, "reason", str), _read(value, "query", str)
    if reason is None and query is None:
        reason, query = _question_of(text)
    elif text.strip():
        left_out.append("the text of the user: there is a field beside the messages")
    logprobs, top = _read(value, "logprobs", bool), _count(value, "top_logprobs", 0, MAX_TOP)
    if top is not None and not logprobs:
        _refuse("top_logprobs", "it without logprobs", "logprobs: true beside it")
    most = _count(value, "max_completion_tokens", 1, 1 << 30)
    if most is None:
        most = _count(value, "max_tokens", 1, 1 << 30)
    temperature, top_p = _number(value, "temperature", 0, 2), _number(value, "top_p", 0, 1)
    seed = _count(value, "seed", -_SEEDS, _SEEDS - 1)
    return Chat(
        model=model,
        film=film,
        reason=reason,
        query=query,
        left_out=tuple(left_out),
        max_new_tokens=most,
        temperature=0.0 if temperature is None else temperature,  # greedy, as published
        top_p=top_p or (1.0 if top_p is None else 1e-9),
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
        n=_count(value, "n", 1, max_drafts) or 1,
        top_logprobs=(top or 0) if logprobs else None,
        stop=_read_stop(value.get("stop", ())),
        stream=bool(_read(value, "stream", bool)),
        include_usage=bool((_read(value, "stream_options", dict) or {}).get("include_usage")),
    )


def _question_of(text: str) -> tuple[str | None, str | None]:
    """Return reason and query of a text, one of them or none."""
    if not text.strip():
        return None, None
    if found := _REASON.match(text):
        return text[found.end() :].strip() or None, None
    return None, text


def _read_messages(messages: object) -> tuple[str, str, list[str]]:
    """Return the film, the text of the user, and what is left out."""
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "none", "a list with one message of the user, with a film in it")
    texts: list[str] = []
    films: list[str] = []
    left_out: list[str] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            left_out.append("a system message: the model has no place for one")
        elif role == "user":
            for kind, item in _parts(message.get("content")):
                (texts if kind == "text" else films).append(item)
        elif role in ("assistant", "tool", "function"):
            msg = "got an earlier answer · expected one question about one film · send the film with each question,"
            raise Refusal(400, f"{msg} without the conversation before it", code="earlier_turns", param="messages")
        else:
            _refuse("messages", "one without a role", "objects with the roles system and user")
    if len(films) != 1:
        msg = f"got {len(films) or 'no'} film{'s' if len(films) > 1 else ''} · expected one"
        todo = "send it in a part of type image_url, as a data URI"
        raise Refusal(400, f"{msg} · {todo}", code="image_missing" if not films else "image_count", param="messages")
    return films[0], "\n".join(texts), list(dict.fromkeys(left_out))


def _parts(content: Any) -> Iterator[tuple[Literal["text", "film"], str]]:  # noqa: ANN401
    """Yield the texts and films of a message."""
    if not isinstance(content, str | list | None):
        _refuse("messages", "content of another kind", "text, or a list of parts")
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        kind = part.get("type") if isinstance(part, dict) else None
        inner = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(inner, str):
            yield "text", inner
        elif kind in ("image_url", "input_image") and isinstance(url := _inner(inner, "url"), str):
            yield "film", url
        elif kind == "file" and isinstance(data := _inner(inner, "file_data"), str):
            yield "film", data
        else:
            _refuse("messages", "content of another kind", "text, and parts of type text, image_url or file")


def _inner(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, dict) else value


def _read_stop(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or len(stops) > _MAX_STOPS:
        _refuse("stop", "something else", f"a text, or at most {_MAX_STOPS} of them")
    if not all(isinstance(item, str) and item for item in stops):
        _refuse("stop", "one that is no text, or is empty", "texts")
    return tuple(stops)


def _read(value: Mapping[str, Any], name: str, kind: type) -> Any:  # noqa: ANN401 - as the kind has it
    item = value.get(name)
    if item is not None and not isinstance(item, kind):
        _refuse(name, type(item).__name__, {str: "text", bool: "true or false", dict: "an object"}[kind])
    return item


def _number(value: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    item = value.get(name)
    if item is None:
        return None
    if isinstance(item, bool) or not isinstance(item, int | float) or not low <= item <= high:
        _refuse(name, "something else", f"a number from {low} to {high}")
    return float(item)


def _count(value: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    item = value.get(name)
    if item is None:
        return None
    if type(item) is not int or not low <= item <= high:
        _refuse(name, "something else", f"a whole number from {low} to {high}")
    return item


def _refuse(param: str, got: str, expected: str) -> NoReturn:
    msg = f"{param}: got {got} · expected {expected} · leave it out for the default"
    raise Refusal(400, msg, code="value", param=param)
