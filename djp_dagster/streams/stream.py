"""`EventStream`: what publishers, consumers and tools hold in their hands."""

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, cast

from djp_dagster.errors import InvalidSettingError, LeaseBusyError
from djp_dagster.events import Event
from djp_dagster.streams.claimed import ClaimedData
from djp_dagster.streams.contracts import Coordinator, EventLog
from djp_dagster.streams.location import default_folder, prepared_default_url
from djp_dagster.streams.model import Appended, Backlog, DeadLetter, GroupInfo, Output, Start, TopicInfo, TrimReport
from djp_dagster.streams.publishing import Producer, route
from djp_dagster.streams.records import Record, TopicPartition, decode_records, to_micros
from djp_dagster.streams.topics import Topic
from djp_dagster.units import Duration, parse_seconds

if TYPE_CHECKING:
    from djp_dagster.claim_check.collection import CollectionReport
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.processing.consumer import Consumer
    from djp_dagster.state.view import StateView
    from djp_dagster.streams.sql.database import Clock

_READ_BYTES = 4 << 20
ROOM = "stream"
"""By this name a stream has announced that it keeps references to payloads."""
StartPosition = str | datetime
"""``"earliest"``, ``"latest"``, or the time from which on records are wanted."""


def parse_start(start: StartPosition) -> Start:
    """The start position in the store's terms.

    Raises:
        InvalidSettingError: neither earliest, latest nor a time with a zone.
    """
    if isinstance(start, datetime) and start.tzinfo is not None:
        return to_micros(start)
    if start in ("earliest", "latest"):
        return cast(Start, start)
    raise InvalidSettingError(
        f"start={start!r} must be 'earliest', 'latest' or a datetime with a time zone", setting="start", value=start
    )


class EventStream:
    """A durable event stream: topics, consumer groups, and what they have done. Works in any process, without Dagster.

    Safe to share between threads; open one per process. Make it with `open_stream`.

    Example:
        >>> from djp_dagster import Topic, testing
        >>> with testing.memory_stream() as stream:
        ...     clicks = Topic("clicks", partitions=4, key="user_id")
        ...     _ = stream.create_topic(clicks)
        ...     _ = stream.publish(clicks, [clicks.event(user_id="u1"), clicks.event(user_id="u2")])
        ...     sum(len(list(stream.records("clicks", partition))) for partition in range(4))
        2
    """

    def __init__(
        self, log: EventLog, coordinator: Coordinator, *, label: str, payloads: "PayloadStore | None" = None
    ) -> None:
        self.log = log
        self.coordinator = coordinator
        self.label = label
        # A prefix of its own: a stream that is made anew must not be taken for the one before it.
        self._payloads = None if payloads is None else payloads.within(log.incarnation, room=ROOM)
        self.claimed = ClaimedData(self._payloads, label)

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release all connections."""
        closer = getattr(self.log, "database", None)
        if closer is not None:
            closer.close()

    @property
    def incarnation(self) -> str:
        """The identity of this stream; positions kept elsewhere carry it."""
        return self.log.incarnation

    @property
    def payloads(self) -> "PayloadStore":
        """Where batch outputs lie.

        Raises:
            InvalidSettingError: the stream was opened without a payload store.
        """
        if self._payloads is None:
            raise InvalidSettingError(
                f"stream {self.label} has no payload store, and an output must go somewhere; open it with "
                "payloads=open_payload_store(folder)",
                setting="payloads",
                value=None,
            )
        return self._payloads

    @property
    def has_payloads(self) -> bool:
        """Whether there is a place for batch outputs."""
        return self._payloads is not None

    def collect_payloads(self, *, grace: Duration = "1d", dry_run: bool = True) -> "CollectionReport":
        """Find payloads that no record, dead letter or output refers to any more, and delete them in time.

        See `djp_dagster.claim_check.collection.collect`.

        Raises:
            CollectionRefusedError, PayloadStoreUnavailableError, StreamUnavailableError: nothing wrong was deleted.
        """
        from djp_dagster.claim_check.collection import collect

        return collect(self.payloads, [StreamRoom(self.coordinator)], grace=grace, dry_run=dry_run)

    def create_topic(self, topic: Topic) -> TopicInfo:
        """Create the topic, or check that it was created alike; its retention may change.

        Raises:
            TopicMismatchError: it exists with other partitions, key or limit.
        """
        return self.log.create_topic(topic)

    def topics(self, *, internal: bool = False) -> list[TopicInfo]:
        """All topics by name; the library's own, such as changelogs, only on request."""
        return [info for info in self.log.topics() if internal or not info.name.startswith("__")]

    def delete_topic(self, topic: str | Topic) -> None:
        """Delete the topic and its records.

        Raises:
            InvalidSettingError: a group still reads it.
        """
        self.log.delete_topic(_name(topic))

    def publish(self, topic: str | Topic, events: Sequence[Event]) -> list[Appended]:
        """Append the events durably, all or none; they are in the stream when this returns.

        Args:
            topic: a topic, created before.
            events: what to append; one transaction, so keep it to some thousands.

        Returns:
            Where they went, per partition.

        Raises:
            UnknownTopicError, MissingKeyError, EventTooLargeError, InvalidEventError: nothing was appended.
            AmbiguousPublishError: the connection broke during COMMIT; a `producer` does not have this problem.
            StreamUnavailableError, StreamBusyError, StreamFullError: nothing was appended; try again.
        """
        info = self.log.topic(_name(topic))
        return self.log.append(list(route(info, events, self._payloads)))

    def producer(self, name: str, *, patience: Duration = "1min") -> Producer:
        """Open the named producer, fencing any earlier one of that name.

        Args:
            name: whose publishes are numbered, and appended once each.
            patience: how long an outage of the stream is waited for.
        """
        return Producer(self.log, name, payloads=self._payloads, retry_for_s=parse_seconds(patience, name="patience"))

    def records(
        self, topic: str | Topic, partition: int, start: int | None = None, end: int | None = None
    ) -> Iterator[Record]:
        """The records of a partition in order, read piece by piece; undecodable ones raise.

        Raises:
            OffsetOutOfRangeError: ``start`` is below retention.
            UndecodableRecordError: a record's bytes are no event.
        """
        for records, _ in self.record_batches(topic, partition, start, end):
            yield from records

    def record_batches(
        self, topic: str | Topic, partition: int, start: int | None = None, end: int | None = None
    ) -> Iterator[tuple[list[Record], int]]:
        """The same as lists, as they are stored; and about how many encoded bytes each is.

        Raises:
            OffsetOutOfRangeError, UndecodableRecordError: as `records`.
        """
        from djp_dagster.errors import UndecodableRecordError

        at = TopicPartition(_name(topic), partition)
        span = self.log.spans([at.topic])[at]
        offset = span.begin if start is None else start
        stop = span.end if end is None else min(end, span.end)
        while offset < stop:
            for batch in self.log.read(at, offset, end=stop, max_bytes=_READ_BYTES):
                records, bad = decode_records(batch, offset, stop, scope=self.incarnation[:12], claimed=self.claimed)
                if bad:
                    raise UndecodableRecordError(
                        f"record {bad[0].offset} of topic {at.topic!r} partition {partition} is no event: "
                        f"{bad[0].error}",
                        topic=at.topic,
                        partition=partition,
                        offset=bad[0].offset,
                    )
                yield records, round(len(batch.blob) * len(records) / (batch.end_offset - batch.base_offset))
                offset = min(batch.end_offset, stop)

    def groups(self) -> list[GroupInfo]:
        """All consumer groups, by name."""
        return self.coordinator.groups()

    def positions(self, group: str) -> dict[TopicPartition, int]:
        """The committed offsets of a group."""
        return self.coordinator.positions(group)

    def pending(self, group: str) -> Backlog:
        """How much, and how old, is what a group has yet to do; milliseconds at any backlog."""
        return self.coordinator.pending(group)

    def outputs(self, group: str, *, after: int = 0, limit: int = 1000) -> list[Output]:
        """Committed outputs of a group in commit order, from sequence ``after`` on."""
        return self.coordinator.outputs(group, after=after, limit=limit)

    def dead_letters(
        self, group: str | None = None, *, status: str | None = "pending", after: int = 0, limit: int = 1000
    ) -> list[DeadLetter]:
        """Dead letters by number from ``after`` on, at most ``limit``; by default the pending ones of all groups."""
        return self.coordinator.dead_letters(group, status=status, after=after, limit=limit)

    def discard_dead_letters(self, group: str, ids: Sequence[int]) -> int:
        """Mark pending dead letters as discarded; how many were."""
        return self.coordinator.discard_dead_letters(group, ids)

    def view(self, consumer: "Consumer", *, folder: Path | None = None) -> "StateView":
        """The state of a consumer, or a table, as it is now: a read-only replica. Close it after use.

        Args:
            consumer: whose state it is.
            folder: where replicas lie, for all processes of this host (``$DJP_STATE_FOLDER``, else ``.djp/state``).

        Raises:
            InvalidSettingError: the consumer keeps no state.
            StateLostError: neither a snapshot nor the beginning of its changelog is left.

        Example:
            >>> import tempfile
            >>> from djp_dagster import Table, Topic, testing
            >>> updates = Topic("updates", key="user_id")
            >>> emails = Table("emails", topic=updates, key="user_id", value="email")
            >>> with testing.memory_stream() as stream, tempfile.TemporaryDirectory() as folder:
            ...     _ = emails.register(stream)
            ...     [went] = stream.publish(updates, [updates.event(user_id="u1", email="a@b.c")])
            ...     with testing.kept_up_to_date(stream, emails), stream.view(emails, folder=Path(folder)) as view:
            ...         view.refresh(at_least={TopicPartition("updates", 0): went.base_offset + 1}).get("u1")
            'a@b.c'
        """
        from djp_dagster.state.view import StateView

        return StateView(self, consumer, folder=folder)

    def seek(
        self,
        group: str,
        to: StartPosition | Mapping[TopicPartition, int],
        *,
        reset_state: bool = False,
        wait: Duration = "30s",
    ) -> dict[TopicPartition, int]:
        """Move a group's committed offsets: what lies after them is handled (again), what lies before is not.

        Waits up to ``wait`` until nobody works on the group. An open batch is void then: seeking to where the group
        stands gets it past a batch that cannot succeed as it was cut. Dead letters and outputs stay as they are.

        Args:
            group: the consumer group.
            to: ``"earliest"``, ``"latest"``, a time, or offsets by partition.
            reset_state: for a stateful group, whose state and deadlines begin empty; its state belongs to the records
                it was made of.
            wait: how long to wait.

        Returns:
            The new committed offsets.

        Raises:
            LeaseBusyError: somebody still works on the group; it is named.
            OffsetOutOfRangeError: the log does not hold a wanted position.
            InvalidSettingError: ``reset_state`` does not fit the group.
        """
        target = to if isinstance(to, Mapping) else parse_start(to)
        give_up = time.monotonic() + parse_seconds(wait, name="wait")
        while True:
            try:
                return self.coordinator.seek(group, target, reset_state=reset_state)
            except LeaseBusyError:
                if time.monotonic() >= give_up:
                    raise
            time.sleep(0.1)

    def delete_group(self, group: str) -> None:
        """Delete a group: its offsets, deadlines, dead letters, output references, and its changelog.

        Raises:
            LeaseBusyError: somebody works on it; it is named.
        """
        self.coordinator.delete_group(group)

    def apply_retention(self) -> list[TrimReport]:
        """Remove what every topic's retention allows; what a group still needed is reported and logged as lost."""
        return self.log.trim()


class StreamRoom(NamedTuple):
    """A stream as one who keeps references to payloads."""

    coordinator: Coordinator

    @property
    def name(self) -> str:
        """As it was announced."""
        return ROOM

    def references(self) -> Iterator[bytes]:
        """See `Coordinator.references`."""
        return self.coordinator.references()


def _name(topic: str | Topic) -> str:
    return topic if isinstance(topic, str) else topic.name


def open_stream(
    target: str | Path | None = None,
    *,
    payloads: "PayloadStore | None" = None,
    default_payloads: "PayloadStore | None" = None,
    clock: "Clock | None" = None,
) -> EventStream:
    """Open a stream, creating it if it is not there.

    Args:
        target: a file (SQLite), or a URL: ``sqlite:///path``, ``postgresql+psycopg://user@host/database``. Unless
            given, where ``SqlEventStream()`` and ``djp`` find it: ``$DJP_STREAM_URL``, else a file under DAGSTER_HOME.
        payloads: where outputs of batches and heavy data of events go, below a prefix of the stream's own. Unless
            given, to the bucket ``$DJP_S3_BUCKET``, else to a folder beside the file.
        default_payloads: where to if neither is there, as with PostgreSQL.
        clock: seconds since 1970, for tests.

    Raises:
        StreamNotWritableError, StreamFormatError, StreamCorruptError, StreamUnavailableError: naming the place.
    """
    from djp_dagster.claim_check.location import bucket_of_environment, open_payload_store
    from djp_dagster.streams.sql.coordinator import SqlCoordinator
    from djp_dagster.streams.sql.database import Database
    from djp_dagster.streams.sql.log import SqlEventLog

    if target is None:
        target = prepared_default_url()
        default_payloads = default_payloads or open_payload_store(default_folder() / "payloads")
    url = str(target) if "://" in str(target) else f"sqlite:///{Path(target)}"
    database = Database(url, clock=clock)
    log = SqlEventLog(database)
    if payloads is None:
        payloads = bucket_of_environment()
    if payloads is None and database.path is not None:
        payloads = open_payload_store(database.path.with_name(f"{database.path.stem}-payloads"))
    if payloads is None:
        payloads = default_payloads
    return EventStream(log, SqlCoordinator(log), label=database.label, payloads=payloads)
