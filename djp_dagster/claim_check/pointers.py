"""Pointers: small documents of a payload store that say which payload is the value of an asset, partition or op output.

======================================================  ============================================================
``pointers/assets/<part>/<part>/=value``                of an asset without partitions
``pointers/assets/<part>/<part>/=partitions/<key>``     of a partition
``pointers/ops/<run id>/<step>/<output>[/<mapping>]``   of an op's output
======================================================  ============================================================

Payloads are immutable and there before a pointer names them; a pointer is replaced in one step. So whoever reads one
reads one version of the value to its end, and of several writers the last one wins. Nothing a pointer says is imported
or executed; its claim is resolved within its own store only.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from djp_dagster.claim_check.claims import Claim
from djp_dagster.claim_check.objects import MAX_KEY_BYTES
from djp_dagster.claim_check.serializers.kinds import Kind
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.values import MAX_INLINE_BYTES, Inline
from djp_dagster.errors import InvalidClaimError, PayloadCorruptError, PayloadMissingError
from djp_dagster.units import Duration

if TYPE_CHECKING:
    from djp_dagster.claim_check.collection import CollectionReport

ASSETS = "assets"
"""Below this of the payload store lies what the IO manager keeps: a store of its own, with one room."""
ROOM = "pointers"
_TOP = "pointers/"
_VALUE, _PARTITIONS = "=value", "=partitions"
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
_LONGEST_PART = 100
_LONGEST_KEY = MAX_KEY_BYTES // 2
_MAX_BYTES = MAX_INLINE_BYTES + (64 << 10)
_READERS = 8


class Pointer(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, tag_field="v", tag=1
):
    """Which payload the value is.

    Attributes:
        kind: what the value was.
        run_id: of the run that wrote it.
        stored_at, expires_at: in seconds since 1970; of op outputs, when nobody is expected to read it any more.
    """

    kind: Kind
    run_id: str
    stored_at: float
    claim: Claim | None = None
    inline: Inline | None = None
    expires_at: float | None = None

    @property
    def payload(self) -> Claim | Inline:
        """The one that is given."""
        found = self.claim or self.inline
        assert found is not None
        return found

    @property
    def has_expired(self) -> bool:
        """Whether its time is up."""
        return self.expires_at is not None and self.expires_at <= time.time()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Pointer).decode


def values_of(store: PayloadStore) -> PayloadStore:
    """The part of a payload store where values and their pointers lie."""
    return store.within(ASSETS, room=ROOM)


def asset_key(parts: Sequence[str], partition: str | None = None) -> str:
    """The key of an asset's or a partition's pointer; different ones for different assets and partitions."""
    leaf = [_VALUE] if partition is None else [_PARTITIONS, _escaped(partition)]
    return _joined("assets", [_escaped(part) for part in parts], leaf, (parts, partition))


def op_key(identifier: Sequence[str]) -> str:
    """The key of an op output's pointer, by Dagster's identifier of it: run, step, output, and mapping key."""
    return _joined("ops", [_escaped(part) for part in identifier], [], identifier)


def _joined(tree: str, parts: list[str], leaf: list[str], whole: object) -> str:
    key = f"{_TOP}{tree}/" + "/".join([*parts, *leaf])
    return key if len(key) <= _LONGEST_KEY else f"{_TOP}{tree}/=={_digest(msgspec.json.encode(whole))}"


def _escaped(part: str) -> str:
    """A segment of a key: ``=`` and two hex digits for what no segment can have; a hash for most of a long one."""
    raw = part.encode(errors="surrogatepass")
    escaped = "".join(chr(byte) if byte in _PLAIN else f"={byte:02X}" for byte in raw) or "="
    if escaped.startswith("."):
        escaped = f"=2E{escaped[1:]}"
    return escaped if len(escaped) <= _LONGEST_PART else f"{escaped[: _LONGEST_PART - 66]}=={_digest(raw)}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_pointer(store: PayloadStore, key: str, pointer: Pointer) -> None:
    """Make the pointer the current one, in one step."""
    store.announce()  # also where all values are inline: they may hold claims, and outputs of ops expire
    store.objects.replace_document(key, _encode(pointer))


def read_pointer(store: PayloadStore, key: str) -> Pointer | None:
    """The current pointer; None if there is none.

    Raises:
        PayloadCorruptError: it is none that this release reads.
    """
    try:
        with store.objects.open(key) as file:
            body = file.read(_MAX_BYTES + 1)
    except PayloadMissingError:
        return None
    return decode_pointer(body, key)


def decode_pointer(body: bytes, key: str) -> Pointer:
    """The pointer that the body of a document is.

    Raises:
        PayloadCorruptError: it is none that this release reads.
    """
    if len(body) > _MAX_BYTES:
        raise _no_pointer(key, f"it has more than {_MAX_BYTES} bytes")
    try:
        pointer = _decode(body)
    except (msgspec.MsgspecError, InvalidClaimError, UnicodeError, RecursionError) as error:
        raise _no_pointer(key, str(error)) from error
    fault = _fault_of(pointer)
    if fault is not None:
        raise _no_pointer(key, fault)
    return pointer


def _fault_of(pointer: Pointer) -> str | None:
    if (pointer.claim is None) == (pointer.inline is None):
        return "it has both a claim and an inline value, or neither"
    if pointer.inline is not None and _digest(pointer.inline.content) != pointer.inline.sha256:
        return "its inline value is not what its hash says"
    return None


def _no_pointer(key: str, why: str) -> PayloadCorruptError:
    return PayloadCorruptError(
        f"pointer {key!r} is damaged, or was written by a newer release: {why}; materialize it again", key=key
    )


class PointerRoom:
    """The pointers of a store, as a room for `djp_dagster.claim_check.collection`.

    Args:
        store: as `values_of` gives it.
        remove_expired: delete pointers of op outputs whose time is up; their payloads go by themselves.
    """

    name = ROOM

    def __init__(self, store: PayloadStore, *, remove_expired: bool = False) -> None:
        self._store, self._remove_expired = store, remove_expired

    def references(self) -> Iterator[bytes]:
        """The body of every pointer whose time is not up; what cannot be read as a pointer counts as one."""
        expired: list[str] = []
        for key, body in self._bodies():
            if _may_go(key, body):
                expired.append(key)
            else:
                yield body
        if self._remove_expired:
            self._store.objects.delete(expired)

    def _bodies(self) -> Iterator[tuple[str, bytes]]:
        objects = self._store.objects
        under_way: deque[tuple[str, Future[bytes | None]]] = deque()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="djp-pointers") as pool:
            try:
                for found in objects.list(_TOP):
                    under_way.append((found.key, pool.submit(self._body, found.key)))
                    if len(under_way) >= 4 * _READERS:
                        yield from _done(under_way.popleft())
                while under_way:
                    yield from _done(under_way.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _body(self, key: str) -> bytes | None:
        document = self._store.objects.read_document(key)
        return None if document is None else document.body


def _done(reading: "tuple[str, Future[bytes | None]]") -> Iterator[tuple[str, bytes]]:
    body = reading[1].result()
    if body is not None:  # removed meanwhile
        yield reading[0], body


def _may_go(key: str, body: bytes) -> bool:
    try:
        return decode_pointer(body, key).has_expired
    except PayloadCorruptError:
        return False


def collect_values(store: PayloadStore, *, grace: Duration = "1d", dry_run: bool = True) -> "CollectionReport":
    """Collect the garbage among the values of a payload store; see `djp_dagster.claim_check.collection.collect`.

    Args:
        store: as the IO manager was given it.
        grace: how long what is stored may be referred to by nothing.
        dry_run: change nothing, only report.
    """
    from djp_dagster.claim_check.collection import collect

    values = values_of(store)
    return collect(values, [PointerRoom(values, remove_expired=not dry_run)], grace=grace, dry_run=dry_run)
