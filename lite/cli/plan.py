"""`python -m lite plan ARTIFACT`: say what would compute an artifact here, and in how much memory; load nothing."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Final, get_args

from lite.artifact.open import load_artifact
from lite.cli.options import add_adapters, add_artifact, add_loading, load_options
from lite.console import positive, print_line
from lite.engines.options import Dtype
from lite.errors import LiteError
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from lite.artifact.open import Artifact
    from lite.engines.machine import Machine
    from lite.engines.options import LoadOptions
    from lite.engines.plan import RunPlan
    from lite.prompt import PromptEncoder

HELP: Final = "say what would compute an artifact, and in how much memory"
DESCRIPTION: Final = (
    "Say what would compute an artifact on this machine, or on one with another GPU, and in how much memory. Nothing "
    "is loaded. `lite.load` and the other commands do what is printed here, with the same options."
)
EPILOG: Final = 'example: python -m lite plan artifact --card "RTX 3060" --rows 4'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_artifact(parser)
    add_adapters(parser)
    add_loading(parser)
    parser.add_argument(
        "--rows", metavar="N", type=positive, help="studies that can be under way at a time (default: as many as fit)"
    )
    parser.add_argument(
        "--card", metavar="NAME", help='plan for a machine with this GPU instead, such as "RTX 3060", "T4" or "V100"'
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit status."""
    from lite.engines.machine import look
    from lite.loading import as_asked, plan_run, prompt_of

    options = load_options(arguments)
    artifact = as_asked(load_artifact(arguments.artifact), options)
    machine = look(options, artifact) if arguments.card is None else _machine_with(arguments.card)
    _, prompt = prompt_of(artifact)
    plan = plan_run(artifact, prompt, options, machine)
    if arguments.json:
        about = {"artifact": artifact.id, "machine": dataclasses.asdict(machine)}
        print_line(json.dumps(about | plan.to_json(), ensure_ascii=False))
        return 0
    about_machine = (
        f"one with the card {machine.gpus[0].name}, which is not this one" if arguments.card else _shown(machine)
    )
    lines = [("artifact", f"{arguments.artifact}, {artifact.manifest.model}"), ("machine", about_machine)]
    print_line("\n".join([*_aligned(lines), *_report(plan), *_others(plan, artifact, prompt, options, machine)]))
    return 0


def _machine_with(name: str) -> Machine:
    """Return a machine with a card that is known by its vendor's figures."""
    from lite.bench.cards import CARDS

    found = [card for card in CARDS if name.casefold() in card.name.casefold()]
    if len(found) != 1:
        msg = f"got the card {name!r} · expected one of {', '.join(card.name for card in CARDS)} · choose one of them"
        raise LiteError(msg)
    return found[0].machine()


def _shown(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} with {shown_bytes(gpu.total_bytes)}" for gpu in machine.gpus) or "no GPU"
    memory = f", {shown_bytes(machine.memory_bytes)} of memory" if machine.memory_bytes else ""
    return f"this one: {machine.num_cores} core{'s' if machine.num_cores > 1 else ''}{memory}, {gpus}"


def _report(plan: RunPlan) -> Iterator[str]:
    """Yield choices, memory, losses and notes, each under a heading."""
    yield "\nchosen"
    yield from _aligned((name, *choice) for name, choice in plan.choices.items())
    memory = plan.memory
    peak = f"of {shown_bytes(plan.limit)}, {plan.limit_from}" if plan.limit is not None else plan.limit_from
    cache = f"{shown_bytes(memory.row_bytes)} a row"
    if plan.device == "cpu":
        cache += ", which takes it when a study first uses it"
    yield f"\nmemory{' on the GPU' if plan.device != 'cpu' else ''}"
    items = [(name, shown_bytes(count), cache if "cache" in name else "") for name, count in memory.items().items()]
    yield from _aligned([*items, ("at most", shown_bytes(memory.card_bytes), peak)], right=1)
    yield "\nlost, as measured at export, in nats a token"
    losses = plan.losses.items()
    yield from _aligned((name, "not measured" if lost is None else f"{lost:.2g}") for name, lost in losses)
    for heading, lines in (("slower than it has to be", plan.fallbacks), ("note", plan.notes)):
        if lines:
            yield f"\n{heading}"
            yield from (f"  {line}" for line in lines)


def _others(
    plan: RunPlan, artifact: Artifact, prompt: PromptEncoder, options: LoadOptions, machine: Machine
) -> Iterator[str]:
    """Yield what other options would make of it."""
    from lite.loading import plan_run

    changes: dict[str, dict[str, Any]] = {
        f"--cache-dtype {dtype}": {"cache_dtype": dtype} for dtype in ("int8", plan.dtype) if dtype != plan.cache_dtype
    }
    if plan.prompt_weights == "int8":
        changes["--prompt-weights stored"] = {"prompt_weights": "stored"}
    changes |= {f"--rows {rows}": {"rows": rows} for rows in (1, 4, 8, 16) if rows != plan.rows}
    if plan.engine == "torch" and plan.device == "cpu":
        changes |= {f"--dtype {dtype}": {"dtype": dtype} for dtype in get_args(Dtype) if dtype != plan.dtype}
    lines = []
    for name, change in changes.items():
        try:
            other = plan_run(artifact, prompt, dataclasses.replace(options, **change), machine)
        except LiteError as error:
            got = str(error).partition(" · ")[0].rpartition("got ")[2]
            lines.append((name, "refused", got))
            continue
        lost = other.losses.get("int8 cache, from a float one")
        loses = "" if lost is None else f", loses {lost:.2g} nats a token more"
        if other.prompt_weights != plan.prompt_weights:
            loses += f", prompts by {other.prompt_weights} weights"
        what = f"{other.rows} row{'s' * (other.rows > 1)}, {other.cache_dtype} cache{loses}"
        lines.append((name, shown_bytes(other.memory.card_bytes), what))
    yield "\nwith another option"
    yield from _aligned(lines, right=1)


def _aligned(lines: Any, *, right: int | None = None) -> Iterator[str]:  # noqa: ANN401 - rows of text
    """Yield rows of cells as lines of text in columns; one of them perhaps flush right."""
    rows = [[str(cell) for cell in row] for row in lines]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows), default=0))]
    for row in rows:
        cells = [cell.rjust(widths[i]) if i == right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        yield f"  {'  '.join(cells)}".rstrip()
