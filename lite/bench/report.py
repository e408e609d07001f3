"""The report: one HTML file, without scripts and without anything to fetch, that shows what was measured.

The records of `lite.bench.results` become what a page is made of: tables of cells, bars of segments, texts of passages.
`report.html.j2` lays that out. No figure is coloured as the best: two whose intervals overlap may be equal.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from typing import Final, NamedTuple

from lite.artifact.manifest import NOTICE
from lite.bench.columns import Cell, Group, duration, milliseconds, number, reference_figures, tables
from lite.bench.plots import LossKind, Point, draw_pareto
from lite.bench.results import Bench, Draft, FailedRow, ModelledTable, RecordQuality, Row, StudyShown
from lite.bench.words import Passage, compare_words
from lite.errors import BackendUnavailable, LiteError
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.image.files import load_image
from lite.memory.sizes import shown_bytes

_TEMPLATES: Final = ("report.html.j2", "score.html.j2", "search.html.j2")
_FILM_PX: Final = 256
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
    shown = [_table(name, groups, bench) for name, groups in tables(rows).items()]
    cells = (cell for table in shown for _, groups in table.lines for group in groups for cell in group)
    footnotes = list(dict.fromkeys(cell.footnote for cell in cells if cell.footnote))
    notices = list(dict.fromkeys(row.notice for row in rows))
    return render(
        "report.html.j2",
        bench=bench,
        notices=notices if any(NOTICE in notice for notice in notices) else [NOTICE, *notices],
        notes=[note for note in bench.notes if not note.endswith(tuple(footnotes))],  # those stand below the table
        tables=shown if rows else shown[:1],
        footnotes=footnotes,
        reference_figures=reference_figures(bench.reference_report_quality),
        plot=_plot(rows),
        stages=[_Bars(row.name, [_stage_bar(row)]) for row in rows],
        longest=max((row.latency.total.p50 for row in rows), default=0.0),
        memory=[_memory_bars(row) for row in rows],
        largest=max((max(row.memory.peak_bytes, row.plan.peak_bytes) for row in rows), default=0),
        modelled=modelled,
        studies=list(_studies(bench.studies, rows)),
    )


# -- Tables ----------------------------------------------------------------------------------------------------------


_CAPTIONS: Final = {
    "results": "Everything at a glance",
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
    svg: str  # empty where no artifact has both figures
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
    return _Plot(draw_pareto(points, kind) if points else "", kind, names, left_out)


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


# -- Bars ------------------------------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    kind: str  # its colour
    title: str
    text: str
    amount: float


class _Bar(NamedTuple):
    title: str
    total: str
    segments: Sequence[_Segment]


class _Bars(NamedTuple):
    name: str
    bars: Sequence[_Bar]


def _stage_bar(row: Row) -> _Bar:
    latency = row.latency
    stages = (("image", latency.image), ("vision", latency.vision), ("prefill", latency.prefill))
    segments = [_Segment(kind, kind, _spread(stage), stage.p50) for kind, stage in stages]
    decode_s = max(0.0, latency.total.p50 - sum(segment.amount for segment in segments))
    token = latency.decode_token
    tokens = f"{duration(decode_s)}, {milliseconds(token.p50)} ms a token ({_between(token, milliseconds)})"
    return _Bar("", _spread(latency.total), [*segments, _Segment("decode", "decode", tokens, decode_s)])


def _spread(times: Quantiles) -> str:
    show = number if times.p50 >= 1 else milliseconds
    return f"{duration(times.p50)} ({_between(times, show)})"


def _between(times: Quantiles, show: Callable[[float], str]) -> str:
    return f"{show(times.p20)} to {show(times.p80)}"


def _memory_bars(row: Row) -> _Bars:
    """Show by how much each stage raised the peak, and what makes up the plan's."""
    use, plan = row.memory, row.plan
    stages = ("before", "load", "image", "vision", "prefill", "decode")
    peaks = [0, *(getattr(use, f"{stage}_bytes") for stage in stages)]
    measured = [
        (stage, stage if stage == "before" else f"+ {stage}", peaks[index + 1] - peaks[index])
        for index, stage in enumerate(stages)
    ]
    stays = [
        ("before", "libraries", plan.resident_bytes),
        ("load", "decoder", plan.decoder_bytes),
        ("load", "tower", plan.vision_bytes),
    ]
    passes = [
        ("vision", "tower's work", plan.vision_work_bytes),
        ("prefill", "cache", plan.cache_bytes),
        ("prefill", "prefill's work", plan.prefill_work_bytes),
    ]
    if plan.load_work_bytes > plan.study_bytes:  # loading passes before the work of a study begins
        passes = [("load", "loading's work", plan.load_work_bytes)]
    bars = [_memory_bar(use.kind, measured), *([_memory_bar("plan", [*stays, *passes])] if row.is_planned else [])]
    return _Bars(row.name, bars)


def _memory_bar(title: str, parts: Sequence[tuple[str, str, int]]) -> _Bar:
    segments = [_Segment(kind, name, shown_bytes(size), size) for kind, name, size in parts if size]
    return _Bar(title, shown_bytes(sum(size for _, _, size in parts)), segments)


# -- Studies ---------------------------------------------------------------------------------------------------------


class _Text(NamedTuple):
    name: str
    passages: Sequence[Passage]
    error: str | None


class _Study(NamedTuple):
    shown: StudyShown
    film: str  # a data URI, or empty
    film_error: str
    same: Sequence[str]  # the artifacts that wrote the reference's text, character for character
    texts: Sequence[_Text]  # of the others
    differs: bool  # there is something to look at: an error, a text that is not the reference's, or no two the same


def _studies(studies: Sequence[StudyShown], rows: Sequence[Row]) -> Iterator[_Study]:
    for index, shown in enumerate(studies):
        reference = shown.reference_text
        drafts = [(row.name, row.drafts[index]) for row in rows]
        same = [name for name, draft in drafts if draft.error is None and draft.text == reference]
        texts = [_text(name, draft, reference) for name, draft in drafts if name not in same]
        differs = bool(texts)
        if reference is None and all(text.error is None for text in texts):
            differs = len({draft.text for _, draft in drafts}) > 1
        yield _Study(shown, *film_thumbnail(shown.image), same, texts, differs)


def _text(name: str, draft: Draft, reference: str | None) -> _Text:
    if draft.error is not None:
        return _Text(name, [], draft.error)
    if reference is None:
        return _Text(name, [Passage(kind="same", text=draft.text)], None)
    return _Text(name, compare_words(reference, draft.text), None)


def film_thumbnail(path: str, *, any_film: bool = False) -> tuple[str, str]:
    """Return a film as a data URI, small, or what is wrong with it; `any_film` as in `load_image`."""
    try:
        image = load_image(path, any_film=any_film).image
    except LiteError as error:
        return "", str(error)
    image.thumbnail((_FILM_PX, _FILM_PX))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}", ""
