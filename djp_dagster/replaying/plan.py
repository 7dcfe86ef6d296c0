"""`ReplayPlan`: exactly which records a replay reads."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Literal

import msgspec

from djp_dagster.errors import InvalidSettingError, MissingKeyError, ReplayExpiredError
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import PartitionSpan, Range
from djp_dagster.streams.records import Record, TopicPartition, from_micros, to_micros
from djp_dagster.streams.topics import key_of

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

    def pick(self, records: list[Record], keys: Mapping[str, str | None]) -> list[Record]:
        """Those of the records that are wanted.

        Args:
            records: read from the ranges.
            keys: the key of each topic.
        """
        if self.window is not None:
            first, last = map(from_micros, self.window)
            # Moments in UTC compare in C; this runs once for every record of a window.
            records = [one for one in records if first <= (one.time or one.append_time) < last]
        if self.ids is not None:
            records = [one for one in records if one.id in self.ids]
        if self.keys is not None:
            records = [one for one in records if _key_of(one, keys.get(one.topic)) in self.keys]
        return records


def _key_of(record: Record, path: str | None) -> str | int | None:
    try:
        return key_of(record, path, record.topic)
    except MissingKeyError:
        return None


def parse_as_of(text: Mapping[str, int]) -> dict[TopicPartition, int]:
    """Ends as people and metadata write them: ``{"clicks:0": 1200}``.

    Raises:
        InvalidSettingError: naming what is no partition.
    """
    ends = {}
    for place, end in text.items():
        at = parse_place(place, setting="as_of")
        if end < 0:
            raise InvalidSettingError(f"as_of={{{place!r}: {end}}} must be 0 or more", setting="as_of", value=end)
        ends[at] = end
    return ends


def parse_place(text: str, *, setting: str) -> TopicPartition:
    """A partition as people write it: ``clicks:0``.

    Raises:
        InvalidSettingError: it is none.
    """
    topic, _, partition = text.rpartition(":")
    if not topic or not partition.isdecimal():
        raise InvalidSettingError(
            f"{text!r} in {setting} must be a partition, 'topic:number'", setting=setting, value=text
        )
    return TopicPartition(topic, int(partition))


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
        InvalidSettingError: the window has no time zone or no length, or ``as_of`` is of other partitions.
    """
    first, last = _window(start, end)
    spans = log.spans(topics)
    ends = _ends(spans, as_of)
    ranges: list[Range] = []
    for at, known_end in sorted(ends.items()):
        _require_whole(log, at, spans[at], first)
        if by == "append_time":
            low, high = log.offset_at(at, first), min(known_end, log.offset_at(at, last))
            found = [(low, high)] if high > low else []
        else:
            found = log.with_event_times(at, first, last, start=spans[at].begin, end=known_end)
        ranges.extend(Range(at.topic, at.partition, low, high) for low, high in found)
    window = (first, last) if by == "event_time" else None
    return ReplayPlan(tuple(ranges), _as_tuple(ends), window)


def _window(start: datetime, end: datetime) -> tuple[int, int]:
    if start.tzinfo is None or end.tzinfo is None:
        raise InvalidSettingError(
            f"the window from {start} to {end} needs a time zone", setting="start", value=start.isoformat()
        )
    first, last = to_micros(start), to_micros(end)
    if last <= first:
        raise InvalidSettingError(
            f"the window from {start} to {end} must end after it begins", setting="end", value=end.isoformat()
        )
    return first, last


def _ends(spans: Mapping[TopicPartition, PartitionSpan], as_of: AsOf | None) -> dict[TopicPartition, int]:
    """The ends of all partitions as of now, or as they are given."""
    if as_of is None:
        return {at: span.end for at, span in spans.items()}
    if set(as_of) != set(spans) or any(end > spans[at].end for at, end in as_of.items()):
        known = ", ".join(f"{at.topic}:{at.partition} up to {span.end}" for at, span in sorted(spans.items()))
        raise InvalidSettingError(
            "as_of must name each partition that is read, at an offset that it has come to: "
            f"{known}; not { {f'{at.topic}:{at.partition}': end for at, end in sorted(as_of.items())} }",
            setting="as_of",
            value=str(as_of),
        )
    return dict(as_of)


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
        InvalidSettingError: they are above, or overlap.
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
    _require_disjoint(ranges)
    return ReplayPlan(
        tuple(part for part in ranges if part.end > part.start),
        _as_tuple(_ends(spans, None)),
        keys=None if keys is None else frozenset(keys),
        ids=None if ids is None else frozenset(ids),
    )


def plan_look(
    log: EventLog, topics: Sequence[str], moment: datetime, since: AsOf, *, most: int
) -> tuple[list[Range], dict[TopicPartition, int]]:
    """What was appended at offsets ``since`` or later and may have happened before ``moment``; and how far this goes.

    Args:
        log: where it is.
        topics: which.
        moment: record batches all of whose events happened later are passed over.
        since: from where on; from the beginning in partitions it does not name.
        most: so many records; the rest is left for the next look.
    """
    found: list[Range] = []
    seen: dict[TopicPartition, int] = {}
    for at, span in sorted(log.spans(topics).items()):
        start = min(max(since.get(at, 0), span.begin), span.end)
        seen[at] = span.end
        for low, high in log.with_event_times(at, _LONG_AGO, to_micros(moment), start=start, end=span.end):
            part = Range(at.topic, at.partition, low, min(high, low + most))
            found += [part] if part.end > low else []
            most -= part.end - low
            if part.end < high:
                seen[at] = part.end
                break
    return found, seen


def _require_disjoint(ranges: Sequence[Range]) -> None:
    ordered = sorted(ranges, key=lambda part: (part.at, part.start))
    for one, other in pairwise(ordered):
        if one.at == other.at and other.start < one.end:
            raise InvalidSettingError(
                f"offsets {other.start} to {min(one.end, other.end)} of {one.topic!r} partition {one.partition} are "
                "named twice; a replay reads each record once",
                setting="ranges",
                value=str(other),
            )


def _require_whole(log: EventLog, at: TopicPartition, span: PartitionSpan, first: int) -> None:
    if span.begin == 0:
        return
    oldest = log.append_time_of(at, span.begin)
    # Whatever is gone was appended up to then.
    until = span.last_append_micros if oldest is None else oldest
    if until >= first:
        left = "all of it" if oldest is None else f"what was before {from_micros(oldest).isoformat(timespec='seconds')}"
        raise ReplayExpiredError(
            f"the window from {from_micros(first).isoformat()} on cannot be replayed: retention has removed {left} "
            f"from topic {at.topic!r} partition {at.partition}; raise the topic's retention, or replay a later window",
            topic=at.topic,
            partition=at.partition,
            begin=span.begin,
        )


def _as_tuple(ends: AsOf) -> tuple[tuple[str, int, int], ...]:
    return tuple((at.topic, at.partition, end) for at, end in sorted(ends.items()))
