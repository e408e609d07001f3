"""What `lite run` costs beside the bare loop: `python -m benchmarks speed cohort ARTIFACT`.

    loop     the same studies by `findings_batch`, its results thrown away, and by `draft_studies` into a journal and
             text files, in turns: what lines, locks and syncs take is the ratio of a round
    command  the whole command on all of them, from PNG and from DICOM films: studies a minute, and the memory that the
             process holds when so many lines are there

The studies are phantoms, in a table with their reasons.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import lite
from benchmarks.phantom.write import write_studies
from benchmarks.speed.harness import Clock, Record, Report, Row, in_turns, run_main, timed
from lite.cohort.run import Extras, draft_studies
from lite.console import positive
from lite.errors import LiteError
from lite.memory.sizes import shown_bytes
from lite.studies.journal import Journal
from lite.studies.sources import read_source
from lite.studies.sources.base import SourceOptions
from lite.studies.sources.listed import read_studies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lite.model import FindingsModel
    from lite.studies.study import Study

BATCH_SIZE: Final = 8
_REQUEST: Final = {"max_new_tokens": None, "rendering": "mimic-cxr-jpg", "any_film": False}
_PAGE_BYTES: Final = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 all well, 1 something is wrong, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed cohort", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="of the phantom model: make demo")
    parser.add_argument("--studies", type=positive, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="of the loop (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON document, too")
    return run_main(parser, argv, run)


def run(arguments: argparse.Namespace, record: Record) -> int:
    """Measure both."""
    record.begin(f"{arguments.studies} phantoms, batches of {BATCH_SIZE}.")
    with tempfile.TemporaryDirectory(prefix="cohort-") as folder:
        work = Path(folder)
        listed = write_studies(work / "films", count=arguments.studies, seed=16, dicom=True)
        tables = {kind: _write_table(listed, work / f"{kind}.csv", kind) for kind in ("png", "dcm")}
        with lite.load(arguments.artifact, rows=BATCH_SIZE) as model:
            record.add(
                "loop", measure_loop(model, read_source(str(tables["png"]), SourceOptions()), arguments.rounds, work)
            )
        record.add("command", measure_command(arguments.artifact, tables, arguments.studies, work))
    return record.end()


def _write_table(listed: Path, table: Path, kind: str) -> Path:
    """Write the studies of a list as a table, by their PNG or DICOM films."""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("study_id", "image", "indication", "findings"))
        for study in read_studies(listed):
            film = study.path.with_suffix(f".{kind}").relative_to(table.parent)
            writer.writerow((study.id, film.as_posix(), study.reason or "", study.reference))
    return table


def measure_loop(model: FindingsModel, studies: Sequence[Study], rounds: int, work: Path) -> Report:
    """Time the bare loop and the run's, in turns, on other studies each round."""
    count = max(BATCH_SIZE, len(studies) // rounds)
    report = Report(title=f"The loop, {count} studies a turn")
    number = {"bare": 0, "run": 0}
    clock = Clock()

    def part(name: str) -> Sequence[Study]:
        start = number[name] * count % max(1, len(studies) - count + 1)
        number[name] += 1
        return studies[start : start + count]

    def bare() -> list[float]:
        chosen = part("bare")
        return timed(lambda: [None for _ in model.findings_batch(chosen, batch_size=BATCH_SIZE)], clock)

    def into_journal() -> list[float]:
        chosen, out = part("run"), work / f"loop-{number['run']}"
        return timed(lambda: _draft(model, chosen, out), clock)

    turns = in_turns({"warm up": bare}, 1) and in_turns({"bare": bare, "run": into_journal}, rounds)
    rows = {name: Row(names={"loop": what}) for name, what in (("bare", "findings_batch"), ("run", "lite run"))}
    rows["run"].against = rows["bare"].names["loop"]
    rows["bare"].took(turns["bare"])
    rows["run"].took(turns["run"], turns["bare"])
    for row in rows.values():
        report.add(row)
    return report


def _draft(model: FindingsModel, studies: Sequence[Study], out: Path) -> None:
    extras = Extras(text_dir=out / "texts")
    with Journal(out / "results.jsonl", studies, artifact_id=model.artifact.id, request=_REQUEST) as journal:
        draft_studies(
            model, studies, journal, request=_REQUEST, batch_size=BATCH_SIZE, extras=extras, told=lambda *_: None
        )
        if len(journal.done) != len(studies):
            raise LiteError(f"got {len(journal.done)} of {len(studies)} studies · expected all · look at {out}")


def measure_command(artifact: Path, tables: dict[str, Path], count: int, work: Path) -> Report:
    """Run the command on all studies, and look at its memory now and then."""
    report = Report(title=f"The command, {count} studies")
    marks = sorted({max(1, count // 10), max(1, count // 2), count})
    for kind, table in tables.items():
        out = work / f"command-{kind}" / "results.jsonl"
        program = [sys.executable, "-m", "lite", "run", str(artifact), str(table), "--out", str(out), "--quiet"]
        started = time.perf_counter()
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
        held: dict[int, int] = {}
        while process.poll() is None:
            done = out.read_bytes().count(b"\n") if out.exists() else 0
            for mark in marks:
                if done >= mark and mark not in held and (rss := _rss_bytes(process.pid)):
                    held[mark] = rss
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        done = out.read_bytes().count(b"\n")
        if process.returncode or done != count:
            report.wrong.append(f"{kind}: exit status {process.returncode}, {done} lines of {count}")
        line = {"films": kind, "studies/min": f"{60 * done / seconds:,.0f}"}
        report.lines.append(line | {f"held at {mark}": shown_bytes(rss) for mark, rss in held.items()})
    return report


def _rss_bytes(pid: int) -> int | None:
    """Return what a process has resident; None where the system does not tell, or it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return None
