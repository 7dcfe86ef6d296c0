"""What is compared with: the least code that does the same on msgspec and sqlite3, with the same sync mode.

One row holds the MessagePack list of 1,000 events, as in our record batches, and the events have the same attributes.
Nothing here checks, routes, leases, fences, retries or can be read by two processes at once.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness import BATCH

_TABLES = (
    "CREATE TABLE batches (base INTEGER PRIMARY KEY, count INTEGER, blob BLOB)",
    "CREATE TABLE emitted (base INTEGER PRIMARY KEY, count INTEGER, blob BLOB)",
    "CREATE TABLE intents (id TEXT PRIMARY KEY, start INTEGER, stop INTEGER)",
    "CREATE TABLE positions (name TEXT PRIMARY KEY, committed INTEGER)",
)


class BareEvent(msgspec.Struct, array_like=True, gc=False, kw_only=True):
    """`djp_dagster.Event` without its checks."""

    id: str
    source: str
    type: str
    data: Any = None
    time: Any = None
    subject: str | None = None
    datacontenttype: str | None = None
    dataschema: str | None = None
    ext: dict[str, Any] | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[BareEvent]).decode


class BareLog:
    """A log and a consumer with nothing but SQLite."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        # The same settings as djp_dagster.streams.sql.database.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16384", "journal_size_limit=67108864"):
            self._connection.execute(f"PRAGMA {pragma}")
        for statement in _TABLES:
            self._connection.execute(statement)
        self._end = self._emitted = 0
        self._groups = 0

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._connection.execute("BEGIN IMMEDIATE")
        yield self._connection
        self._connection.execute("COMMIT")

    def append(self, events: Sequence[BareEvent]) -> None:
        """One publish: encode, insert, commit."""
        with self._transaction() as connection:
            row = (self._end, len(events), _encode(events))
            connection.execute("INSERT INTO batches VALUES (?, ?, ?)", row)
        self._end += len(events)

    def read(self, base: int) -> list[BareEvent]:
        """One stored batch, decoded."""
        row = self._connection.execute("SELECT blob FROM batches WHERE base = ?", (base,)).fetchone()
        return _decode(row[0])

    def read_all(self) -> int:
        """Every stored batch, decoded."""
        return sum(len(self.read(base)) for base in range(0, self._end, BATCH))

    def consume(self, *, emit: bool = False) -> int:
        """All batches: intent; read, decode, touch every event; commit, with one new event for each if ``emit``."""
        self._groups += 1
        name = f"group-{self._groups}"
        self._connection.execute("INSERT INTO positions VALUES (?, 0)", (name,))
        total = 0
        for base in range(0, self._end, BATCH):
            with self._transaction() as connection:
                connection.execute("INSERT INTO intents VALUES (?, ?, ?)", (f"{name}-{base}", base, base + BATCH))
            out = []
            prefix = f"{name:_<25}-{base:x}-"  # ids as long as ours
            for event in self.read(base):
                data = event.data
                total += data["amount"]
                if emit:
                    new = {"user_id": data["user_id"], "amount": data["amount"]}
                    out.append(BareEvent(id=f"{prefix}{len(out):x}", source="/bench", type="order.total", data=new))
            blob = _encode(out) if emit else None
            with self._transaction() as connection:
                if blob is not None:
                    row = (self._emitted, len(out), blob)
                    connection.execute("INSERT INTO emitted VALUES (?, ?, ?)", row)
                    self._emitted += len(out)
                moved = (base + BATCH, name, base)
                connection.execute("UPDATE positions SET committed = ? WHERE name = ? AND committed = ?", moved)
                connection.execute("DELETE FROM intents WHERE id = ?", (f"{name}-{base}",))
        return total
