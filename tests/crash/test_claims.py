"""SIGKILL between payload and token, and between handler and commit: payloads too many at most, and those are found."""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from djp_dagster.streams.claimed import ClaimedRecord
from djp_dagster.streams.records import Record
from tests.crash import heavy_world
from tests.crash.conftest import Arena, wait_for
from tests.streams.heavy import grow_old

pytestmark = pytest.mark.crash

KEY = re.compile(rb"sha256/[0-9a-f]{2}/[0-9a-f]{62}(?:\.zst)?|attempts/[A-Za-z0-9_.\-=/]+\.json")


def stored(folder: Path) -> set[str]:
    """The keys of all payloads, as the file system has them."""
    root = folder / "stream-payloads"
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    keys = {Path(*path.parts[1:]).as_posix() for path in paths}
    return {key for key in keys if key.startswith(("sha256/", "attempts/"))}


def referred_to(folder: Path) -> set[str]:
    """The keys that the stream's file names, as sqlite3 reads it."""
    found: set[bytes] = set()
    with sqlite3.connect(f"file:{folder / 'stream.db'}?mode=ro", uri=True, timeout=30) as db:
        for query in (
            "SELECT blob FROM djp_record_batches",
            "SELECT raw FROM djp_dead_letters",
            "SELECT CAST(payload AS BLOB) FROM djp_outputs",
        ):
            for (held,) in db.execute(query):
                found.update(KEY.findall(held))
    db.close()
    return {key.decode() for key in found}


def orphans(folder: Path) -> set[str]:
    return stored(folder) - referred_to(folder)


def records(folder: Path, topic: str) -> list[Record]:
    with heavy_world.open_world(str(folder)) as stream:
        found = [r for partition in range(heavy_world.PARTITIONS) for r in stream.records(topic, partition)]
        for record in found:
            if isinstance(record, ClaimedRecord):
                record.keep()
    return found


def check(arena: Arena, seed: int, total: int) -> None:
    """Every publish and every effect once, whole; and collection condemns what is left over, and only that."""
    wanted = {
        event.data["n"]: event.data for number in range(1, total + 1) for event in heavy_world.uploads_of(number, seed)
    }
    uploads, made = records(arena.folder, "uploads"), records(arena.folder, "made")
    assert Counter(record.data["n"] for record in uploads) == Counter(wanted.keys())
    assert all(record.data == wanted[record.data["n"]] for record in uploads)
    assert any(record.claim is not None for record in uploads)
    assert Counter(record.data["n"] for record in made) == Counter(wanted.keys())
    assert all(record.data["text"] == wanted[record.data["n"]]["text"][::-1] for record in made)
    assert len({record.id for record in made}) == len(made)
    seen = [tuple(position) for output in arena.books.outputs("make") for position in output["seen"]]
    assert sorted(seen) == sorted((record.partition, record.offset) for record in uploads)
    assert arena.books.dead_letters("make") == []
    left_over = orphans(arena.folder)
    grow_old(arena.folder / "stream-payloads")
    with heavy_world.open_world(str(arena.folder)) as stream:
        report = stream.collect_payloads(grace="10min", dry_run=False)
    assert {found.key for found in report.garbage} == left_over
    assert {found.fate for found in report.garbage} <= {"condemned"}
    assert report.in_use == len(stored(arena.folder)) - len(left_over)


class TestAtPublish:
    """The payloads of a publish are stored, its events are not."""

    def die(self, arena: Arena, salt: int, *, at: int) -> None:
        victim = arena.start(heavy_world.publish, 10, salt, die_at=at)
        wait_for(lambda: victim.exitcode is not None, "the publisher to die")
        assert victim.exitcode == -9

    def test_nobody_repeats_it(self, arena: Arena, seed: random.Random) -> None:
        salt = seed.randrange(1 << 30)
        self.die(arena, salt, at=6)
        heavy = sum(len(event.data["text"]) > 1000 for event in heavy_world.uploads_of(6, salt))
        assert len(orphans(arena.folder)) == heavy
        arena.start(heavy_world.work)
        arena.settle()
        check(arena, salt, total=5)

    def test_who_repeats_it_finds_them_stored(self, arena: Arena, seed: random.Random) -> None:
        salt = seed.randrange(1 << 30)
        for at in (1, 4, 4):
            self.die(arena, salt, at=at)
        arena.start(heavy_world.publish, 10, salt)
        wait_for(lambda: sum(1 for _ in arena.books.topic("uploads")) == 30, "all to be published")
        assert orphans(arena.folder) == set()
        arena.start(heavy_world.work)
        arena.settle()
        check(arena, salt, total=10)


@pytest.mark.parametrize(
    ("point", "leaves_some"),
    [("4.handling", False), ("4.handled", True), ("5.stored", True), ("6.committed", False)],
)
def test_a_kill_while_a_batch_is_done(arena: Arena, seed: random.Random, point: str, leaves_some: bool) -> None:
    salt = seed.randrange(1 << 30)
    heavy_world.publish(str(arena.folder), 12, salt)
    victim = arena.start(heavy_world.work, point=point, hit=2)
    wait_for(lambda: victim.exitcode is not None, f"the death at {point}")
    assert victim.exitcode == -9
    assert bool(orphans(arena.folder)) == leaves_some
    arena.start(heavy_world.work)
    arena.settle()
    # What the dead attempt has stored is there as it was: another attempt made something else.
    assert bool(orphans(arena.folder)) == leaves_some
    check(arena, salt, total=12)


def test_random_kills(arena: Arena, seed: random.Random) -> None:
    """A publisher and two workers under load; they die at random moments and are started anew."""
    salt, total, kills = seed.randrange(1 << 30), 60, 15
    heavy_world.open_world(str(arena.folder)).close()
    roles: list[tuple[Callable[..., None], tuple[int, ...]]] = [
        (heavy_world.publish, (total, salt)),
        (heavy_world.work, ()),
        (heavy_world.work, ()),
    ]
    alive = [arena.start(role, *arguments) for role, arguments in roles]
    for _ in range(kills):
        # The pause is the experiment: where in its work the victim is when it dies.
        time.sleep(seed.uniform(0.05, 0.4))
        victim = seed.randrange(len(roles))
        alive[victim].kill()
        role, arguments = roles[victim]
        alive[victim] = arena.start(role, *arguments)
    wait_for(lambda: sum(1 for _ in arena.books.topic("uploads")) == 3 * total, "all to be published")
    arena.settle()
    check(arena, salt, total)
