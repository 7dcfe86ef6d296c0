"""Whether the inputs of a join lie together by its key; and topics of its own for those that do not."""

from collections.abc import Sequence

import msgspec

from djp_dagster.errors import CoPartitionError, MissingKeyError
from djp_dagster.joining.parts import PartSpec
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import Consumer, consumer
from djp_dagster.streams.records import Record
from djp_dagster.streams.topics import Topic, key_of


def co_partitioned(
    group: str, key: str, parts: Sequence[PartSpec], *, repartition: bool
) -> tuple[tuple[PartSpec, ...], tuple[Consumer, ...]]:
    """The parts with inputs that lie together by ``key``, and the consumers that see to that.

    Raises:
        CoPartitionError: inputs are keyed otherwise, or differ in the number of partitions.
    """
    count = max((spec.topic.partitions for spec in parts if spec.topic.key == key), default=0)
    count = count or max(spec.topic.partitions for spec in parts)
    apart = {spec.topic.name: spec.topic for spec in parts if (spec.topic.key, spec.topic.partitions) != (key, count)}
    if apart and not repartition:
        found = ", ".join(f"{name!r} by {topic.key!r} into {topic.partitions}" for name, topic in sorted(apart.items()))
        raise CoPartitionError(
            f"join {group!r} needs its inputs partitioned by {key!r} into {count}, so that all parts of a key meet in "
            f"one task; not so: {found}. Declare them alike, or let it copy them: @join(repartition=True)",
            group=group,
            topics=sorted(apart),
        )
    moved = {name: _repartitioned(group, topic, key, count) for name, topic in apart.items()}
    placed = tuple(
        msgspec.structs.replace(spec, topic=moved[spec.topic.name][0]) if spec.topic.name in moved else spec
        for spec in parts
    )
    return placed, tuple(helper for _, helper in moved.values())


def _repartitioned(group: str, topic: Topic, key: str, partitions: int) -> tuple[Topic, Consumer]:
    target = Topic(
        f"{topic.name}-by-{key}-for-{group}",
        partitions=partitions,
        key=key,
        max_event_bytes=topic.max_event_bytes,
        retention=topic.retention if topic.retention is not None else "1d",
    )

    def pass_on(batch: Batch) -> None:
        for records in batch.chunks():
            for record in records:
                try:
                    value = key_of(_without_partition_key(record), key, topic.name)
                except MissingKeyError as error:
                    batch.fail(record, error)
                    continue
                # The copy is appended later; when the event happened must not change.
                ext = {**(record.ext or {}), "partitionkey": value}
                batch.emit(msgspec.structs.replace(record, time=record.event_time, ext=ext), source=record)

    pass_on.__doc__ = f"The events of {topic.name}, partitioned by {key} for {group}."
    helper = consumer(topic=topic, emits=[target], group=f"{group}-repartition-{topic.name}", code_version="1")(pass_on)
    return target, helper


def _without_partition_key(record: Record) -> Record:
    ext = record.ext
    if not ext or "partitionkey" not in ext:
        return record
    return msgspec.structs.replace(record, ext={name: value for name, value in ext.items() if name != "partitionkey"})
