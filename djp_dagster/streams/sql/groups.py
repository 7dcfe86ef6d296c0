"""Consumer groups and their committed offsets, on SQL."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import (
    GroupMismatchError,
    InvalidSettingError,
    LeaseBusyError,
    OffsetOutOfRangeError,
    StateLostError,
    UnknownGroupError,
    UnknownTopicError,
)
from djp_dagster.streams.model import Backlog, GroupInfo, GroupSpec, Intent, Start
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.database import Database, new_id
from djp_dagster.streams.sql.log import SqlEventLog, backlog_of
from djp_dagster.streams.topics import Topic, changelog_of, check_name

_groups, _tasks, _positions, _members = schema.groups, schema.tasks, schema.positions, schema.members
_parts, _rows, _intents = schema.partitions, schema.record_batches, schema.intents
_KNOWN_FOR_S = 1.0
"""Others may give a name to another group; what commits is fenced by the epoch, and what only looks is late by this."""
_g: sa.BindParameter[int] = sa.bindparam("g")

encode_json = msgspec.json.Encoder().encode
decode_intent = msgspec.json.Decoder(Intent).decode

_floor_offset = (
    sa.select(sa.func.max(_rows.c.base_offset))
    .where(
        _rows.c.topic_id == _positions.c.topic_id,
        _rows.c.partition == _positions.c.partition,
        _rows.c.base_offset <= _positions.c.committed,
    )
    .correlate(_positions)
    .scalar_subquery()
)
_pending = (
    sa.select(
        sa.case(
            (_positions.c.committed < _parts.c.begin_offset, _parts.c.begin_offset), else_=_positions.c.committed
        ).label("start"),
        _parts.c.end_offset,
        _parts.c.end_bytes,
        _parts.c.last_append_micros,
        _rows.c.base_offset,
        _rows.c["count"],
        _rows.c.base_bytes,
        _rows.c.bytes,
        _rows.c.append_micros,
    )
    .select_from(
        _positions.join(
            _parts, sa.and_(_parts.c.topic_id == _positions.c.topic_id, _parts.c.partition == _positions.c.partition)
        ).outerjoin(
            _rows,
            sa.and_(
                _rows.c.topic_id == _positions.c.topic_id,
                _rows.c.partition == _positions.c.partition,
                _rows.c.base_offset == sa.func.coalesce(_floor_offset, _parts.c.begin_offset),
            ),
        )
    )
    .where(_positions.c.group_id == _g)
)
task_rows = sa.select(_tasks).where(_tasks.c.group_id == _g).order_by(_tasks.c.task)
open_intents = sa.select(_intents.c.body).where(_intents.c.group_id == _g).order_by(_intents.c.batch_id)


class SqlGroups:
    """The part of `Coordinator` about groups and offsets."""

    tables_of_groups = (
        _positions,
        _tasks,
        _members,
        _intents,
        schema.deadlines,
        schema.snapshots,
        schema.dead_letters,
        schema.outputs,
        schema.readers,
        schema.requests,
        _groups,
    )

    def __init__(self, log: SqlEventLog) -> None:
        self.log = log
        self.database: Database = log.database
        self._ids: dict[str, int] = {}
        self._looked_at: dict[str, float] = {}

    def forget_changelog(self, group: str) -> None:
        """Look it up anew: another process may have replaced it, by a seek."""
        self.log.catalog.forget(changelog_of(group))

    def id_of(self, name: str) -> int:
        """The group's number; raises `UnknownGroupError`."""
        known = self._ids.get(name)
        if known is not None and time.monotonic() < self._looked_at.get(name, 0.0) + _KNOWN_FOR_S:
            return known
        with self.database.read() as connection:
            return self._id_in(connection, name)

    def _id_in(self, connection: Connection, name: str) -> int:
        """The group's number as of now: others may have deleted it, and made it anew, since it was last looked up."""
        return int(self._row_in(connection, name).group_id)

    def _row_in(self, connection: Connection, name: str) -> sa.Row[Any]:
        row = connection.execute(sa.select(_groups).where(_groups.c.name == name)).one_or_none()
        if row is None:
            # Deleted, or called otherwise now: so is its changelog.
            self._ids.pop(name, None)
            self.log.catalog.forget(changelog_of(name))
            raise self._unknown(name)
        if self._ids.get(name) != row.group_id:
            # Made, or made anew, since this process last looked: so may its changelog be.
            self.log.catalog.forget(changelog_of(name))
            self._ids[name] = row.group_id
        self._looked_at[name] = time.monotonic()
        return row

    def _unknown(self, name: str) -> UnknownGroupError:
        return UnknownGroupError(
            f"consumer group {name!r} does not exist in stream {self.database.label}; "
            "it is created when its consumer first runs, or with consumer.register(stream)",
            group=name,
        )

    def _locked_tasks(self, connection: Connection, name: str, group_id: int) -> dict[int, sa.Row[Any]]:
        """All tasks of the group, locked in order, so that two overlapping sets cannot wait for each other."""
        rows = {row.task: row for row in connection.execute(task_rows.with_for_update(), {"g": group_id})}
        if not rows:
            raise self._unknown(name)  # it was deleted while its tasks were waited for
        return rows

    def _rows_of(self, connection: Connection, query: sa.Select[Any], group: str) -> Sequence[sa.Row[Any]]:
        """Rows that every group has."""
        found = connection.execute(query, {"g": self.id_of(group)}).all()
        return found or connection.execute(query, {"g": self._id_in(connection, group)}).all()

    def ensure_group(self, spec: GroupSpec) -> GroupInfo:
        """See `Coordinator.ensure_group`."""
        check_name("group", spec.name)
        if not spec.topics:
            raise InvalidSettingError(f"group {spec.name!r} reads no topic", setting="topics", value=())
        counts = [self.log.topic(topic).partitions for topic in spec.topics]
        try:
            info = self.group(spec.name)
        except UnknownGroupError:
            if spec.stateful:
                self.log.create_topic(Topic(changelog_of(spec.name), partitions=max(counts)))
            self._create(spec, max(counts))
            info = self.group(spec.name)
        if (info.topics, info.stateful) != (tuple(spec.topics), spec.stateful):
            raise GroupMismatchError(
                f"group {spec.name!r} was created for topics {info.topics} (stateful={info.stateful}) and is declared "
                f"for {spec.topics} (stateful={spec.stateful}); use another group name, or delete the group first",
                group=spec.name,
            )
        return info

    def _create(self, spec: GroupSpec, tasks: int) -> None:
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            # Locks in the order of the protocol; whoever comes second finds the group made.
            parts = self._lock_inputs(connection, spec.topics)
            if len(parts) != sum(self.log.topic(topic).partitions for topic in spec.topics):
                for topic in spec.topics:
                    self.log.catalog.forget(topic)
                raise UnknownTopicError(f"a topic of {spec.topics} was deleted meanwhile; try again", topic=spec.topics)
            if connection.execute(sa.select(_groups).where(_groups.c.name == spec.name)).first() is not None:
                return
            values = {
                "name": spec.name,
                "topics": encode_json(spec.topics).decode(),
                "tasks": tasks,
                "stateful": spec.stateful,
                "code_version": spec.code_version,
                "created_micros": now,
            }
            group_id = new_id(connection.execute(sa.insert(_groups).values(values)))
            rows = [
                {"group_id": group_id, "topic_id": part.topic_id, "partition": part.partition, "begun": start}
                for part, start in self._starts(connection, parts, spec)
            ]
            connection.execute(sa.insert(_positions), [row | {"committed": row["begun"]} for row in rows])
            connection.execute(sa.insert(_tasks), [_new_task(group_id, task) for task in range(tasks)])

    def _starts(
        self, connection: Connection, parts: Sequence[sa.Row[Any]], spec: GroupSpec
    ) -> list[tuple[sa.Row[Any], int]]:
        """Where a new group begins, or, of another version of a group, where the state of that one has begun."""
        if spec.version_of is None:
            return [(part, self._start_of(connection, part, spec.start)) for part in parts]
        query = sa.select(_positions).where(_positions.c.group_id == self._id_in(connection, spec.version_of))
        begun = {(row.topic_id, row.partition): row.begun for row in connection.execute(query)}
        starts = [(part, begun[part.topic_id, part.partition]) for part in parts]
        for part, start in starts:
            if start < part.begin_offset and not spec.from_what_is_left:
                topic = self.log.catalog.name_of(part.topic_id)
                raise StateLostError(
                    f"the state of {spec.version_of!r} cannot be made anew: it began at offset {start} of {topic!r} "
                    f"partition {part.partition}, and retention has removed what was before {part.begin_offset}; to "
                    "make it of what is left, say from_what_is_left=True",
                    topic=topic,
                    partition=part.partition,
                    begin=part.begin_offset,
                )
        return [(part, max(start, part.begin_offset)) for part, start in starts]

    def _start_of(self, connection: Connection, part: sa.Row[Any], start: Start) -> int:
        if start == "earliest":
            return int(part.begin_offset)
        if start == "latest":
            return int(part.end_offset)
        query = sa.select(sa.func.min(_rows.c.base_offset)).where(
            _rows.c.topic_id == part.topic_id,
            _rows.c.partition == part.partition,
            _rows.c.append_micros >= start,
        )
        found = connection.execute(query).scalar_one()
        return int(part.end_offset if found is None else found)

    def group(self, name: str) -> GroupInfo:
        """See `Coordinator.group`."""
        with self.database.read() as connection:
            return _group_info(self._row_in(connection, name))

    def groups(self) -> list[GroupInfo]:
        """See `Coordinator.groups`."""
        with self.database.read() as connection:
            return [_group_info(row) for row in connection.execute(sa.select(_groups).order_by(_groups.c.name))]

    def delete_group(self, name: str) -> None:
        """See `Coordinator.delete_group`."""
        with self.database.write() as connection:
            row = self._row_in(connection, name)
            group_id, stateful = row.group_id, bool(row.stateful)
            busy = self._holder_of(connection, name, group_id)
            if busy is None:
                for table in self.tables_of_groups:
                    connection.execute(sa.delete(table).where(table.c.group_id == group_id))
                if stateful:
                    self.log.catalog.delete_in(connection, changelog_of(name))
        if busy is not None:
            raise busy
        self._ids.pop(name, None)
        self.log.catalog.forget(changelog_of(name))

    def _lock_inputs(self, connection: Connection, topics: Sequence[str]) -> Sequence[sa.Row[Any]]:
        """The partitions of the topics, locked in the order that everybody locks them in."""
        query = (
            sa.select(_parts)
            .where(_parts.c.topic_id.in_(sorted(self.log.catalog.ids_of(topics))))
            .order_by(_parts.c.topic_id, _parts.c.partition)
            .with_for_update()
        )
        return connection.execute(query).all()

    def _holder_of(self, connection: Connection, name: str, group_id: int) -> LeaseBusyError | None:
        """Who holds a task of the group, to be raised after the transaction; locks the tasks."""
        now = self.database.now_micros(connection)
        for row in connection.execute(task_rows.with_for_update(), {"g": group_id}).all():
            if is_held(row, now):
                self._shorten(connection, row, now)
                return busy_error(name, row, now)
        return None

    def _shorten(self, connection: Connection, row: sa.Row[Any], now: int) -> None:
        if row.expires_micros - now <= row.ttl_micros:
            return
        table = _tasks
        connection.execute(
            sa.update(table)
            .where(table.c.group_id == row.group_id, table.c.task == row.task, table.c.epoch == row.epoch)
            .values(expires_micros=now + row.ttl_micros)
        )

    def positions(self, group: str) -> dict[TopicPartition, int]:
        """See `Coordinator.positions`."""
        query = (
            sa.select(_positions.c.topic_id, _positions.c.partition, _positions.c.committed)
            .where(_positions.c.group_id == _g)
            .order_by(_positions.c.topic_id, _positions.c.partition)
        )
        with self.database.read() as connection:
            found = self._rows_of(connection, query, group)
        name_of = self.log.catalog.name_of
        return {TopicPartition(name_of(row.topic_id), row.partition): row.committed for row in found}

    def pending(self, group: str) -> Backlog:
        """See `Coordinator.pending`."""
        with self.database.read() as connection:
            return self.backlog_in(connection, group)

    def backlog_in(self, connection: Connection, group: str) -> Backlog:
        """What is pending, inside a transaction."""
        found = self._rows_of(connection, _pending, group)
        return backlog_of(found, self.database.now_micros(connection))

    def seek(
        self, group: str, to: Start | Mapping[TopicPartition, int], *, reset_state: bool = False
    ) -> dict[TopicPartition, int]:
        """See `Coordinator.seek`."""
        moved: dict[TopicPartition, int] = {}
        info = self.group(group)
        if info.stateful != reset_state:
            raise InvalidSettingError(
                f"group {group!r} has {'' if info.stateful else 'no '}state: seek with reset_state={info.stateful}, "
                "because state belongs to the records it was made of",
                setting="reset_state",
                value=reset_state,
            )
        with self.database.write() as connection:
            group_id = self._id_in(connection, group)
            busy = self._holder_of(connection, group, group_id)
            if busy is None:
                moved = self._move(connection, info, group_id, to)
                # Nothing of an open batch has been committed, and with its epoch gone nothing of it can be.
                connection.execute(sa.delete(_intents).where(_intents.c.group_id == group_id))
                if reset_state:
                    begin = sa.update(_positions).where(_positions.c.group_id == group_id)
                    connection.execute(begin.values(begun=_positions.c.committed))
                    for table in (schema.deadlines, schema.snapshots):
                        connection.execute(sa.delete(table).where(table.c.group_id == group_id))
                    self.log.catalog.empty_in(connection, changelog_of(group))
                self.database.notify(connection)
        if busy is not None:
            raise busy
        self.log.catalog.forget(changelog_of(group))
        return moved

    def _move(
        self, connection: Connection, info: GroupInfo, group_id: int, to: Start | Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        moved = self._targets(connection, self._lock_inputs(connection, info.topics), to)
        statement = (
            sa.update(_positions)
            .where(_positions.c.group_id == _g, _positions.c.topic_id == sa.bindparam("t"))
            .where(_positions.c.partition == sa.bindparam("p"))
            .values(committed=sa.bindparam("to"))
        )
        id_of = self.log.catalog.id_of
        parameters = [
            {"g": group_id, "t": id_of(at.topic), "p": at.partition, "to": offset} for at, offset in moved.items()
        ]
        if parameters:
            connection.execute(statement, parameters)
        connection.execute(sa.delete(_intents).where(_intents.c.group_id == group_id))  # those that cannot finish
        connection.execute(sa.update(_tasks).where(_tasks.c.group_id == group_id).values(epoch=_tasks.c.epoch + 1))
        return moved

    def _targets(
        self, connection: Connection, parts: Sequence[sa.Row[Any]], to: Start | Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        spans = {TopicPartition(self.log.catalog.name_of(part.topic_id), part.partition): part for part in parts}
        if not isinstance(to, Mapping):
            return {at: self._start_of(connection, part, to) for at, part in spans.items()}
        for at, offset in to.items():
            part = spans.get(at)
            if part is None or not part.begin_offset <= offset <= part.end_offset:
                held = f"{part.begin_offset} to {part.end_offset}" if part is not None else "nothing"
                raise OffsetOutOfRangeError(
                    f"cannot seek {at.topic!r} partition {at.partition} to {offset}: it holds {held}",
                    topic=at.topic,
                    partition=at.partition,
                    offset=offset,
                )
        return dict(to)


def _new_task(group_id: int, task: int) -> dict[str, object]:
    return {
        "group_id": group_id,
        "task": task,
        "epoch": 0,
        "owner": None,
        "ttl_micros": 0,
        "expires_micros": 0,
        "last_batch": None,
        "last_attempt": 0,
        "last_epoch": 0,
        "fired_micros": 0,
    }


def is_held(row: sa.Row[Any], now: int) -> bool:
    """Whether somebody holds the task."""
    return row.owner is not None and row.expires_micros > now


def busy_error(group: str, row: sa.Row[Any], now: int) -> LeaseBusyError:
    """The error that names who holds the task, and for how long."""
    left_s = min(row.expires_micros - now, row.ttl_micros) / 1e6
    return LeaseBusyError(
        f"task {row.task} of group {group!r} is leased by {row.owner!r} for {left_s:.1f} s more unless prolonged; "
        "wait for it, or stop that worker or run",
        group=group,
        task=row.task,
        holder=row.owner,
        left_s=left_s,
    )


def _group_info(row: Any) -> GroupInfo:
    return GroupInfo(
        name=row.name,
        topics=tuple(msgspec.json.decode(row.topics)),
        tasks=row.tasks,
        stateful=bool(row.stateful),
        code_version=row.code_version,
        created_micros=row.created_micros,
    )
