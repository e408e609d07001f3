"""A prompt through our int4 decoder, beside cuBLAS alone: the float16 products of the same shapes and nothing else.

With `fp16_accumulation` our products add up in float16: faster on GeForce cards, less exact. How far that takes the
logits stands beside the time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional

from benchmarks.speed.decoders import dequantized, part_of
from benchmarks.speed.engine import Prompt, Rows, off_by, random_prompt
from benchmarks.speed.harness import Row, in_turns, timed
from lite.engines.torch_engine.linear import linears_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.engines.torch_engine.decoder import LlamaDecoder

MAX_DIFFERENCE: Final = 0.015
"""Root mean square of the difference between logits, relative. Of those of a model whose logits have a standard
deviation of 3 that is a KL of 1e-3 nats."""
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
    runs: dict[tuple[str, str], Callable[[], Any]] = {
        (f"lite int4, chunks of {chunk}", kind): functools.partial(_prefill, rows, prompt, chunk, kind)
        for kind in (("float32", "float16") if both else ("float32",))
        for chunk in setting.chunk_sizes
    }
    runs[ALONE, "float32"] = _products(decoder, setting.prompt_tokens)
    first = {key: run() for key, run in runs.items()}  # untimed
    exact = first[next(iter(runs))]
    found = in_turns({key: functools.partial(timed, run, rig.clock()) for key, run in runs.items()}, setting.rounds)
    for (what, kind), times in found.items():
        row = Row(names={"what": what, "sums": kind}, against=ALONE)
        row.took(times, "" if what == ALONE else found[ALONE, "float32"])
        if row.time is not None:
            row.cells["tokens/s"] = f"{setting.prompt_tokens / row.time.p50:,.0f}"
        if what != ALONE:
            off = row.figures["difference"] = off_by(first[what, kind], exact)
            row.cells["logits off by"] = f"{off:.1e}"
            if not off <= MAX_DIFFERENCE:
                row.why, row.is_wrong, row.time = f"off by {off:.2g}, more than {MAX_DIFFERENCE:g}", True, None
        report.add(row, ours=kind == "float32")  # that cuBLAS rounds its sums is no fault of ours
    if not both:
        report.notes.append(f"float16 sums: torch {torch.__version__} cannot, 2.7 can.")
    add_up_in(decoder, "float32")


def has_fp16_sums() -> bool:
    """Say whether torch can let cuBLAS add up in float16."""
    return hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation")


def add_up_in(decoder: LlamaDecoder, kind: str) -> None:
    """Let a decoder's prompts add up in float16, or in float32."""
    for linear in linears_of(decoder).values():
        linear.fp16_accumulation = kind == "float16"


def _prefill(rows: Rows, prompt: Prompt, chunk: int, kind: str) -> torch.Tensor:
    add_up_in(rows.engine, kind)
    rows.engine.chunk_size = chunk
    logits: torch.Tensor = rows.read(prompt)
    return logits.float().clone()  # the next prompt's may take its place


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
