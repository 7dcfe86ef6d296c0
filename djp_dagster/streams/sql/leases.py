"""Leases and memberships, on SQL.

A lease is (owner, epoch, expiry by the store's clock). Taking a task over raises its epoch, which fences the former
holder: its next commit, heartbeat or intent finds another epoch and changes nothing. A lease cannot have more than its
own time to live left; one that seems to was granted before the clock went back, and is cut to that length when somebody
asks for it, so that a dead holder never outlives its lease by the size of the jump.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster.errors import FencedError, InvalidSettingError, LeaseBusyError, UnknownGroupError
from djp_dagster.streams.model import Intent, Lease, MemberInfo, Membership, TaskInfo
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.groups import SqlGroups, busy_error, decode_intent, is_held, open_intents, task_rows
from djp_dagster.streams.sql.prepared import Prepared

_tasks, _members = schema.tasks, schema.members
_g: sa.BindParameter[int] = sa.bindparam("g")

_prolong = Prepared(
    sa.update(_tasks)
    .where(
        _tasks.c.group_id == _g,
        _tasks.c.task == sa.bindparam("of_task"),
        _tasks.c.epoch == sa.bindparam("of_epoch"),
        _tasks.c.owner == sa.bindparam("of_owner"),
    )
    .values(expires_micros=sa.bindparam("until"))
)


_renew_member = Prepared(
    sa.update(_members)
    .where(_members.c.group_id == _g, _members.c.owner == sa.bindparam("of_owner"))
    .values(
        ttl_micros=sa.bindparam("ttl"),
        expires_micros=sa.bindparam("until"),
        paused=sa.bindparam("to_paused", type_=sa.Boolean()),
    )
)
_now: sa.BindParameter[int] = sa.bindparam("now", type_=sa.BigInteger())
# What has run out is kept for a while: it tells that its owner died, for whoever ends in order takes it away.
_KEEP_MICROS = 3_600_000_000
# Beyond twice its own time to live: written before the clock went back, and not by somebody who came a moment later.
_drop_members = Prepared(
    sa.delete(_members).where(
        _members.c.group_id == _g,
        sa.or_(
            _members.c.expires_micros <= _now - _KEEP_MICROS,
            _members.c.expires_micros > _now + 2 * _members.c.ttl_micros,
        ),
    )
)
_live_members = Prepared(
    sa.select(_members.c.owner, _members.c.asked_to_leave, _members.c.paused).where(
        _members.c.group_id == _g, _members.c.expires_micros > _now
    )
)


class SqlLeases(SqlGroups):
    """The part of `Coordinator` about leases and memberships."""

    def tasks(self, group: str) -> list[TaskInfo]:
        """See `Coordinator.tasks`."""
        with self.database.read() as connection:
            found = self._rows_of(connection, task_rows, group)
            now = self.database.now_micros(connection)
        return [
            TaskInfo(
                task=row.task,
                epoch=row.epoch,
                owner=row.owner,
                expires_micros=row.expires_micros,
                worth_asking=not is_held(row, now) or row.expires_micros - now > row.ttl_micros,
                last_batch=row.last_batch,
                last_attempt=row.last_attempt,
                fired_micros=row.fired_micros,
            )
            for row in found
        ]

    def acquire(self, group: str, tasks: Sequence[int] | None, owner: str, ttl_s: float) -> Lease:
        """See `Coordinator.acquire`."""
        busy: LeaseBusyError | None = None
        epochs: dict[int, int] = {}
        with self.database.write() as connection:
            group_id = self._id_in(connection, group)
            rows = self._locked_tasks(connection, group, group_id)
            now = self.database.now_micros(connection)
            bodies = connection.execute(open_intents, {"g": group_id}).scalars().all()
            wanted, intents = _whole_sets(set(rows if tasks is None else tasks), [decode_intent(b) for b in bodies])
            _require_tasks(group, wanted, rows)
            for task in sorted(wanted):
                if rows[task].owner != owner and is_held(rows[task], now):
                    busy = busy_error(group, rows[task], now)
                    self._shorten(connection, rows[task], now)
                    break
            else:
                epochs = self._take(connection, group_id, sorted(wanted), rows, owner, ttl_s, now)
        if busy is not None:
            raise busy
        self.forget_changelog(group)
        return Lease(group, owner, ttl_s, epochs, tuple(intents))

    def _take(
        self,
        connection: Connection,
        group_id: int,
        wanted: Sequence[int],
        rows: Mapping[int, Any],
        owner: str,
        ttl_s: float,
        now: int,
    ) -> dict[int, int]:
        # One epoch for the set, so that it serves as the fencing token of each of its tasks.
        epoch = max(int(rows[task].epoch) for task in wanted) + 1
        epochs = dict.fromkeys(wanted, epoch)
        table = _tasks
        statement = (
            sa.update(table)
            .where(table.c.group_id == _g, table.c.task == sa.bindparam("of_task"))
            .values(
                epoch=sa.bindparam("to_epoch"),
                owner=owner,
                ttl_micros=round(ttl_s * 1e6),
                expires_micros=now + round(ttl_s * 1e6),
            )
        )
        parameters = [{"g": group_id, "of_task": task, "to_epoch": epoch} for task, epoch in epochs.items()]
        connection.execute(statement, parameters)
        return epochs

    def heartbeat(self, leases: Sequence[Lease]) -> None:
        """See `Coordinator.heartbeat`."""
        leases = [lease for lease in leases if lease.epochs]
        if not leases:
            return
        with self.database.write() as connection:
            now = self.database.now_micros(connection)
            for lease in sorted(leases, key=lambda lease: lease.group):
                self.prolong(connection, lease, now)

    def prolong(self, connection: Connection, lease: Lease, now: int) -> None:
        """Prolong the lease within a transaction; raises `FencedError`."""
        until = now + round(lease.ttl_s * 1e6)
        group_id = self.id_under(lease)
        parameters = [
            {"g": group_id, "of_task": task, "of_epoch": epoch, "of_owner": lease.owner, "until": until}
            for task, epoch in sorted(lease.epochs.items())
        ]
        if _prolong.run_each(connection, parameters) != len(parameters):
            raise fenced(lease)

    def id_under(self, lease: Lease) -> int:
        """The number of the leased group; raises `FencedError` if there is none of that name any more."""
        try:
            return self.id_of(lease.group)
        except UnknownGroupError as error:
            raise fenced(lease) from error

    def release(self, lease: Lease) -> None:
        """See `Coordinator.release`."""
        table = _tasks
        statement = (
            sa.update(table)
            .where(
                table.c.group_id == _g,
                table.c.task == sa.bindparam("of_task"),
                table.c.epoch == sa.bindparam("of_epoch"),
                table.c.owner == lease.owner,
            )
            .values(owner=None, expires_micros=0)
        )
        try:
            group_id = self.id_under(lease)
        except FencedError:
            return
        parameters = [
            {"g": group_id, "of_task": task, "of_epoch": epoch} for task, epoch in sorted(lease.epochs.items())
        ]
        if parameters:
            with self.database.write() as connection:
                connection.execute(statement, parameters)
                self.database.notify(connection)

    def intents(self, group: str) -> list[Intent]:
        """See `Coordinator.intents`."""
        with self.database.read() as connection:
            bodies = connection.execute(open_intents, {"g": self._id_in(connection, group)}).scalars().all()
        return [decode_intent(body) for body in bodies]

    def join(self, group: str, owner: str, ttl_s: float, *, paused: bool = False) -> Membership:
        """See `Coordinator.join`."""
        with self.database.write() as connection:
            now, ttl = self.database.now_micros(connection), round(ttl_s * 1e6)
            member = {"g": self._id_in(connection, group), "of_owner": owner, "now": now, "ttl": ttl}
            member["to_paused"] = paused
            if _renew_member.run(connection, {**member, "until": now + ttl}) == 0:
                values: dict[str, object] = {
                    "group_id": member["g"],
                    "owner": owner,
                    "ttl_micros": ttl,
                    "expires_micros": now + ttl,
                }
                values |= {"paused": paused, "asked_to_leave": False}
                connection.execute(sa.insert(_members).values(values))
            _drop_members.run(connection, member)
            found = _live_members.rows(connection, member)
        wanting = sum(not asked and not waits for _, asked, waits in found)
        return Membership(wanting, any(asked for name, asked, _ in found if name == owner))

    def members(self, group: str) -> list[MemberInfo]:
        """See `Coordinator.members`."""
        query = sa.select(_members).where(_members.c.group_id == _g).order_by(_members.c.owner)
        with self.database.read() as connection:
            found = connection.execute(query, {"g": self._id_in(connection, group)}).all()
            now = self.database.now_micros(connection)
        return [
            MemberInfo(
                row.owner,
                live=now < row.expires_micros <= now + 2 * row.ttl_micros,
                paused=bool(row.paused),
                asked_to_leave=bool(row.asked_to_leave),
            )
            for row in found
        ]

    def ask_to_leave(self, group: str, name: str) -> int:
        """See `Coordinator.ask_to_leave`."""
        found = [member for member in self.members(group) if member.owner.startswith(name)]
        if found:
            owners = [member.owner for member in found]
            with self.database.write() as connection:
                asked = sa.update(_members).where(_members.c.group_id == _g, _members.c.owner.in_(owners))
                connection.execute(asked.values(asked_to_leave=True), {"g": self._id_in(connection, group)})
        return sum(member.live for member in found)

    def leave(self, group: str, owner: str) -> None:
        """See `Coordinator.leave`."""
        group_id = self.id_of(group)
        with self.database.write() as connection:
            connection.execute(sa.delete(_members).where(_members.c.group_id == group_id, _members.c.owner == owner))


def _whole_sets(wanted: set[int], intents: Sequence[Intent]) -> tuple[set[int], list[Intent]]:
    """Grow the tasks until every open intent is in it wholly or not at all."""
    grown = set(wanted)
    while True:
        touched = [intent for intent in intents if grown & set(intent.tasks)]
        larger = grown.union(*(intent.tasks for intent in touched))
        if larger == grown:
            return grown, touched
        grown = larger


def _require_tasks(group: str, wanted: set[int], rows: Mapping[int, object]) -> None:
    unknown = sorted(wanted - set(rows))
    if unknown:
        raise InvalidSettingError(
            f"group {group!r} has tasks 0 to {len(rows) - 1}, not {unknown}", setting="tasks", value=unknown
        )


def fenced(lease: Lease) -> FencedError:
    """The error of a lease that somebody else has taken over."""
    return FencedError(
        f"{lease.owner} lost its lease on group {lease.group!r} tasks {sorted(lease.epochs)}: another holder took over "
        "and continues; nothing of this attempt was committed",
        group=lease.group,
        owner=lease.owner,
    )
