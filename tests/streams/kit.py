"""Building blocks of the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from uuid import uuid4

from djp_dagster.events import Event
from djp_dagster.streams.model import Deadline, Intent, Lease, Range
from djp_dagster.streams.records import EncodedBatch, TopicPartition, encode_batches
from djp_dagster.streams.stream import EventStream

FAR = 1 << 60
NO_LIMIT = 1 << 40


def encoded(topic: str, partition: int = 0, ids: Sequence[str] = ("one",), sizes: Sequence[int] = ()) -> EncodedBatch:
    """A record batch of events with these ids, padded by so many bytes each."""
    padding = sizes or [0] * len(ids)
    events = [Event(id=one, source="/t", type="t", data="x" * size) for one, size in zip(ids, padding, strict=True)]
    (batch,) = encode_batches(topic, partition, events, max_event_bytes=1 << 30)
    return batch


def named(prefix: str, count: int) -> list[str]:
    """Ids in order."""
    return [f"{prefix}{number}" for number in range(count)]


def ids(stream: EventStream, topic: str, partition: int = 0, start: int | None = None) -> list[str]:
    """The ids of a partition's records in order; their offsets are checked to have no holes."""
    records = list(stream.records(topic, partition, start))
    if records:
        assert [record.offset for record in records] == list(range(records[0].offset, records[0].offset + len(records)))
    return [record.id for record in records]


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """What the functions return when each runs in its own thread, all at once."""
    barrier = Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(run, task) for task in tasks]]


def intent_of(
    stream: EventStream,
    lease: Lease,
    tasks: Sequence[int] | None = None,
    *,
    take: int | None = None,
    deadlines: Sequence[Deadline] = (),
    **settings: Any,
) -> Intent:
    """An intent for what is pending on the tasks: all of it, or ``take`` records of each partition."""
    chosen = sorted(lease.epochs) if tasks is None else list(tasks)
    positions = {at: start for at, start in stream.positions(lease.group).items() if at.partition in chosen}
    spans = stream.log.spans(sorted({at.topic for at in positions}))
    ends = {at: spans[at].end if take is None else min(start + take, spans[at].end) for at, start in positions.items()}
    return Intent(
        batch_id=uuid4().hex,
        group=lease.group,
        kind="cut",
        tasks=tuple(chosen),
        ranges=tuple(Range(at.topic, at.partition, start, ends[at]) for at, start in positions.items()),
        reason="test",
        now_micros=stream.log.now_micros(),
        deadlines=tuple(deadlines),
        **settings,
    )


def visible(stream: EventStream, group: str) -> dict[str, object]:
    """Everything a commit can change, as anybody sees it."""
    coordinator = stream.coordinator
    topics = [info.name for info in stream.topics(internal=True)]
    tasks = [info.task for info in coordinator.tasks(group)]
    return {
        "positions": stream.positions(group),
        "ends": {at: span.end for at, span in stream.log.spans(topics).items()},
        "outputs": stream.outputs(group),
        "dead letters": stream.dead_letters(group, status=None),
        "deadlines": coordinator.due_deadlines(group, tasks, FAR, 1000),
        "requests": coordinator.requests(group),
        "last": [(info.last_batch, info.last_attempt) for info in coordinator.tasks(group)],
    }


def at(topic: str, partition: int = 0) -> TopicPartition:
    """Short for `TopicPartition`."""
    return TopicPartition(topic, partition)
