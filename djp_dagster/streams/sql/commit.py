"""Intents and the one atomic commit, on SQL.

Every statement that moves something states what it expects (epoch, owner, committed offset, changelog end) and counts
the rows it changed: one row too few means that somebody else has taken over, and the transaction rolls back.
"""

from collections.abc import Mapping, Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import DeadlineOvertakenError, FencedError, OffsetOutOfRangeError
from djp_dagster.streams.model import Appended, Commit, Deadline, Intent, Lease, NewDeadLetter
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.groups import decode_intent, encode_json
from djp_dagster.streams.sql.leases import SqlLeases, fenced
from djp_dagster.streams.sql.prepared import Prepared

_intents, _tasks, _positions = schema.intents, schema.tasks, schema.positions
_g: sa.BindParameter[int] = sa.bindparam("g")

_insert_intent = Prepared(sa.insert(_intents), columns=[column.name for column in _intents.c])
_select_intent = sa.select(_intents).where(_intents.c.batch_id == sa.bindparam("b"), _intents.c.group_id == _g)
_update_intent = (
    sa.update(_intents)
    .where(_intents.c.batch_id == sa.bindparam("b"), _intents.c.group_id == _g)
    .values(attempt=sa.bindparam("to_attempt"), running=sa.bindparam("to_running"), body=sa.bindparam("to_body"))
)
_delete_intent = Prepared(
    sa.delete(_intents).where(_intents.c.batch_id == sa.bindparam("b"), _intents.c.group_id == _g)
)
_mark_task = Prepared(
    sa.update(_tasks)
    .where(
        _tasks.c.group_id == _g,
        _tasks.c.task == sa.bindparam("of_task"),
        _tasks.c.epoch == sa.bindparam("of_epoch"),
        _tasks.c.owner == sa.bindparam("of_owner"),
    )
    .values(
        last_batch=sa.bindparam("b"),
        last_attempt=sa.bindparam("a"),
        last_epoch=sa.bindparam("of_epoch"),
        fired_micros=sa.case(
            (_tasks.c.fired_micros < sa.bindparam("now"), sa.bindparam("now")), else_=_tasks.c.fired_micros
        ),
    )
)
_move_position = Prepared(
    sa.update(_positions)
    .where(
        _positions.c.group_id == _g,
        _positions.c.topic_id == sa.bindparam("t"),
        _positions.c.partition == sa.bindparam("p"),
        _positions.c.committed == sa.bindparam("expected"),
    )
    .values(committed=sa.bindparam("to"))
)
_lock_group = sa.select(schema.groups.c.group_id).where(schema.groups.c.group_id == _g).with_for_update()
_due = (
    sa.select(schema.deadlines.c.task, schema.deadlines.c.key, schema.deadlines.c.due_micros)
    .where(
        schema.deadlines.c.group_id == _g,
        schema.deadlines.c.task.in_(sa.bindparam("of_tasks", expanding=True)),
        schema.deadlines.c.due_micros <= sa.bindparam("until"),
    )
    .order_by(schema.deadlines.c.due_micros, schema.deadlines.c.task, schema.deadlines.c.key)
    .limit(sa.bindparam("at_most"))
)
_next_due = sa.select(sa.func.min(schema.deadlines.c.due_micros)).where(
    schema.deadlines.c.group_id == _g, schema.deadlines.c.task.in_(sa.bindparam("of_tasks", expanding=True))
)


class SqlCommits(SqlLeases):
    """The part of `Coordinator` about intents, the commit and deadlines."""

    def begin(self, lease: Lease, intent: Intent) -> None:
        """See `Coordinator.begin`."""
        values = {
            "batch_id": intent.batch_id,
            "group_id": self.id_under(lease),
            "attempt": intent.attempt,
            "running": intent.running,
            "body": encode_json(intent).decode(),
        }
        with self.database.write() as connection:
            self.prolong(connection, lease.part(intent.tasks), self.database.now_micros(connection))
            _insert_intent.run(connection, values)

    def resume(self, lease: Lease, batch_id: str) -> Intent:
        """See `Coordinator.resume`."""
        with self.database.write() as connection:
            intent = self._load(connection, lease, batch_id)
            self.prolong(connection, lease.part(intent.tasks), self.database.now_micros(connection))
            intent = _next_attempt(intent)
            self._save(connection, lease, intent)
        return intent

    def update(self, lease: Lease, intent: Intent) -> None:
        """See `Coordinator.update`."""
        with self.database.write() as connection:
            self.prolong(connection, lease.part(intent.tasks), self.database.now_micros(connection))
            self._save(connection, lease, intent)

    def _load(self, connection: Connection, lease: Lease, batch_id: str) -> Intent:
        row = connection.execute(_select_intent, {"b": batch_id, "g": self.id_under(lease)}).one_or_none()
        if row is None:
            raise fenced(lease)
        return decode_intent(row.body)

    def _save(self, connection: Connection, lease: Lease, intent: Intent) -> None:
        parameters = {
            "b": intent.batch_id,
            "g": self.id_under(lease),
            "to_attempt": intent.attempt,
            "to_running": intent.running,
            "to_body": encode_json(intent).decode(),
        }
        if connection.execute(_update_intent, parameters).rowcount != 1:
            raise fenced(lease)

    def commit(self, commit: Commit) -> list[Appended]:
        """See `Coordinator.commit`."""
        group_id = self.id_under(commit.lease)
        with self.database.write() as connection:
            self._mark_tasks(connection, group_id, commit)
            if commit.output is not None:
                # Readers follow outputs by sequence, so they must become visible in that order.
                connection.execute(_lock_group, {"g": group_id})
            if commit.intent.deadlines or commit.intent.horizon_micros:
                self._require_inputs_read(connection, commit)
            appended = self._append(connection, commit)
            self._move_positions(connection, group_id, commit)
            self._record_effects(connection, group_id, commit)
            if _delete_intent.run(connection, {"b": commit.intent.batch_id, "g": group_id}) != 1:
                raise fenced(commit.lease)
            if appended:
                self.database.notify(connection)
        return appended

    def _mark_tasks(self, connection: Connection, group_id: int, commit: Commit) -> None:
        lease, intent = commit.lease, commit.intent
        now = intent.now_micros if intent.kind == "cut" and intent.command is None else 0
        parameters = [
            {
                "g": group_id,
                "of_task": task,
                "of_epoch": lease.epochs[task],
                "of_owner": lease.owner,
                "b": intent.batch_id,
                "a": intent.attempt,
                "now": now,
            }
            for task in sorted(intent.tasks)
        ]
        if _mark_task.run_each(connection, parameters) != len(parameters):
            raise fenced(lease)

    def _require_inputs_read(self, connection: Connection, commit: Commit) -> None:
        """No input may hold an unread record stamped before a deadline this batch fired, or before its horizon.

        The input partitions are locked until the transaction ends, so nothing can slip in behind the look. Partitions
        that this commit also appends to are locked here first, in the same order.
        """
        latest = max((deadline.due_micros for deadline in commit.intent.deadlines), default=0)
        latest = max(latest, commit.intent.horizon_micros)
        inputs = {(self.log.catalog.id_of(r.topic), r.partition) for r in commit.intent.ranges}
        appended_to = [*commit.emits, *(batch for batch, _ in commit.changelog)]
        others = {(self.log.catalog.id_of(batch.topic), batch.partition) for batch in appended_to}
        table = schema.partitions
        for topic_id, partition in sorted(inputs | others):
            query = sa.select(table.c.end_offset).where(table.c.topic_id == topic_id, table.c.partition == partition)
            connection.execute(query.with_for_update())
        for part in commit.intent.ranges:
            stamped = self.log.append_time_in(connection, part.at, part.end)
            if stamped is not None and stamped <= latest:
                raise DeadlineOvertakenError(
                    f"topic {part.topic!r} partition {part.partition} holds a record at offset {part.end} appended "
                    "before a deadline that this batch fired; the batch is cut longer and tried again",
                    topic=part.topic,
                    partition=part.partition,
                    offset=part.end,
                )

    def _append(self, connection: Connection, commit: Commit) -> list[Appended]:
        batches = [*commit.emits, *(batch for batch, _ in commit.changelog)]
        if not batches:
            return []
        expected: Mapping[TopicPartition, int] = {
            TopicPartition(batch.topic, batch.partition): offset for batch, offset in commit.changelog
        }
        try:
            return self.log.append_in(connection, batches, expected=expected)
        except OffsetOutOfRangeError as error:
            raise fenced(commit.lease) from error

    def _move_positions(self, connection: Connection, group_id: int, commit: Commit) -> None:
        if commit.intent.kind == "redrive" or not commit.intent.ranges:
            return
        parameters = [
            {
                "g": group_id,
                "t": self.log.catalog.id_of(part.topic),
                "p": part.partition,
                "expected": part.start,
                "to": part.end,
            }
            for part in commit.intent.ranges
        ]
        if _move_position.run_each(connection, parameters) != len(parameters):
            raise fenced(commit.lease)

    def _record_effects(self, connection: Connection, group_id: int, commit: Commit) -> None:
        if not (
            commit.output is not None
            or commit.dead_letters
            or commit.redriven
            or commit.redrive_failed
            or commit.deadlines
            or commit.intent.deadlines
            or commit.requests
        ):
            return
        now = self.database.now_micros(connection)
        if commit.output is not None:
            values = {
                "group_id": group_id,
                "batch_id": commit.intent.batch_id,
                "attempt": commit.intent.attempt,
                "payload": encode_json(commit.output).decode(),
                "committed_micros": now,
            }
            connection.execute(sa.insert(schema.outputs).inline(), values)
        _write_dead_letters(connection, group_id, commit, now)
        _write_deadlines(connection, group_id, commit)
        if commit.requests:
            table = schema.requests
            done = sa.update(table).where(table.c.group_id == group_id, table.c.id.in_(commit.requests))
            connection.execute(done.values(status="done"))

    def settle(self, commit: Commit) -> bool:
        """See `Coordinator.settle`."""
        lease, intent = commit.lease, commit.intent
        group_id = self.id_under(lease)
        query = (
            sa.select(_tasks)
            .where(_tasks.c.group_id == group_id, _tasks.c.task.in_(sorted(intent.tasks)))
            .order_by(_tasks.c.task)
            .with_for_update()
        )
        with self.database.write() as connection:
            rows = connection.execute(query).all()
            mine = [
                row.last_batch == intent.batch_id
                and row.last_attempt == intent.attempt
                and row.last_epoch == lease.epochs[row.task]
                for row in rows
            ]
            if rows and all(mine):
                return True
            held = [row.epoch == lease.epochs[row.task] and row.owner == lease.owner for row in rows]
            if any(mine) or not rows or not all(held):
                raise fenced(lease)
        return False

    def due_deadlines(self, group: str, tasks: Sequence[int], until_micros: int, limit: int) -> list[Deadline]:
        """See `Coordinator.due_deadlines`."""
        parameters = {"g": self.id_of(group), "of_tasks": list(tasks), "until": until_micros, "at_most": limit}
        with self.database.read() as connection:
            return [Deadline(*row) for row in connection.execute(_due, parameters)]

    def next_deadline(self, group: str, tasks: Sequence[int]) -> int | None:
        """See `Coordinator.next_deadline`."""
        with self.database.read() as connection:
            parameters = {"g": self.id_of(group), "of_tasks": list(tasks)}
            due: int | None = connection.execute(_next_due, parameters).scalar_one()
            return due


def _next_attempt(intent: Intent) -> Intent:
    """The intent as its next attempt begins: one that never said how it ended counts as a death, of its probe too."""
    probe, deaths = intent.probe, intent.deaths
    if intent.running:
        deaths += 1
        if probe is not None and probe.trying is not None:
            probe = msgspec.structs.replace(probe, died=probe.died + 1)
    return msgspec.structs.replace(intent, attempt=intent.attempt + 1, running=True, deaths=deaths, probe=probe)


def _write_dead_letters(connection: Connection, group_id: int, commit: Commit, now: int) -> None:
    table = schema.dead_letters
    if commit.dead_letters:
        rows = [_dead_letter_row(group_id, commit.intent.batch_id, letter, now) for letter in commit.dead_letters]
        connection.execute(sa.insert(table).inline(), rows)
    if commit.redriven:
        pending = sa.update(table).where(
            table.c.group_id == group_id, table.c.id.in_(commit.redriven), table.c.status == "pending"
        )
        done = connection.execute(pending.values(status="redriven", redrives=table.c.redrives + 1)).rowcount
        if done != len(commit.redriven):
            raise FencedError(
                f"dead letters {commit.redriven} of group {commit.lease.group!r} were redriven or discarded meanwhile",
                group=commit.lease.group,
            )
    for number, error_type, error in commit.redrive_failed:
        failed = sa.update(table).where(table.c.group_id == group_id, table.c.id == number)
        values = {"redrives": table.c.redrives + 1, "error_type": error_type, "error": error}
        connection.execute(failed.values(values))


def _dead_letter_row(group_id: int, batch_id: str, letter: NewDeadLetter, now: int) -> dict[str, object]:
    return {
        "group_id": group_id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "append_micros": letter.append_micros,
        "raw": letter.raw,
        "error_type": letter.error_type,
        "error": letter.error,
        "status": "pending",
        "redrives": 0,
        "batch_id": batch_id,
        "created_micros": now,
    }


def _write_deadlines(connection: Connection, group_id: int, commit: Commit) -> None:
    table = schema.deadlines
    gone = {(deadline.task, deadline.key) for deadline in commit.intent.deadlines} | set(commit.deadlines)
    if not gone:
        return
    delete = sa.delete(table).where(
        table.c.group_id == _g, table.c.task == sa.bindparam("of_task"), table.c.key == sa.bindparam("of_key")
    )
    connection.execute(delete, [{"g": group_id, "of_task": task, "of_key": key} for task, key in sorted(gone)])
    rows = [
        {"group_id": group_id, "task": task, "key": key, "due_micros": due}
        for (task, key), due in sorted(commit.deadlines.items())
        if due is not None
    ]
    if rows:
        connection.execute(sa.insert(table), rows)
