"""The process of one engine: `python -m benchmarks.speed.peers.worker ORDER`, started by `measure`.

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

from benchmarks.speed.peers.engine import NotHere
from benchmarks.speed.weights import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.speed.peers.engine import Engine

CHECK_PROMPT: Final = 16
CHECK_TOKENS: Final = 8
"""What logits are compared on: a prompt, then so many tokens, the same for every engine."""

# Linux: what a process says of itself, and where a 5 resets its peak of resident memory.
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker is to run."""

    module: str
    form: str
    packages: Sequence[str]
    install: str
    model: Model
    max_seq_len: int  # tokens that a cache has to hold
    device: str
    threads: int
    folder: Path  # for files, which all workers share

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Order:
        """Read an order."""
        return cls(**{**content, "model": Model.from_json(content["model"]), "folder": Path(content["folder"])})


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
        self.model = order.model
        self.on_gpu = order.device != "cpu"
        self.engine: Engine = importlib.import_module(f"benchmarks.speed.peers.{order.module}").build(order)
        self.counts_peak = _forget_peak(on_gpu=self.on_gpu)

    def about(self) -> dict[str, Any]:
        """Say what was loaded."""
        names = ("computes_in", "weight_bytes", "cache_bytes_per_token", "fewest_layers", "fills", "last_token_only")
        return {"versions": self.versions, **{name: getattr(self.engine, name) for name in (*names, "load_s")}}

    def check(self, file: str) -> dict[str, Any]:
        """Write the logits after a prompt and after each of some tokens, [1 + CHECK_TOKENS, vocab_size]."""
        ids = self.model.token_ids(CHECK_PROMPT + CHECK_TOKENS)
        self.engine.start(self.model.num_layers)
        logits = [self.engine.read(ids[:CHECK_PROMPT]).tolist()]
        logits += [self.engine.read([token_id]).tolist() for token_id in ids[CHECK_PROMPT:]]
        np.save(file, np.array(logits, dtype=np.float32))
        return {}

    def round(self, num_layers: int, num_prompt_tokens: int, num_new_tokens: int, *, prefill: bool) -> dict[str, Any]:
        """Time a prefill, or fill the cache instead; then time tokens, one by one."""
        engine = self.engine
        engine.start(num_layers)
        prefill_s = None
        if prefill:
            ids = self.model.token_ids(num_prompt_tokens)
            prefill_s = _seconds(lambda: engine.first_token(ids))
        else:
            engine.fill(num_prompt_tokens)
        engine.next_token()  # untimed: the first after something else
        return {"prefill_s": prefill_s, "decode_s": [_seconds(engine.next_token) for _ in range(num_new_tokens)]}

    def peak(self) -> dict[str, Any]:
        """Say how much memory it has held since it was loaded, if that can be told from what loading took."""
        return {"bytes": _peak_bytes(on_gpu=self.on_gpu) if self.counts_peak else None}


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _forget_peak(*, on_gpu: bool) -> bool:
    """Begin to count anew, as drawing and rounding weights took more than running them does; say whether it worked."""
    if on_gpu:
        if (torch := sys.modules.get("torch")) is not None:
            torch.cuda.reset_peak_memory_stats()
        return torch is not None
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_bytes(*, on_gpu: bool) -> int:
    """Return the peak of torch's allocator on a GPU, else that of the resident memory."""
    if on_gpu:
        peak: int = sys.modules["torch"].cuda.max_memory_allocated()
        return peak
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _answers(load: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Load, then do what is asked for, as long as something is."""
    worker = load()
    yield worker.about()
    for line in sys.stdin:
        asked = json.loads(line)
        yield getattr(worker, asked.pop("do"))(**asked)


def serve(load: Callable[[], Any]) -> int:
    """Serve until stdin ends; return the exit status.

    Args:
        load: makes what has the methods that are asked for, and `about`.
    """
    # Libraries print: what goes to stdout is the answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        for found in _answers(load):
            answer(found)
    except NotHere as reason:
        answer({"unavailable": str(reason)})
        return 1
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the answer
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(serve(lambda: Worker(Order.from_json(json.loads(sys.argv[1])))))
