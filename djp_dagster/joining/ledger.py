"""`Ledger`: the keys one batch looks at: read, changed, closed; and written back to the task's state."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.joining.entries import (
    DUE_RANGE,
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
        self._before: dict[Key, Entry] = {}
        self._touched: dict[Key, None] = {}

    def load(self, keys: Iterable[Key]) -> None:
        """Read what is known of ``keys``, with one look-up."""
        wanted = [key for key in keys if key not in self.entries]
        found = self._state.get_many(wanted)
        for key in wanted:
            value = found.get(key)
            entry = None if value is None else decode_entry(value)
            self.entries[key] = entry
            if type(entry) is Entry:
                self._before[key] = Entry(entry.due, {}, size=entry.size)

    def stored_dues(self) -> Iterator[bytes]:
        """The index of open keys as it was committed, in order."""
        return (key[1:] for key, _ in self._state.committed(*DUE_RANGE))

    def open(self, key: Key, due: int) -> Entry:
        """Begin an entry."""
        entry = self.entries[key] = Entry(due, {})
        self.summary.open += 1
        return entry

    def reopen(self, key: Key, mark: Mark) -> None:
        """Forget that the key was done."""
        if self._remember is not None:
            self._state.delete(since_key(mark[1], key))
        self.entries[key] = None

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
        refused = []
        for key in self._touched:
            entry, before = self.entries[key], self._before.get(key)
            if type(entry) is Entry:
                if not self._keep(key, entry, before):
                    refused.append((key, entry))
                    self._restore(key, entry, before)
            elif type(entry) is tuple:
                self._mark(key, entry, before)
            if before is not None and before.due != NEVER and not (type(entry) is Entry and entry.due == before.due):
                self._state.delete(due_key(before.due, key))
        return refused

    def _keep(self, key: Key, entry: Entry, before: Entry | None) -> bool:
        value = entry.encoded()
        grown = entry.size - (before.size if before is not None else 0)
        if grown > 0 and self.summary.bytes + grown > self._max_bytes:
            return False
        self.summary.bytes += grown
        self._state.set(key, value)
        if entry.due != NEVER and (before is None or before.due != entry.due):
            self._state.set(due_key(entry.due, key), True)
        return True

    def _restore(self, key: Key, entry: Entry, before: Entry | None) -> None:
        if before is None:
            self.entries[key] = None
            self.summary.open -= 1
        else:
            entry.due = before.due

    def _mark(self, key: Key, mark: Mark, before: Entry | None) -> None:
        self._state.set(key, mark)
        if self._remember is not None:
            self._state.set(since_key(mark[1], key), True)
        if before is not None:
            self.summary.bytes -= before.size

    def forget(self, now: int) -> None:
        """Remove marks that are older than they need be."""
        if self._remember is None:
            return
        limit = now - self._remember
        for count, (encoded, _) in enumerate(self._state.committed(*SINCE_RANGE)):
            since, key = indexed(encoded[1:])
            if since >= limit or count == _FORGET_PER_BATCH:
                break
            self._state.delete(decode_key(encoded))
            self.load([key])
            entry = self.entries[key]
            if type(entry) is tuple and entry[1] == since:
                self._state.delete(key)

    def write_summary(self) -> None:
        """Write the summary back."""
        self._state.set(SUMMARY, msgspec.to_builtins(self.summary))
