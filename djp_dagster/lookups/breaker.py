"""`Breaker`: after so many failures in a row nobody calls, until one may try; nor while the service asks for quiet.

Own code, because the libraries there are hold a lock for as long as a call takes, so that calls wait for each other.
"""

import threading
import time
from collections.abc import Callable

from djp_dagster.errors import LookupUnavailableError

_SOON_S = 0.05


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
        self._quiet_until: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether calls fail at once because others have failed."""
        return self._opened_at is not None

    def check(self) -> None:
        """Whether it is worth waiting for a place: a call would not be turned away now.

        Raises:
            LookupUnavailableError: it would.
        """
        with self._lock:
            self._require_passable(self._clock())

    def enter(self) -> None:
        """Ask to make a call; say how it went with `succeeded`, `failed` or `interrupted`.

        Raises:
            LookupUnavailableError: it is open, or the service wants quiet.
        """
        with self._lock:
            now = self._clock()
            self._require_passable(now)
            if self._opened_at is not None:
                self._trying_since = now

    def _require_passable(self, now: float) -> None:
        if self._quiet_until is not None and now < self._quiet_until:
            raise self._refusal(f"{self._name} has asked not to be called", self._quiet_until - now)
        if self._opened_at is None:
            return
        left_s = self._opened_at + self._reset_s - now
        # Whoever tries and never says how it went must not keep the others out for ever.
        tried_lately = self._trying_since is not None and now - self._trying_since < self._reset_s
        if left_s > 0 or tried_lately:
            raise self._refusal(f"{self._name} has failed {self._failures} times in a row and is not called", left_s)

    def _refusal(self, what: str, left_s: float) -> LookupUnavailableError:
        return LookupUnavailableError(
            f"{what}; it may be again in {max(left_s, 0):.1f} s",
            name=self._name,
            retry_after_s=max(left_s, _SOON_S),
            sent=False,
        )

    def succeeded(self) -> None:
        """The call was answered."""
        with self._lock:
            self._failures, self._opened_at, self._trying_since = 0, None, None

    def failed(self, quiet_s: float = 0.0) -> bool:
        """The call was not, and the service has asked to be left alone for so long; whether that has opened it."""
        with self._lock:
            now = self._clock()
            if quiet_s > 0:
                self._quiet_until = max(self._quiet_until or 0.0, now + quiet_s)
            self._failures += 1
            opens = self._trying_since is not None or (self._opened_at is None and self._failures >= self._limit)
            if opens:
                self._opened_at, self._trying_since = now, None
            return opens

    def interrupted(self) -> None:
        """Nobody knows how the call went; whoever is next may try."""
        with self._lock:
            self._trying_since = None
