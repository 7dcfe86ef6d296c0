"""`Batch`: the records a handler gets, and the effects it may have."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from djp_dagster.errors import InvalidSettingError, InvalidValueError, PoisonBlockedError, SystemicFailureError
from djp_dagster.events import Event
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.effects import Effects, Position
from djp_dagster.processing.failures import blocked, describe
from djp_dagster.processing.tables import RowCollector
from djp_dagster.streams.claimed import ClaimedData
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Deadline, Intent, Poison, Range, TopicInfo
from djp_dagster.streams.records import (
    Record,
    StoredBatch,
    TopicPartition,
    Undecodable,
    decode_records,
    to_micros,
)
from djp_dagster.streams.topics import Topic, key_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.processing.consumer import Consumer
    from djp_dagster.processing.views import Views
    from djp_dagster.state.task_state import TaskState
    from djp_dagster.state.view import StateView

_READ_BYTES = 4 << 20
handler_log = logging.getLogger("djp_dagster.handler")

RecordSource = Callable[[], Iterator[tuple[list[Record], list[Undecodable]]]]


class ByteCount:
    """Encoded bytes read from the log, however often they are read again; a stored record batch counts by its share."""

    def __init__(self) -> None:
        self.total = 0
        self._read_to: dict[TopicPartition, int] = {}

    def add(self, stored: StoredBatch, at: TopicPartition, start: int, end: int) -> None:
        """Count the records from ``start`` to ``end`` of a stored record batch."""
        if end > self._read_to.get(at, -1):
            self._read_to[at] = end
            size, base = len(stored.blob), stored.base_offset
            # Rounded from the beginning of the record batch, so that the parts of it add up.
            self.total += size * (end - base) // stored.count - size * (start - base) // stored.count


def read_ranges(
    log: EventLog,
    ranges: Sequence[Range],
    skip: frozenset[Position],
    scope: str,
    count: ByteCount,
    claimed: ClaimedData,
) -> Iterator[tuple[list[Record], list[Undecodable]]]:
    """The records of the ranges, one stored record batch at a time, without those in ``skip``."""
    for part in ranges:
        offset = part.start
        while offset < part.end:
            for stored in log.read(part.at, offset, end=part.end, max_bytes=_READ_BYTES):
                records, bad = decode_records(stored, offset, part.end, scope=scope, claimed=claimed)
                count.add(stored, part.at, offset, min(stored.end_offset, part.end))
                offset = stored.end_offset
                if skip:
                    records = [record for record in records if record.position not in skip]
                    bad = [record for record in bad if record.position not in skip]
                reach("3.reading")
                yield records, bad


class Failed(Exception):  # noqa: N818
    """What a handler says of a record in words; its name is what the dead letter shows."""


class Batch:
    """A unit of work: records of one or several partitions, handled and committed as one.

    Iterating reads piece by piece, in order within each partition, and may be done again. `emit`, `fail`, state and
    deadlines take effect with the commit, once; nothing of them is visible before, or if the handler raises.

    Attributes:
        id: the same at every attempt; the records may be fewer then, without those that fail: overwrite what has it,
            and do not skip it.
        group: the consumer group.
        attempt: 1, 2, ...
        fencing_token: grows whenever a partition changes hands; a store that remembers the highest it has seen of each
            partition can refuse a holder that has lost its lease.
        reason: why the batch was cut.
        ranges: what it covers.
        deadlines: those that fire with this batch; see `set_deadline`.
        is_replay: whether this is a replay, whose emits go nowhere or to a shadow topic.
        is_redrive: whether its records are dead letters that are tried again.
        command: what else is to be done than to handle records, if anything; for consumers of the library's own.
        now_micros: the store's clock when the batch was cut.
        horizon_micros: everything appended up to then is in it, or in one before; 0 where nothing is promised.
        log: a logger, usable everywhere.
    """

    is_replay = False

    def __init__(
        self,
        intent: Intent,
        *,
        source: RecordSource,
        size: int,
        effects: Effects,
        topics: Mapping[str, TopicInfo],
        fencing_token: int,
        views: "Views",
        state: "TaskState | None" = None,
        payloads: "PayloadStore | None" = None,
        max_poison: int = 10,
        blocks: bool = False,
    ) -> None:
        self.id, self.group, self.attempt = intent.batch_id, intent.group, intent.attempt
        self.reason, self.ranges = intent.reason, intent.ranges
        self.deadlines: tuple[Deadline, ...] = intent.deadlines
        self.is_redrive, self.command = intent.kind == "redrive", intent.command
        self.now_micros, self.horizon_micros = intent.now_micros, intent.horizon_micros
        self.fencing_token = fencing_token
        self._views = views
        self.log = handler_log
        self.effects = effects
        self._emits_to = effects.only
        self._tasks = intent.tasks
        self._source, self._size, self._topics = source, size, topics
        self._state, self._payloads = state, payloads
        self.max_poison, self.blocks = max_poison, blocks
        self._current: Record | None = None
        self.undecodable: dict[Position, Undecodable] = {}

    def __len__(self) -> int:
        """How many records it holds."""
        return self._size

    def __iter__(self) -> Iterator[Record]:
        """The records, in order within each partition."""
        try:
            for records in self.chunks():
                for record in records:
                    self._current = record
                    yield record
        finally:
            self._current = None

    def chunks(self) -> Iterator[list[Record]]:
        """The records in lists, as they were appended: the fastest way through a batch."""
        for records, bad in self._source():
            if bad:
                self._set_aside(bad)
            if records:
                yield records

    def _set_aside(self, bad: Sequence[Undecodable]) -> None:
        for record in bad:
            self.undecodable[record.position] = record
            error_type, error = "UndecodableRecordError", record.error
            self.effects.failed[record.position] = Poison(*record.position, error_type, error)
        if self.blocks:
            raise PoisonBlockedError(
                f"group {self.group!r} stops at record {bad[0].position}, which is no event: {bad[0].error}; skip it "
                "with stream.seek, or repair it",
                position=bad[0].position,
            )
        if len(self.undecodable) > self.max_poison:
            raise SystemicFailureError(
                f"batch {self.id} of group {self.group!r} holds {len(self.undecodable)} records that are no events, "
                f"more than max_poison={self.max_poison}: was the stream written by something else?",
                batch_id=self.id,
            )

    def emit(self, event: Event, *, topic: "str | Topic | None" = None, source: Record | None = None) -> None:
        """Publish ``event`` with the commit of this batch, once.

        Args:
            event: what to publish. If its maker gave no id, it gets one derived from what caused it; if no time, that
                of its cause.
            topic: where to; may be left out if the consumer emits to one topic only, or the event's type is its name.
            source: the record that caused it; the one the batch's iterator stands on unless given, else the batch.

        Raises:
            InvalidSettingError: the consumer does not declare that topic in ``emits``.
        """
        emits = self._emits_to
        if emits is None or topic is not None:
            emits = self.effects.emits_to(event, topic.name if isinstance(topic, Topic) else topic)
        emits.events.append(event)
        emits.causes.append(source if source is not None else self._current)

    def fail(self, record: Record, error: BaseException | str) -> None:
        """Send ``record`` to the dead letters with the commit of this batch; the rest of the batch goes on.

        The handler must not have any effect for a record it fails. It decides, so ``max_poison`` does not count these.

        Raises:
            PoisonBlockedError: the consumer keeps order at all cost (``on_poison="block"``).
        """
        error_type, text = describe(error if isinstance(error, BaseException) else Failed(error))
        found = Poison(*record.position, error_type, text)
        if self.blocks:
            raise blocked(self.group, found)
        self.effects.failed[record.position] = found

    def set_deadline(self, key: str, at: datetime, *, source: Record | None = None) -> None:
        """Have a later batch of the same task carry ``key`` in its ``deadlines``, not before ``at``.

        It fires once everything appended up to ``at`` has been handled, after any downtime. Setting it again moves it.

        Args:
            key: what to be reminded of; one deadline per task and key.
            at: when, with a time zone.
            source: the record whose task it belongs to; needed only if the batch spans several tasks and is not being
                iterated.
        """
        if at.tzinfo is None:
            raise InvalidValueError(f"deadline {key!r} at {at!r} needs a time zone", key=key)
        if "\0" in key:
            raise InvalidValueError(f"deadline key {key!r} must not hold a NUL character", key=key)
        self.effects.set_deadline(self._task_of(source), key, to_micros(at))

    def clear_deadline(self, key: str, *, source: Record | None = None) -> None:
        """Forget the deadline ``key``, set or not."""
        self.effects.set_deadline(self._task_of(source), key, None)

    def count(self, name: str, number: int = 1) -> None:
        """Add to a figure of this name, which Dagster shows, and plots, summed over the batches of a run."""
        counts = self.effects.counts
        counts[name] = counts.get(name, 0) + number

    def gauge(self, name: str, value: float, *, per_task: bool = False) -> None:
        """Set a figure of this name, which Dagster shows, and plots, as it was set last.

        Args:
            name: of the figure.
            value: as of now.
            per_task: it is of the batch's task alone; Dagster shows the sum over all tasks.
        """
        self.effects.gauges[name] = value
        if per_task:
            self.effects.per_task.add(name)

    def scoped(self, record: Record) -> "Batch":
        """The same batch for one record, with effects of its own."""
        scoped = copy.copy(self)
        scoped.effects = self.effects.child()
        scoped._emits_to, scoped._current = scoped.effects.only, record
        return scoped

    def table(self, consumer: "Consumer") -> "StateView":
        """The table (or the state of another stateful consumer) as it is now, from a local replica.

        Whoever keeps it may be behind its topic: `StateView.staleness_s` tells, ``as_of`` says which records it is of.

        Args:
            consumer: one of the ``tables`` that the consumer declares.

        Raises:
            InvalidSettingError: it does not.
            StateLostError, StreamUnavailableError: the replica cannot be brought up to date.
        """
        return self._views.table(consumer)

    @property
    def task(self) -> int:
        """The task it belongs to, if it is one's alone, as with state."""
        return self._tasks[0]

    def _task_of(self, source: Record | None) -> int:
        if len(self._tasks) == 1:
            return self._tasks[0]
        record = source if source is not None else self._current
        if record is None:
            raise InvalidSettingError(
                f"a deadline belongs to a task, and batch {self.id} spans {len(self._tasks)}; set it while iterating, "
                "or name its record: source=record",
                setting="source",
                value=None,
            )
        return record.partition

    @property
    def state(self) -> "TaskState":
        """The task's state: get, get_many, set, delete.

        Raises:
            InvalidSettingError: the consumer was not declared ``stateful=True``.
        """
        if self._state is None:
            raise InvalidSettingError(
                f"consumer {self.group!r} uses batch.state; declare it with @consumer(stateful=True)",
                setting="stateful",
                value=False,
            )
        return self._state

    @property
    def payloads(self) -> "PayloadStore":
        """The stream's payload store, for claims inside the data of events, and for payloads to emit claims of.

        Raises:
            InvalidSettingError: the stream was opened without one.
        """
        if self._payloads is None:
            raise InvalidSettingError(
                f"consumer {self.group!r} uses batch.payloads; open the stream with payloads=open_payload_store(...)",
                setting="payloads",
                value=None,
            )
        return self._payloads

    def by_key(self) -> dict[str | int, list[Record]]:
        """The records by key, each list in order; holds the whole batch in memory."""
        keyed: dict[str | int, list[Record]] = {}
        for records in self.chunks():
            for record in records:
                info = self._topics[record.topic]
                keyed.setdefault(key_of(record, info.key, info.name), []).append(record)
        return keyed

    def to_arrow(self) -> "pa.Table":
        """The batch as an Arrow table, whole.

        Columns: ``event_id, event_source, event_type, event_time, event_subject, topic, partition, offset, append_time,
        idempotency_key``, then the fields of ``data`` (of one name with these: ``data_<name>``; data that is no object:
        one column ``data``).

        Raises:
            TableSchemaError: a field holds values of types that no column can hold.
        """
        collector = RowCollector()
        for records in self.chunks():
            collector.add(records)
        return collector.table()

    def to_pandas(self) -> "pd.DataFrame":
        """The batch as a DataFrame, whole; columns as in `to_arrow`."""
        frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame

    def arrow_batches(self, *, rows: int = 65_536, schema: "pa.Schema | None" = None) -> Iterator["pa.RecordBatch"]:
        """The batch as Arrow record batches, in memory bounded by ``rows``, however large the batch.

        Args:
            rows: at most this many rows each.
            schema: the columns, all batches alike, and nothing else; those of the first ``rows`` unless given.

        Raises:
            TableSchemaError: a later piece does not fit the schema.
        """
        if rows < 1:
            raise InvalidSettingError(f"arrow_batches(rows={rows}) must be at least 1", setting="rows", value=rows)
        collector = RowCollector(schema)
        for records in self.chunks():
            for start in range(0, len(records), rows):
                for piece in collector.add_up_to(records[start : start + rows], rows):
                    yield from piece.to_batches()
        yield from collector.table().to_batches()
