"""A prompt through our int4 decoder, beside cuBLAS alone: the float16 products of the same shapes and nothing else.

With `fp16_accumulation` our products add up in float16: faster on GeForce cards, less exact. What that loses is
measured on the same prompt, and it has a gate: a mean KL above `MAX_KL` does not pass, however fast it is.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from benchmarks.speed.decoders import dequantized, part_of
from benchmarks.speed.engine import Prompt, Rows, greedy, loss, random_prompt, score
from benchmarks.speed.harness import Clock, Row, in_turns, spread, timed
from lite.engines.torch_engine.linear import linears_of
from lite.eval.figures import quantiles

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.engines.torch_engine.decoder import LlamaDecoder

MAX_KL: Final = 1e-3
ALONE: Final = "cuBLAS alone"


def measure(rig: Rig, report: Report) -> None:
    """Measure prefill at each chunk size, with either kind of sums where torch has both."""
    setting = rig.setting
    decoder = part_of(rig.decoder())
    prompt = random_prompt(decoder.config, setting.prompt_tokens, rig.device)
    report.notes.append(
        f"{setting.prompt_tokens} tokens, the last one's logits included; random weights in 4 bits. {ALONE}: a float16 "
        "product for each linear, all tokens at once, its sums in float32."
    )
    both = has_fp16_sums()
    rows = Rows(decoder, 1, prompt.num_tokens)
    runs: dict[tuple[str, str], Callable[[], None]] = {
        (f"lite int4, chunks of {chunk}", kind): functools.partial(_prefill, rows, prompt, chunk, kind)
        for kind in (("float32", "float16") if both else ("float32",))
        for chunk in setting.chunk_sizes
    }
    runs[ALONE, "float32"] = _products(decoder, setting.prompt_tokens)
    for run in runs.values():
        run()  # untimed
    found = in_turns({key: functools.partial(timed, run, rig.clock()) for key, run in runs.items()}, setting.rounds)
    for (what, kind), times in found.items():
        row = Row(names={"what": what, "sums": kind}, against=ALONE)
        row.took(times, "" if what == ALONE else found[ALONE, "float32"])
        if row.time is not None:
            row.cells["tokens/s"] = f"{setting.prompt_tokens / row.time.p50:,.0f}"
        report.add(row)
    if both:
        judge_fp16_sums(rig, report, decoder, prompt)
    else:
        report.notes.append(f"float16 sums: torch {torch.__version__} cannot, 2.7 can.")
    add_up_in(decoder, "float32")
    _first_token(rig, report, rows, prompt)


def has_fp16_sums() -> bool:
    """Say whether torch can let cuBLAS add up in float16."""
    return hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")


def add_up_in(decoder: LlamaDecoder, kind: str) -> None:
    """Let a decoder's prompts add up in float16, or in float32."""
    for linear in linears_of(decoder).values():
        linear.fp16_accumulation = kind == "float16"


def _prefill(rows: Rows, prompt: Prompt, chunk: int, kind: str) -> None:
    add_up_in(rows.engine, kind)
    rows.engine.chunk_size = chunk
    rows.read(prompt)


def _products(decoder: LlamaDecoder, tokens: int) -> Callable[[], None]:
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
    add_up_in(decoder, "float32")
    token_ids, _ = greedy(decoder, prompt, rig.setting.scored_tokens)
    exact = score(decoder, prompt, token_ids)
    add_up_in(decoder, "float16")
    lost = loss(exact, score(decoder, prompt, token_ids), token_ids)
    passes = lost["mean_kl"] <= MAX_KL
    report.figures["fp16_accumulation"] = lost | {"passes": passes, "gate": MAX_KL}
    report.notes.append(
        f"float16 sums {'pass' if passes else 'FAIL'} their gate: mean KL {lost['mean_kl']:.2g} nats along "
        f"{len(token_ids)} tokens, at most {MAX_KL:g} is allowed; same top token {lost['same_top']:.1%}. Random "
        "weights: the real ones may differ."
    )


def _first_token(rig: Rig, report: Report, rows: Rows, prompt: Prompt) -> None:
    """Time until the host knows the first token: by its own clock, as a user would."""
    rows.engine.chunk_size = max(rig.setting.chunk_sizes)

    def run() -> None:
        rows.read(prompt)
        rows.wait()

    run()
    first = quantiles([seconds for _ in range(rig.setting.rounds) for seconds in timed(run, Clock())])
    report.figures["prefill_and_first_token_s"] = first
    report.notes.append(f"TTFT without the vision tower: {spread(first)} ms from prompt to token.")
