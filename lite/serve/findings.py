"""The server's own routes: findings of a film, and the film as the model sees it. Nothing is kept of either.

POST /findings   multipart or JSON in; the object of `lite generate --json` out, or events as it is made:
                 start {id, notice} · piece {text, logprobs} … · findings {the object} | error {error}
POST /films      multipart or JSON in; a PNG of the film out, with what its file says and the rules remark
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
from typing import TYPE_CHECKING, Any, Final, get_args

from starlette.datastructures import UploadFile

from lite.eval.calibration import with_sentences
from lite.eval.confidence import TOP
from lite.image.files import load_image
from lite.image.film import Rendering
from lite.serve.images import film_of
from lite.serve.models import adapter_of, asked_model, model_names
from lite.serve.refusal import Refusal, json_response
from lite.serve.service import Live, event, streamed, unless_gone
from lite.studies.report import encoded_report, header_of
from lite.studies.results import SHORT_NOTICE, Result
from lite.studies.study import Study

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sse_starlette import ServerSentEvent
    from starlette.requests import Request
    from starlette.responses import Response

    from lite.prompt import Tokenizer
    from lite.serve.logs import Record
    from lite.serve.service import Service
    from lite.session.draft import Draft

_MAX_PREVIEW_PX: Final = 1536
_MAX_DIGITS: Final = 9  # more is out of every range, too
_TRUE: Final = ("true", "1", "on", "yes")
_FALSE: Final = ("false", "0", "off", "no", "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What one of these routes is asked for."""

    film: bytes
    model: str | None = None  # its name, or an adapter's
    reason: str | None = None
    query: str | None = None
    max_new_tokens: int | None = None
    rendering: Rendering = "mimic-cxr-jpg"
    any_film: bool = False
    samples: int = 0  # drafts to compare it with: see `lite.eval.confidence`
    sr: bool = False  # a DICOM report of the findings, too
    stream: bool = False


_FIELDS: Final = {field.name: str(field.type) for field in dataclasses.fields(Asked)}


async def findings(request: Request, service: Service) -> Response:
    """Answer `POST /findings`."""
    record: Record = request.state.record
    fields = await _fields(request)
    model = service.model_or_refuse()  # here and not later: what has begun may end while the server stops

    def submit() -> tuple[Asked, Draft]:
        asked, names = _asked(fields, service), model_names(model)
        record.model = asked_model(asked.model, names)
        fields.clear()  # it holds the film
        if asked.sr:
            header_of(asked.film)  # refused before the work, not behind it
        return dataclasses.replace(asked, film=asked.film if asked.sr else b""), model.submit(
            asked.film,
            asked.reason,
            query=asked.query,
            max_new_tokens=asked.max_new_tokens,
            rendering=asked.rendering,
            any_film=asked.any_film,
            top_logprobs=TOP,
            samples=asked.samples,
            timeout_s=service.settings.timeout_s,
            request_id=record.id,
            adapter=adapter_of(record.model, names),
        )

    asked, draft = await unless_gone(request, service.in_thread(submit))
    live = Live([draft], record)
    record.texts |= {"reason": asked.reason, "query": asked.query}
    finish = functools.partial(_finished, asked, draft, record, service, model.tokenizer)
    if asked.stream or "text/event-stream" in request.headers.get("accept", ""):
        return streamed(_events(live, finish, record), service.settings)

    async def whole() -> dict[str, Any]:
        with live:
            async for _ in live.pieces():
                pass
        return await finish()

    return json_response(await unless_gone(request, whole()))


async def _finished(
    asked: Asked, draft: Draft, record: Record, service: Service, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the object of a draft that has ended."""
    drafted = draft.result()
    scored = await service.in_thread(lambda: with_sentences(drafted, tokenizer, service.calibration_of(drafted)))
    made = dataclasses.replace(scored, top_logprobs=None)
    record.queued_s = made.timings.queued_s
    record.texts["text"] = made.text
    study = Study(asked.film, asked.reason, asked.query, id=record.id)
    value: dict[str, Any] = json.loads(Result.of(study, made).to_json())
    if asked.sr:
        report = await service.in_thread(lambda: encoded_report(asked.film, made))
        value["sr"] = base64.b64encode(report).decode("ascii")
    return value


async def _events(live: Live, finish: functools.partial[Any], record: Record) -> AsyncIterator[ServerSentEvent]:
    """Yield what the page reads."""
    try:
        with live:
            yield event({"id": record.id, "notice": SHORT_NOTICE}, "start")
            async for _, text, tokens, _ in live.pieces():
                if text or tokens:
                    logprobs = [round(token.logprob, 4) for token in tokens]
                    yield event({"text": text, "logprobs": logprobs}, "piece")
        yield event(await finish(), "findings")
    except Refusal as refusal:
        record.fail(refusal.failure)
        yield event(refusal.body, "error")


async def film(request: Request, service: Service) -> Response:
    """Answer `POST /films`."""
    fields = await _fields(request)
    return json_response(await unless_gone(request, service.in_thread(lambda: _preview(_asked(fields, service)))))


def _preview(asked: Asked) -> dict[str, Any]:
    loaded = load_image(asked.film, rendering=asked.rendering, any_film=asked.any_film)
    picture, written = loaded.image, io.BytesIO()
    width, height = picture.size
    picture.thumbnail((_MAX_PREVIEW_PX, _MAX_PREVIEW_PX))
    if all(band.tobytes() == picture.getchannel(0).tobytes() for band in picture.split()):
        picture = picture.getchannel(0)
    picture.save(written, "PNG", compress_level=3)
    facts = dataclasses.asdict(loaded.film)
    return {
        "png": base64.b64encode(written.getvalue()).decode("ascii"),
        "width": width,
        "height": height,
        "film": facts,
        "remarks": list(facts.pop("remarks")),
        "rendering": loaded.rendering,
        "notice": SHORT_NOTICE,
    }


async def json_body(request: Request) -> dict[str, Any]:
    """Read a body that is a JSON object, whatever its media type says.

    Raises:
        Refusal: it is none.
    """
    try:
        value = json.loads(b"".join([chunk async for chunk in request.stream()]))  # which keeps no copy of it
    except (ValueError, RecursionError):
        msg = "got a body that is not JSON · expected one object · check how it was made"
        raise Refusal(400, msg, code="json") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"got {type(value).__name__} · expected one JSON object · send one", code="json")
    return value


async def _fields(request: Request) -> dict[str, Any]:
    """Return the fields of a form or of a JSON object."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await json_body(request)
    async with request.form(max_files=1, max_fields=2 * len(_FIELDS)) as form:
        return {
            name: await value.read() if isinstance(value, UploadFile) else value for name, value in form.multi_items()
        }


def _asked(fields: dict[str, Any], service: Service) -> Asked:
    """Check fields, and read the film out of them; call it in a thread.

    Raises:
        Refusal: one is not what it should be.
    """
    if unknown := sorted(fields.keys() - _FIELDS.keys()):
        msg = f"got the field {unknown[0]!r} · expected some of {', '.join(_FIELDS)} · leave it out"
        raise Refusal(400, msg, code="field", param=unknown[0])
    value = {name: _read(name, given) for name, given in fields.items() if name != "film" and given is not None}
    given = fields.get("film")
    if not given:
        msg = "got no film · expected one: a file of a form, or a data URI · send it as `film`"
        raise Refusal(400, msg, code="image_missing", param="film")
    data = given if isinstance(given, bytes) else film_of(given, service.settings, param="film")
    return Asked(film=data, **{name: item for name, item in value.items() if item is not None})


def _read(name: str, given: object) -> Any:  # noqa: ANN401 - as the field has it
    """Read a field, which a form has as text."""
    kind, text = _FIELDS[name], given.strip() if isinstance(given, str) else None
    if kind == "bool" and (given in (True, False) if text is None else text.lower() in (*_TRUE, *_FALSE)):
        return given if text is None else text.lower() in _TRUE
    if kind.startswith("int") and (type(given) is int or text == "" or (text or "").isdecimal()):
        return given if text is None else int(text[:_MAX_DIGITS]) if text else None
    if kind == "Rendering" and (given in get_args(Rendering) or text == ""):
        return text or None
    if kind.startswith("str") and isinstance(given, str):
        return given or None
    shown = {"Rendering": " or ".join(get_args(Rendering)), "bool": "true or false"}.get(kind, kind.partition(" ")[0])
    msg = f"got {name} of another kind · expected {shown} · leave it out for the default"
    raise Refusal(400, msg, code="value", param=name)
