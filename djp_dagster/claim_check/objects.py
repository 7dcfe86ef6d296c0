"""`ObjectStore`: what a payload store needs of a folder or a bucket; and `Content`, what is put there.

Objects are immutable but for two kinds: what one attempt writes again (`put` with ``replace``), and small documents
(`read_document`, `write_document`), which change by compare and set.
"""

import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from djp_dagster.errors import InvalidSettingError

MAX_KEY_BYTES = 900
_KEY = re.compile(r"(?!\.)[A-Za-z0-9_.\-=]+(/(?!\.)[A-Za-z0-9_.\-=]+)*")


def is_key(key: str) -> bool:
    """Whether the text is a relative path of plain segments: nothing outside a store can be named by one."""
    return len(key) <= MAX_KEY_BYTES and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """The key.

    Raises:
        InvalidSettingError: it is no relative path of plain segments.
    """
    if not is_key(key):
        raise InvalidSettingError(
            f"payload key {key[:120]!r} must be segments of A-Z a-z 0-9 _ . - = joined by '/', none starting with "
            f"a dot, of at most {MAX_KEY_BYTES} characters together",
            setting="key",
            value=key,
        )
    return key


class Content(Protocol):
    """Bytes of known size, to be read in any order, from several threads."""

    size: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from ``offset`` on, of which there must be as many.

        Raises:
            PayloadCorruptError: they are not those that were hashed.
        """

    def as_file(self, folder: Path) -> Path:
        """A file of ``folder`` with the content, owned by the caller, who moves or removes it."""


def memory(size: int) -> mmap.mmap:
    """Memory for a part of an object. Unlike what malloc gives, all of it is returned when nobody holds it any more."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object as the store lists it.

    Attributes:
        modified: when it was put there, in seconds since 1970 by the store's clock.
        version: changes with the bytes (an ETag, say).
    """

    key: str
    bytes: int
    modified: float
    version: str


class Document(msgspec.Struct, frozen=True):
    """A small mutable object, and the version to compare with when it is written again."""

    body: bytes
    version: str


class DocumentChanged(Exception):  # noqa: N818
    """Somebody else wrote the document meanwhile; never leaves `djp_dagster.claim_check`."""


class ObjectStore(Protocol):
    """Objects under keys in a folder or a bucket. Safe to share between threads.

    Every method may raise `PayloadStoreUnavailableError` (after retries) and `PayloadStoreRefusedError`.
    """

    @property
    def uri(self) -> str:
        """Of the store; an object's is this, a slash, and its key."""

    @property
    def spool_folder(self) -> Path | None:
        """Where temporary files are made, so that they can be moved into place; None: wherever the system has them."""

    def within(self, prefix: str) -> "ObjectStore":
        """The part of this store below a prefix."""

    def put(self, key: str, content: Content, *, media_type: str, replace: bool = False) -> bool:
        """Make the content the object of that key, durably, all of it or nothing.

        Returns:
            False if the key exists and is not to be replaced; nothing changed then.
        """

    def info(self, key: str) -> ObjectInfo | None:
        """What the store knows of an object; None if it is not there."""

    def open(self, key: str, *, expected_bytes: int | None = None) -> BinaryIO:
        """The object's bytes in order.

        Args:
            key: which.
            expected_bytes: refuse, before reading, an object of another size.

        Raises:
            PayloadMissingError, PayloadCorruptError: it is not there; it is of another size, or changed while read.
        """

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects whose keys begin with ``prefix``, in no certain order, page by page."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there are no error."""

    def read_document(self, key: str) -> Document | None:
        """A document; None if there is none."""

    def write_document(self, key: str, body: bytes, *, expected: str | None) -> str:
        """Write a document if its version is still ``expected`` (None: if there is none); its new version.

        Raises:
            DocumentChanged: it is not.
        """

    def replace_document(self, key: str, body: bytes) -> None:
        """Write a document whatever was there, in one step."""

    def abandoned_uploads(self, older_than_s: float, *, remove: bool) -> int:
        """How many uploads were begun that long ago and never finished; they are removed if told."""

    def presign(self, key: str, *, expires_s: int) -> str:
        """A URL by which whoever has it may read the object for that long, without further credentials.

        Raises:
            PayloadStoreRefusedError: the store has no such thing.
        """

    def is_away(self) -> bool:
        """Whether nothing at all is where the store lies: not mounted, maybe, so nothing is known to be missing."""

    def now(self) -> float:
        """The store's clock, in seconds since 1970: what `ObjectInfo.modified` is measured by."""
