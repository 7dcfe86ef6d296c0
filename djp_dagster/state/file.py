"""`StateFile`: keys and values of one task in a SQLite file, and of which changelog, up to where, they are.

Each value is stored with a checksum of itself and its key: SQLite notices a damaged structure, this a damaged content.
"""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from djp_dagster.errors import StateMismatchError, StreamBusyError

Change = tuple[bytes, bytes | None]
"""A key and its new value, encoded; None deletes it."""
_SCHEMA_VERSION = 2
_CHECKSUM_BYTES = 4
_KEYS_PER_QUERY = 500
_ROWS_PER_PAGE = 1000
_PASSING = ("locked", "busy", "full", "disk I/O", "unable to open", "readonly")
"""What SQLite says of troubles that are not the file's own fault."""


class StateFile:
    """The file; it is opened, and made with its folder when missing.

    Args:
        path: where it lies.
        lineage: the identity of the changelog it continues.
        label: what it belongs to, for errors.

    Raises:
        StateMismatchError: it continues another changelog, has another format, or is damaged.
        StreamBusyError: it cannot be opened for now.
    """

    def __init__(self, path: Path, lineage: str, label: str) -> None:
        self.path, self._lineage, self._label = path, lineage, label
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._translated():
            self._db = self._open()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Damage is a mismatch, cured by restoring; anything else about the file may pass."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if not any(word in text for word in _PASSING):
                raise self.mismatch(text) from error
            raise StreamBusyError(f"local state {str(self.path)!r}: {text}; try again", path=str(self.path)) from error

    def mismatch(self, why: str) -> StateMismatchError:
        """The error that says that this file does not continue its changelog."""
        return StateMismatchError(
            f"local state {str(self.path)!r} does not continue {self._label}: {why}", path=str(self.path)
        )

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            # Power loss may cost the last batches, never consistency: the changelog has them.
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA cache_size=-16384")
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
            db.execute(
                "CREATE TABLE IF NOT EXISTS lineage (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER, "
                "identity TEXT, changelog_offset INTEGER, as_of TEXT)"
            )
            db.execute("INSERT OR IGNORE INTO lineage VALUES (1, ?, ?, 0, NULL)", (_SCHEMA_VERSION, self._lineage))
            db.execute("COMMIT")
            version, identity = db.execute("SELECT version, identity FROM lineage").fetchone()
            if (version, identity) != (_SCHEMA_VERSION, self._lineage):
                raise self.mismatch(f"it is of stream {identity} (format {version})")  # noqa: TRY301
        except BaseException:
            db.close()
            raise
        return db

    @property
    def offset(self) -> int:
        """The changelog offset up to which changes are applied."""
        return self.standing()[0]

    def standing(self) -> tuple[int, str | None]:
        """The changelog offset, and what was noted with it by `note`."""
        with self._translated():
            offset, as_of = self._db.execute("SELECT changelog_offset, as_of FROM lineage").fetchone()
        return int(offset), as_of

    def note(self, offset: int, text: str) -> bool:
        """Remember ``text`` for as long as the file is at ``offset``; whether it was."""
        with self._translated():
            noted = self._db.execute("UPDATE lineage SET as_of = ? WHERE changelog_offset = ?", (text, offset))
        return noted.rowcount == 1

    def apply(self, changes: Iterable[Change], expected: int, reached: int) -> None:
        """Apply changes at changelog offset ``expected`` and remember ``reached``, or nothing.

        Raises:
            StateMismatchError: the file is elsewhere, because somebody else has applied something.
        """
        updates = dict(changes)
        new = [(key, _sealed(key, value)) for key, value in updates.items() if value is not None]
        gone = [(key,) for key, value in updates.items() if value is None]
        with self._translated(), self._transaction():
            moved = self._db.execute(
                "UPDATE lineage SET changelog_offset = ?, as_of = NULL WHERE changelog_offset = ? AND identity = ?",
                (reached, expected, self._lineage),
            ).rowcount
            if moved != 1:
                raise self.mismatch(f"changes from offset {expected} do not follow what it holds")
            self._db.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?)", new)
            self._db.executemany("DELETE FROM kv WHERE key = ?", gone)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Within the block every look sees the file as of one moment, whoever changes it."""
        with self._translated():
            self._db.execute("BEGIN")
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def get(self, key: bytes) -> bytes | None:
        """The value of a key.

        Raises:
            StateMismatchError: the file is damaged.
        """
        with self._translated():
            row = self._db.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._unsealed(key, row[0])

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that exist.

        Raises:
            StateMismatchError: the file is damaged.
        """
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            with self._translated():
                rows = self._db.execute(f"SELECT key, value FROM kv WHERE key IN ({marks})", some).fetchall()  # noqa: S608
            for key, sealed in rows:
                if crc32(key, crc32(sealed[:-_CHECKSUM_BYTES])).to_bytes(4, "big") != sealed[-_CHECKSUM_BYTES:]:
                    raise self._damaged(key)
                found[key] = sealed[:-_CHECKSUM_BYTES]
        return found

    def items(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Keys ``low <= key < high`` with their values, in order, a page at a time.

        Raises:
            StateMismatchError: the file is damaged.
        """
        below, bounds = ("", ()) if high is None else (" AND key < ?", (high,))
        look = f"SELECT key, value FROM kv WHERE key %s ?{below} ORDER BY key LIMIT {_ROWS_PER_PAGE}"  # noqa: S608
        first = True
        while True:
            with self._translated():
                page = self._db.execute(look % (">=" if first else ">"), (low, *bounds)).fetchall()
            for key, sealed in page:
                yield key, self._unsealed(key, sealed)
            if len(page) < _ROWS_PER_PAGE:
                return
            low, first = page[-1][0], False

    def __len__(self) -> int:
        """How many keys there are."""
        with self._translated():
            return int(self._db.execute("SELECT COUNT(*) FROM kv").fetchone()[0])

    def copy_to(self, path: Path) -> None:
        """Write a compact copy of what is there now, as one file."""
        with self._translated():
            self._db.execute("VACUUM INTO ?", (str(path),))

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _unsealed(self, key: bytes, sealed: bytes) -> bytes:
        value = sealed[:-_CHECKSUM_BYTES]
        if crc32(key, crc32(value)).to_bytes(_CHECKSUM_BYTES, "big") != sealed[-_CHECKSUM_BYTES:]:
            raise self._damaged(key)
        return value

    def _damaged(self, key: bytes) -> StateMismatchError:
        return self.mismatch(f"the value of key {key[:80]!r} does not match its checksum")


def _sealed(key: bytes, value: bytes) -> bytes:
    return value + crc32(key, crc32(value)).to_bytes(_CHECKSUM_BYTES, "big")


def remove(path: Path) -> None:
    """Remove a state file and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
