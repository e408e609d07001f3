"""`python -m lite serve ARTIFACT`: draft findings for whoever asks over HTTP, on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lite.artifact.open import load_artifact
from lite.cli.options import add_adapters, add_artifact, add_loading, load_model, size
from lite.console import positive, print_line, say
from lite.errors import BackendUnavailable
from lite.memory.process import map_large_blocks

if TYPE_CHECKING:
    import argparse

HELP: Final = "serve a page, and OpenAI's protocol, on this machine"
DESCRIPTION: Final = (
    "Serve findings over HTTP: a page to drop films on, OpenAI's chat completions, and films as files. For your own "
    "group on your own machine: the published model's licence forbids a hosted service. Ctrl-C or SIGTERM ends it when "
    "what runs is done. docs/serve.md says what there is."
)
EPILOG: Final = "example: python -m lite serve artifact --port 8000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="the port; 0 takes any that is free (default %(default)s)"
    )
    group.add_argument("--rows", type=positive, metavar="N", help="studies under way at a time (default: what fits)")
    group.add_argument(
        "--max-queue", type=positive, default=64, metavar="N", help="that may wait (default %(default)s)"
    )
    group.add_argument(
        "--timeout-s", type=float, default=600.0, metavar="S", help="end a request after S seconds (default 600)"
    )
    group.add_argument(
        "--grace-s", type=float, default=30.0, metavar="S", help="what runs may take to end (default 30)"
    )
    group.add_argument("--log-texts", action="store_true", help="log reasons and drafted texts, too")
    group.add_argument(
        "--confidence",
        metavar="WHICH",
        default="auto",
        help="what calibrates how sure the model was of a sentence: FILE, from `lite confidence`, or auto: the one "
        "beside the artifact, if it fits (default %(default)s)",
    )
    add_adapters(group)
    _add_access(parser)
    add_loading(parser)


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may ask")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a key that every request has to bring; needed with --host"
    )
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that requests may call; repeatable"
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page of others that may ask; repeatable",
    )
    group.add_argument(
        "--image-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="fetch films from there, such as https://pacs.example (default: from nowhere); repeatable",
    )
    group.add_argument(
        "--max-body",
        type=size,
        default="64MiB",
        metavar="SIZE",
        help="the most that a request may send (default 64MiB)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    try:
        from lite.serve.server import Server
    except ImportError as error:
        msg = f'got no {error.name} package · expected it · install it with: pip install "llava-rad-lite[serve]"'
        raise BackendUnavailable(msg) from error
    from lite.serve.app import LICENCE
    from lite.serve.settings import Settings, read_key

    artifact = load_artifact(arguments.artifact)
    say(f"note: {artifact.manifest.notice} {LICENCE[0].upper()}{LICENCE[1:]}.")
    key, remark = read_key(arguments.api_key_file) if arguments.api_key_file is not None else (None, None)
    if remark is not None:
        say(f"note: {remark}")
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in {field.name for field in dataclasses.fields(Settings)} & vars(arguments).keys()
    }
    settings = Settings(
        **given,
        key=key,
        allow_hosts=tuple(arguments.allow_host),
        allow_origins=tuple(arguments.allow_origin),
        image_origins=tuple(arguments.image_origin),
        max_body_bytes=arguments.max_body,
    )
    map_large_blocks()
    server = Server(settings, lambda: load_model(arguments, for_many=True), ready=print_line)
    adapters = f" with {', '.join(arguments.adapters)}" if arguments.adapters else ""
    say(f"listens at {server.url}, loading {arguments.artifact}{adapters} …")
    server.run()
    return 0
