"""Baselines, and what is worse than they are: the tables of `gates.toml`."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from lite.errors import LiteError
from lite.files import write_whole

Value: TypeAlias = float | tuple[str, ...]  # a number, or names
Verdict: TypeAlias = Literal["pass", "better", "REGRESSION", "no baseline"]

_TOLERANCE: Final = re.compile(r"(?P<direction>[-+±])(?P<size>\d+(?:\.\d+)?(?:e-\d+)?)(?P<percent> %)?")


class WrongUseError(LiteError):
    """A gates file, or a folder of artifacts, that cannot be used."""


class NoBaselineError(LiteError):
    """Nothing to compare with: there is no gates file, or no reference record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One table of the gates file: what a metric was, and how far it may go in the direction that is worse."""

    baseline: Value
    # "+50 %" may rise by half, "-0.01" may fall by 0.01, "±64" neither rise nor fall by more. Of names it counts those
    # that are new, and those that are gone.
    tolerance: str

    def judge(self, value: Value) -> Verdict:
        """Say whether a value is within the tolerance; "better" is as far off on the side that is not worse."""
        direction, size, percent = _tolerance(self.tolerance)
        allowed = float(size)
        if isinstance(self.baseline, tuple) and isinstance(value, tuple):
            new, gone = difference(self.baseline, value)
            up, down = float(len(new)), float(len(gone))
        elif isinstance(self.baseline, tuple) or isinstance(value, tuple):
            return "REGRESSION"
        else:
            up, down = value - self.baseline, self.baseline - value
            allowed *= abs(self.baseline) / 100 if percent else 1
        # Not "more than allowed": a NaN passes nowhere.
        within = (direction == "-" or up <= allowed) and (direction == "+" or down <= allowed)
        return ("better" if max(up, down) > allowed else "pass") if within else "REGRESSION"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A measured value beside its gate."""

    name: str  # "gptq-int4.mean_kl"
    value: Value | None  # None: it could not be measured
    gate: Gate | None

    @property
    def verdict(self) -> Verdict:
        """What came of it."""
        if self.value is None:
            return "REGRESSION"
        return "no baseline" if self.gate is None else self.gate.judge(self.value)

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """The gate, the baseline, the value, the tolerance, the verdict."""
        now = _shown(self.value)
        if self.gate is None:
            return self.name, "–", now, "–", self.verdict
        if isinstance(self.value, tuple) and isinstance(self.gate.baseline, tuple):
            new, gone = difference(self.gate.baseline, self.value)
            now = " ".join([now, *(f"+{name}" for name in new), *(f"-{name}" for name in gone)])
        return self.name, _shown(self.gate.baseline), now, self.gate.tolerance, self.verdict

    def __str__(self) -> str:
        """Return metric, old, new and tolerance on one line."""
        name, old, new, tolerance, verdict = self.cells
        return f"{verdict}: {name} was {old}, is {new}, tolerance {tolerance}"


def _tolerance(text: str) -> tuple[str, str, str]:
    """Split a tolerance into direction, size and percent sign.

    Raises:
        ValueError: it is none.
    """
    parts = _TOLERANCE.fullmatch(text)
    if parts is None:
        raise ValueError(f'got the tolerance "{text}" · expected one such as "+50 %", "-0.01" or "±64"')
    return parts["direction"], parts["size"], parts["percent"] or ""


def difference(before: Sequence[str], now: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names that are new, and those that are gone."""
    return sorted(set(now) - set(before)), sorted(set(before) - set(now))


def _shown(value: Value | None) -> str:
    if value is None:
        return "failed"
    if isinstance(value, tuple):
        return f"{len(value)} package{'' if len(value) == 1 else 's'}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def read_gates(path: Path, subjects: Collection[str]) -> dict[str, Gate]:
    """Read a gates file: a table for each gate, named by what is measured and the metric.

    Args:
        path: the file.
        subjects: what can be measured.

    Raises:
        NoBaselineError: there is no such file.
        WrongUseError: it is not TOML, a table is no gate, or names something that is not measured.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        msg = f"{path}: got no gates file · expected baselines to compare with · check --gates"
        raise NoBaselineError(msg) from error
    except (OSError, ValueError) as error:
        raise WrongUseError(f"{path}: got a file that cannot be read ({error}) · expected TOML · correct it") from error
    gates = {}
    for subject, tables in found.items():
        if subject not in subjects or not isinstance(tables, dict):
            msg = f"{path}: [{subject}]: got a gate of something that is not measured · measured are "
            raise WrongUseError(f"{msg}{', '.join(subjects)} · correct it")
        for metric, table in tables.items():
            try:
                gates[f"{subject}.{metric}"] = _read_gate(table)
            except ValueError as error:
                raise WrongUseError(f"{path}: [{subject}.{metric}]: {error} · correct it") from error
    return gates


def _read_gate(table: object) -> Gate:
    if not isinstance(table, dict) or table.keys() != {"baseline", "tolerance"}:
        raise ValueError("got other keys, or none · expected a baseline and a tolerance")
    baseline, tolerance = table["baseline"], str(table["tolerance"])
    if isinstance(baseline, list) and all(isinstance(entry, str) for entry in baseline):
        baseline = tuple(baseline)
    elif type(baseline) not in (int, float):
        raise ValueError(f"got the baseline {baseline!r} · expected a number, or a list of names")
    _tolerance(tolerance)
    return Gate(baseline=baseline, tolerance=tolerance)


def update_baselines(path: Path, values: Mapping[str, Value]) -> list[str]:
    """Put measured values into a gates file in the place of its baselines; return a line for each that changed.

    Only the lines `baseline = …` of the tables concerned change. A value without a table is left alone, and so is a
    table without a value.
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
    write_whole(path, "".join(f"{line}\n" for line in lines))
    return changes


def toml(value: Value) -> str:
    """Return a value as it stands in a gates file, on one line; numbers that are not whole to four digits."""
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return str(value) if isinstance(value, int) else f"{value:#.4g}"
