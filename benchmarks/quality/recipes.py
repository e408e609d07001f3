"""Ways to quantise the decoder, each a command line of the exporter, and 4-bit GPTQ taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from benchmarks.exports import Recipe


class Trick(NamedTuple):
    """One choice of GPTQ: the options with it, none where it is the exporter's own, and without."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...]


def _gptq(bits: int, group_size: int, method: str) -> Recipe:
    name = f"gptq-int{bits}-" + ("channel" if group_size == -1 else f"g{group_size}")
    options = ("--decoder", f"gptq-int{bits}", "--group-size", str(group_size), "--method", method)
    calibrated = method == "gptq"
    return Recipe(name=name if calibrated else f"{name}-{method}", options=options, calibrated=calibrated)


FORMATS: Final = (
    _gptq(8, 128, "gptq"),
    _gptq(8, 128, "rtn"),
    *(_gptq(4, group_size, method) for group_size in (32, 64, 128, -1) for method in ("gptq", "rtn")),
    Recipe(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
    Recipe(name="bnb-int8", options=("--decoder", "bnb-int8")),
)
"""`g128`: 128 inputs share a scale; `channel`: all inputs of an output do. `rtn`: weights rounded to the nearest."""

TRICKS: Final = (
    Trick("order", on=("--activation-order", "group"), off=("--activation-order", "none")),
    Trick("clip", on=("--clip", "mse"), off=("--clip", "none")),
    Trick("refine", on=("--refine", "2"), off=("--refine", "0")),
    Trick("folding", on=("--fold-scales",), off=("--no-fold-scales",)),
    # Left to itself the exporter searches what image and prompt tokens should count.
    Trick("token-weights", on=(), off=("--token-weights", "1,1")),
)


def ablation() -> tuple[Recipe, ...]:
    """Return plain GPTQ, each trick of `TRICKS` added one after the other, and the full set without each."""

    def recipe(name: str, on: Sequence[bool]) -> Recipe:
        options = [trick.on if used else trick.off for trick, used in zip(TRICKS, on, strict=True)]
        return Recipe(name=name, options=(*_gptq(4, 128, "gptq").options, *sum(options, ())), calibrated=True)

    count = len(TRICKS)
    # With the last trick the set is full, and full without the last is the one before: neither is exported twice.
    but_last = list(enumerate(TRICKS[:-1]))
    added = [recipe(f"plus-{trick.name}", [i <= at for i in range(count)]) for at, trick in but_last]
    removed = [recipe(f"full-without-{trick.name}", [i != at for i in range(count)]) for at, trick in but_last]
    return recipe("plain", [False] * count), *added, recipe("full", [True] * count), *removed
