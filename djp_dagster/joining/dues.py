"""When open keys are due: those committed before, read from the index a page at a time, and those of this batch."""

import heapq
from collections.abc import Callable, Iterator

from djp_dagster.joining.entries import NEVER, due_key, indexed

Due = tuple[int, str | int]


class Dues:
    """Due times of open keys, earliest first; those of one time in the order of keys, whichever batch they came with.

    Args:
        stored: the committed index, in order.
        holds: whether a key is still open and due then; what is not is passed over.
    """

    def __init__(self, stored: Iterator[bytes], holds: Callable[[Due], bool]) -> None:
        self._stored, self._holds = stored, holds
        self._head: bytes | None = None
        self._fresh: list[bytes] = []
        self._ended = False

    def add(self, due: int, key: str | int) -> None:
        """One more, of this batch."""
        if due != NEVER:
            heapq.heappush(self._fresh, due_key(due, key))

    def earliest(self) -> Due | None:
        """The first that still holds."""
        first = self._first()
        return None if first is None else indexed(first)

    def _first(self) -> bytes | None:
        while self._head is None and not self._ended:
            encoded = next(self._stored, None)
            if encoded is None:
                self._ended = True
            elif self._holds(indexed(encoded)):
                self._head = encoded
        while self._fresh and not self._holds(indexed(self._fresh[0])):
            heapq.heappop(self._fresh)
        if self._fresh and (self._head is None or self._fresh[0] < self._head):
            return self._fresh[0]
        return self._head

    def pop_before(self, limit: int, most: int) -> list[Due]:
        """Take at most so many that are due before ``limit``, earliest first."""
        taken: list[Due] = []
        while len(taken) < most and (first := self._first()) is not None and (due := indexed(first))[0] < limit:
            if first is self._head:
                self._head = None
            else:
                heapq.heappop(self._fresh)
            taken.append(due)
        return taken
