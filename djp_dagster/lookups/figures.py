"""`Figures`: what a look-up has done, for plots: calls, keys, latencies, retries, waits, the breaker."""

import threading
from collections import deque

_KEPT = 4096


class Figures:
    """Counts since they were last taken, and the latencies of the last calls. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._latencies: deque[float] = deque(maxlen=_KEPT)
        self.breaker_open = False

    def add(self, name: str, number: float = 1) -> None:
        """Add to a count."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + number

    def called(self, seconds: float) -> None:
        """A call has taken so long."""
        with self._lock:
            self._counts["calls"] = self._counts.get("calls", 0) + 1
            self._latencies.append(seconds)

    def take(self) -> tuple[dict[str, int], dict[str, float]]:
        """Counts since the last time, and measures as of now.

        Counts: ``calls, keys`` (asked for), ``fetched`` (keys sent to the service), ``not_found, retries, failures,
        refused`` (by the open breaker), ``cache_hits``. Measures: ``p50_seconds, p99_seconds`` of the last calls,
        ``keys_per_call``, ``wait_seconds`` (for a place, or the rate), ``breaker_open``.
        """
        with self._lock:
            counts, self._counts = self._counts, {}
            latencies = sorted(self._latencies)
        waited = counts.pop("wait_seconds", 0.0)
        measures = {"breaker_open": float(self.breaker_open), "wait_seconds": round(waited, 6)}
        if latencies:
            measures["p50_seconds"] = round(latencies[len(latencies) // 2], 6)
            measures["p99_seconds"] = round(latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)], 6)
        if counts.get("calls"):
            measures["keys_per_call"] = round(counts.get("fetched", 0) / counts["calls"], 3)
        return {name: int(value) for name, value in counts.items()}, measures
