"""`BufferRun`: one batch of an event buffer; steps 2 to 5 of the protocol in `djp_dagster.joining`."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import InvalidEventError, MissingKeyError
from djp_dagster.joining.closing import Closing, Judge
from djp_dagster.joining.dues import Due, Dues
from djp_dagster.joining.entries import NEVER, Entry, Part
from djp_dagster.joining.filling import Filling, needed
from djp_dagster.joining.joined import Joined
from djp_dagster.joining.ledger import Key, Ledger, Mark
from djp_dagster.joining.parts import PartSpec
from djp_dagster.joining.rules import EXPIRE, JoinRules
from djp_dagster.joining.watermarks import Watermark
from djp_dagster.streams.records import Record, from_micros, to_micros
from djp_dagster.streams.topics import key_of

if TYPE_CHECKING:
    from djp_dagster.processing.batch import Batch

WAKE = "expiry"
"""The name of a task's one deadline."""
_EXPIRE_AT_ONCE = 500
_EXPIRE_PER_BATCH = 20_000
_LONG_AGO = -(1 << 63)
_LAST_MOMENT = to_micros(datetime.max.replace(tzinfo=timezone.utc))


class BufferRun:
    """One batch of one task.

    Args:
        rules: of the join.
        batch: its records, its state, and where effects go.
        call: the handler.
        judge: what an exception of it means.
    """

    def __init__(self, rules: JoinRules, batch: "Batch", call: Callable[[Joined], Any], judge: Judge) -> None:
        self._rules, self._batch = rules, batch
        self._ledger = Ledger(batch.state, rules.max_buffer_bytes, rules.remember_micros)
        self._filling = Filling(rules.parts, rules.duplicates)
        self._closing = Closing(rules, batch, self._ledger, self._filling, call, judge)
        self._summary, self._entries = self._ledger.summary, self._ledger.entries
        self._dues = Dues(self._ledger.stored_dues(), self._is_due)
        self._watermark = Watermark(self._summary, [spec.topic.name for spec in rules.parts], rules.idle_micros)
        self._left_to_expire = _EXPIRE_PER_BATCH
        self._overdue = _LONG_AGO
        self._specs = _by_topic(rules.parts)

    def run(self) -> None:
        """Do it."""
        command = self._batch.command
        if command is not None and command.get("kind") != EXPIRE:
            self._batch.log.warning("join %s cannot %s", self._batch.group, command.get("kind"))
            return
        chunks = sorted(self._batch.chunks(), key=lambda found: (*_stamp_and_topic(found[0]), found[0].offset))
        keyed = [self._keys_of(records) for records in chunks]
        self._ledger.load({key for keys in keyed for key in keys if key is not None})
        for records, keys in zip(chunks, keyed, strict=True):
            self._take_all(records, keys)
        horizon = self._batch.horizon_micros
        if command is not None:
            self._obey(command)
        elif self._batch.deadlines:
            self._expire_before(self._watermark.at(horizon) if self._rules.by_event_time else horizon + 1)
            self._summary.wake = None
        for key, entry in self._ledger.write():
            self._closing.turn_away(key, entry)
            self._dues.add(entry.due, key)
        self._ledger.forget(horizon)
        self._set_wake()
        self._report()

    # Parts

    def _keys_of(self, records: Sequence[Record]) -> list[Key | None]:
        path = self._rules.key
        simple = "." not in path
        keys: list[Key | None] = []
        for record in records:
            if (
                simple
                and record.ext is None
                and type(data := record.data) is dict
                and type(key := data.get(path)) is str
            ):
                keys.append(key)
            else:
                keys.append(self._key_of(record, path))
        return keys

    def _key_of(self, record: Record, path: str) -> Key | None:
        error: Exception
        try:
            key = key_of(record, path, record.topic)
        except (MissingKeyError, InvalidEventError) as found:
            error = found
        else:
            if not isinstance(key, bool):
                return key
            error = MissingKeyError(f"event {record.id!r}: 'partitionkey' is {key}; use a string or an integer")
        self._batch.fail(record, error)
        return None

    def _take_all(self, records: Sequence[Record], keys: Sequence[Key | None]) -> None:
        """The records of one stored record batch: all of one topic, appended at the same time."""
        origin = records[0].origin
        self._closing.origin, self._summary.scope = origin, origin.scope
        stamp, by_event_time = origin.append_micros, self._rules.by_event_time
        specs = self._specs.get(origin.topic, {})
        of_any_kind = specs.get(None)
        self._expire_before(self._watermark.at(stamp) if by_event_time else stamp)
        for record, key in zip(records, keys, strict=True):
            spec = of_any_kind or specs.get(record.type)
            if key is not None and spec is not None:
                try:
                    self._take(record, key, spec)
                except InvalidEventError as error:
                    self._batch.fail(record, error)
            if by_event_time:
                self._watermark.see(origin.topic, to_micros(record.event_time), stamp)
                self._expire_before(self._watermark.at(stamp))

    def _take(self, record: Record, key: Key, spec: PartSpec) -> None:
        """A part of ``key``."""
        standing, stamp = self._standing(record, key), record.origin.append_micros
        part = Part(record.topic, record.offset, stamp, record, None)
        if isinstance(standing, tuple):
            self._closing.too_late(key, standing, part)
            return
        if type(spec.count) is str:
            needed(record, spec)
        entry = self._opened(key, standing, part, record)
        if entry is None:
            return
        self._ledger.touch(key)
        if not self._filling.add(entry, spec, part, record):
            self._batch.count("duplicate_parts")
        elif self._filling.is_complete(entry, record.origin):
            self._closing.finish(key, entry, (), stamp)

    def _standing(self, record: Record, key: Key) -> Entry | Mark | None:
        """What the key is when the part comes."""
        entry = self._entries.get(key)
        redrive = self._batch.is_redrive
        if type(entry) is Entry:
            if not redrive and entry.due < self._overdue:
                # There were too many to expire before it in this batch.
                self._closing.expire(key, entry, self._moment_of(entry.due))
                return self._entries[key]
        elif isinstance(entry, tuple):
            at = self._batch.now_micros if redrive else record.origin.append_micros
            if (redrive and entry[0] != "completed") or not self._ledger.is_remembered(entry[1], at):
                return None
        return entry

    def _opened(self, key: Key, entry: Entry | None, part: Part, record: Record) -> Entry | None:
        """The entry of ``key``, due as the part wants it; None if the key is due before the part."""
        if entry is None:
            due = self._due_of(record)
            self._dues.add(due, key)
            return self._ledger.open(key, due)
        if self._rules.by_event_time and not self._batch.is_redrive:
            if to_micros(record.event_time) > entry.due:
                self._closing.refuse(key, part)
                return None
            if (due := self._due_of(record)) < entry.due:
                self._bring_forward(key, entry, due)
        return entry

    def _due_of(self, record: Record) -> int:
        """When a key is due whose first part this is."""
        if self._rules.deadline_micros is None:
            return NEVER
        by_event_time = self._rules.by_event_time
        at = to_micros(record.event_time) if by_event_time else record.origin.append_micros
        if self._batch.is_redrive:
            # It counts from now, or it would be too late again.
            now = self._batch.now_micros
            at = max(at, self._watermark.at(now)) if by_event_time else now
        return at + self._rules.deadline_micros

    def _bring_forward(self, key: Key, entry: Entry, due: int) -> None:
        """An earlier part has come: the key is due earlier, and what is later than that is late."""
        entry.due = due
        self._dues.add(due, key)
        for name, found in list(entry.parts.items()):
            for part in list(found):
                if to_micros(part.record(self._closing.origin).event_time) > due:
                    found.remove(part)
                    self._closing.refuse(key, part)
            if not found:
                del entry.parts[name]

    # Time

    def _is_due(self, due: Due) -> bool:
        """Whether the key is open and due then, as far as is known without reading it."""
        if due[1] not in self._entries:
            return True
        entry = self._entries[due[1]]
        return type(entry) is Entry and entry.due == due[0]

    def _expire_before(self, limit: int) -> None:
        if self._batch.is_redrive:
            return  # it is of the past, and what was appended since may not have been read
        self._overdue = limit
        while self._left_to_expire > 0:
            due = self._dues.pop_before(limit, min(_EXPIRE_AT_ONCE, self._left_to_expire))
            if not due:
                return
            self._left_to_expire -= len(due)
            self._ledger.load(key for _, key in due)
            for at, key in due:
                entry = self._entries[key]
                if type(entry) is Entry and entry.due == at:
                    self._closing.expire(key, entry, self._moment_of(at))

    def _moment_of(self, due: int) -> int:
        """The append time at which what is due then expires, whenever it is found out."""
        return self._watermark.passes(due) if self._rules.by_event_time else due

    def _obey(self, command: Mapping[str, Any]) -> None:
        """Expire the keys that the command names; all, if it names none."""
        keys = command.get("keys")
        wanted = self._ledger.stored_open() if keys is None else [key for key in keys if type(key) in (str, int)]
        self._ledger.load(wanted)
        for key in wanted:
            entry = self._entries[key]
            if type(entry) is Entry:
                self._closing.expire(key, entry, self._batch.now_micros)

    def _set_wake(self) -> None:
        earliest = self._dues.earliest()
        if earliest is None:
            return
        wake = self._moment_of(earliest[0])
        if self._left_to_expire <= 0:
            wake = self._batch.now_micros
        if self._summary.wake is None or wake < self._summary.wake:
            self._summary.wake = wake
            self._batch.set_deadline(WAKE, from_micros(min(wake, _LAST_MOMENT)))

    def _report(self) -> None:
        self._ledger.write_summary()
        self._batch.gauge("pending_keys", self._summary.open, per_task=True)
        self._batch.gauge("buffered_bytes", self._summary.bytes, per_task=True)


def _stamp_and_topic(record: Record) -> tuple[int, str]:
    return record.origin.append_micros, record.topic


def _by_topic(parts: Sequence[PartSpec]) -> dict[str, dict[str | None, PartSpec]]:
    found: dict[str, dict[str | None, PartSpec]] = {}
    for spec in parts:
        found.setdefault(spec.topic.name, {})[spec.kind] = spec
    return found
