"""What is said of each artifact: columns of figures as text, for the table in the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from lite.bench.results import NotRun, ReportQuality, Row, Throughput
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.memory.sizes import shown_bytes

_NONE: Final = "–"
Show: TypeAlias = Callable[[Any], str]


# -- Figures as text -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write three digits, as people do."""
    if not math.isfinite(value):
        return _NONE
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _finite(template: str, scale: float = 1.0) -> Show:
    return lambda value: template.format(scale * value) if math.isfinite(value) else _NONE


_percent, _ratio, _count = _finite("{:.4g}", 100), _finite("{:.4f}"), _finite("{:,.0f}")


def milliseconds(seconds: float) -> str:
    """Write seconds in milliseconds, without the unit."""
    return number(1e3 * seconds)


def duration(seconds: float) -> str:
    """Write seconds with the unit that suits them."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{milliseconds(seconds)} ms"


# -- Columns ---------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A figure as text."""

    text: str
    detail: str = ""  # its interval, its other quantiles: to be shown smaller
    footnote: str = ""  # how to get what is missing
    missing: bool = False


class Column(NamedTuple):
    """A figure of every artifact."""

    title: str
    unit: str  # or what the cells' details are
    cell: Callable[[Row], Cell]


class Group(NamedTuple):
    """Columns that belong together."""

    title: str
    columns: Sequence[Column]


def figure_cell(figure: object, show: Show = number) -> Cell:
    """Write a figure: an estimate with its interval, times with their quantiles, or why it is missing."""
    if isinstance(figure, Missing):
        return Cell(figure.why, footnote=figure.todo, missing=True)
    if isinstance(figure, Estimate):
        return Cell(show(figure.value), f"[{show(figure.low)}, {show(figure.high)}]" if figure.count else "")
    if isinstance(figure, Quantiles):
        return Cell(show(figure.p50), f"p90\xa0{show(figure.p90)} p99\xa0{show(figure.p99)}")
    return Cell(show(figure))


def _figure(row: Row, path: str) -> Any:  # noqa: ANN401 - figures are of many kinds
    """Follow names from a row to a figure; what is missing on the way is missing."""
    found: Any = row
    for name in path.split("."):
        if isinstance(found, Missing):
            return found
        found = found.get(name, Missing(why="not measured")) if isinstance(found, dict) else getattr(found, name)
    return found


def _column(title: str, unit: str, path: str, show: Show = number) -> Column:
    return Column(title, unit, lambda row: figure_cell(_figure(row, path), show))


def _batch_columns(rows: Iterable[Row], cell: Callable[[Throughput], Cell]) -> list[Column]:
    """Return a column for each batch size that any artifact was asked for."""

    def column(size: int) -> Column:
        def of_row(row: Row) -> Cell:
            batch = next((batch for batch in row.batches if batch.batch_size == size), None)
            if isinstance(batch, Throughput):
                return cell(batch)
            return Cell("not run", footnote=batch.why if isinstance(batch, NotRun) else "", missing=True)

        return Column(f"{size} at a time", "", of_row)

    return [column(size) for size in sorted({batch.batch_size for row in rows for batch in row.batches})]


def _rate(batch: Throughput) -> Cell:
    rate = batch.studies_per_min
    return Cell(number(rate.p50), f"{number(rate.p20)} to {number(rate.p80)}")


def _best_rate(row: Row) -> Cell:
    rates = [batch.studies_per_min.p50 for batch in row.batches if isinstance(batch, Throughput)]
    return Cell(number(max(rates)) if rates else "not run")


def _planned(row: Row) -> Cell:
    if not row.is_planned:
        return Cell("no plan", footnote=f"What ONNX Runtime takes on {row.device} is not planned.", missing=True)
    return Cell(shown_bytes(row.plan.peak_bytes), f"{100 * row.plan_error:+.1f}\xa0%".replace("-", "−"))


def _bandwidth(row: Row) -> Cell:
    traffic = row.traffic
    if isinstance(traffic, Missing):
        return figure_cell(traffic)
    share = f"{100 * traffic.share:.0f}\xa0% of\xa0{number(traffic.bandwidth / 1e9)}"
    return Cell(number(traffic.achieved / 1e9), share)


# -- Tables ----------------------------------------------------------------------------------------------------------

_DIVERGENCE: Final = "record_quality.divergence"
_LABEL_F1: Final = ("label F1", "micro", "label_f1_micro")
_TEXT_FIGURES: Final = (
    ("label F1", "macro", "label_f1_macro"),
    ("same side", "of findings that both have", "side_accuracy"),
    ("same zone", "of findings that both have", "zone_accuracy"),
    ("same size", "of findings that both have", "size_accuracy"),
    ("ROUGE-L", "", "rouge_l"),
    ("BLEU-1", "", "bleu_1"),
    ("BLEU-4", "", "bleu_4"),
)
_RADGRAPH: Final = ("RadGraph F1", "", "radgraph_f1")
TITLES: Final = {
    name: f"{title}, {unit}" if unit else title for title, unit, name in (_LABEL_F1, *_TEXT_FIGURES, _RADGRAPH)
}
"""Of figures of texts, by their names."""

SUMMARY: Final = (
    _column("decoder", "", "decoder_format", str),
    _column("by", "", "run_by", str),
    _column("on disk", "", "disk_bytes", shown_bytes),
    Column("peak", "", lambda row: Cell(f"{shown_bytes(row.memory.peak_bytes)} {row.memory.kind}")),
    _column("TTFT, s", "", "latency.ttft"),
    _column("tokens/s", "", "decode_tokens_per_s"),
    _column("study, s", "", "latency.total"),
    Column("studies/min", "", _best_rate),
    _column("KL", "", f"{_DIVERGENCE}.mean_kl"),
    _column("same top, %", "", f"{_DIVERGENCE}.same_top", _percent),
    _column("label F1", "", "report_quality.label_f1_micro"),
)
"""What most ask for."""


def _texts(quality: str, figures: Iterable[tuple[str, str, str]]) -> list[Column]:
    return [_column(title, unit, f"{quality}.{name}") for title, unit, name in figures]


def reference_figures(quality: ReportQuality | Missing) -> list[tuple[str, Cell]]:
    """Return how good the reference's own texts are, the yardstick of the candidates'."""
    if isinstance(quality, Missing):
        return []
    names = (_LABEL_F1, *_TEXT_FIGURES, _RADGRAPH)
    figures = [(f"{title} {unit}", getattr(quality, name)) for title, unit, name in names]
    if isinstance(quality.chexbert, dict):
        figures += [(f"CheXbert F1 {name}", figure) for name, figure in quality.chexbert.items()]
    return [(title, figure_cell(figure)) for title, figure in figures]


def tables(rows: Sequence[Row]) -> dict[str, list[Group]]:
    """Return the four tables: what decides between artifacts, other costs, other qualities, and what was run."""
    found = {
        "results": _results(rows),
        "costs": _costs(rows),
        "texts": _qualities(rows),
        "artifacts": _ARTIFACTS,
    }
    found["texts"] = [group for group in found["texts"] if not rows or any(_has_figure(group, row) for row in rows)]
    return {name: [group for group in groups if group.columns] for name, groups in found.items()}


def _has_figure(group: Group, row: Row) -> bool:
    return any(not column.cell(row).missing for column in group.columns)


def _results(rows: Sequence[Row]) -> list[Group]:
    size = Column("on disk", "in memory", lambda row: Cell(shown_bytes(row.disk_bytes), shown_bytes(row.weight_bytes)))
    peak = Column("measured", "", lambda row: Cell(shown_bytes(row.memory.peak_bytes), row.memory.kind))
    one_by_one = [
        _column("load", "s", "load_s"),
        _column("TTFT", "ms", "latency.ttft", milliseconds),
        _column("decode", "ms/token", "latency.decode_token", milliseconds),
        _column("tokens/s", "", "decode_tokens_per_s"),
        Column("GB/s", "decoding, of the bandwidth", _bandwidth),
        _column("whole study", "s", "latency.total"),
        _column("energy", "J", "energy_j"),
    ]
    # A record has the most probable tokens and the mass of the rest: KL is a lower bound.
    against_record = [
        _column("mean KL", "nats/token, at least", f"{_DIVERGENCE}.mean_kl"),
        _column("same top token", "%", f"{_DIVERGENCE}.same_top", _percent),
        _column("same text", "% of studies", "record_quality.same_text", _percent),
        *_texts("record_quality", [_LABEL_F1]),
    ]
    return [
        Group("Size", [size]),
        Group("Peak memory", [peak, Column("planned", "its error", _planned)]),
        Group("One study at a time", one_by_one),
        Group("Studies/min, p20 to p80", _batch_columns(rows, _rate)),
        Group("Against reports", _texts("report_quality", [_LABEL_F1])),
        Group("Against the reference record", against_record),
    ]


def _costs(rows: Sequence[Row]) -> list[Group]:
    stages = ("image", "vision", "prefill")

    def peak(batch: Throughput) -> Cell:
        return Cell(shown_bytes(batch.peak_bytes), shown_bytes(batch.plan.peak_bytes))

    return [
        Group("Stages of one study", [_column(name, "ms", f"latency.{name}", milliseconds) for name in stages]),
        Group(
            "Peak memory until the end of",
            [_column(name, "", f"memory.{name}_bytes", shown_bytes) for name in ("before", "load", *stages, "decode")],
        ),
        Group("Peak memory of batches, planned", _batch_columns(rows, peak)),
    ]


def _qualities(rows: Sequence[Row]) -> list[Group]:
    reports = [row.report_quality for row in rows if isinstance(row.report_quality, ReportQuality)]
    names = dict.fromkeys(name for report in reports if isinstance(report.chexbert, dict) for name in report.chexbert)
    chexbert = [("CheXbert F1", name, f"chexbert.{name}") for name in names] or [("CheXbert F1", "", "chexbert")]
    divergence = [
        _column("KL missed", "mean, at most", "record_quality.kl_gap_limit"),
        _column("median KL", "nats/token, at least", f"{_DIVERGENCE}.median_kl"),
        _column("p99 KL", "nats/token, at least", f"{_DIVERGENCE}.p99_kl"),
        _column("no divergence", "% of studies", f"{_DIVERGENCE}.without_divergence", _percent),
        _column("perplexity ratio", "", f"{_DIVERGENCE}.perplexity_ratio", _ratio),
        _column("first divergent token", "median", f"{_DIVERGENCE}.first_divergent_token", _count),
    ]
    return [
        Group("Divergence from the reference record", divergence),
        Group("Texts against the reference's", _texts("record_quality", _TEXT_FIGURES)),
        Group("Texts against the data's reports", _texts("report_quality", (*_TEXT_FIGURES, _RADGRAPH, *chexbert))),
    ]


_ARTIFACTS: Final = [
    Group(
        "Artifact",
        [
            _column("model", "", "model", str),
            _column("path", "", "path", str),
            _column("id", "", "artifact_id", str),
            _column("decoder", "", "decoder_format", str),
            _column("vision", "", "vision_format", str),
            _column("image tokens", "", "image_tokens", str),
        ],
    ),
    Group(
        "Run by",
        [
            _column("engine", "", "engine", str),
            _column("device", "", "device", str),
            _column("dtype", "", "dtype", str),
            _column("cache", "", "cache_dtype", str),
            _column("prompts", "by weights", "prompt_weights", str),
            _column("adapter", "", "adapter", lambda name: name or "none"),
            _column("provider", "of ONNX Runtime", "provider", str),
            Column("backend", "", lambda row: Cell(row.backend, footnote="; ".join(row.fallbacks))),
        ],
    ),
    Group(
        "Runs",
        [
            Column("timed", "after warm-up", lambda row: Cell(f"{row.num_runs}", f"{row.num_warmup}")),
            _column("tokens", "per study", "tokens_per_study"),
            _column("reads", "for a token", "traffic.bytes_per_token", shown_bytes),
            _column("hashing", "s, before loading", "verify_s"),
            _column("first study", "s", "first_total_s"),
            _column("skipped", "studies", "num_skipped", str),
        ],
    ),
]
