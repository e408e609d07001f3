"""A decoded token: ours and other libraries' linears in the same decoder, taking turns.

First each is right: the logits behind a prompt and behind one decoded token, of the first layers, beside those of plain
float32; of ours also 16 tokens at full depth, with CUDA graphs and without. Then each in turn goes back to the end of
the context and decodes as a session does: a step ahead of the host, which reads every token. As many take turns with
our int4 as fit into memory together.

Bytes are what a token has to read: every linear once, and the keys and values that each row sees.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from benchmarks.speed.decoders import part_of, plain_logits, random_decoder, swapped, transformers_engine
from benchmarks.speed.engine import far, greedy, random_prompt, score
from benchmarks.speed.gpu.lanes import Lane, TransformersRows, cache_of, lane_of, row_of, time_lanes
from benchmarks.speed.harness import LATE, NONE, Row, Unavailable, reason
from benchmarks.speed.linears import PEERS
from lite.errors import MemoryBudgetError
from lite.eval.divergence import compare_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

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
class Variant:
    """A way to run a decoder."""

    cache_dtype: CacheDtype | None = None
    captured: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder to be made, and the ways to run it."""

    name: str
    make: Callable[[Rig], LlamaDecoder]
    variants: tuple[Variant, ...] = (Variant(),)
    allowed: str = "16 bits"
    ours: bool = False


OURS: Final = (
    Variant(),
    Variant(cache_dtype="int8"),
    Variant(captured=False),
    Variant(cache_dtype="int8", captured=False),
)
REFERENCE: Final = Model(name="lite int4", make=lambda rig: rig.decoder(), variants=OURS, ours=True)
DENSE: Final = "fp16, cuBLAS"


def _peer(name: str) -> Model:
    def make(rig: Rig) -> LlamaDecoder:
        linear, dtype = PEERS[name]
        decoder = swapped(rig.decoder(), linear, dtype if rig.on_gpu else torch.float32)
        decoder.capture = rig.capture
        return decoder

    return Model(name=name, make=make, allowed="16 bits" if name == DENSE else "4 bits")


MODELS: Final = (
    REFERENCE,
    Model(
        name="lite int8",
        make=lambda rig: random_decoder(rig.config(8), rig.device, capture=rig.capture),
        variants=OURS,
        ours=True,
    ),
    *map(_peer, PEERS),
)


def measure(rig: Rig, report: Report) -> None:
    """Measure all models at all numbers of rows."""
    bandwidth = report.figures["bandwidth_bytes_per_s"] = rig.measured_bandwidth()
    report.notes.append(
        f"Bandwidth of a streaming read just before: {bandwidth / 1e9:,.0f} GB/s. Context: {rig.setting.context} "
        f"tokens. Random weights, {rig.setting.layers} layers. Our int4 takes turns with each of the others that fit "
        "beside it. launched: without CUDA graphs. Mean KL: what an int8 cache loses along a text; attention is "
        "flatter than a trained model's, so that is no measure of the real loss."
    )
    for one in MODELS:
        first = row_of(one.name, NONE, min(rig.setting.rows))
        if rig.is_late():
            first.why = LATE
            report.add(first)
            continue
        try:
            for row in _measure_model(rig, one, bandwidth):
                report.add(row, ours=one.ours)
        except (Unavailable, MemoryBudgetError, torch.OutOfMemoryError) as error:
            first.why = reason(error)
            report.add(first)
        except Exception as error:  # noqa: BLE001 - whatever is raised is why it is not measured
            first.why, first.is_wrong = reason(error), True
            report.add(first, ours=one.ours)
        rig.tidy()


def _measure_model(rig: Rig, one: Model, bandwidth: float) -> Iterator[Row]:
    """Make a model, and measure it at each number of rows; what it holds is free when this ends."""
    rig.decoder()
    try:
        decoder = one.make(rig)
    except (MemoryBudgetError, torch.OutOfMemoryError):
        if not one.ours or one is REFERENCE:
            raise
        rig.forget_decoder()  # the two do not fit together
        decoder = one.make(rig)
    dtypes = dict.fromkeys(variant.cache_dtype for variant in one.variants)
    checks = {cache_dtype: _check(rig, one, decoder, cache_dtype) for cache_dtype in dtypes}
    lost = _int8_loss(rig, decoder) if one is REFERENCE else {}
    for num_rows in sorted(rig.setting.rows):
        rows: dict[str, Row] = {}
        lanes: dict[str, Callable[[], Lane]] = {}
        for variant in one.variants:
            if not variant.captured and num_rows > 1:
                continue
            name = one.name if variant.captured else f"{one.name}, launched"
            difference, problem = checks[variant.cache_dtype]
            row = row_of(name, cache_of(decoder, variant.cache_dtype), num_rows)
            row.figures["difference"] = difference
            if variant.cache_dtype == "int8" and lost:
                row.figures |= lost
                row.cells["mean KL, nats"] = f"{lost['mean_kl']:.2g}"
            if problem is not None:
                row.why, row.is_wrong = problem, True
                yield row
                continue
            rows[row.label] = row
            lanes[row.label] = functools.partial(_lane, rig, decoder, variant, num_rows)
        yield from _measure_rows(rig, rows, lanes, num_rows, bandwidth)
    if one.name == DENSE and 1 in rig.setting.rows and not rig.is_late():
        yield _measure_transformers(rig, decoder, bandwidth)


def _lane(rig: Rig, decoder: LlamaDecoder, variant: Variant, num_rows: int) -> Lane:
    capture = rig.capture if variant.captured else None
    return lane_of(rig, part_of(decoder, cache_dtype=variant.cache_dtype, capture=capture), num_rows)


def _measure_rows(
    rig: Rig, rows: Mapping[str, Row], lanes: Mapping[str, Callable[[], Lane]], num_rows: int, bandwidth: float
) -> Iterator[Row]:
    """Measure the lanes of one model, in groups that fit into memory, beside our int4 where that fits, too."""
    pending = list(lanes)
    reference = ""
    if rig.has_decoder:
        reference = row_of(REFERENCE.name, cache_of(rig.decoder(), None), num_rows).label
    while pending:
        made: dict[str, Lane] = {}
        if rig.has_decoder and reference not in pending:
            _try_to_make(made, reference, functools.partial(_lane, rig, rig.decoder(), Variant(), num_rows))
        for key in pending:
            if rig.is_late():
                rows[key].why = LATE
            elif (why := _try_to_make(made, key, lanes[key])) is not None:
                if set(made) & set(pending):
                    break  # in the next group
                made.clear()  # without our int4, then
                rig.tidy()
                if (why := _try_to_make(made, key, lanes[key])) is not None:
                    rows[key].why = why
        done = [key for key in pending if key in made or rows[key].why is not None]
        time_lanes(rig, made, {key: rows[key] for key in done if key in made}, bandwidth, reference)
        yield from (rows[key] for key in done)
        pending = [key for key in pending if key not in done]
        made.clear()
        rig.tidy()


def _try_to_make(made: dict[str, Lane], key: str, make: Callable[[], Lane]) -> str | None:
    """Make a lane; return why it does not fit, if so."""
    try:
        made[key] = make()
    except MemoryBudgetError as error:
        return str(error)
    return None


# -- Right first -----------------------------------------------------------------------------------------------------


def _check(
    rig: Rig, one: Model, decoder: LlamaDecoder, cache_dtype: CacheDtype | None
) -> tuple[float, str | None]:  # fmt: skip
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


def _int8_loss(rig: Rig, decoder: LlamaDecoder) -> dict[str, float]:
    """Say what an int8 cache loses along a text, greedy with the float cache."""
    prompt = random_prompt(decoder.config, rig.setting.prompt_tokens, rig.device)
    exact, rounded = part_of(decoder), part_of(decoder, cache_dtype="int8")
    token_ids, _ = greedy(exact, prompt, rig.setting.scored_tokens)
    divergence = compare_logits(score(exact, prompt, token_ids), score(rounded, prompt, token_ids), token_ids)
    return {"mean_kl": float(np.mean(divergence.kl)), "same_top": float(np.mean(divergence.same_top))}


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


# -- transformers ----------------------------------------------------------------------------------------------------


def _measure_transformers(rig: Rig, decoder: LlamaDecoder, bandwidth: float) -> Row:
    """Let transformers compute the weights of the dense decoder."""
    setting, row = rig.setting, row_of("transformers fp16", "float16", 1)
    try:
        length = max(setting.context + setting.new_tokens + 2, CHECKED_TOKENS)
        engine = transformers_engine(decoder, max_seq_len=length)
        input_ids, expected = expected_logits(rig.decoder())
        engine.start(min(CHECKED_LAYERS, setting.layers))
        got = torch.stack([engine.read(input_ids[:-1]), engine.read(input_ids[-1:])])
        expected = expected.to(got.device)
        difference = row.figures["difference"] = float((got - expected).norm() / expected.norm())
        if not difference <= ALLOWED["16 bits"]:
            row.why, row.is_wrong = f"its logits differ by {difference:.2g}: it is not timed", True
            return row
        rows = TransformersRows(engine, setting.layers)
        lane = Lane(rows=rows, weight_bytes=engine.weight_bytes, clock=rig.clock)
        reference = _lane(rig, rig.decoder(), Variant(), 1)
        time_lanes(rig, {"lite": reference, "theirs": lane}, {"theirs": row}, bandwidth, "lite")
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is why it is not measured
        row.why = reason(error)
    return row
