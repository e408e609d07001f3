"""The gate, `python -m benchmarks gate`: does today's code still export, compute and load as its baselines say?

    checkpoint ──the exporter's command line──▶ artifacts ─┬───────────────────────▶ bytes, memory plan, imports
                                                           ├─ torch beside onnx ───▶ KL, equal texts
                                                           ├─ without torch ───────▶ MB of an environment, equal texts
    benchmarks/references ─┬─ films ───────────────────────┼─ drafted freely ──────▶ label F1 against the reports
                           └─ fp16 record ─────────────────┴─ along its texts ─────▶ KL, same top token
                                                                        │
    gates.toml ─────────── baseline, tolerance, what is worse ──────────┴──────────▶ pass, REGRESSION, no baseline

The exact gates depend on no clock and run wherever there is a CPU, on which everything is computed. The timed ones are
ratios within one run, its artifacts taking turns film by film, and are asked for with `--timed`.

Baselines change in a commit that says why: `--update` rewrites their numbers, and nothing else of the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import lite
from benchmarks.demo import CALIBRATION_SEED, CHECKPOINT, NUM_CALIBRATION_FILMS, ROOT, TOKEN_WEIGHTS
from benchmarks.gates import slim
from benchmarks.phantom.write import write_studies
from benchmarks.quality.engines import Compared, compare_drafts, draft_in_turns, load_engines
from benchmarks.quality.formats import Row, Setting, export_command, measured_run
from lite.artifact.manifest import ONNX_DATA_NAME, ONNX_EMBEDDINGS_NAME, ONNX_GRAPH_NAMES, VISION_NAME
from lite.artifact.open import Artifact
from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.errors import LiteError
from lite.eval.divergence import DivergenceSummary, summarise
from lite.eval.labels import read_labels
from lite.eval.metrics import Readings, label_f1
from lite.eval.record import ReferenceRecord, check_record, read_record
from lite.memory.plan import plan_memory
from lite.studies.readers import read_studies, sha256_of_studies
from lite.studies.study import Study

if TYPE_CHECKING:
    from lite.engines.torch_engine.decoder import LlamaDecoder

GATES: Final = Path(__file__).with_name("gates.toml")
STUDIES: Final = ROOT / "benchmarks" / "references" / "phantom" / "studies.json"
RECORD: Final = ROOT / "benchmarks" / "references" / "phantom_fp16.json"
OUT: Final = ROOT / "build" / "gate"

_WEIGHTS: Final = ("--token-weights", TOKEN_WEIGHTS)
CANDIDATES: Final = {
    row.name: row
    for row in (
        Row(name="fp16", options=("--decoder", "fp16")),
        Row(name="gptq-int8", options=("--decoder", "gptq-int8", *_WEIGHTS), calibrated=True),
        Row(name="gptq-int4", options=("--decoder", "gptq-int4", "--engine", "onnx", *_WEIGHTS), calibrated=True),
        Row(name="bnb-nf4", options=("--decoder", "bnb-nf4")),
        Row(name="vision-int8", options=("--decoder", "fp16", "--vision", "int8")),
    )
}
ARTIFACT_METRICS: Final = ("bytes", "mean_kl", "same_top", "label_f1_micro", "plan_error")
# What is measured beside: its metrics, and the artifacts that it needs.
ENGINES, IMPORTS, SLIM, TIMED = "gptq-int4-engines", "imports", "slim", "timed"
OTHER_METRICS: Final = {
    ENGINES: (
        *("onnx_bytes", "onnx_mean_kl", "onnx_same_top", "onnx_label_f1_micro"),
        *("onnx_kl_to_torch", "onnx_same_text_as_torch", "onnx_label_f1_lost_to_torch", "onnx_kl_of_int8_cache"),
        *("torch_kl_of_int8_cache", "torch_same_text_with_int8_cache"),
    ),
    IMPORTS: ("lite", "findings", "onnx"),
    SLIM: ("mb", "imports", "same_text"),
    TIMED: ("int4_over_fp16_decode", "int8_over_fp32_vision", "onnx_over_torch_decode"),
}
NEEDS: Final = {
    ENGINES: ("gptq-int4",),
    IMPORTS: ("fp16", "gptq-int4"),
    SLIM: ("gptq-int4",),
    TIMED: ("fp16", "gptq-int4", "vision-int8"),
}
METRICS: Final = dict.fromkeys(CANDIDATES, ARTIFACT_METRICS) | OTHER_METRICS

EXIT_REGRESSION, EXIT_WRONG_USE, EXIT_NO_BASELINE, EXIT_INTERRUPTED = 1, 2, 3, 130

Value: TypeAlias = float | tuple[str, ...]  # a number, or names


class WrongUseError(LiteError):
    """A gates file, or a folder of artifacts, that cannot be used."""


class NoBaselineError(LiteError):
    """Nothing to compare with: there is no gates file, or no reference record."""


# -- Gates -----------------------------------------------------------------------------------------------------------

_TOLERANCE: Final = re.compile(r"(?P<direction>[-+±])(?P<size>\d+(?:\.\d+)?(?:e-\d+)?)(?P<percent> %)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One table of the gates file: what a metric was, and how far it may go in the direction that is worse."""

    name: str  # "gptq-int4.mean_kl"
    baseline: Value
    # "+50 %" may rise by half, "-0.01" may fall by 0.01, "±64" neither rise nor fall by more. Of names it counts those
    # that are new, and those that are gone.
    tolerance: str

    def passes(self, value: Value) -> bool:
        """Say whether a value is within the tolerance, or on the side that is not worse."""
        direction, size, percent = _tolerance(self.tolerance)
        allowed = float(size)
        if isinstance(self.baseline, tuple) and isinstance(value, tuple):
            new, gone = _difference(self.baseline, value)
            up, down = float(len(new)), float(len(gone))
        elif isinstance(self.baseline, tuple) or isinstance(value, tuple):
            return False
        else:
            up, down = value - self.baseline, self.baseline - value
            allowed *= abs(self.baseline) / 100 if percent else 1
        # Not "more than allowed": a NaN passes nowhere.
        return (direction == "-" or up <= allowed) and (direction == "+" or down <= allowed)


def _tolerance(text: str) -> tuple[str, str, str]:
    """Split a tolerance into direction, size and percent sign.

    Raises:
        ValueError: it is none.
    """
    parts = _TOLERANCE.fullmatch(text)
    if parts is None:
        raise ValueError(f'got the tolerance "{text}" · expected one such as "+50 %", "-0.01" or "±64"')
    return parts["direction"], parts["size"], parts["percent"] or ""


def _difference(before: Sequence[str], now: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names that are new, and those that are gone."""
    return sorted(set(now) - set(before)), sorted(set(before) - set(now))


def read_gates(path: Path) -> dict[str, Gate]:
    """Read a gates file: a table for each gate, named by what is measured and the metric.

    Raises:
        NoBaselineError: there is no such file.
        WrongUseError: it is not TOML, a table is no gate, or names something that is not measured.
    """
    try:
        subjects = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path}: got no gates file · expected baselines to compare with · check --gates"
        raise NoBaselineError(msg) from error
    except (OSError, ValueError) as error:
        raise WrongUseError(f"{path}: got a file that cannot be read ({error}) · expected TOML · correct it") from error
    gates = {}
    for subject, metrics in subjects.items():
        for metric, table in metrics.items() if isinstance(metrics, dict) else (("", None),):
            name = f"{subject}.{metric}"
            try:
                if metric not in METRICS.get(subject, ()):
                    known = "; ".join(f"{subject}: {', '.join(metrics)}" for subject, metrics in METRICS.items())
                    raise ValueError(f"got a gate of something that is not measured · measured are {known}")
                gates[name] = _read_gate(name, table)
            except ValueError as error:
                raise WrongUseError(f"{path}: [{name}]: {error} · correct it") from error
    return gates


def _read_gate(name: str, table: object) -> Gate:
    if not isinstance(table, dict) or table.keys() != {"baseline", "tolerance"}:
        raise ValueError("got other keys, or none · expected a baseline and a tolerance")
    baseline, tolerance = table["baseline"], table["tolerance"]
    if isinstance(baseline, list) and all(isinstance(entry, str) for entry in baseline):
        baseline = tuple(baseline)
    elif type(baseline) not in (int, float):
        raise ValueError(f"got the baseline {baseline!r} · expected a number, or a list of names")
    _tolerance(str(tolerance))
    return Gate(name=name, baseline=baseline, tolerance=str(tolerance))


def update_baselines(path: Path, values: Mapping[str, Value | None]) -> list[str]:
    """Put measured values into a gates file in the place of its baselines; return a line for each that changed.

    Only the lines `baseline = …` of the tables concerned change. A value without a table is left alone, and so is a
    table whose value could not be measured.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    changes = []
    name = ""
    for number, line in enumerate(lines):
        if header := re.fullmatch(r"\[(\S+)\]", line.strip()):
            name = header[1]
        found, value = re.fullmatch(r"baseline = (.*?)(\s*#.*)?", line), values.get(name)
        if found and value is not None and found[1] != (new := toml(value)):
            lines[number] = f"baseline = {new}{found[2] or ''}"
            changes.append(f"{name}: {found[1]} → {new}")
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return changes


def toml(value: Value) -> str:
    """Return a value as it stands in a gates file, on one line; numbers that are not whole to four digits."""
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return str(value) if isinstance(value, int) else f"{value:#.4g}"


# -- Measuring -------------------------------------------------------------------------------------------------------


def export_candidates(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Export candidates to `folder`, each by the command that a user would type; where one fails there is nothing."""
    # With what an earlier run has left, whole or in parts, other code would be measured.
    shutil.rmtree(folder, ignore_errors=True)
    setting = Setting(
        checkpoint=CHECKPOINT / "llava-rad-phantom",
        base=CHECKPOINT / "base",
        held_out=STUDIES,
        calibration=write_studies(
            folder / "calibration", count=NUM_CALIBRATION_FILMS, seed=CALIBRATION_SEED, dicom=False
        ),
        artifacts=folder,
        device="cpu",
        keep=True,
    )
    for name in names:
        try:
            cost = measured_run(export_command(CANDIDATES[name], setting, folder / name))
            _say(f"{name}: exported in {cost.seconds:.0f} s")
        except LiteError as error:
            _say(f"error: {name}: {error}")
    return {name: folder / name for name in names}


def given_artifacts(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the artifacts that lie in `folder`, by name.

    Raises:
        WrongUseError: one is not there.
    """
    paths = {name: folder / name for name in names}
    for name, path in paths.items():
        if not path.is_dir():
            msg = f"{path}: got no such folder · expected the artifact {name} · export it, or leave it out with --only"
            raise WrongUseError(msg)
    return paths


def measure_artifact(path: Path, studies: Sequence[Study], record: ReferenceRecord) -> dict[str, Value]:
    """Measure everything exact about one artifact with torch, in the order of `ARTIFACT_METRICS`."""
    model = lite.load(path, engine="torch", device="cpu")
    divergence = _along_record(model, studies, record)
    drafts = _draft(model, studies)
    values: tuple[Value, ...] = (
        _bytes_of(model.artifact, lambda name: name == VISION_NAME or name.startswith("decoder/")),
        divergence.mean_kl.value,
        divergence.same_top.value,
        label_f1(_truth(studies), [read_labels(draft.text) for draft in drafts]).micro.value,
        planned_bytes(model, drafts) / held_bytes(cast("LlamaDecoder", model.decoder), drafts) - 1.0,
    )
    return dict(zip(ARTIFACT_METRICS, values, strict=True))


def measure_engines(path: Path, studies: Sequence[Study], record: ReferenceRecord) -> dict[str, Value]:
    """Measure the onnx engine beside the record and beside torch, and the int8 caches of both, on one artifact."""
    model = lite.load(path, engine="onnx")
    divergence = _along_record(model, studies, record)
    compared = compare_batches(path, studies)
    of_torch, of_torch_cache = compared.pair("onnx", "torch"), compared.pair("torch-int8-cache", "torch")
    torch_f1, onnx_f1 = (compared.engine(name).label_f1.value for name in ("torch", "onnx"))
    files = {*ONNX_GRAPH_NAMES.values(), ONNX_DATA_NAME, ONNX_EMBEDDINGS_NAME}
    values: tuple[Value, ...] = (
        _bytes_of(model.artifact, files.__contains__),
        divergence.mean_kl.value,
        divergence.same_top.value,
        onnx_f1,
        of_torch.divergence.mean_kl.value,
        of_torch.same_text.value,
        torch_f1 - onnx_f1,
        compared.pair("onnx-int8-cache", "onnx").divergence.mean_kl.value,
        of_torch_cache.divergence.mean_kl.value,
        of_torch_cache.same_text.value,
    )
    return dict(zip(OTHER_METRICS[ENGINES], values, strict=True))


def compare_batches(path: Path, studies: Sequence[Study]) -> Compared:
    """Compare the engines without regard to time: each drafts all studies at once."""
    models = load_engines(path)
    drafts = {name: _draft(model, studies) for name, model in models.items()}
    return compare_drafts(models, drafts, studies, _truth(studies))


def _along_record(model: lite.FindingsModel, studies: Sequence[Study], record: ReferenceRecord) -> DivergenceSummary:
    check_record(record, model.artifact, sha256_of_studies(studies))
    return summarise(
        [
            record.compare(index, model.score(study.image, record.token_ids(index), study.reason))
            for index, study in enumerate(studies)
        ]
    )


def _truth(studies: Sequence[Study]) -> list[Readings]:
    return [read_labels(study.reference or "") for study in studies]


def _bytes_of(artifact: Artifact, counts: Callable[[str], bool]) -> int:
    return sum(record.bytes for name, record in artifact.manifest.files.items() if counts(name))


def _draft(model: lite.FindingsModel, studies: Sequence[Study]) -> list[lite.Findings]:
    """Draft all studies in one batch: its cache is then the only one."""
    drafts = []
    for draft in model.findings_batch([(study.image, study.reason) for study in studies], batch_size=len(studies)):
        if isinstance(draft, lite.StudyError):
            raise draft.error
        drafts.append(draft)
    return drafts


def planned_bytes(model: lite.FindingsModel, drafts: Sequence[lite.Findings]) -> int:
    """Return what the memory plan says of decoder and cache, for the batch that was drafted."""
    limit = model.artifact.manifest.decoding.max_new_tokens
    num_prompt_tokens = drafts[0].num_prompt_tokens
    if len(drafts) > 1:  # the rows of a batch are as long as most studies need, whatever these are
        num_prompt_tokens = max(*(draft.num_prompt_tokens for draft in drafts), model.row_len(limit) - limit)
    plan = plan_memory(model.artifact, device="cpu", batch_size=len(drafts), num_prompt_tokens=num_prompt_tokens)
    return plan.decoder_bytes + plan.cache_bytes


def held_bytes(decoder: LlamaDecoder, drafts: Sequence[lite.Findings]) -> int:
    """Return what decoder and cache really took."""
    return decoder.nbytes + drafts[0].memory.cache_bytes


def measure_imports(paths: Mapping[str, Path], film: Path) -> dict[str, Value]:
    """Return which packages a fresh process has loaded after `import lite`, and after drafting with either engine.

    Raises:
        LiteError: a process failed.
    """
    torch = slim.run_probe([sys.executable], paths["fp16"], film, engine="torch", cwd=ROOT)
    onnx = slim.run_probe([sys.executable], paths["gptq-int4"], film, engine="onnx", cwd=ROOT)
    values = torch.after_import, torch.after_findings, onnx.after_findings
    return dict(zip(OTHER_METRICS[IMPORTS], values, strict=True))


def measure_slim(path: Path, studies: Sequence[Study]) -> dict[str, Value]:
    """Return what an environment without torch takes and imports, and the share of texts that are as in this one.

    Raises:
        LiteError: there is no such environment, or it cannot draft.
    """
    measured = slim.measure_slim(path, [study.path for study in studies])
    values: tuple[Value, ...] = measured.nbytes / 1e6, measured.probe.after_findings, measured.same_text
    return dict(zip(OTHER_METRICS[SLIM], values, strict=True))


def measure_ratios(paths: Mapping[str, Path], studies: Sequence[Study]) -> dict[str, Value]:
    """Return ratios of median times.

    They are a decoded token of gptq-int4 over fp16, the tower in int8 over fp32, and a decoded token of gptq-int4 by
    onnx over torch.
    """
    models = {name: lite.load(paths[name], engine="torch", device="cpu") for name in NEEDS[TIMED]}
    models["onnx"] = lite.load(paths["gptq-int4"], engine="onnx")
    drafts = draft_in_turns(models, studies)
    decode, vision = (
        {name: statistics.median(seconds(draft) for draft in found) for name, found in drafts.items()}
        for seconds in (_decode_token_s, lambda draft: draft.timings.vision_s)
    )
    values = (
        decode["gptq-int4"] / decode["fp16"],
        vision["vision-int8"] / vision["fp16"],
        decode["onnx"] / decode["gptq-int4"],
    )
    return dict(zip(OTHER_METRICS[TIMED], values, strict=True))


def _decode_token_s(draft: lite.Findings) -> float:
    # A text of one token decodes nothing.
    return statistics.median(draft.timings.decode_steps_s or (0.0,))


# -- Command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A measured value beside its gate."""

    name: str
    value: Value | None  # None: it could not be measured
    gate: Gate | None

    @property
    def verdict(self) -> str:
        """What came of it."""
        if self.value is None:
            return "REGRESSION"
        if self.gate is None:
            return "no baseline"
        return "pass" if self.gate.passes(self.value) else "REGRESSION"

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The gate, the baseline, the value, the tolerance, the verdict."""
        if self.gate is None:
            return self.name, "–", _shown(self.value), "–", self.verdict
        now = _shown(self.value)
        if isinstance(self.value, tuple) and isinstance(self.gate.baseline, tuple):
            new, gone = _difference(self.gate.baseline, self.value)
            now = " ".join([now, *(f"+{name}" for name in new), *(f"-{name}" for name in gone)])
        return self.name, _shown(self.gate.baseline), now, self.gate.tolerance, self.verdict

    def __str__(self) -> str:
        """Return metric, old, new and tolerance on one line."""
        name, old, new, tolerance, verdict = self.cells
        return f"{verdict}: {name} was {old}, is {new}, tolerance {tolerance}"


def _shown(value: Value | None) -> str:
    if value is None:
        return "failed"
    if isinstance(value, tuple):
        return f"{len(value)} package{'' if len(value) == 1 else 's'}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _say(text: str) -> None:
    """Tell how far it is: the table comes at the end."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def measure(subjects: Sequence[str], artifacts: Path | None) -> dict[str, Value | None]:
    """Measure subjects of `METRICS`, each metric under the name of its gate; None where that failed.

    Args:
        subjects: what to measure.
        artifacts: where the artifacts lie, each under its name; None exports them.

    Raises:
        WrongUseError: an artifact is not where it was said to be.
        LiteError: the reference cannot be read.
    """
    studies, record = read_studies(STUDIES), read_record(RECORD)
    needed = {name for subject in subjects for name in NEEDS.get(subject, (subject,))}
    names = [name for name in CANDIDATES if name in needed]
    paths = export_candidates(names, OUT) if artifacts is None else given_artifacts(names, artifacts)
    film = studies[0].path
    special: dict[str, Callable[[], dict[str, Value]]] = {
        ENGINES: lambda: measure_engines(paths["gptq-int4"], studies, record),
        IMPORTS: lambda: measure_imports(paths, film),
        SLIM: lambda: measure_slim(paths["gptq-int4"], studies),
        TIMED: lambda: measure_ratios(paths, studies),
    }
    values: dict[str, Value | None] = {}
    for subject in subjects:
        found: Mapping[str, Value | None] = dict.fromkeys(METRICS[subject])
        try:
            found = special[subject]() if subject in special else measure_artifact(paths[subject], studies, record)
            _say(f"{subject}: measured")
        except LiteError as error:
            _say(f"error: {subject}: {error}")
        values |= {f"{subject}.{metric}": value for metric, value in found.items()}
    return values


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


def _json(judged: Sequence[Judged], command: str) -> dict[str, Any]:
    rows = [
        {
            "name": entry.name,
            "baseline": to_json(entry.gate.baseline) if entry.gate else None,
            "value": to_json(entry.value),
            "tolerance": entry.gate.tolerance if entry.gate else None,
            "verdict": entry.verdict,
        }
        for entry in judged
    ]
    return {"gates": rows, "machine": machine(), "versions": versions(), "command": command}


def _run(arguments: argparse.Namespace, command: str) -> int:
    gates = read_gates(arguments.gates)
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise WrongUseError(f"{arguments.json}: got no such folder · expected one to write to · make it first")
    if not RECORD.is_file():
        msg = f"{RECORD}: got no such file · expected the fp16 reference record · check out the whole repository"
        raise NoBaselineError(msg)
    subjects = [subject for subject in METRICS if subject in arguments.only or (subject == TIMED and arguments.timed)]
    values = measure(subjects, arguments.artifacts)
    if arguments.update:
        changes = update_baselines(arguments.gates, values)
        sys.stdout.write("".join(f"{line}\n" for line in changes or ["no baseline changed"]) + "\n")
        gates = read_gates(arguments.gates)
    judged = [Judged(name=name, value=value, gate=gates.get(name)) for name, value in values.items()]
    _print(judged)
    if arguments.json is not None:
        arguments.json.write_text(f"{json.dumps(_json(judged, command), indent=1)}\n", encoding="utf-8")
    verdicts = {entry.verdict for entry in judged}
    return EXIT_REGRESSION if "REGRESSION" in verdicts else EXIT_NO_BASELINE if "no baseline" in verdicts else 0


def _print(judged: Sequence[Judged]) -> None:
    table = markdown_table(("gate", "baseline", "now", "tolerance", "verdict"), [entry.cells for entry in judged])
    failing = "".join(f"{entry}\n" for entry in judged if entry.verdict != "pass")
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    sys.stdout.write(f"{table}\n\n{failing}machine: {machine()}\nversions: {found}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks", "gate", *(sys.argv[1:] if argv is None else argv)])
    try:
        return _run(arguments, command)
    except LiteError as error:
        _say(f"error: {error}")
        return {NoBaselineError: EXIT_NO_BASELINE, WrongUseError: EXIT_WRONG_USE}.get(type(error), EXIT_REGRESSION)
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
