"""Requests that deserve a refusal and nothing else, by kind and seed: bytes, and how they are sent."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from benchmarks.hostile.mutate import hostile_value, mutate_bytes, mutate_json
from benchmarks.serve.asking import CHAT, FINDINGS, ROUTES

if TYPE_CHECKING:
    from benchmarks.hostile.material import Material

Part: TypeAlias = "bytes | float | None"
"""What a client does: it sends bytes, waits for seconds or an answer, or (None) says that nothing more comes."""
Kind: TypeAlias = "Callable[[Target, random.Random], Sequence[Part]]"

MAX_BODY: Final = 1 << 20  # of the server that is attacked
KEY: Final = "a-key-for-hostile-clients"
_FORM: Final = "multipart/form-data; boundary="
_PLACES: Final = (("POST", FINDINGS), ("POST", CHAT), ("GET", "/about"), ("GET", "/metrics"), ("GET", "/"))
_HUGE: Final = tuple(str(size) for size in (MAX_BODY + 1, 1 << 31, 1 << 63, 10**30))
_NO_SIZES: Final = ("-1", "abc", "1, 2", "0x10", "+5", "1e3", "", "9" * 9000)
_NO_OBJECTS: Final = (
    *("", "null", "[]", '"x"', "1e999", "NaN", "{", '{"a":', "[" * 100_000, '{"a":' * 50_000, "{'a': 1}", "\0"),
    *("\N{ZERO WIDTH NO-BREAK SPACE}{}", '{"\\ud800": 1}', "-" * 1000, '{"film": ' + "9" * 5000 + "}"),
)
_NO_HEADERS: Final = ("no colon", ": no name", "a b: c", "x: a\0b", "\0: x", "x: a\rb", "é: x", f"x: {'x' * 1_000_000}")
_UPWARDS: Final = ("../", "..%2f", "%2e%2e/", "..\\", "....//", "%c0%ae%c0%ae/", "..;/", "//", "./")
_FILES: Final = ("etc/passwd", "manifest.json", "app.py", "index.html%00.png", "x" * 20_000, "%ff")
_STARTS: Final = ("/static/", "/v1/", "/findings/", "http://evil.example/", "*", "/.git/", "/findings/?x=")
_NAMES: Final = (
    *("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "127.0.0.2", "a@evil", "[::2]", "0", None),
    *("evil.example:80", "127.0.0.1, evil.example", "é", "127.0.0.1/"),
)
_KEYS: Final = (
    None,
    KEY,
    "Basic %%%",
    "Basic OmE=",
    *(f"Bearer {key}" for key in ("", KEY[:-1], KEY + "x", "é", "x" * 9000)),
)
_ORIGINS: Final = (
    *(
        "Origin: https://evil.example",
        "Origin: null",
        "Origin: http://127.0.0.1.evil.example",
        "Origin: file://",
        "Origin:",
    ),
    *("Origin: http://localhost:1", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"),
)
_METHODS: Final = ("PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "OPTIONS", "BREW", "get", "P" * 9000, "PO ST", "\0")
_URIS: Final = ("http://{}/a.png", "HTTPS://{}/", "file:///etc/passwd", "ftp://{}/x", "//{}/x", "gopher://{}/_")
_NO_FILMS: Final = (
    *("=" * 50_000, "AAA", "%%%", "\ud800", "A" * 400_000, "", "data:,", "data:image/png,abc", "data:;base64"),
    *("data:image/png;base64,", "DATA:;BASE64,=", "data:image/png;base64," + "A" * 400_000, "a\0b", " \n"),
)
_IMPOSSIBLE: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    FINDINGS: (
        *({"reason": "x" * 100_000}, {"reason": "<image>"}, {"reason": 1}, {"query": "b"}, {"film": None}, {"": 1}),
        *({"max_new_tokens": -1}, {"max_new_tokens": 1.5}, {"max_new_tokens": "many"}, {"max_new_tokens": True}),
        *({"rendering": "x"}, {"any_film": "maybe"}, {"stream": 2}, {"../x": 1}),
    ),
    CHAT: (
        *({"n": 0}, {"n": 10**6}, {"n": "2"}, {"temperature": -1}, {"temperature": 1e308}, {"temperature": []}),
        *({"stop": ["a"] * 10**5}, {"stop": 1}, {"model": "gpt-4o"}, {"top_p": 2}, {"messages": []}, {"max_tokens": 0}),
        *({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 10**9}, {"seed": 1 << 99}, {"reason": "x" * 100_000}),
    ),
}
_PROTOCOLS: Final = (
    *(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        bytes(70_000),
    ),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),
)


class Target:
    """A server, good films, and an address where nobody should ever ask."""

    def __init__(self, port: int, material: Material, decoy: str) -> None:
        self.port = port
        self.material = material
        self.decoy = decoy

    def request(
        self,
        body: bytes = b"",
        how: str = "POST",
        path: str = FINDINGS,
        more: Sequence[str] = (),
        **headers: str | None,
    ) -> bytes:
        """Return a request as it is sent: None leaves out a header that it would have, `more` are lines as they are."""
        own = {"host": f"127.0.0.1:{self.port}", "authorization": f"Bearer {KEY}", "connection": "close"}
        given = own | {"content_length": str(len(body))} | headers
        lines = [f"{name.replace('_', '-')}: {text}" for name, text in given.items() if text is not None]
        return "\r\n".join([f"{how} {path} HTTP/1.1", *lines, *more, "", ""]).encode() + body

    def form(self, *parts: tuple[str, bytes], kind: str = f"{_FORM}b", cut: int = 0) -> bytes:
        """Return a form of parts by name, without its last bytes."""
        head = '--b\r\nContent-Disposition: form-data; name="{}"; filename="../x"\r\n\r\n'
        body = b"".join(head.format(name).encode() + data + b"\r\n" for name, data in parts) + b"--b--\r\n"
        return self.request(body[: len(body) - cut], content_type=kind)

    def asked(self, path: str, uri: str | None = None, **fields: object) -> bytes:
        """Return a request in JSON; without a film, with one that is good."""
        good = f"data:;base64,{base64.b64encode(self.material.pictures[0]).decode()}"
        return self.request(json.dumps(_document(path, good if uri is None else uri) | fields).encode(), path=path)


def _document(path: str, film: str) -> dict[str, Any]:
    if path == FINDINGS:
        return {"film": film, "stream": True, "reason": "Cough."}
    content = [{"type": "image_url", "image_url": {"url": film}}]
    return {"messages": [{"role": "user", "content": content}], "stream": True}


def _no_object(rng: random.Random) -> bytes:
    return rng.choice((*_NO_OBJECTS, rng.randbytes(99).decode("latin-1"))).encode("latin-1", "replace")


def _size(to: Target, rng: random.Random) -> Sequence[Part]:
    body, way = bytes(rng.randrange(4096)), rng.randrange(4)
    if way == 0:
        chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        return [to.request(content_length=None, transfer_encoding="chunked"), *[chunk] * 20, b"0\r\n\r\n"]
    if way == 1:
        return [to.request(transfer_encoding=rng.choice(("chunked", "gzip, chunked", "x"))) + body, 0.1, None]
    expect = ["Expect: 100-continue"] if rng.random() < 0.3 else []
    size = rng.choice(_HUGE if way == 2 else _NO_SIZES)
    return [to.request(more=expect, content_length=size) + body, 0.1, None]


def _slow(to: Target, rng: random.Random) -> Sequence[Part]:
    drops = [part for _ in range(20) for part in (rng.uniform(0.5, 1.5), b"x" * rng.randrange(1, 9))]
    return [to.request(content_length="50000"), *drops]


def _headers(to: Target, rng: random.Random) -> Sequence[Part]:
    many = [f"X-{number}: {rng.random()}" for number in range(rng.choice((101, 1000, 10_000)))]
    return [to.request(_no_object(rng), more=rng.choice((many, [rng.choice(_NO_HEADERS)])))]


def _half(to: Target, rng: random.Random) -> Sequence[Part]:
    whole = to.asked(rng.choice(ROUTES))
    return [whole[: rng.randrange(1, rng.choice((200, len(whole))))], rng.choice((0.0, 0.2)), None]


def _pipelined(to: Target, rng: random.Random) -> Sequence[Part]:
    first = to.request(_no_object(rng), connection="keep-alive")
    rest = rng.choice((rng.randbytes(99), first * 20, b"\r\n" * 999, first[9:]))
    return [first, rng.choice((0.0, 0.05)), rest, 0.2, None]


def _fields(to: Target, rng: random.Random) -> Sequence[Part]:
    path = rng.choice(ROUTES)
    if rng.random() < 0.3:
        return [to.asked(path, **{"film" if path == FINDINGS else "messages": hostile_value(rng)})]
    return [to.request(mutate_json(rng, json.dumps(_document(path, "AAAA"))), path=path)]


def _value(to: Target, rng: random.Random) -> Sequence[Part]:
    path = rng.choice(ROUTES)
    return [to.asked(path, **rng.choice(_IMPOSSIBLE[path]))]


def _multipart(to: Target, rng: random.Random) -> Sequence[Part]:
    film, way = ("film", to.material.pictures[0]), rng.randrange(6)
    if way == 0:
        kind = rng.choice(
            ("multipart/form-data", _FORM, f"{_FORM}{'x' * 5000}", f"{_FORM}other", f'{_FORM}"', f"{_FORM}é")
        )
        return [to.form(film, kind=kind)]
    if way == 1:
        return [to.form(film, cut=rng.randrange(9, 99))]
    many = (film, film), [("reason", b"x")] * 5000, [("", b"")], [("x" * 100_000, b"")], [("film", b"")], ()
    return (
        [to.form(*rng.choice(many))] if way < 4 else [to.form(film, ("reason", rng.choice((b"\xff" * 50_000, b"\0"))))]
    )


def _film(to: Target, rng: random.Random) -> Sequence[Part]:
    films = (*to.material.pictures, *to.material.films)
    data = mutate_bytes(rng, rng.choice(films), films)
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return [to.form(("film", data)) if rng.random() < 0.5 else to.asked(rng.choice(ROUTES), uri)]


def _bomb(to: Target, rng: random.Random) -> Sequence[Part]:
    """Send few bytes that are said to be very many pixels: more than are allowed, and nearly as many."""
    side = rng.choice((8900, 8900, 30_001, 65_535))
    if rng.random() < 0.2:
        dataset, buffer = copy.deepcopy(to.material.dataset), io.BytesIO()
        dataset.Rows = dataset.Columns = side
        dataset.save_as(buffer, enforce_file_format=True)
        return [to.form(("film", buffer.getvalue()))]
    kind = rng.choice((8, 16)), rng.choice((0, 2, 6)), 0, 0, 0
    chunks = [
        (b"IHDR", struct.pack(">II5B", side, side, *kind)),
        (b"IDAT", zlib.compress(bytes(1 << 20))),
        (b"IEND", b""),
    ]
    if rng.random() < 0.3:
        chunks.insert(1, (b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 24))))
    written = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return [to.form(("film", b"\x89PNG\r\n\x1a\n" + b"".join(written)))]


KINDS: Final[Mapping[str, Kind]] = {
    "size": _size,
    "slow": _slow,
    "headers": _headers,
    "half": _half,
    "pipelined": _pipelined,
    "protocol": lambda _, rng: [rng.choice((*_PROTOCOLS, rng.randbytes(rng.randrange(1, 50_000)))), 0.2, None],
    "path": lambda to, rng: [
        to.request(
            how="GET", path=rng.choice(_STARTS) + rng.choice(_UPWARDS) * rng.randrange(1, 9) + rng.choice(_FILES)
        )
    ],
    "method": lambda to, rng: [to.request(_no_object(rng), rng.choice(_METHODS), rng.choice(_PLACES)[1])],
    "host": lambda to, rng: [to.request(_no_object(rng), *rng.choice(_PLACES), host=rng.choice(_NAMES))],
    "hosts": lambda to, rng: [to.request(_no_object(rng), *rng.choice(_PLACES), [f"Host: {rng.choice(_NAMES)}"])],
    "key": lambda to, rng: [to.request(_no_object(rng), *rng.choice(_PLACES), authorization=rng.choice(_KEYS))],
    "origin": lambda to, rng: [to.request(_no_object(rng), *rng.choice(_PLACES), [rng.choice(_ORIGINS)])],
    "json": lambda to, rng: [to.request(_no_object(rng), path=rng.choice(ROUTES), content_encoding="gzip")],
    "fields": _fields,
    "value": _value,
    "multipart": _multipart,
    "base64": lambda to, rng: [to.asked(rng.choice(ROUTES), rng.choice(_NO_FILMS))],
    "address": lambda to, rng: [to.asked(rng.choice(ROUTES), rng.choice(_URIS).format(to.decoy))],
    "film": _film,
    "bomb": _bomb,
}
MAY_BE_READ: Final = frozenset({"film"})
