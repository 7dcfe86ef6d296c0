"""What the tests of processing share."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from djp_dagster import Consumer, Event, EventStream, RetryPolicy, Topic
from djp_dagster.errors import StreamUnavailableError
from djp_dagster.streams.model import Intent, Lease, Range
from djp_dagster.streams.records import EncodedBatch, Record, TopicPartition, encode_event

PATIENT_S = 30.0
FAST = RetryPolicy(max_attempts=3, first=0.001, longest=0.01)
NUMBERS = Topic("numbers")
OUT = Topic("out")


def numbers(count: int, topic: Topic = NUMBERS, start: int = 0) -> list[Event]:
    """Events ``{"n": start}``, ``{"n": start + 1}``, ..."""
    return [topic.event(n=n) for n in range(start, start + count)]


def fill(stream: EventStream, topic: Topic, events: Sequence[Event]) -> None:
    """Publish to a topic made for it."""
    stream.create_topic(topic)
    stream.publish(topic, events)


def append_raw(stream: EventStream, topic: Topic, raws: Sequence[bytes], partition: int = 0) -> None:
    """Append encoded records as they are, events or not."""
    assert len(raws) < 16
    blob = bytes([0x90 + len(raws)]) + b"".join(raws)
    stream.log.append([EncodedBatch(topic.name, partition, len(raws), blob)])


def raw(event: Event) -> bytes:
    """The bytes of one record."""
    return encode_event(event)


NO_EVENT = b"\x01"
"""A record that is no event."""


def all_records(stream: EventStream, topic: Topic) -> list[Record]:
    """Everything in a topic, partition by partition."""
    return [record for partition in range(topic.partitions) for record in stream.records(topic, partition)]


def values(stream: EventStream, topic: Topic, field: str = "n") -> list[Any]:
    """One field of everything in a topic."""
    return [record.data[field] for record in all_records(stream, topic)]


def committed(stream: EventStream, consumer: Consumer) -> list[int]:
    """The committed offsets, by topic and partition."""
    return [offset for _, offset in sorted(stream.positions(consumer.group).items())]


def open_intents(stream: EventStream, consumer: Consumer) -> list[Intent]:
    """The group's open batches, looked at through a lease that is given back."""
    lease = stream.coordinator.acquire(consumer.group, None, "looking", 5.0)
    stream.coordinator.release(lease)
    return list(lease.intents)


def intent_for(consumer: Consumer, ranges: Sequence[Range], batch_id: str = "b1", **more: Any) -> Intent:
    """An intent as a holder would write it down."""
    return Intent(
        batch_id=batch_id,
        group=consumer.group,
        kind="cut",
        tasks=tuple(sorted({part.partition for part in ranges})),
        ranges=tuple(ranges),
        reason="test",
        now_micros=0,
        **more,
    )


def begin(stream: EventStream, consumer: Consumer, ranges: Sequence[Range], **more: Any) -> Intent:
    """Begin a batch as a holder that then vanishes; its lease is free again, as if it had run out."""
    consumer.register(stream)
    lease = stream.coordinator.acquire(consumer.group, None, "vanished", 5.0)
    intent = intent_for(consumer, ranges, **more)
    stream.coordinator.begin(lease, intent)
    stream.coordinator.release(lease)
    return intent


def die_again(stream: EventStream, consumer: Consumer, batch_id: str = "b1", times: int = 1) -> None:
    """Resume the open batch and vanish, ``times`` times."""
    for _ in range(times):
        lease: Lease = stream.coordinator.acquire(consumer.group, None, "vanished", 5.0)
        stream.coordinator.resume(lease, batch_id)
        stream.coordinator.release(lease)


class Died(BaseException):
    """Stands for the death of the process."""


class Mortal:
    """Makes `Died` leave behind what SIGKILL would: nothing is written to the intent afterwards."""

    def __init__(self, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deaths = 0
        self._dead = False
        self._update = stream.coordinator.update
        monkeypatch.setattr(stream.coordinator, "update", self._update_if_alive)

    def _update_if_alive(self, lease: Lease, intent: Intent) -> None:
        if self._dead:
            raise StreamUnavailableError("the dead write nothing")
        self._update(lease, intent)

    def die(self) -> None:
        """Called by a handler in place of a segfault."""
        self._dead = True
        self.deaths += 1
        raise Died

    def run(self, work: Callable[[], Any], limit: int) -> Any:
        """Do ``work``, again after each death, at most ``limit`` of them."""
        for _ in range(limit + 1):
            self._dead = False
            try:
                return work()
            except Died:
                pass
        raise AssertionError(f"died more than {limit} times")


class Impatient(threading.Event):
    """A stop that is never set and shortens every pause to nothing; for pauses of fixed length."""

    def wait(self, timeout: float | None = None) -> bool:
        return self.is_set()


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the time limit only ends a test that would never end."""
    give_up = time.monotonic() + PATIENT_S
    while not holds():
        assert time.monotonic() < give_up, f"waited {PATIENT_S} s for {what}"
        time.sleep(0.005)


@contextmanager
def in_thread(work: Callable[[], Any], stop: threading.Event | None = None) -> Iterator[list[Any]]:
    """Do ``work`` in a thread during the block; what it returned or raised is in the list afterwards."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield outcome
    finally:
        if stop is not None:
            stop.set()
        thread.join(PATIENT_S)
        assert not thread.is_alive()


def at(topic: Topic, partition: int = 0) -> TopicPartition:
    return TopicPartition(topic.name, partition)
