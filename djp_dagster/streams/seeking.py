"""Where a seek goes: the text a person types, and what it would change."""

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import NamedTuple, cast

from djp_dagster.errors import InvalidSettingError, OffsetOutOfRangeError
from djp_dagster.streams.records import TopicPartition, from_micros
from djp_dagster.streams.stream import EventStream, StartPosition, parse_start
from djp_dagster.units import parse_seconds

Target = StartPosition | Mapping[TopicPartition, int]


class Move(NamedTuple):
    """One partition of a seek.

    Attributes:
        again: records that would be handled again.
        skipped: records that would not be handled.
    """

    at: TopicPartition
    old: int
    new: int
    again: int
    skipped: int


def parse_target(text: str, now_micros: int) -> Target:
    """The target a text names: ``earliest``, ``latest``, a time, or ``topic:partition=offset[,...]``.

    A time is ISO 8601 with a zone, or a duration such as ``2h``, which means so long ago.

    Raises:
        InvalidSettingError: it names none of these.
    """
    if text in ("earliest", "latest"):
        return text
    if "=" not in text:
        return parse_time(text, now_micros)
    offsets: dict[TopicPartition, int] = {}
    for part in text.split(","):
        place, _, offset = part.strip().rpartition("=")
        topic, _, partition = place.rpartition(":")
        if not (topic and partition.isdecimal() and offset.isdecimal()):
            raise InvalidSettingError(
                f"{part!r} is no TOPIC:PARTITION=OFFSET; write it like orders:0=1200,orders:1=1350",
                setting="to",
                value=text,
            )
        offsets[TopicPartition(topic, int(partition))] = int(offset)
    return offsets


def parse_time(text: str, now_micros: int) -> datetime:
    """A time in ISO 8601 with a zone, or so long ago as a duration says.

    Raises:
        InvalidSettingError: it is neither.
    """
    found = _time(text) or _so_long_ago(text, now_micros)
    if found is None:
        example = datetime.now(timezone.utc).isoformat(timespec="seconds")
        raise InvalidSettingError(
            f"{text!r} is no time with a zone, such as {example}, nor a duration, such as 2h; "
            "or write earliest or latest",
            setting="to",
            value=text,
        )
    return found


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00").replace("z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _so_long_ago(text: str, now_micros: int) -> datetime | None:
    if not text[-1:].isalpha():  # a bare number would be seconds, and nobody means that
        return None
    try:
        return from_micros(now_micros) - timedelta(seconds=parse_seconds(text, name="to"))
    except (InvalidSettingError, OverflowError):  # the latter: before the year 1
        return None


def plan_seek(stream: EventStream, group: str, target: Target) -> list[Move]:
    """What `EventStream.seek` would change as of now, for every partition of the group.

    Raises:
        UnknownGroupError: there is no such group.
        OffsetOutOfRangeError: the log does not hold a wanted position.
        InvalidSettingError: the group does not read a named partition.
    """
    old = stream.positions(group)
    new = old | _targets(stream, group, target)
    return [_move(stream, at, old[at], new[at]) for at in sorted(old)]


def _targets(stream: EventStream, group: str, target: Target) -> dict[TopicPartition, int]:
    topics = stream.coordinator.group(group).topics
    spans = stream.log.spans(topics)
    if target == "earliest":
        return {at: span.begin for at, span in spans.items()}
    if target == "latest":
        return {at: span.end for at, span in spans.items()}
    if not isinstance(target, Mapping):
        micros = cast(int, parse_start(target))
        return {at: stream.log.offset_at(at, micros) for at in spans}
    for at, offset in target.items():
        if at not in spans:
            raise InvalidSettingError(
                f"group {group!r} does not read topic {at.topic!r} partition {at.partition}; it reads "
                f"{', '.join(topics)}",
                setting="to",
                value=str(at),
            )
        if not spans[at].begin <= offset <= spans[at].end:
            raise OffsetOutOfRangeError(
                f"cannot seek {at.topic!r} partition {at.partition} to {offset}: it holds {spans[at].begin} to "
                f"{spans[at].end}",
                topic=at.topic,
                partition=at.partition,
                offset=offset,
            )
    return dict(target)


def _move(stream: EventStream, at: TopicPartition, old: int, new: int) -> Move:
    # Counted, not subtracted: offsets may have holes.
    before, after = (stream.log.backlog({at: offset}).events for offset in (old, new))
    return Move(at, old, new, again=max(after - before, 0), skipped=max(before - after, 0))
