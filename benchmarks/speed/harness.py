"""What all measurements of speed have in common: one result, one table, one document, one way to take turns.

What is wrong is not timed: its row says so, and the command ends with 1. Times are medians with p20 and p80, taken in
turns, so that whatever slows the machine down slows all of them, and a ratio is one of medians of the same round. Where
it is known what has to be read, a time stands beside the bytes per second, and their share of a streaming read in the
same run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from lite.bench.machine import machine, versions
from lite.bench.table import markdown_table, to_json
from lite.console import run_command
from lite.errors import LiteError
from lite.eval.figures import Quantiles, quantiles
from lite.files import check_writable, write_whole

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

T = TypeVar("T")
Key = TypeVar("Key")
Rounds: TypeAlias = "list[list[float]]"
"""Seconds, by round."""
NONE: Final = "–"


class Unavailable(Exception):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """Something that this machine cannot run; the message says why, in a few words."""


def reason(error: Exception) -> str:
    """Return why something was not measured, in one line: an error's tensors must not stay alive with it."""
    if isinstance(error, (LiteError, Unavailable)):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"failed ({type(error).__name__}{f': {lines[0]}' if lines else ''})"


# -- Results ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Row:
    """One thing that was measured, or why it was not."""

    names: dict[str, str]  # what it is: its first columns
    time: Quantiles | None = None  # seconds
    nbytes: int | None = None  # read and written in that time
    bandwidth: float | None = None  # bytes per second of a streaming read in this run
    against: str = ""  # what took turns with it
    ratio: Quantiles | None = None  # its time over that one's, round by round
    cells: dict[str, str] = field(default_factory=dict)  # further columns
    figures: dict[str, Any] = field(default_factory=dict)  # for the document
    why: str | None = None  # not measured, or not as it should be
    is_wrong: bool = False  # it computes something else, or has failed

    @property
    def label(self) -> str:
        """What it is, in a sentence."""
        return ", ".join(self.names.values())

    @property
    def bytes_per_s(self) -> float | None:
        """What was read and written in the median time."""
        return None if self.time is None or self.nbytes is None else self.nbytes / self.time.p50

    @property
    def share(self) -> float | None:
        """That, of a streaming read in this run."""
        return None if self.bytes_per_s is None or self.bandwidth is None else self.bytes_per_s / self.bandwidth

    def took(self, rounds: Rounds | str, beside: Rounds | str = "") -> None:
        """Fill in its times, and the ratio to those of `against`, as `in_turns` gives them."""
        if isinstance(rounds, str):
            self.why, self.is_wrong = rounds, True
            return
        self.time = quantiles([*itertools.chain.from_iterable(rounds)])
        if not isinstance(beside, str):
            self.ratio = ratio(rounds, beside)

    def line(self) -> dict[str, str]:
        """Return its line of the table, by column."""
        if self.time is None:
            return {**self.names, "ms": "WRONG" if self.is_wrong else NONE, **self.cells}
        median, low, high = (shown(1e3 * value) for value in (self.time.p50, self.time.p20, self.time.p80))
        line = {**self.names, "ms": median, "p20–p80": f"{low}–{high}"}
        if self.nbytes is not None and self.bytes_per_s is not None:
            line |= {"MB": shown(self.nbytes / 1e6), "GB/s": shown(self.bytes_per_s / 1e9)}
        if self.share is not None:
            line["of bandwidth"] = f"{self.share:.0%}"
        if self.ratio is not None:
            line[f"× {self.against}"] = f"{self.ratio.p50:.2f} ({self.ratio.p20:.2f}–{self.ratio.p80:.2f})"
        return line | self.cells

    def document(self) -> dict[str, Any]:
        """Return it for the document."""
        own = {**asdict(self), "bytes_per_s": self.bytes_per_s, "share": self.share}
        for name in ("names", "figures", "cells", "against"):
            del own[name]
        return {**self.names, **own, **self.figures}


@dataclass(kw_only=True)
class Report:
    """What a section has to say; what it has measured before it fails is kept."""

    title: str
    rows: list[Row] = field(default_factory=list)
    lines: list[dict[str, str]] = field(default_factory=list)  # of a table without times
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # of ours
    why: str | None = None  # not measured, or not to its end

    def add(self, row: Row, *, ours: bool = True) -> None:
        """Put a row into it; what is wrong of a peer is told, and no fault of ours."""
        self.rows.append(row)
        row.is_wrong = row.is_wrong and ours
        if row.is_wrong:
            self.wrong.append(f"{row.label}: {row.why}")

    def bar(self, what: str, bar: str, *, is_met: bool) -> None:
        """Say whether a bar is met; one that is missed is wrong."""
        (self.notes if is_met else self.wrong).append(f"{what}; bar {bar}: {'met' if is_met else 'missed'}")

    def markdown(self) -> str:
        """Return it for people."""
        parts = [f"## {self.title}"]
        lines = self.lines or [row.line() for row in self.rows]
        if lines:
            parts.append(table(lines, left=len(self.rows[0].names) if self.rows else 1))
        whys: dict[str, list[str]] = {}
        for row in self.rows:
            if row.why is not None and f"{row.label}: {row.why}" not in self.wrong:
                whys.setdefault(row.why, []).append(row.label)
        told = [
            f"{labels[0]}{f', and {len(labels) - 1} more' if labels[1:] else ''}: {why}" for why, labels in whys.items()
        ]
        notes = [*self.notes, *told, *(f"WRONG: {line}" for line in self.wrong)]
        if self.why is not None:
            notes.append(f"Not measured{' to the end' if lines else ''}: {self.why}.")
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])

    def document(self) -> dict[str, Any]:
        """Return it for programs."""
        about = {"title": self.title, "why": self.why, "wrong": self.wrong, "notes": self.notes}
        found: dict[str, Any] = to_json(about | self.figures | {"rows": [row.document() for row in self.rows]})
        return found


def table(lines: Sequence[Mapping[str, str]], *, left: int = 1) -> str:
    """Return lines as markdown; the columns are all that any line has, in the order of their first."""
    header = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    return markdown_table(header, [[line.get(column, NONE) for column in header] for line in lines], left=left)


def shown(value: float) -> str:
    """Return four digits, more before the point if it takes them."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# -- Taking turns ----------------------------------------------------------------------------------------------------


class Clock:
    """Tells how long it is from one mark to the next: on a GPU by events on its stream, else by the host's clock."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu
        self._marks: list[Any] = []  # torch's events have no types

    def mark(self) -> None:
        """Note the time; on a GPU that when all before it has ended."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait, return the times between the marks so far, and forget these."""
        marks, self._marks = self._marks, []
        if not self._on_gpu:
            return [end - start for start, end in itertools.pairwise(marks)]
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def timed(run: Callable[[], object], clock: Clock) -> list[float]:
    """Run something once, and return its seconds."""
    clock.mark()
    run()
    clock.mark()
    return clock.seconds()


def in_turns(turns: Mapping[Key, Callable[[], T]], rounds: int) -> dict[Key, list[T] | str]:
    """Give each its turn, round after round.

    Returns:
        What the turns gave, by name; for one that has failed, and is left out from then on, why.
    """
    found: dict[Key, list[T]] = {name: [] for name in turns}
    failed: dict[Key, str] = {}
    for _ in range(rounds):
        for name, turn in turns.items():
            if name not in failed:
                try:
                    found[name].append(turn())
                except Exception as error:  # noqa: BLE001 - whatever is raised is why it is not measured
                    failed[name] = reason(error)
    return found | failed


def ratio(rounds: Rounds, beside: Rounds) -> Quantiles:
    """Divide the medians of each round."""
    pairs = zip(rounds, beside, strict=False)  # the other may have failed in a late round
    return quantiles([statistics.median(own) / statistics.median(other) for own, other in pairs])


# -- The command -----------------------------------------------------------------------------------------------------


def run_main(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, run: Callable[[argparse.Namespace, Record], int]
) -> int:
    """Read the command line and run a command; return its exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    command = shlex.join([*parser.prog.split(), *given])
    return run_command(lambda: run(arguments, Record(command=command, file=arguments.json)))


@dataclass(kw_only=True)
class Record:
    """What a run was, and what it has found so far: printed section by section, and one JSON document."""

    command: str
    file: Path | None
    about: dict[str, Any] = field(default_factory=dict)  # beside machine, versions and command
    reports: dict[str, Report] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_writable(self.file)
        self.about = {"machine": machine(), "versions": versions(), "command": self.command}

    def begin(self, *notes: str, **about: Any) -> None:
        """Say what is measured on, and with what."""
        self.about |= about
        listed = ", ".join(f"{name} {version}" for name, version in self.about["versions"].items())
        lines = (f"Machine: {self.about['machine']}.", f"Versions: {listed}.", f"Command: `{self.command}`.", *notes)
        sys.stdout.write("\n".join(f"- {line}" for line in lines) + "\n\n")

    def add(self, name: str, report: Report) -> None:
        """Print a section, and write all so far."""
        self.reports[name] = report
        sys.stdout.write(report.markdown() + "\n\n")
        sys.stdout.flush()
        if self.file is not None:
            sections = {name: report.document() for name, report in self.reports.items()}
            document = to_json(self.about) | {"sections": sections}
            write_whole(self.file, json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def end(self) -> int:
        """Say what is wrong; return the exit status."""
        wrong = [line for report in self.reports.values() for line in report.wrong]
        if wrong:
            sys.stdout.write(f"{len(wrong)} of ours wrong: {'; '.join(wrong)}.\n")
        return 1 if wrong else 0


@contextlib.contextmanager
def kept_apart(report: Report) -> Iterator[None]:
    """Note in a report why its section ends before its time; the others go on."""
    try:
        yield
    except Unavailable as error:
        report.why = str(error)
    except Exception as error:  # noqa: BLE001 - the other sections go on
        sys.stderr.write(traceback.format_exc())
        report.why = reason(error)
        report.wrong.append(f"{report.title}: {report.why}")
