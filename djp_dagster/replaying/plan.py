"""`ReplayPlan`: exactly which records a replay reads."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal

import msgspec

from djp_dagster.errors import InvalidSettingError, ReplayExpiredError
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Range
from djp_dagster.streams.records import Record, TopicPartition, from_micros, to_micros
from djp_dagster.streams.stream import EventStream

TimeOf = Literal["event_time", "append_time"]
AsOf = Mapping[TopicPartition, int]
_LONG_AGO = -(1 << 62)


class ReplayPlan(msgspec.Struct, frozen=True):
    """What a replay reads.

    Attributes:
        ranges: of offsets; every record wanted is in them.
        as_of: the ends of all partitions that were looked at; it reproduces the plan.
        window: from and to which event time, in micros, records are wanted; None: all in the ranges.
        keys, ids: only records of these keys, or events of these ids; None: all.
    """

    ranges: tuple[Range, ...]
    as_of: tuple[tuple[str, int, int], ...]
    window: tuple[int, int] | None = None
    keys: frozenset[str | int] | None = None
    ids: frozenset[str] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether every record of the ranges is wanted."""
        return self.window is None and self.keys is None and self.ids is None

    def of(self, keys: Sequence[str | int] | None, ids: Sequence[str] | None) -> "ReplayPlan":
        """Of its records only those of given keys, or events of given ids."""
        return msgspec.structs.replace(
            self,
            keys=self.keys if keys is None else frozenset(keys),
            ids=self.ids if ids is None else frozenset(ids),
        )

    def wants(self, record: Record) -> bool:
        """Whether a record happened in the window."""
        if self.window is None:
            return True
        return self.window[0] <= to_micros(record.event_time) < self.window[1]


def as_of_now(log: EventLog, topics: Sequence[str]) -> dict[TopicPartition, int]:
    """The ends of all partitions."""
    return {at: span.end for at, span in log.spans(topics).items()}


def parse_as_of(text: Mapping[str, int]) -> dict[TopicPartition, int]:
    """Ends as people and metadata write them: ``{"clicks:0": 1200}``.

    Raises:
        InvalidSettingError: naming what is no partition.
    """
    ends = {}
    for place, end in text.items():
        topic, _, partition = place.rpartition(":")
        if not topic or not partition.isdigit() or end < 0:
            raise InvalidSettingError(
                f"as_of={{{place!r}: {end}}} must be offsets by 'topic:partition'", setting="as_of", value=place
            )
        ends[TopicPartition(topic, int(partition))] = end
    return ends


def plan_window(
    log: EventLog,
    topics: Sequence[str],
    start: datetime,
    end: datetime,
    *,
    by: TimeOf,
    as_of: AsOf | None = None,
) -> ReplayPlan:
    """The records that happened (or were appended) in a window of time, as far as they have come.

    Args:
        log: where they are.
        topics: which.
        start: of the window, with a time zone.
        end: of the window, not in it.
        by: what time counts.
        as_of: the ends of an earlier replay, to be reproduced; as of now unless given.

    Raises:
        ReplayExpiredError: retention has begun to remove it.
    """
    first, last = to_micros(start), to_micros(end)
    now = as_of_now(log, topics)
    ends = {at: min(known, (as_of or now).get(at, known)) for at, known in now.items()}
    ranges: list[Range] = []
    for at, known_end in sorted(ends.items()):
        _require_whole(log, at, first, start)
        if by == "append_time":
            low, high = log.offset_at(at, first), min(known_end, log.offset_at(at, last))
            found = [(low, high)] if high > low else []
        else:
            found = log.with_event_times(at, first, last, start=log.spans([at.topic])[at].begin, end=known_end)
        ranges.extend(Range(at.topic, at.partition, low, high) for low, high in found)
    window = (first, last) if by == "event_time" else None
    return ReplayPlan(tuple(ranges), _as_tuple(ends), window)


def plan_ranges(
    log: EventLog,
    ranges: Sequence[Range],
    *,
    keys: Sequence[str | int] | None = None,
    ids: Sequence[str] | None = None,
) -> ReplayPlan:
    """Given offsets; of them only given keys, or events of given ids.

    Raises:
        ReplayExpiredError: they are below what the log holds.
        InvalidSettingError: they are above.
    """
    spans = log.spans(sorted({part.topic for part in ranges}))
    for part in ranges:
        span = spans.get(part.at)
        if span is None or part.start > part.end or part.end > span.end:
            held = "nothing" if span is None else f"{span.begin} to {span.end}"
            raise InvalidSettingError(
                f"offsets {part.start} to {part.end} of {part.topic!r} partition {part.partition}: it holds {held}",
                setting="ranges",
                value=str(part),
            )
        if part.start < span.begin:
            raise ReplayExpiredError(
                f"offsets {part.start} to {part.end} of {part.topic!r} partition {part.partition}: retention has "
                f"removed what was before {span.begin}",
                topic=part.topic,
                partition=part.partition,
                begin=span.begin,
            )
    ends = {at: span.end for at, span in spans.items()}
    return ReplayPlan(
        tuple(part for part in ranges if part.end > part.start),
        _as_tuple(ends),
        keys=None if keys is None else frozenset(keys),
        ids=None if ids is None else frozenset(ids),
    )


def happened_before(
    stream: EventStream, topics: Sequence[str], moment: datetime, since: AsOf
) -> tuple[list[Record], dict[TopicPartition, int]]:
    """Records that were appended at offsets ``since`` or later, and happened before ``moment``; and the ends looked at.

    Record batches all of whose events happened later are not read.
    """
    ends = as_of_now(stream.log, topics)
    found: list[Record] = []
    for at, end in ends.items():
        start = min(since.get(at, end), end)
        for low, high in stream.log.with_event_times(at, _LONG_AGO, to_micros(moment), start=start, end=end):
            found += [one for one in stream.records(at.topic, at.partition, low, high) if one.event_time < moment]
    return found, ends


def _require_whole(log: EventLog, at: TopicPartition, first: int, start: datetime) -> None:
    begin = log.spans([at.topic])[at].begin
    oldest = log.append_time_of(at, begin) if begin > 0 else None
    gone = begin > 0 and (oldest is None or oldest > first)
    if gone:
        left = "all of it" if oldest is None else f"what was before {from_micros(oldest).isoformat(timespec='seconds')}"
        raise ReplayExpiredError(
            f"the window from {start.isoformat()} on cannot be replayed: retention has removed {left} from topic "
            f"{at.topic!r} partition {at.partition}; raise the topic's retention, or replay a later window",
            topic=at.topic,
            partition=at.partition,
            begin=begin,
        )


def _as_tuple(ends: AsOf) -> tuple[tuple[str, int, int], ...]:
    return tuple((at.topic, at.partition, end) for at, end in sorted(ends.items()))
