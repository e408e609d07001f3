"""A prompt through our int4 decoder, beside cuBLAS alone: the float16 products of the same shapes and nothing else.

With `fp16_accumulation` cuBLAS may add up in float16: faster on GeForce cards, less exact. What that loses is measured
on the same prompt, and it has a gate: a mean KL above `MAX_KL` does not pass, however fast it is.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn import functional

from benchmarks.speed.decoders import dequantized, part_of
from benchmarks.speed.engine import Prompt, Rows, greedy, random_prompt, score
from benchmarks.speed.harness import Clock, Row, in_turns, spread, timed
from lite.engines.torch_engine.linear import linears_of
from lite.eval.divergence import compare_logits
from lite.eval.figures import quantiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.engines.torch_engine.decoder import LlamaDecoder

MAX_KL: Final = 1e-3
_ALONE: Final = "cuBLAS alone"


def measure(rig: Rig, report: Report) -> None:
    """Measure prefill at each chunk size, with either kind of sums where torch has both."""
    setting, switch = rig.setting, accumulation_switch()
    decoder = part_of(rig.decoder())
    prompt = random_prompt(decoder.config, setting.prompt_tokens, rig.device)
    report.notes.append(
        f"{setting.prompt_tokens} tokens, the last one's logits included; random weights in 4 bits. cuBLAS alone: a "
        "float16 product for each linear, all tokens at once."
    )
    for fp16 in (False, True) if switch else (False,):
        runs: dict[str, Callable[[], object]] = {
            f"lite int4, chunks of {chunk}": _prefill(decoder, prompt, chunk) for chunk in setting.chunk_sizes
        }
        runs[_ALONE] = _products(decoder, setting.prompt_tokens)
        with accumulating(decoder, in_float16=fp16):
            for run in runs.values():
                run()  # untimed
            turns = {what: functools.partial(timed, run, rig.clock()) for what, run in runs.items()}
            found = in_turns(turns, setting.rounds)
        for what, times in found.items():
            row = Row(names={"what": what, "sums": "float16" if fp16 else "float32"}, against=_ALONE)
            row.took(times, "" if what == _ALONE else found[_ALONE])
            if row.time is not None:
                row.cells["tokens/s"] = f"{setting.prompt_tokens / row.time.p50:,.0f}"
            report.add(row)
        del runs
        rig.tidy()
    if switch:
        judge_fp16_sums(rig, report, decoder, prompt)
    else:
        report.notes.append(f"float16 sums: torch {torch.__version__} cannot, 2.7 can.")
    _first_token(rig, report, decoder, prompt)


def accumulation_switch() -> bool:
    """Say whether torch can let cuBLAS add up in float16."""
    return hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")


@contextlib.contextmanager
def accumulating(decoder: LlamaDecoder, *, in_float16: bool) -> Iterator[None]:
    """Let a decoder's prompts, and torch's own products, add up in float16 meanwhile, or in float32."""
    linears = linears_of(decoder).values()
    switch: Any = torch.backends.cuda.matmul
    before = switch.allow_fp16_accumulation if accumulation_switch() else None
    for linear in linears:
        linear.fp16_accumulation = in_float16
    if before is not None:
        switch.allow_fp16_accumulation = in_float16
    try:
        yield
    finally:
        for linear in linears:
            linear.fp16_accumulation = False
        if before is not None:
            switch.allow_fp16_accumulation = before


def _prefill(decoder: LlamaDecoder, prompt: Prompt, chunk: int) -> Callable[[], object]:
    rows = Rows(decoder, 1, prompt.num_tokens)

    def run() -> None:
        decoder.chunk_size = chunk
        rows.read(prompt)

    return run


def _products(decoder: LlamaDecoder, tokens: int) -> Callable[[], object]:
    """Prepare one float16 product for each linear of all layers; layers share their weights, larger than any cache."""
    dtype = torch.float16 if decoder.device.type == "cuda" else torch.float32
    drawn = [
        torch.randn(sum(linear.parts.values()), linear.in_features, device=decoder.device).to(dtype)
        for linear in linears_of(decoder.model.layers[0]).values()
    ]
    # Of order 1 throughout, as activations are: zeros would be faster.
    inputs = [torch.randn(tokens, weight.shape[1], device=decoder.device).to(dtype) for weight in drawn]
    head = dequantized(decoder.lm_head, dtype)
    last = torch.randn(1, head.shape[1], device=decoder.device).to(dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(decoder.config.num_hidden_layers):
            for x, weight in zip(inputs, drawn, strict=True):
                functional.linear(x, weight)
        functional.linear(last, head)

    return run


def judge_fp16_sums(rig: Rig, report: Report, decoder: LlamaDecoder, prompt: Prompt) -> None:
    """Compare the logits that both kinds of sums lead to, along a text."""
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    token_ids, _ = greedy(decoder, prompt, rig.setting.scored_tokens)
    scored = []
    for fp16 in (False, True):
        with accumulating(decoder, in_float16=fp16):
            scored.append(score(decoder, prompt, token_ids))
    divergence = compare_logits(scored[0], scored[1], token_ids)
    kl, same_top = float(np.mean(divergence.kl)), float(np.mean(divergence.same_top))
    passes = kl <= MAX_KL
    report.figures["fp16_accumulation"] = {"mean_kl": kl, "same_top": same_top, "passes": passes, "gate": MAX_KL}
    report.notes.append(
        f"float16 sums {'pass' if passes else 'FAIL'} their gate: mean KL {kl:.2g} nats along {len(token_ids)} tokens, "
        f"at most {MAX_KL:g} is allowed; same top token {same_top:.1%}. Random weights: the real ones may differ."
    )


def _first_token(rig: Rig, report: Report, decoder: LlamaDecoder, prompt: Prompt) -> None:
    """Time until the host knows the first token: by its own clock, as a user would."""
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    rows = Rows(decoder, 1, prompt.num_tokens)

    def run() -> None:
        rows.read(prompt)
        rows.wait()

    run()
    first = quantiles([seconds for _ in range(rig.setting.rounds) for seconds in timed(run, Clock())])
    report.figures["prefill_and_first_token_s"] = first
    report.notes.append(f"TTFT without the vision tower: {spread(first)} ms from prompt to token.")
