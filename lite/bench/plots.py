"""Latency against quality, drawn by matplotlib as an SVG whose text stays text and whose colours are the page's.

Every artifact is a bubble: its place says how long a study takes and what is lost, its area how much memory that needs,
the thin lines through it how far the times (p20 to p80) and the loss (95 %) vary. The stepped line is the Pareto front:
no artifact is faster than one on it without losing more.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from lite.eval.figures import Estimate, Quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LossKind = Literal["kl", "label-f1"]
Height: TypeAlias = Callable[[float], float]  # a loss to its place on the vertical axis
Box: TypeAlias = tuple[float, float, float, float]  # left, bottom, right, top in points

_WIDTH_PT: Final = 396
_HEIGHT_PT: Final = 324
_FONT_PT: Final = 10.5
_CHARACTER_PT: Final = 0.6 * _FONT_PT  # rather more than one takes in most fonts: the page's is not known here
_LONGEST_LABEL: Final = 34
_LARGEST_PT2: Final = 900
# Left and down first: the front leaves its points to the right and upwards.
_DIRECTIONS: Final = ((-1, 0), (-1, -1), (1, -1), (0, -1), (1, 0), (-1, 1), (1, 1), (0, 1))
_LOG_FROM: Final = 8  # the largest over the smallest time

# matplotlib knows no CSS variables: these colours are drawn with, and replaced.
_INK, _MUTED, _LINE, _ACCENT = "#102030", "#607080", "#d0d8e0", "#1060b0"
_VARIABLES: Final = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)", _ACCENT: "var(--accent)"}
_SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One artifact."""

    label: str
    total: Quantiles  # a study end to end, in seconds
    loss: Estimate  # the less the better, at least 0
    peak_bytes: int


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """Return the points that no other one beats in time or loss without being behind in the other, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.total.p50, point.loss.value)):
        if not front or point.loss.value < front[-1].loss.value:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point], kind: LossKind) -> str:
    """Draw the plot; the same points make the same text.

    Args:
        points: at least one, with finite figures.
        kind: "kl" gets a log axis with a place for 0 below it, "label-f1" (one minus it) a linear one from 0.

    Returns:
        An `<svg>` element for an HTML page that defines --ink, --muted, --line and --accent.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava-rad-lite", "font.size": _FONT_PT}):
        # One pixel of matplotlib's is a point.
        figure = Figure(figsize=(_WIDTH_PT / 72, _HEIGHT_PT / 72), dpi=72)
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.14, 0.15, 0.84, 0.82))
        _style(axes)
        _set_time_axis(axes, [point.total.p50 for point in points])
        height = (_set_kl_axis if kind == "kl" else _set_f1_axis)(axes, [point.loss for point in points])
        _draw_front(axes, points, height)
        radii = _draw_bubbles(axes, points, height)
        labels = _draw_labels(axes, points, height, radii)
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inlined(svg.getvalue(), labels)


def _style(axes: Axes) -> None:
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(which="both", color=_MUTED, labelcolor=_INK)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _set_time_axis(axes: Axes, seconds: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    least, most = min(seconds), max(seconds)
    if most >= _LOG_FROM * least:
        margin = (most / least) ** 0.15
        axes.set_xscale("log")
        axes.set_xlim(least / margin, most * margin)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.2 * most)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("seconds for a study, end to end", color=_INK)


def _set_kl_axis(axes: Axes, losses: Sequence[Estimate]) -> Height:
    """Make an axis of decades, broken below the last of them where there are losses of 0 to show."""
    positive = [loss.value for loss in losses if loss.value > 0] or [1e-6]
    lowest = math.floor(math.log10(min(positive)))
    highest = max(math.ceil(math.log10(max(positive))), lowest + 1)
    decades = range(lowest, highest + 1, math.ceil((highest - lowest) / 8))
    ticks = {float(decade): f"10{str(decade).translate(_SUPERSCRIPTS)}" for decade in decades}
    zero, bottom = lowest - 1.0, lowest - 0.3
    if any(loss.value == 0 for loss in losses):
        bottom = zero - 0.5
        ticks[zero] = "0"
        axes.axhline(lowest - 0.45, color=_MUTED, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_ylim(bottom, highest + 0.12 * (highest - bottom))
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylabel("mean KL from the reference, nats per token", color=_INK)
    return lambda kl: math.log10(kl) if kl > 10**zero else zero


def _set_f1_axis(axes: Axes, losses: Sequence[Estimate]) -> Height:
    most = max(0.02, *(loss.high for loss in losses))
    axes.set_ylim(-0.1 * most, 1.15 * most)
    axes.set_ylabel("1 − label F1 against the data's reports", color=_INK)
    return lambda loss: loss


def _draw_front(axes: Axes, points: Sequence[Point], height: Height) -> None:
    front = [(point.total.p50, height(point.loss.value)) for point in pareto_front(points)]
    corners = [(front[0][0], axes.get_ylim()[1]), *front, (axes.get_xlim()[1], front[-1][1])]
    (line,) = axes.step(*zip(*corners, strict=True), where="post", color=_ACCENT, linewidth=1.2, linestyle=(0, (5, 3)))
    line.set_gid("pareto-front")


def _draw_bubbles(axes: Axes, points: Sequence[Point], height: Height) -> list[float]:
    """Draw them, those on the front darker, and return their radii in points."""
    largest, front = max(point.peak_bytes for point in points), pareto_front(points)
    areas = [_LARGEST_PT2 * point.peak_bytes / largest for point in points]
    for index, (point, area) in enumerate(zip(points, areas, strict=True)):
        time, loss, at = point.total, point.loss, height(point.loss.value)
        axes.plot([time.p20, time.p80], [at, at], color=_ACCENT, linewidth=1.2)
        axes.plot([time.p50, time.p50], [height(loss.low), height(loss.high)], color=_ACCENT, linewidth=1.2)
        axes.scatter([time.p50], [at], s=area, color=_ACCENT, alpha=0.45 if point in front else 0.12, linewidths=0)
        rim = axes.scatter([time.p50], [at], s=area, facecolors="none", edgecolors=_ACCENT, linewidths=1.2)
        rim.set_gid(f"pareto-bubble-{index}")
    return [math.sqrt(area / math.pi) for area in areas]


def _draw_labels(axes: Axes, points: Sequence[Point], height: Height, radii: Sequence[float]) -> dict[str, str]:
    """Place each label where it covers no bubble and no other label, as near to its own bubble as that allows.

    Returns:
        What was drawn for each label, and the label: matplotlib warns of letters that its own font has not.
    """
    left, bottom, right, top = axes.bbox.extents
    places = [(point.total.p50, height(point.loss.value)) for point in points]
    centres = [axes.transData.transform(place) for place in places]
    labels: dict[str, str] = {}
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(centres, radii, strict=True)]
    for index, ((x, y), radius) in enumerate(zip(centres, radii, strict=True)):
        label = _shortened(points[index].label)
        boxes = list(_boxes_around(x, y, radius, len(label)))
        within = [b for b in boxes if left <= b[0] and bottom <= b[1] and b[2] <= right and b[3] <= top] or boxes
        box = next((b for b in within if not any(_overlap(b, other) for other in taken)), within[0])
        taken.append(box)
        near = boxes.index(box) < len(_DIRECTIONS)
        drawn = str(index).ljust(len(label), "x")
        labels[drawn] = label
        text = axes.annotate(
            drawn,
            places[index],
            xytext=((box[0] + box[2]) / 2 - x, (box[1] + box[3]) / 2 - y),
            textcoords="offset points",
            ha="center",
            va="center",
            color=_INK,
            arrowprops=None if near else {"arrowstyle": "-", "color": _MUTED, "linewidth": 0.6, "shrinkB": radius},
        )
        text.set_gid(f"pareto-label-{index}")
    return labels


def _boxes_around(x: float, y: float, radius: float, num_characters: int) -> Iterator[Box]:
    """Yield where a label can stand beside a bubble, the best places first."""
    width, height = _CHARACTER_PT * num_characters, 1.2 * _FONT_PT
    for distance in range(4, 130, 9):
        for across, up in _DIRECTIONS:
            reach = (radius + distance) / math.hypot(across, up)
            left = x + across * (reach + width / 2) - width / 2
            bottom = y + up * (reach + height / 2) - height / 2
            yield left, bottom, left + width, bottom + height


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shortened(label: str) -> str:
    """Keep the end of a long label: paths differ there."""
    label = " ".join(label.split())
    return label if len(label) <= _LONGEST_LABEL else f"…{label[1 - _LONGEST_LABEL :]}"


def _inlined(svg: str, labels: dict[str, str]) -> str:
    """Put the drawing, with its labels, into an element that takes its size and its colours from the page."""
    _, _, drawing = svg[svg.index("<svg") :].partition(">")
    for drawn, label in labels.items():
        drawing = drawing.replace(f">{drawn}<", f">{html.escape(label)}<")
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, variable)
    title = "Latency against quality; the figures are in the table"
    return f'<svg class="plot" viewBox="0 0 {_WIDTH_PT} {_HEIGHT_PT}" role="img" aria-label="{title}">{drawing}'
