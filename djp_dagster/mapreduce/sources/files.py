"""Files as streams of bytes: by range where they are plain, from their beginning where they are compressed."""

import bz2
import io
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.claim_check.foreign import Found, Reader, reader_of
from djp_dagster.errors import InvalidSettingError, SourceError
from djp_dagster.units import Size, parse_bytes

if TYPE_CHECKING:
    from djp_dagster.claim_check.s3_settings import S3Settings

_PART_BYTES = 1 << 20
_FAR_BYTES = 8 << 20
_LITTLE_BYTES = 256 << 10
_SUFFIXES = {"gz": "gzip", "gzip": "gzip", "bz2": "bz2", "zst": "zstd", "zstd": "zstd"}
COMPRESSIONS = ("auto", "none", "gzip", "bz2", "zstd")


class Range(msgspec.Struct, frozen=True):
    """A part of an object: the records that begin from ``start`` on and before ``end``; all if it is compressed."""

    found: Found
    start: int
    end: int
    compression: str
    s3: "Any" = None

    @property
    def size(self) -> int:
        """In bytes, as stored."""
        return self.end - self.start

    def identity(self) -> str:
        """Of what, in which version, and which part. Without the settings of the bucket, which hold secrets."""
        return f"{self.found.uri} {self.found.size} {self.found.version} {self.start} {self.end} {self.compression}"


def ranges(
    found: list[Found], *, split_bytes: Size, compression: str, splittable: bool, s3: "S3Settings | None"
) -> list[Range]:
    """The objects, the large ones among them in parts of about equal size."""
    limit = max(1, parse_bytes(split_bytes, name="split_bytes"))
    parts: list[Range] = []
    for one in found:
        how = compression_of(one.uri, compression)
        count = -(-one.size // limit) if splittable and how == "none" else 1
        edges = [one.size * number // max(1, count) for number in range(count + 1)] if count > 1 else [0, one.size]
        parts += [Range(one, start, end, how, s3) for start, end in pairwise(edges)]
    return [part for part in parts if part.size or part.compression != "none"]


def compression_of(uri: str, compression: str) -> str:
    """How an object is compressed: as told, or as its name ends.

    Raises:
        InvalidSettingError: there is no such compression.
    """
    if compression not in COMPRESSIONS:
        raise InvalidSettingError(
            f"compression={compression!r} must be one of {list(COMPRESSIONS)}", setting="compression", value=compression
        )
    return _SUFFIXES.get(uri.rpartition(".")[2].lower(), "none") if compression == "auto" else compression


class Window(io.RawIOBase):
    """An object as a file, to be read from anywhere.

    Args:
        reader: of the object.
        size: of the object.
        part_bytes: ask the reader for so many at a time and hand them out piece by piece; as asked for if 0.
        end: up to where it will be read, but for a little.
    """

    def __init__(self, reader: Reader, size: int, *, part_bytes: int = 0, end: int | None = None) -> None:
        self._reader, self._size, self._at = reader, size, 0
        self._part_bytes, self._end = part_bytes, size if end is None else end
        self._part, self._part_at = b"", 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.IOBase`."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase`."""
        view = memoryview(buffer).cast("B")
        body = self.read(len(view))
        view[: len(body)] = body
        return len(body)

    def read(self, size: int = -1, /) -> bytes:
        """See `io.RawIOBase`."""
        end = self._size if size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        body = self._in_part(end) if 0 <= size < self._part_bytes else self._reader.read_at(self._at, end)
        self._at += len(body)
        return body

    def _in_part(self, end: int) -> bytes:
        """The bytes from here up to ``end``, of a large part that is read at once."""
        start = self._at - self._part_at
        if not start >= 0 or start + end - self._at > len(self._part):
            ahead = self._end if self._at < self._end else self._at + _LITTLE_BYTES
            self._part = self._reader.read_at(self._at, max(end, min(self._at + self._part_bytes, ahead)))
            self._part_at, start = self._at, 0
        return self._part[start : start + end - self._at]


@contextmanager
def window_of(part: Range) -> Iterator[Window]:
    """The object of a range as a file that can be sought in."""
    with closing(reader_of(part.found, part.s3)) as reader:
        # A request to a bucket takes a while, whatever it asks for.
        far = part.found.uri.startswith("s3://")
        yield Window(reader, part.found.size, part_bytes=_FAR_BYTES if far else 0, end=part.end)


@contextmanager
def expanded(part: Range) -> Iterator[BinaryIO]:
    """The object of a range from its beginning, expanded.

    Reading raises `SourceError` if the object ends too early, or is not compressed as it should be.
    """
    with window_of(part) as window:
        file = io.BufferedReader(window, _PART_BYTES)
        if part.compression == "none":
            yield file
        else:
            yield _Expanded(file, part)  # type: ignore[misc]


class _Expanded:
    """What a compressed file holds; several members or frames in one file are one stream."""

    def __init__(self, file: BinaryIO, part: Range) -> None:
        self._file, self._part = file, part
        self._rest: Any = None
        if part.compression == "zstd":
            import pyarrow as pa

            self._rest = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        elif part.compression == "bz2":
            self._rest = bz2.BZ2File(file)
        else:
            import gzip

            self._rest = gzip.GzipFile(fileobj=file, mode="rb")

    def read(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        found = []
        try:
            while size and (piece := self._rest.read(size)):
                found.append(piece)
                size -= len(piece)
        except (EOFError, zlib.error, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system; those about the bytes have no number
            raise SourceError(
                f"{self._part.found.uri} is not whole, or no {self._part.compression}: {error}; fetch it again, or "
                "name its compression",
                uri=self._part.found.uri,
            ) from error
        return b"".join(found)
