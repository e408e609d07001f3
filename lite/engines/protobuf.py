"""Messages of protobuf as bytes: as much of them as it takes to look into a graph of ONNX, and to add to it.

A message is its fields one behind the other, each a tag (number and wire type) and a value; a message within it is a
value that has a length. Two messages behind each other are one, with the entries of both.

Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    Content = bytes | bytearray | mmap.mmap

_LENGTH: Final = 2  # the wire type of what has a length


def fields(content: Content, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message that have a length: number, begin and end.

    Raises:
        ValueError: it is no message.
        IndexError: likewise.
    """
    while at < end:
        key, at = _varint(content, at)
        if key >= 1 << 32:  # of which ONNX Runtime's reader would keep 32 bits, and see another field
            raise ValueError("a tag of more than 32 bits")
        field, kind = key >> 3, key & 7
        if kind == 0:
            _, at = _varint(content, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == _LENGTH:
            length, at = _varint(content, at)
            yield field, at, at + length
            at += length
        else:
            raise ValueError(f"a field of wire type {kind}")
    if at != end:
        raise ValueError("a field that ends behind its message")


def message(*values: tuple[int, int | str | bytes]) -> bytes:
    """Return a message of some fields: number and value, of which no number is below 0."""
    written = bytearray()
    for field, value in values:
        if isinstance(value, int):
            written += _written(field << 3) + _written(value)
        else:
            content = value.encode() if isinstance(value, str) else value
            written += _written(field << 3 | _LENGTH) + _written(len(content)) + content
    return bytes(written)


def _varint(content: Content, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        byte = content[at + place]
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, at + place + 1
    raise ValueError("a number without end")


def _written(value: int) -> bytes:
    """Return a number in groups of 7 bits, the lowest first, all but the last marked."""
    groups = bytearray()
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    groups.append(value)
    return bytes(groups)
