"""Counting the events of each key in state, with a commit every 1,000 events, against Quix Streams with RocksDB.

Every event changes the count of its user, and within a batch hardly any user comes twice. A commit of ours is durable
before the next batch begins: offsets and changelog in one transaction of the stream, synced to disk; then the local
state, which is a cache of the changelog and is not synced. The time of ours has all of it, the lease and the
registration, too.

Quix counts in `State` of its messages' keys. Its state lies in RocksDB, which writes its log without a sync. It is
timed from its first message to its last, so that its start and the last checkpoint are not counted. Two variants: with
changelog topics, to a broker in memory that does not sync; and without, where the state of a lost disk is lost.

After each run the counts of all users are compared with those of a dictionary, outside the time.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count as counter
from pathlib import Path
from typing import Any

from benchmarks.append import ORDERS
from benchmarks.harness import BATCH, Row, Settings, against, alternate, order, order_event, seconds
from benchmarks.quix import broker, broker_program, child
from djp_dagster import (
    Batch,
    Consumer,
    EventStream,
    Record,
    Threshold,
    TopicPartition,
    consumer,
    open_stream,
    run_pending,
)
from djp_dagster.state.keys import decode_key
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.records import decode_value
from djp_dagster.streams.topics import changelog_of

EVENTS = 200_000
USERS = 10_007
"""How many different users there are in the orders."""
_BY_DEFAULT = 0
"""A commit every so many events: whatever each side does unless told."""
_numbers = counter()


def one_by_one(batch: Batch) -> None:
    """Get and set for every event."""
    state = batch.state
    for record in batch:
        user = record.data["user_id"]
        state.set(user, state.get(user, 0) + 1)


def prefetched(batch: Batch) -> None:
    """One look-up for all users of a list of records, then a set for every event."""
    state = batch.state
    for records in batch.chunks():
        counts = state.get_many({record.data["user_id"] for record in records})
        for record in records:
            user = record.data["user_id"]
            counts[user] = counts.get(user, 0) + 1
            state.set(user, counts[user])


def isolated(record: Record, batch: Batch) -> None:
    """As one_by_one, where a failing event is taken back alone."""
    user = record.data["user_id"]
    batch.state.set(user, batch.state.get(user, 0) + 1)


def group_of(handler: Callable[..., None], every: int = BATCH) -> Consumer:
    """A consumer of the handler in a group of its own, from the beginning, committing every so many events."""
    named = {"topic": ORDERS, "group": f"{handler.__name__}-{next(_numbers)}", "stateful": True}
    if every != _BY_DEFAULT:
        named["max_batch"] = Threshold(events=every)
    if handler is isolated:
        named["isolate"] = "per_event"
    return consumer(**named)(handler)  # type: ignore[arg-type]


def run(settings: Settings) -> list[Row]:
    """Three ways on our side against the one there is in Quix, twice."""
    count = settings.events(EVENTS)
    expected = expected_counts(count)
    with open_stream(settings.folder / "stateful.db") as stream:
        fill(stream, count)

        def ours(handler: Callable[..., None], every: int = BATCH) -> float:
            member = group_of(handler, every)
            took = seconds(lambda: run_pending(stream, member, state_folder=settings.folder / "stateful"))
            assert counts_in(stream, member, settings.folder / "stateful") == expected, f"{member.group} counted wrong"
            return took

        loops: dict[str, Callable[[], float]] = {
            "one_by_one": partial(ours, one_by_one),
            "prefetched": partial(ours, prefetched),
            "isolated": partial(ours, isolated),
            "large": partial(ours, one_by_one, _BY_DEFAULT),
        }
        if (program := broker_program()) is None:
            print("  noida-db is missing (make bench installs it): without the peer", file=sys.stderr)
            took = alternate(settings.rounds, loops)
            return [Row(f"stateful count, {name}", _rate(count, figures)) for name, figures in took.items()]
        with broker(program, settings.folder / "stateful-broker") as address:
            child("benchmarks.quix", "produce", address, count)
            for name, changelog, every in (("bare", 0, BATCH), ("changelog", 1, BATCH), ("default", 1, _BY_DEFAULT)):
                loops[f"quix {name}"] = partial(child, __name__, address, count, changelog, every)
            took = alternate(settings.rounds, loops)
    pairs = (
        ("get + set / Quix, no changelog", "one_by_one", "quix bare"),
        ("get_many + set / Quix, no changelog", "prefetched", "quix bare"),
        ("per_event / Quix, no changelog", "isolated", "quix bare"),
        ("get + set / Quix, changelog not synced", "one_by_one", "quix changelog"),
        ("get + set, own commits / Quix, own commits, changelog", "large", "quix default"),
    )
    return [against(f"stateful count: {what}", count, took[mine], took[peer], 1.5) for what, mine, peer in pairs]


def _rate(count: int, figures: list[float]) -> str:
    return f"{count / sorted(figures)[len(figures) // 2] / 1000:,.0f} k/s"


def fill(stream: EventStream, count: int) -> None:
    """Publish the orders."""
    stream.create_topic(ORDERS)
    for start in range(0, count, BATCH):
        stream.publish(ORDERS, [order_event(number) for number in range(start, start + BATCH)])


def expected_counts(count: int) -> Mapping[Any, int]:
    """What everybody must come to."""
    return Counter(order(number)["user_id"] for number in range(count))


def counts_in(stream: EventStream, member: Consumer, folder: Path) -> dict[Any, int]:
    """The group's local state, which must be that of its changelog."""
    changelog = TopicPartition(changelog_of(member.group), 0)
    local = _read(TaskStore(folder / stream.incarnation[:12] / member.group / "0.db", stream.log, changelog))
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        restored = TaskStore(Path(fresh) / "0.db", stream.log, changelog)
        restored.catch_up()
        assert _read(restored) == local, f"the changelog of {member.group} differs from its state"
    return local


def _read(store: TaskStore) -> dict[Any, int]:
    found = {decode_key(key): decode_value(raw) for key, raw in store.file.items()}
    store.close()
    return found


# The peer, in a process of its own


def _quix(address: str, count: int, *, changelog: bool, every: int) -> float:
    import uuid

    from quixstreams import Application, State

    with tempfile.TemporaryDirectory(prefix="quix-state-") as folder:
        app = Application(
            broker_address=address,
            consumer_group=f"bench-{uuid.uuid4().hex}",
            auto_offset_reset="earliest",
            state_dir=folder,
            use_changelog_topics=changelog,
            loglevel="WARNING",
            **({"commit_every": every, "commit_interval": 3600} if every != _BY_DEFAULT else {}),
        )
        seen = 0
        first = last = 0.0

        def handle(value: dict[str, Any], state: State) -> None:
            nonlocal seen, first, last
            if seen == 0:
                first = time.perf_counter()
            seen += 1
            state.set("count", state.get("count", 0) + 1)
            if seen == count:
                last = time.perf_counter()

        frame = app.dataframe(app.topic("orders", value_deserializer="json"))
        frame.update(handle, stateful=True)
        app.run(count=count, timeout=60, collect=False)
        assert seen == count, f"{seen} of {count}"
        assert dict(_counts_of_quix(Path(folder))) == expected_counts(count), "Quix counted wrong"
    return last - first


def _counts_of_quix(folder: Path) -> Iterator[tuple[str, int]]:
    """What lies in its RocksDB: ``user|"count"``, and the number as JSON."""
    from rocksdict import AccessType, Options, Rdict

    (path,) = {found.parent for found in folder.rglob("CURRENT")}
    database = Rdict(str(path), options=Options(raw_mode=True), access_type=AccessType.read_only())
    for key, value in database.items():
        yield bytes(key).partition(b"|")[0].decode(), json.loads(value)
    database.close()


if __name__ == "__main__":
    given = sys.argv[1:]
    print(_quix(given[0], int(given[1]), changelog=bool(int(given[2])), every=int(given[3])))
