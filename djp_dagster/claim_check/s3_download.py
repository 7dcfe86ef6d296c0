"""Fetching an object: its first part tells its size, further parts are fetched ahead, several at once.

All parts are of one version of the object, by its ETag. A part whose body breaks off is asked for again; boto3 itself
only repeats requests that were not answered.
"""

import io
import random
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from djp_dagster.claim_check.s3_settings import S3Settings, broken_off, code_of, typed
from djp_dagster.errors import PayloadCorruptError, PayloadMissingError, PayloadStoreRefusedError

_PAUSE_S = 0.1


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


class _Fetch:
    """Requests for parts of one version of one object."""

    def __init__(
        self, client: Any, at: dict[str, str], key: str, uri: str, settings: S3Settings, expected_bytes: int | None
    ) -> None:
        self._client, self._at, self._key, self._uri, self.settings = client, at, key, uri, settings
        self._expected = expected_bytes
        self._version: dict[str, str] = {}
        self.size = -1

    def first(self, *, whole: bool) -> bytes:
        """The first part; ``size`` is known then."""
        if whole:
            return self._repeated({})
        return self._repeated({"Range": f"bytes=0-{self.settings.part_bytes - 1}"})

    def part(self, start: int) -> bytes:
        """The part that begins at ``start``."""
        end = min(start + self.settings.part_bytes, self.size)
        body = self._repeated({"Range": f"bytes={start}-{end - 1}"})
        if len(body) != end - start:
            raise self._changed()
        return body

    def _repeated(self, wanted: dict[str, str]) -> bytes:
        from botocore.exceptions import FlexibleChecksumError

        for attempt in range(1, self.settings.max_attempts + 1):
            with typed(self._uri, f"read {self._key!r}"):
                # botocore repeats a request that is not answered, and not one whose answer breaks off.
                answer = self._answer(wanted)
                try:
                    with answer["Body"] as body:
                        content: bytes = body.read()
                except broken_off() as error:
                    if attempt == self.settings.max_attempts:
                        if isinstance(error, FlexibleChecksumError):
                            raise self._corrupt("is not what its checksum says") from error
                        raise
                else:
                    return content
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

    def __init__(self, fetch: _Fetch, first: bytes) -> None:
        self._fetch = fetch
        self._pool: ThreadPoolExecutor | None = None
        self._next = len(first)
        self._ahead: deque[Future[bytes]] = deque()
        self._part = memoryview(first)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes; 0 at the end."""
        self._look_ahead()
        if not self._part:
            if not self._ahead:
                return 0
            self._part = memoryview(self._ahead[0].result())  # if it fails, so does whoever reads on
            self._ahead.popleft()
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
            self._ahead.append(self._pool.submit(self._fetch.part, self._next))
            self._next += settings.part_bytes

    def close(self) -> None:
        """Stop fetching."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._ahead.clear()
        self._part = memoryview(b"")
        super().close()
