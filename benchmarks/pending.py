"""``stream.pending(group)`` with much and with little to do, in 16 partitions."""

import statistics
import time

from benchmarks.harness import BATCH, Row, Settings
from djp_dagster import Batch, Event, EventStream, Topic, consumer, open_stream
from djp_dagster.streams.records import EncodedBatch, encode_value

PARTITIONS = 16
_CALLS = 201


def run(settings: Settings) -> list[Row]:
    """10 million events against 10 thousand; the median of many calls, on an open connection."""
    many, few = settings.events(10_000_000), 10_000
    rows = []
    for count in (few, many):
        took = _pending_s(settings, count)
        what = f"pending(): {count:,} events in {PARTITIONS} partitions"
        rows.append(Row(what, f"{took * 1e3:.2f} ms", "", "", "≤ 2 ms", took <= 0.002))
    return rows


def _pending_s(settings: Settings, count: int) -> float:
    path = settings.folder / f"pending-{count}.db"
    with open_stream(path) as stream:
        topic = Topic("ticks", partitions=PARTITIONS, key="k")

        @consumer(topic=topic)
        def waiting(batch: Batch) -> None:
            raise AssertionError("nobody runs it")

        waiting.register(stream)
        filled = fill(stream, topic, count)
        took = []
        for _ in range(_CALLS):
            started = time.perf_counter()
            backlog = stream.pending(waiting.group)
            took.append(time.perf_counter() - started)
            assert backlog.events == filled
    for left in settings.folder.glob(f"{path.name}*"):
        left.unlink()
    return statistics.median(took)


def fill(stream: EventStream, topic: Topic, count: int) -> int:
    """Append about that many events, encoded once; how many it were."""
    size = min(BATCH, count // PARTITIONS)
    blob = encode_value([Event(type="tick", source="/bench", data={"k": "a", "n": 1}) for _ in range(size)])
    once = [EncodedBatch(topic.name, partition, size, blob) for partition in range(PARTITIONS)]
    rounds = max(count // (size * PARTITIONS), 1)
    for start in range(0, rounds, 25):
        stream.log.append(once * min(25, rounds - start))
    return rounds * size * PARTITIONS
