"""`Figures`: what a look-up has done, for plots: calls, keys, latencies, retries, waits, the breaker."""

import threading
from collections import deque
from collections.abc import Callable

_KEPT = 4096


class Figures:
    """Counts since they were last taken, and the latencies of the last calls. Safe to share between threads.

    Args:
        is_open: whether the breaker is.
    """

    def __init__(self, is_open: Callable[[], bool] = lambda: False) -> None:
        self._is_open = is_open
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}
        self._latencies: deque[float] = deque(maxlen=_KEPT)
        self._calls_with_keys = 0

    def add(self, name: str, number: float = 1) -> None:
        """Add to a count."""
        with self._lock:
            self._add(name, number)

    def _add(self, name: str, number: float) -> None:
        self._counts[name] = self._counts.get(name, 0) + number

    def called(self, seconds: float, keys: int) -> None:
        """A call has taken so long, and asked for so many keys; 0 if it was no question."""
        with self._lock:
            self._add("calls", 1)
            self._latencies.append(seconds)
            if keys:
                self._add("fetched", keys)
                self._calls_with_keys += 1

    def take(self) -> tuple[dict[str, int], dict[str, float]]:
        """Counts since the last time, and measures as of now.

        Counts: ``calls`` (each try is one), ``keys`` (that handlers asked for), ``fetched`` (keys sent to the service,
        at each try), ``not_found, retries, failures, refused`` (by the open breaker, or while the service wants quiet),
        ``breaker_opened``, ``cache_hits``. Measures: ``p50_seconds, p99_seconds`` of the last calls, ``keys_per_call``,
        ``wait_seconds`` (for a place, or the rate), ``breaker_open``.
        """
        with self._lock:
            counts, self._counts = self._counts, {}
            with_keys, self._calls_with_keys = self._calls_with_keys, 0
            latencies = sorted(self._latencies)
        waited = counts.pop("wait_seconds", 0.0)
        measures = {"breaker_open": float(self._is_open()), "wait_seconds": round(waited, 6)}
        if latencies:
            measures["p50_seconds"] = round(latencies[len(latencies) // 2], 6)
            measures["p99_seconds"] = round(latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)], 6)
        if with_keys:
            measures["keys_per_call"] = round(counts.get("fetched", 0) / with_keys, 3)
        return {name: int(value) for name, value in counts.items()}, measures
