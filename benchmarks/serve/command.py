"""What a server withstands: `python -m benchmarks serve ARTIFACT`.

    load       clients that stream, in turns with `findings_batch`: texts, time to the first of it, throughput
    memory     what the server holds over very many requests
    hang-ups   clients that go while they send, wait, or read
    hostile    requests that nobody should answer with anything but a refusal, of every kind
    start      from the process to the first answer, and what was loaded for it
    stop       SIGTERM while requests are under way

The server is the real one, in a process of its own; studies are phantoms with their reasons. A bar that is missed is
wrong: the command ends with 1.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.phantom.write import write_studies
from benchmarks.serve.hostile import measure_hang_ups, measure_hostile
from benchmarks.serve.lifetime import measure_start, measure_stop
from benchmarks.serve.load import measure_load, measure_memory
from benchmarks.speed.harness import Record, Report, kept_apart, run_main
from lite.console import positive
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lite.studies.study import Study

SECTIONS: Final = ("load", "memory", "hang-ups", "hostile", "start", "stop")
SEED: Final = 18
_FEW: Final = 16  # studies of the sections that need no more


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 all well, 1 a bar is missed, 2 wrong use."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="of the phantom model: make demo")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    counts = {
        "studies": (500, "of the load"),
        "rounds": (5, "of the load, in turns"),
        "clients": (32, "at a time"),
        "requests": (2000, "while memory is looked at"),
        "hang-ups": (200, "clients that go"),
        "hostile": (1000, "hostile requests"),
    }
    for name, (count, what) in counts.items():
        parser.add_argument(f"--{name}", type=positive, default=count, metavar="N", help=f"{what} (default: {count})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is random (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document, too")
    return run_main(parser, argv, run)


def run(arguments: argparse.Namespace, record: Record) -> int:
    """Measure what was asked for."""
    record.begin("Clients and server share the machine.")
    artifact, seed, at_a_time = arguments.artifact, arguments.seed, {"clients": arguments.clients}
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        # With DICOM films, which are to be spoilt.
        few = read_studies(write_studies(Path(folder, "few"), count=_FEW, seed=SEED, dicom=True))
        sections: dict[str, Callable[[], Report]] = {
            "load": lambda: measure_load(artifact, _studies(folder, arguments), rounds=arguments.rounds, **at_a_time),
            "memory": lambda: measure_memory(artifact, few, requests=arguments.requests, **at_a_time),
            "hang-ups": lambda: measure_hang_ups(artifact, few, count=arguments.hang_ups, seed=seed, **at_a_time),
            "hostile": lambda: measure_hostile(artifact, few, count=arguments.hostile, seed=seed, **at_a_time),
            "start": lambda: measure_start(artifact),
            "stop": lambda: measure_stop(artifact, few),
        }
        for name in arguments.only:
            report = Report(title=name)
            with kept_apart(report):
                report = sections[name]()
            record.add(name, report)
    return record.end()


def _studies(folder: str, arguments: argparse.Namespace) -> Sequence[Study]:
    return read_studies(write_studies(Path(folder, "all"), count=arguments.studies, seed=SEED + 1, dicom=False))
