"""`Breaker`: after so many failures in a row nobody calls, until one may try.

Own code, because the libraries there are hold a lock for as long as a call takes, so that calls wait for each other.
"""

import threading
import time
from collections.abc import Callable

from djp_dagster.errors import LookupUnavailableError


class Breaker:
    """Closed: calls pass. Open: they fail at once. Half open: one passes, and decides.

    Args:
        name: of what is called, for errors.
        failures: so many in a row open it.
        reset_s: after so long one call may try.
        clock: seconds, for tests.
    """

    def __init__(
        self, name: str, *, failures: int, reset_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._limit, self._reset_s, self._clock = name, failures, reset_s, clock
        self._lock = threading.Lock()
        self._failures = 0
        self._opened_at: float | None = None
        self._trying_since: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once."""
        return self._opened_at is not None

    def enter(self) -> None:
        """Ask to make a call; say how it went with `succeeded` or `failed`.

        Raises:
            LookupUnavailableError: it is open.
        """
        with self._lock:
            if self._opened_at is None:
                return
            now = self._clock()
            left_s = self._opened_at + self._reset_s - now
            # Whoever tries and never says how it went must not keep the others out for ever.
            tried_lately = self._trying_since is not None and now - self._trying_since < self._reset_s
            if left_s > 0 or tried_lately:
                raise LookupUnavailableError(
                    f"{self._name} has failed {self._failures} times in a row and is not called; it is tried again in "
                    f"{max(left_s, 0):.1f} s",
                    name=self._name,
                    retry_after_s=max(left_s, 0.05),
                )
            self._trying_since = now

    def succeeded(self) -> None:
        """The call was answered."""
        with self._lock:
            self._failures, self._opened_at, self._trying_since = 0, None, None

    def failed(self) -> bool:
        """The call was not; whether that has opened it."""
        with self._lock:
            self._failures += 1
            opens = self._trying_since is not None or (self._opened_at is None and self._failures >= self._limit)
            if opens:
                self._opened_at, self._trying_since = self._clock(), None
            return opens
