"""State of a million keys: read in bulk, restored, copied to the payload store.

One `Table` of users with values of some 60 bytes, in one task. Read are random keys, 1,000 at a time, through a
`StateView`, as other processes read it, and through the `TaskState` of a batch. The peers hold the same keys and values
in MessagePack: sqlite3 with a table whose primary key is the key and one look-up for all the keys; and RocksDB by
rocksdict, if it is installed, with its look-up of many. Ours verifies a checksum with every value; sqlite3 does not,
RocksDB verifies its blocks.

Restored is into a folder where nothing is, as on a host that has just taken a task over: from a snapshot, and from the
changelog alone. A snapshot is taken between two batches of `run_pending`; what it holds up is the time from the end of
the batch before to the beginning of the one after.

Whatever was read, restored or copied is compared with what was published.
"""

import random
import shutil
import sqlite3
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import count as counter
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness import BATCH, MIB, Row, Settings, against, alternate, seconds
from djp_dagster import (
    BatchReport,
    Event,
    EventStream,
    SnapshotPolicy,
    Table,
    Threshold,
    Topic,
    open_stream,
    run_pending,
)
from djp_dagster.state.stores import TaskStores
from djp_dagster.state.task_state import TaskState
from djp_dagster.streams.model import Intent
from djp_dagster.streams.records import decode_value, encode_value

KEYS = 1_000_000
READS = 300_000
AT_ONCE = 1_000
TARGET_READS = 300_000
FROM_SNAPSHOT_S, FROM_CHANGELOG_S = 2.0, 10.0
UPDATES = Topic("user_updates", key="user")
_STALLED_BATCHES = 10
_numbers = counter()


def key_of(number: int) -> str:
    return f"user-{number:08d}"


def value_of(number: int) -> dict[str, Any]:
    """Some 60 bytes in MessagePack."""
    return {"name": f"User Number {number}", "city": f"Frankfurt-{number % 997:03d}", "score": number % 10_007}


def table(snapshots: SnapshotPolicy | None = None) -> Table:
    """The table, which takes snapshots if told to."""
    return Table("users", topic=UPDATES, value=["name", "city", "score"], snapshots=snapshots)


def run(settings: Settings) -> list[Row]:
    """Reads, then restores from the changelog, then a snapshot, then restores from that."""
    keys = settings.events(KEYS)
    folder = settings.folder / "state-reads"
    folder.mkdir()
    with open_stream(folder / "stream.db") as stream:
        stream.create_topic(UPDATES)
        for start in range(0, keys, BATCH):
            stream.publish(UPDATES, [_update(number) for number in range(start, start + BATCH)])
        run_pending(stream, table(), state_folder=folder / "state")
        rows = _reads(settings, stream, folder, keys)
        with _payloads_read(stream) as payloads:
            from_changelog = _restores(settings, stream, folder, keys)
            assert not payloads
            rows += _snapshot(stream, folder)
            from_snapshot = _restores(settings, stream, folder, keys)
            assert len(payloads) == settings.rounds, "it was not restored from the snapshot"
    rows.append(_limited("restore from a snapshot", keys, from_snapshot, FROM_SNAPSHOT_S))
    rows.append(_limited("restore from the changelog alone", keys, from_changelog, FROM_CHANGELOG_S))
    shutil.rmtree(folder)
    return rows


def _update(number: int, **changed: Any) -> Event:
    return Event(type="user", source="/bench", data={"user": key_of(number), **value_of(number), **changed})


def _limited(what: str, keys: int, took: Sequence[float], limit_s: float) -> Row:
    middle = statistics.median(took)
    return Row(f"{what}, {keys:,} keys", f"{middle:.2f} s", "", "", f"≤ {limit_s:g} s", middle <= limit_s)


# Reads


class _Reader(Protocol):
    def __call__(self, keys: Sequence[str]) -> dict[Any, Any]:
        """The values of the keys."""


def _reads(settings: Settings, stream: EventStream, folder: Path, keys: int) -> list[Row]:
    count = settings.events(READS)
    chance = random.Random(5)
    asked = [[chance.randrange(keys) for _ in range(AT_ONCE)] for _ in range(count // AT_ONCE)]
    stores = TaskStores(stream, "users", folder / "state", None)
    with closing(stores), stream.view(table(), folder=folder / "state") as view:
        file = stores.caught_up(0).file
        readers: dict[str, _Reader] = {
            "view": view.get_many,
            # A state for each look-up, as each batch has its own: nothing is found in memory.
            "state": lambda wanted: TaskState(file).get_many(wanted),
            "sqlite3": _sqlite3(folder / "peer.db", keys),
        }
        with suppress(ImportError):
            readers["rocksdict"] = _rocksdict(folder / "peer-rocks", keys)
        if "rocksdict" not in readers:
            print("  rocksdict is not installed: left out", file=sys.stderr)
        loops = {name: partial(_read, reader, asked) for name, reader in readers.items()}
        took = alternate(settings.rounds, loops)
    rows = []
    for name, what in (("view", "StateView.get_many"), ("state", "TaskState.get_many")):
        for peer in ("sqlite3", "rocksdict"):
            if peer in took:
                rows.append(against(f"{what}, {AT_ONCE:,} of {keys:,} keys / {peer}", count, took[name], took[peer]))
        reached = count / statistics.median(took[name])
        met = reached >= TARGET_READS
        rows.append(Row(f"{what}", f"{reached / 1000:,.0f} k keys/s", target=f"≥ {TARGET_READS // 1000} k/s", met=met))
    return rows


def _read(reader: _Reader, asked: Sequence[Sequence[int]]) -> float:
    """Seconds for all of them; what was found is looked at after each look-up, outside the time."""
    took = 0.0
    for numbers in asked:
        wanted = [key_of(number) for number in numbers]
        started = time.perf_counter()
        found = reader(wanted)
        took += time.perf_counter() - started
        assert found == {key: value_of(number) for key, number in zip(wanted, numbers, strict=True)}
    return took


def _sqlite3(path: Path, keys: int) -> _Reader:
    db = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "cache_size=-16384"):  # as of our state files
        db.execute(f"PRAGMA {pragma}")
    db.execute("CREATE TABLE users (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
    db.execute("BEGIN")
    rows = ((key_of(number), encode_value(value_of(number))) for number in range(keys))
    db.executemany("INSERT INTO users VALUES (?, ?)", rows)
    db.execute("COMMIT")
    query = f"SELECT key, value FROM users WHERE key IN ({','.join('?' * AT_ONCE)})"
    return lambda wanted: {key: decode_value(raw) for key, raw in db.execute(query, wanted)}


def _rocksdict(path: Path, keys: int) -> _Reader:
    from rocksdict import Options, Rdict, WriteBatch

    database = Rdict(str(path), options=Options(raw_mode=True))
    for start in range(0, keys, BATCH):
        batch = WriteBatch(raw_mode=True)
        for number in range(start, start + BATCH):
            batch.put(key_of(number).encode(), encode_value(value_of(number)))
        database.write(batch)
    database.flush()
    database.compact_range(None, None)

    def read(wanted: Sequence[str]) -> dict[Any, Any]:
        found = database.get([key.encode() for key in wanted])
        return {key: decode_value(raw) for key, raw in zip(wanted, found, strict=True) if raw is not None}

    return read


# Restores and snapshots


@contextmanager
def _payloads_read(stream: EventStream) -> Iterator[list[object]]:
    """What is read of the payload store within the block."""
    store: Any = stream.payloads
    original, seen = store.open, []

    def noted(payload: object, *arguments: Any, **settings: Any) -> Any:
        seen.append(payload)
        return original(payload, *arguments, **settings)

    store.open = noted
    try:
        yield seen
    finally:
        del store.open


def _restores(settings: Settings, stream: EventStream, folder: Path, keys: int) -> list[float]:
    """Seconds until a folder where nothing was holds all of it, round by round."""
    took = []
    for _ in range(settings.rounds):
        state = folder / f"restored-{next(_numbers)}"
        stores = TaskStores(stream, "users", state, None)
        took.append(seconds(lambda stores=stores: stores.caught_up(0)))
        _require_whole(stores, keys)
        stores.close()
        shutil.rmtree(state)
    return took


def _require_whole(stores: TaskStores, keys: int) -> None:
    state = TaskState(stores[0].file)
    found = 0
    for number, (key, value) in enumerate(state.items()):
        assert (key, value) == (key_of(number), value_of(number))
        found += 1
    assert found == keys, f"{found} keys of {keys}"


def _snapshot(stream: EventStream, folder: Path) -> list[Row]:
    """Some small batches of updates that change nothing; the first is followed by a snapshot."""
    for start in range(_STALLED_BATCHES):
        stream.publish(UPDATES, [_update(start * BATCH + number) for number in range(BATCH)])
    ended, gaps = 0.0, []

    def begins(_: Intent) -> None:
        if ended:
            gaps.append(time.perf_counter() - ended)

    def ends(_: BatchReport) -> None:
        nonlocal ended
        ended = time.perf_counter()

    due = table(SnapshotPolicy(bytes=1))
    due.max_batch = Threshold(events=BATCH)
    run_pending(stream, due, state_folder=folder / "state", on_begin=begins, on_report=ends)
    (taken,) = stream.coordinator.snapshots("users", 0)
    assert len(gaps) == _STALLED_BATCHES - 1
    stalled, usual = max(gaps), statistics.median(gaps)
    what = f"snapshot of {taken.payload.bytes / MIB:,.0f} MiB"
    return [
        Row(f"{what}: the worker is held up for", f"{stalled:.2f} s"),
        Row("  between any two batches", f"{usual * 1e3:.1f} ms"),
    ]
