"""Connections, transactions and the translation of driver errors: the only place that knows SQLite from PostgreSQL.

Every write transaction is short and takes its locks at once or in a fixed order: ``BEGIN IMMEDIATE`` on SQLite; on
PostgreSQL row locks on tasks, then the group, then partitions by (topic, partition). No user code runs inside one.
"""

import os
import random
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import NullPool, StaticPool

from djp_dagster.errors import (
    DjpError,
    InvalidSettingError,
    StreamBusyError,
    StreamCorruptError,
    StreamFailedError,
    StreamFormatError,
    StreamFullError,
    StreamNotWritableError,
    StreamReplacedError,
    StreamUnavailableError,
)

Clock = Callable[[], float]

NOTIFY_CHANNEL = "djp_stream"
_BUSY_TIMEOUT_S = 30.0
_MAGIC = b"SQLite format 3\0"
_inherited: list[object] = []


def _parse_url(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        # Not shown: whatever it is, it may hold a password.
        raise InvalidSettingError(
            "the stream's url cannot be parsed; use sqlite:///path or postgresql+psycopg://user@host/database",
            setting="url",
            value=None,
        ) from error
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


class Database:
    """One stream's database. Safe to share between threads; a forked child opens its own connections.

    Args:
        url: ``sqlite:///path``, ``sqlite://`` (private, in memory) or ``postgresql+psycopg://...``.
        clock: seconds since 1970, for tests; by default the host's clock on SQLite, the server's on PostgreSQL.

    Raises:
        InvalidSettingError: another kind of database.
    """

    def __init__(self, url: str | URL, *, clock: Clock | None = None) -> None:
        self.url = _parse_url(url)
        self.dialect = self.url.get_backend_name()
        if self.dialect not in ("sqlite", "postgresql"):
            raise InvalidSettingError(
                f"stream url {self.label!r}: use sqlite:///path or postgresql+psycopg://user@host/database",
                setting="url",
                value=self.label,
            )
        self.path = self._sqlite_path()
        self._clock = clock
        self._identity: tuple[int, int] | None = None
        # An in-memory database is one connection, so its transactions take turns.
        in_memory = self.dialect == "sqlite" and self.path is None
        self._turn: AbstractContextManager[Any] = threading.RLock() if in_memory else nullcontext()
        self.engine = self._make_engine()
        # Autocommit: a single SELECT needs no BEGIN and no ROLLBACK around it.
        self._reader = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        driver = self.engine.dialect.dbapi
        assert driver is not None
        self._driver_error: type[Exception] = driver.Error
        self._connections: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._mine = _holder(shared=in_memory)
        _forget_connections_after_fork(self)

    @property
    def label(self) -> str:
        """The URL without its password, for messages."""
        return self.url.render_as_string(hide_password=True)

    def _sqlite_path(self) -> Path | None:
        name = self.url.database
        return None if self.dialect != "sqlite" or not name or name == ":memory:" else Path(name)

    def _make_engine(self) -> Engine:
        if self.dialect == "postgresql":
            try:
                return sa.create_engine(self.url, isolation_level="READ COMMITTED", pool_size=4, max_overflow=16)
            except (ModuleNotFoundError, NoSuchModuleError) as error:
                raise InvalidSettingError(
                    f"stream url {self.label!r} needs a driver that is not installed ({error}); install "
                    "djp-dagster[postgresql] and write postgresql+psycopg://user@host/database",
                    setting="url",
                    value=self.label,
                ) from error
        engine = sa.create_engine(
            self.url,
            connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
            poolclass=NullPool if self.path is not None else StaticPool,
        )
        event.listen(engine, "connect", _prepare_sqlite)
        return engine

    def now_micros(self, connection: Connection) -> int:
        """The store's clock."""
        local = self.local_micros()
        return local if local is not None else int(connection.execute(_PG_NOW).scalar_one())

    def local_micros(self) -> int | None:
        """The store's clock, where it can be told without asking the server."""
        if self._clock is not None:
            return round(self._clock() * 1e6)
        return time.time_ns() // 1000 if self.dialect == "sqlite" else None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection for reading; each statement sees what is committed when it runs."""
        if self.dialect == "sqlite":
            with self._turn, self._translated():
                yield self._thread_connection()
            return
        with self._translated(), self._reader.connect() as connection, self._translated(connection):
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection for reading; all statements see what is committed when the first one runs."""
        with self._turn, self._translated(), self.engine.connect() as connection, self._translated(connection):
            if self.dialect == "sqlite":
                raw_connection(connection).execute("BEGIN")
            else:
                connection.execution_options(isolation_level="REPEATABLE READ")
            try:
                yield connection
            finally:
                self._abandon(connection)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A write transaction: commits at the end of the block, rolls back on any exception.

        Raises:
            StreamUnavailableError: with ``facts["ambiguous"]`` true if the connection broke during COMMIT.
        """
        with self._turn:
            with self._translated():
                self._require_same_file()
                connection = self._thread_connection() if self.dialect == "sqlite" else self.engine.connect()
            try:
                with self._translated(connection):
                    self._begin(connection)
                    yield connection
                with self._translated(connection, committing=True):
                    self._finish(connection)
            except BaseException:
                self._abandon(connection)
                raise
            finally:
                if self.dialect != "sqlite":
                    connection.close()

    def _thread_connection(self) -> Connection:
        """This thread's connection. Taking one from a pool costs more than most of our statements."""
        connection: Connection | None = getattr(self._mine, "connection", None)
        if connection is None or connection.closed or connection.invalidated:
            self._require_same_file()
            connection = self._mine.connection = self.engine.connect()
            self._connections.add(connection)
        return connection

    def _begin(self, connection: Connection) -> None:
        if self.dialect == "sqlite":
            _begin_immediate(raw_connection(connection))
        else:
            connection.begin()

    def _finish(self, connection: Connection) -> None:
        if self.dialect == "sqlite":
            raw_connection(connection).execute("COMMIT")
        else:
            connection.commit()

    def _abandon(self, connection: Connection) -> None:
        try:
            if self.dialect != "sqlite":
                connection.rollback()
            elif (raw := raw_connection(connection)).in_transaction:
                raw.execute("ROLLBACK")
        except (sa.exc.DBAPIError, self._driver_error):
            connection.invalidate()

    def notify(self, connection: Connection) -> None:
        """Wake the watchers when this transaction commits (SQLite's watchers see the commit itself)."""
        if self.dialect == "postgresql":
            connection.execute(_PG_NOTIFY)

    @contextmanager
    def _translated(self, connection: Connection | None = None, *, committing: bool = False) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise self._typed(error.orig or error, committing, gone=error.connection_invalidated) from error
        except self._driver_error as error:
            gone = connection is not None and self._is_gone(error, connection)
            raise self._typed(error, committing, gone=gone) from error

    def _is_gone(self, error: Exception, connection: Connection) -> bool:
        """Whether the connection is broken; if so, no other one made before is trusted either."""
        raw = None if connection.closed or connection.invalidated else raw_connection(connection)
        if not self.engine.dialect.is_disconnect(error, raw, None):  # type: ignore[arg-type]
            return False
        connection.invalidate()
        self.engine.dispose()
        return True

    def _typed(self, error: BaseException, committing: bool, *, gone: bool) -> DjpError:
        if self.dialect == "sqlite":
            return self._typed_sqlite(error, committing)
        state, where = getattr(error, "sqlstate", None) or "", f"stream {self.label}"
        if state in ("53100", "53200"):
            return StreamFullError(f"{where}: {_first_line(error)}; free some space", stream=self.label)
        nameless = not state and type(error).__name__ in ("OperationalError", "InterfaceError")
        # 25006 and 25P03: the server became a standby, or timed the session out.
        if gone or nameless or state[:2] in ("08", "53", "57", "58", "XX") or state in ("25006", "25P03"):
            return StreamUnavailableError(
                f"{where}: the database is away ({_first_line(error)}); it is tried again",
                stream=self.label,
                ambiguous=committing,
            )
        if state in ("40001", "40P01", "55P03", "23505"):
            return StreamBusyError(f"{where}: {_first_line(error)}; try again", stream=self.label)
        if state == "42501":
            return StreamNotWritableError(
                f"{where}: {_first_line(error)}; grant the user write access", stream=self.label
            )
        return StreamFailedError(f"{where}: {type(error).__name__}: {_first_line(error)}", stream=self.label)

    def _typed_sqlite(self, error: BaseException, committing: bool) -> DjpError:
        name = getattr(error, "sqlite_errorname", None) or _legacy_error_name(str(error))
        where = f"stream {self.label}"
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
            return StreamBusyError(f"{where}: locked for {_BUSY_TIMEOUT_S:.0f} s; try again", stream=self.label)
        if name.startswith("SQLITE_FULL"):
            return StreamFullError(f"{where}: no space left; free some and try again", stream=self.label)
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            return StreamNotWritableError(
                f"{where}: {error}; make the folder exist and writable for this user", stream=self.label
            )
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StreamCorruptError(
                f"{where}: {error}; restore it from a backup", stream=self.label, path=str(self.path)
            )
        if name.startswith("SQLITE_IOERR"):
            return self._typed_io_error(error, committing)
        return StreamFailedError(f"{where}: {type(error).__name__}: {error}", stream=self.label)

    def _typed_io_error(self, error: BaseException, committing: bool) -> DjpError:
        if self.path is not None and _is_full(self.path.parent):
            return StreamFullError(f"stream {self.label}: no space left; free some and try again", stream=self.label)
        return StreamUnavailableError(
            f"stream {self.label}: {error}; check the disk", stream=self.label, ambiguous=committing
        )

    def _require_same_file(self) -> None:
        # A writer on an unlinked or swapped file would acknowledge events nobody will ever see.
        if self.path is None or self._identity is None:
            return
        if self._identity != _file_identity(self.path):
            raise StreamReplacedError(
                f"stream {self.label}: the file was removed or replaced while open; restart the process to use the "
                "new one, or put the old one back",
                stream=self.label,
                path=str(self.path),
            )

    def remember_file(self) -> None:
        """From now on refuse to write if the file is another one."""
        if self.path is not None:
            self._identity = _file_identity(self.path)

    def require_readable(self) -> None:
        """Refuse early, and clearly, what cannot be a stream file.

        Raises:
            StreamNotWritableError: the folder is missing, or the place is no regular file.
            StreamFormatError: the file holds something else.
        """
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise StreamNotWritableError(
                f"stream {self.label}: the folder {str(self.path.parent)!r} does not exist; create it first",
                stream=self.label,
                path=str(self.path),
            )
        if not self.path.exists() or (stat.S_ISREG(self.path.stat().st_mode) and self.path.stat().st_size == 0):
            return
        if not self.path.is_file():
            raise StreamNotWritableError(
                f"stream {self.label}: {str(self.path)!r} is no regular file; name a file", stream=self.label
            )
        with self._translated():
            is_something_else = _is_something_else(self.path)
        if is_something_else:
            raise StreamFormatError(
                f"stream {self.label}: {str(self.path)!r} is not a stream file; choose another path",
                stream=self.label,
                path=str(self.path),
            )

    def abandon_connections(self) -> None:
        """In a forked child: never touch the parent's connections again, not even to close them."""
        _inherited.append((self._mine, list(self._connections)))
        self._forget_connections()
        self.engine.dispose(close=False)

    def close(self) -> None:
        """Close the connections of all threads; none may be in use."""
        for connection in list(self._connections):
            connection.close()
        self._forget_connections()
        self.engine.dispose()

    def _forget_connections(self) -> None:
        self._connections = weakref.WeakSet()
        self._mine = _holder(shared=self.dialect == "sqlite" and self.path is None)


_PG_NOW = sa.text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)")
_PG_NOTIFY = sa.text(f"SELECT pg_notify('{NOTIFY_CHANNEL}', '')")


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun explicitly
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA cache_size=-16384")
        cursor.execute("PRAGMA journal_size_limit=67108864")
    finally:
        cursor.close()


def _holder(*, shared: bool) -> Any:
    """Where a connection is kept: one for each thread, or one for all of them, who then take turns."""
    return SimpleNamespace() if shared else threading.local()


def raw_connection(connection: Connection) -> Any:
    """The driver's own connection."""
    return connection.connection.dbapi_connection


def _begin_immediate(raw: sqlite3.Connection) -> None:
    """Take the write lock, waiting at most `_BUSY_TIMEOUT_S`.

    SQLite's own waiting sleeps up to 100 ms at a time, far longer than anybody here holds the lock.
    """
    give_up = time.monotonic() + _BUSY_TIMEOUT_S
    raw.execute("PRAGMA busy_timeout=0")
    try:
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(random.uniform(0.0002, 0.002))  # noqa: S311
            else:
                return
    finally:
        raw.execute(f"PRAGMA busy_timeout={round(_BUSY_TIMEOUT_S * 1000)}")


def _forget_connections_after_fork(database: Database) -> None:
    # A connection used, or closed, by two processes corrupts SQLite's locks and PostgreSQL's protocol alike.
    reference = weakref.ref(database)

    def forget() -> None:
        alive = reference()
        if alive is not None:
            alive.abandon_connections()

    os.register_at_fork(after_in_child=forget)


def _file_identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _is_full(folder: Path) -> bool:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize < (1 << 16)


def _is_something_else(path: Path) -> bool:
    """Whether a file is no SQLite database at all. SQLite is asked; what else is wrong is told when it is used.

    A database is never opened past SQLite: when a process closes a file, it loses all of its POSIX locks on it. Whoever
    else closes the database next would take itself for the last one, and delete the log that this process writes to.
    """
    if path.stat().st_size < len(_MAGIC):  # of which SQLite takes a single byte for nothing
        return True
    with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as probe:
        try:
            probe.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            if _legacy_error_name(str(error)) == "SQLITE_NOTADB":  # so nobody holds locks on it
                with path.open("rb") as file:
                    return file.read(len(_MAGIC)) != _MAGIC
    return False


def _legacy_error_name(message: str) -> str:
    """The SQLite error's symbolic name from its text: Python 3.10 does not carry the name."""
    texts = {
        "database is locked": "SQLITE_BUSY",
        "database table is locked": "SQLITE_LOCKED",
        "database or disk is full": "SQLITE_FULL",
        "attempt to write a readonly database": "SQLITE_READONLY",
        "unable to open database file": "SQLITE_CANTOPEN",
        "database disk image is malformed": "SQLITE_CORRUPT",
        "file is not a database": "SQLITE_NOTADB",
        "disk I/O error": "SQLITE_IOERR",
    }
    return next((name for text, name in texts.items() if text in message), "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]


def new_id(inserted: sa.CursorResult[Any]) -> int:
    """The number the database gave the row just inserted."""
    key = inserted.inserted_primary_key
    assert key is not None
    return int(key[0])


def is_ambiguous(error: DjpError) -> bool:
    """Whether the error left open if its transaction took effect."""
    return bool(error.facts.get("ambiguous"))
