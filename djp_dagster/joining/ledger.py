"""`Ledger`: the keys one batch looks at: read, changed, closed; and written back to the task's state."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.joining.entries import (
    DUE_RANGE,
    ENTRY_RANGE,
    NEVER,
    SINCE_RANGE,
    SUMMARY,
    Entry,
    Status,
    decode_entry,
    decode_summary,
    due_key,
    indexed,
    since_key,
)
from djp_dagster.state.keys import decode_key
from djp_dagster.streams.records import decode_value

if TYPE_CHECKING:
    from djp_dagster.state.task_state import TaskState

Key = str | int
Mark = tuple[Status, int]
_FORGET_PER_BATCH = 20_000


class Ledger:
    """The keys of one task, as one batch sees and changes them.

    Attributes:
        summary: of the whole buffer.
        entries: what is known of the keys that were loaded: open, done, or nothing.

    Args:
        state: of the task.
        max_bytes: how much may be kept.
        remember_micros: how long marks are kept; None for ever.
    """

    def __init__(self, state: "TaskState", max_bytes: int, remember_micros: int | None) -> None:
        self._state, self._max_bytes, self._remember = state, max_bytes, remember_micros
        self.summary = decode_summary(state.get(SUMMARY))
        self.entries: dict[Key, Entry | Mark | None] = {}
        self._before: dict[Key, Entry | Mark] = {}
        self._touched: dict[Key, None] = {}

    def load(self, keys: Iterable[Key]) -> None:
        """Read what is known of ``keys``, with one look-up."""
        wanted = [key for key in keys if key not in self.entries]
        found = self._state.get_many(wanted)
        for key in wanted:
            value = found.get(key)
            entry = None if value is None else decode_entry(value)
            self.entries[key] = entry
            if entry is not None:
                self._before[key] = Entry(entry.due, {}, size=entry.size) if type(entry) is Entry else entry

    def stored_dues(self) -> Iterator[bytes]:
        """The index of open keys as it was committed, in order."""
        return (key[1:] for key, _ in self._state.committed(*DUE_RANGE))

    def stored_open(self) -> list[Key]:
        """All keys that were open before this batch."""
        found = self._state.committed(*ENTRY_RANGE)
        opened = [encoded for encoded, raw in found if type(decode_entry(decode_value(raw))) is Entry]
        return [decode_key(encoded) for encoded in opened]  # type: ignore[misc]

    def open(self, key: Key, due: int) -> Entry:
        """Begin an entry, whatever was known of the key."""
        entry = self.entries[key] = Entry(due, {})
        self.summary.open += 1
        return entry

    def touch(self, key: Key) -> None:
        """The key has changed, and is to be written back."""
        self._touched[key] = None

    def close(self, key: Key, status: Status, since: int) -> None:
        """Remember that the key is done."""
        self.entries[key] = (status, since)
        self._touched[key] = None
        self.summary.open -= 1

    def write(self) -> list[tuple[Key, Entry]]:
        """Write back what was touched; the entries for which there was no room, as they would have become."""
        opened: list[tuple[Key, Entry]] = []
        for key in self._touched:
            entry = self.entries[key]
            if type(entry) is Entry:
                opened.append((key, entry))
            elif type(entry) is tuple:
                self._mark(key, entry)
        # Now that there is all the room there will be.
        return [(key, entry) for key, entry in opened if not self._keep(key, entry)]

    def _mark(self, key: Key, mark: Mark) -> None:
        self._state.set(key, mark)
        if self._remember is not None:
            self._state.set(since_key(mark[1], key), True)
        self._drop_index(key)
        before = self._before.get(key)
        if type(before) is Entry:
            self.summary.bytes -= before.size

    def _keep(self, key: Key, entry: Entry) -> bool:
        before = self._before.get(key)
        value = entry.encoded()
        grown = entry.size - (before.size if type(before) is Entry else 0)
        if grown > 0 and self.summary.bytes + grown > self._max_bytes:
            self._restore(key, entry, before)
            return False
        self.summary.bytes += grown
        self._state.set(key, value)
        if type(before) is not Entry or before.due != entry.due:
            self._drop_index(key)
            if entry.due != NEVER:
                self._state.set(due_key(entry.due, key), True)
        return True

    def _drop_index(self, key: Key) -> None:
        """What was committed of the key has an index entry no longer."""
        before = self._before.get(key)
        if type(before) is Entry and before.due != NEVER:
            self._state.delete(due_key(before.due, key))
        elif type(before) is tuple and self._remember is not None:
            self._state.delete(since_key(before[1], key))

    def _restore(self, key: Key, entry: Entry, before: Entry | Mark | None) -> None:
        if type(before) is Entry:
            entry.due = before.due
        else:
            self.entries[key] = before
            self.summary.open -= 1

    def forget(self, horizon: int) -> None:
        """Remove marks that nothing appended after ``horizon`` can meet any more."""
        if self._remember is None:
            return
        for count, (encoded, _) in enumerate(self._state.committed(*SINCE_RANGE)):
            since, key = indexed(encoded[1:])
            if self.is_remembered(since, horizon) or count == _FORGET_PER_BATCH:
                break
            self._state.delete(decode_key(encoded))
            self.load([key])
            entry = self.entries[key]
            if type(entry) is tuple and entry[1] == since:
                self._state.delete(key)

    def is_remembered(self, since: int, at: int) -> bool:
        """Whether a mark made then still counts for what was appended ``at``."""
        return self._remember is None or at <= since + self._remember

    def write_summary(self) -> None:
        """Write the summary back."""
        self._state.set(SUMMARY, msgspec.to_builtins(self.summary))
