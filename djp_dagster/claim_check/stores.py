"""`PayloadStore`: immutable bytes under a key; and `LocalPayloadStore`, a folder.

A payload is durable before anything refers to it, never changes afterwards, and is verified when read. Keys are
relative paths of plain segments; nothing outside the store can be named.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from djp_dagster.errors import InvalidSettingError, PayloadCorruptError, PayloadMissingError
from djp_dagster.streams.model import PayloadRef

_KEY = re.compile(r"(?!\.)[A-Za-z0-9_.\-=]+(/(?!\.)[A-Za-z0-9_.\-=]+)*")
_CHUNK_BYTES = 1 << 20


class PayloadStore(Protocol):
    """Immutable payloads under keys."""

    def create(self, key: str, media_type: str) -> "PayloadUpload":
        """Begin a payload; it exists once `PayloadUpload.finish` has returned, and not before."""

    def open(self, ref: PayloadRef) -> BinaryIO:
        """The payload's bytes, verified against size and hash by the time the end is read.

        Raises:
            PayloadMissingError, PayloadCorruptError: naming the key.
        """


class PayloadUpload(Protocol):
    """A payload being written, in bounded memory."""

    @property
    def file(self) -> BinaryIO:
        """Where to write."""

    def finish(self) -> PayloadRef:
        """Make it durable and visible under its key."""

    def abandon(self) -> None:
        """Forget what was written."""


@contextmanager
def uploading(store: PayloadStore, key: str, media_type: str) -> Iterator[PayloadUpload]:
    """An upload that is abandoned unless the block finishes it."""
    upload = store.create(key, media_type)
    try:
        yield upload
    finally:
        upload.abandon()


class LocalPayloadStore:
    """Payloads as files of a folder; on one host or a shared file system.

    A payload is written to a temporary file in the same folder, synced, and renamed to its key: readers see all of it
    or nothing, and a crash leaves a temporary file whose name begins with ``.upload-``.

    Args:
        folder: where the payloads lie; made when first needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path_of(self, key: str) -> Path:
        """The file of a key.

        Raises:
            InvalidSettingError: the key is no relative path of plain segments.
        """
        if len(key) > 900 or not _KEY.fullmatch(key):
            raise InvalidSettingError(
                f"payload key {key[:120]!r} must be segments of A-Z a-z 0-9 _ . - = joined by '/', none starting with "
                "a dot",
                setting="key",
                value=key,
            )
        return self.folder / key

    def create(self, key: str, media_type: str) -> "LocalUpload":
        """See `PayloadStore.create`."""
        return LocalUpload(self.path_of(key), key, media_type)

    def open(self, ref: PayloadRef) -> BinaryIO:
        """See `PayloadStore.open`. The whole file is hashed before the first byte is handed out."""
        path = self.path_of(ref.key)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise PayloadMissingError(
                f"payload {ref.key!r} is not in {str(self.folder)!r}: it was deleted, or the store is another one",
                key=ref.key,
            ) from error
        try:
            _verify(file, ref)
        except BaseException:
            file.close()
            raise
        return file


def _verify(file: BinaryIO, ref: PayloadRef) -> None:
    digest = hashlib.sha256()
    size = 0
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    if size != ref.bytes or digest.hexdigest() != ref.sha256:
        raise PayloadCorruptError(
            f"payload {ref.key!r} has {size} bytes of hash {digest.hexdigest()[:12]}..., its reference says "
            f"{ref.bytes} of {ref.sha256[:12]}...: it was changed or damaged; restore it from a backup",
            key=ref.key,
        )
    file.seek(0)


class LocalUpload:
    """A payload on its way into a `LocalPayloadStore`."""

    def __init__(self, path: Path, key: str, media_type: str) -> None:
        self._path, self._key, self._media_type = path, key, media_type
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".upload-", dir=path.parent)
        self._temporary: Path | None = Path(name)
        self._file = os.fdopen(handle, "w+b")

    @property
    def file(self) -> BinaryIO:
        """Where to write; seekable, because Parquet writers look back."""
        return self._file

    def finish(self) -> PayloadRef:
        """Make it durable and visible. A key that exists is replaced in one step: the same attempt wrote it."""
        assert self._temporary is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256") if hasattr(hashlib, "file_digest") else _digest(self._file)
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        self._temporary.replace(self._path)
        self._temporary = None
        _sync_folder(self._path.parent)
        return PayloadRef(self._key, size, digest.hexdigest(), self._media_type)

    def abandon(self) -> None:
        """Remove what was written, unless finished."""
        self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def _digest(file: BinaryIO) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
