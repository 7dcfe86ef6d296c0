"""`Topic`: the declaration of a partitioned, ordered series of events."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidEventError, InvalidSettingError, MissingKeyError
from djp_dagster.events import Event
from djp_dagster.partitioning import partition_of
from djp_dagster.units import Duration, Size, is_count, parse_bytes, parse_seconds

if TYPE_CHECKING:
    from djp_dagster.claim_check.claims import Claim

_data_as_stored: Any = Event.__dict__["data"].__get__
_key_decoder = msgspec.json.Decoder(str | int).decode
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")
MAX_PARTITIONS = 4096
INTERNAL_PREFIX = "__"
"""Topics the library makes for itself, e.g. changelogs."""
KEY_ATTRIBUTE, KEY_PATH_ATTRIBUTE = "datarefkey", "datarefkeypath"
"""Extension attributes of an event whose data is elsewhere: the key it holds, as JSON, and where it holds it."""


def check_name(kind: str, name: object) -> str:
    """The name, or `InvalidSettingError` saying what a name may be."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidSettingError(
            f"{kind} name {name!r} must be 1 to 200 of the characters A-Z a-z 0-9 _ . -", setting="name", value=name
        )
    return name


def changelog_of(group: str) -> str:
    """The topic that carries the state changes of a stateful group."""
    return f"{INTERNAL_PREFIX}changelog.{group}"


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How long a topic keeps what every registered group has committed, and what not.

    Attributes:
        age_s: records older than this may go once no group, open intent or other holder needs them; None keeps all.
        cap_s: records older than this go even if somebody still needs them: loudly, naming the range. None never does.
    """

    age_s: float | None = None
    cap_s: float | None = None


class Topic(msgspec.Struct, frozen=True):
    """A named series of events, split into partitions; order holds within a partition, so per key.

    Declaring costs nothing; ``stream.create_topic(topic)`` makes it exist. The partition count is fixed then.

    Args:
        name: 1 to 200 of ``A-Z a-z 0-9 _ . -``.
        partitions: the bound on parallelism, 1 to 4096.
        key: the field of ``data`` that decides the partition (a dotted path reaches inside); an event's
            ``partitionkey`` extension wins over it. Without a key, events spread by their id.
        max_event_bytes: larger encoded events are refused; 1 MiB unless told. A number or ``"1MiB"``.
        retention: how long what every group has done is kept, e.g. ``"7d"``; for ever unless told.
        retention_cap: how long what somebody has yet to do is kept at most; for ever unless told.
        offload_above: larger ``data`` goes to the stream's payload store when it is published or emitted, and the event
            carries a claim; e.g. ``"64KiB"``. Never unless told.

    Raises:
        InvalidSettingError: naming the argument, the value and what is allowed.

    Example:
        >>> clicks = Topic("clicks", partitions=4, key="user_id")
        >>> clicks.event(user_id="u1", page="/").type
        'clicks'
    """

    name: str
    partitions: int = msgspec.field(default=1)
    key: str | None = None
    max_event_bytes: Size = 1 << 20
    retention: Duration | None = None
    retention_cap: Duration | None = None
    offload_above: Size | None = None

    def __post_init__(self) -> None:
        check_name("topic", self.name)
        if not is_count(self.partitions) or not 1 <= self.partitions <= MAX_PARTITIONS:
            raise InvalidSettingError(
                f"topic {self.name!r}: partitions={self.partitions!r} must be 1 to {MAX_PARTITIONS}",
                setting="partitions",
                value=self.partitions,
            )
        if parse_bytes(self.max_event_bytes, name="max_event_bytes") <= 0:
            raise InvalidSettingError(
                f"topic {self.name!r}: max_event_bytes={self.max_event_bytes!r} must be above 0",
                setting="max_event_bytes",
                value=self.max_event_bytes,
            )
        _ = self.offload_above_bytes
        limits = self.limits
        if limits.age_s is not None and limits.cap_s is not None and limits.cap_s < limits.age_s:
            raise InvalidSettingError(
                f"topic {self.name!r}: retention_cap={self.retention_cap!r} is below retention={self.retention!r}",
                setting="retention_cap",
                value=self.retention_cap,
            )

    @property
    def limits(self) -> Retention:
        """The retention in seconds."""
        return Retention(
            age_s=None if self.retention is None else parse_seconds(self.retention, name="retention"),
            cap_s=None if self.retention_cap is None else parse_seconds(self.retention_cap, name="retention_cap"),
        )

    @property
    def offload_above_bytes(self) -> int | None:
        """``offload_above`` in bytes."""
        return None if self.offload_above is None else parse_bytes(self.offload_above, name="offload_above")

    def event(self, data: Mapping[str, Any] | None = None, /, **fields: Any) -> Event:
        """An event of this topic: its type is the topic's name, its source ``/topics/<name>``.

        Args:
            data: the payload, for fields that are no Python names.
            **fields: the payload, or what is added to it.
        """
        return Event(type=self.name, source=f"/topics/{self.name}", data={**data, **fields} if data else fields)

    def claim_event(self, claim: "Claim", *, key: str | int | None = None, **attributes: Any) -> Event:
        """An event of this topic whose data is a payload that is stored already.

        Args:
            claim: of the payload.
            key: decides the partition, in place of a field of the data.
            **attributes: of the event, such as ``subject`` or ``time``.
        """
        ext = {**(attributes.pop("ext", None) or {}), **claim.to_attributes()}
        if key is not None:
            ext["partitionkey"] = key
        return Event(
            type=self.name, source=f"/topics/{self.name}", datacontenttype=claim.media_type, ext=ext, **attributes
        )

    def key_of(self, event: Event) -> str | int:
        """The key that decides the event's partition.

        Raises:
            MissingKeyError: the topic has a key and the event's data lacks it, or it is no string or integer.
        """
        return key_of(event, self.key, self.name)

    def partition_of(self, event: Event) -> int:
        """The partition the event belongs to.

        Raises:
            MissingKeyError: as `key_of`.
        """
        return partition_of(self.key_of(event), self.partitions)


def key_of(event: Event, path: str | None, topic: str) -> str | int:
    """The event's key: its ``partitionkey``, else ``data`` at ``path`` (which may be elsewhere), or its id."""
    if event.ext is not None and (explicit := event.ext.get("partitionkey")) is not None:
        return explicit
    if path is None:
        return event.id
    # Only where the data is elsewhere: new data has a key of its own.
    if event.ext is not None and event.ext.get(KEY_PATH_ATTRIBUTE) == path and _data_as_stored(event) is None:
        return _decode_key(str(event.ext.get(KEY_ATTRIBUTE)))
    value: Any = event.data
    try:
        for part in path.split("."):
            value = value[part]
    except (KeyError, TypeError, IndexError):
        value = None
    if isinstance(value, str | int) and not isinstance(value, bool):
        return value
    raise MissingKeyError(
        f"event {event.id!r} of topic {topic!r} has no key: data[{path!r}] must be a string or an integer, "
        f"not {type(value).__name__}; add the field, or set the 'partitionkey' extension",
        topic=topic,
        key=path,
        event_id=event.id,
    )


def _decode_key(text: str) -> str | int:
    try:
        key: str | int = _key_decoder(text)
    except msgspec.DecodeError as error:
        raise InvalidEventError(
            f"event attribute {KEY_ATTRIBUTE!r} must be a key as JSON, not {text[:80]!r}", attribute=KEY_ATTRIBUTE
        ) from error
    return key
