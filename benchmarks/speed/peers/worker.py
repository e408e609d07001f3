"""The process of one engine: `python -m benchmarks.speed.peers.worker ORDER`, started by `process`.

The order is a JSON object, the argument. After that each line on stdin asks for something, and each line on stdout
answers, both JSON objects. An answer with "unavailable" or "error" is the last.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CHECK_PROMPT: Final = 16
CHECK_TOKENS: Final = 8
"""What logits are compared on: a prompt, then so many tokens, the same for every engine."""

# Linux: what a process says of itself, and where a 5 resets its peak of resident memory.
_STATUS: Final = Path("/proc/self/status")
# What each processor has spent, in microjoules.
_COUNTERS: Final = sorted(Path("/sys/class/powercap").glob("*-rapl:?/energy_uj"))
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")


class NotHere(Exception):  # noqa: N818 - the name says what happened; "Error" would add nothing
    """An engine that this machine cannot run; the message says why, in a few words.

    Not a `LiteError`: the peers' environment does not have all that `lite` imports.
    """


class Engine:
    """One model in one form, with a cache for one sequence."""

    computes_in: str
    weight_bytes: int  # read for each token: linears, norms and head, but no embedding table
    cache_bytes_per_token: int

    def reset(self) -> None:
        """Empty the cache."""
        raise NotImplementedError

    def read(self, input_ids: list[int]) -> Any:  # noqa: ANN401 - see Returns
        """Append tokens to the cache: a prompt to an empty one, else a single token.

        Returns:
            The logits of the next, [vocab_size], in any array that has `argmax` and `tolist`.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker is to run."""

    module: str
    form: str
    packages: Sequence[str]
    install: str
    folder: Path  # of the artifacts at one depth, `dense` and `int4`, and of files that workers share
    vocab_size: int
    max_seq_len: int  # tokens that a cache has to hold
    device: str
    threads: int


class Worker:
    """One engine, and what it can be asked for."""

    def __init__(self, order: Order) -> None:
        """Load the engine.

        Raises:
            NotHere: a package is missing, or the machine is not one for it.
        """
        self.versions = {package: _version(package) for package in order.packages}
        if missing := [package for package, version in self.versions.items() if version is None]:
            raise NotHere(f"{' and '.join(missing)} not installed: {order.install}")
        self.device, self.vocab_size = order.device, order.vocab_size
        self.engine: Engine = importlib.import_module(f"benchmarks.speed.peers.{order.module}").build(order)
        self.counts_peak = self._forget_peak()

    def about(self) -> dict[str, Any]:
        """Say what was loaded."""
        names = ("computes_in", "weight_bytes", "cache_bytes_per_token")
        return {"versions": self.versions, **{name: getattr(self.engine, name) for name in names}}

    def check(self) -> dict[str, Any]:
        """Return the logits after a prompt and after each of some tokens, [1 + CHECK_TOKENS, vocab_size]."""
        ids = self._token_ids(CHECK_PROMPT + CHECK_TOKENS)
        self.engine.reset()
        logits = [self.engine.read(ids[:CHECK_PROMPT]).tolist()]
        logits += [self.engine.read([token_id]).tolist() for token_id in ids[CHECK_PROMPT:]]
        return {"logits": logits}

    def bandwidth(self) -> dict[str, Any]:
        """Measure a streaming read."""
        from lite.bench.machine import streaming_read_bandwidth

        return {"bytes_per_s": streaming_read_bandwidth(self.device)}

    def round(self, num_prompt_tokens: int, num_new_tokens: int) -> dict[str, Any]:
        """Time a prompt, then tokens, one by one: the most probable ones, so that the host waits for each."""
        self.engine.reset()
        newest = self._token_ids(num_prompt_tokens)
        seconds, before = [], joules()
        for _ in range(2 + num_new_tokens):  # the first after the prompt does not count
            started = time.perf_counter()
            newest = [int(self.engine.read(newest).argmax())]
            seconds.append(time.perf_counter() - started)
        after = joules()
        watts = []
        if before is not None and after is not None and after > before:  # counters begin anew at times
            watts = [(after - before) / sum(seconds)]
        return {"prefill": seconds[:1], "decode": seconds[2:], "watts": watts}

    def peak(self) -> dict[str, Any]:
        """Say how much memory it has held since it was loaded, if that can be told from what loading took."""
        if not self.counts_peak:
            return {"bytes": None}
        if self.device != "cpu":
            return {"bytes": sys.modules["torch"].cuda.max_memory_allocated()}
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return {"bytes": next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))}

    def _token_ids(self, count: int) -> list[int]:
        drawn: list[int] = np.random.default_rng(0).integers(self.vocab_size, size=count).tolist()
        return drawn

    def _forget_peak(self) -> bool:
        """Begin to count anew, as loading takes more than running; say whether it worked."""
        if self.device != "cpu":
            if (torch := sys.modules.get("torch")) is not None:
                torch.cuda.reset_peak_memory_stats()
            return torch is not None
        try:
            _CLEAR_REFS.write_text("5", encoding="ascii")
        except OSError:
            return False
        return True


def joules() -> float | None:
    """Return what the processors have spent since some time; None where that cannot be read."""
    try:
        return sum(int(file.read_text(encoding="ascii")) for file in _COUNTERS) / 1e6 if _COUNTERS else None
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _answers(order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Load, then do what is asked for, as long as something is."""
    worker = Worker(Order(**{**order, "folder": Path(order["folder"])}))
    yield worker.about()
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        yield getattr(worker if hasattr(worker, what) else worker.engine, what)(**asked)


def main() -> int:
    """Serve until stdin ends; return the exit status."""
    # Libraries print: what goes to stdout is the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        for found in _answers(json.loads(sys.argv[1])):
            answer(found)
    except NotHere as reason:
        answer({"unavailable": str(reason)})
        return 1
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the answer
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    # As engines import it: NotHere is one class then.
    sys.exit(importlib.import_module("benchmarks.speed.peers.worker").main())
