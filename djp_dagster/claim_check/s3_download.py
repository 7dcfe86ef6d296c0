"""Fetching an object: its first part tells its size, further parts are fetched ahead, several at once.

All parts are of one version of the object, by its ETag. A part whose body breaks off is asked for again; boto3 itself
only repeats requests that were not answered.
"""

import io
import mmap
import random
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, BinaryIO

from djp_dagster.claim_check.objects import memory
from djp_dagster.claim_check.s3_settings import S3Settings, broken_off, code_of, typed
from djp_dagster.errors import PayloadCorruptError, PayloadMissingError, PayloadStoreRefusedError

_PAUSE_S = 0.1
_PIECE_BYTES = 256 << 10


def open_object(
    client: Any, at: dict[str, str], key: str, uri: str, settings: S3Settings, *, expected_bytes: int | None
) -> BinaryIO:
    """The object's bytes in order: in memory if it is one part, else with parts fetched ahead.

    Raises:
        PayloadMissingError, PayloadCorruptError, PayloadStoreUnavailableError: as `ObjectStore.open`.
    """
    fetch = _Fetch(client, at, key, uri, settings, expected_bytes)
    first = fetch.first(whole=expected_bytes is not None and expected_bytes <= settings.part_bytes)
    return io.BytesIO(first) if fetch.size == len(first) else _Parts(fetch, first)  # type: ignore[return-value]


def read_object(client: Any, at: dict[str, str], key: str, uri: str, settings: S3Settings) -> tuple[bytes, str]:
    """All bytes of a small object, and its version.

    Raises:
        PayloadMissingError, PayloadStoreUnavailableError: as `ObjectStore.open`.
    """
    fetch = _Fetch(client, at, key, uri, settings, None)
    return bytes(fetch.first(whole=True)), fetch.version


def _filled(answer: dict[str, Any], buffer: mmap.mmap | None) -> memoryview:
    """The body of an answer, in the buffer if there is one, piece by piece: read at once, it would be there twice."""
    size = answer["ContentLength"]
    view = memoryview(buffer if buffer is not None else memory(size) if size else b"")[:size]
    done = 0
    with closing(answer["Body"]) as body:  # on its own, `with` would go round botocore's checks
        # One byte too many is asked for at the end, so that botocore compares what it does at the end.
        while read := body.readinto(view[done : done + _PIECE_BYTES] if done < size else bytearray(1)):
            done += read
    return view


class _Fetch:
    """Requests for parts of one version of one object."""

    def __init__(
        self, client: Any, at: dict[str, str], key: str, uri: str, settings: S3Settings, expected_bytes: int | None
    ) -> None:
        self._client, self._at, self._key, self._uri, self.settings = client, at, key, uri, settings
        self._expected = expected_bytes
        self._version: dict[str, str] = {}
        self.size = -1

    @property
    def version(self) -> str:
        """The ETag; known after `first`."""
        return self._version["IfMatch"]

    def first(self, *, whole: bool) -> memoryview:
        """The first part; ``size`` is known then."""
        if whole:
            return self._repeated({})
        return self._repeated({"Range": f"bytes=0-{self.settings.part_bytes - 1}"})

    def part(self, start: int, buffer: mmap.mmap) -> memoryview:
        """The part that begins at ``start``, in the buffer."""
        end = min(start + self.settings.part_bytes, self.size)
        body = self._repeated({"Range": f"bytes={start}-{end - 1}"}, buffer)
        if len(body) != end - start:
            raise self._changed()
        return body

    def _repeated(self, wanted: dict[str, str], buffer: mmap.mmap | None = None) -> memoryview:
        from botocore.exceptions import FlexibleChecksumError

        for attempt in range(1, self.settings.max_attempts + 1):
            with typed(self._uri, f"read {self._key!r}"):
                # botocore repeats a request that is not answered, and not one whose answer breaks off.
                answer = self._answer(wanted)
                try:
                    return _filled(answer, buffer)
                except broken_off() as error:
                    if attempt == self.settings.max_attempts:
                        if isinstance(error, FlexibleChecksumError):
                            raise self._corrupt("is not what its checksum says") from error
                        raise
            time.sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    def _answer(self, wanted: dict[str, str]) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        try:
            answer: dict[str, Any] = self._client.get_object(**self._at, **self._version, **wanted)
        except ClientError as error:
            code, status = code_of(error)
            if code in ("NoSuchKey", "404"):
                raise PayloadMissingError(
                    f"payload {self._key!r} is not in {self._uri}: it was deleted, or the store is another one",
                    key=self._key,
                ) from error
            if status == 416 and not self._version:
                return self._answer({})  # an empty object has no first byte
            if status == 412:
                raise self._changed() from error
            raise
        if not self._version:
            self._version = {"IfMatch": answer["ETag"]}
            self.size = _total(answer)
            if self._expected not in (None, self.size):
                answer["Body"].close()  # unread: it may be huge
                raise self._corrupt(f"has {self.size} bytes, its reference says {self._expected}")
        if "Range" in wanted and answer["ContentLength"] > self.settings.part_bytes:
            answer["Body"].close()
            raise PayloadStoreRefusedError(
                f"{self._uri} sends all of {self._key!r} where a part is asked for; use a server that knows Range",
                uri=self._uri,
                code="Range",
            )
        return answer

    def _corrupt(self, what: str) -> PayloadCorruptError:
        return PayloadCorruptError(
            f"payload {self._key!r} {what}: it was changed or damaged; restore it from a backup", key=self._key
        )

    def _changed(self) -> PayloadCorruptError:
        return PayloadCorruptError(f"payload {self._key!r} in {self._uri} changed while it was read", key=self._key)


def _total(answer: dict[str, Any]) -> int:
    told = answer.get("ContentRange")
    if told is None:
        length: int = answer["ContentLength"]
        return length
    total = told.rpartition("/")[2]
    if not total.isdigit():
        raise PayloadStoreRefusedError(f"the server tells no size of an object: Content-Range {told!r}", code="Range")
    return int(total)


class _Parts(io.RawIOBase):
    """An object of several parts; as many are fetched ahead as there are threads."""

    def __init__(self, fetch: _Fetch, first: memoryview) -> None:
        self._fetch = fetch
        self._pool: ThreadPoolExecutor | None = None
        self._next = len(first)
        self._ahead: deque[Future[memoryview]] = deque()
        self._part = first
        self._spare: list[Any] = []  # buffers to be filled again

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes; 0 at the end."""
        self._look_ahead()
        if not self._part:
            if not self._ahead:
                return 0
            part = self._ahead[0].result()  # if it fails, so does whoever reads on
            self._ahead.popleft()
            self._spare.append(self._part.obj)
            self._part = part
            self._look_ahead()
        read = min(len(buffer), len(self._part))
        buffer[:read] = self._part[:read]
        self._part = self._part[read:]
        return read

    def _look_ahead(self) -> None:
        settings = self._fetch.settings
        while self._next < self._fetch.size and len(self._ahead) < settings.threads:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="djp-download")
            buffer = self._spare.pop() if self._spare else memory(settings.part_bytes)
            self._ahead.append(self._pool.submit(self._fetch.part, self._next, buffer))
            self._next += settings.part_bytes

    def close(self) -> None:
        """Stop fetching."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._ahead.clear()
        self._spare.clear()
        self._part = memoryview(b"")
        super().close()
