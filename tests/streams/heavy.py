"""Building blocks of the tests of offloading: events of every kind of data, and a payload store that counts."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, BinaryIO

from hypothesis import strategies as st

from djp_dagster import Event, EventStream, PayloadStore, Topic
from djp_dagster.claim_check.claims import CLAIM_ATTRIBUTES
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.objects import Content
from djp_dagster.streams.records import Record

OURS = CLAIM_ATTRIBUTES | {"datarefkind", "datarefkey", "datarefkeypath", "datarefkeeps"}
ATTRIBUTES = ("id", "source", "type", "time", "subject", "datacontenttype", "dataschema")


class CountedFolder(LocalObjects):
    """A folder that counts what is written to it and read from it."""

    def __init__(self, folder: str | Path, *, root: Path | None = None, counts: Counter[str] | None = None) -> None:
        super().__init__(folder, root=root)
        self.counts = Counter[str]() if counts is None else counts

    def within(self, prefix: str) -> CountedFolder:
        return CountedFolder(self.folder / prefix, root=self._root, counts=self.counts)

    def open(self, key: str, *, expected_bytes: int | None = None) -> BinaryIO:
        self.counts["read"] += 1
        return super().open(key, expected_bytes=expected_bytes)

    def put(self, key: str, content: Content, *, media_type: str, replace: bool = False) -> bool:
        created = super().put(key, content, media_type=media_type, replace=replace)
        self.counts["written" if created else "found"] += 1
        return created


def counted_store(folder: Path, **settings: Any) -> tuple[PayloadStore, Counter[str]]:
    """A payload store, and how often it was asked for what."""
    objects = CountedFolder(folder)
    return PayloadStore(objects, **settings), objects.counts


def same(one: Any, other: Any) -> bool:
    """Whether two values are alike, their types included; NaN is like NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.keys()), list(other.keys())) and same(list(one.values()), list(other.values()))
    return bool(one == other)


def plain_ext(record: Event) -> dict[str, Any]:
    """The extension attributes but for those of a claim."""
    return {name: value for name, value in (record.ext or {}).items() if name not in OURS}


def seen(record: Record) -> tuple[Any, ...]:
    """All that a handler sees of a record, but for its data and where it lies."""
    return (*(getattr(record, name) for name in ATTRIBUTES), plain_ext(record))


def content_of(record: Record) -> bytes:
    with record.open_data() as file:
        return file.read()


def records_of(stream: EventStream, topic: Topic) -> list[Record]:
    return [record for partition in range(topic.partitions) for record in stream.records(topic, partition)]


def payload_files(folder: Path) -> list[Path]:
    """The payloads below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "sha256" in path.parts)


def grow_old(folder: Path, *, by: timedelta = timedelta(days=2)) -> None:
    """As if everything below the folder had been stored so long ago."""
    at = time.time() - by.total_seconds()
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (at, at))


NOON = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=timezone.utc)
KINDS: dict[str, Any] = {
    "bytes": b"\x00\xff" * 600,
    "bytearray": bytearray(b"\x01" * 1200),
    "no bytes": b"",
    "text": 'grüße 😀 \0 "quoted" \\ \n' * 60,
    "dict": {"a": 1, "b": [1, 2.5, True, None, "x" * 1200], "c": {}},
    "list": list(range(1000)),
    "nested bytes": {"image": b"\x89PNG" * 400, "n": 1},
    "NaN": [math.nan, math.inf, -math.inf, "x" * 1200],
    "negative zero": [-0.0, 0.0, "x" * 1200],
    "whole floats": [1.0, 1e16, 1e300, 5e-324, "x" * 1200],
    "large integers": [2**53 + 1, -(2**63), 2**64 - 1, "x" * 1200],
    "booleans and numbers": [True, 1, 1.0, False, 0, "x" * 1200],
    "tuple": (1, (2, 3), "x" * 1200),
    "integer keys": {1: "a", -7: {2: "b"}, "1": "x" * 1200},
    "bytes as keys": {b"k": "x" * 1200},
    "times": [NOON, NOON.astimezone(timezone(timedelta(hours=5, minutes=30))), NOON.date(), "x" * 1200],
    "set": frozenset(["x" * 1200]),
    "None": None,
    "nested None": [None, "x" * 1200],
    "empty": {},
    "one letter": "x",
    "a number": 7,
    "a text of a number": "7" * 1200,
    "a text of JSON": '{"a": "' + "x" * 1200 + '"}',
}
MEDIA_TYPES = [
    None,
    "application/json",
    "application/vnd.api+json; charset=utf-8",
    "text/plain",
    "image/png",
    "no media type",
    "ключ/значение",
]

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=30)
    | st.datetimes(timezones=st.just(timezone.utc))
)
names = st.text(max_size=6) | st.integers(-1000, 1000) | st.binary(max_size=4)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4) | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


def both(stream: EventStream, inline: Topic, heavy: Topic, events: Iterable[Event]) -> list[tuple[Record, Record]]:
    """The events as records of both topics."""
    made = list(events)
    starts = {topic.name: [stream.log.spans([topic.name])] for topic in (inline, heavy)}
    found = []
    for topic in (inline, heavy):
        (span,) = starts[topic.name][0].values()
        stream.publish(topic, made)
        found.append(list(stream.records(topic, 0, span.end)))
    return list(zip(*found, strict=True))
