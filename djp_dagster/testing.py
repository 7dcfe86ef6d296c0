"""The public test kit: an in-memory stream, a virtual clock, crash points, and `run_consumer` for tests of handlers.

The in-memory stream is the real one on a private database in memory: what a test sees is what production does.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.claim_check.serializers import load_value
from djp_dagster.errors import InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.mapreduce.combining import CombineFn, find_disagreement
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import CRASH_POINTS, CrashPoint, set_hook
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import run_pending
from djp_dagster.processing.worker import Worker
from djp_dagster.state.keys import decode_key
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.claimed import ClaimedRecord
from djp_dagster.streams.model import DeadLetter
from djp_dagster.streams.records import Record, TopicPartition, decode_value
from djp_dagster.streams.stream import EventStream, open_stream
from djp_dagster.streams.topics import Topic, changelog_of

__all__ = [
    "CRASH_POINTS",
    "Clock",
    "ConsumerRun",
    "check_combine_fn",
    "crash_at",
    "kept_up_to_date",
    "kill_at",
    "memory_stream",
    "run_consumer",
]


class Clock:
    """A clock that stands still until told otherwise; pass it as ``clock=``.

    Example:
        >>> clock = Clock(1000.0)
        >>> clock.advance(60)
        >>> clock()
        1060.0
    """

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass; backwards, if negative."""
        self.now_s += seconds


@contextmanager
def memory_stream(*, clock: Clock | None = None) -> Iterator[EventStream]:
    """A stream in memory, gone at the end of the block; outputs lie in a temporary folder until then."""
    with tempfile.TemporaryDirectory(prefix="djp-testing-") as folder:
        stream = open_stream("sqlite://", payloads=open_payload_store(folder), clock=clock)
        try:
            yield stream
        finally:
            stream.close()


class ConsumerRun(msgspec.Struct, frozen=True):
    """What a handler did with the events of `run_consumer`.

    Attributes:
        emitted: what it emitted, by topic.
        outputs: what it returned, batch by batch.
        dead_letters: what it failed on, or failed.
        state: its state, if it is stateful: all tasks' keys together.
        batches: the committed batches.
    """

    emitted: Mapping[str, Sequence[Record]]
    outputs: Sequence[Any]
    dead_letters: Sequence[DeadLetter]
    state: Mapping[Any, Any]
    batches: Sequence[BatchReport]


def run_consumer(
    consumer: Consumer,
    events: Sequence[Event] | Mapping[Topic | str, Sequence[Event]],
    *,
    resources: Mapping[str, Any] | None = None,
    tables: Mapping[Consumer, Sequence[Event]] | None = None,
    clock: Clock | None = None,
) -> ConsumerRun:
    """Publish ``events`` to the consumer's topic in memory, run it on them, and return what it did.

    Args:
        consumer: the consumer under test.
        events: for its topic; if it reads several, each for the topic that its type names; or by topic.
        resources: the handler's further parameters.
        tables: what was published to the topic of each table it reads, before.
        clock: for tests of deadlines.

    Raises:
        InvalidSettingError: it reads several topics, and an event's type is none of them.

    Example:
        >>> from djp_dagster import Topic, consumer
        >>> numbers, doubled = Topic("numbers"), Topic("doubled")
        >>> @consumer(topic=numbers, emits=[doubled])
        ... def double(batch):
        ...     for record in batch:
        ...         batch.emit(doubled.event(n=record.data["n"] * 2))
        >>> [record.data["n"] for record in run_consumer(double, [numbers.event(n=21)]).emitted["doubled"]]
        [42]
    """
    by_topic = events if isinstance(events, Mapping) else _by_type(consumer, events)
    with memory_stream(clock=clock) as stream, tempfile.TemporaryDirectory(prefix="djp-state-") as folder:
        info = consumer.register(stream)
        for table, updates in (tables or {}).items():
            table.register(stream)
            stream.publish(table.topics[0], updates)
            run_pending(stream, table, state_folder=Path(folder))
        for topic, members in by_topic.items():
            stream.create_topic(topic) if isinstance(topic, Topic) else None
            stream.publish(topic, members)
        for helper in consumer.helpers:
            run_pending(stream, helper, state_folder=Path(folder))
        report = run_pending(stream, consumer, resources=resources, state_folder=Path(folder))
        return ConsumerRun(
            emitted={topic.name: list(_all_records(stream, topic)) for topic in consumer.emits},
            outputs=[load_value(stream.payloads, output.payload) for output in stream.outputs(consumer.group)],
            dead_letters=stream.dead_letters(consumer.group, status=None),
            state=_state_of(stream, consumer, info.tasks, Path(folder)),
            batches=report.batches,
        )


def _by_type(consumer: Consumer, events: Sequence[Event]) -> Mapping[Topic, Sequence[Event]]:
    # What a join repartitions is published to the topic that it declares.
    declared = {helper.emits[0].name: helper.topics[0] for helper in consumer.helpers}
    topics = [declared.get(topic.name, topic) for topic in consumer.topics]
    if len(topics) == 1:
        return {topics[0]: events}
    known = {topic.name: topic for topic in topics}
    by_topic: dict[Topic, list[Event]] = {}
    for event in events:
        if event.type not in known:
            raise InvalidSettingError(
                f"{consumer.group!r} reads {sorted(known)}, and an event has type {event.type!r}; say where it goes: "
                "run_consumer(consumer, {topic: [event]})",
                setting="events",
                value=event.type,
            )
        by_topic.setdefault(known[event.type], []).append(event)
    return by_topic


def _all_records(stream: EventStream, topic: Topic) -> Iterator[Record]:
    for partition in range(topic.partitions):
        for record in stream.records(topic, partition):
            if isinstance(record, ClaimedRecord):
                record.keep()  # the payload store goes with the stream
            yield record


def _state_of(stream: EventStream, consumer: Consumer, tasks: int, folder: Path) -> dict[Any, Any]:
    if not consumer.stateful:
        return {}
    state: dict[Any, Any] = {}
    for task in range(tasks):
        changelog = TopicPartition(changelog_of(consumer.group), task)
        store = TaskStore(folder / f"restored-{task}.db", stream.log, changelog)
        store.catch_up()
        for key, raw in store.file.items():
            value = consumer.visible(decode_value(raw))
            if value is not None:
                state[decode_key(key)] = value
        store.close()
    return state


@contextmanager
def kept_up_to_date(stream: EventStream, *consumers: Consumer) -> Iterator[None]:
    """A worker works on the consumers within the block, in a thread, on local state of its own; then it is stopped."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix="djp-state-") as folder:
        worker = Worker(stream, consumers, state_folder=Path(folder))
        thread = threading.Thread(target=worker.run, args=(stop,), name="djp-testing-worker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextmanager
def crash_at(point: CrashPoint, error: BaseException, *, hit: int = 1) -> Iterator[None]:
    """Raise ``error`` when the protocol comes to ``point`` for the ``hit``-th time within the block."""
    seen = 0

    def hook(reached: CrashPoint) -> None:
        nonlocal seen
        seen += reached == point
        if reached == point and seen == hit:
            raise error

    set_hook(hook)
    try:
        yield
    finally:
        set_hook(None)


def kill_at(point: CrashPoint, *, hit: int = 1) -> None:
    """From now on: SIGKILL this process when the protocol comes to ``point`` for the ``hit``-th time."""
    seen = 0

    def hook(reached: CrashPoint) -> None:
        nonlocal seen
        seen += reached == point
        if reached == point and seen >= hit:
            os.kill(os.getpid(), signal.SIGKILL)

    set_hook(hook)


def check_combine_fn(
    combine: CombineFn[Any, Any, Any], values: Sequence[Any], *, rounds: int = 500, seed: int = 0
) -> None:
    """Check that it does not matter how values are divided among accumulators, and in which order these are merged.

    Args:
        combine: what to check.
        values: some that are typical, and some that are not.
        rounds: how many ways of dividing and ordering are tried.
        seed: of these.

    Raises:
        AssertionError: it does matter; the message has values that show it.

    Example:
        >>> import djp_dagster as djp
        >>> check_combine_fn(djp.Mean(), [1, 2, 4])
        >>> class MeanOfMeans(djp.Mean):
        ...     def merge(self, one, other):
        ...         return (self.extract(one) + self.extract(other)) / 2, 1
        >>> check_combine_fn(MeanOfMeans(), [1, 2, 4])
        Traceback (most recent call last):
        AssertionError: MeanOfMeans makes 2.0 of [1, 4, 1], and 1.75 if they are divided or ordered otherwise
    """
    found = find_disagreement(combine, values, rounds=rounds, seed=seed)
    if found is not None:
        some, expected, other = found
        raise AssertionError(
            f"{type(combine).__name__} makes {expected!r} of {some!r}, and {other!r} if they are divided or ordered "
            "otherwise"
        )
