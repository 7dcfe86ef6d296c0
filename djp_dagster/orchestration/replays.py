"""Replays in Dagster: what a partition reads, which partitions are due, and which have become stale."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import dagster as dg
import msgspec
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.replaying.plan import AsOf, ReplayPlan, TimeOf, happened_before, parse_as_of
from djp_dagster.replaying.replay import ReplayReport
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.stream import EventStream

PARTITION_TAG = "dagster/partition"


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

    def closed(self, now: datetime) -> dg.TimeWindow | None:
        """The last window that is closed."""
        at = datetime.fromtimestamp(now.timestamp() - self.lateness_s, timezone.utc)
        return self.partitions.get_prev_partition_window(at)

    def due(self, now: datetime, most: int) -> list[str]:
        """The keys of the last closed windows, oldest first."""
        last = self.closed(now)
        if last is None:
            return []
        first = self.partitions.get_first_partition_window()
        if first is None or last.end <= first.start:
            return []
        keys = self.partitions.get_partition_keys_in_time_window(dg.TimeWindow(first.start, last.end))
        return list(keys)[-most:]


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
    """A partition that lacks events that have come since it was made."""

    partition: str
    events: int


def find_stale(
    instance: dg.DagsterInstance, stream: EventStream, replayed: Replayed, since: AsOf, now: datetime
) -> tuple[list[Stale], dict[TopicPartition, int]]:
    """Partitions for which events have come after they were made; and the offsets looked at.

    Args:
        instance: knows which are made, and as of when.
        stream: the events.
        replayed: the asset.
        since: look at what was appended from there on.
        now: the time.
    """
    last = replayed.closed(now)
    if last is None or replayed.by == "append_time":
        return [], {}
    late, ends = happened_before(stream, replayed.topics, last.end, since)
    made: dict[str, Mapping[TopicPartition, int] | None] = {}
    counts: dict[str, int] = {}
    first = replayed.partitions.get_first_partition_window()
    for record in late:
        if first is None or record.event_time < first.start:
            continue
        partition = replayed.partitions.get_partition_key_for_timestamp(record.event_time.timestamp())
        if partition not in made:
            made[partition] = _as_of(instance, replayed.window_key, partition)
        known = made[partition]
        if known is not None and record.offset >= known.get(TopicPartition(record.topic, record.partition), 0):
            counts[partition] = counts.get(partition, 0) + 1
    return [Stale(partition, number) for partition, number in sorted(counts.items())], ends


def _as_of(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> Mapping[TopicPartition, int] | None:
    """The ends that the partition was made as of; None if it was never made."""
    filters = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition])
    for record in instance.fetch_materializations(filters, limit=10).records:
        made = record.asset_materialization
        if made is not None and "as_of" in made.metadata:
            value: Any = made.metadata["as_of"].value
            return parse_as_of(value)
    return None


def mark_stale(replayed: Replayed, stale: Sequence[Stale], ends: AsOf) -> Iterator[dg.AssetMaterialization]:
    """What tells Dagster that the records of these partitions have changed, so that what was made of them is stale."""
    said = hashlib.blake2b(repr(sorted(ends.items())).encode(), digest_size=10).hexdigest()
    for partition, events in stale:
        yield dg.AssetMaterialization(
            replayed.window_key,
            partition=partition,
            description=f"{events} events have come since it was replayed",
            metadata={"late_events": events},
            tags={"dagster/data_version": f"late-{said}"},
        )


def encode_ends(ends: AsOf) -> str:
    """Offsets as a cursor."""
    return msgspec.json.encode({f"{at.topic}:{at.partition}": end for at, end in ends.items()}).decode()


def decode_ends(cursor: str | None) -> AsOf:
    """Offsets of a cursor, which is a hint: one that cannot be read begins at the beginning."""
    try:
        return parse_as_of(msgspec.json.decode(cursor or "{}", type=dict[str, int]))
    except (msgspec.MsgspecError, InvalidSettingError):
        return {}
