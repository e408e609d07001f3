"""Make the artifacts, start the workers, check what they compute, and time each in turns with our own engine."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.depth import at
from benchmarks.speed.harness import NONE, Report, Rounds, Row, Unavailable, in_turns, reason, shown
from benchmarks.speed.peers.process import SETTLE_S, Process
from benchmarks.speed.peers.specs import DENSE, PEERS_PYTHON, Spec, ours
from benchmarks.speed.peers.worker import CHECK_PROMPT, CHECK_TOKENS
from benchmarks.speed.synthetic import REAL_LAYERS, export_checkpoint, write_checkpoint
from benchmarks.speed.weights import Shapes
from lite.console import say
from lite.errors import LiteError
from lite.files import staged_folder

SHAPES: Final = replace(Shapes(), image_size=42, tower_dim=128, tower_depth=3)
"""The real decoder's, with a small tower: nobody looks at it."""
EXPORTS: Final = {
    "dense": ("--decoder", "fp16"),
    "int4": (
        "--decoder",
        "gptq-int4",
        "--method",
        "rtn",
        "--engine",
        "onnx",
        "--prompt-weights",
        "int8",
        "--vision",
        "int8",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all engines have in common."""

    layers: tuple[int, ...]  # depths, ascending
    num_prompt_tokens: int
    num_new_tokens: int
    rounds: int
    threads: int
    limit_s: float  # for a prompt and its tokens
    device: str
    shapes: Shapes = SHAPES

    @property
    def max_seq_len(self) -> int:
        """What a cache has to hold: one more token is decoded untimed, and the check has a length of its own."""
        return max(self.num_prompt_tokens + self.num_new_tokens + 2, CHECK_PROMPT + CHECK_TOKENS)


class Bench:
    """The artifacts of all depths, and the first engine, loaded."""

    exact = DENSE
    """The others' logits are compared with its own."""

    def __init__(self, setting: Setting, folder: Path, first: Spec, stack: contextlib.ExitStack) -> None:
        """Make the artifacts that are not there, compute the logits to compare with, and load an engine.

        Raises:
            LiteError: one of that failed.
            Unavailable: that engine cannot run here.
        """
        self.setting, self.folder = setting, folder
        self.reference: dict[int, NDArray[np.float64]] = {}
        for layers in setting.layers:
            if not (folder / f"{layers}").exists():
                with staged_folder(folder / f"{layers}") as staged:
                    self.make(layers, staged.path)
                    staged.finish()
            with contextlib.closing(self.start(self.exact, layers)) as dense:
                self.reference[layers] = np.array(dense.ask("check")["logits"])
                self.bandwidth: float = dense.ask("bandwidth")["bytes_per_s"]
        self.ours, self.loaded = first, self.load(first, stack)

    def make(self, layers: int, out: Path) -> None:
        """Write the models of one depth."""
        say(f"exporting {layers} layers")
        checkpoint = self.folder / f"checkpoint-{layers}"
        write_checkpoint(checkpoint, layers=layers, shapes=self.setting.shapes)
        for name, options in EXPORTS.items():
            export_checkpoint(checkpoint, out / name, *options, "--device", "cpu")
        shutil.rmtree(checkpoint)

    def start(self, spec: Spec, layers: int) -> Process:
        """Start a process and load an engine there.

        Raises:
            Unavailable: it cannot run here.
            LiteError: it failed.
        """
        setting = self.setting
        return start_worker(
            spec, log=self.folder / f"{spec.name}.txt", threads=setting.threads, folder=f"{self.folder / f'{layers}'}",
            max_seq_len=setting.max_seq_len, vocab_size=setting.shapes.vocab_size, device=setting.device,
        )  # fmt: skip

    def load(self, spec: Spec, stack: contextlib.ExitStack) -> dict[int, Process]:
        """Load an engine at each depth, check it and let it run once.

        Raises:
            Unavailable: it cannot run here, or takes too long.
            LiteError: it failed, or computes something else.
        """
        loaded = {}
        for layers in self.setting.layers:
            process = loaded[layers] = self.start(spec, layers)
            stack.callback(process.close)
            reference = self.reference[layers]
            difference = np.array(process.ask("check")["logits"]) - reference
            off = process.about["difference"] = float(np.linalg.norm(difference) / np.linalg.norm(reference))
            allowed = spec.allowed_difference(layers)
            if not off <= allowed:  # NaN is no agreement either
                msg = (
                    f"got logits that differ from those of {self.exact.name} by {off:.2g} of their size · expected at "
                    f"most {allowed:.2g}, what rounding explains · it computes something else: no times"
                )
                raise LiteError(msg)
            self.turn(process)
        return loaded

    def turn(self, process: Process, num_prompt_tokens: int | None = None) -> dict[str, list[float]]:
        """Time a prompt and tokens."""
        setting = self.setting
        time.sleep(SETTLE_S)
        amounts = {"num_prompt_tokens": num_prompt_tokens or setting.num_prompt_tokens}
        amounts |= {"num_new_tokens": setting.num_new_tokens}
        return process.ask("round", limit_s=setting.limit_s, **amounts)


def start_worker(spec: Spec, *, log: Path, threads: int, prefix: Sequence[str] = (), **order: Any) -> Process:
    """Start a worker in the interpreter that has its packages, and load an engine there.

    Raises:
        Unavailable: it cannot run here.
        LiteError: it failed.
    """
    order |= {name: getattr(spec, name) for name in ("module", "form", "packages", "install")} | {"threads": threads}
    python = str(PEERS_PYTHON) if spec.lives_apart and PEERS_PYTHON.exists() else sys.executable
    command = [*prefix, python, "-m", "benchmarks.speed.peers.worker", json.dumps(order)]
    return Process(command, log=log, threads=threads)


def measure(specs: Sequence[Spec], setting: Setting) -> dict[str, Report]:
    """Measure engines, each in turns with ours. One that fails does not stop the rest.

    Returns:
        The times of a decoded token, and those of a prompt.

    Raises:
        LiteError: our engine fails.
    """
    reports = {what: Report(title=f"{what.capitalize()} on {setting.device}") for what in ("decode", "prefill")}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        try:
            bench = Bench(setting, folder, ours(setting.device), stack)
        except Unavailable as error:
            raise LiteError(f"{ours(setting.device).name}: {error}") from error
        for spec in specs:
            say(f"measuring {spec.name}")
            try:
                _measure_one(bench, spec, reports)
            except (Unavailable, LiteError) as error:
                row = Row(names={"engine": spec.name, "layers": NONE}, why=reason(error))
                row.is_wrong = isinstance(error, LiteError)
                reports["decode"].add(row)
    reports["decode"].notes += _notes(bench)
    return reports


def _measure_one(bench: Bench, spec: Spec, reports: Mapping[str, Report]) -> None:
    is_ours = spec == bench.ours
    with contextlib.ExitStack() as stack:
        loaded = bench.loaded if is_ours else bench.load(spec, stack)
        own = {(spec.name, layers): process for layers, process in loaded.items()}
        both = {(bench.ours.name, layers): process for layers, process in bench.loaded.items()} | own
        turns = {key: functools.partial(bench.turn, process) for key, process in both.items()}
        found = in_turns(turns, bench.setting.rounds)
        for process in loaded.values():
            with contextlib.suppress(LiteError):  # it has died: its times say so
                process.about["peak_bytes"] = process.ask("peak")["bytes"]
    for what, report in reports.items():
        mine, beside = (
            with_real_depth({layers: _phase(found[name, layers], what) for layers in loaded})
            for name in (spec.name, bench.ours.name)
        )
        for layers, rounds in mine.items():
            row = Row(names={"engine": spec.name, "layers": f"{layers}"}, against=bench.ours.name)
            if layers in loaded:
                row.bandwidth = bench.bandwidth
                _describe(row, loaded[layers].about, what, bench.setting)
            else:
                row.names["layers"] = f"~{layers}"
            row.took(rounds, "" if is_ours else beside.get(layers, ""))
            row.is_wrong = row.is_wrong and layers in loaded  # noise is no fault
            if what == "prefill" and row.time is not None:
                row.cells["tokens/s"] = shown(bench.setting.num_prompt_tokens / row.time.p50)
            report.add(row)


def _phase(rounds: list[dict[str, list[float]]] | str, what: str) -> Rounds | str:
    return rounds if isinstance(rounds, str) else [one[what] for one in rounds]


def with_real_depth(times: Mapping[int, Rounds | str], real_layers: int = REAL_LAYERS) -> dict[int, Rounds | str]:
    """Add what the line through the medians says of the real depth, round by round; nothing where one depth failed."""
    measured = {layers: rounds for layers, rounds in times.items() if not isinstance(rounds, str)}
    if real_layers in times or len(measured) < len(times):
        return dict(times)
    medians = [[statistics.median(seconds) for seconds in rounds] for rounds in measured.values()]
    real = [[at(real_layers, list(measured), values)] for values in zip(*medians, strict=True)]
    return {**times, real_layers: real if min(real) > [0.0] else "noise: give it more --layers"}


def _describe(row: Row, about: dict[str, Any], what: str, setting: Setting) -> None:
    """Say what was read for a token, and how the engine computes."""
    row.figures |= about
    if what == "decode":
        context = setting.num_prompt_tokens + 1 + (setting.num_new_tokens + 1) // 2  # that the median token sees
        cache_bytes = row.figures["cache_bytes"] = about["cache_bytes_per_token"] * context
        row.nbytes = about["weight_bytes"] + cache_bytes
        row.cells |= {"computes in": about["computes_in"], "logits off by": f"{about['difference']:.1e}"}
        peak_bytes = about.get("peak_bytes")
        row.cells["peak GB"] = NONE if peak_bytes is None else f"{peak_bytes / 1e9:.2f}"


def _notes(bench: Bench) -> list[str]:
    setting = bench.setting
    memory = "of the process (RSS)" if setting.device == "cpu" else "of torch's allocator (VRAM)"
    return [
        f"hidden_size {setting.shapes.hidden_size}; {setting.threads} threads; prompts of {setting.num_prompt_tokens} "
        f"tokens, then {setting.num_new_tokens} more; {setting.rounds} rounds, each engine in turns with "
        f"{bench.ours.name}. ×: its time over that of {bench.ours.name} in the same round.",
        f"~{REAL_LAYERS} layers, which nobody ran: the line through the depths, round by round. Where the spread is "
        "wide, more layers or a quieter machine are needed.",
        f"Bandwidth of a streaming read by as many threads in this run: {bench.bandwidth / 1e9:.3g} GB/s. Read for a "
        "token: all weights but the embedding table, and the keys and values of the context.",
        f"logits off by: root mean square of the difference from {DENSE.name}, relative, on one short text. The "
        "weights are random, rounded to nearest by each format: this shows that the engines compute the same, not how "
        "good a format is.",
        f"Peak memory is that {memory} once loaded.",
        "Of a prompt our onnx engine and llama.cpp let only the last token through the last layer's feed-forward half. "
        f"With few layers that flatters their prefill; the figures for {REAL_LAYERS} layers are not distorted by it.",
    ]
