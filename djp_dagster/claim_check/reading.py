"""Reading payloads as their references promise: counted, hashed, and never more than announced."""

import hashlib
import io
import sys
from typing import Any, BinaryIO

from djp_dagster.claim_check.claims import ZSTD, PayloadRef
from djp_dagster.errors import PayloadCorruptError, PayloadForbiddenError

_BUFFER_BYTES = 1 << 20


def verified(raw: BinaryIO, ref: PayloadRef, *, max_bytes: int) -> BinaryIO:
    """The payload in order, from the stored bytes ``raw``, which are closed with it.

    What is read is only known to be right once the end was read without an error.

    Raises:
        PayloadCorruptError: while reading: the payload is longer or shorter than announced, or another one.
        PayloadForbiddenError: it is encoded in a way this release does not read.
    """
    return io.BufferedReader(_Verified(raw, ref, max_bytes), _BUFFER_BYTES)


def verified_in_place(raw: BinaryIO, ref: PayloadRef) -> BinaryIO:
    """``raw``, which can be sought in, at its beginning, after all of it was read and found right.

    Raises:
        PayloadCorruptError: it is longer or shorter than announced, or another one; ``raw`` is closed.
    """
    check = _Verified(raw, ref, max_bytes=0)
    buffer = bytearray(_BUFFER_BYTES)
    try:
        while check.readinto(buffer):
            pass
        raw.seek(0)
    except BaseException:
        raw.close()
        raise
    check.detach()
    return raw


class _Verified(io.RawIOBase):
    def __init__(self, raw: BinaryIO, ref: PayloadRef, max_bytes: int) -> None:
        self._raw, self._ref = raw, ref
        self._decoded: Any = _decoded(raw, ref)
        self._limit = ref.bytes if ref.bytes >= 0 else max_bytes or sys.maxsize
        self._digest = hashlib.sha256()
        self._size = 0
        self._ended = False

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes; 0 at the end, and only if all of them were right."""
        if self._ended:
            return 0
        try:
            read: int = self._decoded.readinto(buffer)
        except OSError as error:
            if self._decoded is self._raw:
                raise
            # What zstd says of damaged bytes.
            raise self._corrupt(f"cannot be decoded ({error})") from error
        if read:
            self._size += read
            if self._size > self._limit:
                raise self._corrupt(f"has more than {self._limit} bytes")
            self._digest.update(memoryview(buffer)[:read])
            return read
        self._check_end()
        return 0

    def _check_end(self) -> None:
        self._ended = True
        if 0 <= self._ref.bytes != self._size:
            raise self._corrupt(f"has {self._size} bytes")
        found = self._digest.hexdigest()
        if self._ref.sha256 and found != self._ref.sha256:
            raise self._corrupt(f"has hash {found[:12]}...")

    def _corrupt(self, what: str) -> PayloadCorruptError:
        ref = self._ref
        return PayloadCorruptError(
            f"payload {ref.key!r} {what}, its reference says {ref.bytes} bytes of hash {ref.sha256[:12]}...: it was "
            "changed or damaged; restore it from a backup",
            key=ref.key,
        )

    def detach(self) -> None:
        """Leave the stored bytes open when this is closed."""
        self._raw = self._decoded = io.BytesIO()

    def close(self) -> None:
        """Release the stored bytes."""
        if not self.closed:
            if self._decoded is not self._raw:
                self._decoded.close()
            self._raw.close()
        super().close()


def _decoded(raw: BinaryIO, ref: PayloadRef) -> Any:
    if ref.encoding is None:
        return raw
    if ref.encoding == ZSTD:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), ZSTD)
    raw.close()
    raise PayloadForbiddenError(
        f"payload {ref.key!r} is encoded as {ref.encoding!r}; this release reads 'zstd', and what is stored as it is",
        key=ref.key,
    )
