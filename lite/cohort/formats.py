"""Results in the forms that others read: made of the lines of a journal, a file each, whole or not at all.

    reference   {"id", "query", "reference", "prediction"} a line, as the published evaluation reads it
    rexrank     the source's object of studies with "model_prediction" in each, as ReXrank's leaderboard reads it
    csv         a row a study; the source's own columns behind ours
    parquet     the same, for pandas and its like

A study that failed is in csv and parquet, with its error, and in neither of the others.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lite.errors import BackendUnavailable
from lite.files import whole_file, write_whole
from lite.studies.results import SHORT_NOTICE, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from lite.prompt import PromptEncoder

_COLUMNS: Final = ("id", "image", "reason", "query", "reference", "prediction", "error")
_HOW: Final = (
    "finish_reason",
    "num_prompt_tokens",
    "rendering",
    "artifact_id",
    "engine",
    "device",
    "cache_dtype",
    "prompt_weights",
)


def iterate_results(path: Path, prompt: PromptEncoder) -> Iterator[Result]:
    """Yield the results of a file, one in memory at a time, with what the model was asked where the list has no words.

    Raises:
        LiteError: a line is no result.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            result = Result.from_json(line, where=f"{path}:{number}")
            study = result.study
            if result.prediction is not None and not study.question:
                result = replace(result, study=replace(study, question=prompt.question(study.reason, study.query)))
            yield result


def write_reference(results: Iterable[Result], out: Path) -> None:
    """Write what the published evaluation reads."""
    with whole_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for result in results:
            if result.prediction is None:
                continue
            study = result.study
            value = {
                "id": study.id,
                "query": study.question,
                "reference": study.reference,
                "prediction": result.prediction,
            }
            file.write(f"{json.dumps(value, ensure_ascii=False)}\n")


def write_rexrank(results: Iterable[Result], out: Path) -> None:
    """Write what ReXrank's leaderboard reads: the studies of its own list, or others in its form."""
    studies = {r.study.id: _rexrank(r) for r in results if r.prediction is not None}
    write_whole(out, json.dumps(studies, ensure_ascii=False, indent=1) + "\n")


def _rexrank(result: Result) -> dict[str, Any]:
    study = result.study
    if "key_image_path" in study.row or "image_path" in study.row:
        row = dict(study.row)
    else:
        film = str(study.path)
        row = {"image_path": [film], "key_image_path": film, "frontal_lateral": ["Frontal"]}
        row |= {"section_findings": study.reference, "context": f"Indication: {study.reason}" if study.reason else ""}
    return row | {"model_prediction": f"Findings: {result.prediction}"}


def write_csv(results: Iterable[Result], out: Path) -> None:
    """Write a table in UTF-8, with the mark that spreadsheets know it by."""
    rows = [_flat(result) for result in results]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out, text.getvalue().encode("utf-8-sig", "backslashreplace"))


def write_parquet(results: Iterable[Result], out: Path) -> None:
    """Write a table for pandas and its like.

    Raises:
        BackendUnavailable: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    rows = [_flat(result) for result in results]
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    with whole_file(out) as partial:
        parquet.write_table(table, partial)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        msg = "got --format parquet and no pyarrow · expected pyarrow · pip install 'llava-rad-lite[parquet]'"
        raise BackendUnavailable(msg) from error
    return pa, pyarrow.parquet


def _flat(result: Result) -> dict[str, Any]:
    """Return one row of a table; a column of the source that is called like one of ours gets a name of its own."""
    study, findings = result.study, result.findings
    row: dict[str, Any] = dict.fromkeys((*_COLUMNS, *_HOW, "num_new_tokens", "total_s", "remarks", "notice"))
    row |= {"id": study.id, "image": str(study.image) or None, "reason": study.reason, "query": study.question or None}
    row |= {"reference": study.reference or None, "prediction": result.prediction, "error": result.error}
    if findings is not None:
        row |= {name: getattr(findings, name) for name in _HOW}
        remarks = "; ".join(findings.film.remarks) if findings.film else ""
        times = {"num_new_tokens": findings.num_new_tokens, "total_s": round(findings.timings.total_s, 6)}
        row |= times | {"remarks": remarks or None}
    own = {f"source_{name}" if name in row else name: _cell(value) for name, value in study.row.items()}
    return row | {"notice": SHORT_NOTICE} | own


def _cell(value: object) -> str | None:
    return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Format:
    """A form of results."""

    suffix: str
    write: Callable[[Iterable[Result], Path], None]
    needs_rows: bool = False  # all that the source says of a study
    check: Callable[[], object] = lambda: None  # raises what would be missing, before the work


FORMATS: Final = {
    "reference": Format(".reference.jsonl", write_reference),
    "rexrank": Format(".rexrank.json", write_rexrank, needs_rows=True),
    "csv": Format(".csv", write_csv),
    "parquet": Format(".parquet", write_parquet, check=_pyarrow),
}


def formatted_name(journal: Path, name: str) -> Path:
    """Return the file of a form: beside the journal, called after it."""
    return journal.with_name(f"{journal.name.removesuffix('.jsonl')}{FORMATS[name].suffix}")
