"""Many studies: a session, where a row that ends is given to the next, beside batches that wait for their longest text.

Prompts of one length with an image of noise, texts of different lengths, random but the same for both ways. The tower
is not in it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.decoders import part_of
from benchmarks.speed.engine import draft_all, random_prompt
from benchmarks.speed.harness import Row
from lite.eval.figures import quantiles

if TYPE_CHECKING:
    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.artifact.parts import CacheDtype


def measure(rig: Rig, report: Report) -> None:
    """Run all requests both ways, with either cache."""
    setting, size = rig.setting, rig.setting.batch_size
    shortest, longest = setting.text_tokens
    report.notes.append(
        f"{setting.requests} studies: a prompt of {setting.prompt_tokens} tokens, {shortest} to {longest} of text. "
        "int4, by the host's clock, without the vision tower."
    )
    prompt = random_prompt(rig.decoder().config, setting.prompt_tokens, rig.device)
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, setting.requests).tolist()
    waiting = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    for cache_dtype in cache_dtypes:
        decoder = part_of(rig.decoder(), cache_dtype=cache_dtype, capture=rig.capture)
        decoder.chunk_size = max(setting.chunk_sizes)
        # Compiles; and as the last rows end first, every number of rows is decoded and captured once.
        draft_all(decoder, prompt, [3 * (size - row) for row in range(size)], size, longest)
        for batching, groups in {"continuous": [lengths], "static": waiting}.items():
            row = Row(names={"batching": batching, "cache": cache_dtype or "float16"})
            report.add(row)
            if rig.is_late():
                row.why = "the section's time is up"
                continue
            started = time.perf_counter()
            left = min(draft_all(decoder, prompt, group, size, longest) for group in groups)
            seconds, tokens = time.perf_counter() - started, sum(lengths)
            row.time = quantiles([seconds])
            row.figures |= {"rows": left, "tokens": tokens, "studies": len(lengths)}
            row.cells |= {
                "rows": str(left),  # fewer where memory was short
                "tokens/s": f"{tokens / seconds:,.0f}",
                "studies/min": f"{60 * len(lengths) / seconds:,.0f}",
            }
        del decoder
        rig.tidy()
