"""Objects of anybody's, to be read and nothing else: files and globs, objects of any bucket; parts of them, too.

Each is found once, with its size and version; a part that is read later is of that version, or refused.
"""

import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from glob import glob
from pathlib import Path
from typing import Any, Protocol

import msgspec

from djp_dagster.claim_check.s3_settings import S3Settings, broken_off, code_of, typed
from djp_dagster.errors import InvalidSettingError, SourceError

_MAGIC = re.compile(r"[*?[]")
_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_PAUSE_S = 0.1
_S3 = "s3://"


class Found(msgspec.Struct, frozen=True):
    """An object, as it was when somebody looked for it.

    Attributes:
        version: changes with the bytes: an ETag, or inode and time.
    """

    uri: str
    size: int
    version: str


class Reader(Protocol):
    """Reads parts of one object. Close it."""

    def read_at(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` to ``end``, fewer at the end of the object.

        Raises:
            SourceError: it is gone, or is not what was found.
        """

    def close(self) -> None:
        """Release it, after a last look that it is still what was found."""


def find(patterns: Sequence[str | Path], s3: S3Settings | None = None) -> list[Found]:
    """The objects of all patterns: paths, ``file://`` and ``s3://`` URLs, each with ``*``, ``**``, ``?``, ``[...]``.

    In the order of the patterns, by name within each; one that several patterns match comes once.

    Raises:
        SourceError: nothing matches a pattern; a folder was named, which is not a file.
        InvalidSettingError: a URL of another kind.
        PayloadStoreUnavailableError, PayloadStoreRefusedError: of the bucket.
    """
    found: dict[str, Found] = {}
    for pattern in map(str, patterns):
        matches = list(_in_bucket(pattern, s3 or S3Settings.from_environment())) if pattern.startswith(_S3) else []
        if not pattern.startswith(_S3):
            matches = list(_in_folder(pattern))
        if not matches:
            raise SourceError(
                f"nothing matches {pattern!r}: name existing files, or leave the pattern out", uri=pattern
            )
        for match in matches:
            found.setdefault(match.uri, match)
    return list(found.values())


def _in_folder(pattern: str) -> Iterator[Found]:
    path = pattern.removeprefix("file://")
    if "://" in path:
        raise InvalidSettingError(
            f"{pattern!r} must be a path, file:///path or s3://bucket/key", setting="source", value=pattern
        )
    names = [path]
    if _MAGIC.search(path) and not Path(path).exists():
        names = sorted(glob(path, recursive=True))  # noqa: PTH207  Path.glob takes no absolute pattern
    for name in names:
        if Path(name).is_file():
            yield _local(name)
        elif name == path and Path(name).is_dir():
            raise SourceError(f"{pattern!r} is a folder; name its files, e.g. {pattern.rstrip('/')}/*", uri=pattern)


def _local(name: str) -> Found:
    found = Path(name).stat()
    return Found(str(Path(name).absolute()), found.st_size, _version(found))


def _version(found: os.stat_result) -> str:
    return f"{found.st_ino}-{found.st_mtime_ns}"


def _in_bucket(pattern: str, settings: S3Settings) -> Iterator[Found]:
    bucket, _, key = pattern.removeprefix(_S3).partition("/")
    magic = _MAGIC.search(key)
    prefix = key[: magic.start()] if magic else key
    matches = re.compile(_shape(key)).fullmatch
    pages = settings.client().get_paginator("list_objects_v2")
    with typed(f"{_S3}{bucket}", "list objects"):
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for one in page.get("Contents", ()):
                if matches(one["Key"]) and not one["Key"].endswith("/"):
                    yield Found(f"{_S3}{bucket}/{one['Key']}", one["Size"], one["ETag"])


def _shape(pattern: str) -> str:
    """A pattern as a regular expression. As in a folder, only ``**`` goes beyond a ``/``; ``**/`` may be nothing."""
    shape = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        if part in _WILD:
            shape += _WILD[part]
        elif part.startswith("[") and part.endswith("]") and len(part) > 2:
            inside = part[1:-1].replace("\\", "\\\\")
            shape += f"(?!/)[{'^' + inside[1:] if inside[0] == '!' else inside}]"
        else:
            shape += re.escape(part)
    return shape


def reader_of(found: Found, s3: S3Settings | None = None) -> Reader:
    """Open an object for reading.

    Raises:
        SourceError: it is gone, or is not what was found.
    """
    if found.uri.startswith(_S3):
        return _BucketReader(found, s3 or S3Settings.from_environment())
    return _FileReader(found)


class _FileReader:
    """See `Reader`."""

    def __init__(self, found: Found) -> None:
        self._found = found
        try:
            self._handle = os.open(found.uri, os.O_RDONLY)
        except FileNotFoundError as error:
            raise _gone(found) from error
        try:
            self._check()
        except BaseException:
            os.close(self._handle)
            raise

    def _check(self) -> None:
        now = os.fstat(self._handle)
        if (now.st_size, _version(now)) != (self._found.size, self._found.version):
            raise _changed(self._found)

    def read_at(self, start: int, end: int) -> bytes:
        """See `Reader`."""
        body = os.pread(self._handle, max(0, min(end, self._found.size) - start), start)
        if len(body) < min(end, self._found.size) - start:
            self._check()
        return body

    def close(self) -> None:
        """See `Reader`."""
        try:
            self._check()
        finally:
            os.close(self._handle)


class _BucketReader:
    """See `Reader`. Every request names the ETag, so the server compares."""

    def __init__(self, found: Found, settings: S3Settings) -> None:
        self._found, self._settings = found, settings
        bucket, _, key = found.uri.removeprefix(_S3).partition("/")
        self._at = {"Bucket": bucket, "Key": key, "IfMatch": found.version}
        self._client: Any = None

    def read_at(self, start: int, end: int) -> bytes:
        """See `Reader`."""
        end = min(end, self._found.size)
        if start >= end:
            return b""
        for attempt in range(1, self._settings.max_attempts + 1):
            with typed(self._found.uri, "read"):
                try:
                    return self._read(start, end)
                except broken_off():
                    if attempt == self._settings.max_attempts:
                        raise
            time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def _read(self, start: int, end: int) -> bytes:
        from botocore.exceptions import ClientError

        if self._client is None:
            self._client = self._settings.client()
        try:
            answer = self._client.get_object(**self._at, Range=f"bytes={start}-{end - 1}")
        except ClientError as error:
            if code_of(error)[1] == 412:
                raise _changed(self._found) from error
            if code_of(error)[1] == 404:
                raise _gone(self._found) from error
            raise
        with closing(answer["Body"]) as body:
            read: bytes = body.read()
        return read

    def close(self) -> None:
        """See `Reader`."""


def _gone(found: Found) -> SourceError:
    return SourceError(f"{found.uri} is gone since the job looked for it; run the job again", uri=found.uri)


def _changed(found: Found) -> SourceError:
    return SourceError(
        f"{found.uri} changed since the job looked for it; run the job again when nobody writes to it", uri=found.uri
    )
