"""A prompt through our int4 decoder, beside cuBLAS alone: the float16 products of the same shapes and nothing else.

With `fp16_accumulation` cuBLAS may add up in float16: faster on GeForce cards, less exact. What that loses is measured
on the same prompt, and it has a gate: a mean KL above `MAX_KL` does not pass, however fast it is.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn import functional

from benchmarks.speed.gpu import model
from benchmarks.speed.gpu.rig import HostClock, first_line
from lite.artifact.open import load_artifact
from lite.bench.measure import quantiles
from lite.engines.torch_engine.linear import linears_of
from lite.eval.divergence import compare_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.speed.gpu.rig import Report, Rig
    from lite.bench.results import Quantiles
    from lite.engines.torch_engine.decoder import LlamaDecoder

MAX_KL: Final = 1e-3
HEADER: Final = ("what", "sums", "ms", "p20–p80", "tokens/s", "× cuBLAS alone")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A prompt, or only its products."""

    what: str
    fp16_accumulation: bool
    time: Quantiles
    tokens: int
    ratio: float | None = None  # over the products alone, with the same sums

    def cells(self) -> tuple[str, ...]:
        """Return a line of the table."""
        return (
            self.what,
            "float16" if self.fp16_accumulation else "float32",
            f"{self.time.p50 * 1e3:.2f}",
            f"{self.time.p20 * 1e3:.2f}–{self.time.p80 * 1e3:.2f}",
            f"{self.tokens / self.time.p50:,.0f}",
            "–" if self.ratio is None else f"{self.ratio:.2f}",
        )


def measure(rig: Rig, report: Report) -> None:
    """Measure prefill at each chunk size, with either kind of sums where torch has both."""
    setting, switch = rig.setting, accumulation_switch()
    report.header, report.left = HEADER, 2
    report.figures |= {"rows": []}
    decoder = model.part_of(rig.decoder())
    prompt = model.random_prompt(decoder.config, setting.prompt_tokens, rig.device)
    report.notes.append(
        f"{setting.prompt_tokens} tokens, the last one's logits included; random weights in 4 bits. cuBLAS alone: a "
        "float16 product for each linear, all tokens at once."
    )
    for fp16 in (False, True) if switch else (False,):
        runs: dict[str, Callable[[], None]] = {
            f"lite int4, chunks of {chunk}": _prefill(decoder, prompt, chunk) for chunk in setting.chunk_sizes
        }
        alone = _products(decoder, setting.prompt_tokens)
        runs["cuBLAS alone"] = alone
        with accumulating(decoder, in_float16=fp16):
            seconds = _time(rig, runs)
        base = quantiles(seconds["cuBLAS alone"]).p50
        for what, times in seconds.items():
            time_ = quantiles(times)
            ratio = None if what == "cuBLAS alone" else time_.p50 / base
            row = Row(what=what, fp16_accumulation=fp16, time=time_, tokens=setting.prompt_tokens, ratio=ratio)
            report.cells.append(row.cells())
            report.figures["rows"].append(asdict(row))
        del runs, alone
        rig.tidy()
    if switch:
        _judge_fp16_sums(rig, report, decoder, prompt)
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


def _prefill(decoder: LlamaDecoder, prompt: model.Prompt, chunk: int) -> Callable[[], None]:
    cache = decoder.new_cache(1, prompt.num_tokens)

    def run() -> None:
        decoder.chunk_size = chunk
        cache.release(0)
        decoder.prefill(prompt.input_ids, prompt.features, cache)

    return run


def _products(decoder: LlamaDecoder, tokens: int) -> Callable[[], None]:
    """Prepare one float16 product for each linear of all layers; layers share their weights, larger than any cache."""
    dtype = torch.float16 if decoder.device.type == "cuda" else torch.float32
    drawn = [
        torch.randn(sum(linear.parts.values()), linear.in_features, device=decoder.device).to(dtype)
        for linear in linears_of(decoder.model.layers[0]).values()
    ]
    # Of order 1 throughout, as activations are: zeros would be faster.
    inputs = [torch.randn(tokens, weight.shape[1], device=decoder.device).to(dtype) for weight in drawn]
    head = model.dequantized(decoder.lm_head, dtype)
    last = torch.randn(1, head.shape[1], device=decoder.device).to(dtype)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(decoder.config.num_hidden_layers):
            for x, weight in zip(inputs, drawn, strict=True):
                functional.linear(x, weight)
        functional.linear(last, head)

    return run


def _time(rig: Rig, runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Run each once untimed, then in turns."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {what: [] for what in runs}
    for _ in range(rig.setting.rounds):
        for what, run in runs.items():
            clock = rig.clock()
            clock.mark()
            run()
            clock.mark()
            seconds[what] += clock.seconds()
    return seconds


def _judge_fp16_sums(rig: Rig, report: Report, decoder: LlamaDecoder, prompt: model.Prompt) -> None:
    """Compare the logits that both kinds of sums lead to, along a text."""
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    token_ids, _ = model.greedy(decoder, prompt, rig.setting.scored_tokens)
    scored = []
    for fp16 in (False, True):
        with accumulating(decoder, in_float16=fp16):
            scored.append(decoder.score(prompt.input_ids, token_ids, prompt.features).numpy())
    divergence = compare_logits(scored[0], scored[1], token_ids)
    kl, same_top = float(np.mean(divergence.kl)), float(np.mean(divergence.same_top))
    passes = kl <= MAX_KL
    report.figures["fp16_accumulation"] = {"mean_kl": kl, "same_top": same_top, "passes": passes, "gate": MAX_KL}
    report.notes.append(
        f"float16 sums {'pass' if passes else 'FAIL'} their gate: mean KL {kl:.2g} nats along {len(token_ids)} tokens, "
        f"at most {MAX_KL:g} is allowed; same top token {same_top:.1%}. Random weights: the real ones may differ."
    )


def _first_token(rig: Rig, report: Report, decoder: LlamaDecoder, prompt: model.Prompt) -> None:
    """Time until the host knows the first token: by its own clock, as a user would."""
    decoder.chunk_size = max(rig.setting.chunk_sizes)
    cache = decoder.new_cache(1, prompt.num_tokens)
    seconds = []
    for _ in range(rig.setting.rounds + 1):
        cache.release(0)
        clock = HostClock()
        clock.mark()
        decoder.prefill(prompt.input_ids, prompt.features, cache)
        cache.newest().tolist()
        clock.mark()
        seconds += clock.seconds()
    first = quantiles(seconds[1:])
    report.figures["prefill_and_first_token_s"] = asdict(first)
    vision, why = None, "no --artifact was given"
    if rig.setting.artifact is not None:
        try:
            vision = _vision(rig)
        except Exception as error:  # noqa: BLE001 - the tower is not what is measured here
            why = f"failed ({first_line(error)})"
    if vision is None:
        report.notes.append(
            f"TTFT without the vision tower ({why}): {first.p50 * 1e3:.1f} ms from the prompt to the first token "
            f"({first.p20 * 1e3:.1f}–{first.p80 * 1e3:.1f})."
        )
        return
    tower, provider = vision
    report.figures |= {"vision_s": asdict(tower), "vision_provider": provider, "ttft_s": tower.p50 + first.p50}
    report.notes.append(
        f"TTFT: {(tower.p50 + first.p50) * 1e3:.1f} ms, {tower.p50 * 1e3:.1f} of them the tower on {provider}, "
        f"{first.p50 * 1e3:.1f} the prompt and its first token."
    )


def _vision(rig: Rig) -> tuple[Quantiles, str]:
    """Time the tower of the artifact on an image of noise."""
    from lite.vision import VisionEncoder

    if rig.setting.artifact is None:
        raise ValueError("got no artifact · expected one")
    artifact = load_artifact(rig.setting.artifact)
    encoder = VisionEncoder(artifact, device=str(rig.device))
    size = artifact.manifest.parts.vision.image_size
    pixel_values = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    seconds: Sequence[float] = []
    for _ in range(rig.setting.rounds + 1):
        started = time.perf_counter()
        encoder(pixel_values)
        seconds = [*seconds, time.perf_counter() - started]
    return quantiles(seconds[1:]), encoder.provider
