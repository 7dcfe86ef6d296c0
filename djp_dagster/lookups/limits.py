"""`RateLimit`: no more calls in any second than agreed."""

import math
import threading
import time
from collections.abc import Callable


class RateLimit:
    """Lets so many calls begin in any second, and makes the others wait for their turn.

    The window is pyrate-limiter's; the waiting is not: its own books the time it meant to sleep, not the time it did,
    and it starts a thread.

    Args:
        per_second: of that, what is whole; below 1: one call in so many seconds as it takes.
        pause: waits for so many seconds, and says whether to stop waiting.
        clock: seconds, for tests.
    """

    def __init__(
        self, per_second: float, pause: Callable[[float], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from pyrate_limiter import InMemoryBucket, Rate

        whole = math.floor(per_second)
        rate = Rate(whole, 1000) if whole >= 1 else Rate(1, math.ceil(1000 / per_second))
        self._bucket, self._pause, self._clock = InMemoryBucket([rate]), pause, clock
        self._turn = threading.Lock()

    def wait(self) -> None:
        """Wait until a call may begin; one waits for time to pass, the others for that one."""
        with self._turn:
            while (left_s := self._left_s()) > 0:
                if self._pause(left_s):
                    return

    def _left_s(self) -> float:
        """Take a place, or tell how long there is none."""
        from pyrate_limiter import RateItem

        now_ms = math.floor(self._clock() * 1000)
        self._bucket.leak(now_ms)
        item = RateItem("call", now_ms)
        if self._bucket.put(item):
            return 0.0
        waiting_ms = self._bucket.waiting(item)
        assert isinstance(waiting_ms, int)
        return (waiting_ms + 1) / 1000  # one whose millisecond has only begun lies in the window still
