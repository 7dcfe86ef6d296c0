"""`Record`: an event and where in the stream it lies; and the record-batch codec.

A record batch is one MessagePack array of events, each an array of its attributes in the order of `Event`. Encoding and
decoding a whole batch is one call into C. A record that does not decode is found by slicing the array without looking
inside, so its neighbours are not lost with it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from functools import cache
from io import BytesIO
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import msgspec

from djp_dagster.errors import EventTooLargeError, InvalidEventError, StreamCorruptError
from djp_dagster.events import Event

if TYPE_CHECKING:
    from djp_dagster.claim_check.claims import Claim
    from djp_dagster.streams.claimed import ClaimedData

DATAREF = b"dataref"
"""How the extension attribute begins by which an event carries a claim, as it stands in a record batch."""
CODEC_EVENTS = 1
"""The codec number stored with each record batch of events."""
CODEC_CHANGES = 2
"""The codec number of changelog record batches: ``[key, value or nil]`` each."""

MAX_BLOB_BYTES = 1 << 20
"""A record batch grows no larger than this, so that one read is bounded; a single larger event has its own."""

_time_of_row = itemgetter(Event.__struct_fields__.index("time"))
_time_of_event = attrgetter("time")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """The moment of `to_micros`, in UTC."""
    return _EPOCH + timedelta(microseconds=micros)


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Origin(msgspec.Struct, frozen=True, gc=False):
    """What all records of a stored batch share."""

    topic: str
    partition: int
    append_micros: int
    scope: str = ""
    """Incarnation and group: what makes an idempotency key differ between streams and consumers."""
    claimed: Any = None
    """A `djp_dagster.streams.claimed.ClaimedData`: where data is that is not in the record."""


class Record(Event, frozen=False, kw_only=True, array_like=True, gc=False, eq=False):  # type: ignore[misc]
    """An event as read from the stream: `Event` plus topic, partition, offset, append time and idempotency key.

    Treat it as immutable like any event: only the reader, which stamps the position on a million of them a second, may
    assign to it.

    Example:
        >>> from djp_dagster import Topic, testing
        >>> with testing.memory_stream() as stream:
        ...     _ = stream.create_topic(Topic("t"))
        ...     _ = stream.publish("t", [Event(type="x", source="/s", data=1)])
        ...     [(record.offset, record.data) for record in stream.records("t", 0)]
        [(0, 1)]
    """

    offset: int = -1
    origin: Origin = Origin("", 0, 0)

    def __post_init__(self) -> None:
        """Nothing: what the stream holds was validated when it was published."""

    @property
    def topic(self) -> str:
        """The topic it was read from."""
        return self.origin.topic

    @property
    def partition(self) -> int:
        """Its partition, 0-based."""
        return self.origin.partition

    @property
    def append_time(self) -> datetime:
        """When the stream took it in, by the stream's clock."""
        return from_micros(self.origin.append_micros)

    @property
    def event_time(self) -> datetime:
        """When it happened: the event's ``time``, or the append time if it states none."""
        return self.time if self.time is not None else self.append_time

    @property
    def position(self) -> tuple[str, int, int]:
        """(topic, partition, offset): unique within the stream."""
        return (self.origin.topic, self.origin.partition, self.offset)

    @property
    def idempotency_key(self) -> str:
        """The same at every attempt of the same group at the same record, and nowhere else: for writes outside."""
        origin = self.origin
        return f"{origin.scope}/{origin.topic}/{origin.partition}/{self.offset}"

    @property
    def claim(self) -> "Claim | None":
        """The claim of its data, if that is in the payload store."""
        return None

    def open_data(self) -> BinaryIO:
        """The data as a file: bytes as they are, text as UTF-8, anything else as JSON; from wherever it is.

        Raises:
            PayloadError, PayloadStoreUnavailableError: as `PayloadStore.open`.
        """
        data = self.data
        content = data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else _encode_json(data)
        return BytesIO(content)

    def event(self) -> Event:
        """The bare event, e.g. to publish it elsewhere."""
        return Event(**{name: getattr(self, name) for name in Event.__struct_fields__})


class EncodedBatch(msgspec.Struct, frozen=True):
    """Events of one partition, ready to append: all of them become visible at once, in this order."""

    topic: str
    partition: int
    count: int
    blob: bytes
    codec: int = CODEC_EVENTS
    min_event_micros: int | None = None
    max_event_micros: int | None = None


class StoredBatch(msgspec.Struct, frozen=True):
    """One appended record batch, as read back."""

    topic: str
    partition: int
    base_offset: int
    count: int
    append_micros: int
    codec: int
    blob: bytes

    @property
    def end_offset(self) -> int:
        """The offset after its last record."""
        return self.base_offset + self.count


class Undecodable(msgspec.Struct, frozen=True):
    """A record whose bytes are no event."""

    offset: int
    origin: Origin
    raw: bytes
    error: str

    @property
    def position(self) -> tuple[str, int, int]:
        """(topic, partition, offset)."""
        return (self.origin.topic, self.origin.partition, self.offset)


encode_value = msgspec.msgpack.Encoder().encode
decode_value = msgspec.msgpack.Decoder().decode
_encode_json = msgspec.json.Encoder().encode
_plain_decoders = (msgspec.msgpack.Decoder(list[Record]).decode, msgspec.msgpack.Decoder(Record).decode)
_slice = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
# TypeError: before 0.22, msgspec says so of a map whose key is a map.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError)
"""What decoding raises: text that is no UTF-8 and bottomless nesting have errors of their own."""


@cache
def _claimed_decoders() -> tuple[Callable[[Any], list[Record]], Callable[[Any], Record]]:
    from djp_dagster.streams.claimed import ClaimedRecord

    many, one = msgspec.msgpack.Decoder(list[ClaimedRecord]), msgspec.msgpack.Decoder(ClaimedRecord)
    return many.decode, one.decode  # type: ignore[return-value]


def _decoders(blob: bytes) -> tuple[Callable[[Any], list[Record]], Callable[[Any], Record]]:
    # Twice as fast as `in`: it looks for the last one, and the last byte of it is rarer.
    return _claimed_decoders() if blob.rfind(DATAREF) >= 0 else _plain_decoders


def encode_event(event: Event | tuple[Any, ...]) -> bytes:
    """One event's bytes, as they stand inside a record batch.

    Raises:
        InvalidEventError: ``data`` holds something MessagePack cannot say.
    """
    try:
        return encode_value(event)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidEventError(
            f"event {_id_of(event)!r}: data cannot be encoded ({error}); use JSON values, bytes or datetimes",
            attribute="data",
        ) from error


def encode_batches(
    topic: str, partition: int, events: Sequence[Event | tuple[Any, ...]], *, max_event_bytes: int
) -> Iterator[EncodedBatch]:
    """The events as record batches of at most `MAX_BLOB_BYTES` (one event at least).

    Instead of events, tuples of their attributes in the order of `Event` may be given: they encode alike.

    Raises:
        EventTooLargeError: naming the event, its size and the limit.
        InvalidEventError: ``data`` cannot be encoded.
    """
    if not events:
        return
    try:
        blob = encode_value(events)
    except (TypeError, ValueError, OverflowError, RecursionError):
        for event in events:
            encode_event(event)
        raise  # pragma: no cover - one of them raised
    if len(blob) <= min(MAX_BLOB_BYTES, max_event_bytes):
        yield _encoded(topic, partition, events, blob)
    elif len(events) > 1:
        half = len(events) // 2
        yield from encode_batches(topic, partition, events[:half], max_event_bytes=max_event_bytes)
        yield from encode_batches(topic, partition, events[half:], max_event_bytes=max_event_bytes)
    elif len(blob) - 1 > max_event_bytes:
        raise EventTooLargeError(
            f"event {_id_of(events[0])!r} has {len(blob) - 1} bytes, topic {topic!r} takes {max_event_bytes}; "
            "raise the topic's max_event_bytes, or declare it with offload_above='64KiB'",
            topic=topic,
            event_id=_id_of(events[0]),
            bytes=len(blob) - 1,
            limit=max_event_bytes,
        )
    else:
        yield _encoded(topic, partition, events, blob)


def _id_of(event: Event | tuple[Any, ...]) -> str:
    return event.id if isinstance(event, Event) else str(event[0])


def _encoded(topic: str, partition: int, events: Sequence[Event | tuple[Any, ...]], blob: bytes) -> EncodedBatch:
    time_of: Callable[[Any], Any] = _time_of_row if isinstance(events[0], tuple) else _time_of_event
    times: list[Any] = [time for time in map(time_of, events) if time is not None]
    if {type(time.tzinfo) for time in times} - {timezone}:
        # As moments: times of one zone compare by its wall clock, which goes back in autumn.
        times = [time.astimezone(timezone.utc) for time in times]
    return EncodedBatch(
        topic=topic,
        partition=partition,
        count=len(events),
        blob=blob,
        min_event_micros=to_micros(min(times)) if times else None,
        max_event_micros=to_micros(max(times)) if times else None,
    )


def record_sizes(batch: StoredBatch) -> list[int]:
    """The encoded size of each record, without decoding any."""
    return [len(memoryview(raw)) for raw in _slices(batch)]


def _slices(batch: StoredBatch) -> list[msgspec.Raw]:
    try:
        slices = _slice(batch.blob)
    except _UNDECODABLE as error:
        raise _corrupt(batch, str(error)) from error
    if len(slices) != batch.count:
        raise _corrupt(batch, f"it holds {len(slices)} records, not {batch.count}")
    return slices


def _corrupt(batch: StoredBatch, why: str) -> StreamCorruptError:
    return StreamCorruptError(
        f"the record batch at offset {batch.base_offset} of topic {batch.topic!r} partition {batch.partition} is "
        f"damaged: {why}; restore the stream from a backup",
        topic=batch.topic,
        partition=batch.partition,
        offset=batch.base_offset,
    )


def decode_records(
    batch: StoredBatch, start: int, end: int, *, scope: str = "", claimed: "ClaimedData | None" = None
) -> tuple[list[Record], list[Undecodable]]:
    """The records of ``batch`` with ``start <= offset < end``, and those among them that are no events.

    Args:
        batch: as stored.
        start: the first offset wanted.
        end: the first one that is not.
        scope: of idempotency keys.
        claimed: loads data that is in the payload store.

    Raises:
        StreamCorruptError: the batch as a whole is damaged.
    """
    origin = Origin(batch.topic, batch.partition, batch.append_micros, scope, claimed)
    first = max(start, batch.base_offset)
    last = max(min(end, batch.end_offset), first)
    bad: list[Undecodable] = []
    try:
        # One look at the bytes tells if any of them may carry a claim: all others cost nothing more.
        records = _decoders(batch.blob)[0](batch.blob)
        if len(records) != batch.count:
            raise _corrupt(batch, f"it holds {len(records)} records, not {batch.count}")
        records = records[first - batch.base_offset : last - batch.base_offset]
        for offset, record in enumerate(records, first):
            record.offset = offset
            record.origin = origin
    except _UNDECODABLE:
        return _decode_one_by_one(batch, first, last, origin)
    return records, bad


def _decode_one_by_one(
    batch: StoredBatch, first: int, last: int, origin: Origin
) -> tuple[list[Record], list[Undecodable]]:
    records: list[Record] = []
    bad: list[Undecodable] = []
    slices = _slices(batch)[first - batch.base_offset : last - batch.base_offset]
    for offset, raw in enumerate(slices, first):
        record = decode_one(raw, offset, origin)
        if isinstance(record, Undecodable):
            bad.append(record)
        else:
            records.append(record)
    return records, bad


def decode_one(raw: bytes | msgspec.Raw, offset: int, origin: Origin) -> Record | Undecodable:
    """The record of one encoded event, or what is wrong with its bytes."""
    try:
        record = _decoders(bytes(raw))[1](raw)
    except _UNDECODABLE as error:
        return Undecodable(offset, origin, bytes(raw), str(error))
    record.offset = offset
    record.origin = origin
    return record


def raw_records(batch: StoredBatch) -> list[bytes]:
    """The encoded records of a batch, without decoding any."""
    return [bytes(raw) for raw in _slices(batch)]


def encode_changes(changes: Iterable[tuple[bytes, bytes | None]]) -> bytes:
    """A changelog record batch: key and new value, or nil for a deletion."""
    return encode_value(list(changes))


decode_changes = msgspec.msgpack.Decoder(list[tuple[bytes, bytes | None]]).decode
