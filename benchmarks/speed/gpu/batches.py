"""Many studies: a session, where a row that ends is given to the next, beside batches that wait for their longest text.

Prompts of one length with an image of noise, texts of different lengths, random but the same for both ways. The tower
is not in it.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.speed.decoders import part_of
from benchmarks.speed.engine import draft, new_session, random_prompt
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
        session = new_session(decoder, prompt, num_rows=size, longest=longest, max_queue=len(lengths))
        with contextlib.closing(session):
            # Compiles; and as the last rows end first, every number of rows is decoded and captured once.
            draft(session, prompt, [3 * (size - row) for row in range(size)])
            for batching, groups in {"continuous": [lengths], "static": waiting}.items():
                started = time.perf_counter()
                for group in groups:
                    draft(session, prompt, group)
                seconds, tokens, studies = time.perf_counter() - started, sum(lengths), len(lengths)
                row = Row(names={"batching": batching, "cache": cache_dtype or "float16"}, time=quantiles([seconds]))
                row.figures |= {"rows": session.loop.num_rows, "tokens": tokens, "studies": studies}
                row.cells |= {
                    "rows": str(session.loop.num_rows),  # fewer where memory was short
                    "tokens/s": f"{tokens / seconds:,.0f}",
                    "studies/min": f"{60 * studies / seconds:,.0f}",
                }
                report.add(row)
        del decoder, session
        rig.tidy()
