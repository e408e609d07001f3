"""Many studies: continuous batching, where a row that ends is given to the next, beside batches that wait.

Prompts of one length with an image of noise, texts of different lengths, random but the same for both ways. The tower
is not in it.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.gpu import model
from lite.errors import LiteError
from lite.memory.process import Peaks
from lite.session.feed import Feed
from lite.session.generate import Generation, Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.speed.gpu.rig import Report, Rig
    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.decoder import LlamaDecoder

HEADER: Final = ("batching", "cache", "rows", "s", "tokens/s", "studies/min")
_NEVER: Final = -2
"""No token: texts end by their length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All requests, one way."""

    batching: str
    cache: str
    rows: int  # those that were left at the end: fewer where memory was short
    seconds: float
    tokens: int
    studies: int

    def cells(self) -> tuple[str, ...]:
        """Return a line of the table."""
        rates = (f"{self.tokens / self.seconds:,.0f}", f"{60 * self.studies / self.seconds:,.0f}")
        return (self.batching, self.cache, str(self.rows), f"{self.seconds:.2f}", *rates)


def measure(rig: Rig, report: Report) -> None:
    """Run all requests both ways, with either cache."""
    setting = rig.setting
    report.header, report.left = HEADER, 2
    report.figures |= {"rows": []}
    shortest, longest = setting.text_tokens
    report.notes.append(
        f"{setting.requests} studies: a prompt of {setting.prompt_tokens} tokens, {shortest} to {longest} of text. "
        "int4, by the host's clock, without the vision tower."
    )
    prompt = model.random_prompt(rig.decoder().config, setting.prompt_tokens, rig.device)
    cache_dtypes: tuple[CacheDtype | None, ...] = (None, "int8")
    for cache_dtype in cache_dtypes:
        decoder = model.part_of(rig.decoder(), cache_dtype=cache_dtype, capture=rig.capture)
        decoder.chunk_size = max(setting.chunk_sizes)
        size = setting.batch_size
        # Compiles; and as the last rows end first, every number of rows is decoded and captured once.
        _run(rig, decoder, [[_request(prompt, 3 * (size - row)) for row in range(size)]])
        every = _requests(rig, prompt)
        again = _requests(rig, prompt)
        ways = {"continuous": [every], "static": [again[i : i + size] for i in range(0, len(again), size)]}
        for batching, groups in ways.items():
            if rig.is_late():
                report.notes.append(f"{batching}, {cache_dtype or 'float16'} cache: the section's time is up.")
                continue
            seconds, tokens, rows = _run(rig, decoder, groups)
            row = Row(
                batching=batching, cache=cache_dtype or "float16", rows=rows, seconds=seconds, tokens=tokens,
                studies=len(every),
            )  # fmt: skip
            report.cells.append(row.cells())
            report.figures["rows"].append(asdict(row))
        del decoder
        rig.tidy()


def _requests(rig: Rig, prompt: model.Prompt) -> list[Request]:
    """Return new requests, the same each time."""
    shortest, longest = rig.setting.text_tokens
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (rig.setting.requests,), generator=generator).tolist()
    return [_request(prompt, length) for length in lengths]


def _request(prompt: model.Prompt, length: int) -> Request:
    return Request(
        input_ids=prompt.input_ids,
        num_prompt_tokens=prompt.num_tokens,
        image_features=lambda: prompt.features,
        max_new_tokens=length,
    )


def _run(rig: Rig, decoder: LlamaDecoder, groups: Sequence[Sequence[Request]]) -> tuple[float, int, int]:
    """Work on groups one after the other; return the seconds, the tokens, and the rows at the end.

    Raises:
        LiteError: a request failed, or has not as many tokens as it should.
    """
    started, tokens, rows = time.perf_counter(), 0, rig.setting.batch_size
    for group in groups:
        generation = Generation(
            decoder,
            Feed(iter(group), lambda request: request),
            batch_size=rig.setting.batch_size,
            # The same for all, so that they have one cache and its CUDA graphs.
            max_seq_len=group[0].num_prompt_tokens + rig.setting.text_tokens[1],
            context=decoder.config.max_position_embeddings,
            eos_token_id=_NEVER,
            peaks=lambda: Peaks(rss_bytes=None, vram_bytes=None),
        )
        for _ in generation:
            pass
        rows = min(rows, generation.batch_size)
        for request in group:
            if request.error is not None:
                raise request.error
            if len(request.token_ids) != request.max_new_tokens:
                msg = f"got {len(request.token_ids)} tokens · expected {request.max_new_tokens} · report this"
                raise LiteError(msg)
            tokens += len(request.token_ids)
    return time.perf_counter() - started, tokens, rows
