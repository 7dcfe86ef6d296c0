"""Retention: what may go, what is held, and what goes in spite of being held.

A record batch older than the topic's ``age_s`` goes once every registered group has committed past it; open intents
start at committed offsets, so they are covered. Dead letters and replays hold nothing: a dead letter keeps its own copy
of the record. Older than ``cap_s`` it goes regardless; a group that still needed it is named in the report and the
log, and raises `OffsetOutOfRangeError` naming the range when it next reads.
"""

import logging

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import UnknownTopicError
from djp_dagster.streams.model import TopicInfo, TrimReport
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.catalog import TopicCatalog
from djp_dagster.streams.sql.database import Database

_log = logging.getLogger(__name__)
_rows = schema.record_batches
_parts = schema.partitions
_STEP_ROWS = 2000
"""Record batches deleted per transaction, so that trimming a long backlog never blocks appends for long."""


def trim(database: Database, catalog: TopicCatalog, now_micros: int | None) -> list[TrimReport]:
    """Apply the retention of every topic that has one."""
    reports = []
    for info in catalog.all():
        if info.retention.age_s is None and info.retention.cap_s is None:
            continue
        try:
            topic_id = catalog.id_of(info.name)
        except UnknownTopicError:
            continue
        for partition in range(info.partitions):
            report = _trim_partition(database, info, topic_id, partition, now_micros)
            if report is not None:
                reports.append(report)
    return reports


def _trim_partition(
    database: Database, info: TopicInfo, topic_id: int, partition: int, now_micros: int | None
) -> TrimReport | None:
    begin: int | None = None
    end = 0
    lost_by: set[str] = set()
    while True:
        with database.write() as connection:
            step = _trim_step(connection, info, topic_id, partition, now_micros or database.now_micros(connection))
        if step is None:
            break
        begin = step[0] if begin is None else begin
        end = step[1]
        lost_by |= step[2]
    if begin is None:
        return None
    if lost_by:
        _log.error(
            "retention cap of topic %r partition %d removed records %d to %d, some of which groups %s had not read",
            info.name,
            partition,
            begin,
            end - 1,
            sorted(lost_by),
        )
    return TrimReport(info.name, partition, begin, end, tuple(sorted(lost_by)))


def _trim_step(
    connection: Connection, info: TopicInfo, topic_id: int, partition: int, now: int
) -> tuple[int, int, set[str]] | None:
    """Remove some record batches: (first offset, end offset, groups that lost some); None when none may go.

    The partition row is locked first, as `ensure_group` does, so that no group starts at a record that is going.
    """
    here = (_parts.c.topic_id == topic_id, _parts.c.partition == partition)
    part = connection.execute(sa.select(_parts).where(*here).with_for_update()).one_or_none()
    if part is None:
        return None  # the topic was deleted meanwhile
    committed = _committed(connection, topic_id, partition)
    held = min(committed.values(), default=part.end_offset)
    may_go = min(
        _boundary(connection, topic_id, partition, now, info.retention.age_s),
        _row_start(connection, topic_id, partition, held, part.end_offset),
    )
    goal = max(may_go, _boundary(connection, topic_id, partition, now, info.retention.cap_s))
    in_partition = (_rows.c.topic_id == topic_id, _rows.c.partition == partition)
    query = (
        sa.select(_rows.c.base_offset, _rows.c["count"])
        .where(*in_partition, _rows.c.base_offset < goal)
        .order_by(_rows.c.base_offset)
        .limit(_STEP_ROWS)
    )
    found = connection.execute(query).all()
    if not found:
        return None
    base, count = found[-1]
    connection.execute(sa.delete(_rows).where(*in_partition, _rows.c.base_offset <= base))
    connection.execute(sa.update(_parts).where(*here).values(begin_offset=base + count))
    return part.begin_offset, base + count, {name for name, offset in committed.items() if offset < base + count}


def drop_before(database: Database, topic_id: int, partition: int, offset: int) -> None:
    """Remove the record batches that lie before ``offset`` as a whole, some at a time."""
    here = (_parts.c.topic_id == topic_id, _parts.c.partition == partition)
    covered = (
        _rows.c.topic_id == topic_id,
        _rows.c.partition == partition,
        _rows.c.base_offset + _rows.c["count"] <= offset,
    )
    query = sa.select(_rows.c.base_offset, _rows.c["count"]).where(*covered).order_by(_rows.c.base_offset)
    while True:
        with database.write() as connection:
            if connection.execute(sa.select(_parts.c.partition).where(*here).with_for_update()).one_or_none() is None:
                return
            found = connection.execute(query.limit(_STEP_ROWS)).all()
            if not found:
                return
            base, count = found[-1]
            connection.execute(sa.delete(_rows).where(*covered, _rows.c.base_offset <= base))
            connection.execute(sa.update(_parts).where(*here).values(begin_offset=base + count))


def _committed(connection: Connection, topic_id: int, partition: int) -> dict[str, int]:
    table = schema.positions
    query = (
        sa.select(schema.groups.c.name, table.c.committed)
        .join(schema.groups, schema.groups.c.group_id == table.c.group_id)
        .where(table.c.topic_id == topic_id, table.c.partition == partition)
    )
    return {row.name: row.committed for row in connection.execute(query)}


def _boundary(connection: Connection, topic_id: int, partition: int, now: int, age_s: float | None) -> int:
    """The first offset younger than ``age_s``; 0 if nothing is older."""
    if age_s is None:
        return 0
    query = (
        sa.select(_rows.c.base_offset + _rows.c["count"])
        .where(
            _rows.c.topic_id == topic_id,
            _rows.c.partition == partition,
            _rows.c.append_micros < now - round(age_s * 1e6),
        )
        .order_by(_rows.c.append_micros.desc(), _rows.c.base_offset.desc())
        .limit(1)
    )
    return connection.execute(query).scalar_one_or_none() or 0


def _row_start(connection: Connection, topic_id: int, partition: int, offset: int, end: int) -> int:
    """The start of the record batch holding ``offset``: only whole ones go."""
    if offset >= end:
        return end
    query = sa.select(sa.func.max(_rows.c.base_offset)).where(
        _rows.c.topic_id == topic_id, _rows.c.partition == partition, _rows.c.base_offset <= offset
    )
    return connection.execute(query).scalar_one() or 0
