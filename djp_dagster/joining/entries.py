"""What an event buffer keeps in state: one entry per key, one index by due time, one summary.

================================  ====================================================================================
the key itself                    `Entry`: open, with its parts; or a mark: ``[status, since]``
``b"d" + due + key``              an open key, by when it is due; so the next ones are found without looking at others
``b"p" + since + key``            a mark, by when it was made; only if marks are forgotten after a while
``b"s"``                          `Summary`: counts, watermarks, when the task has asked to be woken
================================  ====================================================================================
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from djp_dagster.state.keys import decode_key, encode_key
from djp_dagster.streams.records import Origin, Record, Undecodable, decode_one, encode_value

Status = Literal["completed", "expired", "failed"]
_DUE, _SINCE, SUMMARY = b"d", b"p", b"s"
NEVER = (1 << 63) - 1
"""The due time of a key without a deadline."""
_BIAS = 1 << 63
_fields_of = msgspec.structs.astuple
_EVENT_FIELDS = 9


class Part:
    """One event that is kept for its key.

    Attributes:
        topic, offset, stamp: where it was, and when it was appended.
        is_new: it has come with this batch.
    """

    __slots__ = ("_raw", "_record", "is_new", "offset", "stamp", "topic")

    def __init__(self, topic: str, offset: int, stamp: int, record: Record | None, raw: bytes | None) -> None:
        self.topic, self.offset, self.stamp = topic, offset, stamp
        self._record, self._raw = record, raw
        self.is_new = raw is None

    @property
    def raw(self) -> bytes:
        """The event's bytes; data that is in a payload store stays there."""
        if self._raw is None:
            assert self._record is not None
            self._raw = encode_value(_fields_of(self._record)[:_EVENT_FIELDS])
        return self._raw

    def record(self, origin: Origin) -> Record:
        """The record, as it was read; ``origin`` has what all records of the task share."""
        if self._record is None:
            at = Origin(self.topic, origin.partition, self.stamp, origin.scope, origin.claimed)
            found = decode_one(self.raw, self.offset, at)
            assert not isinstance(found, Undecodable), found.error
            self._record = found
        return self._record

    def is_same(self, other: Record, origin: Origin) -> bool:
        """Whether ``other`` is the same event, published twice."""
        record = self.record(origin)
        return record.id == other.id and record.source == other.source


class Entry:
    """The parts of an open key.

    Attributes:
        due: when it expires: micros of append times, or of event times.
        parts: by name, in order.
        stored: whether it is in the committed state already, under this due time.
        size: encoded bytes, as last written.
    """

    __slots__ = ("due", "parts", "size", "stored")

    def __init__(self, due: int, parts: dict[str, list[Part]], *, size: int = 0, stored: bool = False) -> None:
        self.due, self.parts, self.size, self.stored = due, parts, size, stored

    def encoded(self) -> list[Any]:
        """As it is kept; its size is known afterwards."""
        parts = {
            name: [[part.topic, part.offset, part.stamp, part.raw] for part in found]
            for name, found in self.parts.items()
        }
        self.size = sum(len(part.raw) for found in self.parts.values() for part in found)
        return [self.due, self.size, parts]

    def all_parts(self) -> Iterator[Part]:
        """Every part, of every name."""
        for found in self.parts.values():
            yield from found


def decode_entry(value: list[Any]) -> Entry | tuple[Status, int]:
    """An entry, or the status and time of a mark."""
    if isinstance(value[0], str):
        return value[0], value[1]  # type: ignore[return-value]
    due, size, parts = value
    found = {
        name: [Part(topic, offset, stamp, None, raw) for topic, offset, stamp, raw in kept]
        for name, kept in parts.items()
    }
    return Entry(due, found, size=size, stored=True)


class Summary(msgspec.Struct):
    """What a task's buffer holds, and has done since its beginning."""

    open: int = 0
    bytes: int = 0
    completed: int = 0
    expired: int = 0
    failed: int = 0
    late: int = 0
    wake: int | None = None
    scope: str = ""
    """Of the idempotency keys of its records: what a batch without records could not know."""
    watermarks: dict[str, tuple[int, int]] = {}
    """By topic: the highest event time seen, and the append time of the last record."""


def decode_summary(value: Mapping[str, Any] | None) -> Summary:
    """The summary of a buffer; a new one, if there is none."""
    return Summary() if value is None else msgspec.convert(value, Summary)


def due_key(due: int, key: str | int) -> bytes:
    """The index key of an open key."""
    return _DUE + _encode_time(due) + encode_key(key)


def since_key(since: int, key: str | int) -> bytes:
    """The index key of a mark."""
    return _SINCE + _encode_time(since) + encode_key(key)


def _encode_time(micros: int) -> bytes:
    # Events may say that they happened before 1970.
    return (micros + _BIAS).to_bytes(8, "big")


def indexed(key: bytes) -> tuple[int, str | int]:
    """The time and the key of an index key."""
    return int.from_bytes(key[1:9], "big") - _BIAS, decode_key(key[9:])  # type: ignore[return-value]


DUE_RANGE = (encode_key(_DUE), encode_key(b"e"))
SINCE_RANGE = (encode_key(_SINCE), encode_key(b"q"))
"""Where the two indexes lie among encoded keys."""
ENTRY_RANGE = (b"", encode_key(b""))
"""Where the keys themselves lie."""
