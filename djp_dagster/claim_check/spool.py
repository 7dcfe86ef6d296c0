"""`Content` to be stored: a spool that is written piece by piece, or a file that somebody else owns.

A payload's key is its hash, so all of it must have passed by before the first byte can go to its place. What is small
waits in memory, what is not in a temporary file; memory stays bounded by `MEMORY_BYTES`.
"""

import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from djp_dagster.errors import PayloadCorruptError, PayloadStoreUnavailableError

MEMORY_BYTES = 8 << 20
"""Content up to this size is kept in memory; larger content is moved about in pieces of this size."""
TEMPORARY = ".upload-"
_CHUNK_BYTES = 2 << 20
assert MEMORY_BYTES % _CHUNK_BYTES == 0


class Spool(io.RawIOBase):
    """A file to write to, once and in order, and `Content` all the while.

    Args:
        folder: where its temporary file is made, if it needs one; wherever the system has them unless given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: bytearray | None = bytearray()
        self._path: Path | None = None
        self._handle = -1
        self.size = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """How much was written."""
        return self.size

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # type: ignore[override]
        """Take in all of ``data``."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        view = memoryview(data).cast("B")
        if self._memory is not None and self.size + len(view) > MEMORY_BYTES:
            self._move_to_file()
        if self._memory is not None:
            self._memory += view
        else:
            self._write_to_file(view)
        self.size += len(view)
        return len(view)

    def _move_to_file(self) -> None:
        with _roomy(self._folder):
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=self._folder)
        self._path = Path(name)
        assert self._memory is not None
        memory, self._memory = self._memory, None
        self._write_to_file(memoryview(memory))

    def _write_to_file(self, rest: memoryview) -> None:
        with _roomy(self._folder):
            while rest:
                rest = rest[os.write(self._handle, rest) :]

    def read_at(self, offset: int, size: int) -> bytes:
        """See `Content.read_at`."""
        if self._memory is not None:
            return bytes(self._memory[offset : offset + size])
        return os.pread(self._handle, size, offset)

    def as_file(self, folder: Path) -> Path:
        """See `Content.as_file`: its own temporary file where that is possible, a copy where not."""
        if self._path is None or self._path.parent != folder:
            return _written(self, folder)
        os.fsync(self._handle)
        path, self._path = self._path, None
        return path

    def close(self) -> None:
        """Forget everything."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        self._memory = None
        super().close()


class FileContent:
    """A file of somebody else as content: hashed once, and compared when read again, because it may change meanwhile.

    Args:
        file: open for reading, with a file descriptor; read from its beginning, and left open.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._handle = file.fileno()
        self._name = str(getattr(file, "name", "a file"))
        digest = hashlib.sha256()
        self._checks: list[int] = []
        self.size, check = 0, 0
        # Two buffers: one is filled, and summed, while the other is hashed, which takes longest.
        buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="djp-hash") as reader:
            ahead = reader.submit(_fill, self._handle, buffers[0], 0, 0)
            while True:
                filled, check = ahead.result()
                self.size += len(filled)
                if self.size % MEMORY_BYTES == 0 or len(filled) < _CHUNK_BYTES:
                    self._checks.append(check)
                    check = 0
                if len(filled) < _CHUNK_BYTES:
                    break
                buffers.reverse()
                ahead = reader.submit(_fill, self._handle, buffers[0], self.size, check)
                digest.update(filled)
            digest.update(filled)
        self.sha256 = digest.hexdigest()

    def read_at(self, offset: int, size: int) -> bytes:
        """See `Content.read_at`. Whole pieces of `MEMORY_BYTES` are read, because they were hashed as a whole."""
        end = min(offset + size, self.size)
        first = offset - offset % MEMORY_BYTES
        last = min(end + -end % MEMORY_BYTES, self.size)
        data = os.pread(self._handle, last - first, first)
        if len(data) != last - first:
            raise self._changed()
        for start in range(0, len(data), MEMORY_BYTES):
            piece = memoryview(data)[start : start + MEMORY_BYTES]
            if zlib.crc32(piece) != self._checks[(first + start) // MEMORY_BYTES]:
                raise self._changed()
        return data[offset - first : end - first]

    def as_file(self, folder: Path) -> Path:
        """See `Content.as_file`: a copy."""
        return _written(self, folder)

    def close(self) -> None:
        """Nothing: the file is somebody else's."""

    def _changed(self) -> PayloadCorruptError:
        return PayloadCorruptError(
            f"{self._name!r} changed while it was being stored; nothing was stored. Store a copy of it", key=None
        )


@contextmanager
def _roomy(folder: Path | None) -> Iterator[None]:
    """A full disk is nobody's record's fault, and passes."""
    try:
        yield
    except OSError as error:
        raise PayloadStoreUnavailableError(
            f"no temporary file for a payload in {str(folder or tempfile.gettempdir())!r}: {error}; make room there, "
            "or have temporary files made elsewhere (TMPDIR, or spool_folder for a store on S3)",
            folder=str(folder or tempfile.gettempdir()),
        ) from error


def _fill(handle: int, buffer: memoryview, offset: int, check: int) -> tuple[memoryview, int]:
    """As much of the file from ``offset`` on as the buffer takes, and the CRC-32 continued over it."""
    size = 0
    while read := os.preadv(handle, [buffer[size:]], offset + size):
        size += read
    return buffer[:size], zlib.crc32(buffer[:size], check)


def _written(content: "Spool | FileContent", folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for offset in range(0, content.size, MEMORY_BYTES):
                file.write(content.read_at(offset, MEMORY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def is_whole_large_file(file: BinaryIO) -> bool:
    """Whether it is a real file at its beginning, worth reading twice instead of copying.

    By its type: files that decompress, for one, have the descriptor of what they decompress.
    """
    unwrapped = getattr(file, "file", file)  # of tempfile
    raw = unwrapped.raw if isinstance(unwrapped, io.BufferedReader | io.BufferedRandom) else unwrapped
    return (
        isinstance(raw, io.FileIO)
        and raw.seekable()
        and unwrapped.tell() == 0
        and os.fstat(raw.fileno()).st_size > MEMORY_BYTES
    )
