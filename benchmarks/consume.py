"""Consuming with a commit every 1,000 events: batch API and per-event API, against the bare loop and Quix Streams.

Whatever consumes adds up one field of every event's data. Where every event emits one, the new event holds two fields.
"""

import statistics
from collections.abc import Callable, Sequence
from itertools import count as counter

import msgspec

from benchmarks.append import ORDERS, read_all
from benchmarks.bare import BareEvent, BareLog
from benchmarks.harness import BATCH, Row, Settings, against, alternate, order_event, seconds
from djp_dagster import Batch, Consumer, Event, EventStream, Threshold, Topic, consumer, open_stream, run_pending
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
        reports: dict[str, list[RunReport]] = {}

        def ours(handler: Callable[[Batch], None]) -> float:
            member = group_of(handler)
            kept = reports.setdefault(handler.__name__, [])
            took = seconds(lambda: kept.append(run_pending(stream, member)))
            assert kept[-1].events == count
            return took

        took = alternate(
            settings.rounds,
            {
                "by_batch": lambda: ours(by_batch),
                "bare": lambda: seconds(bare.consume),
                "by_event": lambda: ours(by_event),
                "bare_emitting": lambda: seconds(lambda: bare.consume(emit=True)),
                "emitting": lambda: ours(emitting),
                "decode": lambda: seconds(lambda: read_all(stream, count)),
            },
        )
        bare.close()
    return [
        against("consume: batch API / bare loop", count, took["by_batch"], took["bare"], 0.5),
        _split(reports["by_batch"], took["by_batch"], took["decode"], count),
        against("consume: per-event API / bare loop", count, took["by_event"], took["bare"], 0.5),
        _split(reports["by_event"], took["by_event"], took["decode"], count),
        against("consume: every event emits one / bare loop", count, took["emitting"], took["bare_emitting"], 0.5),
        _split(reports["emitting"], took["emitting"], took["decode"], count),
    ]


def _split(reports: list[RunReport], totals: Sequence[float], decoding: Sequence[float], count: int) -> Row:
    """Where the time goes, in microseconds an event; reading with decoding is timed apart, in large reads."""
    handler_s = statistics.median(sum(batch.handler_seconds for batch in report.batches) for report in reports)
    commit_s = statistics.median(sum(batch.commit_seconds for batch in report.batches) for report in reports)
    total_s, decode_s = statistics.median(totals), statistics.median(decoding)
    parts = {
        "read+decode": decode_s,
        "handler": handler_s - decode_s,
        "commit": commit_s,
        "cut+intent": total_s - handler_s - commit_s,
    }
    return Row("  of which, µs per event", ", ".join(f"{name} {s / count * 1e6:.2f}" for name, s in parts.items()))
