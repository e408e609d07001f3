"""What a server says when it does not do what it was asked: OpenAI's error object, on every route.

{"error": {"message": "got … · expected … · what to do", "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response

from lite.errors import (
    BackendUnavailable,
    Cancelled,
    ContextLengthError,
    DeadlineExceeded,
    ImageError,
    LiteError,
    MemoryBudgetError,
    PromptError,
    QueueFull,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Of each error its status and its code; the first that fits counts.
_ERRORS: Final[tuple[tuple[type[LiteError], int, str], ...]] = (
    (ImageError, 400, "image"),
    (ContextLengthError, 400, "context_length_exceeded"),
    (PromptError, 400, "prompt"),
    (BackendUnavailable, 415, "not_installed"),
    (QueueFull, 429, "queue_full"),
    (MemoryBudgetError, 400, "memory"),  # a smaller request would fit
    (Cancelled, 503, "stopping"),
    (DeadlineExceeded, 504, "timeout"),
)
# Decoders of others put addresses of memory into their words.
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{4,}")


class Refusal(Exception):  # noqa: N818 - the name says what happened
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Take the words; the type follows from the status."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {}) | ({"retry-after": "1"} if status in (429, 503) else {})
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def failure(self) -> str:
        """What logs and metrics call it."""
        return self.code or str(self.status)

    def response(self) -> Response:
        """Return the answer."""
        return json_response(self.body, status=self.status, headers=self.headers)


def refusal_of(error: Exception, *, before_work: bool) -> Refusal:
    """Return the answer that an error of the runtime makes.

    Args:
        error: what happened.
        before_work: the request was refused; else it failed while it was computed, which is not the client's doing.
    """
    if isinstance(error, Refusal):
        return error
    if not isinstance(error, LiteError):
        return Refusal(500, "got a fault of the program · expected none · see the server's log", code="fault")
    text = _ADDRESS.sub("0x…", str(error)).replace("<bytes>", "film")
    for kind, status, code in _ERRORS:
        if isinstance(error, kind):
            return Refusal(status, text, code=code)
    return Refusal(400 if before_work else 500, text, code="value" if before_work else "failed")


def json_response(value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON; half a surrogate pair in what a client has sent does no harm."""
    return Response(json_text(value), status, dict(headers or {}), media_type="application/json")


def json_text(value: Any) -> str:  # noqa: ANN401 - whatever JSON takes
    """Return JSON on one line, in ASCII."""
    return json.dumps(value, separators=(",", ":"))
