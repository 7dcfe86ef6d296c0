"""`PayloadStore`: payloads of any size by their hash, in a folder or on S3; streamed, verified, confined.

Where payloads lie in it is said in `djp_dagster.claim_check.keys`.

How a payload is stored
    1. It is counted and hashed while it is written to memory or, above 8 MiB, to a temporary file.
    2. It is created under its key, atomically, unless the key exists. *A crash before leaves a temporary file or an
       unfinished upload, which collection removes; a crash after it leaves a payload that nobody refers to.*
    3. If the key existed, its size is compared (a damaged object is replaced). It is taken off the list of what
       collection is about to delete; if it is being deleted already, the payload gets a key of its own.
    4. Only then is the claim handed out. Whoever gets it makes it visible within the grace period of collection.
"""

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from djp_dagster.claim_check.claims import BYTES, Claim, PayloadRef
from djp_dagster.claim_check.condemned import Condemned
from djp_dagster.claim_check.keys import LONGEST_KEY, another_key, content_key, day_after, hash_in
from djp_dagster.claim_check.objects import Content, ObjectInfo, ObjectStore, check_key, is_key
from djp_dagster.claim_check.reading import verified, verified_in_place
from djp_dagster.claim_check.spool import MEMORY_BYTES, FileContent, is_whole_large_file
from djp_dagster.claim_check.writing import PayloadUpload, PayloadWriter, Stored, Writing, may_compress
from djp_dagster.errors import (
    InvalidClaimError,
    InvalidSettingError,
    PayloadCorruptError,
    PayloadExpiredError,
    PayloadForbiddenError,
    PayloadMissingError,
    PayloadStoreUnavailableError,
    PayloadTooLargeError,
)
from djp_dagster.units import Duration, Size, parse_bytes, parse_seconds

_log = logging.getLogger(__name__)
_COPY_BYTES = 1 << 20
_MAX_PAYLOAD_BYTES = 5 << 40
_MAX_READ_BYTES = 256 << 20
Source = bytes | bytearray | memoryview | Path | BinaryIO


class PayloadStore:
    """Payloads by their hash, and by path. Safe to share between threads; make it with `open_payload_store`.

    Args:
        objects: the folder or bucket.
        room: who keeps references to what is stored through this; see `djp_dagster.claim_check.collection`.
        max_payload_bytes: no payload may be larger, nor be expanded to more.
        max_read_bytes: what is larger is not read into memory at once.
        former_uris: URIs this store had before it moved; claims that name them are still resolved.

    Raises:
        InvalidClaimError: the URI of the store is too long for claims.

    Example:
        >>> import tempfile
        >>> from djp_dagster import open_payload_store
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = open_payload_store(folder)
        ...     claim = store.put(b"a heavy payload", media_type="text/plain").claim
        ...     store.read(claim)
        b'a heavy payload'
    """

    def __init__(
        self,
        objects: ObjectStore,
        *,
        room: str | None = None,
        max_payload_bytes: Size = _MAX_PAYLOAD_BYTES,
        max_read_bytes: Size = _MAX_READ_BYTES,
        former_uris: tuple[str, ...] = (),
    ) -> None:
        # The longest key: claims of this store stay below their limit, or are never made.
        Claim(uri=f"{objects.uri}/{LONGEST_KEY}", sha256="0" * 64)
        self.objects = objects
        self.max_payload_bytes = parse_bytes(max_payload_bytes, name="max_payload_bytes")
        self.max_read_bytes = parse_bytes(max_read_bytes, name="max_read_bytes")
        self._former_uris = tuple(uri.rstrip("/") for uri in former_uris)
        self._condemned = Condemned(objects)
        self._room, self._announced = room, room is None

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process."""
        again = partial(
            PayloadStore,
            room=self._room,
            max_payload_bytes=self.max_payload_bytes,
            max_read_bytes=self.max_read_bytes,
            former_uris=self._former_uris,
        )
        return again, (self.objects,)

    @property
    def uri(self) -> str:
        """Of the store; only claims whose URI begins with it are resolved."""
        return self.objects.uri

    def within(self, prefix: str, *, room: str | None = None) -> "PayloadStore":
        """The part of this store below a prefix, as a store of its own, with the same limits."""
        return PayloadStore(
            self.objects.within(prefix),
            room=room,
            max_payload_bytes=self.max_payload_bytes,
            max_read_bytes=self.max_read_bytes,
            former_uris=tuple(f"{uri}/{prefix}" for uri in self._former_uris),
        )

    # Storing

    def put(
        self,
        source: Source,
        *,
        media_type: str = BYTES,
        compress: bool | None = None,
        expires_in: Duration | None = None,
    ) -> Stored:
        """Store a payload under its hash, in bounded memory.

        Args:
            source: bytes, the path of a file, or a file open for reading, which is read from where it stands.
            media_type: what it is.
            compress: try zstd, and keep to it where it saves a fifth; unless given, for text of all kinds.
            expires_in: how long it is needed at least; from the day after that on, collection may remove it.

        Raises:
            InvalidSettingError: the source is nothing of these.
            PayloadTooLargeError: above ``max_payload_bytes``.
            PayloadCorruptError: the file changed meanwhile.
            PayloadStoreUnavailableError, PayloadStoreRefusedError: nothing was stored.
        """
        started = time.monotonic()
        wants = may_compress(media_type) if compress is None else compress
        if isinstance(source, Path):
            with source.open("rb") as file:
                return self._put_file(file, media_type, wants, expires_in, started)
        if isinstance(source, bytes | bytearray | memoryview):
            with self.writer(media_type=media_type, compress=wants, expires_in=expires_in) as writing:
                writing.file.write(source)
            return writing.stored
        given: object = source
        if isinstance(given, io.TextIOBase) or not hasattr(given, "read"):
            raise InvalidSettingError(
                f"a payload is bytes, a pathlib.Path, or a file opened with 'rb', not {type(given).__name__}",
                setting="source",
                value=type(given).__name__,
            )
        return self._put_file(source, media_type, wants, expires_in, started)

    def _put_file(
        self, file: BinaryIO, media_type: str, compress: bool, expires_in: Duration | None, started: float
    ) -> Stored:
        if compress or not is_whole_large_file(file):
            with self.writer(media_type=media_type, compress=compress, expires_in=expires_in) as writing:
                shutil.copyfileobj(file, writing.file, _COPY_BYTES)
            return writing.stored
        size = os.fstat(file.fileno()).st_size
        if size > self.max_payload_bytes:
            raise PayloadTooLargeError(
                f"a payload of {size} bytes: the store takes no more than {self.max_payload_bytes}; raise its "
                "max_payload_bytes",
                bytes=size,
                limit=self.max_payload_bytes,
            )
        content = FileContent(file)
        return self._store(content, content.size, content.sha256, media_type, None, expires_in, started)

    @contextmanager
    def writer(
        self, *, media_type: str = BYTES, compress: bool | None = None, expires_in: Duration | None = None
    ) -> Iterator["Writing"]:
        """A file to write a payload to; it is stored when the block ends, and forgotten if that raises.

        Example:
            >>> import tempfile
            >>> from djp_dagster import open_payload_store
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     store = open_payload_store(folder)
            ...     with store.writer(media_type="text/csv") as writing:
            ...         _ = writing.file.write(b"a,b")
            ...     writing.stored.claim.size
            3
        """
        started = time.monotonic()
        wants = may_compress(media_type) if compress is None else compress
        with contextlib.closing(self._new_file(compress=wants)) as file:
            writing = Writing(file)
            yield writing
            file.finished()
            writing.finish(
                self._store(file.spool, file.size, file.sha256, media_type, file.encoding, expires_in, started)
            )

    def _store(
        self,
        content: Content,
        size: int,
        sha256: str,
        media_type: str,
        encoding: str | None,
        expires_in: Duration | None,
        started: float,
    ) -> Stored:
        self.announce()
        expires = None if expires_in is None else day_after(parse_seconds(expires_in, name="expires_in"))
        key = content_key(sha256, encoding, expires)
        # What was read of the list before the object was made says what may still happen to it.
        clear = self._condemned.is_clear(key)
        created = self._create(key, content, media_type)
        ref = PayloadRef(key, size, sha256, media_type, encoding)
        if not (created and clear and self._condemned.is_clear(key, ask=False)):
            if not created:
                self._repair(ref, content)
            saved = self._condemned.save(key)
            if not saved or self.objects.info(key) is None:
                key = key if saved else another_key(key)
                created = self._create(key, content, media_type)
                # Not created and there: another writer has found the same, and was quicker.
                if not created and self.objects.info(key) is None:
                    raise PayloadStoreUnavailableError(
                        f"{self.uri} says that {key!r} is not there, and that it is; try again", key=key
                    )
        ref = msgspec.structs.replace(ref, key=key)
        claim = self.claim(ref, expires=expires)
        return Stored(claim, ref, not created, content.size, time.monotonic() - started)

    def _create(self, key: str, content: Content, media_type: str) -> bool:
        # Large content: ask first, so that what is there already is not sent only to be refused at the end.
        if content.size > MEMORY_BYTES and self.objects.info(key) is not None:
            return False
        return self.objects.put(key, content, media_type=media_type)

    def _repair(self, ref: PayloadRef, content: Content) -> None:
        found = self.objects.info(ref.key)
        if found is None or found.bytes == content.size:
            return
        if ref.encoding is not None:
            # Another release may compress otherwise, and be right.
            with contextlib.suppress(PayloadCorruptError):
                self.verify(ref)
                return
        _log.warning("payload %s has %d bytes instead of %d: it is replaced", ref.key, found.bytes, content.size)
        self.objects.put(ref.key, content, media_type=ref.media_type, replace=True)

    def announce(self) -> None:
        """Write down, once, who keeps references to payloads of this store; collection refuses without asking them."""
        if not self._announced:
            assert self._room is not None
            key = f"rooms/{check_key(self._room)}"
            if self.objects.read_document(key) is None:
                self.objects.replace_document(key, b"")
            self._announced = True

    def rooms(self) -> set[str]:
        """Who keeps references to payloads of this store."""
        return {found.key.removeprefix("rooms/") for found in self.objects.list("rooms/")}

    def create(self, key: str, media_type: str) -> "PayloadUpload":
        """Begin a payload under a path of its own; it exists once `PayloadUpload.finish` has returned."""
        return PayloadUpload(self._replace, check_key(key), media_type, self._new_file(compress=False))

    def _replace(self, key: str, content: Content, media_type: str) -> None:
        self.announce()
        self.objects.put(key, content, media_type=media_type, replace=True)

    def _new_file(self, *, compress: bool) -> PayloadWriter:
        return PayloadWriter(self.objects.spool_folder, compress=compress, max_bytes=self.max_payload_bytes)

    # Reading

    def open(self, payload: Claim | PayloadRef) -> BinaryIO:
        """The payload's bytes in order, in bounded memory, verified against size and hash.

        Up to 8 MiB, and in folders, they are verified before the first byte is handed out, and can be sought in; beyond
        that they are verified by the time the end is read.

        Raises:
            PayloadForbiddenError, PayloadExpiredError: the claim is not for this store, or its time is up.
            PayloadMissingError, PayloadCorruptError: naming the key; the latter also while reading.
            PayloadStoreUnavailableError: also while reading.
        """
        ref = self.resolve(payload)
        expected = ref.bytes if ref.encoding is None and ref.bytes >= 0 else None
        raw = self._opened(ref, expected)
        if ref.encoding is None and raw.seekable():
            return verified_in_place(raw, ref)
        file = verified(raw, ref, max_bytes=self.max_payload_bytes)
        if not 0 <= ref.bytes <= MEMORY_BYTES:
            return file
        with file:
            return BytesIO(file.read())

    def _opened(self, ref: PayloadRef, expected_bytes: int | None) -> BinaryIO:
        try:
            return self.objects.open(ref.key, expected_bytes=expected_bytes)
        except PayloadMissingError as error:
            if not self.objects.is_away():
                raise
            raise PayloadStoreUnavailableError(
                f"the payload store {self.uri} is not there, or empty: mount it, or restore it", key=ref.key
            ) from error

    def read(self, payload: Claim | PayloadRef) -> bytes:
        """The payload, verified.

        Raises:
            PayloadTooLargeError: above ``max_read_bytes``; `open` it instead.
            PayloadError: as `open`.
        """
        ref = self.resolve(payload)
        limit = self.max_read_bytes
        if ref.bytes > limit:
            raise self._too_large_to_read(ref)
        with self.open(ref) as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise self._too_large_to_read(ref)
        return content

    def _too_large_to_read(self, ref: PayloadRef) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"payload {ref.key!r} has {ref.bytes if ref.bytes >= 0 else 'too many'} bytes, at most "
            f"{self.max_read_bytes} are read into memory; open it as a stream, or raise max_read_bytes",
            key=ref.key,
            limit=self.max_read_bytes,
        )

    @contextmanager
    def fetch(self, payload: Claim | PayloadRef) -> Iterator[BinaryIO]:
        """The payload as a seekable file, verified as a whole before; on disk if it is larger than 8 MiB."""
        ref = self.resolve(payload)
        with self.open(ref) as file:
            if file.seekable():
                yield file
                return
            if (folder := self.objects.spool_folder) is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as local:
                shutil.copyfileobj(file, local, _COPY_BYTES)
                local.seek(0)
                yield local

    def download(self, payload: Claim | PayloadRef, path: Path) -> None:
        """Write the payload to a file, which appears whole and verified, or not at all."""
        with self.open(payload) as file:
            handle, name = tempfile.mkstemp(prefix=".download-", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as local:
                    shutil.copyfileobj(file, local, _COPY_BYTES)
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)

    def verify(self, payload: Claim | PayloadRef) -> int:
        """Read the payload and compare it with its reference; its size.

        Raises:
            PayloadError: as `open`, and if it does not match.
        """
        size = 0
        with self.open(payload) as file:
            while chunk := file.read(_COPY_BYTES):
                size += len(chunk)
        return size

    def info(self, payload: Claim | PayloadRef) -> ObjectInfo:
        """What the store knows of the payload: stored bytes, when it was stored.

        Raises:
            PayloadMissingError: it is not there.
        """
        ref = self.resolve(payload)
        found = self.objects.info(ref.key)
        if found is None:
            raise PayloadMissingError(
                f"payload {ref.key!r} is not in {self.uri}: it was deleted, or the store is another one", key=ref.key
            )
        return found

    def presign(self, payload: Claim | PayloadRef, *, expires_in: Duration = "15min") -> str:
        """A URL by which whoever has it may read the payload as stored for that long, without further credentials.

        Raises:
            PayloadStoreRefusedError: a folder has no such URLs.
        """
        seconds = parse_seconds(expires_in, name="expires_in")
        return self.objects.presign(self.resolve(payload).key, expires_s=max(1, round(seconds)))

    # Claims

    def claim(self, ref: PayloadRef, *, expires: datetime | None = None) -> Claim:
        """The claim of one of this store's payloads."""
        return Claim(
            uri=f"{self.uri}/{ref.key}",
            size=ref.bytes if ref.bytes >= 0 else None,
            sha256=ref.sha256 or None,
            media_type=ref.media_type,
            encoding=ref.encoding,
            expires_at=None if expires is None else round(expires.timestamp()),
        )

    def keep(self, claim: Claim) -> Claim:
        """The claim, to be made visible in another place; of a copy, if collection is about to delete its payload.

        Whoever does that is a writer: what nothing else refers to by then must not be deleted under it.

        Raises:
            PayloadError: as `open`.
        """
        self.info(claim)  # what is not there cannot be kept, whatever is on the list
        ref = self.resolve(claim)
        if self._condemned.save(ref.key) and self.objects.info(ref.key) is not None:
            return claim
        with self.open(claim) as file:
            return self.put(file, media_type=claim.media_type, compress=ref.encoding is not None).claim

    def holds(self, claim: Claim) -> bool:
        """Whether the claim names a payload of this store."""
        return self._key_of(claim) is not None

    def resolve(self, payload: Claim | PayloadRef) -> PayloadRef:
        """The payload a claim names, which this store must hold; a reference is only checked.

        Raises:
            PayloadForbiddenError: the claim names anything but a payload of this store.
            PayloadExpiredError: its time is up.
        """
        if isinstance(payload, PayloadRef):
            check_key(payload.key)
            return payload
        if not isinstance(payload, Claim):
            raise InvalidClaimError(f"a claim or a reference is needed, not {type(payload).__name__}", part=None)
        key = self._key_of(payload)
        if key is None:
            raise PayloadForbiddenError(
                f"claim {payload.uri[:200]!r} is not for the payload store {self.uri}; open the store it names, or "
                "name its URI in former_uris if the store has moved",
                uri=payload.uri,
            )
        if payload.expires_at is not None and payload.expires_at <= time.time():
            raise PayloadExpiredError(
                f"claim {payload.uri[:200]!r} expired on {payload.expires:%Y-%m-%d %H:%M} UTC; store payloads that "
                "are needed for longer without expires_in",
                uri=payload.uri,
            )
        if payload.size is not None and payload.size > self.max_payload_bytes:
            raise PayloadTooLargeError(
                f"claim {payload.uri[:200]!r} announces {payload.size} bytes, this store reads no more than "
                f"{self.max_payload_bytes}; raise its max_payload_bytes",
                uri=payload.uri,
                limit=self.max_payload_bytes,
            )
        size = payload.size if payload.size is not None else -1
        return PayloadRef(key, size, payload.sha256 or hash_in(key), payload.media_type, payload.encoding)

    def _key_of(self, claim: Claim) -> str | None:
        for uri in (self.uri, *self._former_uris):
            if claim.uri.startswith(f"{uri}/"):
                key = claim.uri[len(uri) + 1 :]
                return key if is_key(key) else None
        return None
