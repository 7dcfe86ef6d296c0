"""`EventLog` on SQL: appending, reading, measuring and cutting."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import (
    AmbiguousPublishError,
    InvalidSettingError,
    OffsetOutOfRangeError,
    ProducerFencedError,
    StreamUnavailableError,
    UnknownTopicError,
)
from djp_dagster.streams.contracts import Watcher
from djp_dagster.streams.model import (
    Appended,
    Backlog,
    Capabilities,
    PartitionSpan,
    ProducerStamp,
    TopicInfo,
    TrimReport,
)
from djp_dagster.streams.records import EncodedBatch, StoredBatch, TopicPartition, record_sizes
from djp_dagster.streams.sql import retention, schema
from djp_dagster.streams.sql.catalog import TopicCatalog, open_database
from djp_dagster.streams.sql.database import Database, is_ambiguous
from djp_dagster.streams.sql.prepared import Prepared
from djp_dagster.streams.sql.watch import watch
from djp_dagster.streams.topics import Topic, check_name

_rows = schema.record_batches
_parts = schema.partitions
_t: sa.BindParameter[int] = sa.bindparam("t")
_p: sa.BindParameter[int] = sa.bindparam("p")
_offset: sa.BindParameter[int] = sa.bindparam("at")

_lock_one = Prepared(
    sa.select(_parts.c.partition, _parts.c.end_offset, _parts.c.end_bytes, _parts.c.last_append_micros)
    .where(_parts.c.topic_id == _t, _parts.c.partition == _p)
    .with_for_update()
)
_lock_many = (
    sa.select(_parts.c.partition, _parts.c.end_offset, _parts.c.end_bytes, _parts.c.last_append_micros)
    .where(_parts.c.topic_id == _t, _parts.c.partition.in_(sa.bindparam("ps", expanding=True)))
    .order_by(_parts.c.partition)
    .with_for_update()
)
_insert_rows = Prepared(sa.insert(_rows).inline(), columns=[c.name for c in _rows.c if c is not _rows.c.row_id])
_advance = Prepared(
    sa.update(_parts)
    .where(_parts.c.topic_id == _t, _parts.c.partition == _p)
    .values(
        end_offset=sa.bindparam("offset_to"),
        end_bytes=sa.bindparam("bytes_to"),
        last_append_micros=sa.bindparam("at_micros"),
    )
)

_find_floor = (
    sa.select(_rows.c.base_offset, _rows.c["count"], _rows.c.base_bytes, _rows.c.bytes, _rows.c.append_micros)
    .where(_rows.c.topic_id == _t, _rows.c.partition == _p, _rows.c.base_offset <= _offset)
    .order_by(_rows.c.base_offset.desc())
    .limit(1)
)
_floor = Prepared(_find_floor)
_MAX_ROWS_PER_READ = 256
_ahead = _rows.alias()
# One table and scalar subqueries: joins would send the blobs through a sorter. The look ahead bounds how many index
# entries are looked at, which the byte limit alone would not.
_read = Prepared(
    sa.select(_rows.c.base_offset, _rows.c["count"], _rows.c.append_micros, _rows.c.codec, _rows.c.blob)
    .where(
        _rows.c.topic_id == _t,
        _rows.c.partition == _p,
        _rows.c.base_offset >= _find_floor.with_only_columns(_rows.c.base_offset).correlate(None).scalar_subquery(),
        _rows.c.base_offset < sa.bindparam("until"),
        _rows.c.base_offset
        < sa.func.coalesce(
            sa.select(_ahead.c.base_offset)
            .where(_ahead.c.topic_id == _t, _ahead.c.partition == _p, _ahead.c.base_offset > _offset)
            .order_by(_ahead.c.base_offset)
            .limit(1)
            .offset(_MAX_ROWS_PER_READ)
            .scalar_subquery(),
            sa.bindparam("until"),
        ),
        _rows.c.base_offset + _rows.c["count"] > _offset,
        sa.or_(
            _rows.c.base_offset <= _offset,
            _rows.c.base_bytes + _rows.c.bytes
            <= _find_floor.with_only_columns(_rows.c.base_bytes).correlate(None).scalar_subquery()
            + sa.bindparam("max_bytes"),
        ),
    )
    .order_by(_rows.c.base_offset)
)
_spans = sa.select(
    _parts.c.topic_id, _parts.c.partition, _parts.c.begin_offset, _parts.c.end_offset, _parts.c.last_append_micros
).where(_parts.c.topic_id.in_(sa.bindparam("ts", expanding=True)))
_span = sa.select(_parts.c.begin_offset, _parts.c.end_offset).where(_parts.c.topic_id == _t, _parts.c.partition == _p)
_at_time = sa.select(sa.func.min(_rows.c.base_offset)).where(
    _rows.c.topic_id == _t, _rows.c.partition == _p, _rows.c.append_micros >= sa.bindparam("micros")
)
# Ascending, so that the look ends where the batch does, not where the backlog does.
_first_beyond = Prepared(
    sa.select(_rows.c.base_offset)
    .where(
        _rows.c.topic_id == _t,
        _rows.c.partition == _p,
        _rows.c.base_offset >= sa.bindparam("first"),
        _rows.c.base_offset < sa.bindparam("until"),
        _rows.c.base_bytes >= sa.bindparam("limit_bytes"),
    )
    .order_by(_rows.c.base_offset)
    .limit(1)
)
_in_event_times = (
    sa.select(_rows.c.base_offset, _rows.c["count"])
    .where(
        _rows.c.topic_id == _t,
        _rows.c.partition == _p,
        _rows.c.base_offset < sa.bindparam("until"),
        _rows.c.base_offset + _rows.c["count"] > sa.bindparam("start"),
        sa.or_(
            sa.and_(_rows.c.max_event_micros >= sa.bindparam("first"), _rows.c.min_event_micros < sa.bindparam("last")),
            # An event that says no time happened when it was appended, whatever its neighbours say.
            sa.and_(_rows.c.append_micros >= sa.bindparam("first"), _rows.c.append_micros < sa.bindparam("last")),
        ),
    )
    .order_by(_rows.c.base_offset)
)
_producer = sa.select(schema.producers).where(schema.producers.c.name == sa.bindparam("n")).with_for_update()


class SqlEventLog:
    """Topics and record batches in SQLite or PostgreSQL."""

    capabilities = Capabilities(exact_bytes=True, gapless=True, atomic_commit=True, retention_hold=True)

    def __init__(self, database: Database) -> None:
        self.database = database
        self.incarnation = open_database(database)
        self.catalog = TopicCatalog(database)

    def create_topic(self, topic: Topic) -> TopicInfo:
        """See `EventLog.create_topic`."""
        return self.catalog.create(topic)

    def topic(self, name: str) -> TopicInfo:
        """See `EventLog.topic`."""
        return self.catalog.get(name)

    def topics(self) -> list[TopicInfo]:
        """See `EventLog.topics`."""
        return self.catalog.all()

    def delete_topic(self, name: str) -> None:
        """See `EventLog.delete_topic`."""
        self.catalog.delete(name)

    def open_producer(self, name: str) -> ProducerStamp:
        """See `EventLog.open_producer`."""
        check_name("producer", name)
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            row = connection.execute(_producer, {"n": name}).one_or_none()
            if row is None:
                values = {"name": name, "epoch": 1, "last_sequence": 0, "updated_micros": now}
                connection.execute(sa.insert(schema.producers).values(values))
                return ProducerStamp(name, 1, 0)
            table = schema.producers
            connection.execute(
                sa.update(table).where(table.c.name == name).values(epoch=row.epoch + 1, updated_micros=now)
            )
            return ProducerStamp(name, row.epoch + 1, row.last_sequence)

    def append(self, batches: Sequence[EncodedBatch], stamp: ProducerStamp | None = None) -> list[Appended]:
        """See `EventLog.append`."""
        if not batches:
            return []
        try:
            with self.database.write() as connection:
                if stamp is not None and not self._advance_producer(connection, stamp):
                    return []
                appended = self.append_in(connection, batches)
                self.database.notify(connection)
                return appended
        except StreamUnavailableError as error:
            if stamp is None and is_ambiguous(error):
                raise AmbiguousPublishError(
                    f"{error}; the {sum(batch.count for batch in batches)} events were appended once or not at all. "
                    "Publish through a named producer, stream.producer(name), to retry safely",
                    stream=self.database.label,
                ) from error
            raise

    def _advance_producer(self, connection: Connection, stamp: ProducerStamp) -> bool:
        """Whether the sequence is new; remembers it."""
        row = connection.execute(_producer, {"n": stamp.name}).one_or_none()
        if row is None or row.epoch != stamp.epoch:
            raise ProducerFencedError(
                f"producer {stamp.name!r} of epoch {stamp.epoch} was fenced by epoch {row.epoch if row else None}: "
                "another process opened it; run one at a time, or use another name",
                producer=stamp.name,
                epoch=stamp.epoch,
            )
        if stamp.sequence <= row.last_sequence:
            return False
        table = schema.producers
        connection.execute(
            sa.update(table)
            .where(table.c.name == stamp.name)
            .values(last_sequence=stamp.sequence, updated_micros=self.database.now_micros(connection))
        )
        return True

    def append_in(
        self, connection: Connection, batches: Sequence[EncodedBatch], *, expected: Mapping[TopicPartition, int] = {}
    ) -> list[Appended]:
        """Append within a transaction; ``expected`` names end offsets that must hold.

        Raises:
            OffsetOutOfRangeError: an expected end offset does not hold.
        """
        keyed = [(self.catalog.id_of(batch.topic), batch) for batch in batches]
        keyed.sort(key=lambda pair: (pair[0], pair[1].partition))  # the order in which row locks are taken
        ends = self._lock_partitions(connection, keyed)
        now = self.database.now_micros(connection)
        inserts: list[dict[str, object]] = []
        advances: dict[tuple[int, int], dict[str, object]] = {}
        appended: list[Appended] = []
        for topic_id, batch in keyed:
            offset, total, last = ends[topic_id, batch.partition]
            wanted = expected.get(TopicPartition(batch.topic, batch.partition))
            if wanted is not None and wanted != offset:
                raise OffsetOutOfRangeError(
                    f"topic {batch.topic!r} partition {batch.partition} ends at {offset}, not at {wanted}",
                    topic=batch.topic,
                    partition=batch.partition,
                )
            # A clock that went back must not reorder what age, retention and deadlines look at.
            at_micros = max(now, last)
            inserts.append(_row_of(topic_id, batch, offset, total, at_micros))
            appended.append(Appended(batch.topic, batch.partition, offset, batch.count))
            offset, total = offset + batch.count, total + len(batch.blob)
            ends[topic_id, batch.partition] = (offset, total, at_micros)
            advances[topic_id, batch.partition] = {
                "t": topic_id,
                "p": batch.partition,
                "offset_to": offset,
                "bytes_to": total,
                "at_micros": at_micros,
            }
        _insert_rows.run_each(connection, inserts)
        _advance.run_each(connection, list(advances.values()))
        return appended

    def _lock_partitions(
        self, connection: Connection, keyed: Sequence[tuple[int, EncodedBatch]]
    ) -> dict[tuple[int, int], tuple[int, int, int]]:
        ends: dict[tuple[int, int], tuple[int, int, int]] = {}
        for topic_id, group in groupby(keyed, key=lambda pair: pair[0]):
            members = [batch for _, batch in group]
            wanted = sorted({batch.partition for batch in members})
            if len(wanted) == 1:
                found: Sequence[Any] = _lock_one.rows(connection, {"t": topic_id, "p": wanted[0]})
            else:
                found = connection.execute(_lock_many, {"t": topic_id, "ps": wanted}).all()
            for partition, end_offset, end_bytes, last in found:
                ends[topic_id, partition] = (end_offset, end_bytes, last)
            if len(found) != len(wanted):
                self._explain_missing(members[0].topic, wanted)
        return ends

    def _explain_missing(self, topic: str, wanted: Sequence[int]) -> None:
        self.catalog.forget(topic)
        info = self.catalog.get(topic)
        if max(wanted) >= info.partitions or min(wanted) < 0:
            raise InvalidSettingError(
                f"topic {topic!r} has partitions 0 to {info.partitions - 1}, not {wanted}",
                setting="partition",
                value=list(wanted),
            )
        raise UnknownTopicError(f"topic {topic!r} was deleted and created anew; publish again", topic=topic)

    def read(self, at: TopicPartition, offset: int, *, end: int, max_bytes: int) -> list[StoredBatch]:
        """See `EventLog.read`."""
        topic_id = self.catalog.id_of(at.topic)
        parameters = {"t": topic_id, "p": at.partition, "at": offset, "until": end, "max_bytes": max_bytes}
        with self.database.read() as connection:
            found = _read.rows(connection, parameters)
            if not found or found[0][0] > offset:
                self._require_held(connection, at, offset, end)
        return [
            StoredBatch(at.topic, at.partition, base, count, append_micros, codec, bytes(blob))
            for base, count, append_micros, codec, blob in found
        ]

    def _require_held(self, connection: Connection, at: TopicPartition, offset: int, end: int) -> None:
        row = connection.execute(_span, {"t": self.catalog.id_of(at.topic), "p": at.partition}).one_or_none()
        if row is None:
            self._explain_missing(at.topic, [at.partition])
            return
        if offset < row.begin_offset:
            raise OffsetOutOfRangeError(
                f"topic {at.topic!r} partition {at.partition}: records {offset} to {row.begin_offset - 1} are gone "
                "(retention passed them); move the group on with stream.seek(group, 'earliest'), or raise the "
                "topic's retention_cap",
                topic=at.topic,
                partition=at.partition,
                lost_from=offset,
                lost_to=row.begin_offset,
            )
        if offset < end or offset > row.end_offset:
            raise OffsetOutOfRangeError(
                f"topic {at.topic!r} partition {at.partition} ends at offset {row.end_offset}, but {offset} to {end} "
                "was to be read: the stream was truncated or restored from a backup",
                topic=at.topic,
                partition=at.partition,
                end=row.end_offset,
            )

    def spans(self, topics: Sequence[str]) -> dict[TopicPartition, PartitionSpan]:
        """See `EventLog.spans`."""
        names = {self.catalog.id_of(topic): topic for topic in topics}
        with self.database.read() as connection:
            found = connection.execute(_spans, {"ts": list(names)}).all()
        return {
            TopicPartition(names[topic_id], partition): PartitionSpan(begin, end, last)
            for topic_id, partition, begin, end, last in found
        }

    def offset_at(self, at: TopicPartition, micros: int) -> int:
        """See `EventLog.offset_at`."""
        parameters = {"t": self.catalog.id_of(at.topic), "p": at.partition, "micros": micros}
        with self.database.read() as connection:
            found = connection.execute(_at_time, parameters).scalar_one()
            return int(found if found is not None else connection.execute(_span, parameters).one().end_offset)

    def with_event_times(
        self, at: TopicPartition, first: int, last: int, *, start: int, end: int
    ) -> list[tuple[int, int]]:
        """See `EventLog.with_event_times`."""
        if end <= start:
            return []
        parameters = {"t": self.catalog.id_of(at.topic), "p": at.partition, "first": first, "last": last}
        found: list[tuple[int, int]] = []
        with self.database.read() as connection:
            for base, count in connection.execute(_in_event_times, {**parameters, "start": start, "until": end}):
                low, high = max(base, start), min(base + count, end)
                if found and found[-1][1] == low:
                    found[-1] = (found[-1][0], high)
                elif high > low:
                    found.append((low, high))
        return found

    def append_time_of(self, at: TopicPartition, offset: int) -> int | None:
        """See `EventLog.append_time_of`."""
        with self.database.read() as connection:
            return self.append_time_in(connection, at, offset)

    def append_time_in(self, connection: Connection, at: TopicPartition, offset: int) -> int | None:
        """`append_time_of` within a transaction."""
        parameters = {"t": self.catalog.id_of(at.topic), "p": at.partition, "at": offset}
        row = _floor.first(connection, parameters)
        if row is None:
            return None
        base, count, _, _, append_micros = row
        return None if offset >= base + count else int(append_micros)

    def backlog(self, positions: Mapping[TopicPartition, int]) -> Backlog:
        """See `EventLog.backlog`."""
        with self.database.read() as connection:
            found = []
            for at, committed in positions.items():
                parameters = {"t": self.catalog.id_of(at.topic), "p": at.partition}
                part = connection.execute(
                    sa.select(_parts).where(_parts.c.topic_id == _t, _parts.c.partition == _p), parameters
                ).one()
                start = max(committed, part.begin_offset)
                floor = _floor.first(connection, {**parameters, "at": start})
                found.append((start, part.end_offset, part.end_bytes, part.last_append_micros, *(floor or (None,) * 5)))
            return backlog_of(found, self.database.now_micros(connection))

    def cut(self, at: TopicPartition, start: int, end: int, *, max_bytes: int) -> int:
        """See `EventLog.cut`."""
        if start >= end or max_bytes <= 0:
            return start
        here: dict[str, object] = {"t": self.catalog.id_of(at.topic), "p": at.partition}
        with self.database.read() as connection:
            first = _floor.first(connection, {**here, "at": start})
            if first is None:
                return end  # reading will say that the records are gone
            base, _, base_bytes, _, _ = first
            limit = base_bytes + max_bytes
            if start > base:
                limit += sum(self._sizes(at, base)[: start - base])
            beyond = _first_beyond.first(connection, {**here, "first": base, "until": end, "limit_bytes": limit})
            last = _floor.first(connection, {**here, "at": (end if beyond is None else beyond[0]) - 1})
        if last is None:
            return end  # trimmed between two look-ups
        base, count, base_bytes, size, _ = map(int, last)
        if base_bytes + size <= limit:
            return min(end, base + count)
        room = limit - base_bytes
        for index, size in enumerate(self._sizes(at, base)):
            room -= size
            if room < 0:
                return max(min(end, base + index), start)
        return min(end, base + count)

    def _sizes(self, at: TopicPartition, base_offset: int) -> list[int]:
        return record_sizes(self.read(at, base_offset, end=base_offset + 1, max_bytes=1)[0])

    def trim(self, now_micros: int | None = None) -> list[TrimReport]:
        """See `EventLog.trim`."""
        return retention.trim(self.database, self.catalog, now_micros)

    def watch(self) -> Watcher:
        """See `EventLog.watch`."""
        return watch(self.database)

    def now_micros(self) -> int:
        """See `EventLog.now_micros`."""
        local = self.database.local_micros()
        if local is not None:
            return local
        with self.database.read() as connection:
            return self.database.now_micros(connection)


def _row_of(topic_id: int, batch: EncodedBatch, offset: int, total: int, at_micros: int) -> dict[str, object]:
    return {
        "topic_id": topic_id,
        "partition": batch.partition,
        "base_offset": offset,
        "count": batch.count,
        "base_bytes": total,
        "bytes": len(batch.blob),
        "append_micros": at_micros,
        "min_event_micros": at_micros if batch.min_event_micros is None else batch.min_event_micros,
        "max_event_micros": at_micros if batch.max_event_micros is None else batch.max_event_micros,
        "codec": batch.codec,
        "blob": batch.blob,
    }


def backlog_of(rows: Sequence[Sequence[Any]], now_micros: int) -> Backlog:
    """Sum up (start, end, end bytes, last append, and the record batch holding start) of each partition."""
    events = size = 0
    estimated = False
    oldest: int | None = None
    newest: int | None = None
    for start, end, end_bytes, last, base, count, base_bytes, row_bytes, append_micros in rows:
        now_micros = max(now_micros, last)
        if start >= end:
            continue
        if base is None or count is None or base_bytes is None or row_bytes is None or append_micros is None:
            continue  # trimmed between two look-ups
        done = row_bytes * (start - base) // count
        estimated |= start > base
        events += end - start
        size += end_bytes - base_bytes - done
        oldest = append_micros if oldest is None else min(oldest, append_micros)
        newest = last if newest is None else max(newest, last)
    return Backlog(events, size, estimated, oldest, newest, now_micros)
