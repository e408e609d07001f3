"""The routes of a server, put together."""

from __future__ import annotations

import functools
import importlib.util
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route

from lite._version import __version__
from lite.memory.process import rss_bytes
from lite.serve import findings, openai
from lite.serve.guard import HEALTH, Door, Guard
from lite.serve.models import model_names
from lite.serve.refusal import Refusal, json_response
from lite.studies.results import SHORT_NOTICE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from lite.model import FindingsModel
    from lite.serve.service import Service

    Endpoint = Callable[[Request, Service], Awaitable[Response]]

LICENCE: Final = "for your own group on your own machine: the published model's licence forbids a hosted service"
_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_PAGE: Final = resources.files("lite.serve").joinpath("page")


def make_app(service: Service) -> Starlette:
    """Return the application of a server."""
    page: Endpoint = functools.partial(_page, page_files())
    table: list[tuple[str, str, Endpoint]] = [
        ("GET", "/", page),
        ("GET", "/static/{name}", page),
        *(("GET", path, _health) for path in HEALTH),
        ("GET", "/metrics", _metrics),
        ("GET", "/about", _about),
        ("GET", "/v1/models", openai.models),
        ("POST", "/v1/chat/completions", openai.chat_completions),
        ("POST", "/findings", findings.findings),
        ("POST", "/films", findings.film),
    ]
    routes = [Route(path, functools.partial(_answer, answer, service), methods=[how]) for how, path, answer in table]
    known = frozenset(path for _, path, _ in table if "{" not in path)
    layers = [Middleware(Door, service=service, routes=known)]
    if origins := service.settings.allow_origins:
        headers = ["authorization", "content-type"]
        layers += [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=headers)]
    layers += [Middleware(Guard, service=service)]
    app = Starlette(routes=routes, middleware=layers, exception_handlers={HTTPException: _as_refusal})
    app.router.redirect_slashes = False
    return app


async def _answer(answer: Endpoint, service: Service, request: Request) -> Response:
    return await answer(request, service)


async def _as_refusal(_: Request, error: Exception) -> Response:
    """Say in our words what starlette has refused: a path that is none, a form that is none."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {
        404: "got a path that is none here · expected /, /about, /findings or /v1/chat/completions · see docs/serve.md",
        405: "got a method that this path does not take · expected another · see docs/serve.md",
    }
    msg = words.get(status, "got a form that cannot be read · expected multipart/form-data · check it")
    raise Refusal(status, msg, headers=error.headers if isinstance(error, HTTPException) else None)


def page_files() -> dict[str, str]:
    """Return the names of all that there is of the page, each with its media type."""
    names = [file.name for file in _PAGE.iterdir()]
    return {name: _KINDS[suffix] for name in names if (suffix := Path(name).suffix) in _KINDS}


async def _page(files: dict[str, str], request: Request, _: Service) -> Response:
    """Serve the page, and what belongs to it. No path is opened that is not one of its files."""
    name = request.path_params.get("name", "index.html")
    if name not in files:
        raise HTTPException(404)
    return Response(_PAGE.joinpath(name).read_bytes(), media_type=files[name])


async def _health(_: Request, service: Service) -> Response:
    service.model_or_refuse()
    return json_response({"status": "ok"})


async def _metrics(_: Request, service: Service) -> Response:
    text = service.metrics.text(service.model.session if service.model is not None else None)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


async def _about(_: Request, service: Service) -> Response:
    return json_response(about(service.model_or_refuse(), service))


def about(model: FindingsModel, service: Service) -> dict[str, Any]:
    """Return what a server runs, and within which limits."""
    manifest, plan, settings = model.artifact.manifest, model.plan, service.settings
    num_prompt_tokens = model.prompt.num_tokens(model.prompt.encode(None))
    dicom = importlib.util.find_spec("pydicom") is not None
    return {
        "model": manifest.model,
        "adapters": model_names(model)[1:],
        "version": __version__,
        **model.settings,
        "backend": model.decoder.backend,
        "rows": model.session.loop.num_rows,
        "plan": plan.memory.items(),
        "peak_bytes": plan.memory.card_bytes,
        "rss_bytes": rss_bytes(),
        "fallbacks": [*model.fallbacks, *model.decoder.fallbacks],
        "notice": model.notice,
        "short_notice": SHORT_NOTICE,
        "licence": LICENCE,
        "limits": {
            "max_body_bytes": settings.max_body_bytes,
            "max_reason_tokens": model.prompt.max_seq_len - 1 - num_prompt_tokens,
            "max_new_tokens": manifest.decoding.max_new_tokens,
            "max_queue": settings.max_queue,
            "timeout_s": settings.timeout_s,
        },
        "reads_dicom": dicom,
        "writes_sr": dicom,
    }
