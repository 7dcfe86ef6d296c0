"""What stands in every stream file before the first event: format version, incarnation; and the topics."""

import contextlib
from collections.abc import Iterable
from uuid import uuid4

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from djp_dagster._version import __version__
from djp_dagster.errors import (
    InvalidSettingError,
    StreamFormatError,
    TopicMismatchError,
    UnknownTopicError,
)
from djp_dagster.streams.model import TopicInfo
from djp_dagster.streams.sql import schema
from djp_dagster.streams.sql.database import Database, new_id
from djp_dagster.streams.topics import Retention, Topic
from djp_dagster.units import parse_bytes

_encode = msgspec.json.Encoder().encode
_decode_retention = msgspec.json.Decoder(Retention).decode
_CREATION_LOCK = 0x646A70  # any constant shared by all who create a stream's tables on one PostgreSQL database


def open_database(database: Database) -> str:
    """Create the tables, or check that they are ours; the stream's incarnation id.

    Raises:
        StreamFormatError: no stream, or one of a newer or older format.
    """
    database.require_readable()
    with database.read() as connection:
        if database.dialect == "postgresql":
            connection.rollback()
        existing = _existing_tables(connection)
    if schema.meta.name not in existing:
        _create(database, existing)
    with database.read() as connection:
        values = {row.key: row.value for row in connection.execute(sa.select(schema.meta))}
    _check_format(database, values)
    database.remember_file()
    return str(values["incarnation"])


def _existing_tables(connection: Connection) -> set[str]:
    return set(sa.inspect(connection).get_table_names())


def _create(database: Database, existing: set[str]) -> None:
    if database.dialect == "sqlite" and existing:
        raise StreamFormatError(
            f"stream {database.label}: the file is a SQLite database of something else ({sorted(existing)[:3]}...); "
            "choose another path",
            stream=database.label,
        )
    with database.write() as connection:
        if database.dialect == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATION_LOCK)))
        if schema.meta.name in _existing_tables(connection):
            return
        schema.metadata.create_all(connection)
        values = {
            "format_version": str(schema.FORMAT_VERSION),
            "incarnation": uuid4().hex,
            "created_by": f"djp-dagster {__version__}",
            "created_micros": str(database.now_micros(connection)),
        }
        connection.execute(sa.insert(schema.meta), [{"key": key, "value": value} for key, value in values.items()])


def _check_format(database: Database, values: dict[str, str]) -> None:
    found = values.get("format_version")
    if found == str(schema.FORMAT_VERSION) and "incarnation" in values:
        return
    version = int(found) if found and found.isdecimal() else 0
    remedy = "upgrade djp-dagster" if version > schema.FORMAT_VERSION else "open it once with the release that wrote it"
    raise StreamFormatError(
        f"stream {database.label}: format version {found!r}, this release reads {schema.FORMAT_VERSION}; {remedy} "
        f"(written by {values.get('created_by', 'an unknown release')})",
        stream=database.label,
        found=found,
        supported=schema.FORMAT_VERSION,
    )


class TopicCatalog:
    """The topics of a stream, and a cache of what never changes about them (identity and partition count)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, tuple[int, TopicInfo]] = {}
        self._names: dict[int, str] = {}
        self._forgotten = 0

    def create(self, topic: Topic) -> TopicInfo:
        """Create the topic, or return it if it was declared alike.

        Raises:
            TopicMismatchError: naming what differs.
        """
        with contextlib.suppress(UnknownTopicError):
            info = self.get(topic.name)
            _require_alike(info, topic)
            if (info.retention, info.offload_above) == (topic.limits, topic.offload_above_bytes):
                return info
        with self._database.write() as connection:
            now = self._database.now_micros(connection)
            if self._database.dialect == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_CREATION_LOCK)))
            existing = self._load(connection, topic.name)
            if existing is not None:
                _require_alike(existing[1], topic)
                table = schema.topics
                connection.execute(
                    sa.update(table)
                    .where(table.c.topic_id == existing[0])
                    .values(retention=_encode(topic.limits).decode(), offload_above=topic.offload_above_bytes)
                )
            else:
                self._insert(connection, topic, now)
        self.forget(topic.name)
        return self.get(topic.name)

    def _insert(self, connection: Connection, topic: Topic, now: int) -> None:
        result = connection.execute(
            sa.insert(schema.topics).values(
                name=topic.name,
                partitions=topic.partitions,
                key_path=topic.key,
                max_event_bytes=parse_bytes(topic.max_event_bytes),
                retention=_encode(topic.limits).decode(),
                offload_above=topic.offload_above_bytes,
                created_micros=now,
            )
        )
        rows = [
            {
                "topic_id": new_id(result),
                "partition": partition,
                "begin_offset": 0,
                "end_offset": 0,
                "end_bytes": 0,
                "last_append_micros": now,
            }
            for partition in range(topic.partitions)
        ]
        connection.execute(sa.insert(schema.partitions), rows)

    def _load(self, connection: Connection, name: str) -> tuple[int, TopicInfo] | None:
        row = connection.execute(sa.select(schema.topics).where(schema.topics.c.name == name)).one_or_none()
        return None if row is None else (int(row.topic_id), _info(row))

    def _entry(self, name: str) -> tuple[int, TopicInfo]:
        entry = self._known.get(name)
        if entry is None:
            before = self._forgotten
            with self._database.read() as connection:
                entry = self._load(connection, name)
            if entry is None:
                raise UnknownTopicError(
                    f"topic {name!r} does not exist in stream {self._database.label}; create it with "
                    f"stream.create_topic(Topic({name!r}, ...))",
                    topic=name,
                )
            if self._forgotten == before:  # else it may be what another thread has just been told to forget
                self._known[name] = entry
                self._names[entry[0]] = name
        return entry

    def get(self, name: str) -> TopicInfo:
        """The topic; raises `UnknownTopicError`."""
        return self._entry(name)[1]

    def id_of(self, name: str) -> int:
        """The topic's number; raises `UnknownTopicError`."""
        return self._entry(name)[0]

    def ids_of(self, names: Iterable[str]) -> list[int]:
        """The topics' numbers; raises `UnknownTopicError`."""
        return [self.id_of(name) for name in names]

    def name_of(self, topic_id: int) -> str:
        """The topic's name."""
        name = self._names.get(topic_id)
        if name is None:
            with self._database.read() as connection:
                query = sa.select(schema.topics.c.name).where(schema.topics.c.topic_id == topic_id)
                name = self._names[topic_id] = connection.execute(query).scalar_one()
        return name

    def all(self) -> list[TopicInfo]:
        """All topics, by name."""
        with self._database.read() as connection:
            return [_info(row) for row in connection.execute(sa.select(schema.topics).order_by(schema.topics.c.name))]

    def delete(self, name: str) -> None:
        """Delete the topic and its records.

        Raises:
            InvalidSettingError: a group reads it.
        """
        topic_id = self.id_of(name)
        with self._database.write() as connection:
            # Locked as `ensure_group` locks them, so that no group begins on a topic that is going.
            parts = sa.select(schema.partitions.c.partition).where(schema.partitions.c.topic_id == topic_id)
            connection.execute(parts.order_by(schema.partitions.c.partition).with_for_update()).all()
            query = (
                sa.select(schema.groups.c.name)
                .join(schema.positions, schema.positions.c.group_id == schema.groups.c.group_id)
                .where(schema.positions.c.topic_id == topic_id)
                .distinct()
            )
            readers = sorted(connection.execute(query).scalars())
            if readers:
                raise InvalidSettingError(
                    f"topic {name!r} is read by {readers}; delete these groups first", setting="topic", value=name
                )
            self.delete_in(connection, name)
        self.forget(name)

    def delete_in(self, connection: Connection, name: str) -> None:
        """Delete the topic and its records within a transaction; `forget` it afterwards."""
        entry = self._load(connection, name)
        if entry is not None:
            for table in (schema.record_batches, schema.partitions, schema.topics):
                connection.execute(sa.delete(table).where(table.c.topic_id == entry[0]))

    def empty_in(self, connection: Connection, name: str) -> None:
        """Replace the topic by a new one of the same name and shape; `forget` it afterwards."""
        entry = self._load(connection, name)
        if entry is not None:
            self.delete_in(connection, name)
            self._insert(connection, Topic(name, partitions=entry[1].partitions), self._database.now_micros(connection))

    def forget(self, name: str) -> None:
        """Drop the topic from the cache."""
        self._forgotten += 1
        entry = self._known.pop(name, None)
        if entry is not None:
            self._names.pop(entry[0], None)


def _info(row: sa.Row[tuple[object, ...]]) -> TopicInfo:
    return TopicInfo(
        name=row.name,
        partitions=row.partitions,
        key=row.key_path,
        max_event_bytes=row.max_event_bytes,
        retention=_decode_retention(row.retention),
        created_micros=row.created_micros,
        identity=str(row.topic_id),
        offload_above=row.offload_above,
    )


def _require_alike(info: TopicInfo, topic: Topic) -> None:
    declared = {
        "partitions": (info.partitions, topic.partitions),
        "key": (info.key, topic.key),
        "max_event_bytes": (info.max_event_bytes, parse_bytes(topic.max_event_bytes)),
    }
    for setting, (created, wanted) in declared.items():
        if created != wanted:
            raise TopicMismatchError(
                f"topic {topic.name!r} was created with {setting}={created!r} and is declared with {wanted!r}; "
                "it is fixed at creation: declare it alike, or use a new topic",
                topic=topic.name,
                setting=setting,
                created=created,
                declared=wanted,
            )
