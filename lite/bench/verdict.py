"""Which artifact to run, and what it loses: said by rule, from measured figures alone.

    yardstick   the record's texts; without a record those of the largest artifact
    truth       the data's reports; without them the yardstick
    loss        label F1 (micro) beside the truth, less the yardstick's on the same studies: see `lite.eval.paired`

An artifact holds unless its loss is more than chance explains: the whole interval lies below 0. Of those that hold and
skipped the fewest studies the fastest is to be run; among times that overlap (p20 to p80), the one that takes the least
memory. What so few studies cannot show is said, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from lite.bench.columns import SUMMARY, Cell, Column, duration
from lite.bench.results import Bench, RecordQuality, ReportQuality, Row
from lite.eval.figures import Estimate
from lite.eval.labels import read_labels, unreadable
from lite.eval.metrics import label_counts, label_sums
from lite.eval.paired import Comparison, compare
from lite.memory.sizes import shown_bytes

RECORD: Final = "the reference record"
"""What the record is called as a yardstick."""
_WEIGHED: Final = ("study, s", "peak", "on disk", "label F1", "KL")
_WORTH_SAYING: Final = 1.0  # points of label F1 that may be lost unseen


class Choice(NamedTuple):
    """What is to be run, and why."""

    verdict: str  # a sentence
    remarks: Sequence[str] = ()  # what goes with it, a sentence each
    name: str = ""  # of the artifact; empty where none could be measured
    yardstick: str = ""  # whose texts losses are from; empty where there is only one artifact and no record
    columns: Sequence[Column] = ()  # what was weighed


def choose(bench: Bench) -> Choice:
    """Choose by the rule above."""
    rows = [row for row in bench.rows if isinstance(row, Row)]
    if not rows:
        return Choice("Nothing could be measured: the errors are below.")
    largest = max(rows, key=lambda row: row.weight_bytes)
    recorded = any(study.reference_text is not None for study in bench.studies)
    yardstick = RECORD if recorded else largest.name if len(rows) > 1 else ""
    losses = _losses(bench, rows, largest) if yardstick else {}
    whole = [row for row in rows if row.num_skipped == min(row.num_skipped for row in rows)]
    holding = [row for row in whole if row.name not in losses or losses[row.name].difference.high >= 0]
    fastest = min(holding, key=lambda row: row.latency.total.p50, default=None)
    if fastest is not None:
        as_fast = [row for row in holding if row.latency.total.p20 <= fastest.latency.total.p80]
        chosen = min(as_fast, key=lambda row: row.memory.peak_bytes)
    else:
        chosen = max(whole, key=lambda row: losses[row.name].difference.value)
    remarks = list(_remarks(rows, chosen, losses, yardstick))
    if not holding:
        remarks.insert(0, f"Every artifact loses more than chance explains from {yardstick}; this one the least.")
    compared = chosen.name in losses and chosen.name != yardstick
    loses = f", {_points(losses[chosen.name].difference)} from {yardstick}" if compared else ""
    verdict = f"{'Run ' * (len(rows) > 1)}{chosen.name}: {_costs(chosen, largest)}; {_quality(chosen)}{loses}."
    weighed = [column for column in SUMMARY if column.title in _WEIGHED and (recorded or column.title != "KL")]
    lost = Column("loss, points", f"from {yardstick}", lambda row: _loss_cell(row.name, losses, yardstick))
    return Choice(verdict, remarks, chosen.name, yardstick, [*weighed, lost] if losses else weighed)


def _losses(bench: Bench, rows: Sequence[Row], largest: Row) -> dict[str, Comparison]:
    """Return by the rows' names what each loses; those are missing that have no label in common with the yardstick."""
    yardsticks = [study.reference_text for study in bench.studies]
    if all(text is None for text in yardsticks):
        yardsticks = [draft.text if draft.error is None else None for draft in largest.drafts]
    reports = [None if unreadable(study.report) else study.report for study in bench.studies]
    truths = reports if any(reports) else yardsticks
    losses = {}
    for row in rows:
        texts = zip(truths, yardsticks, row.drafts, strict=True)
        kept = [(truth, other, draft.text) for truth, other, draft in texts if draft.error is None]
        read = [tuple(map(read_labels, of)) for of in kept if of[0] is not None and of[1] is not None]
        if read:
            truth, other, ours = zip(*read, strict=True)
            losses[row.name] = compare(*(label_sums(label_counts(truth, of))["label_f1_micro"] for of in (ours, other)))
    return {name: loss for name, loss in losses.items() if not math.isnan(loss.difference.value)}


# -- In words --------------------------------------------------------------------------------------------------------


def _points(of: Estimate) -> str:
    value, low, high = (f"{100 * figure:+.1f}".replace("-", "−") for figure in (of.value, of.low, of.high))
    return f"{value} points ({low} to {high})"


def _costs(row: Row, other: Row) -> str:
    study, peak, disk = row.latency.total.p50, row.memory.peak_bytes, row.disk_bytes
    if row is other:
        return f"{duration(study)} a study, {shown_bytes(peak)} of memory, {shown_bytes(disk)} on disk"
    times = other.latency.total.p50 / study
    speed = f"{times:.1f} × as fast" if times >= 1 else f"takes {1 / times:.1f} × as long"
    less = f"{100 * disk / other.disk_bytes:.0f} % of {other.name}'s size"
    return f"{less}, {100 * peak / other.memory.peak_bytes:.0f} % of its memory, {speed}"


def _quality(row: Row) -> str:
    for quality, beside in ((row.report_quality, "the reports"), (row.record_quality, "the record's texts")):
        if isinstance(quality, ReportQuality | RecordQuality) and not math.isnan(quality.label_f1_micro.value):
            f1 = quality.label_f1_micro
            return f"label F1 {f1.value:.3f} ({f1.low:.3f} to {f1.high:.3f}) beside {beside}"
    return "how good its texts are was not measured"


def _remarks(rows: Sequence[Row], chosen: Row, losses: Mapping[str, Comparison], yardstick: str) -> Iterator[str]:
    loss = losses.get(chosen.name) if chosen.name != yardstick else None
    if loss and not loss.better + loss.worse:
        studies = loss.value.count
        unseen = 100 * (1 - 0.05 ** (1 / studies))  # may be and is seen in none of so many, with 95 % confidence
        yield f"In none of {studies} studies a label differs; in others one may, in up to {unseen:.0f} % of them."
    elif loss and loss.difference.high >= 0 and (low := -100 * loss.difference.low) > _WORTH_SAYING:
        yield f"{loss.value.count} studies cannot tell that loss from none, nor rule out one of {low:.1f} points."
    if isinstance(chosen.record_quality, RecordQuality):
        yield f"{100 * chosen.record_quality.same_text.value:.0f} % of its texts are the record's, word for word."
    for row in rows:
        if row is not chosen and row.name in losses and losses[row.name].difference.high < 0:
            yield f"{row.name} loses more than chance explains: {_points(losses[row.name].difference)}."
        if row.num_skipped:
            yield f"{row.name} skipped {row.num_skipped} of {len(row.drafts)} studies."


def _loss_cell(name: str, losses: Mapping[str, Comparison], yardstick: str) -> Cell:
    if name == yardstick or name not in losses:
        return Cell("the yardstick" if name == yardstick else "not measured", missing=True)
    points, _, between = _points(losses[name].difference).partition(" points ")
    return Cell(points, between)
