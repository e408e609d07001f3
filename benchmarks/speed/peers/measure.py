"""Start the workers, check what they compute, and time them, taking turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.speed.peers.engines import REFERENCE, ROOT, Spec
from benchmarks.speed.peers.weights import Model
from lite.bench.measure import quantiles
from lite.bench.results import Missing, Quantiles
from lite.errors import BackendUnavailable, LiteError

PROBE_TOKENS: Final = 64
MIN_NEW_TOKENS: Final = 4
"""Decoded in a round even where that takes longer than the limit."""
_SETTLE_S: Final = 0.3
"""Between two engines: threads that wait for more work go on spinning for a while (OpenMP's do for up to 0.2 s)."""
_MEMORY_SHARE: Final = 0.85
"""Of the memory that is free, how much engines may take together."""
_BANDWIDTH: Final = """\
import sys
from lite.bench.machine import streaming_read_bandwidth
print(streaming_read_bandwidth(sys.argv[1]))
"""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Times with fewer layers, which tell what a layer costs."""

    num_layers: int
    prefill: Quantiles | None
    decode: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine, measured."""

    name: str
    versions: dict[str, str]
    computes_in: str
    difference: float  # of its logits from the reference's, root mean square, relative
    weight_bytes: int  # read for a token
    cache_bytes: int  # read for the median token
    prefill: Quantiles | Missing  # seconds
    decode: Quantiles  # seconds a token
    shallow: Depth
    last_token_only: tuple[str, ...]  # see `Engine`
    load_s: float | None
    bandwidth: float  # bytes per second of a streaming read, while these engines were loaded
    peak_bytes: int | None  # of the worker's process (RSS) or of torch's allocator (VRAM), since it was loaded
    turns: tuple[str, ...]  # the engines it took turns with, itself included


@dataclass(frozen=True, slots=True, kw_only=True)
class NoRow:
    """One engine, not measured."""

    name: str
    why: str
    failed: bool  # or else it is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured."""

    rows: list[Row | NoRow]
    vision: Quantiles | None = None  # seconds of the tower for an image, if it was asked for


class Worker:
    """The process of an engine, or of the tower."""

    def __init__(self, command: Sequence[str], *, name: str, threads: int, folder: Path) -> None:
        """Start it, and wait until it has loaded what it runs.

        Raises:
            BackendUnavailable: it cannot run here.
            LiteError: it failed.
        """
        self._said = (folder / f"{name}.txt").open("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            encoding="utf-8",
            # A group of its own: Ctrl-C is for us alone, and who ends the group ends the writers of files in it, too.
            start_new_session=True,
        )
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Have something done, and wait for it.

        Raises:
            LiteError: the engine failed, or its process died.
        """
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
                self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise LiteError(f"its process ended with {ended}: {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "unavailable" in answer:
            raise BackendUnavailable(answer["unavailable"])
        if "error" in answer:
            raise LiteError(answer["error"])
        return answer

    def _last_line(self) -> str:
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        return lines[-1].strip() if lines else "it says nothing"

    def close(self) -> None:
        """End the process and those that it has started, whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONUNBUFFERED": "1"}


def start_engine(spec: Spec, setting: Setting, folder: Path) -> Worker:
    """Start a process and load an engine there.

    Raises:
        BackendUnavailable: it cannot run here.
        LiteError: it failed.
    """
    if spec.gpu_only and setting.device == "cpu":
        raise BackendUnavailable("needs a CUDA GPU")
    own = spec.environment == "project" or not setting.peers_python.exists()
    python = sys.executable if own else str(setting.peers_python)
    order = {
        "module": spec.module,
        "form": spec.form,
        "packages": spec.packages,
        "install": spec.install,
        "model": asdict(setting.model),
        "device": setting.device,
        "threads": setting.threads,
        "folder": str(folder),
    }
    command = [python, "-m", "benchmarks.speed.peers.worker", json.dumps(order)]
    return Worker(command, name=spec.name, threads=setting.threads, folder=folder)


class Tower:
    """The vision tower, whose time is the same for all engines; without an artifact there is none to time."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        """Load it, and run it once untimed.

        Raises:
            LiteError: it failed.
        """
        self.seconds: list[float] = []
        self.worker: Worker | None = None
        if setting.vision is not None:
            command = [sys.executable, "-m", "benchmarks.speed.peers.tower", str(setting.vision), setting.device]
            self.worker = Worker(command, name="tower", threads=setting.threads, folder=folder)

    def round(self) -> None:
        """Take one turn."""
        if self.worker is not None:
            time.sleep(_SETTLE_S)
            self.seconds.append(self.worker.ask("round")["seconds"])

    def close(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()


# -- One engine ------------------------------------------------------------------------------------------------------


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
        self.worker = start_engine(spec, setting, folder)
        try:
            self.difference = self._check(folder)
            self._probe()
        except BaseException:
            self.worker.close()
            raise
        self.prefill_s: dict[int, list[float]] = {depth: [] for depth in self.depths}
        self.decode_s: dict[int, list[float]] = {depth: [] for depth in self.depths}

    @property
    def depths(self) -> tuple[int, int]:
        """How many layers it is timed with."""
        return self.setting.model.num_layers, self.worker.about["fewest_layers"]

    def _check(self, folder: Path) -> float:
        file = folder / f"{self.spec.name}.npy"
        self.worker.ask("check", file=str(file))
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
        self.probe_tokens = min(PROBE_TOKENS, setting.num_prompt_tokens)
        probe = self.worker.ask("probe", num_tokens=self.probe_tokens)
        self.probe_s: float = probe["prefill_s"]
        self.prefills = self.probe_s * setting.num_prompt_tokens / self.probe_tokens <= setting.limit_s
        affordable = int(setting.limit_s / probe["decode_s"])
        self.num_new_tokens = min(setting.num_new_tokens, max(MIN_NEW_TOKENS, affordable))
        if not self.prefills and not self.worker.about["fills"]:
            todo = "its cache can only be filled by a prefill · give it a higher --limit-s"
            raise LiteError(f"got a prefill {self._slower()} · expected a faster one: {todo}")

    def _slower(self) -> str:
        rate = self.probe_tokens / self.probe_s
        return (
            f"slower than {self.setting.limit_s:g} s, probe of {self.probe_tokens} tokens: {self.probe_s:.1f} s, "
            f"{rate:.1f} tokens/s"
        )

    def round(self) -> None:
        """Take one turn: with all layers, and with the fewest."""
        time.sleep(_SETTLE_S)
        for depth in self.depths:
            timed = self.worker.ask(
                "round",
                num_layers=depth,
                num_prompt_tokens=self.setting.num_prompt_tokens,
                num_new_tokens=self.num_new_tokens,
                prefill=self.prefills,
            )
            self.decode_s[depth] += timed["decode_s"]
            if self.prefills:
                self.prefill_s[depth].append(timed["prefill_s"])

    def row(self, *, bandwidth: float, turns: tuple[str, ...]) -> Row:
        """Sum up."""
        about, (depth, shallow) = self.worker.about, self.depths
        # The token in the middle of those timed; one was decoded before them.
        context = self.setting.num_prompt_tokens + 1 + (self.num_new_tokens + 1) // 2
        return Row(
            name=self.spec.name,
            versions=about["versions"],
            computes_in=about["computes_in"],
            difference=self.difference,
            weight_bytes=about["weight_bytes"],
            cache_bytes=about["cache_bytes_per_token"] * context,
            prefill=quantiles(self.prefill_s[depth]) if self.prefills else Missing(why=self._slower()),
            decode=quantiles(self.decode_s[depth]),
            shallow=Depth(
                num_layers=shallow,
                prefill=quantiles(self.prefill_s[shallow]) if self.prefills else None,
                decode=quantiles(self.decode_s[shallow]),
            ),
            last_token_only=tuple(about["last_token_only"]),
            load_s=about["load_s"],
            bandwidth=bandwidth,
            peak_bytes=self.worker.ask("peak")["bytes"],
            turns=turns,
        )


# -- All of them -----------------------------------------------------------------------------------------------------


def measure(specs: Sequence[Spec], setting: Setting) -> Measured:
    """Measure engines, and first and always `REFERENCE`. One that fails does not stop the rest.

    Raises:
        LiteError: the reference or the tower fails, or the bandwidth cannot be measured.
    """
    others = [spec for spec in specs if spec != REFERENCE]
    rows: list[Row | NoRow] = []
    with (
        tempfile.TemporaryDirectory(prefix="peers-") as folder,
        # First: it stays loaded, and the memory that engines may have is what it leaves.
        contextlib.closing(Tower(setting, Path(folder))) as tower,
    ):
        for group in groups([REFERENCE, *others], setting):
            rows += _measure_group(group, setting, Path(folder), tower)
        return Measured(rows=rows, vision=quantiles(tower.seconds) if tower.seconds else None)


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
    dense = sum(int(np.prod(model.shapes[name])) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    linears = sum(int(np.prod(shape)) for name, shape in model.shapes.items() if "_proj" in name)
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


def _measure_group(group: Sequence[Spec], setting: Setting, folder: Path, tower: Tower) -> list[Row | NoRow]:
    runners: dict[str, Runner] = {}
    results: dict[str, Row | NoRow] = {}

    def fail(spec: Spec, error: LiteError) -> None:
        if spec == REFERENCE:
            raise LiteError(f"{spec.name}: {error}") from error
        results[spec.name] = NoRow(name=spec.name, why=str(error), failed=not isinstance(error, BackendUnavailable))
        if spec.name in runners:
            runners.pop(spec.name).worker.close()

    try:
        for spec in group:
            _say(f"loading {spec.name}")
            try:
                runners[spec.name] = Runner(spec, setting, folder)
            except LiteError as error:
                fail(spec, error)
        bandwidth = measured_bandwidth(setting)
        turns = tuple(runners)
        for number in range(setting.rounds):
            tower.round()
            for runner in list(runners.values()):
                _say(f"round {number + 1} of {setting.rounds}: {runner.spec.name}")
                try:
                    runner.round()
                except LiteError as error:
                    fail(runner.spec, error)
        for runner in list(runners.values()):
            try:
                results[runner.spec.name] = runner.row(bandwidth=bandwidth, turns=turns)
            except LiteError as error:
                fail(runner.spec, error)
    finally:
        for runner in runners.values():
            runner.worker.close()
    return [results[spec.name] for spec in group]


def measured_bandwidth(setting: Setting) -> float:
    """Measure a streaming read with as many threads as the engines have, in a process of its own.

    Raises:
        LiteError: it failed.
    """
    time.sleep(_SETTLE_S)
    command = [sys.executable, "-c", _BANDWIDTH, setting.device]
    done = subprocess.run(
        command, cwd=ROOT, env=_environment(setting.threads), capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise LiteError(f"the memory's bandwidth: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
    return float(done.stdout)


def _say(text: str) -> None:
    """Say on stderr what is going on: the table comes at the end."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
