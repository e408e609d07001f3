"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lite.memory.process import rss_bytes

if TYPE_CHECKING:
    from lite.serve.logs import Record
    from lite.session.session import Session

_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name, registry = "llava_rad_lite", self.registry
        self._requests = Counter(f"{name}_requests", "Requests", ["route", "status"], registry=registry)
        by_model = "Requests for findings"
        self._by_model = Counter(f"{name}_model_requests", by_model, ["model"], registry=registry)
        self._failures = Counter(f"{name}_failures", "Requests that failed", ["kind"], registry=registry)
        self._tokens = Counter(f"{name}_tokens", "Drafted tokens", registry=registry)
        self._seconds = Histogram(f"{name}_request_seconds", "Requests", ["route"], buckets=_SECONDS, registry=registry)
        self._ttft = Histogram(
            f"{name}_time_to_first_token_seconds",
            "From the first byte of a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge(f"{name}_queue_length", "Requests that wait for a row", registry=registry)
        self._busy = Gauge(f"{name}_rows_busy", "Rows that have a study", registry=registry)
        rows = "Rows that there are"
        self._rows = Gauge(f"{name}_rows", rows, registry=registry)
        memory = "Memory that the process has resident"
        self._rss = Gauge(f"{name}_resident_memory_bytes", memory, registry=registry)

    def count(self, record: Record) -> None:
        """Count a request that has ended."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.seconds)
        if record.model is not None:
            self._by_model.labels(record.model).inc()
        if record.failure is not None:
            self._failures.labels(record.failure).inc()
        if record.tokens:
            self._tokens.inc(record.tokens)
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)

    def text(self, session: Session[Any, Any] | None) -> bytes:
        """Return all of it in Prometheus' format."""
        if session is not None:
            self._waiting.set(len(session.waiting))
            self._busy.set(len(session.loop.rows.taken()))
            self._rows.set(session.loop.num_rows)
        self._rss.set(rss_bytes() or 0)
        return generate_latest(self.registry)
