"""`python -m benchmarks.phantom`: write films, look at them, train the model."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lite.console import run_command

_EPILOG = """\
examples:
  python -m benchmarks.phantom write build/films --count 200 --seed 1
  python -m lite run build/demo/artifact build/films/studies.json --out build/predictions.jsonl
  python -m lite score build/predictions.jsonl

exit status: 0 done, 1 something was skipped or failed, 2 wrong use, 130 interrupted.
"""


def _write(arguments: argparse.Namespace) -> int:
    from benchmarks.phantom.write import write_studies

    path = write_studies(
        arguments.out, count=arguments.count, seed=arguments.seed, dicom=arguments.dicom, hospital=arguments.hospital
    )
    sys.stdout.write(f"{arguments.count} studies in {path}\n")
    return 0


def _plant(arguments: argparse.Namespace) -> int:
    from benchmarks.phantom.plant import plant

    sys.stdout.write(f"{plant(arguments.out, count=arguments.count, seed=arguments.seed)} pairs in {arguments.out}\n")
    return 0


def _contact_sheet(arguments: argparse.Namespace) -> int:
    from benchmarks.phantom.contact_sheet import contact_sheet

    contact_sheet(arguments.out, count=arguments.count, seed=arguments.seed, film_size=arguments.film_size)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    # Before torch starts its threads: ones that wait in a loop starve whoever shares the machine, and then each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.phantom.train import TrainingPlan, train

    size = train(arguments.out, plan=TrainingPlan(**_given(arguments, TrainingPlan)), work=arguments.work)
    sys.stdout.write(f"{arguments.out}: {size / 1e6:.2f} MB in the published layout\n")
    return 0


def _adapt(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as for training
    from benchmarks.phantom.adapt import AdaptationPlan, adapt

    plan = AdaptationPlan(**_given(arguments, AdaptationPlan))
    out = arguments.out
    size = adapt(out, plan=plan, work=arguments.work, peft=arguments.peft)
    sys.stdout.write(f"{out}: {size / 1e6:.2f} MB were trained.\n")
    if not arguments.peft:
        sys.stdout.write(
            "Next, with lite's --image-tokens as here:\n"
            f"  python -m export --checkpoint {out} --base benchmarks/phantom/checkpoint/base --out ARTIFACT\n"
        )
    return 0


def _style(arguments: argparse.Namespace) -> int:
    from benchmarks.phantom.style import style_table

    sys.stdout.write(f"{style_table(arguments.predictions, arguments.truth)}\n")
    return 0


def _train_retrieval(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as for training
    from benchmarks.phantom.retrieve import RetrievalPlan, train_retrieval

    size = train_retrieval(arguments.out, plan=RetrievalPlan(**_given(arguments, RetrievalPlan)), work=arguments.work)
    sys.stdout.write(f"{arguments.out}: {size / 1e6:.2f} MB of towers for retrieval added\n")
    return 0


def _find(arguments: argparse.Namespace) -> int:
    from benchmarks.phantom.find import find

    sys.stdout.write(f"{find(arguments.artifact, arguments.list)}\n")
    return 0


def _given(arguments: argparse.Namespace, plan: type[Any]) -> dict[str, Any]:
    """Return what was said of a plan."""
    names = {field.name for field in dataclasses.fields(plan)}
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.phantom",
        description="Synthetic chest films with known findings, and the small model that reads them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    write = add("write", _write, "write films and a JSON list in LLaVA-Rad's evaluation format")
    write.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    write.add_argument("--count", type=int, required=True, metavar="N", help="how many studies")
    write.add_argument("--seed", type=int, default=0, metavar="S", help="which studies (default: %(default)s)")
    write.add_argument("--dicom", action="store_true", help="also 12-bit DICOM films, alternately MONOCHROME2 and 1")
    _add_hospital(write, "home")

    pairs = add("plant", _plant, "write pairs of reports with one known error each, to try a judge on")
    pairs.add_argument("out", type=Path, metavar="OUT.jsonl", help="the file to write")
    pairs.add_argument("--count", type=int, default=20, metavar="N", help="pairs of each kind (default: %(default)s)")
    pairs.add_argument("--seed", type=int, default=0, metavar="S", help="which pairs (default: %(default)s)")

    sheet = add("contact-sheet", _contact_sheet, "save a page of films with their findings as captions")
    sheet.add_argument("out", type=Path, metavar="PNG", help="the picture to write")
    sheet.add_argument("--count", type=int, default=24, metavar="N", help="how many films (default: %(default)s)")
    sheet.add_argument("--seed", type=int, default=0, metavar="S", help="of the first film (default: %(default)s)")
    sheet.add_argument("--film-size", type=int, default=256, metavar="PX", help="112 shows what the model sees")

    train = add("train", _train, "grow the phantom model and write it in LLaVA-Rad's published layout")
    train.add_argument("out", type=Path, metavar="OUT", help="folder that receives llava-rad-phantom/ and base/")
    train.add_argument(
        "--work", type=Path, default=Path("build/phantom"), metavar="DIR",
        help="where films and state are kept; an interrupted run goes on from there (default: %(default)s)",
    )  # fmt: skip
    train.add_argument("--seed", type=int, metavar="S", help="of everything")
    train.add_argument("--films", type=int, metavar="N", help="training films")
    train.add_argument("--see-steps", type=int, metavar="N", help="steps of stage 1, the tower alone")
    train.add_argument("--write-steps", type=int, metavar="N", help="steps of stage 2, the whole model")
    train.add_argument("--scale-sigma", type=float, metavar="X", help="sigma of the log channel scales")

    _add_retrieval_arguments(add("train-retrieval", _train_retrieval, "give a trained phantom its retrieval towers"))
    _add_find_arguments(add("find", _find, "measure how well an artifact's towers find films by reports and words"))
    _add_adapt_arguments(add("adapt", _adapt, "train LoRA and projector further: another hospital, fewer image tokens"))
    _add_style_arguments(add("style", _style, "measure how much drafts are written as northside writes"))
    return parser


def _add_find_arguments(found: argparse.ArgumentParser) -> None:
    found.add_argument("artifact", type=Path, metavar="ARTIFACT", help="exported with --retrieval")
    found.add_argument("list", type=Path, metavar="STUDIES.json", help="a list that `write` has written")


def _add_style_arguments(style: argparse.ArgumentParser) -> None:
    style.add_argument("predictions", type=Path, nargs="+", metavar="PREDICTIONS", help="what `lite run` has written")
    style.add_argument("--truth", type=Path, metavar="STUDIES.json", help="the list, if the files have no findings")


def _add_hospital(command: argparse.ArgumentParser, default: str | None) -> None:
    command.add_argument(
        "--hospital", default=default, choices=("home", "northside"), help="whose films and texts (default: home)"
    )


def _add_adapt_arguments(adapt: argparse.ArgumentParser) -> None:
    adapt.add_argument(
        "out", type=Path, nargs="?", default=Path("build/adapted"), metavar="OUT",
        help="a new folder: the checkpoint, for the same base (default: %(default)s)",
    )  # fmt: skip
    adapt.add_argument(
        "--work", type=Path, default=Path("build/adaptation"), metavar="DIR",
        help="where films, features and state are kept; an interrupted run goes on from there (default: %(default)s)",
    )  # fmt: skip
    _add_hospital(adapt, None)
    adapt.add_argument(
        "--peft", action="store_true", help="write LoRA and projector alone, LoRA in bfloat16, as PEFT does"
    )
    adapt.add_argument("--image-tokens", type=int, metavar="N", help="of a film (default: one a patch)")
    adapt.add_argument("--image-method", metavar="METHOD", help="how patches become fewer (default: diverse)")
    adapt.add_argument("--seed", type=int, metavar="S", help="of everything")
    adapt.add_argument("--films", type=int, metavar="N", help="training films")
    adapt.add_argument("--steps", type=int, metavar="N", help="how many batches")
    adapt.add_argument("--batch-size", type=int, metavar="N", help="films a step")
    adapt.add_argument("--learning-rate", type=float, metavar="X", help="its highest")
    adapt.add_argument("--dtype", choices=("float32", "bfloat16"), help="what is computed in (default: float32)")
    adapt.add_argument("--lora-rank", type=int, metavar="R", help="of the LoRA that is written, the published 8 in it")


def _add_retrieval_arguments(retrieval: argparse.ArgumentParser) -> None:
    retrieval.add_argument(
        "out", type=Path, metavar="OUT", help="the folder that `train` has written, changed in place"
    )
    retrieval.add_argument(
        "--work", type=Path, default=Path("build/retrieval"), metavar="DIR",
        help="where films, features and state are kept; an interrupted run goes on from there (default: %(default)s)",
    )  # fmt: skip
    retrieval.add_argument("--seed", type=int, metavar="S", help="of everything")
    retrieval.add_argument("--films", type=int, metavar="N", help="training films")
    retrieval.add_argument("--steps", type=int, metavar="N", help="of 96 films")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: int(arguments.run(arguments)))


if __name__ == "__main__":
    sys.exit(main())
