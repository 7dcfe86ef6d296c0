"""What the tests of joins share: topics, a join that says what it got, and what is to be seen of it afterwards."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from djp_dagster import BatchReport, Event, EventStream, Join, Joined, RetryPolicy, Topic, Worker, join, run_pending
from djp_dagster.joining.inspection import EventBuffer
from djp_dagster.orchestration.ticks import look
from djp_dagster.streams.records import to_micros
from tests.joining.model import Seen
from tests.processing.kit import all_records, in_thread, wait_until

FAST = RetryPolicy(max_attempts=3, first=0.001, longest=0.01)
TASKS = 2
A, B, C = PARTS = tuple(Topic(name, partitions=TASKS, key="k") for name in "abc")
OUT = Topic("out", partitions=TASKS, key="k")
LATE = Topic("late", partitions=TASKS, key="k")
Handler = Callable[..., Any]


def tell(parts: Joined) -> None:
    """Emit the key, the ids of its parts, and what is missing."""
    ids = {name: [record.id for record in _many(found)] for name, found in parts.items()}
    parts.emit(OUT.event(k=parts.key, parts=ids, missing=list(parts.missing)), topic=OUT)


def _many(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def joined(topics: Sequence[Topic] = PARTS, handler: Handler = tell, **settings: Any) -> Join:
    """A join of the topics, by their names, that emits to `OUT`."""
    chosen: dict[str, Any] = {"inputs": {topic.name: topic for topic in topics}, "key": "k", "emits": [OUT]}
    chosen |= {"group": "j", "retry": FAST, **settings}
    return join(**chosen)(handler)


def part(topic: Topic, key: str | int, id: str | None = None, **more: Any) -> Event:  # noqa: A002
    """A part of ``key``; its id is made of topic and key unless given."""
    time = more.pop("time", None)
    data = {"k": key, **more}
    return Event(id=id or f"{topic.name}-{key}", type=topic.name, source="/parts", data=data, time=time)


def keys_of_task(task: int, count: int) -> list[str]:
    """So many keys that all lie in one task."""
    return [key for n in range(50 * count) if A.partition_of(part(A, key := f"key{n}")) == task][:count]


def emitted(stream: EventStream) -> dict[int, list[list[Any]]]:
    """What `tell` has said, by partition."""
    found: dict[int, list[list[Any]]] = {partition: [] for partition in range(TASKS)}
    for record in all_records(stream, OUT):
        found[record.partition].append([record.data["k"], record.data["parts"], record.data["missing"]])
    return found


def completed(stream: EventStream) -> dict[str | int, list[str]]:
    """The names of the parts with which each key was completed; that it was completed once is checked."""
    said = [record.data for record in all_records(stream, OUT)]
    keys = [(type(data["k"]), data["k"]) for data in said]
    assert len(set(keys)) == len(keys), f"completed more than once: {[key for key in keys if keys.count(key) > 1]}"
    return {data["k"]: list(data["parts"]) for data in said}


def letters(stream: EventStream, group: str = "j") -> "Counter[tuple[str, int, int, str]]":
    """The pending dead letters: topic, partition, offset, error."""
    found = stream.dead_letters(group, limit=100_000)
    return Counter((one.topic, one.partition, one.offset, one.error_type) for one in found)


def errors(stream: EventStream, group: str = "j") -> dict[str, int]:
    """How many dead letters are pending, by error."""
    return dict(Counter(one.error_type for one in stream.dead_letters(group, limit=100_000)))


def statuses(stream: EventStream, folder: Path, group: str = "j") -> dict[str | int, str]:
    """What the buffer knows of each key."""
    with EventBuffer(stream, group, folder=folder) as buffer:
        return {one.key: one.status for one in buffer}


def work(stream: EventStream, consumer: Join, folder: Path, **settings: Any) -> list[BatchReport]:
    """Runs, as the sensor asks for them, until nothing is due; what was done."""
    consumer.register(stream)
    done: list[BatchReport] = []
    for _ in range(100):
        if look(stream, consumer).reason is None:
            return done
        done += run_pending(stream, consumer, state_folder=folder, **settings).batches
    raise AssertionError(f"still due after 100 runs: {look(stream, consumer)}")


def work_resident(stream: EventStream, consumer: Join, folder: Path) -> None:
    """The same, done by a worker."""
    consumer.register(stream)
    stop = threading.Event()
    worker = Worker(stream, [consumer], state_folder=folder, lease=0.6)  # it looks up every third of that
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        wait_until(lambda: bool(outcome) or look(stream, consumer).reason is None, "the worker to do all of it")
    assert outcome == [None], outcome


def appended(stream: EventStream, topics: Sequence[Topic] = PARTS) -> list[Seen]:
    """All parts as they lie in the stream, for the model."""
    return [
        Seen(
            record.origin.append_micros,
            topic.name,
            record.partition,
            record.offset,
            record.data["k"],
            record.id,
            to_micros(record.event_time),
        )
        for topic in topics
        for record in all_records(stream, topic)
    ]
