"""A bench as text for a terminal, which is markdown too, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lite.bench.columns import Cell, Group, number, tables
from lite.bench.results import Bench, ModelledTable, Row, Throughput
from lite.eval.figures import Missing
from lite.files import write_whole
from lite.memory.sizes import shown_bytes


def format_tables(bench: Bench, modelled: Sequence[ModelledTable]) -> str:
    """Return a bench as text: what it depends on, its tables, and what a reader has to know."""
    rows = [row for row in bench.rows if isinstance(row, Row)]
    notices = dict.fromkeys(row.notice for row in rows)
    parts = [*(f"{notice}\n" for notice in notices)]
    if rows:
        parts.append(f"{_summary(rows)}\n")
        for groups in tables(rows).values():
            parts += [f"{_details(group, rows)}\n" for group in groups]
    for table in modelled:
        parts.append(f"## {table.caption}\n\n{markdown_table(table.header, table.rows)}\n\n{table.note}\n")
    parts.append("\n".join(_provenance(bench)))
    return "\n".join(parts)


_SUMMARY: Final = (
    "artifact", "decoder", "by", "on disk", "peak", "TTFT, s", "tokens/s", "study, s", "studies/min", "KL", "same top",
    "label F1",
)  # fmt: skip


def _summary(rows: Sequence[Row]) -> str:
    """Return what most ask for, a line for each artifact."""
    lines = []
    for row in rows:
        rates = [batch.studies_per_min.p50 for batch in row.batches if isinstance(batch, Throughput)]
        record, report = row.record_quality, row.report_quality
        lines.append(
            (
                row.name,
                row.decoder_format,
                row.run_by,
                shown_bytes(row.disk_bytes),
                f"{shown_bytes(row.memory.peak_bytes)} {row.memory.kind}",
                number(row.latency.ttft.p50),
                number(row.decode_tokens_per_s),
                number(row.latency.total.p50),
                number(max(rates)) if rates else "not run",
                record.why if isinstance(record, Missing) else number(record.divergence.mean_kl.value),
                "–" if isinstance(record, Missing) else f"{record.divergence.same_top.value:.2%}",
                report.why if isinstance(report, Missing) else number(report.label_f1_micro.value),
            )
        )
    return markdown_table(_SUMMARY, lines, left=3)


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
