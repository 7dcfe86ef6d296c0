"""Records whose data is in the payload store: loaded when asked for, or opened as a stream."""

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import DATAREF, Claim
from djp_dagster.errors import InvalidClaimError, InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.streams.offloading import KIND_ATTRIBUTE, is_json, media_type_of, with_claim_of, without_claim
from djp_dagster.streams.records import Record, decode_value

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

_CONTENT_BYTES = 64 << 20
_VALUE_BYTES = 16 << 20  # of content: as Python objects, it takes several times as much
_ENTRY_BYTES = 1 << 10  # what remembering anything takes
_data_as_stored: Any = Event.__dict__["data"].__get__
_decode_json = msgspec.json.Decoder().decode


class _Loaded:
    """The data of one record, until it is forgotten."""

    __slots__ = ("__weakref__", "is_forgotten", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.is_forgotten = False

    def forget(self) -> None:
        """Let the data go; the record would have to load it again."""
        # In this order: who has read the value, and finds it not forgotten then, has read it in time.
        self.is_forgotten = True
        self.value = None


class ClaimedData:
    """Loads the data of records from their claims.

    It remembers what it read last, up to 64 MiB, so that going through a batch again asks the store for nothing. Values
    belong to their records, as data does that is not in a payload store: what a handler does to one is not seen by who
    reads the record anew. Of the values of all records, 16 MiB (before decoding) and the last one are kept.

    Args:
        payloads: where the data is.
        label: what the stream is called in errors.
        left_behind: whether this was sent to another process, which a payload store cannot be.
    """

    def __init__(self, payloads: "PayloadStore | None", label: str, *, left_behind: bool = False) -> None:
        self._payloads, self._label, self._left_behind = payloads, label, left_behind
        self._contents: OrderedDict[Claim, bytes] = OrderedDict()
        self._content_bytes = 0
        self._values: OrderedDict[weakref.ref[_Loaded], int] = OrderedDict()
        self._value_bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        # With a record, to another process: what was loaded goes with the record, the rest stays here.
        return _left_behind, (self._label,)

    def __deepcopy__(self, _memo: object) -> "ClaimedData":
        return self

    @property
    def payloads(self) -> "PayloadStore":
        """Where the data is.

        Raises:
            InvalidSettingError: the stream was opened without a payload store.
        """
        if self._payloads is None:
            remedy = (
                f"this record of stream {self._label} was sent here from another process; ask for its data before that"
                if self._left_behind
                else f"stream {self._label} was opened without one; open it with payloads=open_payload_store(...)"
            )
            raise InvalidSettingError(
                f"the data of an event is in a payload store, and {remedy}", setting="payloads", value=None
            )
        return self._payloads

    def load(self, claim: Claim, kind: object) -> tuple[_Loaded, Any]:
        """The data a claim stands for: what a record keeps of it, and the value it had when it was published."""
        with self._lock:
            content = self._contents.get(claim)
            if content is not None:
                self._contents.move_to_end(claim)
        if content is None:
            content = self.payloads.read(claim)
        value = _decoded(content, claim, kind)
        loaded = _Loaded(value)
        with self._lock:
            self._keep_content(claim, content)
            self._keep_value(loaded, len(content) + _ENTRY_BYTES)
        return loaded, value

    def _keep_content(self, claim: Claim, content: bytes) -> None:
        if claim in self._contents or len(content) > _CONTENT_BYTES:
            return
        self._contents[claim] = content
        self._content_bytes += len(content) + _ENTRY_BYTES
        while self._content_bytes > _CONTENT_BYTES:
            self._content_bytes -= len(self._contents.popitem(last=False)[1]) + _ENTRY_BYTES

    def _keep_value(self, loaded: _Loaded, size: int) -> None:
        self._values[weakref.ref(loaded)] = size
        self._value_bytes += size
        while self._value_bytes > _VALUE_BYTES and len(self._values) > 1:
            oldest, size = self._values.popitem(last=False)
            self._value_bytes -= size
            if (found := oldest()) is not None:
                found.forget()


def _left_behind(label: str) -> ClaimedData:
    return ClaimedData(None, label, left_behind=True)


class ClaimedRecord(Record, frozen=False, kw_only=True, array_like=True, gc=False, eq=False):  # type: ignore[misc]
    """A record that may carry a claim in place of its data; what a reader makes of a record batch that holds some."""

    loaded: Any = None
    """What it has loaded, for itself alone."""

    @property
    def claim(self) -> Claim | None:
        """The claim it carries; None if its data is here.

        Raises:
            InvalidClaimError: its ``dataref`` is none.
        """
        if _data_as_stored(self) is not None or self.ext is None or DATAREF not in self.ext:
            return None
        return Claim.from_attributes(self.ext, media_type_of(self.ext.get(KIND_ATTRIBUTE), self.datacontenttype))

    @property  # type: ignore[misc]
    def data(self) -> Any:
        """The data, loaded from the payload store when first asked for.

        Raises:
            PayloadError: naming the payload; it is this record's fault alone.
            PayloadStoreUnavailableError: the store is away.
            InvalidSettingError: the record was read without a payload store.
        """
        loaded = self.loaded
        if loaded is not None:
            value = loaded.value
            if not loaded.is_forgotten:
                return value
        claim = self.claim
        if claim is None:
            return _data_as_stored(self)
        assert self.ext is not None
        self.loaded, value = self._source.load(claim, self.ext.get(KIND_ATTRIBUTE))
        return value

    def keep(self) -> None:
        """Load the data now, and for as long as the record lives, also where the payload store will be gone."""
        self.loaded = _Loaded(self.data)

    @property
    def _source(self) -> ClaimedData:
        found: ClaimedData | None = self.origin.claimed
        return found if found is not None else ClaimedData(None, "of these records")

    def open_data(self) -> BinaryIO:
        """See `Record.open_data`."""
        claim = self.claim
        if claim is None or (self.ext or {}).get(KIND_ATTRIBUTE) in ("string", "msgpack"):
            return super().open_data()
        return self._source.payloads.open(claim)

    def event(self) -> Event:
        """The bare event, with its claim."""
        attributes = {name: getattr(self, name) for name in Event.__struct_fields__ if name != "data"}
        return Event(data=_data_as_stored(self), **attributes)

    def to_dict(self) -> dict[str, Any]:
        """See `Event.to_dict`; a claim is not loaded for it."""
        return self.event().to_dict()

    def replace(self, **attributes: Any) -> Event:
        """See `Event.replace`; the claim stays, unless ``data`` is given."""
        event = self.event()
        ext = attributes.get("ext", event.ext)
        if "data" not in attributes:
            if DATAREF not in (ext or {}):
                attributes["ext"] = with_claim_of(event.ext, ext)
        elif attributes["data"] is not None or "ext" not in attributes:
            attributes["ext"] = without_claim(ext)
        return event.replace(**attributes)


def _decoded(content: bytes, claim: Claim, kind: object) -> Any:
    known = kind if kind is not None else "json" if is_json(claim.media_type) else "bytes"
    if known == "bytes":
        return content
    try:
        if known == "text":
            return content.decode()
        if known in ("json", "string"):
            return _decode_json(content)
        if known == "msgpack":
            return decode_value(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
        raise InvalidClaimError(f"payload {claim.uri!r} is no {known}: {error}", part="kind") from error
    raise InvalidClaimError(f"payload {claim.uri!r} is of an unknown kind {str(known)[:40]!r}", part="kind")
