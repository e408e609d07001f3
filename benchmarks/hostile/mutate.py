"""What is done to good files to make bad ones. Each takes the generator of its input, so that a seed is an input."""

from __future__ import annotations

import copy
import json
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence

OUTSIDE: Final = "../outside/secret"
"""A file beside the folder of an input, which no reading may open."""

_NUMBERS: Final = (0, -1, 1, 2, 3, 255, 65535, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30, 1.5, 1e308, float("nan"))
_TEXTS: Final = (
    *("", " ", ".", "..", "/", OUTSIDE, f"/proc/self/cwd/{OUTSIDE}", "/etc/passwd", "file:///etc/passwd"),
    *("http://127.0.0.1:9/x", "\0", "a\nb", "\ud800", "%s%n", "{0}", "__class__", "x" * 100_000, "<image>", "ſ̈", "１"),
)
_OTHERS: Final[tuple[Any, ...]] = (None, True, False, [], {}, [[]], [None], {"": None})


def hostile_value(rng: random.Random) -> Any:  # noqa: ANN401 - anything at all
    """Return a value that nobody expects."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(_NUMBERS)
    if kind == 1:
        return rng.choice(_TEXTS)
    if kind == 2:
        return copy.deepcopy(rng.choice(_OTHERS))
    nested: Any = copy.deepcopy(rng.choice(_OTHERS))
    for _ in range(rng.choice((3, 50, 150))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return nested


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Flip, cut, splice, repeat or overwrite bytes of a file; half of it near the beginning, where headers are."""
    changed = bytearray(data)

    def place() -> int:
        return rng.randrange(max(1, min(len(changed), 512) if rng.random() < 0.5 else len(changed)))

    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        way, at = rng.randrange(7), place()
        if way == 0:
            for _ in range(rng.choice((1, 1, 8, 64))):
                changed[place() % max(1, len(changed))] ^= 1 << rng.randrange(8)
        elif way == 1:
            del changed[at:]
        elif way == 2:
            other = rng.choice(list(others) or [bytes(data)])
            changed[at:] = other[rng.randrange(max(1, len(other))) :]
        elif way == 3:
            changed[at:at] = changed[at : at + rng.choice((1, 2, 16, 4096))]
        elif way == 4:
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63))
            packed = struct.pack(rng.choice("<>") + "Q", number)
            size = rng.choice((1, 2, 4, 8))
            changed[at : at + size] = packed[:size]
        elif way == 5:
            del changed[at : at + rng.choice((1, 2, 16, 256))]
        else:
            changed[at : at + 64] = rng.randbytes(64)
        if not changed:
            return b""
    return bytes(changed)


def mutate_json(rng: random.Random, text: str) -> bytes:
    """Change values, names and structure of a JSON document; now and then its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, text.encode())
    if rng.random() < 0.03:  # deeper than Python's json writes
        return text.replace(":", ":" + rng.choice(("[", '{"a":')) * 100_000, 1).encode()
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(document))
        if not places:
            break
        holder, key = rng.choice(places)
        way: Callable[[Any, Any, random.Random], None] = rng.choice(
            (_replace, _replace, _replace, _remove, _add, _swap)
        )
        way(holder, key, rng)
    return json.dumps(document).encode(errors="surrogatepass")


def _places(document: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 - JSON
    """Yield the list or object, and the index or name in it, of every value."""
    values = [document]
    while values:
        value = values.pop()
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            yield value, key
            values.append(value[key])


def _replace(holder: Any, key: Any, rng: random.Random) -> None:  # noqa: ANN401
    holder[key] = hostile_value(rng)


def _remove(holder: Any, key: Any, rng: random.Random) -> None:  # noqa: ANN401, ARG001
    del holder[key]


def _add(holder: Any, key: Any, rng: random.Random) -> None:  # noqa: ANN401
    if isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", "", OUTSIDE, "__proto__"))] = hostile_value(rng)
    else:
        holder.insert(key, copy.deepcopy(holder[key]) if rng.random() < 0.5 else hostile_value(rng))


def _swap(holder: Any, key: Any, rng: random.Random) -> None:  # noqa: ANN401
    other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    holder[key], holder[other] = holder[other], holder[key]
