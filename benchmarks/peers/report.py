"""The tables for people, and the model of 32 layers behind the second of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.peers.engines import REFERENCE
from benchmarks.peers.measure import NoRow, Row, Setting
from benchmarks.peers.weights import Model
from lite.bench.results import Missing, Quantiles
from lite.bench.table import markdown_table

REAL_LAYERS: Final = 32
_MEASURED: Final = (
    "engine",
    "computes in",
    "logits off by",
    "read MB/token",
    "decode ms/token",
    "p20–p80",
    "GB/s",
    "of bandwidth",
    "prefill tokens/s",
    "p20–p80",
    "TFLOP/s",
    "peak GB",
)
_MODELLED: Final = (
    "engine",
    "decode ms/layer",
    "rest ms",
    f"~{REAL_LAYERS} layers ms/token",
    "~tokens/s",
    "prefill s/layer",
    "rest s",
    f"~{REAL_LAYERS} layers s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a straight line through two depths says of the real one. Seconds; the first two are of what was run."""

    layer_s: float
    rest_s: float  # embedding, head, all that is there without layers
    modelled_s: float  # of REAL_LAYERS
    low_s: float  # the same through p20 of the deeper and p80 of the other
    high_s: float  # through p80 and p20


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An engine at the real depth, modelled."""

    decode: Line | Missing
    prefill: Line | Missing


def estimate(row: Row, num_layers: int) -> Estimate:
    """Continue the lines through the two depths that were timed to `REAL_LAYERS`."""
    fewer = row.shallow
    prefill: Line | Missing = Missing(why="no prefill was timed")
    if not isinstance(row.prefill, Missing) and fewer.prefill is not None:
        prefill = _line(fewer.num_layers, fewer.prefill, num_layers, row.prefill)
    return Estimate(decode=_line(fewer.num_layers, fewer.decode, num_layers, row.decode), prefill=prefill)


def _line(fewer: int, shallow: Quantiles, more: int, deep: Quantiles) -> Line | Missing:
    if fewer == more:
        return Missing(why="timed at one depth only: give it more --layers")
    layer_s = (deep.p50 - shallow.p50) / (more - fewer)
    if layer_s <= 0:
        return Missing(why=f"noise: {deep.p50:.3g} s with {_count(more, 'layer')}, {shallow.p50:.3g} s with {fewer}")

    def at_real_depth(shallow_s: float, deep_s: float) -> float:
        # No further layers take less time than none.
        return deep_s + (REAL_LAYERS - more) * max(0.0, deep_s - shallow_s) / (more - fewer)

    return Line(
        layer_s=layer_s,
        rest_s=deep.p50 - more * layer_s,
        modelled_s=at_real_depth(shallow.p50, deep.p50),
        low_s=at_real_depth(shallow.p80, deep.p20),
        high_s=at_real_depth(shallow.p20, deep.p80),
    )


def prefill_flop(row: Row, setting: Setting) -> int:
    """Count the operations of a prefill in the layers' linears."""
    shapes = setting.model.shapes
    left_out = f"model.layers.{setting.model.num_layers - 1}.mlp." if row.skips_last_mlp else "nothing"
    weights = sum(math.prod(shapes[name]) for name in shapes if "_proj" in name and not name.startswith(left_out))
    return 2 * weights * setting.num_prompt_tokens


def format_report(rows: Sequence[Row | NoRow], setting: Setting) -> str:
    """Return what was measured, what follows for the real depth, and what has to be known of both, as markdown."""
    model = setting.model
    depth = _count(model.num_layers, "decoder layer")
    parts = [
        f"Measured with {depth} and the head, hidden_size {model.config['hidden_size']}, on {setting.device} with "
        f"{_count(setting.threads, 'thread')}: prompts of {_count(setting.num_prompt_tokens, 'token')}, then "
        f"{setting.num_new_tokens} more, {_count(setting.rounds, 'round')}.",
        markdown_table(_MEASURED, [_measured_cells(row, setting) for row in rows], left=2),
        f"Modelled (~) for {REAL_LAYERS} layers, which nobody ran: the difference between {depth} and the fewest that "
        "the engine runs with, divided by the layers between them and continued. In brackets the same from p20 of the "
        "one and p80 of the other: where that is wide, more layers or a quieter machine are needed.",
        markdown_table(_MODELLED, [_modelled_cells(row, model) for row in rows]),
        "\n".join(f"- {note}" for note in _notes(rows, setting)),
    ]
    return "\n\n".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    """Return three digits, more before the point if it takes them."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _measured_cells(row: Row | NoRow, setting: Setting) -> tuple[str, ...]:
    if isinstance(row, NoRow):
        why = "failed: see below" if row.failed else row.why
        return (row.name, why, *("–",) * (len(_MEASURED) - 2))
    nbytes = row.weight_bytes + row.cache_bytes
    achieved = nbytes / row.decode.p50
    prefill = ("–¹", "–", "–")
    if not isinstance(row.prefill, Missing):
        tokens, seconds = setting.num_prompt_tokens, row.prefill
        spread = f"{_number(tokens / seconds.p80)}–{_number(tokens / seconds.p20)}"
        prefill = (_number(tokens / seconds.p50), spread, f"{prefill_flop(row, setting) / seconds.p50 / 1e12:.3g}")
    return (
        row.name,
        row.computes_in,
        "–" if row.name == REFERENCE.name else f"{row.difference:.1e}",
        _number(nbytes / 1e6),
        _number(row.decode.p50 * 1e3),
        f"{_number(row.decode.p20 * 1e3)}–{_number(row.decode.p80 * 1e3)}",
        _number(achieved / 1e9),
        f"{achieved / row.bandwidth:.0%}",
        *prefill,
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
    )


def _modelled_cells(row: Row | NoRow, model: Model) -> tuple[str, ...]:
    if isinstance(row, NoRow):
        return (row.name, *("–",) * (len(_MODELLED) - 1))
    found = estimate(row, model.num_layers)
    rate = "–" if isinstance(found.decode, Missing) else f"~{_number(1 / found.decode.modelled_s)}"
    return (row.name, *_line_cells(found.decode, 1e3), rate, *_line_cells(found.prefill, 1.0))


def _line_cells(line: Line | Missing, units_per_s: float) -> tuple[str, str, str]:
    if isinstance(line, Missing):
        return "–", "–", "–"
    times = (line.layer_s, line.rest_s, line.modelled_s, line.low_s, line.high_s)
    layer, rest, modelled, low, high = (_number(seconds * units_per_s) for seconds in times)
    return layer, rest, f"~{modelled} ({low}–{high})"


def _notes(rows: Sequence[Row | NoRow], setting: Setting) -> list[str]:
    done = [row for row in rows if isinstance(row, Row)]
    bandwidths = {row.turns: f"{row.bandwidth / 1e9:.3g}" for row in done}
    together = "All engines were loaded at once and took turns."
    if len(bandwidths) > 1:
        listed = "; ".join(", ".join(group) for group in bandwidths)
        together = f"Memory did not hold all engines at once. These took turns, one group after the other: {listed}."
    memory = "of the process (RSS)" if setting.device == "cpu" else "of torch's allocator (VRAM)"
    notes = [
        f"Bandwidth: a streaming read by {_count(setting.threads, 'thread')} in this run: "
        f"{' and '.join(bandwidths.values())} GB/s{' (a measurement for each group)' if len(bandwidths) > 1 else ''}. "
        "Read for a token: all weights but the embedding table, and the keys and values of the context.",
        f"logits off by: root mean square of the difference from {REFERENCE.name}, relative, on one short text. The "
        "weights are random, the same for all, rounded to nearest by each format: this shows that the engines compute "
        "the same, not how good a format is.",
        f"{together} Loading, the check and a probe came before that.",
        f"TFLOP/s counts the layers' linears, as far as they are computed. Peak memory is that {memory} once loaded.",
    ]
    if skipping := [row.name for row in done if row.skips_last_mlp]:
        notes.append(
            f"{', '.join(skipping)}: of a prompt only the last token goes through the last layer's feed-forward half. "
            "With so few layers that flatters prefill tokens/s, and leaves less than nothing as the rest; the figures "
            f"for {REAL_LAYERS} layers are not distorted by it."
        )
    for row in done:
        if isinstance(row.prefill, Missing):
            notes.append(
                f"¹ {row.name}: prefill {row.prefill.why}. To decode, its cache was filled with random keys and values."
            )
        if row.decode.count < setting.num_new_tokens * setting.rounds:
            notes.append(f"{row.name}: only {row.decode.count} tokens were timed, as one takes {row.decode.p50:.2g} s.")
        found = estimate(row, setting.model.num_layers)
        for what, line in (("decode", found.decode), ("prefill", found.prefill)):
            if isinstance(line, Missing) and not isinstance(row.prefill, Missing):
                notes.append(f"{row.name}: no modelled {what}: {line.why}.")
    return notes + [f"{row.name} failed: {row.why}" for row in rows if isinstance(row, NoRow) and row.failed]
