"""Where the time of the onnx engine goes: `python -m benchmarks speed profile ARTIFACT`.

ONNX Runtime's profiler writes down what each operator of each run takes. Here a prompt of noise in place of an image
goes through twice, then tokens one by one; the first prompt and the first token only warm up. What is read for a token
follows from the shapes, so that each linear stands beside the streaming read of the same run, which decoding cannot
beat.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.speed.engine import Rows, random_prompt
from benchmarks.speed.harness import Record, Report, run_main, shown
from lite.artifact.open import load_artifact
from lite.bench.machine import streaming_read_bandwidth
from lite.console import positive
from lite.engines.onnx_engine.decoder import OnnxDecoder
from lite.errors import LiteError
from lite.memory.counts import cache_bytes_per_token, onnx_linear_bytes, onnx_linear_shapes

PROMPT_TOKENS: Final = 1472  # an image of 1369 patches and a question, as in `peers`
NEW_TOKENS: Final = 16
ATTENTION: Final = "GroupQueryAttention"
BETWEEN: Final = "between operators"
_KERNEL: Final = "_kernel_time"
_BRANCHES: Final = "If"


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


def _part_of(node: str, operator: str) -> str:
    """Return what a node belongs to: a linear of every layer, the cache's rounding, or one kind of operator."""
    if operator == "MatMulNBits":
        return node.rpartition(".")[2]
    return "the cache's rounding" if ".attention." in node and operator != ATTENTION else operator


def profile_decoder(decoder: OnnxDecoder, num_prompt_tokens: int, num_new_tokens: int) -> tuple[list[Run], list[Run]]:
    """Read a prompt twice and decode tokens; return the runs of the second prompt, and of the tokens after the first.

    Args:
        decoder: made with `profile`; it can be profiled once.
        num_prompt_tokens: at least 2.
        num_new_tokens: at least 2.

    Raises:
        LiteError: the profile has other runs than were made.
    """
    rows = Rows(decoder, 1, num_prompt_tokens + num_new_tokens)
    prompt = random_prompt(decoder.config, num_prompt_tokens)
    for _ in range(2):
        rows.read(prompt)
    for _ in range(num_new_tokens):
        rows.decode()
        rows.wait()
    events = json.loads(decoder.end_profile().read_text(encoding="utf-8"))
    runs = [run for run in split_runs(events) if run.seconds > 0]
    chunks = rows.num_segments
    if len(runs) != 2 * chunks + num_new_tokens:
        msg = f"got a profile of {len(runs)} runs · expected {2 * chunks + num_new_tokens} · report this"
        raise LiteError(msg)
    return runs[chunks : 2 * chunks], runs[2 * chunks + 1 :]


# -- Its figures -----------------------------------------------------------------------------------------------------


def report_of(
    name: str, runs: Sequence[Run], *, over: int, nbytes: Mapping[str, int] | None = None, bandwidth: float = 0.0
) -> Report:
    """Sum runs up by part, those first that take longest.

    Args:
        name: of the phase.
        runs: all chunks of a prompt, or tokens.
        over: what to divide by.
        nbytes: that a part reads, where it is counted.
        bandwidth: bytes per second of a streaming read.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for run in runs:
        for node, operator, taken in run.nodes:
            # The time of an If is that of the nodes of its branch, which are there themselves.
            if operator != _BRANCHES:
                part = _part_of(node, operator)
                seconds[part] += taken / over
                calls[part] += 1
    total = sum(run.seconds for run in runs) / over
    seconds[BETWEEN] = max(0.0, total - sum(seconds.values()))
    report = Report(title=f"{name.capitalize()}: {shown(1e3 * total)} ms")
    parts = report.figures["parts"] = []
    for part, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        count, read = calls[part] // over, (nbytes or {}).get(part)
        parts.append({"name": part, "calls": count, "seconds": taken, "bytes": read})
        line = {"part": part, "calls": str(count or ""), "ms": f"{1e3 * taken:.2f}", "of all": f"{taken / total:.1%}"}
        if read is not None and taken:
            line |= {"GB/s": f"{read / taken / 1e9:.1f}", "of bandwidth": f"{read / taken / bandwidth:.0%}"}
        report.lines.append(line)
    if nbytes is not None:
        whole = sum(nbytes.values()) / total
        report.notes.append(f"{whole / 1e9:.1f} GB/s in all, bandwidth alone: {bandwidth / 1e9:.1f}.")
    report.figures["seconds"] = total
    return report


def bytes_read(decoder: OnnxDecoder, part: Any, context: int) -> dict[str, int]:  # noqa: ANN401 - an OnnxPart
    """Count what a token reads: of each linear, in all layers, and of the keys and values of its context."""
    config = decoder.config
    found = {
        name: (1 if name == "lm_head" else config.num_hidden_layers)
        * onnx_linear_bytes(name, config, part, bytes_per_block=4)
        for name in onnx_linear_shapes(config)
    }
    itemsize = np.dtype(str(decoder.cache_dtype)).itemsize
    return found | {ATTENTION: context * cache_bytes_per_token(config, itemsize=itemsize)}


# -- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks speed profile",
        description="Let ONNX Runtime say what each operator of decoder.onnx takes, on the CPU, and print it beside "
        "the limit of memory, as markdown. The image is noise.",
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
    part, new = artifact.onnx_part(), arguments.new_tokens
    context = artifact.decoder_config().max_position_embeddings
    prompt = arguments.prompt_tokens or max(2, min(PROMPT_TOKENS, context - new))
    if prompt < 2 or new < 2 or prompt + new > context:
        msg = f"got {prompt} and {new} tokens · expected 2 of each at least, {context} in all at most"
        raise LiteError(f"{msg}, the context · choose others")
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        decoder = OnnxDecoder(artifact, cache_dtype=arguments.cache_dtype, profile=Path(folder) / "profile")
        prefill, decode = profile_decoder(decoder, prompt, new)
    cache, bandwidth = str(decoder.cache_dtype), streaming_read_bandwidth("cpu")
    figures = {"artifact_id": artifact.id, "cache_dtype": cache, "num_prompt_tokens": prompt, "bandwidth": bandwidth}
    record.begin(f"A prompt of {prompt} tokens, cache {cache}.", **figures)
    record.add("prefill", report_of("prefill", prefill, over=1))
    # A token after the first sees this many on average.
    read = bytes_read(decoder, part, prompt + 1 + new // 2)
    record.add("decode", report_of("decode", decode, over=new - 1, nbytes=read, bandwidth=bandwidth))
    return record.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_main(_parser(), argv, _run)
