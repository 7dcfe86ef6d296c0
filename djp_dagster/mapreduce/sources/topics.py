"""`TopicRange`: the records of a topic, by ranges of offsets; and `Items`: what is in memory already."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import InvalidSettingError, SourceError
from djp_dagster.mapreduce.sources.base import Block, Form
from djp_dagster.streams.records import Record, TopicPartition
from djp_dagster.streams.stream import EventStream, open_stream
from djp_dagster.streams.topics import Topic

_ROWS = 1 << 11
_EVENTS = 500_000
_EVENT_BYTES = 256
"""About, where a split must say how many bytes it has."""


class TopicRange:
    """The records of a topic up to its end as of the job's start. ``batch=True`` maps Arrow tables.

    A record is a `Record`. Nothing is committed, and no group moves: this only reads. What was read is in the result's
    ``sources``; given as ``until``, it is read exactly again.

    Args:
        topic: the topic, or its name.
        stream: its file or URL; in Dagster the resource ``event_stream`` unless given.
        since: a time: records appended from then on; or offsets by partition. All there are unless given.
        until: a time: records appended before; or offsets by partition. The ends at the job's start unless given.
        split_events: a task maps at most so many.
    """

    def __init__(
        self,
        topic: Topic | str,
        *,
        stream: "str | Path | None" = None,
        since: datetime | Mapping[int, int] | None = None,
        until: datetime | Mapping[int, int] | None = None,
        split_events: int = _EVENTS,
    ) -> None:
        self.topic = topic if isinstance(topic, str) else topic.name
        self.open: Callable[[], EventStream] | None = None if stream is None else partial(open_stream, str(stream))
        self._since, self._until, self._split_events = since, until, max(1, split_events)

    def within(self, opener: Callable[[], EventStream]) -> "TopicRange":
        """The same of the stream that ``opener``, which is picklable, opens; unless one was given."""
        found = copy(self)
        found.open = self.open or opener
        return found

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return "records", "arrow", "pandas"

    def plan(self) -> Sequence["TopicSplit"]:
        """See `Source`."""
        if self.open is None:
            raise InvalidSettingError(
                f"which stream has topic {self.topic!r}? Give TopicRange(..., stream=file or URL), or run it in "
                "Dagster with the resource event_stream",
                setting="stream",
                value=None,
            )
        with self.open() as stream:
            splits = []
            for at, span in sorted(stream.log.spans([self.topic]).items()):
                start = _bound(stream, at, self._since, span.begin)
                end = min(_bound(stream, at, self._until, span.end), span.end)
                if start < span.begin:
                    raise SourceError(
                        f"topic {self.topic!r} partition {at.partition} begins at offset {span.begin}: {start} is no "
                        "longer kept",
                        uri=self.topic,
                    )
                splits += [
                    TopicSplit(
                        self.open,
                        stream.incarnation,
                        at.topic,
                        at.partition,
                        first,
                        min(first + self._split_events, end),
                    )
                    for first in range(start, end, self._split_events)
                ]
        return splits


def _bound(stream: EventStream, at: TopicPartition, given: datetime | Mapping[int, int] | None, default: int) -> int:
    if given is None:
        return default
    if isinstance(given, datetime):
        if given.tzinfo is None:
            raise InvalidSettingError(f"{given!r} has no time zone; add one", setting="since", value=given)
        return stream.log.offset_at(at, round(given.timestamp() * 1_000_000))
    return given.get(at.partition, default)


class TopicSplit(msgspec.Struct, frozen=True):
    """See `Split`. The offsets from ``start`` on and before ``end``."""

    open: Any
    incarnation: str
    topic: str
    partition: int
    start: int
    end: int

    def __repr__(self) -> str:
        """Without what opens the stream, which may hold a password."""
        return f"TopicSplit({self.uri}, {self.start} to {self.end})"

    @property
    def uri(self) -> str:
        """See `Split`."""
        return f"topic:{self.topic}/{self.partition}"

    @property
    def size(self) -> int:
        """See `Split`; a guess."""
        return (self.end - self.start) * _EVENT_BYTES

    def identity(self) -> str:
        """See `Split`. Without what opens the stream, which may hold a password."""
        return f"{self.incarnation} {self.uri} {self.start} {self.end}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        with self.open() as stream:
            if stream.incarnation != self.incarnation:
                raise SourceError("another stream lies where the topic was when the job began", uri=self.uri)
            waiting: list[Record] = []
            size = 0
            for records, more in stream.record_batches(self.topic, self.partition, self.start, self.end):
                waiting, size = waiting + records if waiting else records, size + more
                if len(waiting) >= _ROWS:
                    yield _block(waiting, size, form)
                    waiting, size = [], 0
            if waiting:
                yield _block(waiting, size, form)


def _block(records: list[Record], size: int, form: Form) -> Block:
    whole: Any = None
    if form != "records":
        from djp_dagster.processing.tables import RowCollector

        collector = RowCollector()
        collector.add(records)
        whole = collector.table()
        whole = whole.to_pandas() if form == "pandas" else whole
    return Block(
        records=records,
        whole=whole,
        size=size,
        count=len(records),
        locate=lambda number: (records[number].offset, records[number].id.encode()),
    )


class Items:
    """What is in memory, as a source: for unit tests, and for small things.

    Args:
        items: the records.
        split_items: a task maps at most so many.
    """

    def __init__(self, items: Iterable[Any], *, split_items: int = 100_000) -> None:
        self._items = list(items)
        self._split_items = max(1, split_items)

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return ("records",)

    def plan(self) -> Sequence["ItemsSplit"]:
        """See `Source`."""
        step = self._split_items
        return [ItemsSplit(self._items[start : start + step], start) for start in range(0, len(self._items), step)]


class ItemsSplit(msgspec.Struct, frozen=True):
    """See `Split`."""

    items: list[Any]
    start: int

    @property
    def uri(self) -> str:
        """See `Split`."""
        return "memory"

    @property
    def size(self) -> int:
        """See `Split`; the number of items."""
        return len(self.items)

    def identity(self) -> str:
        """See `Split`; what is in memory is never the same again."""
        return f"memory {id(self.items)} {self.start} {len(self.items)}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        yield Block(
            records=self.items,
            size=len(self.items),
            count=len(self.items),
            locate=lambda number: (self.start + number, repr(self.items[number])[:1000].encode()),
        )
