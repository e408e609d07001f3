"""Start the workers, check what they compute, and time them, taking turns."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.speed.harness import in_turns
from benchmarks.speed.peers.process import Process, measured_bandwidth
from benchmarks.speed.peers.specs import REFERENCE, Spec
from benchmarks.speed.peers.worker import CHECK_PROMPT, CHECK_TOKENS
from benchmarks.speed.weights import Model
from lite.console import say
from lite.errors import BackendUnavailable, LiteError
from lite.eval.figures import Quantiles, quantiles

PROBE_TOKENS: Final = 64
MIN_NEW_TOKENS: Final = 4
"""Decoded in a round even where that takes longer than the limit."""
_SETTLE_S: Final = 0.3
"""Between two engines: threads that wait for more work go on spinning for a while (OpenMP's do for up to 0.2 s)."""
_MEMORY_SHARE: Final = 0.85
"""Of the memory that is free, how much engines may take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What all engines have in common."""

    model: Model
    num_prompt_tokens: int
    num_new_tokens: int
    rounds: int
    threads: int
    limit_s: float  # for one prefill, and for the decoding of one round
    device: str
    peers_python: Path
    vision: Path | None = None  # an artifact whose tower is timed, too

    @property
    def max_seq_len(self) -> int:
        """What a cache has to hold: one more token is decoded untimed, and the check has a length of its own."""
        return max(self.num_prompt_tokens + self.num_new_tokens + 1, CHECK_PROMPT + CHECK_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """An engine's, at some depth."""

    decode: Quantiles  # seconds a token
    prefill: Quantiles | None  # None: it was not worth waiting for


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One engine, measured."""

    name: str
    about: dict[str, Any]  # see `worker.Worker.about`
    difference: float  # of its logits from the reference's, root mean square, relative
    times: dict[int, Times]  # by depth: the whole model, and the fewest layers that the engine runs with
    slow: str | None  # why there is no prefill
    context: int  # tokens that the median token sees
    bandwidth: float  # bytes per second of a streaming read, while these engines were loaded
    peak_bytes: int | None  # of its process (RSS) or of torch's allocator (VRAM), since it was loaded
    turns: tuple[str, ...]  # the engines it took turns with, itself included

    @property
    def whole(self) -> Times:
        """The times of the whole model."""
        return self.times[max(self.times)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """One engine, not measured."""

    name: str
    why: str
    failed: bool  # or else it is not there


class Runner:
    """An engine that is loaded and computes what it should: its times, round by round."""

    def __init__(self, spec: Spec, setting: Setting, folder: Path) -> None:
        """Load, check and probe it.

        Raises:
            BackendUnavailable: it cannot run here.
            LiteError: it failed, or computes something else.
        """
        self.spec = spec
        self.setting = setting
        self.process = start_engine(spec, setting, folder)
        try:
            self.difference = self._check(folder)
            self._probe()
        except BaseException:
            self.process.close()
            raise

    def _check(self, folder: Path) -> float:
        file = folder / f"{self.spec.name}.npy"
        self.process.ask("check", file=str(file))
        logits, reference = np.load(file), np.load(folder / f"{REFERENCE.name}.npy")
        difference = float(np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean()))
        allowed = self.spec.allowed_difference(self.setting.model.num_layers)
        # NaN is no agreement either.
        if not difference <= allowed:
            msg = (
                f"got logits that differ from those of {REFERENCE.name} by {difference:.2g} of their size · expected "
                f"at most {allowed:.2g}, what rounding explains · it computes something else: no times"
            )
            raise LiteError(msg)
        return difference

    def _probe(self) -> None:
        """Find out what can be waited for."""
        setting = self.setting
        tokens = min(PROBE_TOKENS, setting.num_prompt_tokens)
        probe = self._timed(setting.model.num_layers, num_prompt_tokens=tokens, num_new_tokens=1, prefill=True)
        taken = probe["prefill_s"]
        self.slow: str | None = None
        if taken * setting.num_prompt_tokens / tokens > setting.limit_s:
            rate = f"probe of {tokens} tokens: {taken:.1f} s, {tokens / taken:.1f} tokens/s"
            self.slow = f"slower than {setting.limit_s:g} s, {rate}"
        affordable = int(setting.limit_s / probe["decode_s"][0])
        self.num_new_tokens = min(setting.num_new_tokens, max(MIN_NEW_TOKENS, affordable))
        if self.slow and not self.process.about["fills"]:
            todo = "its cache can only be filled by a prefill · give it a higher --limit-s"
            raise LiteError(f"got a prefill {self.slow} · expected a faster one: {todo}")

    def _timed(self, num_layers: int, **amounts: Any) -> dict[str, Any]:
        return self.process.ask("round", num_layers=num_layers, **amounts)

    def turn(self) -> dict[int, dict[str, Any]]:
        """Time a round: with all layers, and with the fewest."""
        time.sleep(_SETTLE_S)
        amounts = {"num_prompt_tokens": self.setting.num_prompt_tokens, "num_new_tokens": self.num_new_tokens}
        depths = (self.setting.model.num_layers, self.process.about["fewest_layers"])
        return {depth: self._timed(depth, **amounts, prefill=self.slow is None) for depth in depths}

    def measured(
        self, rounds: Sequence[dict[int, dict[str, Any]]], bandwidth: float, turns: tuple[str, ...]
    ) -> Measured:
        """Sum up."""
        times = {
            depth: Times(
                decode=quantiles([second for timed in rounds for second in timed[depth]["decode_s"]]),
                prefill=None if self.slow else quantiles([timed[depth]["prefill_s"] for timed in rounds]),
            )
            for depth in rounds[0]
        }
        return Measured(
            name=self.spec.name,
            about=self.process.about,
            difference=self.difference,
            times=times,
            slow=self.slow,
            # The token in the middle of those timed; one was decoded before them.
            context=self.setting.num_prompt_tokens + 1 + (self.num_new_tokens + 1) // 2,
            bandwidth=bandwidth,
            peak_bytes=self.process.ask("peak")["bytes"],
            turns=turns,
        )


def start_engine(spec: Spec, setting: Setting, folder: Path) -> Process:
    """Start a process and load an engine there.

    Raises:
        BackendUnavailable: it cannot run here.
        LiteError: it failed.
    """
    apart = spec.in_own_environment and setting.peers_python.exists()
    python = str(setting.peers_python) if apart else sys.executable
    order = {name: getattr(spec, name) for name in ("module", "form", "packages", "install")}
    order |= {"model": asdict(setting.model), "max_seq_len": setting.max_seq_len, "device": setting.device}
    order |= {"threads": setting.threads, "folder": str(folder)}
    command = [python, "-m", "benchmarks.speed.peers.worker", json.dumps(order)]
    return Process(command, name=spec.name, threads=setting.threads, folder=folder)


def measure(
    specs: Sequence[Spec], setting: Setting
) -> tuple[list[Measured | NotMeasured], Quantiles | None]:  # fmt: skip
    """Measure engines, and first and always `REFERENCE`. One that fails does not stop the rest.

    Returns:
        An engine each, and the seconds of the tower for an image, if it was asked for.

    Raises:
        LiteError: the reference or the tower fails, or the bandwidth cannot be measured.
    """
    others = [spec for spec in specs if spec != REFERENCE]
    found: list[Measured | NotMeasured] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
        tower_s: list[float] = []
        tower: Process | None = None
        if setting.vision is not None:
            # First: it stays loaded, and the memory that engines may have is what it leaves.
            command = [sys.executable, "-m", "benchmarks.speed.peers.tower", str(setting.vision), setting.device]
            tower = Process(command, name="tower", threads=setting.threads, folder=folder)
            stack.callback(tower.close)
        for group in groups([REFERENCE, *others], setting):
            found += _measure_group(group, setting, folder, _tower_turn(tower, tower_s))
        return found, quantiles(tower_s) if tower_s else None


def _tower_turn(tower: Process | None, seconds: list[float]) -> Callable[[], None]:
    def turn() -> None:
        if tower is not None:
            time.sleep(_SETTLE_S)
            seconds.append(tower.ask("round")["seconds"])

    return turn


def _measure_group(
    group: Sequence[Spec], setting: Setting, folder: Path, tower: Callable[[], None]
) -> Iterator[Measured | NotMeasured]:
    """Load some engines and let them take turns."""
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        found: dict[str, Measured | NotMeasured] = {}
        for spec in group:
            say(f"loading {spec.name}")
            try:
                runners[spec.name] = Runner(spec, setting, folder)
                stack.callback(runners[spec.name].process.close)
            except LiteError as error:
                failed = not isinstance(error, BackendUnavailable)
                found[spec.name] = _lost(spec.name, str(error), failed=failed)
        time.sleep(_SETTLE_S)
        bandwidth = measured_bandwidth(setting.device, setting.threads)

        def turn(runner: Runner) -> Callable[[], dict[int, dict[str, Any]]]:
            def timed() -> dict[int, dict[str, Any]]:
                say(f"round: {runner.spec.name}")
                return runner.turn()

            return timed

        turns: dict[str, Callable[[], Any]] = {"": tower, **{name: turn(one) for name, one in runners.items()}}
        for name, rounds in in_turns(turns, setting.rounds).items():
            if isinstance(rounds, str):
                found[name] = _lost(name or "the tower", rounds, failed=True)
            elif name:
                try:
                    found[name] = runners[name].measured(rounds, bandwidth, tuple(runners))
                except LiteError as error:
                    found[name] = _lost(name, str(error), failed=True)
        yield from (found[spec.name] for spec in group)


def _lost(name: str, why: str, *, failed: bool) -> NotMeasured:
    """Note that an engine is not measured.

    Raises:
        LiteError: without it there is nothing to compare with.
    """
    if name in (REFERENCE.name, "the tower"):
        raise LiteError(f"{name}: {why}")
    return NotMeasured(name=name, why=why, failed=failed)


def groups(specs: Sequence[Spec], setting: Setting) -> list[list[Spec]]:
    """Divide engines into groups that fit into memory together, in order."""
    budget = _MEMORY_SHARE * free_memory(setting.device) - needed_bytes(REFERENCE, setting.model)
    divided: list[list[Spec]] = []
    room = 0.0
    for spec in specs:
        needed = needed_bytes(spec, setting.model)
        if needed > room:
            divided.append([])
            room = budget
        divided[-1].append(spec)
        room -= needed
    return divided


def needed_bytes(spec: Spec, model: Model) -> float:
    """Estimate what an engine's process holds."""
    shapes = model.tensor_shapes
    dense = sum(prod(shapes[name]) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    linears = sum(prod(shape) for name, shape in shapes.items() if "_proj" in name)
    return spec.library_bytes + dense * spec.dense_bytes + linears * spec.bytes_per_weight


def free_memory(device: str) -> float:
    """Return the free bytes of a GPU, or of the machine; 0 where it does not say."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(int(line.split()[1]) << 10)
    return 0.0
