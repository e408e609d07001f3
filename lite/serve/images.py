"""Films as a request brings them: data URIs, base64, files of a form."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Final

from lite.serve.refusal import Refusal

if TYPE_CHECKING:
    from lite.serve.settings import Settings

_SCHEME: Final = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_SPACE: Final = re.compile(r"\s+")


def film_of(text: object, settings: Settings, *, param: str) -> bytes:
    """Return the bytes of a film that is given as text; call it in a thread.

    Args:
        text: a data URI of any media type (what a file is, its bytes say), or base64 alone.
        settings: of the server.
        param: what the request calls it.

    Raises:
        Refusal: it is neither, or an address that films are not fetched from.
    """
    if not isinstance(text, str):
        msg = f"got {type(text).__name__} for a film · expected text · send a data URI"
        raise Refusal(400, msg, code="image", param=param)
    scheme = found[1].lower() if (found := _SCHEME.match(text)) else ""
    if scheme == "data":
        head, comma, text = text.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            msg = "got a data URI without base64 · expected data:image/png;base64,… · encode the film so"
            raise Refusal(400, msg, code="image", param=param)
    elif scheme:
        msg = f"got an address ({scheme}:) of a film · expected the film itself, as a data URI"
        raise Refusal(400, f"{msg} · send it, or start the server with --image-origin", code="image_url", param=param)
    try:
        return base64.b64decode(_SPACE.sub("", text), validate=True)
    except (binascii.Error, ValueError):
        msg = "got a film that is not base64 · expected a data URI · encode the whole file"
        raise Refusal(400, msg, code="image", param=param) from None
