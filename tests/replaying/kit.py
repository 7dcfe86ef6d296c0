"""What the tests of replay share: clicks that happened at some time, days in Berlin, and replays of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

from djp_dagster import Batch, Consumer, Event, EventStream, Topic, consumer, run_pending
from djp_dagster.claim_check.serializers import load_value
from djp_dagster.replaying.plan import ReplayPlan, TimeOf, plan_window
from djp_dagster.streams.model import Range
from djp_dagster.streams.records import Record, TopicPartition

BERLIN = ZoneInfo("Europe/Berlin")
CLICKS = Topic("clicks", partitions=3, key="user")
COPIES = Topic("copies", partitions=2, key="user")
SHADOWS = Topic("shadows", partitions=2, key="user")
DAY = datetime(2026, 11, 20, tzinfo=timezone.utc)


@consumer(topic=CLICKS, emits=[COPIES])
def count(batch: Batch) -> dict[str, int]:
    """How often each user has clicked."""
    counts: Counter[str] = Counter()
    for click in batch:
        counts[click.data["user"]] += click.data.get("n", 1)
        batch.emit(COPIES.event(user=click.data["user"], of=click.id))
    return dict(counts)


def click(user: str, at: datetime | None = None, **more: Any) -> Event:
    """A click, and when it happened, if it says so."""
    event = CLICKS.event(user=user, **more)
    return event if at is None else event.replace(time=at)


def publish(stream: EventStream, *clicks: Event, topic: Topic = CLICKS) -> None:
    """Into one record batch per partition."""
    stream.create_topic(topic)
    stream.publish(topic, clicks)


def window(
    stream: EventStream,
    start: datetime,
    end: datetime,
    *,
    by: TimeOf = "event_time",
    topics: Sequence[str] = ("clicks",),
    as_of: Mapping[TopicPartition, int] | None = None,
) -> ReplayPlan:
    """The plan of a window."""
    return plan_window(stream.log, topics, start, end, by=by, as_of=as_of)


def hours(first: float, last: float, day: datetime = DAY) -> tuple[datetime, datetime]:
    """A window within a day."""
    return day + timedelta(hours=first), day + timedelta(hours=last)


def everything(stream: EventStream, topic: str = "clicks") -> list[Range]:
    """The ranges of all there is."""
    spans = stream.log.spans([topic])
    return [Range(topic, at.partition, span.begin, span.end) for at, span in sorted(spans.items())]


def records_of(stream: EventStream, topic: Topic) -> list[Record]:
    """Everything in a topic; nothing if it was never made."""
    if topic.name not in {info.name for info in stream.topics()}:
        return []
    return [record for partition in range(topic.partitions) for record in stream.records(topic, partition)]


def contents(records: Sequence[Record]) -> list[tuple[str, Any, datetime | None]]:
    """What must be equal of events that are the same."""
    return sorted((record.id, sorted(record.data.items()), record.time) for record in records)


def run_live(stream: EventStream, which: Consumer, **more: Any) -> Counter[str]:
    """Do all that is pending, and add up the outputs."""
    run_pending(stream, which, wait=0, **more)
    total: Counter[str] = Counter()
    for output in stream.outputs(which.group):
        total.update(load_value(stream.payloads, output.payload))
    return total
