"""The report: one HTML file, without scripts and without anything to fetch, that shows what was measured.

The records of `lite.bench.results` become what a page is made of: tables of cells, bars of segments, texts of passages.
`report.html.j2` lays that out. No figure is coloured as the best: two whose intervals overlap may be equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from typing import Final, NamedTuple

from lite.artifact.manifest import NOTICE
from lite.bench.columns import Cell, Group, duration, milliseconds, number, reference_figures, tables
from lite.bench.plots import LossKind, Point, draw_pareto
from lite.bench.results import Bench, FailedRow, ModelledTable, RecordQuality, Row
from lite.bench.studies import Card, Writing, filters, study_card, with_films
from lite.bench.verdict import RECORD, choose
from lite.errors import BackendUnavailable
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.memory.sizes import shown_bytes

_TEMPLATES: Final = tuple(f"{name}.html.j2" for name in ("page", "parts", "report", "score", "confidence", "search"))
_ROUNDING_KL: Final = 1e-12


def check_packages() -> None:
    """Find out before an hour of measuring that there will be no report.

    Raises:
        BackendUnavailable: Jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2  # noqa: F401 - asked for, not used
        import matplotlib as mpl  # noqa: F401 - the same
    except ImportError as error:
        msg = (
            f'got no {error.name} package · the report needs it · install it with: pip install "llava-rad-lite[bench]"'
        )
        raise BackendUnavailable(msg) from error


def render(template: str, **values: object) -> str:
    """Lay out a page of this package, with every text escaped."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = resources.files("lite.bench")
    environment = Environment(
        loader=DictLoader({name: folder.joinpath(name).read_text(encoding="utf-8") for name in _TEMPLATES}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def render_report(bench: Bench, *, modelled: Sequence[ModelledTable] = ()) -> str:
    """Return the report as HTML.

    Args:
        bench: what was measured. Films that cannot be read any more are named in the report.
        modelled: what other machines may do, shown apart.

    Raises:
        BackendUnavailable: Jinja2 or matplotlib is not installed.
    """
    check_packages()
    rows = [row for row in bench.rows if isinstance(row, Row)]
    choice, cards = choose(bench), _cards(bench, rows)
    shown = [_table(name, groups, bench) for name, groups in tables(rows).items()]
    weighed = _table("weighed", [Group("What was weighed", choice.columns)], bench)
    cells = (cell for table in (weighed, *shown) for _, groups in table.lines for group in groups for cell in group)
    footnotes = list(dict.fromkeys(cell.footnote for cell in cells if cell.footnote))
    notices = list(dict.fromkeys(row.notice for row in rows))
    return render(
        "report.html.j2",
        bench=bench,
        notices=notices if any(NOTICE in notice for notice in notices) else [NOTICE, *notices],
        notes=[note for note in bench.notes if not note.endswith(tuple(footnotes))],  # those stand below the table
        choice=choice,
        weighed=weighed,
        tables=shown if rows else [],
        footnotes=footnotes,
        reference_figures=reference_figures(bench.reference_report_quality),
        plot=_plot(rows),
        rows=rows,
        spread=_spread,
        duration=duration,
        milliseconds=milliseconds,
        shown_bytes=shown_bytes,
        modelled=modelled,
        cards=cards,
        filters=filters(cards),
    )


# -- Tables ----------------------------------------------------------------------------------------------------------


_CAPTIONS: Final = {
    "weighed": "What was weighed",
    "results": "Everything that decides",
    "costs": "More about time and memory",
    "texts": "More about the texts",
    "artifacts": "What was measured",
}


class _Table(NamedTuple):
    id: str
    caption: str
    groups: Sequence[Group]
    lines: Sequence[tuple[Row | FailedRow, Sequence[Sequence[Cell]]]]  # by group; a failed row has no cells


def _table(table_id: str, groups: Sequence[Group], bench: Bench) -> _Table:
    def cells(row: Row | FailedRow) -> list[list[Cell]]:
        return [[column.cell(row) for column in group.columns] for group in groups] if isinstance(row, Row) else []

    return _Table(table_id, _CAPTIONS[table_id], groups, [(row, cells(row)) for row in bench.rows])


# -- Latency against quality -----------------------------------------------------------------------------------------


class _Plot(NamedTuple):
    svg: str  # empty where fewer than two artifacts have both figures
    kind: LossKind
    names: Sequence[str]  # of the numbered bubbles, each with its peak memory
    left_out: Sequence[tuple[str, str]]  # name and why


def _plot(rows: Sequence[Row]) -> _Plot:
    kind: LossKind = "kl" if any(isinstance(row.record_quality, RecordQuality) for row in rows) else "label-f1"
    points, names, left_out = [], [], []
    for row in rows:
        loss = _loss(row, kind)
        if isinstance(loss, Missing):
            left_out.append((row.name, loss.why))
            continue
        points.append(Point(total=row.latency.total, loss=loss, peak_bytes=row.memory.peak_bytes))
        names.append(f"{row.name} · {shown_bytes(row.memory.peak_bytes)}")
    return _Plot(draw_pareto(points, kind) if len(points) > 1 else "", kind, names, left_out)


def _loss(row: Row, kind: LossKind) -> Estimate | Missing:
    quality = row.record_quality if kind == "kl" else row.report_quality
    if isinstance(quality, Missing):
        return quality
    if isinstance(quality, RecordQuality):
        loss = quality.divergence.mean_kl
        # What float64 leaves of a model compared with itself; on a logarithmic axis it would push all others together.
        if loss.value < _ROUNDING_KL:
            loss = Estimate(value=0.0, low=0.0, high=0.0, count=loss.count)
    else:
        f1 = quality.label_f1_micro
        loss = Estimate(value=1 - f1.value, low=1 - f1.high, high=1 - f1.low, count=f1.count)
    return loss if all(map(math.isfinite, (loss.value, loss.low, loss.high))) else Missing(why="nothing to measure")


def _spread(times: Quantiles) -> str:
    show = number if times.p50 >= 1 else milliseconds
    return f"{duration(times.p50)} ({show(times.p20)} to {show(times.p80)})"


# -- Studies ---------------------------------------------------------------------------------------------------------


def _cards(bench: Bench, rows: Sequence[Row]) -> list[Card]:
    """Return the studies' cards, those with the most wrong first."""
    # Without a record the largest artifact is the yardstick: its text comes first.
    recorded = any(study.reference_text is not None for study in bench.studies)
    ordered = rows if recorded else sorted(rows, key=lambda row: -row.weight_bytes)
    cards = []
    for index, shown in enumerate(bench.studies):
        drafts = [
            Writing(row.name, draft.text, draft.error, sentences=draft.sentences)
            for row, draft in ((row, row.drafts[index]) for row in ordered)
        ]
        if shown.reference_text is not None:
            drafts.insert(0, Writing(RECORD, shown.reference_text))
        marked = len(drafts) > 1
        cards.append(study_card(shown.id, shown.image, shown.report, drafts, marked=marked, reason=shown.reason))
    cards.sort(key=lambda card: ("failed" in card.tags, len(card.wrong), "differs" in card.tags), reverse=True)
    return list(with_films(cards))
