"""Latency against quality, drawn by matplotlib as an SVG whose text stays text and whose colours are the page's.

Every artifact is a numbered bubble: its place says how long a study takes and what is lost, its area how much memory
that needs, the thin lines through it how far the times (p20 to p80) and the loss (95 %) vary. The stepped line is the
Pareto front: no artifact is faster than one on it without losing more.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from lite.eval.figures import Estimate, Quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LossKind = Literal["kl", "label-f1"]

_WIDTH_PT: Final = 396
_HEIGHT_PT: Final = 324
_FONT_PT: Final = 10.5
_NUMBER_PT: Final = 0.75 * _FONT_PT  # half of the room that a number takes
_LARGEST_PT2: Final = 900
_TURNS: Final = (3, 5, 4, 6, 7, 0, 2, 1)  # left and down first: the front leaves its points to the right and upwards
_LOG_FROM: Final = 8  # the largest over the smallest time

# matplotlib knows no CSS variables: these colours are drawn with, and replaced.
_INK, _MUTED, _LINE, _ACCENT = "#102030", "#607080", "#d0d8e0", "#1060b0"
_VARIABLES: Final = {_INK: "var(--ink)", _MUTED: "var(--muted)", _LINE: "var(--line)", _ACCENT: "var(--accent)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One artifact."""

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
        kind: "kl" gets a log axis that is linear from its lowest decade down to 0, "label-f1" (one minus it) a linear
            one from 0.

    Returns:
        An `<svg>` element for an HTML page that defines --ink, --muted, --line and --accent.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava-rad-lite", "font.size": _FONT_PT}):
        # One pixel of matplotlib's is a point.
        figure = Figure(figsize=(_WIDTH_PT / 72, _HEIGHT_PT / 72), dpi=72)
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.18, 0.15, 0.8, 0.82))
        _style(axes)
        _set_time_axis(axes, [point.total.p50 for point in points])
        (_set_kl_axis if kind == "kl" else _set_f1_axis)(axes, [point.loss for point in points])
        _draw_front(axes, points)
        _draw_numbers(axes, points, _draw_bubbles(axes, points))
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inlined(svg.getvalue())


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


def _set_kl_axis(axes: Axes, losses: Sequence[Estimate]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    positive = [loss.value for loss in losses if loss.value > 0] or [1e-6]
    lowest = 10.0 ** math.floor(math.log10(min(positive)))
    highest = 10.0 ** max(math.ceil(math.log10(max(positive))), math.log10(lowest) + 1)
    axes.set_yscale("symlog", linthresh=lowest, linscale=0.7)
    has_zero = any(loss.value == 0 for loss in losses)
    axes.set_ylim(-0.5 * lowest if has_zero else 0.6 * lowest, 1.5 * highest)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylabel("mean KL from the reference, nats per token", color=_INK)


def _set_f1_axis(axes: Axes, losses: Sequence[Estimate]) -> None:
    most = max(0.02, *(loss.high for loss in losses))
    axes.set_ylim(-0.1 * most, 1.15 * most)
    axes.set_ylabel("1 − label F1 against the data's reports", color=_INK)


def _draw_front(axes: Axes, points: Sequence[Point]) -> None:
    front = [(point.total.p50, point.loss.value) for point in pareto_front(points)]
    corners = [(front[0][0], axes.get_ylim()[1]), *front, (axes.get_xlim()[1], front[-1][1])]
    (line,) = axes.step(*zip(*corners, strict=True), where="post", color=_ACCENT, linewidth=1.2, linestyle=(0, (5, 3)))
    line.set_gid("pareto-front")


def _draw_bubbles(axes: Axes, points: Sequence[Point]) -> list[float]:
    """Draw them, those on the front darker, and return their radii in points."""
    largest, front = max(point.peak_bytes for point in points), pareto_front(points)
    areas = [_LARGEST_PT2 * point.peak_bytes / largest for point in points]
    for index, (point, area) in enumerate(zip(points, areas, strict=True)):
        time, loss = point.total, point.loss
        at = [time.p50], [loss.value]
        axes.plot([time.p20, time.p80], [loss.value] * 2, color=_ACCENT, linewidth=1.2)
        axes.plot([time.p50] * 2, [loss.low, loss.high], color=_ACCENT, linewidth=1.2)
        axes.scatter(*at, s=area, color=_ACCENT, alpha=0.45 if point in front else 0.12, linewidths=0)
        rim = axes.scatter(*at, s=area, facecolors="none", edgecolors=_ACCENT, linewidths=1.2)
        rim.set_gid(f"pareto-bubble-{index}")
    return [math.sqrt(area / math.pi) for area in areas]


def _draw_numbers(axes: Axes, points: Sequence[Point], radii: Sequence[float]) -> None:
    """Write the bubbles' numbers, from 1, each where it covers no bubble and no other number."""
    left, bottom, right, top = axes.bbox.extents
    places = [(point.total.p50, point.loss.value) for point in points]
    centres = [axes.transData.transform(place) for place in places]
    taken: list[tuple[float, float, float]] = [(x, y, r) for (x, y), r in zip(centres, radii, strict=True)]
    for index, ((x, y), radius) in enumerate(zip(centres, radii, strict=True)):
        around = (
            (x + reach * math.cos(turn * math.pi / 4), y + reach * math.sin(turn * math.pi / 4))
            for reach in range(round(radius + _NUMBER_PT), round(radius) + 130, 6)
            for turn in _TURNS
        )
        at = next(
            (
                (a, b)
                for a, b in around
                if left + _NUMBER_PT < a < right - _NUMBER_PT
                and bottom + _NUMBER_PT < b < top - _NUMBER_PT
                and all(math.hypot(a - c, b - d) > r + _NUMBER_PT for c, d, r in taken)
            ),
            (x, y),
        )
        taken.append((*at, _NUMBER_PT))
        text = axes.annotate(
            f"{index + 1}", places[index], xytext=(at[0] - x, at[1] - y), textcoords="offset points",
            ha="center", va="center", color=_INK, weight="bold",
        )  # fmt: skip
        text.set_gid(f"pareto-number-{index}")


def _inlined(svg: str) -> str:
    """Put the drawing into an element that takes its size and its colours from the page."""
    _, _, drawing = svg[svg.index("<svg") :].partition(">")
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, variable)
    title = "Latency against quality; the figures are in the table"
    return f'<svg class="plot" viewBox="0 0 {_WIDTH_PT} {_HEIGHT_PT}" role="img" aria-label="{title}">{drawing}'
