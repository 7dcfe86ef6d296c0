"""`TaskState`: a task's state as one batch sees and changes it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from djp_dagster.errors import InvalidValueError
from djp_dagster.state.file import Change
from djp_dagster.state.keys import StateKey, decode_key, encode_key, key_range
from djp_dagster.streams.records import decode_value, encode_value

_MAX_READ = 100_000
_ABSENT = object()


class Stored(Protocol):
    """What lies below: what was committed."""

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that exist."""

    def items(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Keys in the range and their values, in order."""


class TaskState:
    """A task's state as one batch sees and changes it; nothing is kept unless the batch commits.

    Keys are strings, integers, bytes, or tuples of these (``1`` and ``"1"`` are different keys); values are what
    MessagePack can say. A value read and changed in place is kept only if it is set again. Changes are held in memory
    until the batch commits, then written at once.

    Example:
        >>> import djp_dagster as djp
        >>> clicks = djp.Topic("clicks", key="user")
        >>> @djp.consumer(topic=clicks, stateful=True)
        ... def count(batch):
        ...     for click in batch:
        ...         key = (click.data["user"], click.data["page"])
        ...         batch.state.set(key, batch.state.get(key, 0) + 1)
        >>> run = djp.testing.run_consumer(count, [clicks.event(user="u1", page=page) for page in ("/a", "/b", "/a")])
        >>> run.state
        {('u1', '/a'): 2, ('u1', '/b'): 1}
    """

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._changed: dict[bytes, bytes | None] = {}
        self._read: dict[bytes, bytes | None] = {}
        self._journal: list[tuple[bytes, Any]] | None = None

    def get(self, key: StateKey, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        encoded = encode_key(key)
        raw: Any = self._changed.get(encoded, _ABSENT)
        if raw is _ABSENT:
            raw = self._read.get(encoded, _ABSENT)
            if raw is _ABSENT:
                raw = self._stored.get(encoded)
                self._keep(encoded, raw)
        return default if raw is None else decode_value(raw)

    def _keep(self, encoded: bytes, raw: bytes | None) -> None:
        if len(self._read) >= _MAX_READ:
            self._read.clear()
        self._read[encoded] = raw

    def get_many(self, keys: Iterable[StateKey]) -> dict[StateKey, Any]:
        """The values of those keys that exist, with one look-up for all of them.

        A batch that will `get` many keys one by one is faster if it asks for all of them first.
        """
        encoded = {encode_key(key): key for key in keys}
        changed, read = self._changed, self._read
        missing = [one for one in encoded if one not in changed and one not in read]
        fresh: dict[bytes, bytes | None] = dict.fromkeys(missing)
        if missing:
            fresh.update(self._stored.get_many(missing))
        found: dict[StateKey, Any] = {}
        for one, key in encoded.items():
            raw = changed[one] if one in changed else fresh[one] if one in fresh else read[one]
            if raw is not None:
                found[key] = decode_value(raw)
        if len(read) + len(fresh) > _MAX_READ:
            read.clear()
        if len(fresh) <= _MAX_READ:
            read.update(fresh)
        return found

    def items(
        self, *, prefix: StateKey | None = None, start: StateKey | None = None, stop: StateKey | None = None
    ) -> Iterator[tuple[StateKey, Any]]:
        """Keys and values in key order, this batch's changes included; all, or those of a range.

        Args:
            prefix: the beginning of strings or bytes; or the first parts of tuples, e.g. ``("u1",)``.
            start: the first key wanted.
            stop: the first key that is not.
        """
        for key, raw in self.range(*key_range(prefix, start, stop)):
            yield decode_key(key), decode_value(raw)

    def committed(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Encoded keys and values as they were before this batch."""
        return self._stored.items(low, high)

    def range(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """The same on encoded keys."""
        inside = sorted(key for key in self._changed if low <= key and (high is None or key < high))
        changed = iter([(key, self._changed[key]) for key in inside])
        mine = next(changed, None)
        for key, raw in self._stored.items(low, high):
            while mine is not None and mine[0] < key:
                if mine[1] is not None:
                    yield mine[0], mine[1]
                mine = next(changed, None)
            if mine is not None and mine[0] == key:
                if mine[1] is not None:
                    yield key, mine[1]
                mine = next(changed, None)
            else:
                yield key, raw
        while mine is not None:
            if mine[1] is not None:
                yield mine[0], mine[1]
            mine = next(changed, None)

    def set(self, key: StateKey, value: Any) -> None:
        """Set the value of ``key``.

        Raises:
            InvalidValueError: the value cannot be stored; or is None, which is no value: delete the key instead.
        """
        if value is None:
            raise InvalidValueError(f"state value of key {key!r} must not be None; use delete(key)", key=key)
        encoded = encode_key(key)
        try:
            raw = encode_value(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidValueError(f"state value of key {key!r} cannot be stored: {error}", key=key) from error
        self.change(encoded, raw)

    def delete(self, key: StateKey) -> None:
        """Remove ``key``, whether it exists or not."""
        self.change(encode_key(key), None)

    def change(self, encoded: bytes, raw: bytes | None) -> None:
        """`set` and `delete` of encoded keys and values."""
        if self._journal is not None:
            self._journal.append((encoded, self._changed.get(encoded, _ABSENT)))
        self._changed[encoded] = raw

    def mark(self) -> int:
        """A point to come back to with `undo`."""
        if self._journal is None:
            self._journal = []
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Take back every change since ``mark``."""
        journal = self._journal
        while journal is not None and len(journal) > mark:
            encoded, before = journal.pop()
            if before is _ABSENT:
                del self._changed[encoded]
            else:
                self._changed[encoded] = before

    def changes(self) -> list[Change]:
        """What this batch changed, encoded, in key order; not what it looked for in vain, set, and deleted again."""
        read = self._read
        return [
            (key, value)
            for key, value in sorted(self._changed.items())
            if value is not None or read.get(key, _ABSENT) is not None
        ]
