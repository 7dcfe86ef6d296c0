"""Two versions of a group, and the moment in which one takes the place of the other, on SQL.

A group is known by its name, and everything it has by its number. So the switch is an exchange of names, of the groups
and of their changelogs, in one transaction: whoever looks a name up finds one version or the other, whole. It expects
the leases of both, and equal committed offsets; it raises all epochs, so that whoever still works for either under its
old name is fenced.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import NotCaughtUpError
from djp_dagster.streams.model import Lease
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.groups import decode_intent, open_intents, task_rows
from djp_dagster.streams.sql.snapshots import SqlSnapshots
from djp_dagster.streams.topics import changelog_of

_groups, _tasks, _positions = schema.groups, schema.tasks, schema.positions
_ASIDE = "__switching"


class SqlVersions(SqlSnapshots):
    """The part of `Coordinator` about versions of a group."""

    def take_over(self, group: str, owner: str, ttl_s: float) -> Lease:
        """See `Coordinator.take_over`."""
        with self.database.write() as connection:
            group_id = self._id_in(connection, group)
            rows = {row.task: row for row in connection.execute(task_rows.with_for_update(), {"g": group_id})}
            now = self.database.now_micros(connection)
            bodies = connection.execute(open_intents, {"g": group_id}).scalars().all()
            epochs = self._take(connection, group_id, sorted(rows), rows, owner, ttl_s, now)
        return Lease(group, owner, ttl_s, epochs, tuple(decode_intent(body) for body in bodies))

    def swap(self, live: Lease, follower: Lease, *, becomes: str) -> None:
        """See `Coordinator.swap`."""
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            numbers = {lease.group: self._id_in(connection, lease.group) for lease in (live, follower)}
            for lease in sorted((live, follower), key=lambda one: numbers[one.group]):
                self.prolong(connection, lease, now)
            old, new = numbers[live.group], numbers[follower.group]
            self._require_equal(connection, live.group, follower.group, old, new)
            third = connection.execute(
                sa.select(_groups.c.group_id).where(_groups.c.name == becomes, _groups.c.group_id.not_in((old, new)))
            ).scalar_one_or_none()
            if third is not None:
                self._delete_in(connection, third, becomes)
            self._rename(connection, old, live.group, _ASIDE)
            self._rename(connection, new, follower.group, live.group)
            self._rename(connection, old, _ASIDE, becomes)
            for table in (schema.outputs, schema.readers):
                connection.execute(sa.update(table).where(table.c.group_id == old).values(group_id=new))
            # Nothing of an open batch has been committed, and it bears a name that is another's now.
            connection.execute(sa.delete(schema.intents).where(schema.intents.c.group_id.in_((old, new))))
            both = _tasks.c.group_id.in_((old, new))
            connection.execute(sa.update(_tasks).where(both).values(epoch=_tasks.c.epoch + 1, owner=None))
            self.database.notify(connection)
        for name in (live.group, follower.group, becomes):
            self._ids.pop(name, None)
            self.log.catalog.forget(changelog_of(name))

    def _require_equal(self, connection: Connection, live: str, follower: str, old: int, new: int) -> None:
        def committed(group_id: int) -> dict[tuple[int, int], int]:
            query = sa.select(_positions).where(_positions.c.group_id == group_id)
            return {(row.topic_id, row.partition): row.committed for row in connection.execute(query)}

        here, there = committed(old), committed(new)
        if here != there:
            behind = sum(here.values()) - sum(there.values())
            raise NotCaughtUpError(
                f"group {follower!r} is {behind} records behind {live!r}; let it catch up, then promote it",
                group=follower,
                records=behind,
            )

    @staticmethod
    def _rename(connection: Connection, group_id: int, name: str, to: str) -> None:
        topics = schema.topics
        connection.execute(sa.update(_groups).where(_groups.c.group_id == group_id).values(name=to))
        renamed = sa.update(topics).where(topics.c.name == changelog_of(name)).values(name=changelog_of(to))
        connection.execute(renamed)

    def _delete_in(self, connection: Connection, group_id: Any, name: str) -> None:
        """Delete a group that nobody needs, with all it has."""
        for table in self.tables_of_groups:
            connection.execute(sa.delete(table).where(table.c.group_id == group_id))
        self.log.catalog.delete_in(connection, changelog_of(name))
