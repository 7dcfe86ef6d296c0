"""``djp tail``."""

import base64
import heapq
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.claim_check.claims import DATAREF
from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.cli.reading import SHADOWED, TAIL_KEYS
from djp_dagster.errors import (
    InvalidClaimError,
    InvalidSettingError,
    MissingKeyError,
    OffsetOutOfRangeError,
    TransientError,
)
from djp_dagster.streams.records import CODEC_EVENTS, Record, TopicPartition, Undecodable, decode_records, to_micros
from djp_dagster.streams.topics import key_of

if TYPE_CHECKING:
    from djp_dagster.streams.model import PartitionSpan, TopicInfo
    from djp_dagster.streams.stream import EventStream

_LAST = 10
_READ_BYTES = 1 << 18
_LOOK_EVERY_S = 5.0
_RETRY_S = 1.0

Found = tuple[int, int, int, Record | Undecodable]
"""Append time, partition, offset, and what is there: in this order, the records of all partitions are one sequence."""
_order = itemgetter(0, 1, 2)


@click.command("tail")
@click.argument("topic")
@click.option(
    "-n", "limit", type=click.IntRange(0), help="The last N records, 10 unless told; with --from the first N."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is appended, until Ctrl-C.")
@click.option("-p", "--partition", type=click.IntRange(0), help="This partition only.")
@click.option(
    "--from",
    "start",
    metavar="earliest|latest|TIME|OFFSET",
    help="Begin there. TIME: 2026-11-03T14:05:00Z, or 2h for two hours ago, by append time. OFFSET needs --partition "
    "if the topic has several.",
)
@output.json_option
@pass_access
def command(
    access: Access,
    topic: str,
    limit: int | None,
    follow: bool,
    partition: int | None,
    start: str | None,
    as_json: bool,
) -> None:
    """Print records of TOPIC.

    The partitions are merged by append time. A line is append time, partition, offset, key and data. With --json it is
    the CloudEvents JSON of the event, and topic, partition, offset and append_time.
    """
    stream = access.open()
    info = stream.log.topic(topic)
    view = _View(stream, info, _chosen(info, partition))
    printer = _JsonPrinter(info) if as_json else _LinePrinter(info)
    watcher = stream.log.watch() if follow else None
    try:
        spans = view.spans()
        starts = _starts(stream, spans, start)
        if start is None:
            printer.all(view.last(spans, _LAST if limit is None else limit))
            ends = {at: span.end for at, span in spans.items()}
        else:
            ends = {at: max(span.end, starts[at]) for at, span in spans.items()}
            limit = _print_some(printer, view.between(starts, ends), limit)
        while watcher is not None and (start is None or limit is None or limit > 0):
            watcher.wait(_LOOK_EVERY_S)
            ends, limit = _print_new(printer, view, ends, limit if start is not None else None)
    finally:
        if watcher is not None:
            watcher.close()


def _chosen(info: "TopicInfo", partition: int | None) -> Sequence[int]:
    if partition is None:
        return range(info.partitions)
    if partition >= info.partitions:
        raise InvalidSettingError(
            f"topic {info.name!r} has partitions 0 to {info.partitions - 1}, not {partition}",
            setting="partition",
            value=partition,
        )
    return [partition]


def _starts(
    stream: "EventStream", spans: "Mapping[TopicPartition, PartitionSpan]", start: str | None
) -> dict[TopicPartition, int]:
    if start in (None, "earliest"):
        return {at: span.begin for at, span in spans.items()}
    if start == "latest":
        return {at: span.end for at, span in spans.items()}
    assert start is not None
    from djp_dagster.streams.seeking import parse_time

    if not start.isdigit():
        micros = to_micros(parse_time(start, stream.log.now_micros()))
        return {at: max(stream.log.offset_at(at, micros), span.begin) for at, span in spans.items()}
    if len(spans) > 1:
        raise click.UsageError(
            f"--from {start} is an offset, which each of {len(spans)} partitions has: add --partition"
        )
    return {at: _within(at, span, int(start)) for at, span in spans.items()}


def _within(at: TopicPartition, span: "PartitionSpan", offset: int) -> int:
    if not span.begin <= offset <= span.end:
        raise OffsetOutOfRangeError(
            f"topic {at.topic!r} partition {at.partition} holds offsets {span.begin} to {span.end - 1}, not {offset}",
            topic=at.topic,
            partition=at.partition,
            offset=offset,
        )
    return offset


def _print_some(printer: "_Printer", found: Iterable[Found], limit: int | None) -> int | None:
    """Print at most ``limit`` of them; how many may still come."""
    before = printer.printed
    printer.all(islice(found, limit))
    return None if limit is None else limit - (printer.printed - before)


def _print_new(
    printer: "_Printer", view: "_View", seen: Mapping[TopicPartition, int], limit: int | None
) -> tuple[dict[TopicPartition, int], int | None]:
    """Print what was appended since; the new ends, and how many may still come."""
    try:
        spans = view.spans()
        starts = {}
        for at, span in spans.items():
            starts[at] = max(seen[at], span.begin)
            if seen[at] < span.begin:
                output.note(
                    f"partition {at.partition}: retention removed records {seen[at]} to {span.begin - 1} unseen"
                )
        ends = {at: span.end for at, span in spans.items()}
        if ends != seen:
            limit = _print_some(printer, view.between(starts, ends), limit)
    except TransientError as error:
        # Nothing is skipped: what could not be read is looked for again. What was printed may be printed twice.
        output.note(f"{error}; trying again")
        time.sleep(_RETRY_S)
        return dict(seen), limit
    return ends, limit


class _View:
    """The chosen partitions of a topic."""

    def __init__(self, stream: "EventStream", info: "TopicInfo", partitions: Sequence[int]) -> None:
        self._stream, self._info = stream, info
        self._chosen = [TopicPartition(info.name, partition) for partition in partitions]

    def spans(self) -> "dict[TopicPartition, PartitionSpan]":
        """What each partition holds now."""
        spans = self._stream.log.spans([self._info.name])
        if any(at not in spans for at in self._chosen):
            raise InvalidSettingError(
                f"topic {self._info.name!r} was deleted meanwhile", setting="topic", value=self._info.name
            )
        return {at: spans[at] for at in self._chosen}

    def last(self, spans: "Mapping[TopicPartition, PartitionSpan]", number: int) -> list[Found]:
        """The ``number`` records appended last; no more than these are kept in memory."""
        best: list[tuple[tuple[int, int, int], Found]] = []
        for at, span in spans.items():
            for found in self._read(at, max(span.begin, span.end - number), span.end):
                entry = (_order(found), found)
                if len(best) < number:
                    heapq.heappush(best, entry)
                elif number:
                    heapq.heappushpop(best, entry)
        return [found for _, found in sorted(best, key=itemgetter(0))]

    def between(self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> Iterator[Found]:
        """The records of all partitions by append time, read as they are asked for."""
        return heapq.merge(*(self._read(at, start, ends[at]) for at, start in starts.items()), key=_order)

    def _read(self, at: TopicPartition, offset: int, end: int) -> Iterator[Found]:
        while offset < end:
            for batch in self._stream.log.read(at, offset, end=end, max_bytes=_READ_BYTES):
                if batch.codec != CODEC_EVENTS:
                    raise InvalidSettingError(
                        f"topic {at.topic!r} is a changelog, which holds state and no events", setting="topic", value=at
                    )
                records, bad = decode_records(batch, offset, end)
                for found in _in_order(records, bad):
                    yield batch.append_micros, at.partition, found.offset, found
                offset = min(batch.end_offset, end)


def _in_order(records: list[Record], bad: list[Undecodable]) -> list[Record | Undecodable]:
    found: list[Record | Undecodable] = [*records, *bad]
    return sorted(found, key=lambda one: one.offset) if bad else found


class _Printer(ABC):
    """Prints records, and counts them."""

    def __init__(self, info: "TopicInfo") -> None:
        self.info = info
        self.printed = 0

    def all(self, found: Iterable[Found]) -> None:
        """Print them, and send them on their way."""
        out = sys.stdout
        for micros, partition, offset, record in found:
            out.write(self.line(micros, partition, offset, record) + "\n")
            self.printed += 1
        out.flush()

    @abstractmethod
    def line(self, micros: int, partition: int, offset: int, record: Record | Undecodable) -> str:
        """One record as one line."""


class _JsonPrinter(_Printer):
    def line(self, micros: int, partition: int, offset: int, record: Record | Undecodable) -> str:
        position: dict[str, Any] = dict(
            zip(TAIL_KEYS, (self.info.name, partition, offset, output.moment(micros)), strict=True)
        )
        if isinstance(record, Undecodable):
            raw = base64.b64encode(record.raw).decode()
            return output.json_bytes(position | {"error": record.error, "raw_base64": raw}).decode()
        document = record.to_dict()
        shadowed = {name: document[name] for name in TAIL_KEYS if name in document}
        return output.json_bytes(document | position | ({SHADOWED: shadowed} if shadowed else {})).decode()


class _LinePrinter(_Printer):
    def __init__(self, info: "TopicInfo") -> None:
        super().__init__(info)
        self._width: int | None = None
        if sys.stdout.isatty() or os.environ.get("COLUMNS"):
            self._width = output.console().width

    def line(self, micros: int, partition: int, offset: int, record: Record | Undecodable) -> str:
        text = f"{output.short_moment(micros)}  {partition} {offset:>6}  "
        if isinstance(record, Undecodable):
            text += f"(no event, {len(record.raw)} bytes: {output.plain(record.error)})"
        else:
            text += f"{output.plain(self._key_of(record))}  {_data_of(record)}"
        return text if self._width is None else _shortened(text, self._width)

    def _key_of(self, record: Record) -> str:
        try:
            return "-" if self.info.key is None else str(key_of(record, self.info.key, self.info.name))
        except (MissingKeyError, InvalidSettingError, InvalidClaimError):  # or it is in data that is elsewhere
            return "-"


def _data_of(record: Record) -> str:
    event = record.event()
    if event.data is None and event.ext is not None and DATAREF in event.ext:
        # Not loaded for being shown, and not believed.
        return output.plain(f"({event.ext.get('datarefsize', '?')} bytes at {event.ext[DATAREF]})")
    if isinstance(record.data, bytes):
        return f"({len(record.data)} bytes)"
    return output.plain(output.json_bytes(record.data).decode())


def _shortened(text: str, width: int) -> str:
    from rich.text import Text

    shortened = Text(text, no_wrap=True)
    shortened.truncate(width, overflow="ellipsis")
    return shortened.plain
