"""Snapshots of state, and what a group's state is made of, on SQL.

A snapshot becomes known in one transaction that checks the lease's epoch, so a holder that was fenced while it uploaded
makes nothing known. Only then, and in transactions of its own, the changelog loses what the oldest known snapshot
covers: a crash in between leaves more of it than is needed, which the next snapshot removes.
"""

from typing import Any

import msgspec
import sqlalchemy as sa

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.streams.model import GroupView, Lease, NewSnapshot, Snapshot
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.commit import SqlCommits
from djp_dagster.streams.sql.groups import encode_json
from djp_dagster.streams.sql.retention import drop_before
from djp_dagster.streams.topics import changelog_of

_snapshots, _parts = schema.snapshots, schema.partitions
_g: sa.BindParameter[int] = sa.bindparam("g")
_decode_payload = msgspec.json.Decoder(PayloadRef).decode


class SqlSnapshots(SqlCommits):
    """The part of `Coordinator` about snapshots."""

    def add_snapshot(self, lease: Lease, snapshot: NewSnapshot, *, keep: int) -> None:
        """See `Coordinator.add_snapshot`."""
        task, changelog_id = snapshot.task, self.log.catalog.id_of(changelog_of(lease.group))
        group_id = self.id_under(lease)
        mine = (_snapshots.c.group_id == group_id, _snapshots.c.task == task)
        values = {
            "group_id": group_id,
            "task": task,
            "changelog_id": changelog_id,
            "changelog_offset": snapshot.offset,
            "epoch": lease.epochs[task],
            "payload": encode_json(snapshot.payload).decode(),
            "mentions": snapshot.mentions,
        }
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            self.prolong(connection, lease.part([task]), now)
            connection.execute(sa.insert(_snapshots).values(created_micros=now, **values))
            query = sa.select(_snapshots.c.id, _snapshots.c.changelog_offset).where(*mine)
            known = connection.execute(query.order_by(_snapshots.c.id.desc())).all()
            kept = known[:keep]
            connection.execute(sa.delete(_snapshots).where(*mine, _snapshots.c.id < kept[-1].id))
        if len(kept) >= keep:
            drop_before(self.database, changelog_id, task, min(row.changelog_offset for row in kept))

    def snapshots(self, group: str, task: int) -> list[Snapshot]:
        """See `Coordinator.snapshots`."""
        topics = schema.topics
        query = (
            sa.select(_snapshots)
            .join(topics, topics.c.topic_id == _snapshots.c.changelog_id)
            .where(topics.c.name == changelog_of(group), _snapshots.c.task == task, _snapshots.c.group_id == _g)
            .order_by(_snapshots.c.id.desc())
        )
        with self.database.read() as connection:
            found = connection.execute(query, {"g": self._id_in(connection, group)})
            return [_snapshot(row) for row in found]

    def view(self, group: str) -> GroupView:
        """See `Coordinator.view`."""
        self.forget_changelog(group)
        topics = schema.topics
        ends = (
            sa.select(_parts.c.topic_id, _parts.c.partition, _parts.c.end_offset)
            .join(topics, topics.c.topic_id == _parts.c.topic_id)
            .where(topics.c.name == changelog_of(group))
            .order_by(_parts.c.partition)
        )
        table = schema.positions
        query = (
            sa.select(table.c.topic_id, table.c.partition, table.c.committed)
            .where(table.c.group_id == _g)
            .order_by(table.c.topic_id, table.c.partition)
        )
        with self.database.snapshot() as connection:
            rows = self._rows_of(connection, query, group)
            found = connection.execute(ends).all()
            backlog = self.backlog_in(connection, group)
        name_of = self.log.catalog.name_of
        positions = {TopicPartition(name_of(row.topic_id), row.partition): row.committed for row in rows}
        changelog = {row.partition: row.end_offset for row in found}
        return GroupView(positions, changelog, backlog, str(found[0].topic_id) if found else None)


def _snapshot(row: Any) -> Snapshot:
    return Snapshot(
        number=row.id,
        task=row.task,
        offset=row.changelog_offset,
        payload=_decode_payload(row.payload),
        mentions=bytes(row.mentions),
        created_micros=row.created_micros,
    )
