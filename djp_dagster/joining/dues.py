"""When open keys are due: those committed before, read from the index a page at a time, and those of this batch."""

import heapq
from collections.abc import Callable, Iterator

from djp_dagster.joining.entries import indexed

Due = tuple[int, str | int]


class Dues:
    """Due times of open keys, earliest first.

    Args:
        stored: the committed index, in order.
        holds: whether a key is still open and due then; what is not is passed over.
    """

    def __init__(self, stored: Iterator[bytes], holds: Callable[[Due], bool]) -> None:
        self._stored, self._holds = stored, holds
        self._head: Due | None = None
        self._fresh: list[Due] = []
        self._ended = False

    def add(self, due: int, key: str | int) -> None:
        """One more, of this batch."""
        # Keys may be strings and integers, which do not compare.
        heapq.heappush(self._fresh, _Ordered((due, key)))

    def earliest(self) -> Due | None:
        """The first that still holds."""
        while self._head is None and not self._ended:
            encoded = next(self._stored, None)
            if encoded is None:
                self._ended = True
            elif self._holds(found := indexed(encoded)):
                self._head = found
        while self._fresh and not self._holds(self._fresh[0]):
            heapq.heappop(self._fresh)
        if self._fresh and (self._head is None or self._fresh[0][0] < self._head[0]):
            return self._fresh[0]
        return self._head

    def pop_before(self, limit: int, most: int) -> list[Due]:
        """Take at most so many that are due before ``limit``, earliest first."""
        taken: list[Due] = []
        while len(taken) < most and (first := self.earliest()) is not None and first[0] < limit:
            if first is self._head:
                self._head = None
            else:
                heapq.heappop(self._fresh)
            taken.append(tuple(first))  # type: ignore[arg-type]
        return taken


class _Ordered(tuple):  # type: ignore[type-arg]
    """A due time and its key, compared by time, then by the key's text."""

    __slots__ = ()

    def __lt__(self, other: tuple) -> bool:  # type: ignore[type-arg]
        return (self[0], str(self[1])) < (other[0], str(other[1]))
