"""An int8 cache beside one of float16: what it gains at this context, and what it loses along a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.speed.gpu import model
from benchmarks.speed.gpu.decoding import LiteDecoding, time_in_turns
from benchmarks.speed.kernels import Unavailable
from lite.bench.measure import quantiles
from lite.eval.divergence import compare_logits

if TYPE_CHECKING:
    from benchmarks.speed.gpu.decoding import Decoding
    from benchmarks.speed.gpu.rig import Report, Rig

HEADER: Final = ("cache", "bytes/token of context", "ms/token", "gain", "mean KL, nats", "same top token")


def measure(rig: Rig, report: Report) -> None:
    """Time both in turns, and score one text with both.

    Raises:
        Unavailable: one of them failed.
    """
    setting = rig.setting
    report.header = HEADER
    decoders = {
        "float16": model.part_of(rig.decoder(), capture=rig.capture),
        "int8": model.part_of(rig.decoder(), cache_dtype="int8", capture=rig.capture),
    }
    prompt = model.random_prompt(rig.decoder().config, setting.prompt_tokens, rig.device)
    token_ids, _ = model.greedy(decoders["float16"], prompt, setting.scored_tokens)
    logits = {
        name: decoder.score(prompt.input_ids, token_ids, prompt.features).numpy() for name, decoder in decoders.items()
    }
    divergence = compare_logits(logits["float16"], logits["int8"], token_ids)
    decodings: dict[str, Decoding] = {
        name: LiteDecoding(decoder, rows=1, context=setting.context, new_tokens=setting.new_tokens)
        for name, decoder in decoders.items()
    }
    seconds = time_in_turns(rig, decodings)
    medians = {}
    for name, found in seconds.items():
        if isinstance(found, str):
            raise Unavailable(f"{name} cache: {found}")
        medians[name] = quantiles(found).p50
    gain = 1 - medians["int8"] / medians["float16"]
    kl, same_top = float(np.mean(divergence.kl)), float(np.mean(divergence.same_top))
    for name, median in medians.items():
        lost = (f"{gain:+.1%}", f"{kl:.2g}", f"{same_top:.1%}") if name == "int8" else ("–", "–", "–")
        read = f"{decodings[name].cache_bytes_per_token:,.0f}"
        report.cells.append((name, read, f"{median * 1e3:.3f}", *lost))
    report.figures |= {"gain": gain, "mean_kl": kl, "same_top": same_top, "decode_s": medians}
    report.notes.append(
        f"Times at {setting.context} tokens of context; KL along {len(token_ids)} greedy tokens behind a prompt of "
        f"{setting.prompt_tokens}. Random weights: attention is flatter than a trained model's, so the KL is no "
        "measure of the real one."
    )
