"""An int8 cache beside one of float16: what it gains at this context, and what it loses along a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.decoders import part_of
from benchmarks.speed.engine import greedy, random_prompt, score
from benchmarks.speed.gpu.lanes import lane_of, time_lanes
from benchmarks.speed.harness import Row, Unavailable
from lite.eval.divergence import compare_logits

if TYPE_CHECKING:
    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report


def measure(rig: Rig, report: Report) -> None:
    """Time both in turns, and score one text with both.

    Raises:
        Unavailable: one of them failed.
    """
    setting = rig.setting
    decoders = {
        "float16": part_of(rig.decoder(), capture=rig.capture),
        "int8": part_of(rig.decoder(), cache_dtype="int8", capture=rig.capture),
    }
    prompt = random_prompt(rig.decoder().config, setting.prompt_tokens, rig.device)
    token_ids, _ = greedy(decoders["float16"], prompt, setting.scored_tokens)
    logits = {name: score(decoder, prompt, token_ids) for name, decoder in decoders.items()}
    divergence = compare_logits(logits["float16"], logits["int8"], token_ids)
    kl, same_top = float(np.mean(divergence.kl)), float(np.mean(divergence.same_top))
    lanes = {name: lane_of(rig, decoder, 1) for name, decoder in decoders.items()}
    rows = {name: Row(names={"cache": name}) for name in lanes}
    time_lanes(rig, lanes, rows, rig.measured_bandwidth())
    for row in rows.values():
        report.add(row)
        if row.time is None:
            raise Unavailable(f"{row.label} cache: {row.why}")
        row.cells["bytes/token of context"] = f"{lanes[row.label].rows.bytes_per_token:,.0f}"
    seconds = {name: row.time.p50 for name, row in rows.items() if row.time is not None}
    gain = 1 - seconds["int8"] / seconds["float16"]
    rows["int8"].cells |= {"gain": f"{gain:+.1%}", "mean KL, nats": f"{kl:.2g}", "same top token": f"{same_top:.1%}"}
    report.figures |= {"gain": gain, "mean_kl": kl, "same_top": same_top}
    report.notes.append(
        f"Times at {setting.context} tokens of context; KL along {len(token_ids)} greedy tokens behind a prompt of "
        f"{setting.prompt_tokens}. Random weights: attention is flatter than a trained model's, so the KL is no "
        "measure of the real one."
    )
