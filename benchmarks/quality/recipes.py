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


def gptq_recipe(bits: int, group_size: int, method: str = "gptq") -> Recipe:
    """Return a GPTQ format, its name saying bits, group size and any method but GPTQ."""
    name = f"gptq-int{bits}-" + ("channel" if group_size == -1 else f"g{group_size}")
    options = ("--decoder", f"gptq-int{bits}", "--group-size", str(group_size), "--method", method)
    calibrated = method == "gptq"
    return Recipe(name=name if calibrated else f"{name}-{method}", options=options, calibrated=calibrated)


FORMATS: Final = (
    gptq_recipe(8, 128),
    gptq_recipe(8, 128, "rtn"),
    *(gptq_recipe(4, group_size, method) for group_size in (32, 64, 128, -1) for method in ("gptq", "rtn")),
    Recipe(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
    Recipe(name="bnb-int8", options=("--decoder", "bnb-int8")),
)
"""`g128`: 128 inputs share a scale; `channel`: all inputs of an output do. `rtn`: weights rounded to the nearest."""

TRICKS: Final = (
    Trick("order", on=("--activation-order", "group"), off=("--activation-order", "none")),
    Trick("clip", on=("--clip", "mse"), off=("--clip", "none")),
    Trick("refine", on=("--refine", "2"), off=("--refine", "0")),
    Trick("folding", on=("--fold-scales",), off=("--no-fold-scales",)),
    Trick("signs", on=("--signs", "either"), off=("--signs", "positive")),
    Trick("attention", on=("--through-attention",), off=("--no-through-attention",)),
    # Left to itself the exporter measures what each kind of token counts.
    Trick("token-weights", on=(), off=("--token-weights", "1,1")),
)


def ablation(group_size: int = 128) -> tuple[Recipe, ...]:
    """Return plain GPTQ, each trick added one after the other, and the full set without each."""
    count = len(TRICKS)
    # With the last trick the set is full, and full without the last is the one before: neither is exported twice.
    but_last = list(enumerate(TRICKS[:-1]))
    used = {"plain": [False] * count}
    used |= {f"plus-{trick.name}": [i <= at for i in range(count)] for at, trick in but_last}
    used |= {"full": [True] * count}
    used |= {f"full-without-{trick.name}": [i != at for i in range(count)] for at, trick in but_last}
    return tuple(_with_tricks(name, on, group_size) for name, on in used.items())


def alone(group_size: int) -> tuple[Recipe, ...]:
    """Return plain GPTQ with one trick, for each of them."""
    names = [trick.name for trick in TRICKS]
    return tuple(_with_tricks(f"only-{name}", [name == n for n in names], group_size) for name in names)


def _with_tricks(name: str, on: Sequence[bool], group_size: int) -> Recipe:
    options = [trick.on if used else trick.off for trick, used in zip(TRICKS, on, strict=True)]
    plain = gptq_recipe(4, group_size)
    return Recipe(name=name, options=(*plain.options, *sum(options, ())), calibrated=True)
