"""The tables: what was measured, what is modelled for 32 layers, and how we stand against llama.cpp."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.speed.harness import NONE, Report, Row, shown, spread
from benchmarks.speed.line import REAL_LAYERS, fit
from benchmarks.speed.peers.measure import Measured, NotMeasured, Setting
from benchmarks.speed.peers.specs import OURS, REFERENCE, THEIRS
from lite.eval.figures import Quantiles

FINDINGS_TOKENS: Final = 100
"""Decoded for a draft, end to end."""


# -- What follows from the times -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelled:
    """What a straight line through two depths says of the real one, in seconds."""

    layer_s: float
    rest_s: float
    at_s: float  # of REAL_LAYERS
    low_s: float  # the same through p20 of the deeper and p80 of the other
    high_s: float  # through p80 and p20

    def cells(self, what: str, unit_s: float) -> dict[str, str]:
        """Return its columns."""
        layer, rest, at, low, high = (
            shown(value / unit_s) for value in (self.layer_s, self.rest_s, self.at_s, self.low_s, self.high_s)
        )
        unit = "ms" if unit_s == 1e-3 else "s"
        return {
            f"{what} {unit}/layer": layer,
            f"{what} rest {unit}": rest,
            f"~{REAL_LAYERS} layers {what} {unit}": f"~{at} ({low}–{high})",
        }


def modelled(measured: Measured, times: Callable[[int], Quantiles | None]) -> Modelled | str:
    """Continue the line through the two depths that were timed to `REAL_LAYERS`; or say why it cannot be done."""
    if len(measured.times) < 2:
        return "timed at one depth only: give it more --layers"
    fewer, more = min(measured.times), max(measured.times)
    shallow, deep = times(fewer), times(more)
    if shallow is None or deep is None:
        return "no prefill was timed"
    line = fit([fewer, more], [shallow.p50, deep.p50])
    if line.each <= 0:
        return f"noise: {deep.p50:.3g} s with {more} layers, {shallow.p50:.3g} s with {fewer}"

    def at_real_depth(shallow_s: float, deep_s: float) -> float:
        # No further layers take less time than none.
        return deep_s + (REAL_LAYERS - more) * max(0.0, deep_s - shallow_s) / (more - fewer)

    return Modelled(
        layer_s=line.each,
        rest_s=line.rest,
        at_s=line.at(REAL_LAYERS),
        low_s=at_real_depth(shallow.p80, deep.p20),
        high_s=at_real_depth(shallow.p20, deep.p80),
    )


def modelled_decode(measured: Measured) -> Modelled | str:
    """Model a token."""
    return modelled(measured, lambda depth: measured.times[depth].decode)


def modelled_prefill(measured: Measured) -> Modelled | str:
    """Model a prefill."""
    return modelled(measured, lambda depth: measured.times[depth].prefill)


Costs = dict[str, float | None]
"""decode, prefill, end to end: seconds; peak: bytes. Less is better of each; None where it was not measured."""


def costs(measured: Measured, vision: Quantiles | None, *, real_depth: bool = False) -> Costs:
    """Return what an engine takes, by medians: with the layers it has, or modelled for `REAL_LAYERS`."""
    if real_depth:
        decode_s, prefill_s = (
            None if isinstance(line, str) else line.at_s
            for line in (modelled_decode(measured), modelled_prefill(measured))
        )
    else:
        decode_s = measured.whole.decode.p50
        prefill_s = measured.whole.prefill.p50 if measured.whole.prefill else None
    end_to_end_s = None
    if vision is not None and prefill_s is not None and decode_s is not None:
        # The tower has all of its layers already.
        end_to_end_s = vision.p50 + prefill_s + FINDINGS_TOKENS * decode_s
    peak = None if real_depth else measured.peak_bytes
    return {"decode": decode_s, "prefill": prefill_s, "end to end": end_to_end_s, "peak memory": peak}


def ratios(found: Sequence[Measured], vision: Quantiles | None, *, real_depth: bool) -> dict[str, Costs]:
    """Set our ONNX engine against the better of llama.cpp's 4 bits in each figure, whichever setting that comes from.

    Returns:
        For each of ours how many times as fast it is, more is better; and how many times the memory, less is better.
    """
    by_name = {one.name: costs(one, vision, real_depth=real_depth) for one in found}
    theirs = [by_name[name] for name in THEIRS if name in by_name]
    against: dict[str, Costs] = {}
    for name in OURS if theirs else ():
        if name in by_name:
            ours = by_name[name]
            best = {what: _least(one[what] for one in theirs) for what in ours}
            against[name] = {what: _over(best[what], ours[what]) for what in ours}
            against[name]["peak memory"] = _over(ours["peak memory"], best["peak memory"])
    return {name: values for name, values in against.items() if any(value is not None for value in values.values())}


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _over(value: float | None, unit: float | None) -> float | None:
    return None if value is None or unit is None else value / unit


# -- The tables ------------------------------------------------------------------------------------------------------


def reports(
    found: Sequence[Measured | NotMeasured], vision: Quantiles | None, setting: Setting
) -> dict[str, Report]:  # fmt: skip
    """Return what was measured, what follows for the real depth, and what has to be known of both."""
    done = [one for one in found if isinstance(one, Measured)]
    measured = Report(title=f"Measured: {setting.model.num_layers} decoder layers and the head, on {setting.device}")
    for one in found:
        if isinstance(one, Measured):
            measured.add(_measured_row(one, vision, setting))
        else:
            measured.add(
                Row(names={"engine": one.name, "computes in": NONE}, why=one.why, is_wrong=one.failed)
            )  # fmt: skip
    measured.figures["vision_s"] = vision
    measured.notes += _notes(done, vision, setting)
    real = Report(title=f"Modelled (~) for {REAL_LAYERS} layers, which nobody ran")
    real.notes.append(
        "The difference between all layers and the fewest that the engine runs with, divided by the layers between "
        "them and continued. In brackets the same from p20 of the one and p80 of the other: where that is wide, more "
        "layers or a quieter machine are needed."
    )
    for one in done:
        _model(one, vision, real)
    sections = {"measured": measured, "modelled": real}
    compared = [one for one in done if one.name in (*OURS, *THEIRS)]
    against = {mark: ratios(done, vision, real_depth=bool(mark)) for mark in ("", "~")}
    if against[""]:
        report = Report(title="Against the better of llama.cpp's two attention settings at Q4_0, by medians")
        report.notes.append("× as fast: more than 1 is faster. × the memory: less than 1 is less.")
        if len({one.turns for one in compared}) > 1:
            report.notes.append("They took no turns with each other: name these alone with --engines.")
        depth = setting.model.num_layers
        for mark, name in itertools.product(against, OURS):
            if name in against[mark]:
                values = against[mark][name]
                cells = {what: NONE if value is None else f"{mark}{value:.2f}×" for what, value in values.items()}
                report.lines.append({"engine": name, "layers": f"~{REAL_LAYERS}" if mark else str(depth), **cells})
        report.figures |= {"measured": against[""], "modelled": against["~"]}
        sections["ratios"] = report
    return sections


def _measured_row(one: Measured, vision: Quantiles | None, setting: Setting) -> Row:
    about, whole, found = one.about, one.whole, costs(one, vision)
    cells = {"logits off by": NONE if one.name == REFERENCE.name else f"{one.difference:.1e}"}
    if (prefill := whole.prefill) is not None:
        tokens = setting.num_prompt_tokens
        rates = [shown(tokens / seconds) for seconds in (prefill.p50, prefill.p80, prefill.p20)]
        cells["prefill tokens/s"] = f"{rates[0]} ({rates[1]}–{rates[2]})"
    else:
        cells["prefill tokens/s"] = "–¹"
    cells["load s"] = NONE if about["load_s"] is None else shown(about["load_s"])
    cells["peak GB"] = NONE if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f}"
    if vision is not None:
        cells["end to end s"] = NONE if found["end to end"] is None else shown(found["end to end"])
    cache_bytes = about["cache_bytes_per_token"] * one.context
    figures = {name: about[name] for name in ("versions", "weight_bytes", "last_token_only", "load_s")}
    return Row(
        names={"engine": one.name, "computes in": about["computes_in"]},
        time=whole.decode,
        nbytes=about["weight_bytes"] + cache_bytes,
        bandwidth=one.bandwidth,
        cells=cells,
        figures=figures
        | {"difference": one.difference, "cache_bytes": cache_bytes, "times": one.times, "peak_bytes": one.peak_bytes}
        | {"end_to_end_s": found["end to end"], "turns": one.turns, "no_prefill": one.slow},
    )


def _model(one: Measured, vision: Quantiles | None, report: Report) -> None:
    decode, prefill = modelled_decode(one), modelled_prefill(one)
    line = {"engine": one.name}
    for what, model, unit_s in (("decode", decode, 1e-3), ("prefill", prefill, 1.0)):
        if not isinstance(model, str):
            line |= model.cells(what, unit_s)
            if what == "decode":
                line["~tokens/s"] = f"~{shown(1 / model.at_s)}"
        elif not one.slow:
            report.notes.append(f"{one.name}: no modelled {what}: {model}.")
    end_to_end_s = costs(one, vision, real_depth=True)["end to end"]
    if end_to_end_s is not None:
        line["~end to end s"] = f"~{shown(end_to_end_s)}"
    report.lines.append(line)
    report.figures[one.name] = {"decode": decode, "prefill": prefill, "end_to_end_s": end_to_end_s}


def _notes(done: Sequence[Measured], vision: Quantiles | None, setting: Setting) -> list[str]:
    bandwidths = {one.turns: f"{one.bandwidth / 1e9:.3g}" for one in done}
    together = "All engines were loaded at once and took turns."
    if len(bandwidths) > 1:
        listed = "; ".join(", ".join(group) for group in bandwidths)
        together = f"Memory did not hold all engines at once. These took turns, one group after the other: {listed}."
    memory = "of the process (RSS)" if setting.device == "cpu" else "of torch's allocator (VRAM)"
    notes = [
        f"hidden_size {setting.model.shapes.hidden_size}; {setting.threads} threads; prompts of "
        f"{setting.num_prompt_tokens} tokens, then {setting.num_new_tokens} more; {setting.rounds} rounds. ms is of a "
        "decoded token.",
        f"Bandwidth of a streaming read by as many threads in this run: {' and '.join(bandwidths.values())} GB/s. Read "
        "for a token: all weights but the embedding table, and the keys and values of the context.",
        f"logits off by: root mean square of the difference from {REFERENCE.name}, relative, on one short text. The "
        "weights are random, the same for all, rounded to nearest by each format: this shows that the engines compute "
        "the same, not how good a format is.",
        f"{together} Loading, the check and a probe came before that.",
        f"Peak memory is that {memory} once loaded.",
        "load s: from a file that the system holds in memory already to the first token, with the library imported; "
        "the other engines get their weights from no file.",
    ]
    if vision is not None:
        notes.append(
            f"end to end s: the vision tower, {spread(vision, 1)} s for an image, then the prefill and "
            f"{FINDINGS_TOKENS} tokens, by their medians. The tower is the same for all, and whole."
        )
    if skipping := [one.name for one in done if one.about["last_token_only"]]:
        notes.append(
            f"{', '.join(skipping)}: of a prompt only the last token goes through the last layer's feed-forward half. "
            "With so few layers that flatters prefill tokens/s, and leaves less than nothing as the rest; the figures "
            f"for {REAL_LAYERS} layers are not distorted by it."
        )
    for one in done:
        if one.slow:
            notes.append(f"¹ {one.name}: prefill {one.slow}. Its cache was filled with random keys and values.")
        if (decode := one.whole.decode).count < setting.num_new_tokens * setting.rounds:
            notes.append(f"{one.name}: only {decode.count} tokens were timed, as one takes {decode.p50:.2g} s.")
    return notes
