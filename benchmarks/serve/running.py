"""`python -m lite serve` in a process of its own, and what it and the system say of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lite.errors import LiteError

ROWS: Final = 8
PATIENCE_S: Final = 60.0


class Running:
    """A server of an artifact, ready; leaving the block ends it."""

    def __init__(self, artifact: Path, *options: str, key: str | None = None) -> None:
        """Start it, and wait for it.

        Raises:
            LiteError: it has ended instead.
        """
        self.headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        program = [sys.executable, "-m", "lite", "serve", str(artifact), "--port", "0", "--rows", str(ROWS), *options]
        started = time.perf_counter()
        self.process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.url = (self.process.stdout.readline() if self.process.stdout else "").strip()
        if not self.url:
            self.process.wait()
            raise LiteError(
                f"got an end of the server, {self.log!r} · expected its address · start it by hand: {program}"
            )
        self.get("/health")
        self.ready_s = time.perf_counter() - started

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)  # nothing happens if it has ended
        try:
            self.process.communicate(timeout=PATIENCE_S)
        finally:
            self.process.kill()
            self._log.close()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        """What it has written on stderr."""
        return os.pread(self._log.fileno(), 1 << 30, 0).decode("utf-8", "replace")

    def client(self) -> httpx.AsyncClient:
        """Return a client with its key, and as many connections as are asked for."""
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, limits=limits, timeout=5 * PATIENCE_S)

    def get(self, path: str) -> str:
        """Return what it answers.

        Raises:
            httpx.HTTPError: it refuses, or does not answer.
        """
        return httpx.get(self.url + path, headers=self.headers, timeout=PATIENCE_S).raise_for_status().text

    def counts(self, name: str) -> dict[str, float]:
        """Return the values of a metric by its labels, which are "" where there are none."""
        families = text_string_to_metric_families(self.get("/metrics"))
        samples = [
            sample for family in families for sample in family.samples if sample.name == f"llava_rad_lite_{name}"
        ]
        return {",".join(sample.labels.values()): sample.value for sample in samples}

    def idle_after_s(self) -> float:
        """Ask until no request has a row or waits for one; return when that was asked first. Infinity: too late."""
        started = asked = time.perf_counter()
        while any(self.counts(name)[""] for name in ("rows_busy", "queue_length")):
            if asked - started > PATIENCE_S:
                return float("inf")
            time.sleep(0.01)
            asked = time.perf_counter()
        return asked - started

    def proc(self, name: str) -> str:
        """Return a file of the system about the process."""
        return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="utf-8", errors="replace")

    def memory(self, key: str = "VmRSS") -> int:
        """Return what it has resident, or with VmHWM the most that it had, in bytes."""
        found = re.search(rf"^{key}:\s+(\d+) kB$", self.proc("status"), re.MULTILINE)
        return 1024 * int(found[1] if found else 0)
