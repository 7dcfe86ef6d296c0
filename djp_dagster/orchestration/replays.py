"""Replays in Dagster: what a partition reads, which partitions are due, and which have become stale."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import dagster as dg
import msgspec
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.processing.batch import ByteCount, read_ranges
from djp_dagster.processing.consumer import Consumer
from djp_dagster.replaying.plan import AsOf, ReplayPlan, TimeOf, parse_as_of, plan_look
from djp_dagster.replaying.replay import ReplayReport
from djp_dagster.streams.model import Range
from djp_dagster.streams.records import Record, TopicPartition, to_micros
from djp_dagster.streams.stream import EventStream

_MOST_RECORDS = 100_000
"""So many are looked at per tick, which must end within a minute; the next one goes on."""
_MOST_MADE = 1_000
_MARKS = 10
_MINUTE = 60_000_000


class ReplayConfig(dg.Config):
    """How a partition is replayed."""

    as_of: dict[str, int] = Field(
        default={},
        description='The ends of an earlier replay, to reproduce it: {"clicks:0": 1200}; as of now if empty.',
    )
    max_events_per_second: float | None = Field(default=None, description="So that live consumers stay quick.")

    def ends(self) -> AsOf | None:
        """The same for the core."""
        return parse_as_of(self.as_of) if self.as_of else None


class Replayed(NamedTuple):
    """What a replay asset is made of, for those who look after its partitions.

    Attributes:
        key, window_key: of the value, and of the records it is made of.
        lateness_s: a window is closed so long after its end.
    """

    consumer: Consumer
    key: dg.AssetKey
    window_key: dg.AssetKey
    partitions: dg.TimeWindowPartitionsDefinition
    by: TimeOf
    lateness_s: float

    @property
    def topics(self) -> list[str]:
        """What it reads."""
        return [topic.name for topic in self.consumer.topics]

    def closed(self, now: datetime) -> Iterator[dg.TimeWindow]:
        """The windows that are closed, the last one first."""
        at = datetime.fromtimestamp(now.timestamp() - self.lateness_s, self.partitions.start.tzinfo)
        end = self.partitions.end
        window = self._before(at if end is None or at < end else end)
        for _ in range(-self.partitions.end_offset):  # the last ones are no partitions yet
            window = None if window is None else self._before(window.start)
        while window is not None and window.start >= self.partitions.start:
            yield window
            window = self._before(window.start)

    def _before(self, moment: datetime) -> dg.TimeWindow | None:
        # By default Dagster bounds windows by its own clock.
        return self.partitions.get_prev_partition_window(moment, respect_bounds=False)

    def key_of(self, window: dg.TimeWindow) -> str:
        """The partition of a window."""
        return self.partitions.get_partition_key_for_timestamp(window.start.timestamp())

    def due(self, instance: dg.DagsterInstance, now: datetime, most: int) -> list[str]:
        """Of the last windows that are closed, those that were not replayed since, the oldest first."""
        found = []
        for window in islice(self.closed(now), most):
            partition = self.key_of(window)
            made_since = dg.AssetRecordsFilter(
                asset_key=self.key,
                asset_partitions=[partition],
                after_timestamp=window.end.timestamp() + self.lateness_s,
            )
            if not instance.fetch_materializations(made_since, limit=1).records:
                found.append(partition)
        return found[::-1]

    def begun(self, now: datetime) -> Iterator[dg.TimeWindow]:
        """The windows that have begun and are not closed, the oldest first."""
        last = next(self.closed(now), None)
        after = self.partitions.start if last is None else last.end
        while self.partitions.end is None or after < self.partitions.end:
            window = self.partitions.get_next_partition_window(after, respect_bounds=False)
            if window is None or window.start > now:
                break
            yield window
            after = window.end

    def looked_at(self, made: set[str], now: datetime) -> datetime | None:
        """The end of the last window that is closed, or that was made before it was closed."""
        last = next(self.closed(now), None)
        end = None if last is None else last.end
        return max((window.end for window in self.begun(now) if self.key_of(window) in made), default=end)


_replayed: "WeakKeyDictionary[dg.AssetsDefinition, Replayed]" = WeakKeyDictionary()


def remember(asset: dg.AssetsDefinition, replayed: Replayed) -> None:
    """Keep what an asset is made of, for as long as it."""
    _replayed[asset] = replayed


def replayed_by(asset: dg.AssetsDefinition) -> Replayed:
    """What `build_replay_asset` has made the asset of.

    Raises:
        InvalidSettingError: it has not.
    """
    found = _replayed.get(asset)
    if found is None:
        raise InvalidSettingError(
            f"{asset!r} was not made by build_replay_asset", setting="asset", value=type(asset).__name__
        )
    return found


def version_of(plan: ReplayPlan, events: int) -> dg.DataVersion:
    """The data version of a window: other records, another version."""
    said = msgspec.json.encode([plan.ranges, plan.window, events])
    return dg.DataVersion(hashlib.blake2b(said, digest_size=10).hexdigest())


def window_metadata(plan: ReplayPlan, report: ReplayReport) -> dict[str, Any]:
    """What is said of the records of a window."""
    return {
        "events": report.events,
        "bytes": report.bytes,
        "as_of": dg.MetadataValue.json({f"{topic}:{part}": end for topic, part, end in plan.as_of}),
    }


def value_metadata(report: ReplayReport) -> dict[str, Any]:
    """What is said of a replay."""
    return {
        **report.counts,
        **report.gauges,
        "events": report.events,
        "emitted_to_shadow": report.emitted,
        "failed_records": report.failed,
        "seconds": round(report.seconds, 6),
        "events_per_second": round(report.events / report.seconds, 3) if report.seconds else 0.0,
    }


class Stale(NamedTuple):
    """A partition that lacks events that have come since it was made.

    Attributes:
        events: how many have been found now.
        is_marked: whether Dagster knows that it is stale.
        is_closed: whether its window is.
    """

    partition: str
    events: int
    is_marked: bool
    is_closed: bool


class Seen(NamedTuple):
    """How far a sensor has looked.

    Attributes:
        ends: at which records.
        made: at which materializations, as Dagster numbers them.
    """

    ends: AsOf
    made: str | None = None


class _Made(NamedTuple):
    as_of: AsOf
    is_marked: bool


def find_stale(
    instance: dg.DagsterInstance, stream: EventStream, replayed: Replayed, seen: Seen, now: datetime
) -> tuple[list[Stale], Seen]:
    """Partitions for which events have come after they were made; and how far was looked now.

    What was appended since is looked at once. A replay that was under way then is looked at when it has ended: it may
    be as of an earlier end.

    Args:
        instance: knows which are made, and as of when.
        stream: the events.
        replayed: the asset.
        seen: look at what came since.
        now: the time.
    """
    made_at_all = set(instance.get_materialized_partitions(replayed.window_key))
    until = replayed.looked_at(made_at_all, now)
    if until is None or not made_at_all or replayed.by == "append_time":
        ends = {at: span.end for at, span in stream.log.spans(replayed.topics).items()}
        return [], Seen(ends, seen.made)
    new, cursor = _made_since(instance, replayed.window_key, seen.made)
    found: Counter[str] = Counter()
    for partition in new & made_at_all:
        found[partition] += _missed(instance, stream, replayed, partition, seen.ends)
    ranges, ends = plan_look(stream.log, replayed.topics, until, seen.ends, most=_MOST_RECORDS)
    known: dict[str, _Made | None] = {}
    for partition, record in _by_partition(stream, replayed, ranges):
        if partition not in known:
            known[partition] = (
                _last_made(instance, replayed.window_key, partition) if partition in made_at_all else None
            )
        made = known[partition]
        if made is not None and record.offset >= made.as_of.get(TopicPartition(record.topic, record.partition), 0):
            found[partition] += 1
    last = next(replayed.closed(now), None)
    return [_stale(instance, replayed, *one, last) for one in sorted((+found).items())], Seen(ends, cursor)


def _stale(
    instance: dg.DagsterInstance, replayed: Replayed, partition: str, events: int, last: dg.TimeWindow | None
) -> Stale:
    made = _last_made(instance, replayed.window_key, partition)
    window = replayed.partitions.time_window_for_partition_key(partition)
    return Stale(partition, events, made is not None and made.is_marked, last is not None and window.end <= last.end)


def _missed(instance: dg.DagsterInstance, stream: EventStream, replayed: Replayed, partition: str, before: AsOf) -> int:
    """How many events a partition lacks of those that were looked at when it was being made."""
    made = _last_made(instance, replayed.window_key, partition) if before else None
    if made is None:
        return 0
    window = replayed.partitions.time_window_for_partition_key(partition)
    first, last = to_micros(window.start), to_micros(window.end)
    ranges = []
    for at, end in before.items():
        start = made.as_of.get(at, 0)
        found = stream.log.with_event_times(at, first, last, start=start, end=end)
        ranges += [Range(at.topic, at.partition, low, high) for low, high in found]
    return sum(one == partition for one, _ in _by_partition(stream, replayed, ranges))


def _by_partition(stream: EventStream, replayed: Replayed, ranges: Sequence[Range]) -> Iterator[tuple[str, Record]]:
    """The records with the partition each belongs to; not those before the first one, or that are no events."""
    keys: dict[int, str] = {}
    for records, _ in read_ranges(stream.log, ranges, frozenset(), "", ByteCount(), stream.claimed):
        for record in records:
            if record.event_time < replayed.partitions.start:
                continue
            minute = to_micros(record.event_time) // _MINUTE  # windows begin at full ones
            if minute not in keys:
                keys[minute] = replayed.partitions.get_partition_key_for_timestamp(minute * 60)
            yield keys[minute], record


def _made_since(instance: dg.DagsterInstance, key: dg.AssetKey, cursor: str | None) -> tuple[set[str], str | None]:
    """Which partitions were made since, and the new cursor."""
    result = instance.fetch_materializations(key, limit=_MOST_MADE, cursor=cursor, ascending=True)
    found = {record.partition_key for record in result.records if record.partition_key is not None and _is_made(record)}
    return found, result.cursor if result.records else cursor


def _is_made(record: dg.EventLogRecord) -> bool:
    """Whether it is of a replay, and not of `mark_stale`."""
    made = record.asset_materialization
    return made is not None and "as_of" in made.metadata


def _last_made(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> _Made | None:
    """As of which ends the partition was made last; None if it never was."""
    filters = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition])
    for number, record in enumerate(instance.fetch_materializations(filters, limit=_MARKS).records):
        made = record.asset_materialization
        if made is not None and _is_made(record):
            value: Any = made.metadata["as_of"].value
            return _Made(parse_as_of(value), is_marked=number > 0)
    return None


def mark_stale(replayed: Replayed, stale: Sequence[Stale], seen: Seen) -> Iterator[dg.AssetMaterialization]:
    """What tells Dagster that the records of these partitions have changed, so that what was made of them is stale."""
    for one in stale:
        if not one.is_marked:
            yield dg.AssetMaterialization(
                replayed.window_key,
                partition=one.partition,
                description=f"{one.events} events have come since it was replayed",
                metadata={"late_events": one.events},
                tags={"dagster/data_version": f"late-{digest(seen)}"},
            )


def digest(seen: Seen) -> str:
    """Something short that differs from look to look."""
    return hashlib.blake2b(encode_seen(seen).encode(), digest_size=10).hexdigest()


class _Cursor(msgspec.Struct):
    ends: dict[str, int] = {}
    made: str | None = None


def encode_seen(seen: Seen) -> str:
    """How far a sensor has looked, as its cursor."""
    ends = {f"{at.topic}:{at.partition}": end for at, end in sorted(seen.ends.items())}
    return msgspec.json.encode(_Cursor(ends, seen.made)).decode()


def decode_seen(cursor: str | None) -> Seen:
    """The same of a cursor, which is a hint: one that cannot be read begins at the beginning."""
    try:
        found = msgspec.json.decode(cursor or "{}", type=_Cursor)
        return Seen(parse_as_of(found.ends), found.made)
    except (msgspec.MsgspecError, InvalidSettingError):
        return Seen({})
