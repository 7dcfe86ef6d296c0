"""`StateFile`: keys and values of one task in a SQLite file, and of which changelog, up to where, they are.

It is a cache, and disks rot, so that what it says must be true or noticed. Each value is stored with a checksum of
itself and its key. That a key is not there, or that there are no more in a range, is believed only if an index of the
keys, which is another tree of pages, says so as well. And a file that was closed in order has a checksum of all of it
beside it. Anything else is `StateMismatchError`, cured by restoring it.
"""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from djp_dagster.errors import StateMismatchError, StreamBusyError

Change = tuple[bytes, bytes | None]
"""A key and its new value, encoded; None deletes it."""
_SCHEMA_VERSION = 2
_KEYS_PER_QUERY = 500
_ROWS_PER_PAGE = 1000
_PASSING = ("locked", "busy", "full", "disk I/O", "unable to open", "readonly", "closed database")
"""What SQLite says of troubles that are not the file's own fault."""
_SCHEMA = (
    "CREATE TABLE kv (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
    "CREATE INDEX kv_keys ON kv (key)",
    """CREATE TABLE lineage (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER, identity TEXT,
    changelog_offset INTEGER, as_of TEXT, checksum INTEGER)""",
)


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
        self.path, self.lineage, self._label = path, lineage, label
        # One connection, and a transaction is its: handlers that run concurrently take turns.
        self._turn = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._translated():
            self._db = self._open()
        self._inode = path.stat().st_ino

    def is_in_place(self) -> bool:
        """Whether it is still what lies under its path; another process may have put another one there."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """One thread at a time. Damage is a mismatch, cured by restoring; anything else about the file may pass."""
        with self._turn, self._told():
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: damaged text inside the message
            text = str(error)
            # A damaged header may claim to be of a format that can only be read.
            claims = "readonly" in text and os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)
            if claims or not any(word in text for word in _PASSING):
                raise self.mismatch(text) from error
            raise StreamBusyError(f"local state {str(self.path)!r}: {text}; try again", path=str(self.path)) from error

    def mismatch(self, why: str, *, moved: bool = False) -> StateMismatchError:
        """The error that says that this file does not continue its changelog; or was ``moved`` on by somebody else."""
        return StateMismatchError(
            f"local state {str(self.path)!r} does not continue {self._label}: {why}", path=str(self.path), moved=moved
        )

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            # Power loss may cost the last batches, never consistency: the changelog has them.
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA cache_size=-16384")
            db.execute("BEGIN IMMEDIATE")
            if db.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                for statement in _SCHEMA:
                    db.execute(statement)
                row = self._row(0, None)
                db.execute("INSERT INTO lineage VALUES (1, ?, ?, ?, ?, ?)", row)
            db.execute("COMMIT")
            self._standing(db)
        except BaseException:
            db.close()
            raise
        return db

    def _row(self, offset: int, as_of: str | None) -> tuple[int, str, int, str | None, int]:
        """What is written about the whole of the file, with a checksum."""
        row = (_SCHEMA_VERSION, self.lineage, offset, as_of)
        return (*row, crc32(repr(row).encode()))

    def _standing(self, db: sqlite3.Connection) -> tuple[int, str | None]:
        row = db.execute("SELECT version, identity, changelog_offset, as_of, checksum FROM lineage").fetchone()
        if row is None or row[:2] != (_SCHEMA_VERSION, self.lineage):
            raise self.mismatch(f"it is of {row[1] if row else 'nothing'} (format {row[0] if row else None})")
        if row[-1] != crc32(repr(row[:-1]).encode()):
            raise self.mismatch("what it says about itself does not match its checksum")
        return row[2], row[3]

    @property
    def offset(self) -> int:
        """The changelog offset up to which changes are applied."""
        return self.standing()[0]

    def standing(self) -> tuple[int, str | None]:
        """The changelog offset, and what was noted with it by `note`.

        Raises:
            StateMismatchError: the file is damaged.
        """
        with self._translated():
            return self._standing(self._db)

    def note(self, offset: int, text: str) -> bool:
        """Remember ``text`` for as long as the file is at ``offset``; whether it was."""
        with self._translated():
            noted = self._db.execute(
                "UPDATE lineage SET as_of = ?, checksum = ? WHERE changelog_offset = ?",
                (text, self._row(offset, text)[-1], offset),
            )
        return noted.rowcount == 1

    def apply(self, changes: Iterable[Change], expected: int, reached: int) -> None:
        """Apply changes at changelog offset ``expected`` and remember ``reached``, or nothing.

        Raises:
            StateMismatchError: the file is elsewhere, because somebody else has applied something; or is damaged.
        """
        updates = dict(changes)
        new = [(key, _sealed(key, value)) for key, value in updates.items() if value is not None]
        gone = [(key,) for key, value in updates.items() if value is None]
        with self._translated(), self._transaction():
            moved = self._db.execute(
                "UPDATE lineage SET changelog_offset = ?, as_of = NULL, checksum = ? "
                "WHERE changelog_offset = ? AND identity = ?",
                (reached, self._row(reached, None)[-1], expected, self.lineage),
            ).rowcount
            if moved != 1:
                raise self.mismatch(f"changes from offset {expected} do not follow what it holds", moved=True)
            self._db.executemany(
                "INSERT INTO kv VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", new
            )
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
        """Within the block every look sees the file as of one moment, whoever changes it; other threads wait."""
        with self._turn:
            if self._db.in_transaction:  # pinned already, by this thread
                yield
                return
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
        if row is not None:
            return self._unsealed(key, row[0])
        return self.get_many((key,)).get(key) if self._known((key,)) else None

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that exist.

        Raises:
            StateMismatchError: the file is damaged.
        """
        found = self._find(keys)
        missing = [key for key in keys if key not in found]
        if self._known(missing):
            # Another process has just written them, or they are lost.
            with self.pinned():
                found.update(self._find(missing))
                lost = self._known([key for key in missing if key not in found])
            if lost:
                raise self.mismatch(f"key {lost[0][:80]!r} has lost its value")
        return found

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for key, sealed in self._look("SELECT key, value FROM kv WHERE key IN (%s)", keys):
            # The same as `_unsealed`, for every value of large batches.
            if type(sealed) is not bytes or crc32(key, crc32(sealed[:-4])).to_bytes(4, "big") != sealed[-4:]:
                raise self._damaged(key)
            found[key] = sealed[:-4]
        return found

    def _known(self, keys: Sequence[bytes]) -> list[bytes]:
        """Those keys that the index holds, which nobody else asks."""
        return [key for (key,) in self._look("SELECT key FROM kv INDEXED BY kv_keys WHERE key IN (%s)", keys)]

    def _look(self, query: str, keys: Sequence[bytes]) -> Iterator[Sequence[Any]]:
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            with self._translated():
                rows = self._db.execute(query % ",".join("?" * len(some)), some).fetchall()
            yield from rows

    def items(self, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Keys ``low <= key < high`` with their values, in order, a page at a time.

        Raises:
            StateMismatchError: the file is damaged.
        """
        after = ">="
        while True:
            page = self._page(after, low, high)
            yield from page
            if len(page) < _ROWS_PER_PAGE:
                return
            after, low = ">", page[-1][0]

    def _page(self, after: str, low: bytes, high: bytes | None) -> list[tuple[bytes, bytes]]:
        """The first rows of the range; all are looked at before the first is believed, which may be out of place."""
        bounds, below = ((low,), "") if high is None else ((low, high), " AND key < ?")
        query = f"SELECT key, value FROM kv WHERE key {after} ?{below} ORDER BY key LIMIT {_ROWS_PER_PAGE}"  # noqa: S608
        count = f"SELECT COUNT(*) FROM kv INDEXED BY kv_keys WHERE key {after} ?{below}"  # noqa: S608
        with self._translated(), self.pinned():
            rows = self._db.execute(query, bounds).fetchall()
            if len(rows) == _ROWS_PER_PAGE:
                bounds, count = (*bounds, rows[-1][0]), f"{count} AND key <= ?"
            (known,) = self._db.execute(count, bounds).fetchone()
        if known != len(rows):
            raise self.mismatch(f"{known} keys of a range have {len(rows)} values")
        page = [(key, self._unsealed(key, sealed)) for key, sealed in rows]
        if any(one >= other for (one, _), (other, _) in pairwise(page)):
            raise self.mismatch("keys are not in their places")
        return page

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
        with self._turn:
            self._db.close()

    def _unsealed(self, key: bytes, sealed: Any) -> bytes:
        if type(key) is bytes and type(sealed) is bytes and _sealed(key, sealed[:-4])[-4:] == sealed[-4:]:
            return sealed[:-4]
        raise self._damaged(key)

    def _damaged(self, key: object) -> StateMismatchError:
        return self.mismatch(f"the value of key {key!r:.80} does not match its checksum")


def _sealed(key: bytes, value: bytes) -> bytes:
    return value + crc32(key, crc32(value)).to_bytes(4, "big")


def seal(path: Path) -> None:
    """Leave a checksum of a file beside it, if nobody has it open: SQLite keeps its log for as long."""
    if path.exists() and not Path(f"{path}-wal").exists():
        written = Path(f"{path}.sum.new")
        written.write_text(_checksum(path))
        written.replace(f"{path}.sum")


def is_whole(path: Path) -> bool:
    """Whether a file is what it was when it was sealed, if it was; the checksum goes, for it may be changed now."""
    sealed = Path(f"{path}.sum")
    if not sealed.exists():
        return True
    expected = sealed.read_bytes()
    sealed.unlink()
    return path.exists() and expected == _checksum(path).encode()


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = crc32(chunk, checksum)
    return f"{checksum:08x} {path.stat().st_size}"


def remove(path: Path) -> None:
    """Remove a state file and what lies beside it."""
    for suffix in ("", "-wal", "-shm", ".sum"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
