"""A decoded token: ours and other libraries' linears in the same decoder, each taking turns with our int4.

First each is right: the logits behind a prompt and behind one decoded token, of the first layers, beside those of plain
float32; of ours also 16 tokens at full depth, with CUDA graphs and without. Then each in turn goes back to the end of
the context and decodes as a session does: a step ahead of the host, which reads every token.

Bytes are what a token has to read: every linear once, and the keys and values that each row sees.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.decoders import part_of, plain_logits, random_decoder, swapped, weight_bytes
from benchmarks.speed.engine import WARM_UP, Rows, far, greedy, random_prompt
from benchmarks.speed.harness import NONE, Row, Unavailable, in_turns, reason
from benchmarks.speed.linears import PEERS
from lite.errors import MemoryBudgetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.speed.gpu.rig import Rig
    from benchmarks.speed.harness import Report
    from lite.artifact.parts import CacheDtype
    from lite.engines.torch_engine.decoder import LlamaDecoder

CHECKED_LAYERS: Final = 2
CHECKED_TOKENS: Final = 64
ALLOWED: Final = {"16 bits": 0.01, "int8 cache": 0.03, "4 bits": 0.4}
"""Root mean square of a difference between logits, relative. 16 bits: activations and weights are rounded to 11 bits at
some ten places a layer. An int8 cache rounds to 7 bits. 4 bits: a peer rounds our weights once more."""


# -- The models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder to be made, and the caches to run it with."""

    name: str
    make: Callable[[Rig], LlamaDecoder]
    cache_dtypes: tuple[CacheDtype | None, ...] = (None,)
    allowed: str = "16 bits"
    ours: bool = False


OURS: Final[tuple[CacheDtype | None, ...]] = (None, "int8")
REFERENCE: Final = Model(name="lite int4", make=lambda rig: rig.decoder(), cache_dtypes=OURS, ours=True)
DENSE: Final = "fp16, cuBLAS"


def _peer(name: str) -> Model:
    def make(rig: Rig) -> LlamaDecoder:
        linear, dtype = PEERS[name]
        return swapped(rig.decoder(), linear, dtype if rig.on_gpu else torch.float32)

    return Model(name=name, make=make, allowed="16 bits" if name == DENSE else "4 bits")


MODELS: Final = (
    REFERENCE,
    Model(name="lite int8", make=lambda rig: random_decoder(rig.config(8), rig.device), cache_dtypes=OURS, ours=True),
    *map(_peer, PEERS),
)


def measure(rig: Rig, report: Report) -> None:
    """Measure all models at all numbers of rows."""
    bandwidth = report.figures["bandwidth_bytes_per_s"] = rig.measured_bandwidth()
    report.notes.append(
        f"Bandwidth of a streaming read just before: {bandwidth / 1e9:,.0f} GB/s. Context: {rig.setting.context} "
        f"tokens. Random weights, {rig.setting.layers} layers."
    )
    for one in MODELS:
        try:
            for row in _measure_model(rig, one):
                row.bandwidth = bandwidth
                report.add(row, ours=one.ours)
        except Exception as error:  # noqa: BLE001 - whatever is raised is why it is not measured
            is_wrong = not isinstance(error, (Unavailable, MemoryBudgetError, torch.OutOfMemoryError))
            row = Row(names=_names(one.name, NONE, min(rig.setting.rows)), why=reason(error), is_wrong=is_wrong)
            report.add(row, ours=one.ours)
        rig.tidy()


def _names(name: str, cache: str, num_rows: int) -> dict[str, str]:
    return {"engine": name, "cache": cache, "rows": str(num_rows)}


def _measure_model(rig: Rig, one: Model) -> Iterator[Row]:
    """Make a model, check and measure each way to run it; what it holds is free when this ends."""
    rig.decoder()
    try:
        decoder = one.make(rig)
    except (MemoryBudgetError, torch.OutOfMemoryError):
        if not one.ours or one is REFERENCE:
            raise
        rig.forget_decoder()  # the two do not fit together
        decoder = one.make(rig)
    for cache_dtype in one.cache_dtypes:
        difference, problem = _check(rig, one, decoder, cache_dtype)
        cache = cache_dtype or str(decoder.dtype).removeprefix("torch.")
        for num_rows in sorted(rig.setting.rows):
            row = Row(names=_names(one.name, cache, num_rows), figures={"difference": difference})
            if problem is not None:
                row.why, row.is_wrong = problem, True
            else:
                _time(rig, row, decoder, cache_dtype, num_rows)
            yield row
            rig.tidy()


# -- Taking turns ----------------------------------------------------------------------------------------------------


class Lane:
    """Rows of a decoder that go back to the end of the context, again and again."""

    def __init__(self, rig: Rig, source: LlamaDecoder, cache_dtype: CacheDtype | None, num_rows: int) -> None:
        """Read a prompt for each row, compile and capture.

        Raises:
            MemoryBudgetError: it does not fit.
        """
        setting = self.setting = rig.setting
        decoder = part_of(source, cache_dtype=cache_dtype, capture=rig.capture)
        self.rows = Rows(decoder, num_rows, setting.context + max(setting.new_tokens + 1, WARM_UP))
        prompt = random_prompt(decoder.config, setting.context, rig.device)
        for row in range(num_rows):
            self.rows.read(prompt, row)
        self.rows.rewind(setting.context)
        self.rows.warm_up(setting.context)
        self.is_captured = rig.capture is not None and self.rows.problem is None
        self.clock = rig.clock
        self.weight_bytes = weight_bytes(decoder)
        # What the median of the timed tokens sees: the context, one that was not timed, half of the others.
        seen = setting.context + 1 + (setting.new_tokens + 1) // 2
        self.cache_bytes = round(num_rows * seen * self.rows.bytes_per_token)

    def turn(self) -> list[float]:
        """Time some tokens."""
        self.rows.rewind(self.setting.context)
        self.rows.decode()  # untimed: the first after something else
        self.rows.wait()
        clock = self.clock()
        clock.mark()
        for _ in range(self.setting.new_tokens):
            self.rows.decode()
            clock.mark()
            self.rows.wait(for_all=False)
        self.rows.wait()
        return clock.seconds()


def _time(rig: Rig, row: Row, decoder: LlamaDecoder, cache_dtype: CacheDtype | None, num_rows: int) -> None:
    """Time rows in turns with as many of our int4, if both fit."""
    try:
        own = Lane(rig, decoder, cache_dtype, num_rows)
    except MemoryBudgetError as error:
        row.why = str(error)
        return
    turns = {"own": own.turn}
    if rig.has_decoder and not (decoder is rig.decoder() and cache_dtype is None):
        with contextlib.suppress(MemoryBudgetError):  # alone, then
            turns["int4"] = Lane(rig, rig.decoder(), None, num_rows).turn
    found = in_turns(turns, rig.setting.rounds)
    row.against, row.nbytes = REFERENCE.name, own.weight_bytes + own.cache_bytes
    row.took(found["own"], found.get("int4", ""))
    row.figures |= {"weight_bytes": own.weight_bytes, "cache_bytes": own.cache_bytes, "graph": own.is_captured}
    if own.rows.problem is not None:
        row.why, row.is_wrong = f"timed without a CUDA graph: {own.rows.problem}", True


# -- Right first -----------------------------------------------------------------------------------------------------


def _check(rig: Rig, one: Model, decoder: LlamaDecoder, cache_dtype: CacheDtype | None) -> tuple[float, str | None]:
    """Compare the logits of the first layers with what they should be; for ours also captured with launched steps.

    Returns:
        How far they are, and why the model is not timed, if so.
    """
    source = decoder if one.ours else rig.decoder()
    input_ids, expected = expected_logits(source)
    layers = min(CHECKED_LAYERS, decoder.config.num_hidden_layers)
    part = part_of(decoder, layers=layers, cache_dtype=cache_dtype, capture=rig.capture)
    found = max(far(part, input_ids, expected, rows) for rows in rig.setting.rows)
    allowed = ALLOWED["int8 cache" if cache_dtype == "int8" else one.allowed]
    if not found <= allowed:
        return found, f"its logits differ from plain float32's by {found:.2g} of their size, more than {allowed:g}"
    return found, check_graphs(rig, decoder, cache_dtype) if one.ours and rig.capture is not None else None


def expected_logits(decoder: LlamaDecoder) -> tuple[list[int], torch.Tensor]:
    """Return a text, and what the first layers of one of our decoders should say behind its last two tokens."""
    part = part_of(decoder, layers=min(CHECKED_LAYERS, decoder.config.num_hidden_layers))
    generator = torch.Generator().manual_seed(1)
    count = min(CHECKED_TOKENS, decoder.config.max_position_embeddings)
    input_ids = torch.randint(decoder.config.vocab_size, (count,), generator=generator).tolist()
    return input_ids, plain_logits(part, input_ids)[-2:]


def check_graphs(rig: Rig, decoder: LlamaDecoder, cache_dtype: CacheDtype | None) -> str | None:
    """Say in how far captured and launched steps decode differently at full depth; None if they do not."""
    prompt = random_prompt(decoder.config, rig.setting.prompt_tokens, rig.device)
    found = []
    for capture in (None, rig.capture):
        part = part_of(decoder, cache_dtype=cache_dtype, capture=capture)
        token_ids, problem = greedy(part, prompt, rig.setting.checked_tokens)
        if problem is not None:
            return f"not captured in a CUDA graph: {problem}"
        if min(token_ids) < 0:
            return "logits that are not finite"
        found.append(token_ids)
    if found[0] == found[1]:
        return None
    first = next(i for i, pair in enumerate(zip(*found, strict=True)) if pair[0] != pair[1])
    return f"captured steps decode other tokens than launched ones, from token {first} on"
