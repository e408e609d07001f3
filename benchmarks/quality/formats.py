"""What each way of quantising the decoder costs and takes: `python -m benchmarks quality formats`.

Every row of the table is a command line of the exporter, run as a user would run it on films drawn for calibration;
what comes out is compared with the fp16 export on other films. With `--ablation` a second table takes 4-bit GPTQ apart:
each trick added to the plain method, one after the other, and each taken away from the full one.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.commands import command_line
from benchmarks.exports import PHANTOM, Recipe, Source
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import Films, Row, compare_artifact, report, take_reference
from lite.console import positive, run_command, say
from lite.errors import LiteError

NUM_FILMS: Final = 240
NUM_CALIBRATION_FILMS: Final = 160  # as many as the exporter takes by default, and some for it to hold out
# Films of these seeds are used for nothing else: not for training, nor for the figures of the phantom's README.
SEED: Final = 20_261_201
CALIBRATION_SEED: Final = 20_261_202


@dataclass(frozen=True, slots=True, kw_only=True)
class Trick:
    """One choice of GPTQ: the options with it, none where it is the exporter's own, and without."""

    name: str
    on: tuple[str, ...]
    off: tuple[str, ...]


def _gptq(bits: int, group_size: int, method: str) -> Recipe:
    name = f"gptq-int{bits}-" + ("channel" if group_size == -1 else f"g{group_size}")
    options = ("--decoder", f"gptq-int{bits}", "--group-size", str(group_size), "--method", method)
    calibrated = method == "gptq"
    return Recipe(name=name if calibrated else f"{name}-{method}", options=options, calibrated=calibrated)


REFERENCE: Final = Recipe(name="fp16", options=("--decoder", "fp16"))
RECIPES: Final = (
    _gptq(8, 128, "gptq"),
    _gptq(8, 128, "rtn"),
    *(_gptq(4, group_size, method) for group_size in (32, 64, 128, -1) for method in ("gptq", "rtn")),
    Recipe(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
    Recipe(name="bnb-int8", options=("--decoder", "bnb-int8")),
)
"""`g128`: 128 inputs share a scale; `channel`: all inputs of an output do. `rtn`: weights rounded to the nearest."""

TRICKS: Final = (
    Trick(name="order", on=("--activation-order", "group"), off=("--activation-order", "none")),
    Trick(name="clip", on=("--clip", "mse"), off=("--clip", "none")),
    Trick(name="refine", on=("--refine", "2"), off=("--refine", "0")),
    Trick(name="folding", on=("--fold-scales",), off=("--no-fold-scales",)),
    # Left to itself the exporter searches what image and prompt tokens should count.
    Trick(name="token-weights", on=(), off=("--token-weights", "1,1")),
)


def ablation_recipes() -> tuple[Recipe, ...]:
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


def compare_recipes(recipes: Sequence[Recipe], source: Source, folder: Path, *, keep: bool) -> Iterator[Row]:
    """Export and measure `REFERENCE`, which is none of the recipes, and then each of them.

    Args:
        recipes: what to export. One that fails does not stop the rest.
        source: of which checkpoint; the films it is checked on are those it is measured on.
        folder: receives the artifacts.
        keep: leave the recipes' artifacts there.

    Yields:
        The row of the reference, and that of each recipe, in order.

    Raises:
        LiteError: the reference cannot be exported or measured.
    """
    films, path = Films.drawn(source.verify), folder / REFERENCE.name
    cost = source.export(REFERENCE, path)
    with tempfile.TemporaryDirectory(prefix="reference-logits-") as logits:
        reference, row = take_reference(path, films, Path(logits), name=REFERENCE.name, device=source.device)
        yield dataclasses.replace(row, cost=cost)
        for recipe in recipes:
            path = folder / recipe.name
            try:
                cost = source.export(recipe, path)
                row = compare_artifact(path, films, reference, name=recipe.name, device=source.device)
                yield dataclasses.replace(row, cost=cost)
            except LiteError as error:
                yield Row(name=recipe.name, error=str(error))
            if not keep:
                shutil.rmtree(path, ignore_errors=True)


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality formats",
        description="Export a checkpoint in every decoder format and print what each loses against fp16, as markdown.",
        epilog="exit status: 0 done, 1 a row failed or nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument(
        "--films", type=positive, default=NUM_FILMS, metavar="N", help="films to measure on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help="which ones (default: %(default)s)")
    parser.add_argument(
        "--calibration-films", type=positive, default=NUM_CALIBRATION_FILMS, metavar="N",
        help=f"films to calibrate on, always those of seed {CALIBRATION_SEED} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="a new folder that keeps films and artifacts (default: a temporary one, and each artifact goes when it "
        "has been measured)",
    )  # fmt: skip
    names = [recipe.name for recipe in (REFERENCE, *RECIPES, *ablation_recipes())]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"only these rows, beside fp16: {', '.join(names)}"
    )
    parser.add_argument("--ablation", action="store_true", help="a second table: what each trick of 4-bit GPTQ buys")
    parser.add_argument(
        "--checkpoint", type=Path, default=PHANTOM / "llava-rad-phantom", metavar="DIR",
        help="another LLaVA-Rad download (default: the demo's)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, default=PHANTOM / "base", metavar="DIR", help="its base model")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    return parser


def _say_row(row: Row) -> None:
    """Say that a row is finished: the tables come at the end."""
    line = f"{row.name}: failed: {row.error}"
    if row.cost is not None:
        line = f"{row.name}: exported in {row.cost.seconds:.1f} s"
    if row.loss is not None:
        line += f", KL {row.loss.divergence.mean_kl.value:.3g}"
    say(line)


def _run(arguments: argparse.Namespace, folder: Path, command: str) -> int:
    if arguments.seed == CALIBRATION_SEED:
        msg = f"got --seed {arguments.seed}, the films to calibrate on · expected other films to measure on"
        raise LiteError(f"{msg} · choose another seed")
    source = Source(
        checkpoint=arguments.checkpoint.resolve(),
        base=arguments.base.resolve(),
        verify=write_studies(folder / "held-out", count=arguments.films, seed=arguments.seed, dicom=False),
        calibration=write_studies(
            folder / "calibration", count=arguments.calibration_films, seed=CALIBRATION_SEED, dicom=False
        ),
        device=arguments.device,
    )
    only = arguments.only
    formats = [recipe for recipe in RECIPES if only is None or recipe.name in only]
    tricks = [recipe for recipe in ablation_recipes() if (arguments.ablation if only is None else recipe.name in only)]
    rows: list[Row] = []
    for row in compare_recipes([*formats, *tricks], source, folder / "artifacts", keep=arguments.out is not None):
        _say_row(row)
        rows.append(row)
    split = 1 + len(formats)
    tables = {"formats": rows[:split]} if formats or not tricks else {}
    if tricks:
        tables["ablation"] = [rows[0], *rows[split:]]
    films = f"{arguments.films} films of seed {arguments.seed}; calibrated on {arguments.calibration_films} films of "
    films += f"seed {CALIBRATION_SEED}"
    return report(tables, films=films, command=command, as_json=arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)

    def run() -> int:
        with ExitStack() as stack:
            folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="formats-")))
            return _run(arguments, folder.resolve(), command_line("quality formats", argv))

    return run_command(run)
