"""`trace`: where one entity is in a chain of consumers, what has been done, and how long each step took."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal, cast

import msgspec
from msgspec import json

from djp_dagster.dags.event_dag import EventDag
from djp_dagster.errors import (
    InvalidEventError,
    InvalidSettingError,
    MissingKeyError,
    PayloadError,
    UnknownGroupError,
    UnknownTopicError,
)
from djp_dagster.joining.declaration import Join
from djp_dagster.joining.filling import is_there
from djp_dagster.joining.inspection import EventBuffer
from djp_dagster.partitioning import partition_of
from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.model import DeadLetter
from djp_dagster.streams.records import (
    DATAREF,
    Record,
    StoredBatch,
    TopicPartition,
    decode_records,
    encode_value,
    to_micros,
)
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic, key_of

Key = str | int
Status = Literal["done", "pending", "buffered", "dead letter", "expired", "failed", "nothing yet"]
_READ_BYTES = 4 << 20
_LETTERS_PER_PAGE = 1000


class Step(msgspec.Struct, frozen=True):
    """One consumer's part in the story of an entity.

    Attributes:
        consumer: its group.
        status: ``done``; ``pending``, not yet handled; ``buffered``, in a join that waits for other parts; ``dead
            letter``; ``expired`` or ``failed`` in a join; ``nothing yet``, no event has come so far.
        read, emitted: how many events of the entity.
        arrived: when the last of them that it reads was appended.
        finished: when the last that it emitted was; None if it emitted none.
        seconds: from the one to the other; for a join, from the first part on.
        missing: the parts a join still waits for.
    """

    consumer: str
    status: Status
    read: int
    emitted: int
    arrived: datetime | None
    finished: datetime | None
    seconds: float | None
    missing: tuple[str, ...] = ()


class Trace(msgspec.Struct, frozen=True):
    """Where an entity is.

    Attributes:
        steps: of all consumers, those before others first.
        complete: every consumer that got something of it is done, and every result topic has it.
    """

    key: Key
    steps: tuple[Step, ...]
    complete: bool

    @property
    def waits_for(self) -> list[str]:
        """The consumers at which it is."""
        return [step.consumer for step in self.steps if step.status not in ("done", "nothing yet")]


def trace(
    stream: EventStream, dag: EventDag, key: Key, *, since: datetime | None = None, state_folder: Path | None = None
) -> Trace:
    """Where the entity ``key`` is in the chain.

    An event is the entity's if its key is, or its subject, or in a topic without keys its id. Of each topic that is
    partitioned by a key, the one partition is searched that can hold the entity; of others, all. Record batches that do
    not hold the key's bytes are not decoded.

    Args:
        stream: where it happened.
        dag: the chain.
        key: of the entity, as in the events' key fields.
        since: look at what was appended from then on only.
        state_folder: where the replicas of joins lie (``$DJP_STATE_FOLDER``, else ``.djp/state``).

    Raises:
        InvalidSettingError: ``since`` has no time zone.

    Example:
        >>> import djp_dagster as djp
        >>> orders, bills = djp.Topic("orders", key="order"), djp.Topic("bills", key="order")
        >>> @djp.consumer(topic=orders, emits=[bills])
        ... def bill(batch): ...
        >>> with djp.testing.memory_stream() as stream:
        ...     _ = bill.register(stream), stream.publish(orders, [orders.event(order=7)])
        ...     trace(stream, djp.EventDag([bill]), 7).waits_for
        ['bill']
    """
    if since is not None and since.tzinfo is None:
        raise InvalidSettingError(f"trace(since={since!r}) needs a time zone", setting="since", value=since)
    found = {topic.name: list(_records(stream, topic, key, since)) for topic in dag.topics}
    steps = tuple(_step(stream, consumer, key, found, state_folder) for consumer in dag.in_order())
    reached = [step for step in steps if step.read]
    complete = bool(reached) and all(step.status == "done" for step in reached)
    return Trace(key, steps, complete and all(found[topic.name] for topic in dag.results))


def _step(
    stream: EventStream, consumer: Consumer, key: Key, found: dict[str, list[Record]], state_folder: Path | None
) -> Step:
    read = [record for topic in consumer.topics for record in found[topic.name]]
    emitted = [record for topic in consumer.emits for record in found[topic.name]]
    status, missing = _status(stream, consumer, key, read, state_folder)
    arrived = max((record.append_time for record in read), default=None)
    finished = max((record.append_time for record in emitted), default=None)
    began = min((record.append_time for record in read), default=None) if isinstance(consumer, Join) else arrived
    # What has come after the last that was emitted is another story.
    over = finished is not None and began is not None and finished >= began
    seconds = (finished - began).total_seconds() if over else None  # type: ignore[operator]
    return Step(consumer.group, status, len(read), len(emitted), arrived, finished, seconds, missing)


def _status(
    stream: EventStream, consumer: Consumer, key: Key, read: list[Record], state_folder: Path | None
) -> tuple[Status, tuple[str, ...]]:
    if not read:
        return "nothing yet", ()
    try:
        positions: Mapping[TopicPartition, int] = stream.positions(consumer.group)
    except UnknownGroupError:
        return "pending", ()
    kept: Status | None = None
    missing: tuple[str, ...] = ()
    if isinstance(consumer, Join):
        with EventBuffer(stream, consumer.group, folder=state_folder) as buffer:
            kept, missing = _in_buffer(buffer, consumer, key)
            positions = buffer.as_of
    if kept is not None and kept != "buffered":
        return kept, ()
    if any(record.offset >= positions[TopicPartition(record.topic, record.partition)] for record in read):
        return "pending", missing
    if kept is not None:
        return kept, missing
    places = {record.position for record in read}
    if any((letter.topic, letter.partition, letter.offset) in places for letter in _letters(stream, consumer.group)):
        return "dead letter", ()
    return "done", ()


def _in_buffer(buffer: EventBuffer, join: Join, key: Key) -> tuple[Status | None, tuple[str, ...]]:
    entry = buffer.find(key)
    if entry is None:
        return None, ()
    if entry.status == "pending":
        parts = buffer.records(key)
        return "buffered", tuple(spec.name for spec in join.rules.parts if not is_there(parts.get(spec.name, ()), spec))
    return ("done" if entry.status == "completed" else cast(Status, entry.status)), ()


def _letters(stream: EventStream, group: str) -> Iterator[DeadLetter]:
    after = 0
    while page := stream.dead_letters(group, after=after, limit=_LETTERS_PER_PAGE):
        yield from page
        after = page[-1].id


def _records(stream: EventStream, topic: Topic, key: Key, since: datetime | None) -> Iterator[Record]:
    """The entity's records in a topic."""
    try:
        spans = stream.log.spans([topic.name])
    except UnknownTopicError:
        return
    marks = _marks(key)
    home = partition_of(key, topic.partitions)
    for at, span in spans.items():
        if topic.key is not None and at.partition != home:
            continue
        offset = span.begin
        if since is not None:
            offset = max(offset, stream.log.offset_at(at, to_micros(since)))
        while offset < span.end:
            for batch in stream.log.read(at, offset, end=span.end, max_bytes=_READ_BYTES):
                if any(mark in batch.blob for mark in marks):
                    yield from _of(stream, batch, offset, topic, key)
                offset = batch.end_offset


def _marks(key: Key) -> set[bytes]:
    """How the key may stand in a record batch: in data, in an attribute, in the key of a claim; or in its payload."""
    text = str(key)
    return {encode_value(key), text.encode(), json.encode(text)[1:-1], DATAREF}


def _of(stream: EventStream, batch: StoredBatch, start: int, topic: Topic, key: Key) -> Iterator[Record]:
    records, _ = decode_records(batch, start, batch.end_offset, claimed=stream.claimed)
    for record in records:
        if record.subject == str(key):
            yield record
            continue
        try:
            found = key_of(record, topic.key, topic.name)
        except (MissingKeyError, InvalidEventError, PayloadError):
            continue
        if found == key and type(found) is type(key):
            yield record


def describe(found: Trace) -> list[dict[str, str | int]]:
    """The steps as rows of a table."""
    return [
        {
            "consumer": step.consumer,
            "status": step.status + (f" ({', '.join(step.missing)} missing)" if step.missing else ""),
            "read": step.read,
            "emitted": step.emitted,
            "arrived": "" if step.arrived is None else step.arrived.isoformat(timespec="milliseconds"),
            "seconds": "" if step.seconds is None else f"{step.seconds:.3f}",
        }
        for step in found.steps
    ]
