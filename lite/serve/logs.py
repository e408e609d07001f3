"""What a server writes of each request: one JSON object a line on stderr. No text, film, name or id of a client's."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclasses.dataclass(slots=True, kw_only=True)
class Record:
    """What is known of one request."""

    route: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    started: float = dataclasses.field(default_factory=time.perf_counter)
    status: int | None = None
    model: str | None = None  # one of those that there are
    tokens: int | None = None  # drafted
    queued_s: float | None = None
    ttft_s: float | None = None  # from the first byte of the request to the first token
    failure: str | None = None  # what kind; None: none
    fault: str | None = None  # where the program failed
    texts: dict[str, Any] = dataclasses.field(default_factory=dict)  # only for whoever logs them

    def fail(self, kind: str, fault: BaseException | None = None) -> None:
        """Note what went wrong, and where the program is at fault; what is noted first counts."""
        self.failure = self.failure or kind
        if fault is not None:
            frame = traceback.extract_tb(fault.__traceback__)[-1]
            self.fault = f"{type(fault).__name__} in {frame.name}, {Path(frame.filename).name}:{frame.lineno}"

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.perf_counter() - self.started


class Log:
    """Lines on stderr as it is now: while films are decoded, what is written to the stream itself may be held back."""

    def __init__(self, *, with_texts: bool) -> None:
        self._with_texts = with_texts
        self._lock = threading.Lock()
        try:
            self._file = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
        except (OSError, ValueError, AttributeError):  # no file, such as a test's
            self._file = sys.stderr  # type: ignore[assignment]

    def close(self) -> None:
        """Write no more."""
        if self._file is not sys.stderr:
            self._file.close()

    def write(self, record: Record) -> None:
        """Write what is known of a request that has ended."""
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": record.id,
            "route": record.route,
            "status": record.status,
            "seconds": round(record.seconds, 4),
        }
        for name in ("model", "tokens", "queued_s", "ttft_s", "failure", "fault"):
            if (value := getattr(record, name)) is not None:
                line[name] = round(value, 4) if isinstance(value, float) else value
        if self._with_texts:
            line |= record.texts
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
