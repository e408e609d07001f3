"""The onnx engine beside torch on one artifact: `python -m benchmarks quality engines ARTIFACT`.

Both compute the same integers; what they round on the way differs, and so does what their int8 caches round. They draft
the same films in turns, film by film.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lite
from benchmarks.commands import command_line
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import (
    Drafts,
    Films,
    Loss,
    Row,
    diverge,
    draft_in_turns,
    figures,
    keep_logits,
    loss,
    report,
)
from lite.console import positive, run_command

NUM_FILMS: Final = 100
# Films of this seed are used for nothing else.
SEED: Final = 20_261_401

ENGINES: Final[dict[str, dict[str, Any]]] = {
    "torch": {"engine": "torch", "device": "cpu"},
    "torch-int8-cache": {"engine": "torch", "device": "cpu", "cache_dtype": "int8"},
    "onnx": {"engine": "onnx"},
    "onnx-int8-cache": {"engine": "onnx", "cache_dtype": "int8"},
}
"""What is compared, by how it is loaded."""
BESIDE: Final = {"torch": ("torch-int8-cache", "onnx", "onnx-int8-cache"), "onnx": ("onnx-int8-cache",)}
"""References, and what is asked along their texts."""


def load_engines(path: Path) -> dict[str, lite.FindingsModel]:
    """Load an artifact with each of `ENGINES`.

    Raises:
        LiteError: it has no `decoder.onnx`.
    """
    return {name: lite.load(path, **options) for name, options in ENGINES.items()}


def compare_engines(
    models: Mapping[str, lite.FindingsModel], drafts: Mapping[str, Drafts], films: Films
) -> dict[tuple[str, str], Loss]:
    """Compare what `ENGINES` have drafted: the loss of each candidate and reference of `BESIDE`."""
    losses = {}
    for reference, candidates in BESIDE.items():
        with tempfile.TemporaryDirectory(prefix="reference-logits-") as folder:
            kept = keep_logits(models[reference], films.studies, drafts[reference], Path(folder))
            for name in candidates:
                divergence = diverge(models[name], films.studies, kept, name=name)
                losses[name, reference] = loss(drafts[name], kept.drafts, divergence)
    return losses


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality engines",
        description="Draft the same synthetic films with torch and with ONNX Runtime, on the CPU, and print how far "
        "their texts agree, as markdown.",
        epilog="exit status: 0 done, 1 nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="one of the phantom model with decoder.onnx")
    parser.add_argument(
        "--films", type=positive, default=NUM_FILMS, metavar="N", help="films to measure on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="S", help="which ones (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _run(arguments: argparse.Namespace, command: str) -> int:
    models = load_engines(arguments.artifact)
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        listed = write_studies(Path(folder) / "films", count=arguments.films, seed=arguments.seed, dicom=False)
        films = Films.drawn(listed)
        drafts = draft_in_turns(models, films.studies)
        losses = compare_engines(models, drafts, films)
    own = {name: figures(found, films.truth) for name, found in drafts.items()}
    rows = [Row(name="torch", figures=own["torch"])]
    rows += [Row(name=name, figures=own[name], loss=lost) for (name, _), lost in losses.items()]
    about = f"{arguments.films} of seed {arguments.seed}"
    return report({"engines": rows}, films=about, command=command, as_json=arguments.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _run(arguments, command_line("quality engines", argv)))
