"""A decoded token: ours and other libraries' linears in the same decoder, taking turns.

Each model is measured beside our int4 decoder, as many at once as the memory limit allows. First it is right: the
logits behind a prompt and behind one decoded token, of the first layers, beside those of plain float32; of ours also
16 tokens at full depth, with CUDA graphs and without. Then each in turn goes back to the end of the context and decodes
as `lite.session.generate` does: a step ahead of the host, which reads every token.

Bytes are what a token has to read: every linear once, and the keys and values that each row sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from benchmarks.speed.gpu import check, model
from benchmarks.speed.gpu.decoding import (
    WARM_UP,
    Decoding,
    LiteDecoding,
    OnnxDecoding,
    TransformersDecoding,
    time_in_turns,
    tokens_seen,
)
from benchmarks.speed.gpu.rig import first_line
from benchmarks.speed.kernels import Unavailable
from lite.artifact.open import load_artifact
from lite.bench.measure import quantiles
from lite.engines.torch_engine.decoder import DTYPES
from lite.errors import MemoryBudgetError
from lite.memory.counts import cache_bytes_per_token, cache_scale_bytes_per_token, layer_bytes, onnx_read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from benchmarks.speed.gpu.rig import Report, Rig
    from lite.artifact.parts import CacheDtype
    from lite.bench.results import Quantiles
    from lite.engines.torch_engine.cuda_graph import Capture
    from lite.engines.torch_engine.decoder import LlamaDecoder

REFERENCE: Final = "lite int4"
DENSE: Final = "fp16, cuBLAS"
HEADER: Final = ("engine", "cache", "rows", "ms/token", "p20–p80", "GB read", "GB/s", "of bandwidth", "× lite int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to decode, measured, or why it is not."""

    engine: str
    cache: str  # what keys and values are stored as
    rows: int
    time: Quantiles | None = None  # seconds a token, of all rows together
    weight_bytes: int = 0  # read for it
    cache_bytes: int = 0
    share: float | None = None  # of the bandwidth of a streaming read in this run
    ratio: float | None = None  # its time over that of our int4, in the same turns
    turns: tuple[str, ...] = ()
    difference: float | None = None  # of the logits
    graph: bool | None = None
    unlimited: bool = False  # it, or what it took turns with, did not fit the memory limit
    why: str | None = None
    is_wrong: bool = False

    @property
    def bytes_per_s(self) -> float | None:
        """What was read in the median token's time."""
        return None if self.time is None else (self.weight_bytes + self.cache_bytes) / self.time.p50

    def cells(self) -> tuple[str, ...]:
        """Return a line of the table."""
        named = (self.engine, self.cache, str(self.rows))
        if self.time is None or self.bytes_per_s is None or self.share is None:
            return (*named, "WRONG" if self.is_wrong else "–", *["–"] * 5)
        mark = "²" if self.unlimited else ""
        return (
            *named,
            f"{self.time.p50 * 1e3:.3f}{mark}",
            f"{self.time.p20 * 1e3:.3f}–{self.time.p80 * 1e3:.3f}",
            f"{(self.weight_bytes + self.cache_bytes) / 1e9:.3f}",
            f"{self.bytes_per_s / 1e9:,.0f}",
            f"{self.share:.0%}",
            "–" if self.ratio is None else f"{self.ratio:.2f}",
        )


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
    bytes_per_weight: float  # of the layers' linears
    make: Callable[[Rig], LlamaDecoder]
    variants: tuple[Variant, ...] = (Variant(),)
    allowed: str = "float16"
    ours: bool = False
    dtype: str = "float16"

    def label(self, variant: Variant) -> str:
        """Return what a row is called."""
        return self.name if variant.captured else f"{self.name}, launched"


def _peer(make: Callable[[Tensor], torch.nn.Module], dtype: str) -> Callable[[Rig], LlamaDecoder]:
    def build(rig: Rig) -> LlamaDecoder:
        computed = DTYPES[dtype] if rig.device.type == "cuda" else torch.float32
        decoder = model.swapped(rig.decoder(), make, dtype=computed)
        decoder.capture = rig.capture
        return decoder

    return build


OURS: Final = (
    Variant(),
    Variant(cache_dtype="int8"),
    Variant(captured=False),
    Variant(cache_dtype="int8", captured=False),
)
MODELS: Final = (
    Model(name=REFERENCE, bytes_per_weight=0, make=lambda rig: rig.decoder(), variants=OURS, ours=True),
    Model(
        name="lite int8",
        bytes_per_weight=1 + 2 / 128,
        make=lambda rig: model.random_decoder(rig.config(8), rig.device, capture=rig.capture),
        variants=OURS,
        ours=True,
    ),
    Model(
        name="tinygemm int4", bytes_per_weight=0.5 + 4 / 128, make=_peer(model.tinygemm, "bfloat16"),
        allowed="4 bits", dtype="bfloat16",
    ),
    Model(name="bitsandbytes nf4", bytes_per_weight=0.52, make=_peer(model.nf4, "float16"), allowed="4 bits"),
    Model(name=DENSE, bytes_per_weight=2, make=_peer(model.dense, "float16")),
    # The last: it looks for its fastest kernels, which may take long.
    Model(name="gemlite int4", bytes_per_weight=0.5 + 4 / 128, make=_peer(model.gemlite, "float16"), allowed="4 bits"),
)  # fmt: skip
TRANSFORMERS: Final = "transformers fp16"
ONNX: Final = "lite onnx"
LATE: Final = "the section's time is up"


def measure(rig: Rig, report: Report) -> None:
    """Measure all models at all numbers of rows."""
    report.header, report.left = HEADER, 2
    report.figures |= {"rows": []}
    bandwidth = rig.measured_bandwidth()
    report.figures["bandwidth_bytes_per_s"] = bandwidth
    report.notes.append(
        f"Bandwidth of a streaming read just before: {bandwidth / 1e9:,.0f} GB/s. Context: {rig.setting.context} "
        f"tokens. Random weights, {rig.setting.layers} layers. Our int4 takes turns with each of the others that fit "
        "beside it."
    )
    for one in MODELS:
        row = Row(engine=one.name, cache=one.dtype, rows=min(rig.setting.rows))
        if rig.is_late():
            add(report, dataclasses.replace(row, why=LATE))
            continue
        # What was raised is let go of, and with it what it holds, before the limit is back.
        with contextlib.ExitStack() as stack:
            try:
                for found in _measure_model(rig, one, bandwidth, stack):
                    add(report, found)
            except Unavailable as reason:
                add(report, dataclasses.replace(row, why=str(reason)))
            except (MemoryBudgetError, torch.OutOfMemoryError) as error:
                add(report, dataclasses.replace(row, why=f"it does not fit ({first_line(error)})"))
            except Exception as error:  # noqa: BLE001 - whatever is raised is why it is not measured
                add(report, dataclasses.replace(row, why=f"failed ({first_line(error)})", is_wrong=one.ours))
    add(report, _measure_onnx(rig, bandwidth))
    if any(row["unlimited"] for row in report.figures["rows"]):
        report.notes.append(
            f"² outside the limit of {rig.setting.memory_bytes / 1e9:g} GB, into which it does not fit beside ours."
        )


def add(report: Report, row: Row) -> None:
    """Put a row into a report."""
    report.figures.setdefault("rows", []).append(dataclasses.asdict(row) | {"bytes_per_s": row.bytes_per_s})
    report.cells.append(row.cells())
    label = f"{row.engine}, {row.cache} cache, {row.rows} {'row' if row.rows == 1 else 'rows'}"
    if row.is_wrong:
        report.wrong.append(f"{label}: {row.why}")
    elif row.why is not None:
        report.notes.append(f"{label}: {row.why}.")


def _measure_model(rig: Rig, one: Model, bandwidth: float, stack: contextlib.ExitStack) -> Iterator[Row]:
    """Make a model, and measure it at each number of rows; what it holds is free when this ends."""
    weights, first = _weights_in_memory(rig, one), cache_bytes(rig, min(rig.setting.rows), None)
    if one.ours and one.name != REFERENCE and weights + 2 * first > rig.room():
        rig.forget_decoder()  # the two do not fit together
    else:
        rig.decoder()  # before there is less room for it
    _make_room(rig, stack, one, weights)
    decoder = one.make(rig)
    checks = {
        cache_dtype: _check(rig, one, decoder, cache_dtype)
        for cache_dtype in dict.fromkeys(variant.cache_dtype for variant in one.variants)
    }
    for rows in sorted(rig.setting.rows):
        beside = 0.0 if one.name == REFERENCE else cache_bytes(rig, rows, None)
        _make_room(rig, stack, one, cache_bytes(rig, rows, None) + beside)
        cases = {}
        for variant in one.variants:
            if variant.captured or rows == 1:
                case = _Case(model=one, variant=variant, rows=rows, difference=checks[variant.cache_dtype].difference)
                if (problem := checks[variant.cache_dtype].problem) is not None:
                    yield dataclasses.replace(case.row(), why=problem, is_wrong=one.ours)
                else:
                    cases[case.key] = case
        yield from _measure_rows(rig, decoder, rows, cases, bandwidth)
    if one.name == DENSE and 1 in rig.setting.rows:
        yield _measure_transformers(rig, decoder, bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A row to be."""

    model: Model
    variant: Variant
    rows: int
    difference: float

    @property
    def key(self) -> str:
        return f"{self.model.label(self.variant)}, {self.cache} cache"

    @property
    def cache(self) -> str:
        return self.variant.cache_dtype or self.model.dtype

    def row(self) -> Row:
        label = self.model.label(self.variant)
        return Row(engine=label, cache=self.cache, rows=self.rows, difference=self.difference)


REFERENCE_KEY: Final = f"{REFERENCE}, {MODELS[0].dtype} cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Check:
    difference: float
    problem: str | None


def _check(rig: Rig, one: Model, decoder: LlamaDecoder, cache_dtype: CacheDtype | None) -> _Check:
    """Compare the logits of the first layers with what they should be; for ours also captured with launched steps."""
    expected = check.expected_logits(decoder if one.ours else rig.decoder())
    layers = min(check.LAYERS, decoder.config.num_hidden_layers)
    part = model.part_of(decoder, layers=layers, cache_dtype=cache_dtype, capture=rig.capture)
    far = max(
        check.difference(check.logits_of(part, expected.input_ids, rows), expected.logits) for rows in rig.setting.rows
    )
    allowed = check.ALLOWED["int8 cache" if cache_dtype == "int8" else one.allowed]
    if not far <= allowed:
        problem = f"its logits differ from plain float32's by {far:.2g} of their size, more than {allowed:g}"
        return _Check(difference=far, problem=f"{problem}: it is not timed")
    graphs = one.ours and rig.capture is not None
    return _Check(difference=far, problem=check.check_graphs(rig, decoder, cache_dtype) if graphs else None)


def _weights_in_memory(rig: Rig, one: Model) -> float:
    """Estimate what a model adds to our int4: its layers, its embeddings and its head."""
    if not one.bytes_per_weight:
        return 0.0
    config = rig.config(None)
    dense = 2 * 2 * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer_bytes(config, itemsize=2) / 2 * one.bytes_per_weight + dense


def cache_bytes(rig: Rig, rows: int, cache_dtype: CacheDtype | None) -> int:
    """Count what the cache of so many rows takes on a GPU."""
    config, setting = rig.config(None), rig.setting
    slots = -(-(setting.context + max(setting.new_tokens + 1, WARM_UP)) // 64) * 64
    each = cache_bytes_per_token(config, itemsize=1 if cache_dtype == "int8" else 2)
    return rows * slots * (each + (cache_scale_bytes_per_token(config) if cache_dtype == "int8" else 0))


def _make_room(rig: Rig, stack: contextlib.ExitStack, one: Model, needed: float) -> None:
    """See that so much can be taken. For a peer the limit is let go of where it has to be; for ours it holds.

    Raises:
        Unavailable: the card is too small.
    """
    if one.ours or rig.is_unlimited or needed <= rig.room():
        return
    if needed > (room := rig.room(unlimited=True)):
        msg = f"it takes {needed / 1e9:.1f} GB more beside ours, and the card has {max(0.0, room) / 1e9:.1f} free"
        raise Unavailable(msg)
    stack.enter_context(rig.unlimited())


def grouped(needs: Mapping[str, float], reference: str, needed: float, room: float) -> list[list[str]]:
    """Divide what is to be measured into groups that fit into memory, the reference first in each if it fits, too.

    Args:
        needs: bytes by name.
        reference: its name, perhaps the first of them.
        needed: its bytes; infinite where there is none.
        room: bytes. What is larger by itself is in no group.
    """
    groups: list[list[str]] = []
    left = -math.inf
    for name, need in needs.items():
        if need > room:
            continue
        if need > left:
            beside = name != reference and needed + need <= room
            groups.append([reference] if beside else [])
            left = room - needed if beside else room
        groups[-1].append(name)
        left -= need
    return groups


def _measure_rows(
    rig: Rig, decoder: LlamaDecoder, rows: int, cases: Mapping[str, _Case], bandwidth: float
) -> Iterator[Row]:
    """Measure the cases of one model with so many rows, in groups that fit into memory."""
    room = rig.room()
    needs = {key: cache_bytes(rig, rows, case.variant.cache_dtype) for key, case in cases.items()}
    groups = grouped(needs, REFERENCE_KEY, cache_bytes(rig, rows, None) if rig.has_decoder else math.inf, room)
    in_groups = {key for group in groups for key in group}
    for key, case in cases.items():
        if key not in in_groups:
            why = f"its cache of {needs[key] / 1e9:.1f} GB does not fit: {max(0.0, room) / 1e9:.1f} are left"
            yield dataclasses.replace(case.row(), why=why)
    done: set[str] = set()
    for group in groups:
        wanted = {key: cases[key] for key in group if key in cases and key not in done}
        if rig.is_late():
            yield from (dataclasses.replace(case.row(), why=LATE) for case in wanted.values())
        else:
            yield from _measure_group(rig, decoder, rows, group, wanted, bandwidth)
        done |= wanted.keys()


def _measure_group(
    rig: Rig, decoder: LlamaDecoder, rows: int, group: Sequence[str], wanted: Mapping[str, _Case], bandwidth: float
) -> Iterator[Row]:
    """Measure what fits into memory together.

    Args:
        rig: the device.
        decoder: of the cases.
        rows: of the cache.
        group: the keys of the cases, the reference's among them where it fits.
        wanted: those that are reported.
        bandwidth: bytes per second.
    """
    decodings: dict[str, Decoding] = {}
    rows_of: dict[str, Row] = {}
    for key in group:
        case = wanted.get(key)
        variant = Variant() if case is None else case.variant
        source = rig.decoder() if case is None else decoder
        try:
            decodings[key] = _lite_decoding(rig, source, variant, rows)
        except MemoryBudgetError as error:
            if case is not None:
                rows_of[key] = dataclasses.replace(case.row(), why=str(error))
        except Exception as error:
            if case is None:
                raise
            failed = dataclasses.replace(case.row(), why=f"failed ({first_line(error)})", is_wrong=case.model.ours)
            rows_of[key] = failed
    seconds = time_in_turns(rig, decodings)
    for key, case in wanted.items():
        if key in decodings:
            rows_of[key] = timed(rig, case.row(), key, decodings, seconds, bandwidth, ours=case.model.ours)
    yield from (rows_of[key] for key in wanted)


def _lite_decoding(rig: Rig, decoder: LlamaDecoder, variant: Variant, rows: int) -> LiteDecoding:
    capture: Capture | None = rig.capture if variant.captured else None
    part = model.part_of(decoder, cache_dtype=variant.cache_dtype, capture=capture)
    return LiteDecoding(part, rows=rows, context=rig.setting.context, new_tokens=rig.setting.new_tokens)


def timed(
    rig: Rig,
    row: Row,
    key: str,
    decodings: Mapping[str, Decoding],
    seconds: Mapping[str, Sequence[float] | str],
    bandwidth: float,
    *,
    ours: bool,
) -> Row:
    """Fill in what was measured, and set it beside our int4, if that took turns with it.

    Args:
        rig: the device.
        row: what is known of it.
        key: its name among the others.
        decodings: all that took turns; `REFERENCE_KEY` is our int4's.
        seconds: from `time_in_turns`.
        bandwidth: bytes per second.
        ours: whether it is wrong of us where it failed.
    """
    own, decoding = seconds[key], decodings[key]
    if isinstance(own, str):
        return dataclasses.replace(row, why=own, is_wrong=ours)
    time, setting = quantiles(own), rig.setting
    seen = row.rows * tokens_seen(setting.context, setting.new_tokens)
    read = decoding.weight_bytes + round(seen * decoding.cache_bytes_per_token)
    beside = seconds.get(REFERENCE_KEY)
    return dataclasses.replace(
        row,
        time=time,
        weight_bytes=decoding.weight_bytes,
        cache_bytes=read - decoding.weight_bytes,
        share=read / time.p50 / bandwidth,
        ratio=time.p50 / quantiles(beside).p50 if beside and not isinstance(beside, str) else None,
        turns=tuple(decodings),
        graph=decoding.graph,
        unlimited=rig.is_unlimited,
        why=None if decoding.problem is None else f"timed without a CUDA graph: {decoding.problem}",
        is_wrong=ours and decoding.problem is not None,
    )


def _measure_transformers(rig: Rig, decoder: LlamaDecoder, bandwidth: float) -> Row:
    """Let transformers compute the weights of the dense decoder."""
    setting = rig.setting
    row = Row(engine=TRANSFORMERS, cache="float16", rows=1)
    try:
        length = max(setting.context + setting.new_tokens + 2, check.TOKENS)
        engine = model.transformers_engine(decoder, max_seq_len=length)
        expected = check.expected_logits(rig.decoder())
        layers = min(check.LAYERS, setting.layers)
        engine.start(layers)
        got = (engine.prefill(expected.input_ids[:-1]), engine.decode_one_token(expected.input_ids[-1]))
        far = check.difference(torch.stack(got), expected.logits)
        row = dataclasses.replace(row, difference=far)
        if not far <= check.ALLOWED["float16"]:
            return dataclasses.replace(row, why=f"its logits differ by {far:.2g}: it is not timed", is_wrong=False)
        decodings: dict[str, Decoding] = {
            REFERENCE_KEY: _lite_decoding(rig, rig.decoder(), Variant(), 1),
            TRANSFORMERS: TransformersDecoding(engine, layers=setting.layers, context=setting.context),
        }
        seconds = time_in_turns(rig, decodings)
        return timed(rig, row, TRANSFORMERS, decodings, seconds, bandwidth, ours=False)
    except Unavailable as reason:
        return dataclasses.replace(row, why=str(reason))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is why it is not measured
        return dataclasses.replace(row, why=f"failed ({first_line(error)})")


def _measure_onnx(rig: Rig, bandwidth: float) -> Row:
    """Measure our other engine on an artifact, if there is one and an ONNX Runtime for GPUs."""
    setting = rig.setting
    row = Row(engine=ONNX, cache="float16", rows=1)
    if setting.artifact is None:
        return dataclasses.replace(row, why="no --artifact with a decoder.onnx of float16 activations was given")
    if rig.is_late():
        return dataclasses.replace(row, why=LATE)
    try:
        from lite.engines.onnx_engine.decoder import OnnxDecoder
        from lite.engines.onnx_session import check_provider

        artifact = load_artifact(setting.artifact)
        part, config = artifact.manifest.parts.decoder_onnx, artifact.decoder_config()
        decoder = OnnxDecoder(artifact, provider=check_provider("cuda"))
        decoding = OnnxDecoding(
            decoder,
            read_bytes=0 if part is None else onnx_read_bytes(config, part),
            context=setting.context,
            new_tokens=setting.new_tokens,
        )
        decodings: dict[str, Decoding] = {
            REFERENCE_KEY: _lite_decoding(rig, rig.decoder(), Variant(), 1),
            ONNX: decoding,
        }
        row = dataclasses.replace(row, engine=f"{ONNX}, {config.num_hidden_layers} layers", cache=decoder.cache_dtype)
        return timed(rig, row, ONNX, decodings, time_in_turns(rig, decodings), bandwidth, ours=False)
    except Exception as error:  # noqa: BLE001 - it is not what is measured here
        return dataclasses.replace(row, why=f"failed ({first_line(error)})")
