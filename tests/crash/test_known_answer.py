"""The Wikipedia edits, published, consumed under random kills, counted: equal to answers that nobody here computed."""

import csv
import gzip
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest

import djp_dagster as djp
from tests.crash.conftest import Arena, wait_for
from tests.crash.oracle import Books, check_local_files, check_snapshots, decoded
from tests.crash.world import LEASE_S, PATIENT, announce, until_stopped

pytestmark = pytest.mark.crash

EDITS = djp.Topic("edits", partitions=4, key="channel")
Totals = dict[str, list[int]]


@djp.consumer(
    topic=EDITS,
    stateful=True,
    max_batch=djp.Threshold(events=400),
    retry=PATIENT,
    snapshots=djp.SnapshotPolicy(changes=200),
)
def totals(batch: djp.Batch) -> None:
    """Edits, added and deleted, per hour and per channel."""
    for record in batch:
        edit = record.data
        for key in ("hour " + edit["time"][:13], "channel " + edit["channel"]):
            edits, added, deleted = batch.state.get(key, (0, 0, 0))
            batch.state.set(key, (edits + 1, added + edit["added"], deleted + edit["deleted"]))


def count(folder: str) -> None:
    """A worker process."""
    with djp.open_stream(Path(folder) / "stream.db") as stream:
        worker = djp.Worker(stream, [totals], lease=LEASE_S, state_folder=Path(folder) / "state")
        announce(folder)
        worker.run(until_stopped(folder))


def publish(stream: djp.EventStream, path: Path) -> int:
    with gzip.open(path, "rt") as lines:
        events = [EDITS.event(json.loads(line)) for line in lines]
    for start in range(0, len(events), 1000):
        stream.publish(EDITS, events[start : start + 1000])
    return len(events)


def counted(books: Books) -> tuple[Totals, Totals]:
    """The state of every task, from snapshots and changelogs; tasks added up."""
    sums: dict[str, Totals] = {"hour": defaultdict(lambda: [0, 0, 0]), "channel": defaultdict(lambda: [0, 0, 0])}
    for task in books.tasks("totals"):
        for key, values in decoded(books.state("totals", task)).items():
            kind, _, name = key.partition(" ")
            sums[kind][name] = [old + new for old, new in zip(sums[kind][name], values, strict=True)]
    return dict(sums["hour"]), dict(sums["channel"])


def answers(path: Path) -> Totals:
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return {name: [int(value) for value in values] for name, *values in rows}


def test_wikipedia_edits_under_random_kills(arena: Arena, seed: random.Random, shared_data: Path) -> None:
    with djp.open_stream(arena.folder / "stream.db") as stream:
        totals.register(stream)
        published = publish(stream, shared_data / "wikiticker-2015-09-12-sampled.json.gz")
    assert published == 39_244
    alive = [arena.start(count), arena.start(count)]
    kills = 0
    while not arena.books.everything_done():
        victim = seed.randrange(2)
        arena.wait_until_at_work(alive[victim])
        time.sleep(seed.uniform(0.1, 0.5))  # the experiment: where in its work the victim is
        alive[victim].kill()
        alive[victim] = arena.start(count)
        kills += 1
    wait_for(arena.books.everything_done, "the edits to be counted")
    arena.settle()
    assert kills >= 3
    assert check_snapshots(arena.books, "totals", keep=2)
    assert check_local_files(arena.books, ["totals"])
    hours, channels = counted(arena.books)
    assert hours == answers(shared_data / "answers" / "wikiticker.per_hour.tsv")
    assert channels == answers(shared_data / "answers" / "wikiticker.per_channel.tsv")
