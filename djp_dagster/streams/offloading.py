"""Offloading: heavy ``data`` goes to the payload store, the event keeps a claim; and events whose data is there.

Order when publishing: payloads first, then the events that name them. A crash in between leaves payloads nobody refers
to, which collection removes. An offloaded event carries, as CloudEvents extensions, its claim (``dataref`` and its
companions), what kind of value its data was, and the key that ``data`` held for its topic.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from djp_dagster.claim_check.claims import BYTES, CLAIM_ATTRIBUTES
from djp_dagster.errors import InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.streams.records import encode_value
from djp_dagster.streams.topics import KEY_ATTRIBUTE, KEY_PATH_ATTRIBUTE, key_of

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.model import TopicInfo

Kind = Literal["bytes", "text", "json", "msgpack"]
KIND_ATTRIBUTE = "datarefkind"
_OURS = CLAIM_ATTRIBUTES | {KIND_ATTRIBUTE, KEY_ATTRIBUTE, KEY_PATH_ATTRIBUTE}
_JSON = "application/json"
_MSGPACK = "application/vnd.msgpack"
_AT_ONCE = 8
_FIELDS = Event.__struct_fields__
_encode_json = msgspec.json.Encoder().encode
_decode_json = msgspec.json.Decoder().decode


def offload(
    topic: "TopicInfo", events: Sequence[Event | tuple[Any, ...]], payloads: "PayloadStore | None"
) -> Sequence[Event | tuple[Any, ...]]:
    """The events, with the data of those above the topic's ``offload_above`` in the payload store.

    Several are stored at once. The events of small data come back as they are.

    Raises:
        InvalidSettingError: there is no payload store.
        PayloadStoreUnavailableError, PayloadStoreRefusedError: naming the store.
    """
    above = topic.offload_above
    if above is None or _size_of(events) <= above:
        return events
    heavy = [at for at, event in enumerate(events) if _size_of(_data_of(event)) > above]
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


def _size_of(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    try:
        return len(encode_value(value))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return 0  # what cannot be encoded is refused, and named, where it is encoded


def _data_of(event: Event | tuple[Any, ...]) -> Any:
    return event[_FIELDS.index("data")] if isinstance(event, tuple) else event.data


def _offloaded(topic: "TopicInfo", event: Event | tuple[Any, ...], payloads: "PayloadStore") -> Event | tuple[Any, ...]:
    whole = Event(**dict(zip(_FIELDS, event, strict=True))) if isinstance(event, tuple) else event
    content, kind, media_type = _encoded(whole)
    claim = payloads.put(content, media_type=media_type).claim
    ext = (without_claim(whole.ext) or {}) | claim.to_attributes() | {KIND_ATTRIBUTE: kind}
    ext |= _key_attributes(topic, whole)
    made = whole.replace(data=None, ext=ext)
    return msgspec.structs.astuple(made) if isinstance(event, tuple) else made


def _key_attributes(topic: "TopicInfo", event: Event) -> dict[str, str]:
    if topic.key is None or "partitionkey" in (event.ext or {}):
        return {}
    key = key_of(event, topic.key, topic.name)
    return {KEY_ATTRIBUTE: _encode_json(key).decode(), KEY_PATH_ATTRIBUTE: topic.key}


def without_claim(ext: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The extension attributes but for a claim and what belongs to it."""
    return {name: value for name, value in (ext or {}).items() if name not in _OURS} or None


def _encoded(event: Event) -> tuple[bytes, Kind, str]:
    """The payload of an event's data, such that `_decoded` gives the same value back."""
    data, declared = event.data, event.datacontenttype
    if isinstance(data, bytes):
        return data, "bytes", declared or BYTES
    if isinstance(data, str) and declared is not None and not is_json(declared):
        return data.encode(), "text", declared
    try:
        as_json = _encode_json(data)
    except (TypeError, ValueError):
        as_json = b"null"
    if _decode_json(as_json) == data:
        return as_json, "json", declared if declared is not None and is_json(declared) else _JSON
    # Bytes inside, times, NaN: what MessagePack says and JSON does not.
    return encode_value(data), "msgpack", _MSGPACK


def is_json(media_type: str) -> bool:
    """Whether the media type is JSON, or built on it."""
    kind = media_type.partition(";")[0].strip().lower()
    return kind == _JSON or kind.endswith("+json")
