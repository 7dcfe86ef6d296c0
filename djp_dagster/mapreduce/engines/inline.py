"""`Inline`: this process, one task after the other."""

import traceback
from collections import deque
from collections.abc import Sequence

from djp_dagster.mapreduce.engines.base import Alive, Attempt, Done, News, Raised, Setup, perform, place_of
from djp_dagster.mapreduce.place import WorkPlace


class Inline:
    """Tasks run in this process, one at a time. The fastest for little input; nothing survives if a mapper crashes.

    See `Engine`.
    """

    name = "inline"
    slots = 1
    can_kill = False
    shares_disks = True

    def __init__(self) -> None:
        self._setup: Setup | None = None
        self._place: WorkPlace | None = None
        self._waiting: deque[Attempt] = deque()

    def start(self, setup: Setup) -> None:
        """See `Engine`."""
        self._setup, self._place = setup, place_of(setup)

    def submit(self, attempt: Attempt) -> None:
        """See `Engine`."""
        self._waiting.append(attempt)

    def news(self, timeout_s: float) -> Sequence[News]:
        """See `Engine`. Does one attempt."""
        if not self._waiting:
            return []
        assert self._setup is not None
        assert self._place is not None
        attempt = self._waiting.popleft()
        records = 0

        def beat(more: int) -> None:
            nonlocal records
            records += more

        try:
            answer = perform(self._setup, self._place, attempt, beat)
        except Exception as error:  # noqa: BLE001  told to whoever decides whether it is tried again
            return [Raised(attempt, error, traceback.format_exc())]
        return [Alive(attempt, records), Done(attempt, answer)]

    def cancel(self, attempt: Attempt) -> None:
        """See `Engine`."""

    def close(self) -> None:
        """See `Engine`."""
        self._waiting.clear()
