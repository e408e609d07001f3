"""Where the time of the onnx engine goes: `python -m benchmarks speed profile ARTIFACT`.

ONNX Runtime's profiler writes down what each operator of each run takes. Here a prompt of noise in place of an image
goes through twice, then tokens one by one; the first prompt and the first token only warm up. What is read for a token
and what is multiplied for a prompt follow from the shapes, so that each linear can be set against the two limits, both
measured in the same run: the streaming read of the memory, which decoding cannot beat, and the rate of int8 products
(MatMulInteger, which on a CPU with VNNI comes close to what that can do), which a prompt cannot beat.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.speed.engine import Rows, random_prompt
from benchmarks.speed.harness import Record, Report, run_main, shown
from lite.artifact.open import Artifact, load_artifact
from lite.artifact.parts import OnnxPart
from lite.bench.machine import streaming_read_bandwidth
from lite.config import DecoderConfig
from lite.console import positive
from lite.engines.cores import available_cores
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.engines.onnx_session import CPU, import_onnxruntime
from lite.errors import LiteError
from lite.memory.counts import cache_bytes_per_token, onnx_linear_bytes, onnx_linear_shapes

PROMPT_TOKENS: Final = 1472  # an image of 1369 patches and a question, as in `peers`
NEW_TOKENS: Final = 16
_KERNEL: Final = "_kernel_time"
_ATTENTION: Final = "GroupQueryAttention"
_BRANCHES: Final = "If"
_PRODUCT: Final = (512, 4096, 4096)  # rows, inputs, outputs of the int8 product
_PRODUCT_ROUNDS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Operators that belong together: a linear of every layer, attention, or one kind of operator."""

    name: str
    calls: int  # in a run
    seconds: float
    bytes_read: int | None = None  # weights, or keys and values; None: not counted
    operations: int | None = None  # of its products


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A prompt, or a token; the parts that take longest come first."""

    seconds: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time goes, and the limits, both of one run."""

    artifact_id: str
    cache_dtype: str
    num_prompt_tokens: int
    prefill: Phase
    decode: Phase
    bandwidth: float  # bytes per second of a streaming read
    int8_rate: float  # operations per second of MatMulInteger


def profile_decoder(artifact: Artifact, *, cache_dtype: Any, num_prompt_tokens: int, num_new_tokens: int) -> Profile:  # noqa: ANN401 - a CacheDtype
    """Run a prompt and tokens, and sum up what ONNX Runtime says of them.

    Args:
        artifact: with `decoder.onnx`.
        cache_dtype: as for `lite.load`.
        num_prompt_tokens: at least 2.
        num_new_tokens: at least 2.

    Raises:
        LiteError: the decoder cannot be loaded, or the context is too short.
    """
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        decoder = OnnxDecoder(artifact, cache_dtype=cache_dtype, profile=Path(folder) / "profile")
        chunks = _draft(decoder, num_prompt_tokens, num_new_tokens)
        events = json.loads(decoder.end_profile().read_text(encoding="utf-8"))
    runs = [run for run in split_runs(events) if run.seconds > 0]
    prompts, tokens = runs[: 2 * chunks], runs[2 * chunks :]
    part = artifact.manifest.parts.decoder_onnx
    if part is None or len(tokens) != num_new_tokens:
        msg = f"got a profile of {len(runs)} runs · expected {2 * chunks + num_new_tokens} · report this"
        raise LiteError(msg)
    config, cache = decoder.config, str(decoder.cache_dtype)
    counts = _Counts(config, part, cache_itemsize=np.dtype(cache).itemsize)
    # A token after the first sees this many on average; the prompt was the same twice, and the second one counts.
    context = num_prompt_tokens + 1 + num_new_tokens // 2
    return Profile(
        artifact_id=artifact.id,
        cache_dtype=cache,
        num_prompt_tokens=num_prompt_tokens,
        prefill=counts.phase(prompts[chunks:], over=1, tokens=num_prompt_tokens, context=None),
        decode=counts.phase(tokens[1:], over=len(tokens) - 1, tokens=1, context=context),
        bandwidth=streaming_read_bandwidth("cpu"),
        int8_rate=int8_rate(),
    )


def _draft(decoder: OnnxDecoder, num_prompt_tokens: int, num_new_tokens: int) -> int:
    """Read a prompt twice, and decode tokens; return how many runs of the graph a prompt takes."""
    rows = Rows(decoder, 1, num_prompt_tokens + num_new_tokens)
    prompt = random_prompt(decoder.config, num_prompt_tokens)
    for _ in range(2):
        rows.read(prompt)
    for _ in range(num_new_tokens):
        rows.decode()
        rows.wait()
    return rows.num_segments


def int8_rate() -> float:
    """Measure how many operations a second a product of int8 and uint8 matrices makes; a multiply-add is two."""
    rows, inputs, outputs = _PRODUCT
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.integers(-63, 64, (inputs, outputs), dtype=np.int8), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inputs])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [rows, outputs])
    node = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [weight])
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=[CPU])
    values = rng.integers(0, 256, (rows, inputs), dtype=np.uint8)
    seconds = []
    for _ in range(_PRODUCT_ROUNDS):
        started = time.perf_counter()
        session.run(None, {"x": values})
        seconds.append(time.perf_counter() - started)
    return 2 * rows * inputs * outputs / min(seconds)


# -- The profiler's file ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the graph: its time, and that of each of its nodes, (name, operator, seconds)."""

    seconds: float
    nodes: tuple[tuple[str, str, float], ...]


def split_runs(events: Sequence[dict[str, Any]]) -> list[Run]:
    """Divide a profile into runs of the graph.

    Args:
        events: of Chrome's trace format, as ONNX Runtime writes them; times are in microseconds.
    """
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda event: event["ts"])
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    return [
        Run(
            seconds=run["dur"] / 1e6,
            nodes=tuple(
                (e["name"].removesuffix(_KERNEL), e["args"]["op_name"], e["dur"] / 1e6)
                for e in kernels
                if run["ts"] <= e["ts"] < run["ts"] + run["dur"]
            ),
        )
        for run in runs
    ]


class _Counts:
    """What a decoder reads and multiplies, by its shapes."""

    def __init__(self, config: DecoderConfig, part: OnnxPart, *, cache_itemsize: int) -> None:
        self.config = config
        self.part = part
        self.cache_itemsize = cache_itemsize
        self.linears = onnx_linear_shapes(config)

    def phase(self, runs: Sequence[Run], *, over: int, tokens: int, context: int | None) -> Phase:
        """Sum runs up.

        Args:
            runs: all chunks of a prompt, or tokens.
            over: what to divide by.
            tokens: that go through the linears, in all runs over `over`.
            context: cached tokens that a new one sees; None for a prompt, of which no bytes are counted.
        """
        seconds: dict[str, float] = collections.defaultdict(float)
        calls: collections.Counter[str] = collections.Counter()
        for run in runs:
            for node, operator, taken in run.nodes:
                # The time of an If is that of the nodes of its branch, which are there themselves.
                if operator != _BRANCHES:
                    name = self._part_of(node, operator)
                    seconds[name] += taken / over
                    calls[name] += 1
        total = sum(run.seconds for run in runs) / over
        seconds["between operators"] = max(0.0, total - sum(seconds.values()))
        parts = [self._part(name, calls[name] // over, taken, tokens, context) for name, taken in seconds.items()]
        return Phase(seconds=total, parts=tuple(sorted(parts, key=lambda part: -part.seconds)))

    def _part_of(self, node: str, operator: str) -> str:
        if operator == "MatMulNBits":
            return node.rpartition(".")[2]
        if ".attention." in node and operator != _ATTENTION:
            return "the cache's rounding"
        return operator

    def _part(self, name: str, calls: int, seconds: float, tokens: int, context: int | None) -> Part:
        layers = self.config.num_hidden_layers
        nbytes: int | None = None
        operations: int | None = None
        if name in self.linears:
            layers = 1 if name == "lm_head" else layers
            nbytes = layers * onnx_linear_bytes(name, self.config, self.part, bytes_per_block=4)
            if context is None and name not in ("lm_head", "qkv"):
                layers -= 1  # of the last layer a prompt's last token alone goes on
            outputs, inputs = self.linears[name]
            operations = None if name == "lm_head" else 2 * tokens * inputs * outputs * layers
        elif name == _ATTENTION and context is not None:
            nbytes = context * cache_bytes_per_token(self.config, itemsize=self.cache_itemsize)
        return Part(
            name=name,
            calls=calls,
            seconds=seconds,
            bytes_read=nbytes if context is not None else None,
            operations=operations if context is None else None,
        )


# -- Command line ----------------------------------------------------------------------------------------------------


def reports(profile: Profile) -> dict[str, Report]:
    """Return the two phases beside the limits of each."""
    found = {}
    limits = {
        "prefill": ("GOP/s", "of int8 products", profile.int8_rate, "operations"),
        "decode": ("GB/s", "of bandwidth", profile.bandwidth, "bytes_read"),
    }
    for name, (unit, share, limit, counted) in limits.items():
        phase: Phase = getattr(profile, name)
        report = found[name] = Report(title=f"{name.capitalize()}: {shown(1e3 * phase.seconds)} ms")
        for part in phase.parts:
            line = {"part": part.name, "calls": str(part.calls or ""), "ms": f"{1e3 * part.seconds:.2f}"}
            line |= {"of all": f"{part.seconds / phase.seconds:.1%}", unit: "", share: ""}
            if (amount := getattr(part, counted)) is not None and part.seconds:
                rate = amount / part.seconds
                line |= {unit: f"{rate / 1e9:.1f}", share: f"{rate / limit:.0%}"}
            report.lines.append(line)
        whole = sum(getattr(part, counted) or 0 for part in phase.parts) / phase.seconds
        report.notes.append(f"{whole / 1e9:.1f} {unit} in all, {share.removeprefix('of ')} alone: {limit / 1e9:.1f}.")
        report.figures |= {"seconds": phase.seconds, "parts": phase.parts}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed profile",
        description="Let ONNX Runtime say what each operator of decoder.onnx takes, on the CPU, and print it beside "
        "the limits of memory and of int8 products, as markdown. The image is noise.",
        epilog="exit status: 0 done, 1 nothing could be measured, 2 wrong use, 130 interrupted.",
    )
    add, prompt = parser.add_argument, f"default: {PROMPT_TOKENS}, or what the context holds"
    add("artifact", type=Path, metavar="ARTIFACT", help="one with decoder.onnx")
    add("--cache-dtype", choices=["float32", "float16", "int8"], help="as for lite (default: as it computes)")
    add("--prompt-tokens", type=positive, metavar="T", help=prompt)
    add("--new-tokens", type=positive, default=NEW_TOKENS, metavar="T", help="2 or more (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    return parser


def _run(arguments: argparse.Namespace, record: Record) -> int:
    artifact = load_artifact(arguments.artifact)
    artifact.onnx_part()
    context = artifact.decoder_config().max_position_embeddings
    prompt = arguments.prompt_tokens or max(2, min(PROMPT_TOKENS, context - arguments.new_tokens))
    if prompt < 2 or arguments.new_tokens < 2 or prompt + arguments.new_tokens > context:
        msg = f"got {prompt} and {arguments.new_tokens} tokens · expected 2 of each at least, {context} in all at most"
        raise LiteError(f"{msg}, the context · choose others")
    profile = profile_decoder(
        artifact, cache_dtype=arguments.cache_dtype, num_prompt_tokens=prompt, num_new_tokens=arguments.new_tokens
    )
    figures = {name: getattr(profile, name) for name in ("artifact_id", "cache_dtype", "num_prompt_tokens")}
    record.begin(
        f"A prompt of {prompt} tokens, cache {profile.cache_dtype}.",
        **figures, bandwidth=profile.bandwidth, int8_rate=profile.int8_rate,
    )  # fmt: skip
    for name, report in reports(profile).items():
        record.add(name, report)
    return record.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_main(_parser(), argv, _run)
