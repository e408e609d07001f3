"""Sizes as people write and read them: "12GiB"."""

from __future__ import annotations

import math
import re
from typing import Final

from lite.errors import LiteError

_UNITS: Final = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Read a size: a number of bytes, or text, perhaps with a unit, such as "12GiB", "800 MB" or "12G" (binary).

    Raises:
        LiteError: it is no size.
    """
    if type(size) is int and size > 0:
        return size
    text = size if isinstance(size, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not float(found[1]):
        msg = f"got the size {size!r} · expected a number of bytes, or one with a unit · write it like 12GiB"
        raise LiteError(msg)
    return int(float(found[1]) * _UNITS[found[2]])


def shown_bytes(count: float, digits: int = 2, *, up: bool = False) -> str:
    """Return a size as text, in GiB with so many digits, or in MiB with one digit less; perhaps rounded up."""
    if count < 2**14:
        return f"{count:,.0f} bytes"
    unit, name, digits = (30, "GiB", digits) if count >= 2**30 else (20, "MiB", digits - 1)
    value = count / 2**unit
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {name}"
