"""Consuming with a commit every 1,000 events: batch API and per-event API, against the bare loop and Quix Streams.

Whatever consumes adds up one field of every event's data. Where every event emits one, the new event holds two fields.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count as counter
from typing import Any

import msgspec

from benchmarks.append import ORDERS
from benchmarks.bare import BareEvent, BareLog
from benchmarks.harness import BATCH, Row, Settings, against, alternate, order_event, seconds
from djp_dagster import Batch, Consumer, Event, EventStream, Threshold, Topic, consumer, open_stream, run_pending
from djp_dagster.processing import handling
from djp_dagster.processing.run import RunReport

TOTALS = Topic("totals", key="user_id")
EVENTS = 300_000
_numbers = counter()


def by_batch(batch: Batch) -> None:
    """The batch API: lists of records."""
    total = 0
    for records in batch.chunks():
        for record in records:
            total += record.data["amount"]


def by_event(batch: Batch) -> None:
    """The per-event API: one record after the other."""
    total = 0
    for record in batch:
        total += record.data["amount"]


def emitting(batch: Batch) -> None:
    """As by_event, and every event emits one."""
    total = 0
    for record in batch:
        data = record.data
        total += data["amount"]
        new = {"user_id": data["user_id"], "amount": data["amount"]}
        batch.emit(Event(source="/bench", type="order.total", data=new))


def group_of(handler: Callable[[Batch], None]) -> Consumer:
    """A consumer of the handler in a group of its own, from the beginning, committing every 1,000 events."""
    emits = [TOTALS] if handler is emitting else []
    group = f"{handler.__name__}-{next(_numbers)}"
    return consumer(topic=ORDERS, emits=emits, group=group, max_batch=Threshold(events=BATCH))(handler)


def fill(stream: EventStream, bare: BareLog, count: int) -> None:
    """The same orders in both logs."""
    stream.create_topic(ORDERS)
    for start in range(0, count, BATCH):
        events = [order_event(number) for number in range(start, start + BATCH)]
        stream.publish(ORDERS, events)
        bare.append([BareEvent(**msgspec.structs.asdict(event)) for event in events])


def run(settings: Settings) -> list[Row]:
    """Ours against the bare loop, and where the time of ours goes."""
    count = settings.events(EVENTS)
    with open_stream(settings.folder / "consume-ours.db") as stream:
        bare = BareLog(settings.folder / "consume-bare.db")
        fill(stream, bare, count)
        splits: dict[str, list[dict[str, float]]] = {}

        def ours(handler: Callable[[Batch], None]) -> float:
            member = group_of(handler)
            kept: list[RunReport] = []
            with reading_timed() as reading_s:
                took = seconds(lambda: kept.append(run_pending(stream, member)))
            assert kept[-1].events == count
            splits.setdefault(handler.__name__, []).append(_split(kept[-1], took, sum(reading_s)))
            return took

        took = alternate(
            settings.rounds,
            {
                "by_batch": lambda: ours(by_batch),
                "bare": lambda: seconds(bare.consume),
                "by_event": lambda: ours(by_event),
                "bare_emitting": lambda: seconds(lambda: bare.consume(emit=True)),
                "emitting": lambda: ours(emitting),
            },
        )
        bare.close()
    return [
        against("consume: batch API / bare loop", count, took["by_batch"], took["bare"], 0.5),
        _split_row(splits["by_batch"], count),
        against("consume: per-event API / bare loop", count, took["by_event"], took["bare"], 0.5),
        _split_row(splits["by_event"], count),
        against("consume: every event emits one / bare loop", count, took["emitting"], took["bare_emitting"], 0.5),
        _split_row(splits["emitting"], count),
    ]


@contextmanager
def reading_timed() -> Iterator[list[float]]:
    """The seconds that reading and decoding take within the block, one number for each stored batch."""
    spent: list[float] = []
    original = handling.read_ranges

    def timed(*arguments: Any) -> Iterator[Any]:
        source = original(*arguments)
        while True:
            started = time.perf_counter()
            piece = next(source, None)
            spent.append(time.perf_counter() - started)
            if piece is None:
                return
            yield piece

    handling.read_ranges = timed
    try:
        yield spent
    finally:
        handling.read_ranges = original


def _split(report: RunReport, total_s: float, reading_s: float) -> dict[str, float]:
    handler_s = sum(batch.handler_seconds for batch in report.batches)
    commit_s = sum(batch.commit_seconds for batch in report.batches)
    return {
        "read+decode": reading_s,
        "handler": handler_s - reading_s,
        "commit": commit_s,
        "cut+intent": total_s - handler_s - commit_s,
    }


def _split_row(splits: Sequence[dict[str, float]], count: int) -> Row:
    """Where the time goes, in microseconds an event, median of the rounds."""
    parts = {name: statistics.median(split[name] for split in splits) / count * 1e6 for name in splits[0]}
    return Row("  of which, µs per event", ", ".join(f"{name} {micros:.2f}" for name, micros in parts.items()))
