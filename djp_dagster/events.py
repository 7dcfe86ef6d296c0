"""`Event`: the CloudEvents 1.0 event, as cheap as a tuple, and its JSON codec.

Inside the stream an event is a MessagePack array (see `djp_dagster.streams.records`); at the edges it is CloudEvents
JSON in structured mode, equal to what the official SDK reads and writes.

Source of the format: CloudEvents 1.0.2, "JSON Event Format for CloudEvents".
"""

import base64
import binascii
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from itertools import chain, count
from typing import Any

import msgspec

from djp_dagster.errors import InvalidEventError

SPECVERSION = "1.0"
_ATTRIBUTES = ("id", "source", "type", "time", "subject", "datacontenttype", "dataschema")
_RESERVED = frozenset((*_ATTRIBUTES, "specversion", "data", "data_base64"))
_EXTENSION_NAME = re.compile(r"[a-z0-9]{1,20}")

_MINUTE = timedelta(minutes=1)

_decode_json = msgspec.json.Decoder().decode
_encode_json = msgspec.json.Encoder().encode
_parse_time = msgspec.json.Decoder(datetime).decode


class _IdBlocks:
    """Blocks of ids unique to this process: a random prefix, then a number. A forked child draws its own prefix.

    Blocks, because an id is made for every event: `chain` takes them from a block without running any Python.
    """

    _SIZE = 4096

    def __init__(self) -> None:
        self._block: Iterator[str] = iter(())
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self.prefix = os.urandom(9).hex() + "-"
        self._numbers = count(step=self._SIZE)
        deque(self._block, maxlen=0)  # what is left of a block inherited from the parent is the parent's

    def __iter__(self) -> "_IdBlocks":
        return self

    def __next__(self) -> Iterator[str]:
        start = next(self._numbers)
        self._block = map(self.prefix.__add__, map(str, range(start, start + self._SIZE)))
        return self._block


_id_blocks = _IdBlocks()
_next_id = chain.from_iterable(_id_blocks).__next__


def generated_id_prefix() -> str:
    """How the ids begin that this process makes up; an emitted event with such an id gets a derived one instead."""
    return _id_blocks.prefix


class Event(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """A CloudEvents 1.0 event.

    Immutable and validated when made. ``data`` is a JSON value or ``bytes``; it is shared, not copied, so do not change
    it after publishing. Cyclic ``data`` cannot be encoded and is never collected.

    Args:
        type: what happened, e.g. ``"com.example.order.placed"``.
        source: who says so, a URI reference; ``source`` and ``id`` together are unique.
        data: a JSON value, ``bytes``, or nothing.
        id: made up when not given; an event emitted by a handler then gets one derived from its cause instead.
        time: when it happened, with a time zone.
        subject, datacontenttype, dataschema: the attributes of that name.
        ext: extension attributes: lower-case alphanumeric names; strings, integers (32 bit) or booleans.

    Raises:
        InvalidEventError: naming the attribute, its value and what is allowed.

    Example:
        >>> event = Event(type="clicked", source="/shop", data={"user_id": "u1"}, id="1")
        >>> Event.from_json(event.to_json()) == event
        True
    """

    id: str = msgspec.field(default_factory=_next_id)
    source: str
    type: str
    data: Any = None
    time: datetime | None = None
    subject: str | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    ext: Mapping[str, str | int | bool] | None = None

    def __post_init__(self) -> None:
        # One expression for the common case: this runs for every event a process makes.
        if (
            self.id
            and self.source
            and self.type
            and type(self.id) is type(self.source) is type(self.type) is str
            and self.time is None
            and self.subject is None
            and self.datacontenttype is None
            and self.dataschema is None
            and self.ext is None
        ):
            return
        _validate(self)

    @property
    def event_time(self) -> datetime | None:
        """When it happened: ``time``; a `Record` falls back to its append time."""
        return self.time

    def replace(self, **attributes: Any) -> "Event":
        """A validated copy with other ``attributes``.

        Example:
            >>> Event(type="t", source="/s", id="1").replace(subject="user/1").subject
            'user/1'
        """
        # Not msgspec.structs.replace: before 0.21 it made a copy without validating it.
        return Event(**{name: getattr(self, name) for name in Event.__struct_fields__} | attributes)

    def to_dict(self) -> dict[str, Any]:
        """The structured-mode JSON object: attributes and extensions beside ``data`` or ``data_base64``."""
        out: dict[str, Any] = {"specversion": SPECVERSION}
        for name in _ATTRIBUTES:
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        out.update(self.ext or {})
        if self.time is not None and self.time.utcoffset() % _MINUTE:  # type: ignore[operator]
            out["time"] = self.time.astimezone(timezone.utc)  # RFC 3339 has no seconds in offsets
        if isinstance(self.data, bytes):
            out["data_base64"] = base64.b64encode(self.data).decode()
        elif self.data is not None:
            out["data"] = self.data
        return out

    def to_json(self) -> bytes:
        """CloudEvents JSON, structured mode.

        Raises:
            InvalidEventError: ``data`` is no JSON value.
        """
        try:
            return _encode_json(self.to_dict())
        except (TypeError, ValueError, RecursionError) as error:
            raise _invalid("data", type(self.data).__name__, f"must be a JSON value or bytes ({error})") from error

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Event":
        """The event of a structured-mode JSON object.

        Raises:
            InvalidEventError: naming the attribute that is missing, of the wrong type, or not allowed.
        """
        version = document.get("specversion")
        if version != SPECVERSION:
            raise _invalid("specversion", version, "must be '1.0'")
        for name in ("id", "source", "type"):
            if name not in document:
                raise _invalid(name, None, "is required")
        known = {name: document[name] for name in _ATTRIBUTES if document.get(name) is not None}
        if isinstance(known.get("time"), str):
            known["time"] = _time_from_text(known["time"])
        ext = {name: value for name, value in document.items() if name not in _RESERVED and value is not None}
        return Event(data=_data_from(document), ext=ext or None, **known)

    @staticmethod
    def from_json(document: bytes | str) -> "Event":
        """The event of a CloudEvents JSON document.

        Raises:
            InvalidEventError: the document is no JSON object, or an attribute is wrong.
        """
        try:
            parsed = _decode_json(document)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise InvalidEventError(f"not a JSON document: {error}", attribute=None) from error
        if not isinstance(parsed, dict):
            raise InvalidEventError(f"an event is a JSON object, not {type(parsed).__name__}", attribute=None)
        return Event.from_dict(parsed)


def _invalid(attribute: str, value: object, rule: str) -> InvalidEventError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return InvalidEventError(f"event attribute {attribute!r} {rule}; got {shown}", attribute=attribute)


def _validate(event: Event) -> None:
    for name in ("id", "source", "type"):
        _require_text(name, getattr(event, name))
    for name in ("subject", "datacontenttype", "dataschema"):
        if getattr(event, name) is not None:
            _require_text(name, getattr(event, name))
    if event.time is not None:
        if not isinstance(event.time, datetime):
            raise _invalid("time", event.time, "must be a datetime")
        if event.time.tzinfo is None:
            raise _invalid("time", event.time, "must have a time zone, e.g. datetime.now(timezone.utc)")
    if event.ext is not None:
        _validate_extensions(event.ext)


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise _invalid(name, value, "must be a non-empty string")


def _validate_extensions(ext: Any) -> None:
    if not isinstance(ext, Mapping):
        raise _invalid("ext", ext, "must be a mapping of extension attributes")
    for name, value in ext.items():
        if not isinstance(name, str) or not _EXTENSION_NAME.fullmatch(name):
            raise _invalid(str(name), value, "is no extension name: 1 to 20 characters, a-z and 0-9")
        if name in _RESERVED:
            raise _invalid(name, value, "is an attribute of its own, not an extension")
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise _invalid(name, value, "must fit 32 bits; send larger numbers as a string")
        if not isinstance(value, str | int):
            raise _invalid(name, value, "must be a string, an integer or a boolean")


def _time_from_text(text: str) -> datetime:
    try:
        return _parse_time(_encode_json(text))
    except msgspec.DecodeError as error:
        raise _invalid("time", text, "must be an RFC 3339 time") from error


def _data_from(document: Mapping[str, Any]) -> Any:
    encoded = document.get("data_base64")
    if encoded is None:
        return document.get("data")
    if document.get("data") is not None:
        raise _invalid("data_base64", "...", "must not stand beside 'data'")
    try:
        return base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise _invalid("data_base64", encoded, "must be base64") from error
