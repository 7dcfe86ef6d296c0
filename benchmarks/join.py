"""A join of three topics by key, against a join in SQLite; and a million keys whose parts never come.

Each of 50,000 keys has three parts of some 300 bytes, one in each topic, which were published out of order within a
window: some keys become complete within a batch, most across batches. For each complete key one event goes out, with
what the parts add up to. The parts are in a stream before the time begins, in both cases in record batches of
MessagePack, and synced to disk with every commit.

The peer is a join as one writes it for one project: a table of parts with the primary key (key, part), deleted when
they are complete; parts, outputs and the position in one transaction of 500 events. It knows no deadline, no late
parts, no partitions and no failing handler, and it begins a key anew that was complete before. Ours is timed with
batches of about as many events, which is the same number of commits, and with as many as it takes by itself; with a
deadline, which is an index more, and without.

What expires: a million keys with one part of two each. Their parts become dead letters. In a process of its own, whose
peak of resident memory is taken by phase; the stream's clock is moved instead of waiting.
"""

import gc
import json
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count as counter
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.bare import BareEvent
from benchmarks.harness import BATCH, MIB, Row, Settings, against, alternate, memory, rate, seconds
from djp_dagster import (
    BatchReport,
    Event,
    EventStream,
    Join,
    RunReport,
    Threshold,
    Topic,
    TopicPartition,
    join,
    open_stream,
    run_pending,
)
from djp_dagster.testing import Clock

KEYS = 50_000
EXPIRING = 1_000_000
WINDOW = 6_000
"""So many places an event may lie from where it would lie in order: a dozen batches of 500."""
PER_COMMIT = 500
TARGET_RATE = 50_000
ORDERS, PAYMENTS, SHIPMENTS = INPUTS = tuple(
    Topic(name, key="order") for name in ("join_orders", "join_payments", "join_shipments")
)
JOINED = Topic("joined", key="order")
_BODY = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz ", k=1000))
_numbers = counter()


def part(key: int, which: int) -> Event:
    """One part of a key."""
    at = (key * 31 + which * 7) % 760
    data = {"order": f"order-{key:09d}", "amount": key % 997 + which, "body": _BODY[at : at + 240]}
    return Event(type=INPUTS[which].name, source="/bench", data=data)


def total(key: int) -> int:
    """What the amounts of its parts add up to."""
    return 3 * (key % 997) + 3


def shuffled(keys: int) -> list[tuple[int, int]]:
    """All parts of all keys, out of order within the window, the same every time."""
    chance = random.Random(11)
    places = ((number + chance.random() * WINDOW, number) for number in range(3 * keys))
    return [divmod(number, 3) for _, number in sorted(places)]


def run(settings: Settings) -> list[Row]:
    """Ours and the peer, in turns; then what expires."""
    keys = settings.events(KEYS)
    count = 3 * keys
    state = settings.folder / "join-state"
    batches: dict[str, int] = {}
    with open_stream(settings.folder / "join.db") as stream:
        for topic in (*INPUTS, JOINED):
            stream.create_topic(topic)
        peer = SqliteJoin(settings.folder / "join-peer.db")
        for some in _pieces(shuffled(keys), PER_COMMIT):
            events = [part(*one) for one in some]
            for topic in INPUTS:
                stream.publish(topic, [event for event in events if event.type == topic.name])
            peer.append([BareEvent(**msgspec.structs.asdict(event)) for event in events])

        def ours(name: str, **given: Any) -> float:
            member = _join(**given)
            start = stream.log.spans([JOINED.name])[TopicPartition(JOINED.name, 0)].end
            reports: list[RunReport] = []
            took = seconds(lambda: reports.append(run_pending(stream, member, state_folder=state)))
            _require_joined(stream, keys, start)
            assert reports[0].batches[-1].gauges["pending_keys"] == 0
            batches[name] = len(reports[0].batches)
            return took

        def theirs(name: str, at_once: int) -> float:
            peer.begin()
            took = seconds(lambda: peer.run(at_once))
            peer.require_joined(keys)
            batches[name] = -(-count // (at_once * PER_COMMIT))
            return took

        few = Threshold(events=PER_COMMIT + PER_COMMIT // 2)  # it ends where an append ends: at most so many
        loops: dict[str, Callable[[str], float]] = {
            "ours": partial(ours, max_batch=few),
            "peer": partial(theirs, at_once=1),
            "ours, deadline": partial(ours, max_batch=few, deadline="1h"),
            "ours, large": ours,
            "peer, large": partial(theirs, at_once=20),
            "ours, large, deadline": partial(ours, deadline="1h"),
        }
        took = alternate(settings.rounds, {name: partial(loop, name) for name, loop in loops.items()})
        peer.close()
    return [*_rows(took, count, batches), *_expiry(settings)]


def _rows(took: dict[str, list[float]], count: int, batches: dict[str, int]) -> list[Row]:
    pairs = (
        ("ours", "peer"),
        ("ours, deadline", "peer"),
        ("ours, large", "peer"),
        ("ours, large, deadline", "peer"),
        ("ours, large", "peer, large"),
        ("ours, large, deadline", "peer, large"),
    )
    rows = []
    for mine, other in pairs:
        what = (
            f"join of 3 topics{', deadline' * ('deadline' in mine)}: {batches[mine]} commits / SQLite, {batches[other]}"
        )
        rows.append(against(what, count, took[mine], took[other], 2))
    for name in ("ours", "ours, deadline", "ours, large", "ours, large, deadline"):
        reached = count / statistics.median(took[name])
        what = f"join of 3 topics{', deadline' * ('deadline' in name)}: {batches[name]} commits"
        rows.append(
            Row(what, f"{reached / 1000:,.0f} k/s", target=f"≥ {TARGET_RATE // 1000} k/s", met=reached >= TARGET_RATE)
        )
    return rows


def _pieces(given: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(given), size):
        yield given[start : start + size]


# Ours


def _join(**given: Any) -> Join:
    """A join in a group of its own, from the beginning, to an empty topic."""

    @join(
        inputs={"order": ORDERS, "payment": PAYMENTS, "shipment": SHIPMENTS},
        key="order",
        emits=[JOINED],
        group=f"join-{next(_numbers)}",
        max_buffer_bytes="1GiB",
        **given,
    )
    def joined(parts: Any) -> None:
        amount = parts["order"].data["amount"] + parts["payment"].data["amount"] + parts["shipment"].data["amount"]
        parts.emit(Event(type="joined", source="/bench", data={"order": parts.key, "amount": amount}))

    return joined


def _require_joined(stream: EventStream, keys: int, start: int) -> None:
    """Every key once from there on, and each with its amount."""
    records = list(stream.records(JOINED, 0, start=start))
    found = {record.data["order"]: record.data["amount"] for record in records}
    assert len(records) == len(found) == keys, f"{len(records)} joined, {len(found)} different, of {keys}"
    assert found == {f"order-{key:09d}": total(key) for key in range(keys)}


# The peer

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(BareEvent).decode
_decode_many = msgspec.msgpack.Decoder(list[BareEvent]).decode


class SqliteJoin:
    """A log of its own, and the join."""

    def __init__(self, path: Path) -> None:
        self._db = db = sqlite3.connect(path, isolation_level=None)
        # The same settings as djp_dagster.streams.sql.database.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "cache_size=-16384", "journal_size_limit=67108864"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE TABLE batches (number INTEGER PRIMARY KEY, blob BLOB)")
        db.execute("CREATE TABLE position (next INTEGER)")
        db.execute("CREATE TABLE parts (key TEXT, part TEXT, event BLOB, PRIMARY KEY (key, part)) WITHOUT ROWID")
        db.execute("CREATE TABLE joined (key TEXT, event BLOB)")
        db.execute("INSERT INTO position VALUES (1)")

    def append(self, events: Sequence[BareEvent]) -> None:
        """One record batch."""
        self._db.execute("INSERT INTO batches (blob) VALUES (?)", (_encode(events),))

    def begin(self) -> None:
        """From the beginning of the log, with nothing else."""
        for statement in ("UPDATE position SET next = 1", "DELETE FROM parts", "DELETE FROM joined"):
            self._db.execute(statement)
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def run(self, batches: int) -> None:
        """All of the log, so many of its record batches a transaction."""
        while self._transaction(batches):
            pass

    def _transaction(self, batches: int) -> bool:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        (position,) = db.execute("SELECT next FROM position").fetchone()
        blobs = db.execute(
            "SELECT blob FROM batches WHERE number >= ? ORDER BY 1 LIMIT ?", (position, batches)
        ).fetchall()
        parts = [(event.data["order"], event.type, event) for (blob,) in blobs for event in _decode_many(blob)]
        db.executemany("INSERT OR IGNORE INTO parts VALUES (?, ?, ?)", [(*at, _encode(event)) for *at, event in parts])
        keys = list({key for key, _, _ in parts})
        marks = ",".join("?" * len(keys))
        complete: dict[str, dict[str, BareEvent]] = {}
        for key, name, event in db.execute(
            f"SELECT key, part, event FROM parts WHERE key IN "
            f"(SELECT key FROM parts WHERE key IN ({marks}) GROUP BY key HAVING COUNT(*) = 3)",
            keys,
        ):
            complete.setdefault(key, {})[name] = _decode(event)
        out = [(key, _encode(_joined(key, found))) for key, found in complete.items()]
        db.executemany("INSERT INTO joined VALUES (?, ?)", out)
        db.executemany("DELETE FROM parts WHERE key = ?", [(key,) for key in complete])
        db.execute("UPDATE position SET next = ?", (position + len(blobs),))
        db.execute("COMMIT")
        return bool(blobs)

    def require_joined(self, keys: int) -> None:
        """Every key once, each with its amount, and no part left."""
        found = [(key, _decode(event).data["amount"]) for key, event in self._db.execute("SELECT * FROM joined")]
        assert sorted(found) == [(f"order-{key:09d}", total(key)) for key in range(keys)]
        assert self._db.execute("SELECT COUNT(*) FROM parts").fetchone() == (0,)

    def close(self) -> None:
        self._db.close()


def _joined(key: str, parts: dict[str, BareEvent]) -> BareEvent:
    amount = (
        parts[ORDERS.name].data["amount"] + parts[PAYMENTS.name].data["amount"] + parts[SHIPMENTS.name].data["amount"]
    )
    return BareEvent(id=f"joined-{key}", source="/bench", type="joined", data={"order": key, "amount": amount})


# What expires


def _expiry(settings: Settings) -> list[Row]:
    count = settings.events(EXPIRING)
    rows = []
    for on_deadline in ("dead_letter", "partial"):
        folder = settings.folder / f"expiry-{on_deadline}"
        folder.mkdir()
        command = [sys.executable, "-m", __name__, str(folder), str(count), on_deadline]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=3600)
        shutil.rmtree(folder)
        for phase, (took_s, peak, idle, stream, state) in json.loads(done.stdout.splitlines()[-1]).items():
            figures = (
                f"{took_s:.1f} s, {rate(count, took_s)}; peak {peak:,} MiB, {idle:,} before; "
                f"disk: stream {stream:,} MiB, state {state:,} MiB"
            )
            rows.append(Row(f"{count:,} incomplete keys, {on_deadline}: {phase}", figures))
    return rows


def _expire(folder: Path, count: int, on_deadline: Any) -> dict[str, tuple[float, int, int, int, int]]:
    """Publish, fill the buffer, let it all expire; what each took."""
    clock = Clock()

    @join(
        inputs={"order": ORDERS, "payment": PAYMENTS},
        key="order",
        deadline="1h",
        on_deadline=on_deadline,
        emits=[JOINED],
        max_buffer_bytes="4GiB",
    )
    def waiting(parts: Any) -> None:
        assert parts.missing == ("payment",)
        parts.emit(Event(type="joined", source="/bench", data={"order": parts.key}))

    found: dict[str, tuple[float, int, int, int, int]] = {}
    with open_stream(folder / "stream.db", clock=clock) as stream:
        waiting.register(stream)

        def publish() -> None:
            for start in range(0, count, BATCH):
                stream.publish(ORDERS, [part(key, 0) for key in range(start, start + BATCH)])
                clock.advance(0.001)

        def work() -> None:
            reports.extend(run_pending(stream, waiting, state_folder=folder / "state").batches)

        reports: list[BatchReport] = []
        found["published"] = _phase(folder, publish)
        found["waiting"] = _phase(folder, work)
        assert reports[-1].gauges["pending_keys"] == count
        clock.advance(7200)
        found["expired"] = _phase(folder, work)
        assert reports[-1].gauges["pending_keys"] == 0
        assert sum(report.counts.get("expired_keys", 0) for report in reports) == count
        letters = sum(report.dead_letters for report in reports)
        emitted = stream.log.spans([JOINED.name])[TopicPartition(JOINED.name, 0)].end
        assert (letters, emitted) == ((count, 0) if on_deadline == "dead_letter" else (0, count))
    return found


def _phase(folder: Path, work: Callable[[], object]) -> tuple[float, int, int, int, int]:
    """Seconds; peak of the resident memory, and what it was before; bytes of the stream's files and of the state's."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
    idle, started = memory("VmRSS"), time.perf_counter()
    work()
    took_s = time.perf_counter() - started
    peak = memory("VmHWM")
    state = sum(path.stat().st_size for path in (folder / "state").rglob("*") if path.is_file())
    stream = sum(path.stat().st_size for path in folder.glob("stream.db*") if path.is_file())
    return took_s, *(size // MIB for size in (peak, idle, stream, state))


if __name__ == "__main__":
    print(json.dumps(_expire(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
