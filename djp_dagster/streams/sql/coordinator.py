"""`Coordinator` on SQL: outputs, dead letters and requests on top of groups and commits."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.model import DeadLetter, Lease, Output, ReaderPosition, Request
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.database import new_id
from djp_dagster.streams.sql.groups import encode_json
from djp_dagster.streams.sql.versions import SqlVersions
from djp_dagster.streams.topics import check_name

_letters, _outputs, _requests, _readers = schema.dead_letters, schema.outputs, schema.requests, schema.readers
_decode_payload = msgspec.json.Decoder(PayloadRef).decode
_ROWS_PER_PAGE = 64
_STATUSES = ("pending", "redriven", "discarded")


class SqlCoordinator(SqlVersions):
    """Groups, leases, intents, commits, outputs, dead letters and requests in SQLite or PostgreSQL."""

    def outputs(self, group: str, *, after: int = 0, limit: int = 1000) -> list[Output]:
        """See `Coordinator.outputs`."""
        query = (
            sa.select(_outputs)
            .where(_outputs.c.group_id == self.id_of(group), _outputs.c.sequence > after)
            .order_by(_outputs.c.sequence)
            .limit(limit)
        )
        with self.database.read() as connection:
            return [_output(row, group) for row in connection.execute(query)]

    def last_output(self, group: str) -> Output | None:
        """See `Coordinator.last_output`."""
        query = sa.select(_outputs).where(_outputs.c.group_id == self.id_of(group))
        with self.database.read() as connection:
            row = connection.execute(query.order_by(_outputs.c.sequence.desc()).limit(1)).one_or_none()
        return None if row is None else _output(row, group)

    def reader(self, group: str, name: str) -> ReaderPosition:
        """See `Coordinator.reader`."""
        query = sa.select(_readers).where(_readers.c.group_id == self.id_of(group), _readers.c.reader == name)
        with self.database.read() as connection:
            row = connection.execute(query).one_or_none()
        return ReaderPosition() if row is None else ReaderPosition(row.sequence, row.proposed, row.proposer)

    def move_reader(self, group: str, name: str, position: ReaderPosition) -> None:
        """See `Coordinator.move_reader`."""
        check_name("reader", name)
        with self.database.write() as connection:
            group_id = self._id_in(connection, group)
            # One at a time: two that come at once would both insert.
            groups = schema.groups
            connection.execute(sa.select(groups.c.group_id).where(groups.c.group_id == group_id).with_for_update())
            connection.execute(sa.delete(_readers).where(_readers.c.group_id == group_id, _readers.c.reader == name))
            values = {"group_id": group_id, "reader": name, **msgspec.structs.asdict(position)}
            connection.execute(sa.insert(_readers).values(values))

    def dead_letters(
        self, group: str | None = None, *, status: str | None = None, after: int = 0, limit: int = 1000
    ) -> list[DeadLetter]:
        """See `Coordinator.dead_letters`."""
        if status is not None and status not in _STATUSES:
            raise InvalidSettingError(f"status={status!r} is none of {_STATUSES}", setting="status", value=status)
        query = _letters_query().where(_letters.c.id > after).order_by(_letters.c.id).limit(limit)
        if group is not None:
            query = query.where(_letters.c.group_id == self.id_of(group))
        if status is not None:
            query = query.where(_letters.c.status == status)
        with self.database.read() as connection:
            return [_letter(row) for row in connection.execute(query)]

    def dead_letters_by_id(self, group: str, ids: Sequence[int]) -> list[DeadLetter]:
        """See `Coordinator.dead_letters_by_id`."""
        query = _letters_query().where(_letters.c.group_id == self.id_of(group), _letters.c.id.in_(list(ids)))
        with self.database.read() as connection:
            return [_letter(row) for row in connection.execute(query.order_by(_letters.c.id))]

    def count_dead_letters(self, group: str, status: str) -> int:
        """See `Coordinator.count_dead_letters`."""
        query = (
            sa.select(sa.func.count())
            .select_from(_letters)
            .where(_letters.c.group_id == self.id_of(group), _letters.c.status == status)
        )
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def discard_dead_letters(self, group: str, ids: Sequence[int]) -> int:
        """See `Coordinator.discard_dead_letters`."""
        statement = (
            sa.update(_letters)
            .where(
                _letters.c.group_id == self.id_of(group),
                _letters.c.id.in_(list(ids)),
                _letters.c.status == "pending",
            )
            .values(status="discarded")
        )
        with self.database.write() as connection:
            return connection.execute(statement).rowcount

    def references(self) -> Iterator[bytes]:
        """See `Coordinator.references`."""
        rows = schema.record_batches
        with self.database.snapshot() as connection:
            for number, held in ((rows.c.row_id, rows.c.blob), (_letters.c.id, _letters.c.raw)):
                yield from _paged(connection, number, held)
            for payload in _paged(connection, _outputs.c.sequence, _outputs.c.payload):
                yield payload.encode()
            snapshots = schema.snapshots
            for payload in _paged(connection, snapshots.c.id, snapshots.c.payload):
                yield payload.encode()
            yield from _paged(connection, snapshots.c.id, snapshots.c.mentions)

    def request(self, group: str, kind: str, body: Mapping[str, object]) -> int:
        """See `Coordinator.request`."""
        with self.database.write() as connection:
            values = {
                "group_id": self._id_in(connection, group),
                "kind": kind,
                "body": encode_json(body).decode(),
                "status": "open",
                "created_micros": self.database.now_micros(connection),
            }
            number = new_id(connection.execute(sa.insert(_requests).values(values)))
            self.database.notify(connection)
        return number

    def requests(self, group: str, *, status: str = "open") -> list[Request]:
        """See `Coordinator.requests`."""
        query = (
            sa.select(_requests)
            .where(_requests.c.group_id == self.id_of(group), _requests.c.status == status)
            .order_by(_requests.c.id)
        )
        with self.database.read() as connection:
            return [
                Request(row.id, group, row.kind, msgspec.json.decode(row.body), row.status, row.created_micros)
                for row in connection.execute(query)
            ]

    def request_status(self, request_id: int) -> str:
        """See `Coordinator.request_status`."""
        query = sa.select(_requests.c.status).where(_requests.c.id == request_id)
        with self.database.read() as connection:
            return str(connection.execute(query).scalar_one())

    def finish_request(self, lease: Lease, request_id: int, status: str) -> None:
        """See `Coordinator.finish_request`."""
        statement = (
            sa.update(_requests)
            .where(_requests.c.group_id == self.id_of(lease.group), _requests.c.id == request_id)
            .values(status=status)
        )
        with self.database.write() as connection:
            self.prolong(connection, lease, self.database.now_micros(connection))
            connection.execute(statement)


def _letters_query() -> sa.Select[Any]:
    groups = schema.groups
    return sa.select(_letters, groups.c.name.label("group_name")).join(groups, groups.c.group_id == _letters.c.group_id)


def _output(row: Any, group: str) -> Output:
    payload = _decode_payload(row.payload)
    return Output(row.sequence, group, row.batch_id, row.attempt, payload, row.committed_micros)


def _letter(row: Any) -> DeadLetter:
    return DeadLetter(
        id=row.id,
        group=row.group_name,
        topic=row.topic,
        partition=row.partition,
        offset=row.offset,
        append_micros=row.append_micros,
        raw=bytes(row.raw),
        error_type=row.error_type,
        error=row.error,
        status=row.status,
        redrives=row.redrives,
        batch_id=row.batch_id,
        created_micros=row.created_micros,
    )


def _paged(connection: sa.Connection, number: sa.Column[int], held: sa.Column[Any]) -> Iterator[Any]:
    last = -1
    while True:
        query = sa.select(number, held).where(number > last).order_by(number).limit(_ROWS_PER_PAGE)
        page = connection.execute(query).all()
        if not page:
            return
        yield from (row[1] for row in page)
        last = page[-1][0]
