"""From events to record batches: routing by key, and named producers whose retries append once."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from djp_dagster.errors import AmbiguousPublishError, InvalidEventError, StreamBusyError, StreamUnavailableError
from djp_dagster.events import Event
from djp_dagster.partitioning import partition_of
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Appended, TopicInfo
from djp_dagster.streams.offloading import offload
from djp_dagster.streams.records import EncodedBatch, Record, encode_batches
from djp_dagster.streams.topics import key_of

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.topics import Topic

_T = TypeVar("_T")


def route(topic: TopicInfo, events: Iterable[Event], payloads: "PayloadStore | None") -> Iterator[EncodedBatch]:
    """The events as record batches of the partitions their keys belong to, in order per partition.

    Raises:
        MissingKeyError, InvalidEventError, EventTooLargeError: naming the event; nothing is appended then.
        PayloadStoreUnavailableError, PayloadStoreRefusedError: heavy data could not be stored.
    """
    for partition, members in enumerate(_by_partition(topic, events)):
        yield from encode(topic, partition, members, payloads)


def encode(
    topic: TopicInfo, partition: int, events: Sequence[Event | tuple[Any, ...]], payloads: "PayloadStore | None"
) -> Iterator[EncodedBatch]:
    """The events as record batches of a partition, with heavy data in the payload store if the topic wants that."""
    if topic.offload_above is not None:
        events = offload(topic, events, payloads)
    yield from encode_batches(topic.name, partition, events, max_event_bytes=topic.max_event_bytes)


def _by_partition(topic: TopicInfo, events: Iterable[Event]) -> list[list[Event]]:
    given = list(events)
    bare = given if set(map(type, given)) == {Event} else [_bare(event) for event in given]
    partition_for = partitioner(topic)
    if topic.partitions == 1 and partition_for is _only:
        return [bare]
    buckets: list[list[Event]] = [[] for _ in range(topic.partitions)]
    # A record is routed as it is, because it can still load what the bare event only has a claim of.
    for event, whole in zip(bare, given, strict=True):
        try:
            buckets[partition_for(whole)].append(event)
        except UnicodeEncodeError as error:
            raise InvalidEventError(
                f"the key of event {event.id!r} is no valid text ({error}); topic {topic.name!r} cannot route it",
                attribute="data",
            ) from error
    return buckets


def partitioner(topic: "TopicInfo | Topic") -> Callable[[Event], int]:
    """A function from event to partition, resolved once per batch because it runs once per event.

    The function raises `MissingKeyError` for an event without the topic's key.
    """
    partitions, key, name = topic.partitions, topic.key, topic.name
    if key is None and partitions == 1:
        return _only
    if key is None or "." in key:
        return lambda event: partition_of(key_of(event, key, name), partitions)

    if partitions == 1:

        def has_field(event: Event) -> int:
            # One partition: the key decides nothing, but must be there all the same.
            if event.ext is None and type(data := event.data) is dict and type(data.get(key)) is str:
                return 0
            return partition_of(key_of(event, key, name), 1)

        return has_field

    def by_field(event: Event) -> int:
        # The common case, a string under a top-level field, without another call. Of an event with extensions, data is
        # not touched: it may be elsewhere, and its key at hand.
        if event.ext is None and type(data := event.data) is dict and type(value := data.get(key)) is str:
            return crc32(value.encode()) % partitions
        return partition_of(key_of(event, key, name), partitions)

    return by_field


def _only(_event: Event) -> int:
    return 0


def _bare(given: object) -> Event:
    if type(given) is Event:
        return given
    if isinstance(given, Record):
        return given.event()
    if isinstance(given, Event):
        return Event(**{name: getattr(given, name) for name in Event.__struct_fields__})
    raise InvalidEventError(
        f"only Event objects can be published, not {type(given).__name__}; make one with Topic.event(...)",
        attribute=None,
    )


class Producer:
    """A named producer: whatever is retried under the same sequence is appended once.

    Opening fences every earlier producer of that name. ``last_sequence`` is what the stream has seen of that name, so a
    producer that numbers its publishes by a position in its source knows, after any crash, where to go on.

    Example:
        >>> from djp_dagster import Topic, testing
        >>> with testing.memory_stream() as stream:
        ...     _ = stream.create_topic(Topic("lines"))
        ...     event = Event(type="line", source="/file", data="first")
        ...     producer = stream.producer("import")
        ...     appended = producer.publish("lines", [event], sequence=1)
        ...     again = stream.producer("import").publish("lines", [event], sequence=1)
        ...     len(appended), len(again), stream.producer("import").last_sequence
        (1, 0, 1)
    """

    def __init__(
        self, log: EventLog, name: str, *, payloads: "PayloadStore | None" = None, retry_for_s: float = 60.0
    ) -> None:
        self._log, self._payloads = log, payloads
        self._stamp = log.open_producer(name)
        self._retry_for_s = retry_for_s
        self._unsure: int | None = None

    @property
    def name(self) -> str:
        """The producer's name."""
        return self._stamp.name

    @property
    def epoch(self) -> int:
        """How often a producer of that name has opened."""
        return self._stamp.epoch

    @property
    def last_sequence(self) -> int:
        """The sequence of the last publish known to be in the stream."""
        return self._stamp.sequence

    def publish(self, topic: str, events: Sequence[Event], *, sequence: int | None = None) -> list[Appended]:
        """Append the events, all or none, once: while the stream is away the same sequence is tried again.

        Args:
            topic: the topic's name.
            events: what to append; one transaction, so keep it to some thousands.
            sequence: this publish's number; it must grow. One more than the last unless given.

        Returns:
            Where the events went; empty if that sequence was already in the stream.

        Raises:
            ProducerFencedError: a newer producer of this name has opened.
            AmbiguousPublishError: the last publish failed unclearly, and this one is not its repetition.
            StreamUnavailableError: the stream stayed away for ``retry_for_s`` seconds; publish again with the same
                sequence.
        """
        if sequence is None and self._unsure is not None:
            raise AmbiguousPublishError(
                f"producer {self.name!r} does not know if its publish {self._unsure} took effect; repeat that one with "
                f"sequence={self._unsure}, or open the producer anew and look at last_sequence",
                producer=self.name,
                sequence=self._unsure,
            )
        wanted = self._stamp.sequence + 1 if sequence is None else sequence
        give_up = time.monotonic() + self._retry_for_s
        info = self._until_known(lambda: self._log.topic(topic), give_up)
        return self._append(list(route(info, events, self._payloads)), wanted, give_up)

    def append(self, batches: Sequence[EncodedBatch], *, sequence: int) -> list[Appended]:
        """The same for events that are encoded already."""
        return self._append(batches, sequence, time.monotonic() + self._retry_for_s)

    def _append(self, batches: Sequence[EncodedBatch], wanted: int, give_up: float) -> list[Appended]:
        stamp = self._stamp._replace(sequence=wanted)
        try:
            appended = self._until_known(lambda: self._log.append(batches, stamp), give_up)
        except (StreamUnavailableError, StreamBusyError):
            self._unsure = wanted
            raise
        self._unsure = None
        self._stamp = self._stamp._replace(sequence=max(wanted, self._stamp.sequence))
        return appended

    def _until_known(self, ask: Callable[[], _T], give_up: float) -> _T:
        pause_s = 0.05
        while True:
            try:
                return ask()
            except (StreamUnavailableError, StreamBusyError):
                if time.monotonic() + pause_s > give_up:
                    raise
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 2.0)
