"""The tables for people: what was measured, what is modelled for 32 layers, and how we stand against llama.cpp."""

from __future__ import annotations

import math
from typing import Final

from benchmarks.speed.peers.engines import REFERENCE
from benchmarks.speed.peers.estimate import FINDINGS_TOKENS, REAL_LAYERS, Line, estimate, measured_costs, modelled_costs
from benchmarks.speed.peers.measure import Measured, NoRow, Row, Setting
from benchmarks.speed.peers.ratios import OURS, THEIRS, Ratios, against_llama_cpp
from lite.bench.results import Missing
from lite.bench.table import markdown_table

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
    "load s",
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
_END_TO_END: Final = "end to end s"
_RATIOS: Final = ("engine", "layers", "decode tokens/s", "prefill tokens/s", "end to end", "peak memory")


def prefill_flop(row: Row, setting: Setting) -> int:
    """Count the operations of a prefill in the layers' linears."""
    shapes = setting.model.shapes
    left_out = tuple(f"model.layers.{setting.model.num_layers - 1}.{part}" for part in row.last_token_only)
    weights = sum(math.prod(shapes[name]) for name in shapes if "_proj" in name and not name.startswith(left_out))
    return 2 * weights * setting.num_prompt_tokens


def format_report(measured: Measured, setting: Setting) -> str:
    """Return what was measured, what follows for the real depth, and what has to be known of both, as markdown."""
    model, rows = setting.model, measured.rows
    depth = _count(model.num_layers, "decoder layer")
    end_to_end = (_END_TO_END,) if measured.vision is not None else ()
    parts = [
        f"Measured with {depth} and the head, hidden_size {model.config['hidden_size']}, on {setting.device} with "
        f"{_count(setting.threads, 'thread')}: prompts of {_count(setting.num_prompt_tokens, 'token')}, then "
        f"{setting.num_new_tokens} more, {_count(setting.rounds, 'round')}.",
        markdown_table((*_MEASURED, *end_to_end), [_measured_cells(row, setting, measured) for row in rows], left=2),
        f"Modelled (~) for {REAL_LAYERS} layers, which nobody ran: the difference between {depth} and the fewest that "
        "the engine runs with, divided by the layers between them and continued. In brackets the same from p20 of the "
        "one and p80 of the other: where that is wide, more layers or a quieter machine are needed.",
        markdown_table(
            (*_MODELLED, *(f"~{name}" for name in end_to_end)),
            [_modelled_cells(row, model.num_layers, measured) for row in rows],
        ),
    ]
    if ratios := against_llama_cpp(measured, model.num_layers):
        compared = [row for row in rows if isinstance(row, Row) and row.name in (*OURS, *THEIRS)]
        theirs = [row.name for row in compared if row.name in THEIRS]
        together = len({row.turns for row in compared}) == 1
        parts += [
            f"Against {' and '.join(theirs)}, for each figure the better: how many times as fast by the medians of "
            "this run, more than 1 is faster; and how many times the memory, less than 1 is less."
            + ("" if together else " They took no turns with each other: name these alone with --engines."),
            markdown_table(_RATIOS, [_ratio_cells(ratio) for ratio in ratios]),
        ]
    parts.append("\n".join(f"- {note}" for note in _notes(measured, setting)))
    return "\n\n".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    """Return three digits, more before the point if it takes them."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else _number(value)


def _measured_cells(row: Row | NoRow, setting: Setting, measured: Measured) -> tuple[str, ...]:
    with_end = measured.vision is not None
    if isinstance(row, NoRow):
        why = "failed: see below" if row.failed else row.why
        return (row.name, why, *("–",) * (len(_MEASURED) - 2 + with_end))
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
        _seconds(row.load_s),
        "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
        *((_seconds(measured_costs(row, measured.vision).end_to_end_s),) if with_end else ()),
    )


def _modelled_cells(row: Row | NoRow, num_layers: int, measured: Measured) -> tuple[str, ...]:
    with_end = measured.vision is not None
    if isinstance(row, NoRow):
        return (row.name, *("–",) * (len(_MODELLED) - 1 + with_end))
    found = estimate(row, num_layers)
    rate = "–" if isinstance(found.decode, Missing) else f"~{_number(1 / found.decode.modelled_s)}"
    end_to_end_s = modelled_costs(row, num_layers, measured.vision).end_to_end_s
    return (
        row.name,
        *_line_cells(found.decode, 1e3),
        rate,
        *_line_cells(found.prefill, 1.0),
        *(("–" if end_to_end_s is None else f"~{_number(end_to_end_s)}",) if with_end else ()),
    )


def _line_cells(line: Line | Missing, units_per_s: float) -> tuple[str, str, str]:
    if isinstance(line, Missing):
        return "–", "–", "–"
    times = (line.layer_s, line.rest_s, line.modelled_s, line.low_s, line.high_s)
    layer, rest, modelled, low, high = (_number(seconds * units_per_s) for seconds in times)
    return layer, rest, f"~{modelled} ({low}–{high})"


def _ratio_cells(ratios: Ratios) -> tuple[str, ...]:
    mark = "~" if ratios.modelled else ""
    values = (ratios.decode, ratios.prefill, ratios.end_to_end, ratios.peak)
    times = ("–" if value is None else f"{mark}{value:.2f}×" for value in values)
    return (ratios.name, f"{mark}{ratios.num_layers}", *times)


def _notes(measured: Measured, setting: Setting) -> list[str]:
    rows = measured.rows
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
        "load s: from a file that the system holds in memory already to the first token, with the library imported; "
        "the other engines get their weights from no file.",
    ]
    if (vision := measured.vision) is not None:
        notes.append(
            f"end to end s: the vision tower, {_number(vision.p50)} s for an image ({_number(vision.p20)}–"
            f"{_number(vision.p80)}, p20–p80 of {vision.count}), then the prefill and {FINDINGS_TOKENS} tokens, by "
            "their medians. The tower is the same for all, and whole, whatever the number of decoder layers."
        )
    if skipping := [row.name for row in done if row.last_token_only]:
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
