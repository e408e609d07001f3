"""A bench as text for a terminal, which is markdown too, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lite.bench.columns import SUMMARY, Cell, Group, tables
from lite.bench.results import Bench, ModelledTable, Row
from lite.bench.verdict import choose
from lite.files import write_whole


def format_tables(bench: Bench, modelled: Sequence[ModelledTable]) -> str:
    """Return a bench as text: what it depends on, its tables, and what a reader has to know."""
    rows = [row for row in bench.rows if isinstance(row, Row)]
    parts = [f"{notice}\n" for notice in dict.fromkeys(row.notice for row in rows)]
    if rows:
        choice = choose(bench)
        parts.append("\n".join([choice.verdict, *choice.remarks, ""]))
        lines = [(row.name, *(column.cell(row).text for column in SUMMARY)) for row in rows]
        parts.append(f"{markdown_table(('artifact', *(column.title for column in SUMMARY)), lines, left=3)}\n")
        parts += [f"{_details(group, rows)}\n" for groups in tables(rows).values() for group in groups]
    for table in modelled:
        parts.append(f"## {table.caption}\n\n{markdown_table(table.header, table.rows)}\n\n{table.note}\n")
    parts.append("\n".join(_provenance(bench)))
    return "\n".join(parts)


def _details(group: Group, rows: Sequence[Row]) -> str:
    """Return one group of figures, a line for each: they have more columns than a terminal."""
    lines = [
        (f"{column.title}, {column.unit}" if column.unit else column.title, *(_shown(column.cell(row)) for row in rows))
        for column in group.columns
    ]
    return markdown_table((group.title, *(row.name for row in rows)), lines)


def _shown(cell: Cell) -> str:
    return f"{cell.text} {cell.detail}" if cell.detail else cell.text


def _provenance(bench: Bench) -> Iterator[str]:
    provenance = bench.provenance
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    yield f"- Machine: {provenance.machine}; {provenance.started}."
    yield f"- Versions: {versions}."
    yield f"- Command: `{provenance.command}`."
    yield f"- Data: {provenance.num_studies} studies of {provenance.data} (sha256 {provenance.data_sha256[:16]}…)."
    if provenance.reference is not None:
        yield f"- Reference: {provenance.reference}."
    for note in bench.notes:
        yield f"- {note}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table that is markdown and lines up in a terminal: the first `left` columns to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "".join(
        f"{'-' * (width + 2)}|" if index < left else f"{'-' * (width + 1)}:|" for index, width in enumerate(widths)
    )
    return "\n".join([line(header), f"|{rule}", *map(line, rows)])


def to_json(value: Any) -> Any:  # noqa: ANN401 - figures are nested in figures
    """Return figures as what JSON can hold: dataclasses as objects, numbers to 6 digits, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_json(bench: Bench, modelled: Sequence[ModelledTable], path: Path) -> None:
    """Write everything as one JSON document, whole or not at all.

    Raises:
        LiteError: the file cannot be written.
    """
    document = to_json(bench)
    document["modelled"] = [{"caption": table.caption, "figures": to_json(table.figures)} for table in modelled]
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
