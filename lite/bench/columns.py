"""What is said of each artifact: columns of figures as text, for the table in the terminal and for the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

from lite.bench.results import NotRun, RecordQuality, ReportQuality, Row, Throughput
from lite.eval.figures import Estimate, Missing, Quantiles
from lite.memory.sizes import shown_bytes

_NONE: Final = "–"


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


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}" if math.isfinite(fraction) else _NONE


def _ratio(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else _NONE


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else _NONE


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


def _missing(figure: Missing) -> Cell:
    return Cell(figure.why, footnote=figure.todo, missing=True)


def _estimate(figure: Estimate | Missing, show: Callable[[float], str]) -> Cell:
    if isinstance(figure, Missing):
        return _missing(figure)
    return Cell(show(figure.value), f"[{show(figure.low)}, {show(figure.high)}]" if figure.count else "")


def _times(figure: Quantiles | Missing, show: Callable[[float], str]) -> Cell:
    if isinstance(figure, Missing):
        return _missing(figure)
    return Cell(show(figure.p50), f"p90\xa0{show(figure.p90)} p99\xa0{show(figure.p99)}")


def _batch(row: Row, batch_size: int) -> Cell:
    batch = _find_batch(row, batch_size)
    if isinstance(batch, Throughput):
        rate = batch.studies_per_min
        return Cell(number(rate.p50), f"{number(rate.p20)} to {number(rate.p80)}")
    return _not_run(batch)


def _find_batch(row: Row, batch_size: int) -> Throughput | NotRun | None:
    return next((batch for batch in row.batches if batch.batch_size == batch_size), None)


def _not_run(batch: NotRun | None) -> Cell:
    return Cell("not run", footnote="" if batch is None else batch.why, missing=True)


def _record_column(
    title: str,
    unit: str,
    figure: Callable[[RecordQuality], Estimate | Missing],
    show: Callable[[float], str] = number,
) -> Column:
    def cell(row: Row) -> Cell:
        quality = row.record_quality
        return _missing(quality) if isinstance(quality, Missing) else _estimate(figure(quality), show)

    return Column(title, unit, cell)


def _report_column(title: str, unit: str, figure: Callable[[ReportQuality], Estimate | Missing]) -> Column:
    def cell(row: Row) -> Cell:
        quality = row.report_quality
        return _missing(quality) if isinstance(quality, Missing) else _estimate(figure(quality), number)

    return Column(title, unit, cell)


_REPORT_FIGURES: Final[Sequence[tuple[str, str, Callable[[ReportQuality], Estimate | Missing]]]] = (
    ("label F1", "micro", lambda quality: quality.label_f1_micro),
    ("label F1", "macro", lambda quality: quality.label_f1_macro),
    ("ROUGE-L", "", lambda quality: quality.rouge_l),
    ("BLEU-1", "", lambda quality: quality.bleu_1),
    ("BLEU-4", "", lambda quality: quality.bleu_4),
    ("RadGraph F1", "", lambda quality: quality.radgraph_f1),
)


def reference_figures(quality: ReportQuality | Missing) -> list[tuple[str, Cell]]:
    """Return how good the reference's own texts are, the yardstick of the candidates'."""
    if isinstance(quality, Missing):
        return []
    chexbert = quality.chexbert if isinstance(quality.chexbert, dict) else {}
    return [
        *((f"{title} {unit}", _estimate(figure(quality), number)) for title, unit, figure in _REPORT_FIGURES),
        *((f"CheXbert F1 {name}", _estimate(figure, number)) for name, figure in chexbert.items()),
    ]


def result_columns(rows: Sequence[Row]) -> list[Group]:
    """Return what decides between artifacts, with a column for each batch size that any of them was asked for."""
    batch_sizes = sorted({batch.batch_size for row in rows for batch in row.batches})
    groups = [
        Group("Size", [Column("on disk", "in memory", _size)]),
        Group(
            "Peak memory",
            [
                Column("measured", "", lambda row: Cell(shown_bytes(row.memory.peak_bytes), row.memory.kind)),
                Column("planned", "its error", _planned),
            ],
        ),
        Group(
            "One study at a time",
            [
                Column("load", "s", lambda row: Cell(number(row.load_s))),
                Column("TTFT", "ms", lambda row: _times(row.latency.ttft, milliseconds)),
                Column("decode", "ms/token", lambda row: _times(row.latency.decode_token, milliseconds)),
                Column("tokens/s", "", lambda row: Cell(number(row.decode_tokens_per_s))),
                Column("GB/s", "decoding, of the bandwidth", _bandwidth),
                Column("whole study", "s", lambda row: _times(row.latency.total, number)),
                Column("energy", "J", lambda row: _times(row.energy_j, number)),
            ],
        ),
        Group(
            "Studies/min, p20 to p80",
            [Column(f"{size} at a time", "", partial(_batch, batch_size=size)) for size in batch_sizes],
        ),
        Group("Against reports", [_report_column(*_REPORT_FIGURES[0])]),
        Group(
            "Against the reference record",
            [
                # A record has the most probable tokens and the mass of the rest: KL is a lower bound.
                _record_column("mean KL", "nats/token, at least", lambda quality: quality.divergence.mean_kl),
                _record_column("same top token", "%", lambda quality: quality.divergence.same_top, _percent),
                _record_column("same text", "% of studies", lambda quality: quality.same_text, _percent),
                _record_column("label F1", "micro", lambda quality: quality.label_f1_micro),
                _record_column("perplexity ratio", "", lambda quality: quality.divergence.perplexity_ratio, _ratio),
                _record_column(
                    "first divergent token", "median", lambda quality: quality.divergence.first_divergent_token, _count
                ),
            ],
        ),
    ]
    return [group for group in groups if group.columns]


def _size(row: Row) -> Cell:
    return Cell(shown_bytes(row.disk_bytes), shown_bytes(row.weight_bytes))


def _planned(row: Row) -> Cell:
    if not row.is_planned:
        return Cell("no plan", footnote=f"What ONNX Runtime takes on {row.device} is not planned.", missing=True)
    return Cell(shown_bytes(row.plan.peak_bytes), f"{100 * row.plan_error:+.1f}\xa0%".replace("-", "−"))


def _reads(row: Row) -> Cell:
    traffic = row.traffic
    return _missing(traffic) if isinstance(traffic, Missing) else Cell(shown_bytes(traffic.bytes_per_token))


def _bandwidth(row: Row) -> Cell:
    traffic = row.traffic
    if isinstance(traffic, Missing):
        return _missing(traffic)
    return Cell(
        number(traffic.achieved / 1e9), f"{100 * traffic.share:.0f}\xa0% of\xa0{number(traffic.bandwidth / 1e9)}"
    )


def cost_columns(rows: Sequence[Row]) -> list[Group]:
    """Return the other figures of time and memory."""
    batch_sizes = sorted({batch.batch_size for row in rows for batch in row.batches})
    stages = ("before", "load", "image", "vision", "prefill", "decode")
    groups = [
        Group(
            "Stages of one study",
            [
                Column("image", "ms", lambda row: _times(row.latency.image, milliseconds)),
                Column("vision", "ms", lambda row: _times(row.latency.vision, milliseconds)),
                Column("prefill", "ms", lambda row: _times(row.latency.prefill, milliseconds)),
            ],
        ),
        Group("Peak memory until the end of", [Column(stage, "", partial(_peak, stage=stage)) for stage in stages]),
        Group(
            "Tokens/s, all stages counted",
            [Column(f"{size} at a time", "", partial(_batch_tokens, batch_size=size)) for size in batch_sizes],
        ),
        Group(
            "Peak memory of batches, planned",
            [Column(f"{size} at a time", "", partial(_batch_peak, batch_size=size)) for size in batch_sizes],
        ),
    ]
    return [group for group in groups if group.columns]


def _peak(row: Row, stage: str) -> Cell:
    return Cell(shown_bytes(getattr(row.memory, f"{stage}_bytes")))


def _batch_tokens(row: Row, batch_size: int) -> Cell:
    batch = _find_batch(row, batch_size)
    return Cell(number(batch.tokens_per_s)) if isinstance(batch, Throughput) else _not_run(batch)


def _batch_peak(row: Row, batch_size: int) -> Cell:
    batch = _find_batch(row, batch_size)
    if not isinstance(batch, Throughput):
        return _not_run(batch)
    return Cell(shown_bytes(batch.peak_bytes), shown_bytes(batch.plan.peak_bytes))


def text_columns(rows: Sequence[Row]) -> list[Group]:
    """Return the other figures of quality."""
    reports = [row.report_quality for row in rows if isinstance(row.report_quality, ReportQuality)]
    names = dict.fromkeys(name for report in reports if isinstance(report.chexbert, dict) for name in report.chexbert)
    return [
        Group(
            "Divergence from the reference record",
            [
                Column("KL missed", "mean, at most", _kl_gap),
                _record_column("median KL", "nats/token, at least", lambda quality: quality.divergence.median_kl),
                _record_column("p99 KL", "nats/token, at least", lambda quality: quality.divergence.p99_kl),
                _record_column(
                    "no divergence", "% of studies", lambda quality: quality.divergence.without_divergence, _percent
                ),
            ],
        ),
        Group(
            "Texts against the reference's",
            [
                _record_column("label F1", "macro", lambda quality: quality.label_f1_macro),
                _record_column("ROUGE-L", "", lambda quality: quality.rouge_l),
                _record_column("BLEU-1", "", lambda quality: quality.bleu_1),
                _record_column("BLEU-4", "", lambda quality: quality.bleu_4),
            ],
        ),
        Group(
            "Texts against the data's reports",
            [
                *(_report_column(*figure) for figure in _REPORT_FIGURES[1:]),
                *(_report_column("CheXbert F1", name, partial(_chexbert, name=name)) for name in names or [""]),
            ],
        ),
    ]


def _kl_gap(row: Row) -> Cell:
    quality = row.record_quality
    return _missing(quality) if isinstance(quality, Missing) else Cell(number(quality.kl_gap_limit))


def _chexbert(quality: ReportQuality, name: str) -> Estimate | Missing:
    if isinstance(quality.chexbert, Missing):
        return quality.chexbert
    return quality.chexbert.get(name, Missing(why="not measured"))


def artifact_columns() -> list[Group]:
    """Return what each artifact is, and how it was run."""
    return [
        Group(
            "Artifact",
            [
                Column("model", "", lambda row: Cell(row.model)),
                Column("path", "", lambda row: Cell(row.path)),
                Column("id", "", lambda row: Cell(row.artifact_id)),
                Column("decoder", "", lambda row: Cell(row.decoder_format)),
                Column("vision", "", lambda row: Cell(row.vision_format)),
            ],
        ),
        Group(
            "Run by",
            [
                Column("engine", "", lambda row: Cell(row.engine)),
                Column("device", "", lambda row: Cell(row.device)),
                Column("dtype", "", lambda row: Cell(row.dtype)),
                Column("cache", "", lambda row: Cell(row.cache_dtype)),
                Column("provider", "of ONNX Runtime", lambda row: Cell(row.provider)),
                Column("backend", "", lambda row: Cell(row.backend, footnote="; ".join(row.fallbacks))),
            ],
        ),
        Group(
            "Runs",
            [
                Column("timed", "after warm-up", lambda row: Cell(f"{row.num_runs}", f"{row.num_warmup}")),
                Column("tokens", "per study", lambda row: Cell(number(row.tokens_per_study))),
                Column("reads", "for a token", _reads),
                Column("hashing", "s, before loading", lambda row: Cell(number(row.verify_s))),
                Column("first study", "s", lambda row: Cell(number(row.first_total_s))),
                Column("skipped", "studies", lambda row: Cell(f"{row.num_skipped}")),
            ],
        ),
    ]
