"""`PayloadWriter`: bytes on their way into a store: counted, hashed, and compressed where that pays."""

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import ZSTD, Claim, PayloadRef
from djp_dagster.claim_check.objects import Content
from djp_dagster.claim_check.spool import Spool
from djp_dagster.errors import PayloadTooLargeError

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore

SAMPLE_BYTES = 256 << 10
_PAYS = 0.8
_LEVEL = 1
_COMPRESSIBLE = ("text/", "application/json", "application/x-ndjson", "application/xml", "application/vnd.msgpack")
_SUFFIXES = ("+json", "+xml")


def may_compress(media_type: str) -> bool:
    """Whether payloads of that type are worth a try: text of all kinds. Images, video, Parquet are compressed."""
    kind = media_type.partition(";")[0].strip().lower()
    return kind.startswith(_COMPRESSIBLE) or kind.endswith(_SUFFIXES)


class PayloadWriter(io.RawIOBase):
    """A file to write a payload to, once and in order.

    Args:
        folder: where temporary files go.
        compress: try zstd on the first bytes, and go on with it if they become a fifth smaller.
        max_bytes: the payload may have no more.

    Attributes:
        size, sha256: of what was written; the hash is known once it is `finished`.
        spool: what is to be stored.
        encoding: how: None or ``"zstd"``.
    """

    def __init__(self, folder: Path | None, *, compress: bool, max_bytes: int) -> None:
        self.spool = Spool(folder)
        self.encoding: str | None = None
        self.size, self.sha256 = 0, ""
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._sample: bytearray | None = bytearray() if compress else None
        self._sink: Any = self.spool
        self._compressed: _KeepOpen | None = None

    def writable(self) -> bool:
        """It is, until finished."""
        return True

    def tell(self) -> int:
        """How much was written."""
        return self.size

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # type: ignore[override]
        """Take in all of ``data``.

        Raises:
            PayloadTooLargeError: the payload becomes larger than the store takes.
        """
        view = memoryview(data).cast("B")
        self.size += len(view)
        if self.size > self._max_bytes:
            raise PayloadTooLargeError(
                f"a payload of more than {self._max_bytes} bytes: the store takes no more; raise its max_payload_bytes",
                limit=self._max_bytes,
            )
        self._digest.update(view)
        if self._sample is None:
            self._sink.write(view)
        else:
            self._sample += view
            if len(self._sample) >= SAMPLE_BYTES:
                self._decide()
        return len(view)

    def finished(self) -> "PayloadWriter":
        """No more will be written."""
        if self._sample is not None:
            self._decide()
        if self._sink is not self.spool:
            self._sink.close()
        self.sha256 = self._digest.hexdigest()
        return self

    def _decide(self) -> None:
        import pyarrow as pa

        sample, self._sample = self._sample, None
        assert sample is not None
        if len(pa.Codec(ZSTD, compression_level=_LEVEL).compress(sample, asbytes=True)) <= _PAYS * len(sample):
            self.encoding = ZSTD
            # PythonFile would close the spool with itself.
            self._compressed = _KeepOpen(self.spool)
            self._sink = pa.CompressedOutputStream(pa.PythonFile(self._compressed, mode="w"), ZSTD)
        self._sink.write(sample)

    def close(self) -> None:
        """Forget everything."""
        if self._compressed is not None:
            self._compressed.spool = None
            self._sink.close()
        self.spool.close()
        super().close()


class _KeepOpen:
    """A spool that outlives whoever writes to it; without one, what is written is forgotten."""

    closed = False

    def __init__(self, spool: Spool) -> None:
        self.spool: Spool | None = spool

    def write(self, data: "bytes | memoryview") -> int:
        """Pass it on."""
        return len(data) if self.spool is None else self.spool.write(data)

    def tell(self) -> int:
        """How much the spool has."""
        return 0 if self.spool is None else self.spool.tell()

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Not yet."""


class Stored(msgspec.Struct, frozen=True):
    """A payload that is in the store now.

    Attributes:
        claim: the token to send.
        ref: the same, relative to the store.
        deduplicated: it was there already.
        stored_bytes: its size as stored.
        seconds: what storing it took, hashing included.
    """

    claim: Claim
    ref: PayloadRef
    deduplicated: bool
    stored_bytes: int
    seconds: float


class Writing:
    """A payload being written through `PayloadStore.writer`.

    Attributes:
        file: where to write, in order.
    """

    def __init__(self, file: PayloadWriter) -> None:
        self.file: BinaryIO = file  # type: ignore[assignment]
        self._stored: Stored | None = None

    def finish(self, stored: Stored) -> None:
        """What became of it."""
        self._stored = stored

    @property
    def stored(self) -> Stored:
        """The payload, once the block has ended."""
        assert self._stored is not None, "ask for it after the block"
        return self._stored


class PayloadUpload:
    """A payload being written under a path of its own, in bounded memory.

    Args:
        put: makes it visible: key, content, media type.
        key, media_type: of the payload.
        file: takes it in.
    """

    def __init__(
        self, put: Callable[[str, Content, str], None], key: str, media_type: str, file: PayloadWriter
    ) -> None:
        self._put, self._key, self._media_type, self._file = put, key, media_type, file

    @property
    def file(self) -> BinaryIO:
        """Where to write, in order."""
        return self._file  # type: ignore[return-value]

    def if_small(self, max_bytes: int) -> bytes | None:
        """What was written, if it is no more than that, for whoever needs no object then; nothing is stored."""
        if self._file.size > max_bytes:
            return None
        spool = self._file.finished().spool
        content = bytearray(spool.size)
        spool.read_into(memoryview(content), 0)
        return bytes(content)

    def finish(self) -> PayloadRef:
        """Make it durable and visible. A key that exists is replaced in one step: the same attempt wrote it."""
        file = self._file.finished()
        self._put(self._key, file.spool, self._media_type)
        return PayloadRef(self._key, file.size, file.sha256, self._media_type)

    def abandon(self) -> None:
        """Forget what was written, unless finished."""
        self._file.close()


@contextmanager
def uploading(store: "PayloadStore", key: str, media_type: str) -> Iterator[PayloadUpload]:
    """An upload that is abandoned unless the block finishes it."""
    upload = store.create(key, media_type)
    try:
        yield upload
    finally:
        upload.abandon()
