"""The command line: `python -m benchmarks hostile`, spoilt inputs first, then programs that are killed.

Every input is read in a child that is bounded (`child`). It is read, or refused by one of this project's errors;
anything else is a failure: another error, a crash, a hang, memory above the bound, code of the input run, a file opened
that the input names. An input is told by its kind and seed, and `--replay KIND:SEED` writes it again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.commands import command_line
from benchmarks.exports import Recipe, Source, measured_run
from benchmarks.hostile.checkpoints import BASE, CHECKPOINT, HOSPITAL
from benchmarks.hostile.child import EXTRA_BYTES, SECONDS, Watch
from benchmarks.hostile.kills import Cohort, Killed, exports
from benchmarks.hostile.kinds import KINDS, input_folder
from benchmarks.hostile.material import Material
from benchmarks.phantom.write import write_studies
from lite.bench.table import markdown_table
from lite.console import positive, print_line, run_command, say
from lite.errors import LiteError
from lite.memory.sizes import shown_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_RTN: Final = Recipe(
    name="rtn", options=("--decoder", "gptq-int4", "--group-size", "64", "--method", "rtn", "--engine", "onnx")
)
_SHOWN_FAILURES: Final = 20


@dataclasses.dataclass(slots=True)
class Count:
    """How the inputs of a kind have ended."""

    read: int = 0
    refused: int = 0
    failures: dict[str, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    @property
    def total(self) -> int:
        """All inputs of the kind."""
        return self.read + self.refused + sum(map(len, self.failures.values()))


def spoil(
    material: Material, kinds: Sequence[str], seeds: Iterable[int], work: Path, *, ends: Callable[[], bool]
) -> dict[str, Count]:
    """Read an input of each kind for each seed, in turns, until there are no more or it is time."""
    watch = Watch(work / "outside")
    counts = {kind: Count() for kind in kinds}
    for seed, kind in ((seed, kind) for seed in seeds for kind in kinds):  # `product` would wait for the last seed
        if ends():
            break
        with input_folder(work) as folder:
            outcome = watch.read(KINDS[kind](material, random.Random(f"{kind}:{seed}"), folder))
        if outcome.ending == "read":
            counts[kind].read += 1
        elif outcome.ending == "refused":
            counts[kind].refused += 1
        else:
            counts[kind].failures[outcome.why].append(seed)
    return counts


def kill(work: Path, material: Material, *, seed: int, most: int, ends: Callable[[], bool]) -> list[Killed]:
    """Kill exports and a cohort in turns, `most` times in all or until it is time."""
    rng = random.Random(f"kill:{seed}")
    cohort = Cohort("lite run", material.artifact, material.studies, work / "run" / "results.jsonl")
    killing = [cohort, *exports(work, material.studies)]
    for number in itertools.count():
        if ends() or sum(program.killed.kills for program in killing) >= most:
            break
        killing[number % len(killing)].kill_once(rng)
    return [program.killed for program in killing]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 no failure, 1 a failure, 2 wrong use."""
    parser = _parser()
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options, argv))


def _run(options: argparse.Namespace, argv: Sequence[str] | None) -> int:
    _load_modules()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        work = Path(folder)
        material = _material(work)
        if options.replay:
            return _replay(options.replay, material, options.out)
        print_line(f"# {command_line('hostile', argv)}")
        until = _time_limit(options.minutes)
        seeds = range(options.seed, options.seed + options.inputs) if options.inputs else itertools.count(options.seed)
        counts = spoil(material, options.kinds, seeds, work, ends=until)
        print_line(_table(counts))
        killed = []
        if options.kills:
            until = _time_limit(options.minutes)
            killed = kill(work / "killed", material, seed=options.seed, most=options.kills, ends=until)
            print_line(_kill_table(killed))
    failures = list(_failures(counts, killed))
    for line in failures[:_SHOWN_FAILURES]:
        print_line(line)
    return bool(failures)


def _load_modules() -> None:
    """Load what the children need, once: a fork has it."""
    import onnx
    import onnxruntime
    import pydicom
    import safetensors.torch
    import torch
    from PIL import Image

    for module in ("export.adapter", "lite.engines.onnx_engine.decoder", "lite.engines.torch_engine.load"):
        importlib.import_module(module)
    Image.init()
    torch.set_num_threads(1)  # a fork has no other threads
    del onnx, onnxruntime, pydicom, safetensors


def _material(work: Path) -> Material:
    say("exporting a small artifact and drawing films ...")
    studies = write_studies(work / "studies", count=4, seed=1, dicom=True)
    Source(verify=studies, calibration=studies, device="cpu").export(_RTN, work / "artifact")
    predictions = work / "predictions.jsonl"
    predict = [sys.executable, "-m", "lite", "run", str(work / "artifact"), str(studies), "--out", str(predictions)]
    measured_run([*predict, "--max-new-tokens", "4"])
    add = [
        sys.executable,
        "-m",
        "export",
        "adapter",
        str(HOSPITAL),
        "--artifact",
        str(work / "artifact"),
        "--name",
        "n",
    ]
    add += ["--base", str(BASE), "--published", str(CHECKPOINT), "--out", str(work / "adapted"), "--keep-anyway"]
    measured_run([*add, "--verify-studies", "1", "--verify-tokens", "4", "--device", "cpu", "--quiet"])
    artifacts = {name: work / name for name in ("artifact", "adapted")}
    return Material(**artifacts, studies=studies, predictions=predictions)


def _time_limit(minutes: float | None) -> Callable[[], bool]:
    end = None if minutes is None else time.monotonic() + 60 * minutes
    return lambda: end is not None and time.monotonic() >= end


def _replay(named: str, material: Material, out: Path) -> int:
    """Write an input into `out` and read it here, without a child around it."""
    kind, _, seed = named.partition(":")
    if kind not in KINDS or not seed.isdecimal():
        msg = f"got {named!r} · expected KIND:SEED with a kind of {', '.join(KINDS)} · copy it from a table"
        raise LiteError(msg)
    out.mkdir(parents=True, exist_ok=True)
    say(f"{named}: the input is in {out}")
    KINDS[kind](material, random.Random(f"{kind}:{seed}"), out)()
    print_line("it was read")
    return 0


def _table(counts: dict[str, Count]) -> str:
    rows = [
        [
            kind,
            f"{count.total:,}",
            f"{count.read:,}",
            f"{count.refused:,}",
            f"{sum(map(len, count.failures.values())):,}",
        ]
        for kind, count in counts.items()
    ]
    total = [sum(int(row[column].replace(",", "")) for row in rows) for column in range(1, 5)]
    return markdown_table(
        ["kind", "inputs", "read", "refused", "failures"], [*rows, ["all", *(f"{n:,}" for n in total)]]
    )


def _kill_table(killed: Sequence[Killed]) -> str:
    rows = [[one.name, f"{one.kills:,}", f"{one.finished:,}", f"{len(one.failures):,}"] for one in killed]
    return markdown_table(["program", "kills", "finished after", "failures"], rows)


def _failures(counts: dict[str, Count], killed: Sequence[Killed]) -> Iterator[str]:
    for kind, count in counts.items():
        for why, seeds in sorted(count.failures.items(), key=lambda item: -len(item[1])):
            yield f"FAILURE {kind}:{seeds[0]} ({len(seeds)} inputs): {why}"
    for one in killed:
        for why in one.failures:
            yield f"FAILURE killed {one.name}: {why}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks hostile",
        description="Read spoilt films, artifacts, checkpoints, adapters and lists, each in a child that may take "
        f"{SECONDS} s and {shown_bytes(EXTRA_BYTES)}; then kill exports and a cohort at random points. What is neither "
        "read nor refused with words is a failure.",
        epilog="exit status: 0 no failure, 1 there is one, 2 wrong use, 130 interrupted.",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--inputs", type=positive, metavar="N", help="inputs of each kind (default: until it is time)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="kill programs N times (default: none)")
    parser.add_argument("--minutes", type=float, metavar="M", help="for inputs, and again for kills")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first input (default: %(default)s)")
    parser.add_argument("--replay", metavar="KIND:SEED", help="write this input and read it, without a child")
    parser.add_argument("--out", type=Path, default=Path("hostile-input"), metavar="DIR", help="where --replay writes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
