"""`TaskStore`: a task's local key-value store, a SQLite file; and `TaskState`, what a handler sees of it in one batch.

The store is a cache of the task's changelog, which is the truth. It remembers of which stream incarnation, and up to
which changelog offset, it is. Behind: it catches up. Of another stream, ahead of its changelog, or damaged: it is
discarded and restored from the beginning.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import InvalidValueError, StateMismatchError, StreamBusyError, StreamCorruptError
from djp_dagster.partitioning import Key
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.records import TopicPartition, decode_changes, decode_value, encode_value

_log = logging.getLogger(__name__)
_SCHEMA_VERSION = 1
_PASSING = ("locked", "busy", "full", "disk I/O", "unable to open", "readonly")
"""What SQLite says of troubles that are not the file's own fault."""
_READ_BYTES = 4 << 20
Change = tuple[bytes, bytes | None]


class TaskStore:
    """The local store of one task of one group.

    Args:
        path: the SQLite file; made with its folder when missing.
        log, changelog: where the truth is.
    """

    def __init__(self, path: Path, log: EventLog, changelog: TopicPartition) -> None:
        self._path, self._log, self._changelog = path, log, changelog
        path.parent.mkdir(parents=True, exist_ok=True)
        self._identity = f"{log.incarnation}/{log.topic(changelog.topic).identity}"
        try:
            with self._translated():
                self._db = self._open()
        except StateMismatchError as error:
            self._discard(str(error))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Damage is a mismatch, cured by restoring; anything else about the file may pass."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if not any(word in text for word in _PASSING):
                raise self._mismatch(text) from error
            raise StreamBusyError(
                f"local state {str(self._path)!r}: {text}; try again", path=str(self._path)
            ) from error

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=30.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            # Power loss may cost the last batches, never consistency: the changelog has them.
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TABLE IF NOT EXISTS kv (key BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
            db.execute(
                "CREATE TABLE IF NOT EXISTS lineage (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER, "
                "incarnation TEXT, changelog_offset INTEGER)"
            )
            db.execute("INSERT OR IGNORE INTO lineage VALUES (1, ?, ?, 0)", (_SCHEMA_VERSION, self._identity))
            db.execute("COMMIT")
            version, incarnation = db.execute("SELECT version, incarnation FROM lineage").fetchone()
            if (version, incarnation) != (_SCHEMA_VERSION, self._identity):
                raise self._mismatch(f"it is of stream {incarnation} (format {version})")  # noqa: TRY301
        except BaseException:
            db.close()
            raise
        return db

    def _mismatch(self, why: str) -> StateMismatchError:
        return StateMismatchError(
            f"local state {str(self._path)!r} does not continue {self._changelog.topic!r} partition "
            f"{self._changelog.partition}: {why}",
            path=str(self._path),
        )

    def _discard(self, why: str) -> None:
        _log.warning("local state %s is discarded and restored from its changelog: %s", self._path, why)
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._db = self._open()

    def restore_later(self, why: str) -> None:
        """Discard what is there; the next `catch_up` restores it."""
        self._db.close()
        self._discard(why)

    @property
    def offset(self) -> int:
        """The changelog offset up to which changes are applied."""
        return int(self._db.execute("SELECT changelog_offset FROM lineage").fetchone()[0])

    def catch_up(self) -> int:
        """Apply every committed changelog record not applied yet; the changelog's end."""
        end = self._log.spans([self._changelog.topic])[self._changelog].end
        try:
            with self._translated():
                offset = self.offset
            if offset > end:
                raise self._mismatch(f"it is at {offset}, the changelog ends at {end}")
        except StateMismatchError as error:
            self.restore_later(str(error))
            offset = 0
        while offset < end:
            for batch in self._log.read(self._changelog, offset, end=end, max_bytes=_READ_BYTES):
                self.apply(_changes_in(batch.blob, offset - batch.base_offset), offset, batch.end_offset)
                offset = batch.end_offset
        return end

    def apply(self, changes: Iterable[Change], expected: int, reached: int) -> None:
        """Apply changes at changelog offset ``expected`` and remember ``reached``, or nothing.

        Raises:
            StateMismatchError: the store is elsewhere, because another holder has applied something.
        """
        with self._translated():
            self._apply(dict(changes), expected, reached)

    def _apply(self, updates: dict[bytes, bytes | None], expected: int, reached: int) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            moved = self._db.execute(
                "UPDATE lineage SET changelog_offset = ? WHERE changelog_offset = ? AND incarnation = ?",
                (reached, expected, self._identity),
            ).rowcount
            if moved != 1:
                raise self._mismatch(f"changes from offset {expected} do not follow what it holds")  # noqa: TRY301
            self._db.executemany(
                "INSERT OR REPLACE INTO kv VALUES (?, ?)",
                [(key, value) for key, value in updates.items() if value is not None],
            )
            self._db.executemany(
                "DELETE FROM kv WHERE key = ?", [(k,) for k, value in updates.items() if value is None]
            )
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def get(self, key: bytes) -> bytes | None:
        """The value of a key."""
        with self._translated():
            row = self._db.execute("SELECT value FROM kv WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that exist."""
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            marks = ",".join("?" * len(some))
            with self._translated():
                found.update(self._db.execute(f"SELECT key, value FROM kv WHERE key IN ({marks})", some))  # noqa: S608
        return found

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values, in key order."""
        yield from self._db.execute("SELECT key, value FROM kv ORDER BY key")

    def close(self) -> None:
        """Release the file."""
        self._db.close()


def _changes_in(blob: bytes, skip: int) -> list[Change]:
    try:
        return decode_changes(blob)[skip:]
    except msgspec.DecodeError as error:
        raise StreamCorruptError(f"a changelog record batch is damaged: {error}; restore the stream") from error


class TaskStores:
    """The local stores of the tasks one process works on.

    Args:
        log: where the changelogs are.
        group: the consumer group.
        changelog: the name of its changelog topic.
        folder: where local state lies (``$DJP_STATE_FOLDER``, else ``.djp/state``).
    """

    def __init__(self, log: EventLog, group: str, changelog: str, folder: Path | None) -> None:
        self._log, self._group, self._changelog = log, group, changelog
        self._folder = folder if folder is not None else Path(os.environ.get("DJP_STATE_FOLDER", ".djp/state"))
        self._open: dict[int, TaskStore] = {}

    def __getitem__(self, task: int) -> TaskStore:
        return self._open[task]

    def caught_up(self, task: int) -> TaskStore:
        """The task's store, with every committed change applied."""
        store = self._open.get(task)
        if store is None:
            path = self._folder / self._log.incarnation[:12] / self._group / f"{task}.db"
            store = self._open[task] = TaskStore(path, self._log, TopicPartition(self._changelog, task))
        store.catch_up()
        return store

    def restore_later(self, tasks: Iterable[int], why: str) -> None:
        """Discard the stores of these tasks; they are restored when next caught up."""
        for task in tasks:
            if task in self._open:
                self._open[task].restore_later(why)

    def drop(self, tasks: Iterable[int]) -> None:
        """Close the stores of tasks given away, so that whoever holds them next finds them free."""
        for task in tasks:
            store = self._open.pop(task, None)
            if store is not None:
                store.close()

    def close(self) -> None:
        """Close all of them."""
        self.drop(list(self._open))


class TaskState:
    """A task's state as one batch sees and changes it; nothing is kept unless the batch commits.

    Keys are strings, integers or bytes (``1`` and ``"1"`` are different keys); values are what MessagePack can say. A
    value read and changed in place is kept only if it is set again.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._changed: dict[bytes, Any] = {}
        self._journal: list[tuple[bytes, bool, Any]] = []

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        encoded = encode_value(key)
        if encoded in self._changed:
            value = self._changed[encoded]
            return default if value is _DELETED else value
        raw = self._store.get(encoded)
        return default if raw is None else decode_value(raw)

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those keys that exist, with one look-up for all of them."""
        encoded = {encode_value(key): key for key in keys}
        raw = self._store.get_many([one for one in encoded if one not in self._changed])
        found = {encoded[one]: decode_value(value) for one, value in raw.items()}
        for one, key in encoded.items():
            value = self._changed.get(one, _DELETED)
            if value is not _DELETED:
                found[key] = value
        return found

    def set(self, key: Key, value: Any) -> None:
        """Set the value of ``key``.

        Raises:
            InvalidValueError: None is no value; delete the key instead.
        """
        if value is None:
            raise InvalidValueError(f"state value of key {key!r} must not be None; use delete(key)", key=key)
        self._put(encode_value(key), value)

    def delete(self, key: Key) -> None:
        """Remove ``key``, whether it exists or not."""
        self._put(encode_value(key), _DELETED)

    def _put(self, encoded: bytes, value: Any) -> None:
        self._journal.append((encoded, encoded in self._changed, self._changed.get(encoded)))
        self._changed[encoded] = value

    def mark(self) -> int:
        """A point to come back to with `undo`."""
        return len(self._journal)

    def undo(self, mark: int) -> None:
        """Take back every change since ``mark``."""
        while len(self._journal) > mark:
            encoded, existed, before = self._journal.pop()
            if existed:
                self._changed[encoded] = before
            else:
                del self._changed[encoded]

    def changes(self) -> list[Change]:
        """What this batch changed, encoded, in key order.

        Raises:
            InvalidValueError: a value cannot be encoded; the key is named.
        """
        encoded: list[Change] = []
        for key, value in sorted(self._changed.items(), key=lambda item: item[0]):
            try:
                encoded.append((key, None if value is _DELETED else encode_value(value)))
            except (TypeError, ValueError, OverflowError) as error:
                raise InvalidValueError(
                    f"state value of key {decode_value(key)!r} cannot be stored: {error}", key=decode_value(key)
                ) from error
        return encoded


_DELETED = object()
