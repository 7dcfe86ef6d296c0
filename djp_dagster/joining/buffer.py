"""`BufferRun`: one batch of an event buffer; steps 2 to 5 of the protocol in `djp_dagster.joining`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from djp_dagster.errors import (
    BufferFullError,
    InvalidEventError,
    JoinIncompleteError,
    LatePartError,
    MissingKeyError,
)
from djp_dagster.joining.dues import Due, Dues
from djp_dagster.joining.entries import (
    DUE_RANGE,
    NEVER,
    SINCE_RANGE,
    SUMMARY,
    Entry,
    Part,
    Status,
    decode_entry,
    decode_summary,
    due_key,
    indexed,
    since_key,
)
from djp_dagster.joining.joined import Joined
from djp_dagster.joining.parts import PartSpec
from djp_dagster.joining.watermarks import Watermark
from djp_dagster.processing.failures import describe, systemic
from djp_dagster.state.keys import decode_key
from djp_dagster.streams.model import NewDeadLetter
from djp_dagster.streams.records import Origin, Record, from_micros, to_micros
from djp_dagster.streams.topics import key_of

if TYPE_CHECKING:
    from djp_dagster.processing.batch import Batch

Key = str | int
Mark = tuple[Status, int]
Duplicates = Literal["first", "last", "all"]
OnDeadline = Literal["dead_letter", "partial"]
Judge = Callable[[BaseException], str]
WAKE = "expiry"
"""The name of a task's one deadline."""
_EXPIRE_AT_ONCE = 500
_EXPIRE_PER_BATCH = 20_000
_FORGET_PER_BATCH = 20_000


class JoinRules(msgspec.Struct, frozen=True):
    """How a join behaves.

    Attributes:
        by_event_time: deadlines are measured in event time, from the earliest part; else in append time, from the
            first.
        late, late_topic: what becomes of a part that comes too late.
        remember_micros: how long marks are kept; None for ever.
    """

    key: str
    parts: tuple[PartSpec, ...]
    deadline_micros: int | None
    by_event_time: bool
    idle_micros: int
    on_deadline: OnDeadline
    duplicates: Duplicates
    late: Literal["drop", "dead_letter", "topic"]
    late_topic: str | None
    remember_micros: int | None
    max_buffer_bytes: int
    max_failed_keys: int


class BufferRun:
    """One batch of one task.

    Args:
        rules: of the join.
        batch: its records, its state, and where effects go.
        call: the handler.
        judge: what an exception of it means.
    """

    def __init__(self, rules: JoinRules, batch: "Batch", call: Callable[[Joined], Any], judge: Judge) -> None:
        self._rules, self._batch, self._call, self._judge = rules, batch, call, judge
        self._state = batch.state
        self._summary = decode_summary(self._state.get(SUMMARY))
        self._entries: dict[Key, Entry | Mark | None] = {}
        self._before: dict[Key, Entry] = {}
        self._touched: dict[Key, None] = {}
        self._dues = Dues((key[1:] for key, _ in self._state.committed(*DUE_RANGE)), self._is_due)
        self._watermark = Watermark(self._summary, [spec.topic.name for spec in rules.parts], rules.idle_micros)
        self._left_to_expire = _EXPIRE_PER_BATCH
        self._failed_keys = 0
        self._now = batch.now_micros
        self._specs = _by_topic(rules.parts)
        self._required = [spec for spec in rules.parts if not spec.optional]
        self._origin = Origin("", batch.task, 0)

    def run(self) -> None:
        """Do it."""
        chunks = sorted(self._batch.chunks(), key=lambda found: (*_stamp_and_topic(found[0]), found[0].offset))
        keyed = [self._keys_of(records) for records in chunks]
        self._load({key for keys in keyed for key in keys if key is not None})
        for records, keys in zip(chunks, keyed, strict=True):
            self._take_all(records, keys)
        if self._batch.command is not None:
            self._obey(self._batch.command)
        elif self._batch.deadlines:
            self._now = max(self._now, self._batch.horizon_micros)
            horizon = self._batch.horizon_micros
            self._expire_before(self._watermark.at(horizon) if self._rules.by_event_time else horizon + 1)
            self._summary.wake = None
        self._flush()
        self._forget()
        self._set_wake()
        self._report()

    # Parts

    def _keys_of(self, records: Sequence[Record]) -> list[Key | None]:
        path, topic = self._rules.key, records[0].topic
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
                continue
            try:
                keys.append(key_of(record, path, topic))
            except MissingKeyError as error:
                self._batch.fail(record, error)
                keys.append(None)
        return keys

    def _load(self, keys: Iterable[Key]) -> None:
        wanted = [key for key in keys if key not in self._entries]
        found = self._state.get_many(wanted)
        for key in wanted:
            value = found.get(key)
            entry = None if value is None else decode_entry(value)
            self._entries[key] = entry
            if type(entry) is Entry:
                self._before[key] = Entry(entry.due, {}, size=entry.size)

    def _take_all(self, records: Sequence[Record], keys: Sequence[Key | None]) -> None:
        """The records of one stored record batch: all of one topic, appended at the same time."""
        origin = records[0].origin
        self._origin, stamp, by_event_time = origin, origin.append_micros, self._rules.by_event_time
        self._now = max(self._now, stamp)
        specs = self._specs.get(origin.topic, {})
        of_any_kind = specs.get(None)
        if not by_event_time:
            self._expire_before(stamp)
        for record, key in zip(records, keys, strict=True):
            spec = of_any_kind or specs.get(record.type)
            if key is not None and spec is not None:
                try:
                    self._take(record, key, spec, to_micros(record.event_time) if by_event_time else stamp)
                except InvalidEventError as error:
                    self._batch.fail(record, error)
            if by_event_time:
                self._watermark.see(origin.topic, to_micros(record.event_time), stamp)
                self._expire_before(self._watermark.at(stamp))

    def _take(self, record: Record, key: Key, spec: PartSpec, at: int) -> None:
        """A part of ``key``, that happened (or was appended) ``at``."""
        deadline = self._rules.deadline_micros
        entry = self._entries.get(key)
        if self._batch.is_redrive:
            # It counts from now, or it would be too late again.
            at = max(at, self._watermark.at(self._now)) if self._rules.by_event_time else self._now
        if type(entry) is tuple and self._batch.is_redrive and entry[0] != "completed":
            self._reopen(key, entry)
            entry = None
        if type(entry) is Entry and at > entry.due:
            self._expire(key, entry)
            entry = self._entries[key]
        if isinstance(entry, tuple):
            self._too_late(record, key, entry)
            return
        due = NEVER if deadline is None else at + deadline
        if entry is None:
            entry = self._entries[key] = Entry(due, {})
            self._summary.open += 1
            self._dues.add(due, key)
        elif due < entry.due:
            self._bring_forward(key, entry, due)
        part = Part(record.topic, record.offset, record.origin.append_micros, record, None)
        self._touched[key] = None
        if self._add(entry, spec, part, record) and self._is_complete(entry):
            self._finish(key, entry, ())

    def _add(self, entry: Entry, spec: PartSpec, part: Part, record: Record) -> bool:
        """Keep the part; whether it adds anything."""
        if isinstance(spec.count, str):
            _needed(record, spec)
        found = entry.parts.get(spec.name)
        if found is None:
            entry.parts[spec.name] = [part]
            return True
        if any(known.identity == (record.source, record.id) for known in found):
            self._batch.count("duplicate_parts")
            return False
        if spec.count is not None or self._rules.duplicates == "all":
            found.append(part)
            return True
        self._batch.count("duplicate_parts")
        if self._rules.duplicates == "last":
            found[:] = [part]
        return False

    def _is_complete(self, entry: Entry, *, required_only: bool = False) -> bool:
        specs = self._required if required_only else self._rules.parts
        return all(self._is_there(entry, spec) for spec in specs)

    def _is_there(self, entry: Entry, spec: PartSpec) -> bool:
        found = entry.parts.get(spec.name)
        if not found:
            return False
        if spec.count is None:
            return True
        return len(found) >= _needed(found[0].record(self._origin), spec)

    def _bring_forward(self, key: Key, entry: Entry, due: int) -> None:
        """An earlier part has come: the key is due earlier, and what is later than that is late."""
        entry.due = due
        self._dues.add(due, key)
        for name, found in list(entry.parts.items()):
            for part in list(found):
                record = part.record(self._origin)
                if to_micros(record.event_time) > due:
                    found.remove(part)
                    self._refuse(part, record, LatePartError(f"key {key!r} is due before it"))
            if not found:
                del entry.parts[name]

    def _too_late(self, record: Record, key: Key, mark: Mark) -> None:
        self._summary.late += 1
        self._batch.count("late_parts")
        if self._rules.late == "dead_letter":
            self._batch.fail(record, LatePartError(f"key {key!r} was {mark[0]} before it came"))
        elif self._rules.late == "topic":
            self._batch.emit(record, topic=self._rules.late_topic, source=record)

    def _refuse(self, part: Part, record: Record, error: Exception) -> None:
        self._summary.late += 1
        self._batch.count("late_parts")
        if self._rules.late == "dead_letter":
            self._dead_letter(part, *describe(error))
        elif self._rules.late == "topic":
            self._batch.emit(record, topic=self._rules.late_topic, source=record)

    # Keys

    def _reopen(self, key: Key, mark: Mark) -> None:
        if self._rules.remember_micros is not None:
            self._state.delete(since_key(mark[1], key))
        self._entries[key] = None

    def _finish(self, key: Key, entry: Entry, missing: tuple[str, ...]) -> None:
        """Call the handler, once for ever."""
        effects = self._batch.effects
        mark = effects.mark()
        joined = Joined(self._batch, key, self._named(entry), missing)
        try:
            self._call(joined)
        except Exception as error:
            if self._judge(error) != "terminal":
                raise
            if not self._failed_keys:
                self._batch.log.warning("group %s failed on key %r", self._batch.group, key, exc_info=error)
            joined.failure = error
            self._failed_keys += 1
        if joined.failure is not None:
            effects.undo(mark)
            self._require_tolerable(joined.failure)
            self._give_up(key, entry, "failed", *describe(joined.failure))
            return
        self._summary.completed += 1
        self._batch.count("completed_keys")
        self._close(key, "completed")

    def _require_tolerable(self, error: BaseException) -> None:
        limit = self._rules.max_failed_keys
        if self._failed_keys > limit:
            raise systemic(self._batch.group, limit, self._batch.id, self._failed_keys, *describe(error))

    def _named(self, entry: Entry) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for spec in self._rules.parts:
            found = [part.record(self._origin) for part in entry.parts.get(spec.name, ())]
            if found:
                many = spec.count is not None or self._rules.duplicates == "all"
                named[spec.name] = found if many else found[0]
        return named

    def _expire(self, key: Key, entry: Entry) -> None:
        missing = tuple(spec.name for spec in self._rules.parts if not self._is_there(entry, spec))
        self._touched[key] = None
        if self._is_complete(entry, required_only=True):
            self._finish(key, entry, missing)
            return
        self._summary.expired += 1
        self._batch.count("expired_keys")
        if self._rules.on_deadline == "partial":
            self._finish(key, entry, missing)
            return
        error = JoinIncompleteError(f"key {key!r}: {', '.join(missing)} missing when its deadline passed")
        self._give_up(key, entry, "expired", *describe(error))

    def _give_up(self, key: Key, entry: Entry, status: Status, error_type: str, error: str) -> None:
        for part in entry.all_parts():
            self._dead_letter(part, error_type, error)
        if status == "failed":
            self._summary.failed += 1
            self._batch.count("failed_keys")
        self._close(key, status)

    def _dead_letter(self, part: Part, error_type: str, error: str) -> None:
        letter = NewDeadLetter(part.topic, self._batch.task, part.offset, part.stamp, part.raw, error_type, error)
        self._batch.effects.letters.append(letter)

    def _close(self, key: Key, status: Status) -> None:
        self._entries[key] = (status, self._now)
        self._touched[key] = None
        self._summary.open -= 1

    # Time

    def _is_due(self, due: Due) -> bool:
        """Whether the key is open and due then, as far as is known without reading it."""
        if due[1] not in self._entries:
            return True
        entry = self._entries[due[1]]
        return type(entry) is Entry and entry.due == due[0]

    def _expire_before(self, limit: int) -> None:
        while self._left_to_expire > 0:
            due = self._dues.pop_before(limit, min(_EXPIRE_AT_ONCE, self._left_to_expire))
            if not due:
                return
            self._left_to_expire -= len(due)
            self._load(key for _, key in due)
            for at, key in due:
                entry = self._entries[key]
                if type(entry) is Entry and entry.due == at:
                    self._expire(key, entry)

    def _obey(self, command: Mapping[str, Any]) -> None:
        keys = command.get("keys")
        if keys is None:
            keys = [indexed(key[1:])[1] for key, _ in self._state.committed(*DUE_RANGE)][: self._left_to_expire]
        self._load(keys)
        for key in keys:
            entry = self._entries[key]
            if type(entry) is Entry:
                self._expire(key, entry)

    def _set_wake(self) -> None:
        earliest = self._dues.earliest()
        if earliest is None or earliest[0] == NEVER:
            return
        wake = earliest[0]
        if self._rules.by_event_time:
            wake = self._watermark.next_look(wake, self._now)
        if self._left_to_expire <= 0:
            wake = self._batch.now_micros
        if self._summary.wake is None or wake < self._summary.wake:
            self._summary.wake = wake
            self._batch.set_deadline(WAKE, from_micros(wake))

    # State

    def _flush(self) -> None:
        """Write back what was touched; refuse what there is no room for."""
        for key in self._touched:
            entry, before = self._entries[key], self._before.get(key)
            if type(entry) is Entry:
                self._keep(key, entry, before)
            elif type(entry) is tuple:
                self._state.set(key, entry)
                if self._rules.remember_micros is not None:
                    self._state.set(since_key(entry[1], key), True)
                if before is not None:
                    self._summary.bytes -= before.size
            if before is not None and before.due != NEVER and not (type(entry) is Entry and entry.due == before.due):
                self._state.delete(due_key(before.due, key))

    def _keep(self, key: Key, entry: Entry, before: Entry | None) -> None:
        value = entry.encoded()
        grown = entry.size - (before.size if before is not None else 0)
        if grown > 0 and self._summary.bytes + grown > self._rules.max_buffer_bytes:
            self._turn_away(key, entry, before)
            return
        self._summary.bytes += grown
        self._state.set(key, value)
        if entry.due != NEVER and (before is None or before.due != entry.due):
            self._state.set(due_key(entry.due, key), True)

    def _turn_away(self, key: Key, entry: Entry, before: Entry | None) -> None:
        limit = self._rules.max_buffer_bytes
        error = BufferFullError(
            f"key {key!r}: the event buffer of {self._batch.group!r} holds {self._summary.bytes} bytes of "
            f"{limit} in task {self._batch.task}; raise max_buffer_bytes, or expire keys; then redrive"
        )
        for part in entry.all_parts():
            if part.is_new:
                self._dead_letter(part, *describe(error))
                self._batch.count("refused_parts")
        if before is None:
            self._entries[key] = None
            self._summary.open -= 1
        else:
            entry.due = before.due

    def _forget(self) -> None:
        """Marks that are older than they need be."""
        if self._rules.remember_micros is None:
            return
        limit = self._now - self._rules.remember_micros
        for count, (encoded, _) in enumerate(self._state.committed(*SINCE_RANGE)):
            since, key = indexed(encoded[1:])
            if since >= limit or count == _FORGET_PER_BATCH:
                break
            self._state.delete(decode_key(encoded))
            self._load([key])
            entry = self._entries[key]
            if type(entry) is tuple and entry[1] == since:
                self._state.delete(key)

    def _report(self) -> None:
        self._state.set(SUMMARY, msgspec.to_builtins(self._summary))
        self._batch.gauge("pending_keys", self._summary.open)
        self._batch.gauge("buffered_bytes", self._summary.bytes)


def _needed(record: Record, spec: PartSpec) -> int:
    """How many events the part takes.

    Raises:
        InvalidEventError: its data does not say.
    """
    if isinstance(spec.count, int):
        return spec.count
    value: Any = record.data
    for name in str(spec.count).split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InvalidEventError(
        f"event {record.id!r}: data[{spec.count!r}] must say how many events the part {spec.name!r} takes, a number "
        f"above 0, not {value!r}",
        attribute="data",
    )


def _stamp_and_topic(record: Record) -> tuple[int, str]:
    return record.origin.append_micros, record.topic


def _by_topic(parts: Sequence[PartSpec]) -> dict[str, dict[str | None, PartSpec]]:
    found: dict[str, dict[str | None, PartSpec]] = {}
    for spec in parts:
        found.setdefault(spec.topic.name, {})[spec.kind] = spec
    return found
