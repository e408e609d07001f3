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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.speed.peers.engine import Unavailable
from benchmarks.speed.peers.weights import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.speed.peers.engine import Engine

CHECK_PROMPT: Final = 16
CHECK_TOKENS: Final = 8
"""What logits are compared on: a prompt, then so many tokens, the same for every engine."""


# Linux: what a process says of itself, and where a 5 resets its peak of resident memory.
_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")


class Worker:
    """One engine, and what it can be asked for."""

    def __init__(self, order: dict[str, Any]) -> None:
        """Load the engine.

        Raises:
            Unavailable: a package is missing, or the machine is not one for it.
        """
        self.versions = {package: _version(package) for package in order["packages"]}
        if missing := [package for package, version in self.versions.items() if version is None]:
            raise Unavailable(f"{' and '.join(missing)} not installed: {order['install']}")
        self.model = Model(**order["model"])
        self.on_gpu = order["device"] != "cpu"
        module = importlib.import_module(f"benchmarks.speed.peers.{order['module']}")
        self.engine: Engine = module.build(
            order["form"], self.model, device=order["device"], threads=order["threads"], folder=Path(order["folder"])
        )
        self.counts_peak = _forget_peak(on_gpu=self.on_gpu)

    def about(self) -> dict[str, Any]:
        """Say what was loaded."""
        engine = self.engine
        return {
            "versions": self.versions,
            "computes_in": engine.computes_in,
            "weight_bytes": engine.weight_bytes,
            "cache_bytes_per_token": engine.cache_bytes_per_token,
            "fewest_layers": engine.fewest_layers,
            "fills": engine.fills,
            "last_token_only": engine.last_token_only,
            "load_s": engine.load_s,
        }

    def check(self, file: str) -> dict[str, Any]:
        """Write the logits after a prompt and after each of some tokens, [1 + CHECK_TOKENS, vocab_size]."""
        ids = self.model.token_ids(CHECK_PROMPT + CHECK_TOKENS)
        self.engine.start(self.model.num_layers)
        logits = [self.engine.prefill(ids[:CHECK_PROMPT]).tolist()]
        logits += [self.engine.decode_one_token(token_id).tolist() for token_id in ids[CHECK_PROMPT:]]
        np.save(file, np.array(logits, dtype=np.float32))
        return {}

    def probe(self, num_tokens: int) -> dict[str, Any]:
        """Time a short prefill and one token: how long will the rest take?"""
        timed = self.round(self.model.num_layers, num_tokens, 1, prefill=True)
        return {"prefill_s": timed["prefill_s"], "decode_s": timed["decode_s"][0]}

    def round(self, num_layers: int, num_prompt_tokens: int, num_new_tokens: int, *, prefill: bool) -> dict[str, Any]:
        """Time a prefill, or fill the cache instead; then time tokens, one by one."""
        engine = self.engine
        engine.start(num_layers)
        prefill_s, newest = None, 0
        if prefill:
            ids = self.model.token_ids(num_prompt_tokens)
            started = time.perf_counter()
            # Reading the token waits for the engine, so the times are true.
            newest = int(engine.prefill(ids).argmax())
            prefill_s = time.perf_counter() - started
        else:
            engine.fill(num_prompt_tokens)
        newest = int(engine.decode_one_token(newest).argmax())  # untimed: the first after something else
        decode_s = []
        for _ in range(num_new_tokens):
            started = time.perf_counter()
            newest = int(engine.decode_one_token(newest).argmax())
            decode_s.append(time.perf_counter() - started)
        return {"prefill_s": prefill_s, "decode_s": decode_s}

    def peak(self) -> dict[str, Any]:
        """Say how much memory it has held since it was loaded, if that can be told from what loading took."""
        return {"bytes": _peak_bytes(on_gpu=self.on_gpu) if self.counts_peak else None}


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
    except Unavailable as reason:
        answer({"unavailable": str(reason)})
        return 1
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the answer
        answer({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(serve(lambda: Worker(json.loads(sys.argv[1]))))
