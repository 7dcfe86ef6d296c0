"""`Content` to be stored: a spool that is written piece by piece, or a file that somebody else owns.

A payload's key is its hash, so all of it must have passed by before the first byte can go to its place. What is small
waits in memory, what is not in a temporary file; memory stays bounded by `MEMORY_BYTES`.
"""

import hashlib
import io
import os
import tempfile
import zlib
from array import array
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

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `Content.read_into`."""
        if self._memory is not None:
            buffer[:] = self._memory[offset : offset + len(buffer)]
        elif _fill(self._handle, buffer, offset) != len(buffer):
            raise PayloadCorruptError(f"{str(self._path)!r} was cut off while it was being stored", key=None)

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
        self._checks = array("I")  # of each chunk
        self.size = 0
        # Two buffers: one is filled, and summed, while the other is hashed, which takes longest.
        buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="djp-hash") as reader:
            ahead = reader.submit(_summed, self._handle, buffers[0], 0)
            while True:
                filled, check = ahead.result()
                self._checks.append(check)
                self.size += len(filled)
                if len(filled) < _CHUNK_BYTES:
                    break
                buffers.reverse()
                ahead = reader.submit(_summed, self._handle, buffers[0], self.size)
                digest.update(filled)
            digest.update(filled)
        self.sha256 = digest.hexdigest()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `Content.read_into`. Whole chunks are read, because they were summed as a whole."""
        while buffer:
            number, skipped = divmod(offset, _CHUNK_BYTES)
            size = min(_CHUNK_BYTES, self.size - number * _CHUNK_BYTES)
            fits = not skipped and size <= len(buffer)
            chunk = buffer[:size] if fits else memoryview(bytearray(size))
            filled, check = _summed(self._handle, chunk, number * _CHUNK_BYTES)
            if len(filled) != size or check != self._checks[number]:
                raise PayloadCorruptError(
                    f"{self._name!r} changed while it was being stored; nothing was stored. Store a copy of it",
                    key=None,
                )
            wanted = chunk[skipped : skipped + len(buffer)]
            if not fits:
                buffer[: len(wanted)] = wanted
            buffer, offset = buffer[len(wanted) :], offset + len(wanted)

    def as_file(self, folder: Path) -> Path:
        """See `Content.as_file`: a copy."""
        return _written(self, folder)

    def close(self) -> None:
        """Nothing: the file is somebody else's."""


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


def _fill(handle: int, buffer: memoryview, offset: int) -> int:
    """Read as much of the file from ``offset`` on as the buffer takes; how much that was."""
    size = 0
    while read := os.preadv(handle, [buffer[size:]], offset + size):
        size += read
    return size


def _summed(handle: int, buffer: memoryview, offset: int) -> tuple[memoryview, int]:
    """What `_fill` has read, and its CRC-32."""
    filled = buffer[: _fill(handle, buffer, offset)]
    return filled, zlib.crc32(filled)


def _written(content: "Spool | FileContent", folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            buffer = memoryview(bytearray(min(_CHUNK_BYTES, content.size)))
            for offset in range(0, content.size, _CHUNK_BYTES):
                piece = buffer[: content.size - offset]
                content.read_into(piece, offset)
                file.write(piece)
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
