"""The gate, `python -m benchmarks gate`: does today's code still export, compute and load as its baselines say?

    checkpoint ──the exporter's command line──▶ artifacts ─┬───────────────────────▶ bytes, memory plan, imports
                                                           ├─ torch beside onnx ───▶ KL, equal texts
                                                           ├─ without torch ───────▶ MB of an environment, equal texts
    benchmarks/references ─┬─ films ───────────────────────┼─ drafted freely ──────▶ label F1 against the reports
                           └─ fp16 record ─────────────────┴─ along its texts ─────▶ KL, same top token
                                                                        │
    gates.toml ─────────── baseline, tolerance, what is worse ──────────┴──────────▶ pass, better, REGRESSION

The exact gates depend on no clock and run wherever there is a CPU, on which everything is computed. The timed ones are
ratios within one run, its artifacts taking turns film by film, and are asked for with `--timed`.

Baselines change in a commit that says why: `--update` rewrites their numbers, and nothing else of the file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import lite
from benchmarks.commands import command_line
from benchmarks.demo import CALIBRATION_SEED, GPTQ_INT4, NUM_CALIBRATION_FILMS
from benchmarks.exports import FP16, ROOT, Recipe, Source
from benchmarks.gates import slim
from benchmarks.gates.baselines import (
    Judged,
    NoBaselineError,
    Value,
    WrongUseError,
    read_gates,
    update_baselines,
)
from benchmarks.phantom.write import write_studies
from benchmarks.quality.compare import diverge, draft, figures
from benchmarks.quality.engines import compare_engines
from lite.artifact.open import Artifact
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.console import run_command, say
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary
from lite.eval.record import ReferenceRecord, check_record
from lite.eval.record_file import read_record
from lite.files import check_writable, write_whole
from lite.studies.sources.listed import read_studies
from lite.studies.study import Study

GATES: Final = Path(__file__).with_name("gates.toml")
STUDIES: Final = slim.STUDIES
RECORD: Final = ROOT / "benchmarks" / "references" / "phantom_fp16.json"
OUT: Final = ROOT / "build" / "gate"

_WEIGHTS: Final = GPTQ_INT4.options[-2:]
CANDIDATES: Final = {
    recipe.name: recipe
    for recipe in (
        FP16,
        Recipe(name="gptq-int8", options=("--decoder", "gptq-int8", *_WEIGHTS), calibrated=True),
        GPTQ_INT4,
        Recipe(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
        Recipe(name="vision-int8", options=("--decoder", "fp16", "--vision", "int8")),
    )
}
# What is measured beside, and the artifacts that it needs.
ENGINES, IMPORTS, SLIM, TIMED = "gptq-int4-engines", "imports", "slim", "timed"
NEEDS: Final = {
    ENGINES: ("gptq-int4",),
    IMPORTS: ("gptq-int4",),
    SLIM: ("gptq-int4",),
    TIMED: ("fp16", "gptq-int4", "vision-int8"),
}
SUBJECTS: Final = (*CANDIDATES, *NEEDS)

EXIT_REGRESSION, EXIT_WRONG_USE, EXIT_NO_BASELINE = 1, 2, 3


# -- Artifacts -------------------------------------------------------------------------------------------------------


def find_artifacts(subjects: Iterable[str], folder: Path | None) -> dict[str, Path]:
    """Return the artifacts that subjects need, by name: those that lie in `folder`, or exported anew.

    Raises:
        WrongUseError: an artifact is not in the folder.
    """
    needed = {name for subject in subjects for name in NEEDS.get(subject, (subject,))}
    names = [name for name in CANDIDATES if name in needed]
    if folder is None:
        return export_candidates(names, OUT)
    for path in (folder / name for name in names):
        if not path.is_dir():
            msg = f"{path}: got no such folder · expected the artifact {path.name} · export it, or leave it out with "
            raise WrongUseError(f"{msg}--only")
    return {name: folder / name for name in names}


def export_candidates(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Export candidates to `folder`, each by the command that a user would type; where one fails there is nothing."""
    # With what an earlier run has left, whole or in parts, other code would be measured.
    shutil.rmtree(folder, ignore_errors=True)
    films = write_studies(folder / "calibration", count=NUM_CALIBRATION_FILMS, seed=CALIBRATION_SEED, dicom=False)
    source = Source(verify=STUDIES, calibration=films, device="cpu")
    for name in names:
        try:
            say(f"{name}: exported in {source.export(CANDIDATES[name], folder / name).seconds:.0f} s")
        except LiteError as error:
            say(f"error: {name}: {error}")
    return {name: folder / name for name in names}


# -- Measuring -------------------------------------------------------------------------------------------------------


def measure_artifact(path: Path, studies: Sequence[Study], record: ReferenceRecord) -> dict[str, Value]:
    """Measure everything exact about one artifact with torch."""
    model = lite.load(path, engine="torch", device="cpu")
    divergence = _along_record(model, studies, record)
    # In one batch: its cache is then the only one.
    findings = draft(model, studies, name=path.name, batch_size=len(studies))
    return {
        "bytes": _bytes_of(model.artifact, "vision", "decoder_config", "decoder"),
        "mean_kl": divergence.mean_kl.value,
        "same_top": divergence.same_top.value,
        "label_f1_micro": figures(model.artifact, findings, studies).micro_f1.value,
        "plan_error": plan_error(model, findings),
    }


def measure_engines(path: Path, studies: Sequence[Study], record: ReferenceRecord) -> dict[str, Value]:
    """Measure the onnx engine beside the record and beside torch, and the int8 caches of both, on one artifact."""
    onnx = lite.load(path, engine="onnx", cache_dtype="float32")
    divergence = _along_record(onnx, studies, record)
    # Without regard to time: each drafts all studies at once.
    tables = compare_engines(path, studies, batch_size=len(studies))
    rows = [row for table in tables.values() for row in table]
    if failed := [row for row in rows if row.error is not None]:
        raise LiteError(f"{failed[0].name}: {failed[0].error}")
    f1 = {row.name: row.figures.micro_f1.value for row in rows if row.figures is not None}
    losses = {(row.name, row.loss.reference): row.loss for row in rows if row.loss is not None}
    to_torch, torch_cache = losses["onnx", "torch"], losses["torch-int8-cache", "torch"]
    return {
        "onnx_bytes": _bytes_of(onnx.artifact, "decoder_onnx"),
        "onnx_mean_kl": divergence.mean_kl.value,
        "onnx_same_top": divergence.same_top.value,
        "onnx_label_f1_micro": f1["onnx"],
        "onnx_kl_to_torch": to_torch.divergence.mean_kl.value,
        "onnx_same_text_as_torch": to_torch.same_text.value,
        "onnx_label_f1_lost_to_torch": f1["torch"] - f1["onnx"],
        "onnx_kl_of_int8_cache": losses["onnx-int8-cache", "onnx"].divergence.mean_kl.value,
        "torch_kl_of_int8_cache": torch_cache.divergence.mean_kl.value,
        "torch_same_text_with_int8_cache": torch_cache.same_text.value,
    }


def measure_imports(path: Path, film: Path) -> dict[str, Value]:
    """Return which packages a fresh process has loaded after `import lite`, and after drafting with either engine.

    Raises:
        LiteError: a process failed.
    """
    torch, onnx = (slim.generate([sys.executable], path, [film], engine=engine) for engine in ("torch", "onnx"))
    return {"lite": torch.after_import, "findings": torch.after_findings, "onnx": onnx.after_findings}


def measure_slim(path: Path, studies: Sequence[Study]) -> dict[str, Value]:
    """Return what an environment without torch takes and imports, and the share of texts that are as in this one.

    Raises:
        LiteError: there is no such environment, or it cannot draft.
    """
    measured = slim.measure_slim(path, [study.path for study in studies])
    same_text = measured.num_equal / len(studies)
    return {"mb": measured.nbytes / 1e6, "imports": measured.run.after_findings, "same_text": same_text}


def measure_ratios(paths: Mapping[str, Path], studies: Sequence[Study]) -> dict[str, Value]:
    """Return ratios of median times: of a decoded token, and of the tower.

    Each film is drafted with each model before the next film, so that whatever slows the machine slows
    all of them; the first film comes twice, and once does not count.
    """
    models = {name: lite.load(paths[name], engine="torch", device="cpu") for name in NEEDS[TIMED]}
    models["onnx"] = lite.load(paths["gptq-int4"], engine="onnx", cache_dtype="float32")
    decode: dict[str, list[float]] = {name: [] for name in models}
    vision: dict[str, list[float]] = {name: [] for name in models}
    for study in (studies[0], *studies):
        for name, model in models.items():
            timings = model.findings(study.image, study.reason).timings
            # A text of one token decodes nothing.
            decode[name].append(statistics.median(timings.decode_steps_s or (0.0,)))
            vision[name].append(timings.vision_s)

    def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
        return statistics.median(seconds[one][1:]) / statistics.median(seconds[other][1:])

    return {
        "int4_over_fp16_decode": ratio(decode, "gptq-int4", "fp16"),
        "int8_over_fp32_vision": ratio(vision, "vision-int8", "fp16"),
        "onnx_over_torch_decode": ratio(decode, "onnx", "gptq-int4"),
    }


def _along_record(model: lite.FindingsModel, studies: Sequence[Study], record: ReferenceRecord) -> DivergenceSummary:
    check_record(record, model.artifact, studies)
    return diverge(model, studies, record, name=model.artifact.path.name)


def _bytes_of(artifact: Artifact, *names: str) -> int:
    parts = artifact.manifest.parts.by_name()
    return sum(parts[name].nbytes for name in names)


def plan_error(model: lite.FindingsModel, findings: Sequence[lite.Findings]) -> float:
    """Return by how much the memory plan misses what decoder and cache took for a batch, as a fraction of that."""
    plan = model.plan.with_rows(findings[0].timings.batch_size)
    decoder: Any = model.decoder  # an engine of ours, which knows its bytes
    took: int = decoder.nbytes + findings[0].memory.cache_bytes
    return (plan.decoder_bytes + plan.cache_bytes) / took - 1.0


def measure(subjects: Sequence[str], artifacts: Path | None) -> dict[str, Value]:
    """Measure some of `SUBJECTS`, each metric under the name of its gate. What fails has none.

    Args:
        subjects: what to measure.
        artifacts: where the artifacts lie, each under its name; None exports them.

    Raises:
        WrongUseError: an artifact is not where it was said to be.
        LiteError: the reference cannot be read.
    """
    studies, record = read_studies(STUDIES), read_record(RECORD)
    paths = find_artifacts(subjects, artifacts)
    special: dict[str, Callable[[], dict[str, Value]]] = {
        ENGINES: lambda: measure_engines(paths["gptq-int4"], studies, record),
        IMPORTS: lambda: measure_imports(paths["gptq-int4"], studies[0].path),
        SLIM: lambda: measure_slim(paths["gptq-int4"], studies),
        TIMED: lambda: measure_ratios(paths, studies),
    }
    values: dict[str, Value] = {}
    for subject in subjects:
        try:
            found = special[subject]() if subject in special else measure_artifact(paths[subject], studies, record)
        except LiteError as error:
            say(f"error: {subject}: {error}")
            continue
        say(f"{subject}: measured")
        values |= {f"{subject}.{metric}": value for metric, value in found.items()}
    return values


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gate",
        description="Export the phantom model in the gated formats, measure it on the CPU, and compare with baselines.",
        epilog="exit status: 0 pass, 1 regression (an export that fails is one), 2 wrong use, 3 no baseline, "
        "130 interrupted.",
    )
    parser.add_argument(
        "--gates", type=Path, default=GATES, metavar="F", help="the baselines (default: benchmarks/gates/gates.toml)"
    )
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR",
        help=f"measure artifacts that lie there, named {', '.join(CANDIDATES)} (default: export them anew)",
    )  # fmt: skip
    exact = [*CANDIDATES, ENGINES, IMPORTS, SLIM]
    parser.add_argument(
        "--only", nargs="+", choices=exact, default=exact, metavar="NAME", help=f"only these: {', '.join(exact)}"
    )
    parser.add_argument("--timed", action="store_true", help="the ratios of times, too")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the gates and their values to a file")
    parser.add_argument("--update", action="store_true", help="put what is measured into the gates file, as baselines")
    return parser


def _json(judged: Sequence[Judged], command: str) -> str:
    rows = [to_json(entry) | {"verdict": entry.verdict} for entry in judged]
    about = {"machine": machine(), "versions": versions(), "command": command}
    return json.dumps({"gates": rows, **about}, indent=1) + "\n"


def _run(arguments: argparse.Namespace, command: str) -> int:
    gates = read_gates(arguments.gates, SUBJECTS)
    check_writable(arguments.json)
    subjects = [subject for subject in SUBJECTS if subject in arguments.only or (subject == TIMED and arguments.timed)]
    values = measure(subjects, arguments.artifacts)
    if arguments.update:
        changes = update_baselines(arguments.gates, values)
        sys.stdout.write("".join(f"{line}\n" for line in changes or ["no baseline changed"]) + "\n")
        gates = read_gates(arguments.gates, SUBJECTS)
    names: list[str] = []
    for subject in subjects:  # one that has neither a value nor a gate has failed, too
        names += dict.fromkeys(name for name in (*gates, *values) if name.startswith(f"{subject}.")) or [subject]
    judged = [Judged(name=name, value=values.get(name), gate=gates.get(name)) for name in names]
    table = markdown_table(("gate", "baseline", "now", "tolerance", "verdict"), [entry.cells for entry in judged])
    other = "".join(f"{entry}\n" for entry in judged if entry.verdict != "pass")
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    sys.stdout.write(f"{table}\n\n{other}machine: {machine()}\nversions: {found}\n")
    if arguments.json is not None:
        write_whole(arguments.json, _json(judged, command))
    verdicts = {entry.verdict for entry in judged}
    return EXIT_REGRESSION if "REGRESSION" in verdicts else EXIT_NO_BASELINE if "no baseline" in verdicts else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    statuses = {NoBaselineError: EXIT_NO_BASELINE, WrongUseError: EXIT_WRONG_USE}
    return run_command(lambda: _run(arguments, command_line("gate", argv)), statuses=statuses)
