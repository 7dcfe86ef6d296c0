"""Records whose data is in the payload store: loaded when asked for, or opened as a stream."""

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import DATAREF, Claim
from djp_dagster.errors import InvalidClaimError, InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.streams.offloading import KIND_ATTRIBUTE, is_json, without_claim
from djp_dagster.streams.records import Record, decode_value

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

_REMEMBERED_BYTES = 64 << 20
_data_as_stored: Any = Event.__dict__["data"].__get__
_decode_json = msgspec.json.Decoder().decode


class ClaimedData:
    """Loads the data of records from their claims, and remembers what was loaded last, up to 64 MiB and one more.

    Args:
        payloads: where the data is.
        label: what the stream is called in errors.
    """

    def __init__(self, payloads: "PayloadStore | None", label: str) -> None:
        self._payloads, self._label = payloads, label
        self._loaded: OrderedDict[tuple[str, int, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def payloads(self) -> "PayloadStore":
        """Where the data is.

        Raises:
            InvalidSettingError: the stream was opened without a payload store.
        """
        if self._payloads is None:
            raise InvalidSettingError(
                f"the data of an event is in a payload store, and stream {self._label} was opened without one; open it "
                "with payloads=open_payload_store(...)",
                setting="payloads",
                value=None,
            )
        return self._payloads

    def load(self, record: "ClaimedRecord", claim: Claim) -> Any:
        """The data of the record: the value it had when it was published."""
        with self._lock:
            found = self._loaded.get(record.position)
            if found is not None:
                self._loaded.move_to_end(record.position)
                return found[0]
        content = self.payloads.read(claim)
        value = _decoded(content, claim, (record.ext or {}).get(KIND_ATTRIBUTE))
        with self._lock:
            self._loaded[record.position] = (value, len(content))
            self._bytes += len(content)
            while self._bytes > _REMEMBERED_BYTES and len(self._loaded) > 1:
                self._bytes -= self._loaded.popitem(last=False)[1][1]
        return value


class ClaimedRecord(Record, frozen=False, kw_only=True, array_like=True, gc=False, eq=False):  # type: ignore[misc]
    """A record that may carry a claim in place of its data; what a reader makes of a record batch that holds some."""

    @property
    def claim(self) -> Claim | None:
        """The claim it carries; None if its data is here.

        Raises:
            InvalidClaimError: its ``dataref`` is none.
        """
        if _data_as_stored(self) is not None or self.ext is None or DATAREF not in self.ext:
            return None
        return Claim.from_attributes(self.ext, self.datacontenttype)

    @property  # type: ignore[misc]
    def data(self) -> Any:
        """The data, loaded from the payload store when first asked for.

        Raises:
            PayloadError: naming the payload; it is this record's fault alone.
            PayloadStoreUnavailableError: the store is away.
        """
        claim = self.claim
        return _data_as_stored(self) if claim is None else self.origin.claimed.load(self, claim)

    def open_data(self) -> BinaryIO:
        """See `Record.open_data`."""
        claim = self.claim
        return super().open_data() if claim is None else self.origin.claimed.payloads.open(claim)

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
        if "data" in attributes and "ext" not in attributes:
            attributes["ext"] = without_claim(event.ext)
        return event.replace(**attributes)


def _decoded(content: bytes, claim: Claim, kind: object) -> Any:
    known = kind if kind is not None else "json" if is_json(claim.media_type) else "bytes"
    if known == "bytes":
        return content
    try:
        if known == "text":
            return content.decode()
        if known == "json":
            return _decode_json(content)
        if known == "msgpack":
            return decode_value(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidClaimError(f"payload {claim.uri!r} is no {known}: {error}", part="kind") from error
    raise InvalidClaimError(f"payload {claim.uri!r} is of an unknown kind {str(known)[:40]!r}", part="kind")
