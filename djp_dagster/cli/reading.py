"""Events from a file or a pipe, in bounded memory: JSON Lines, CloudEvents lines, or one JSON array of CloudEvents."""

import re
import select
from collections.abc import Callable, Iterator
from itertools import chain
from typing import BinaryIO, NamedTuple

import msgspec

from djp_dagster.errors import InvalidEventError
from djp_dagster.events import Event

_CHUNK_BYTES = 1 << 20
_BLANK_BYTES = 1 << 16
_IDLE_S = 0.2
_BOM = b"\xef\xbb\xbf"
_decode_json = msgspec.json.Decoder().decode
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')

TAIL_KEYS = ("topic", "partition", "offset", "append_time")
"""What ``djp tail --json`` adds to an event."""
SHADOWED = "extension_attributes"
"""Where ``djp tail --json`` puts extension attributes of these names."""


class Item(NamedTuple):
    """One event's text: the ``number``-th line of the input, or element of its array."""

    number: int
    text: bytes


class BadInputError(Exception):
    """The text is no event. ``number`` is the line or element at fault."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


class Source:
    """An input, read piece by piece.

    Args:
        file: where it comes from.
        max_item_bytes: a longer line or element is refused, so that memory stays bounded.
        arrays: an input that begins with ``[`` is one JSON array.
        skip: of the first so many items the text does not matter, so it may be of any length, and come incomplete.

    Attributes:
        unit: ``line``, or ``element`` of an array.
        bytes_read: how much has been read.
    """

    def __init__(self, file: BinaryIO, *, max_item_bytes: int, arrays: bool, skip: int = 0) -> None:
        self._file, self._limit, self._arrays, self._skip = file, max_item_bytes, arrays, skip
        self.unit = "line"
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Item | None]:
        """The items that are not blank; None whenever the input makes a pause."""
        chunks = self._chunks()
        head = b""
        for chunk in chunks:
            head += chunk or b""
            begun = head.strip() and (len(head) >= len(_BOM) or not _BOM.startswith(head))
            if begun or len(head) > _BLANK_BYTES:
                break
        head = head.removeprefix(_BOM)
        if self._arrays and head.lstrip().startswith(b"["):
            self.unit = "element"
            return self._elements(chain([head.lstrip()[1:]], chunks))
        return self._lines(chain([head], chunks))

    def _chunks(self) -> Iterator[bytes | None]:
        read: Callable[[int], bytes] = getattr(self._file, "read1", self._file.read)
        while chunk := read(_CHUNK_BYTES):
            self.bytes_read += len(chunk)
            yield chunk
            if not self._more_at_once():
                yield None

    def _more_at_once(self) -> bool:
        try:
            return bool(select.select([self._file], [], [], _IDLE_S)[0])
        except (OSError, ValueError):
            return True  # nothing that can be waited for

    def _lines(self, chunks: Iterator[bytes | None]) -> Iterator[Item | None]:
        number, rest = 0, b""
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                number += 1
                self._require_short(number, line)
                if not line.isspace() and line:
                    yield Item(number, line)
            self._require_short(number + 1, rest)
            rest = rest[: self._limit]  # longer only if it is skipped
        if rest.strip():
            yield Item(number + 1, rest)

    def _require_short(self, number: int, text: bytes) -> None:
        if len(text) > self._limit and number > self._skip:
            raise BadInputError(
                number,
                f"it is longer than {self._limit:,} bytes, more than an event of this topic can need; write one event "
                "per line",
            )

    def _elements(self, chunks: Iterator[bytes | None]) -> Iterator[Item | None]:
        """The elements of an array whose ``[`` has been read: only strings and nesting are looked at."""
        number, rest, depth, at, quoted, ended = 1, b"", 0, 0, False, False
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            rest += chunk
            start = 0
            while not ended and (found := (_INSIDE if quoted else _OUTSIDE).search(rest, at)):
                mark, at = found[0], found.end()
                if mark == b"\\":
                    at += 1  # whatever it is, it ends nothing
                elif mark == b'"':
                    quoted = not quoted
                elif mark in b"[{":
                    depth += 1
                elif depth and mark in b"]}":
                    depth -= 1
                elif not depth:
                    text, start, ended = rest[start : at - 1], at, mark == b"]"
                    if text.strip() or mark != b"]" or number > 1:
                        yield Item(number, text)
                    number += 1
            at = max(at, len(rest)) - start
            rest = rest[start:]
            self._require_short(number, rest)
            if len(rest) > self._limit:
                at, rest = at - len(rest), b""  # skipped
            if ended and rest.strip():
                raise BadInputError(number, "something stands after the end of the array")
        if not ended:
            raise BadInputError(number, "the array is cut off, its ']' is missing")


def event_from_line(topic: str, text: bytes, event_id: str | None) -> Event:
    """An event of ``topic`` whose data is the line's JSON value.

    Raises:
        InvalidEventError: the line is no JSON.
    """
    try:
        data = _decode_json(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidEventError(f"not a JSON value: {error}", attribute=None) from error
    if event_id is None:
        return Event(type=topic, source=f"/topics/{topic}", data=data)
    return Event(type=topic, source=f"/topics/{topic}", data=data, id=event_id)


def event_from_cloudevent(text: bytes) -> Event:
    """The event of a CloudEvents JSON object, also of one that ``djp tail --json`` printed.

    Raises:
        InvalidEventError: naming the attribute.
    """
    try:
        document = _decode_json(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidEventError(f"not a JSON object: {error}", attribute=None) from error
    if not isinstance(document, dict):
        raise InvalidEventError(f"an event is a JSON object, not {type(document).__name__}", attribute=None)
    if "append_time" in document:  # no CloudEvents attribute can have that name
        shadowed = document.pop(SHADOWED, {})
        document = {name: value for name, value in document.items() if name not in TAIL_KEYS} | shadowed
    return Event.from_dict(document)
