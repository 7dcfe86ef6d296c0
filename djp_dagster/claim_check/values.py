"""Values of assets and ops on their way into a payload store: small ones stay inline, large ones become claims.

A value is written once, to memory as long as it may stay inline, from there on to the store.
"""

import hashlib
import mimetypes
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

import msgspec

from djp_dagster.claim_check.claims import BYTES, Claim
from djp_dagster.claim_check.serializers.json_values import encode_json
from djp_dagster.claim_check.serializers.kinds import JSON, PARQUET, PICKLE, TEXT, Kind, is_stream, kind_of
from djp_dagster.claim_check.serializers.tables import TableFacts, write_lazy, write_table
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.claim_check.writing import Stored, Writing
from djp_dagster.errors import InvalidSettingError, PayloadForbiddenError
from djp_dagster.units import Duration

MAX_INLINE_BYTES = 4 << 20
"""Pointers stay below the least size of an S3 part, so that one request reads them as one version."""
_COPY_BYTES = 1 << 20
_MEDIA_TYPES: dict[Kind, str] = {"pandas": PARQUET, "arrow": PARQUET, "polars": PARQUET, "text": TEXT, "json": JSON}
_BY_SUFFIX = {".parquet": PARQUET, ".pq": PARQUET, ".jsonl": "application/x-ndjson", ".ndjson": "application/x-ndjson"}
_PACKED = {"gzip": "application/gzip", "bzip2": "application/x-bzip2", "xz": "application/x-xz"}


class Inline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A payload small enough to need no place of its own."""

    content: bytes
    sha256: str
    media_type: str


class Kept(msgspec.Struct, frozen=True):
    """A value that is durable now, as a claim or inline.

    Attributes:
        kind: what it was.
        stored: what the store did; None if nothing had to be stored.
        stored_bytes: its size as stored.
        table: if it was one whose rows are known.
        seconds: what it took, serializing included.
    """

    kind: Kind
    payload: Claim | Inline
    stored_bytes: int
    seconds: float
    stored: Stored | None = None
    table: TableFacts | None = None

    @property
    def size(self) -> int | None:
        """Of the payload."""
        return len(self.payload.content) if isinstance(self.payload, Inline) else self.payload.size

    @property
    def content_hash(self) -> str:
        """Equal for equal payloads; of a claim without a hash, that of its URI."""
        return self.payload.sha256 or hashlib.sha256(cast("Claim", self.payload).uri.encode()).hexdigest()


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """How values are kept.

    Args:
        store: where.
        threshold: payloads up to this many bytes stay inline; at most 4 MiB.
        expires_in: how long claims are needed at least; None for ever.
        media_type: of bytes, text, files and streams, if it is not to be guessed.
        allow_pickle: pickle what is neither a table, bytes, text, a file nor JSON.
        declared: the annotation of the output, if it has one.
    """

    store: PayloadStore
    threshold: int
    expires_in: Duration | None = None
    media_type: str | None = None
    allow_pickle: bool = False
    declared: Any = Any


def keep(value: Any, how: Keeping) -> Kept:
    """Make a value durable; nothing refers to it yet. A stream is read to its end, and closed.

    Raises:
        InvalidSettingError: the value is of no type that can be stored.
        PayloadForbiddenError: it is a claim of another store.
        PayloadTooLargeError, PayloadStoreUnavailableError, PayloadStoreRefusedError: as `PayloadStore.put`.
    """
    started = time.monotonic()
    kind = kind_of(value)
    if how.media_type is not None and kind not in ("bytes", "text", "file", "stream"):
        raise InvalidSettingError(
            f"media_type={how.media_type!r} is for bytes, text, files and streams, and this is a value of type "
            f"{type(value).__name__}; leave it out",
            setting="media_type",
            value=how.media_type,
        )
    if how.media_type is not None:
        Claim(uri="inline", media_type=how.media_type)  # the same rule for all
    if kind == "claim":
        return _kept_claim(value, how.store, started)
    if kind == "file":
        return _keep_file(value, how.media_type or media_type_of(value), how, kind, started)
    if kind == "polars" and not hasattr(value, "write_parquet"):
        with TemporaryDirectory(prefix="djp-") as folder:
            path = Path(folder) / "table.parquet"
            table = write_lazy(value, path)
            return _keep_file(path, PARQUET, how, kind, started, table)
    if kind == "json":
        return _keep_object(value, how, started)
    with _deposit(how, how.media_type or _MEDIA_TYPES.get(kind, BYTES)) as deposit:
        facts = _write(value, kind, deposit)
    return deposit.kept(kind, started, facts)


def media_type_of(path: Path) -> str:
    """By the suffix."""
    known = _BY_SUFFIX.get(path.suffix.lower())
    guessed, packed = mimetypes.guess_type(path.name)
    return known or (_PACKED.get(packed, BYTES) if packed else guessed or BYTES)


def _write(value: Any, kind: Kind, deposit: "_Deposit") -> TableFacts | None:
    file = cast("BinaryIO", deposit)
    if kind in ("pandas", "arrow", "polars"):
        return write_table(value, file)
    if kind == "text":
        file.write(_utf8(value))
    elif kind == "stream":
        _copy(value, file)
    else:
        file.write(value if not isinstance(value, memoryview) or value.c_contiguous else value.tobytes())
    return None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidSettingError(
            f"text that is no valid Unicode cannot be stored: {error}; return bytes", setting="output", value="str"
        ) from error


def _copy(stream: Any, file: BinaryIO) -> None:
    try:
        for piece in iter(lambda: stream.read(_COPY_BYTES), b"") if is_stream(stream) else stream:
            if not isinstance(piece, bytes | bytearray | memoryview):
                raise InvalidSettingError(
                    f"a {type(stream).__name__} gives {type(piece).__name__} instead of bytes; open files with 'rb', "
                    "yield bytes, and return tables as pa.RecordBatchReader.from_batches",
                    setting="output",
                    value=type(stream).__name__,
                )
            file.write(piece)
    finally:
        with suppress(AttributeError):
            stream.close()


def _keep_object(value: Any, how: Keeping, started: float) -> Kept:
    kind: Kind = "json"
    try:
        content = encode_json(value, how.declared)
    except InvalidSettingError:
        if not how.allow_pickle:
            raise
        kind = "pickle"
        with _deposit(how, PICKLE) as deposit:
            _pickle(value, cast("BinaryIO", deposit))
    else:
        with _deposit(how, JSON) as deposit:
            deposit.write(content)
    return deposit.kept(kind, started, None)


def _pickle(value: Any, file: BinaryIO) -> None:
    try:
        pickle.dump(value, file, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise InvalidSettingError(
            f"a value of type {type(value).__name__} can be stored neither as JSON nor as a pickle: {error}",
            setting="output",
            value=type(value).__name__,
        ) from error


def _keep_file(
    path: Path, media_type: str, how: Keeping, kind: Kind, started: float, table: TableFacts | None = None
) -> Kept:
    try:
        with path.open("rb") as file:
            content = file.read(how.threshold + 1)
            if len(content) > how.threshold:
                file.seek(0)
                stored = how.store.put(file, media_type=media_type, expires_in=how.expires_in)
                return _kept(kind, stored, started, table)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InvalidSettingError(
            f"{str(path)!r} cannot be stored: {error.strerror}; return the path of a file that can be read; of a "
            "folder, that of an archive of it",
            setting="output",
            value=str(path),
        ) from error
    inline = Inline(content, hashlib.sha256(content).hexdigest(), media_type)
    return Kept(kind, inline, len(content), time.monotonic() - started, None, table)


def _kept_claim(claim: Claim, store: PayloadStore, started: float) -> Kept:
    if not store.holds(claim):
        raise PayloadForbiddenError(
            f"claim {claim.uri[:200]!r} is not for the payload store {store.uri}, where values are kept; store the "
            "payload there (ClaimCheckIOManager.payloads().put), or return its bytes as a stream",
            uri=claim.uri,
        )
    kept = store.keep(claim)
    return Kept("claim", kept, store.info(kept).bytes, time.monotonic() - started)


def _kept(kind: Kind, stored: Stored, started: float, table: TableFacts | None) -> Kept:
    return Kept(kind, stored.claim, stored.stored_bytes, time.monotonic() - started, stored, table)


class _Deposit:
    """A file to write to, in memory up to the threshold. It cannot be closed by those who write to it."""

    closed = False

    def __init__(self, begin: Callable[[], Writing], threshold: int, media_type: str) -> None:
        self._begin, self._threshold, self._media_type = begin, threshold, media_type
        self._memory: bytearray | None = bytearray()
        self._writing: Writing | None = None
        self._size = 0

    def write(self, data: "bytes | bytearray | memoryview") -> int:
        """Take in all of ``data``."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self._memory is not None and self._size > self._threshold:
            self._writing = self._begin()
            self._writing.file.write(self._memory)
            self._memory = None
        if self._memory is not None:
            self._memory += view
        else:
            assert self._writing is not None
            self._writing.file.write(view)
        return len(view)

    def tell(self) -> int:
        """How much was written."""
        return self._size

    def writable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is not."""
        return False

    def seekable(self) -> bool:
        """It is not."""
        return False

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Not yet."""

    def kept(self, kind: Kind, started: float, table: TableFacts | None) -> Kept:
        """What became of it."""
        if self._writing is not None:
            return _kept(kind, self._writing.stored, started, table)
        content = bytes(self._memory or b"")
        inline = Inline(content, hashlib.sha256(content).hexdigest(), self._media_type)
        return Kept(kind, inline, len(content), time.monotonic() - started, None, table)


@contextmanager
def _deposit(how: Keeping, media_type: str) -> Iterator[_Deposit]:
    with ExitStack() as stack:
        writer = how.store.writer(media_type=media_type, expires_in=how.expires_in)
        yield _Deposit(lambda: stack.enter_context(writer), how.threshold, media_type)
