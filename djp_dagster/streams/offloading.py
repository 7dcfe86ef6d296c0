"""Offloading: heavy ``data`` goes to the payload store, the event keeps a claim; and what the event says of it.

Order when publishing: payloads first, then the events that name them. A crash in between leaves payloads nobody refers
to, which collection removes. An offloaded event carries, as CloudEvents extensions, its claim (``dataref`` and its
companions) and

======================================  ==============================================================================
``datarefkind``                         what kind of value the data was, so that the same value comes back
``datarefkey``, ``datarefkeypath``      the key that the data holds for the event's topic, and where
``datarefkeeps``                        the payloads that the data names, for collection: it looks into records, not
                                        into payloads
======================================  ==============================================================================
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from djp_dagster.claim_check.claims import BYTES, CLAIM_ATTRIBUTES, is_media_type
from djp_dagster.errors import InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.streams.records import encode_value
from djp_dagster.streams.topics import KEY_ATTRIBUTE, KEY_PATH_ATTRIBUTE, key_of

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.model import TopicInfo

Kind = Literal["bytes", "text", "string", "json", "msgpack"]
"""How data became a payload: as it is; as UTF-8; a string, or another value, as JSON; what JSON cannot say."""
KIND_ATTRIBUTE, KEEPS_ATTRIBUTE = "datarefkind", "datarefkeeps"
_OURS = CLAIM_ATTRIBUTES | {KIND_ATTRIBUTE, KEEPS_ATTRIBUTE, KEY_ATTRIBUTE, KEY_PATH_ATTRIBUTE}
_JSON, _MSGPACK, _TEXT = "application/json", "application/vnd.msgpack", "text/plain; charset=utf-8"
_MEDIA_TYPES: dict[str, str] = {"bytes": BYTES, "text": _TEXT, "string": _JSON, "json": _JSON, "msgpack": _MSGPACK}
_SAVES_BYTES = 1024  # a claim may be as large as that
_ATTEMPT = re.compile(rb"attempts\\*/[A-Za-z0-9_.\-=/\\]+")
_AT_ONCE = 8
_FIELDS = Event.__struct_fields__
_DATA = _FIELDS.index("data")
_encode_json = msgspec.json.Encoder().encode
_decode_json = msgspec.json.Decoder().decode


def offload(
    topic: "TopicInfo", events: Sequence[Event | tuple[Any, ...]], payloads: "PayloadStore | None"
) -> Sequence[Event | tuple[Any, ...]]:
    """The events, with the data of those above the topic's ``offload_above`` in the payload store.

    So is data that alone makes an event too large for the topic. Several are stored at once. The events of small data
    come back as they are.

    Raises:
        InvalidSettingError: there is no payload store.
        PayloadStoreUnavailableError, PayloadStoreRefusedError: naming the store.
    """
    above = topic.offload_above
    if above is None or _size_of(events) <= min(above, topic.max_event_bytes):
        return events
    heavy = [at for at, event in enumerate(events) if _is_heavy(event, above, topic.max_event_bytes)]
    if not heavy:
        return events
    if payloads is None:
        raise InvalidSettingError(
            f"topic {topic.name!r} offloads data above {above} bytes, and the stream has no payload store; open it "
            "with payloads=open_payload_store(folder)",
            setting="payloads",
            value=None,
        )
    made = list(events)
    if len(heavy) == 1:
        made[heavy[0]] = _offloaded(topic, events[heavy[0]], payloads)
        return made
    with ThreadPoolExecutor(min(_AT_ONCE, len(heavy)), thread_name_prefix="djp-offload") as pool:
        results = pool.map(lambda at: _offloaded(topic, events[at], payloads), heavy)
        for at, event in zip(heavy, results, strict=True):
            made[at] = event
    return made


def _is_heavy(event: Event | tuple[Any, ...], above: int, max_event_bytes: int) -> bool:
    data = event[_DATA] if isinstance(event, tuple) else event.data
    if data is None:  # nothing, or in a payload store already
        return False
    size = _size_of(data)
    return size > above or (size > _SAVES_BYTES and _size_of(event) > max_event_bytes)


def _size_of(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    try:
        return len(encode_value(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return 0  # what cannot be encoded is refused, and named, where it is encoded


def _offloaded(topic: "TopicInfo", event: Event | tuple[Any, ...], payloads: "PayloadStore") -> Event | tuple[Any, ...]:
    whole = Event(**dict(zip(_FIELDS, event, strict=True))) if isinstance(event, tuple) else event
    content, kind = _encoded(whole)
    claim = payloads.put(content, media_type=media_type_of(kind, whole.datacontenttype)).claim
    ext = (without_claim(whole.ext) or {}) | claim.to_attributes() | {KIND_ATTRIBUTE: kind}
    ext |= _key_attributes(topic, whole) | _keeps_attribute(content)
    made = whole.replace(data=None, ext=ext)
    return msgspec.structs.astuple(made) if isinstance(event, tuple) else made


def _key_attributes(topic: "TopicInfo", event: Event) -> dict[str, str]:
    if topic.key is None or "partitionkey" in (event.ext or {}):
        return {}
    key = key_of(event, topic.key, topic.name)
    return {KEY_ATTRIBUTE: _encode_json(key).decode(), KEY_PATH_ATTRIBUTE: topic.key}


def _keeps_attribute(content: bytes) -> dict[str, str]:
    if b"sha256" not in content and b"attempts" not in content:  # at the speed of memory
        return {}
    from djp_dagster.claim_check.references import keys_in

    found = sorted({*keys_in(content), *(name.decode() for name in _ATTEMPT.findall(content))})
    if not found:
        return {}
    # A longer one names what it begins with, too.
    kept = [name for name, after in zip(found, [*found[1:], ""], strict=True) if not after.startswith(name)]
    return {KEEPS_ATTRIBUTE: " ".join(kept)}


def without_claim(ext: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The extension attributes but for a claim and what belongs to it."""
    return {name: value for name, value in (ext or {}).items() if name not in _OURS} or None


def with_claim_of(other: Mapping[str, Any] | None, ext: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The extension attributes, and the claim (with what belongs to it) that others carry."""
    return {**(ext or {}), **{name: value for name, value in (other or {}).items() if name in _OURS}} or None


def _encoded(event: Event) -> tuple[bytes, Kind]:
    """The payload of an event's data, from which the kind tells how to get the same value back."""
    data = event.data
    if isinstance(data, bytes | bytearray | memoryview):
        return bytes(data), "bytes"
    if isinstance(data, str):
        # CloudEvents: what is declared as JSON is read as JSON by others, too.
        is_string = event.datacontenttype is not None and is_json(event.datacontenttype)
        return (_encode_json(data), "string") if is_string else (data.encode(), "text")
    # What JSON refuses, or gives back as something else, MessagePack may take; if it does not, it says why.
    with contextlib.suppress(msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
        as_json = _encode_json(data)
        if _decode_json(as_json) == data:
            return as_json, "json"
    # Bytes inside, times, NaN: what MessagePack says and JSON does not.
    return encode_value(data), "msgpack"


def media_type_of(kind: object, declared: str | None) -> str:
    """What a payload is: as declared with its event, if that fits its kind."""
    known = _MEDIA_TYPES.get(str(kind))
    if declared is None or not is_media_type(declared):
        return known or BYTES
    fits = known is None or known in (BYTES, _TEXT) or (known == _JSON and is_json(declared))
    return declared if fits else str(known)


def is_json(media_type: str) -> bool:
    """Whether the media type is JSON, or built on it."""
    kind = media_type.partition(";")[0].strip().lower()
    return kind == _JSON or kind.endswith("+json")
