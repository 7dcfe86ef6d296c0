"""`LocalObjects`: a folder as an `ObjectStore`, on one host or on a shared file system.

An object is written to a temporary file whose name begins with ``.upload-``, synced, and linked to its key: readers see
all of it or nothing, of several writers one wins, and a crash leaves the temporary file.
"""

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from djp_dagster.claim_check.objects import Content, Document, DocumentChanged, ObjectInfo, check_key
from djp_dagster.claim_check.spool import TEMPORARY
from djp_dagster.errors import (
    PayloadCorruptError,
    PayloadMissingError,
    PayloadStoreRefusedError,
    PayloadStoreUnavailableError,
)

_LOCK = ".lock"
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
# No file of that name: names that no file can have, and folders, are what another kind of store has not, either.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK}


class LocalObjects:
    """See `ObjectStore`.

    Args:
        folder: where the objects lie; made when first needed.
        root: where temporary files and the lock lie; the folder unless it is a part of another.
    """

    def __init__(self, folder: str | Path, *, root: Path | None = None) -> None:
        self.folder = Path(folder)
        self._root = root if root is not None else self.folder

    @property
    def spool_folder(self) -> Path:
        """See `ObjectStore.spool_folder`."""
        return self._root

    @property
    def uri(self) -> str:
        """See `ObjectStore.uri`."""
        return self.folder.absolute().as_uri()

    def within(self, prefix: str) -> "LocalObjects":
        """See `ObjectStore.within`."""
        return LocalObjects(self.folder / check_key(prefix), root=self._root)

    def path_of(self, key: str) -> Path:
        """The file of a key.

        Raises:
            InvalidSettingError: the key is no relative path of plain segments.
        """
        return self.folder / check_key(key)

    def put(self, key: str, content: Content, *, media_type: str, replace: bool = False) -> bool:
        """See `ObjectStore.put`."""
        path = self.path_of(key)
        with _typed(key):
            created = (replace or not path.exists()) and self._put(path, content, replace)
            # Also what somebody else has put there a moment ago, perhaps without having come that far.
            _sync_folder(path.parent)
        return created

    def _put(self, path: Path, content: Content, replace: bool) -> bool:
        _make_folder(path.parent)
        temporary = content.as_file(self._root)
        try:
            os.utime(temporary)  # it may have been written long ago
            if not replace:
                return self._link(temporary, path)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _link(self, temporary: Path, path: Path) -> bool:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with self._locked():  # a file system without links
                if path.exists():
                    return False
                temporary.replace(path)
        return True

    def info(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.info`."""
        with _typed(key):
            try:
                found = self.path_of(key).stat()
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise
        if not stat.S_ISREG(found.st_mode):
            return None
        return ObjectInfo(key, found.st_size, found.st_mtime, _version(found))

    def open(self, key: str, *, expected_bytes: int | None = None) -> BinaryIO:
        """See `ObjectStore.open`."""
        path = self.path_of(key)
        with _typed(key):
            try:
                file = path.open("rb")
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                raise PayloadMissingError(
                    f"payload {key!r} is not in {str(self.folder)!r}: it was deleted, or the store is another one",
                    key=key,
                ) from error
        size = os.fstat(file.fileno()).st_size
        if expected_bytes is not None and size != expected_bytes:
            file.close()
            raise PayloadCorruptError(
                f"payload {key!r} has {size} bytes, its reference says {expected_bytes}: it was changed or damaged; "
                "restore it from a backup",
                key=key,
            )
        return file

    def is_away(self) -> bool:
        """See `ObjectStore.is_away`."""
        return not self._root.is_dir() or all(found.name.startswith(".") for found in self._root.iterdir())

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`."""
        with _typed(prefix):
            yield from self._list(prefix)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        top = self.folder / prefix.rpartition("/")[0]
        for folder, names, files in os.walk(top, onerror=_unless_removed):
            names[:] = [name for name in names if not name.startswith(".")]
            for name in files:
                path = Path(folder) / name
                key = path.relative_to(self.folder).as_posix()
                if not name.startswith(".") and key.startswith(prefix):
                    try:
                        found = path.stat()
                    except FileNotFoundError:
                        continue  # removed meanwhile
                    yield ObjectInfo(key, found.st_size, found.st_mtime, _version(found))

    def delete(self, keys: Sequence[str]) -> None:
        """See `ObjectStore.delete`. Folders that become empty stay: somebody may be writing into them."""
        for key in keys:
            with _typed(key):
                try:
                    self.path_of(key).unlink()
                except OSError as error:
                    if error.errno not in _ABSENT:
                        raise

    def read_document(self, key: str) -> Document | None:
        """See `ObjectStore.read_document`."""
        with _typed(key):
            try:
                body = self.path_of(key).read_bytes()
            except OSError as error:
                if error.errno in _ABSENT:
                    return None
                raise
        return Document(body, hashlib.sha256(body).hexdigest())

    def write_document(self, key: str, body: bytes, *, expected: str | None) -> str:
        """See `ObjectStore.write_document`."""
        with _typed(key), self._locked():
            there = self.read_document(key)
            if (there.version if there else None) != expected:
                raise DocumentChanged(key)
            self.replace_document(key, body)
        return hashlib.sha256(body).hexdigest()

    def replace_document(self, key: str, body: bytes) -> None:
        """See `ObjectStore.replace_document`."""
        path = self.path_of(key)
        with _typed(key):
            _make_folder(path.parent)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=self._root)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
            _sync_folder(path.parent)

    def abandoned_uploads(self, older_than_s: float, *, remove: bool) -> int:
        """See `ObjectStore.abandoned_uploads`."""
        oldest, count = self.now() - older_than_s, 0
        with _typed(TEMPORARY):
            for path in self._root.glob(f"{TEMPORARY}*"):
                try:
                    if path.stat().st_mtime < oldest:
                        count += 1
                        if remove:
                            path.unlink()
                except FileNotFoundError:
                    continue  # finished meanwhile
        return count

    def presign(self, key: str, *, expires_s: int) -> str:
        """See `ObjectStore.presign`."""
        raise PayloadStoreRefusedError(
            f"payload {key!r} lies in folder {str(self.folder)!r}, and a folder has no presigned URLs; use a payload "
            "store on S3, or hand over a copy: djp claims get",
            key=key,
        )

    def now(self) -> float:
        """See `ObjectStore.now`: that of the file system, which may be another host's."""
        if not self._root.is_dir():
            return time.time()
        with _typed("."), tempfile.TemporaryFile(prefix=TEMPORARY, dir=self._root) as file:
            return os.fstat(file.fileno()).st_mtime

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / _LOCK).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file unlocks it
            yield


@contextmanager
def _typed(key: str) -> Iterator[None]:
    """Errors of the file system as errors of this package."""
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSED:
            raise PayloadStoreRefusedError(
                f"the payload store refuses {key!r}: {error}; give this user the right to read and write there",
                key=key,
            ) from error
        raise PayloadStoreUnavailableError(
            f"the payload store failed at {key!r}: {error}; make room, or see to the file system", key=key
        ) from error


def _unless_removed(error: OSError) -> None:
    # os.walk passes over what it cannot read; whoever lists objects would take them for deleted.
    if error.errno not in _ABSENT:
        raise error


def _version(found: os.stat_result) -> str:
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
