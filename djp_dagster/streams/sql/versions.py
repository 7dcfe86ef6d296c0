"""Two versions of a group, and the moment in which one takes the place of the other, on SQL.

A group is who has done what; a version is what came of it: state, deadlines, dead letters, and the code that made them.
So the switch exchanges these between two groups, in one transaction, and whoever looks finds the one or the other,
whole. It expects the leases of both, and equal committed offsets; it raises all epochs, so that whoever still works for
either is fenced. Everything else that anybody knows the live group by stays as it is: its number, its outputs and how
far they are read, what was asked of it. The epochs of both go on from the higher one, so that fencing tokens only grow.
"""

from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import NotCaughtUpError
from djp_dagster.streams.model import Lease
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.groups import decode_intent, encode_json, open_intents, task_rows
from djp_dagster.streams.sql.snapshots import SqlSnapshots
from djp_dagster.streams.topics import changelog_of

_groups, _tasks, _positions, _intents = schema.groups, schema.tasks, schema.positions, schema.intents
_letters, _topics = schema.dead_letters, schema.topics
_OF_A_VERSION = (_positions, schema.deadlines, schema.snapshots, _letters)


class SqlVersions(SqlSnapshots):
    """The part of `Coordinator` about versions of a group."""

    def take_over(self, group: str, owner: str, ttl_s: float) -> Lease:
        """See `Coordinator.take_over`."""
        with self.database.write() as connection:
            group_id = self._id_in(connection, group)
            rows = self._locked_tasks(connection, group, group_id)
            now = self.database.now_micros(connection)
            bodies = connection.execute(open_intents, {"g": group_id}).scalars().all()
            # Whoever tried them was not killed by them.
            intents = [msgspec.structs.replace(decode_intent(body), running=False) for body in bodies]
            for intent in intents:
                ended = sa.update(_intents).where(_intents.c.batch_id == intent.batch_id)
                connection.execute(ended.values(running=False, body=encode_json(intent).decode()))
            epochs = self._take(connection, group_id, sorted(rows), rows, owner, ttl_s, now)
        self.forget_changelog(group)
        return Lease(group, owner, ttl_s, epochs, tuple(intents))

    def swap(self, live: Lease, follower: Lease, *, becomes: str) -> None:
        """See `Coordinator.swap`."""
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            # In the order of names, as heartbeats lock them.
            for lease in sorted((live, follower), key=lambda one: one.group):
                self.prolong(connection, lease, now)
            here, there = (self._id_in(connection, lease.group) for lease in (live, follower))
            self._require_equal(connection, live.group, follower.group, here, there)
            if becomes != follower.group:
                self._delete_if_there(connection, becomes)
            self._keep_discarded(connection, here, there)
            self._exchange(connection, here, there)
            self._exchange_changelogs(connection, changelog_of(live.group), changelog_of(follower.group))
            self._rename(connection, there, follower.group, becomes)
            self._fence(connection, here, there)
            self.database.notify(connection)
        for name in (live.group, follower.group, becomes):
            self._ids.pop(name, None)
            self.log.catalog.forget(changelog_of(name))

    def _require_equal(self, connection: Connection, live: str, follower: str, here: int, there: int) -> None:
        def committed(group_id: int) -> dict[tuple[int, int], int]:
            query = sa.select(_positions).where(_positions.c.group_id == group_id)
            return {(row.topic_id, row.partition): row.committed for row in connection.execute(query)}

        ours, theirs = committed(here), committed(there)
        if ours != theirs:
            behind = sum(ours.values()) - sum(theirs.values())
            raise NotCaughtUpError(
                f"group {follower!r} is {behind} records behind {live!r}; let it catch up, then promote it",
                group=follower,
                records=behind,
            )

    def _delete_if_there(self, connection: Connection, name: str) -> None:
        query = sa.select(_groups.c.group_id).where(_groups.c.name == name)
        group_id = connection.execute(query).scalar_one_or_none()
        if group_id is None:
            return
        # Locks in the order of a commit.
        connection.execute(task_rows.with_for_update(), {"g": group_id}).all()
        for table in self.tables_of_groups:
            connection.execute(sa.delete(table).where(table.c.group_id == group_id))
        self.log.catalog.delete_in(connection, changelog_of(name))

    @staticmethod
    def _keep_discarded(connection: Connection, here: int, there: int) -> None:
        """What somebody has decided to do without is not pending again because the follower has failed on it, too."""
        place = (_letters.c.topic, _letters.c.partition, _letters.c.offset)
        discarded = sa.select(*place).where(_letters.c.group_id == here, _letters.c.status == "discarded")
        again = sa.update(_letters).where(_letters.c.group_id == there, _letters.c.status == "pending")
        connection.execute(again.where(sa.tuple_(*place).in_(discarded)).values(status="discarded"))

    @staticmethod
    def _exchange(connection: Connection, here: int, there: int) -> None:
        for table in _OF_A_VERSION:
            # Below 0 there is nobody's number.
            for number, to in ((here, -here), (there, here), (-here, there)):
                connection.execute(sa.update(table).where(table.c.group_id == number).values(group_id=to))
        both = connection.execute(sa.select(_groups).where(_groups.c.group_id.in_((here, there)))).all()
        codes: dict[int, Any] = {row.group_id: row.code_version for row in both}
        for number, other in ((here, there), (there, here)):
            made_by = sa.update(_groups).where(_groups.c.group_id == number)
            connection.execute(made_by.values(code_version=codes[other]))

    @staticmethod
    def _exchange_changelogs(connection: Connection, one: str, other: str) -> None:
        named = sa.select(_topics.c.topic_id, _topics.c.name).where(_topics.c.name.in_((one, other)))
        ids = {row.name: row.topic_id for row in connection.execute(named)}
        # Names are unique at every moment.
        for topic_id, name in ((ids[one], f"-{ids[one]}"), (ids[other], one), (ids[one], other)):
            connection.execute(sa.update(_topics).where(_topics.c.topic_id == topic_id).values(name=name))

    @staticmethod
    def _rename(connection: Connection, group_id: int, name: str, to: str) -> None:
        connection.execute(sa.update(_groups).where(_groups.c.group_id == group_id).values(name=to))
        renamed = sa.update(_topics).where(_topics.c.name == changelog_of(name))
        connection.execute(renamed.values(name=changelog_of(to)))

    @staticmethod
    def _fence(connection: Connection, here: int, there: int) -> None:
        """Nobody holds anything of either, and nothing is under way."""
        both = (here, there)
        # Nothing of an open batch has been committed, and it was cut for another state.
        connection.execute(sa.delete(_intents).where(_intents.c.group_id.in_(both)))
        of_both = _tasks.c.group_id.in_(both)
        epoch = connection.execute(sa.select(sa.func.max(_tasks.c.epoch)).where(of_both)).scalar_one()
        free = sa.update(_tasks).where(of_both).values(epoch=epoch + 1, owner=None, expires_micros=0)
        connection.execute(free)
        # Whoever worked for the follower did so under a name that is gone.
        for table in (schema.members, schema.requests):
            connection.execute(sa.delete(table).where(table.c.group_id == there))
