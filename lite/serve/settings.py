"""What a server is told: where it listens, whom it lets in, and every limit it keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import re
import stat
from typing import TYPE_CHECKING, Final

from lite.errors import LiteError

if TYPE_CHECKING:
    from pathlib import Path

MIN_KEY: Final = 16
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_ORIGIN: Final = re.compile(r"https?://[a-z0-9.-]+(:\d{1,5})?|https?://\[[0-9a-f:]+\](:\d{1,5})?")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves. Its defaults are those of the command line."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    key: str | None = dataclasses.field(default=None, repr=False)  # what a request must bring; None: nothing
    allow_hosts: tuple[str, ...] = ()  # names by which requests may call the server, beside its own
    allow_origins: tuple[str, ...] = ()  # pages of others that may call it
    image_origins: tuple[str, ...] = ()  # where films may be fetched from
    max_queue: int = 64  # requests that wait for a row
    max_per_client: int = 64  # requests under way of one address
    timeout_s: float = 600.0  # of a request, its wait included
    max_body_bytes: int = 64 * 1024**2  # of one request
    max_held_bytes: int = 512 * 1024**2  # of all requests under way
    body_grace_s: float = (
        10.0  # a body may take so long, and as much longer as `min_body_rate` allows for what has come
    )
    min_body_rate: int = 64 * 1024  # bytes a second
    max_drafts: int = 16  # of one request: `n`
    confidence: str = "auto"  # what calibrates sentences: a file, or the one beside the artifact if it fits
    max_connections: int = 1024
    ping_s: float = 5.0  # between the signs of life of a stream that has nothing to say yet
    grace_s: float = 30.0  # what runs when the server is told to stop has so long to end
    log_texts: bool = False  # log reasons, queries and drafted texts, too

    def __post_init__(self) -> None:
        """Refuse what is not safe, or is none.

        Raises:
            LiteError: what is wrong is named.
        """
        if not self.is_loopback and self.key is None:
            msg = f"got host {self.host!r} and no key · expected a key where other machines can ask"
            raise LiteError(f"{msg} · give --api-key-file, or leave the host at 127.0.0.1")
        for origin in (*self.allow_origins, *self.image_origins):
            if not _ORIGIN.fullmatch(origin):
                msg = f"got the origin {origin!r} · expected scheme, name and perhaps a port, in small letters"
                raise LiteError(f"{msg} · write it like https://pacs.example or http://127.0.0.1:8042")
        if not 0 <= self.port < 1 << 16:
            raise LiteError(f"got port {self.port} · expected 0 to 65535 · 0 takes any that is free")
        for name, least in (("timeout_s", 0), ("grace_s", -1), ("max_body_bytes", 1023), ("max_queue", 0)):
            if not getattr(self, name) > least:
                msg = f"got {name}={getattr(self, name)} · expected more than {least} · leave it out for the default"
                raise LiteError(msg)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can ask."""
        return self.host == "localhost" or _is_address(self.host, "is_loopback")

    def knows_host(self, name: str) -> bool:
        """Say whether a request may call the server by this name: a foreign name is how a page of others would.

        Where the server listens at all addresses, any address will do: it is names that can be made to mean this one.
        """
        name = name.lower().rstrip(".")
        if name in (*LOOPBACK, self.host.lower(), *(allowed.lower() for allowed in self.allow_hosts)):
            return True
        return _is_address(self.host, "is_unspecified") and _is_address(name)


def _is_address(name: str, what: str | None = None) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return what is None or bool(getattr(address, what))


def read_key(file: Path) -> tuple[str, str | None]:
    """Read the key that requests must bring; return it with what is to be said of its file.

    Raises:
        LiteError: it cannot be read, is too short, or not one line of letters.
    """
    try:
        text = file.read_text(encoding="ascii")
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "letters that are not ASCII"
        raise LiteError(f"{file}: got {what} · expected a key on one line · write one: {_MAKE}") from error
    key = text.strip()
    if len(key) < MIN_KEY or not key.isprintable() or " " in key:
        msg = f"{file}: got a key that is empty, short, or not one word · expected one of {MIN_KEY} letters or more"
        raise LiteError(f"{msg} · write one: {_MAKE}")
    others = mode & (stat.S_IRWXG | stat.S_IRWXO)
    return key, f"{file}: others on this machine can read the key: chmod 600 {file}" if others else None


_MAKE: Final = "python -c 'import secrets; print(secrets.token_urlsafe(32))' > key"


def digest(key: str) -> bytes:
    """Return what keys are compared by, in a time that does not tell how much of them is right."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
