"""SIGKILL and stalls in a world of joins, tables and snapshots, on hosts that share no disk; checked from outside."""

import random
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster.testing import CRASH_POINTS
from tests.crash import joined_world as world
from tests.crash.conftest import Arena, wait_for
from tests.crash.joined_oracle import JoinedBooks, by_status, catalog_of, check, sellers_of
from tests.crash.oracle import DATA, check_local_files

pytestmark = pytest.mark.crash

DEADLINE_S = 1.5
ALL = list(world.NAMES)
OTHERS = [name for name in ALL if name != "create"]


class JoinedArena(Arena):
    """An arena of `tests.crash.joined_world`, whose processes have half of the time a disk of their own."""

    def __init__(self, folder: Path, context: ForkServerContext, seed: random.Random) -> None:
        super().__init__(folder, context, JoinedBooks)
        self.seed, self.salt, self.deadline_s = seed, seed.randrange(1 << 30), DEADLINE_S
        self.published: dict[int, Any] = {}

    @property
    def joined(self) -> JoinedBooks:
        books = self.books
        assert isinstance(books, JoinedBooks)
        return books

    def wait_for_ever(self) -> None:
        """From now on no product expires, and what waits is done."""
        self.deadline_s, self.open_books = world.LONG_S, partial(JoinedBooks, until_expired=False)

    def begin(self, role: Any, names: list[str], *, fresh: bool | None = None, **options: Any) -> ForkServerProcess:
        """A process, on the host of the others, or (at random, unless told) on another one whose disk is empty."""
        fresh = self.seed.random() < 0.5 if fresh is None else fresh
        state = f"host-{len(self.processes)}" if fresh else "state"
        return self.start(role, names, self.deadline_s, state=state, **options)

    def publish(self, first: int, last: int) -> None:
        """The publishes of these numbers, by a named producer."""
        self.expect(first, last)
        with world.open_world(self.folder, self.deadline_s) as stream:
            producer = stream.producer("uploader")
            for number in range(first, last + 1):
                producer.publish("uploads", world.uploads_of(number, self.salt), sequence=number)

    def expect(self, first: int, last: int) -> None:
        """These publishes are made, by whoever."""
        events = [event for number in range(first, last + 1) for event in world.uploads_of(number, self.salt)]
        self.published.update({event.data["n"]: event.data for event in events})

    def check(self) -> dict[str, set[str]]:
        """The whole oracle, and that everything can be restored; the products by how they ended."""
        ended = by_status(check(self.joined, self.published, self.deadline_s))
        self._check_restored(ended)
        return ended

    def _check_restored(self, ended: dict[str, set[str]]) -> None:
        """On an empty disk the state is what the oracle says, by the package's own look and to the byte."""
        known, empty = world.consumers(self.deadline_s), Path(tempfile.mkdtemp(prefix="empty-", dir=self.folder))
        with djp.open_stream(self.folder / "stream.db") as stream:
            with stream.view(known["create"], folder=empty) as view:
                statuses = {key: value["status"] for key, value in view.items() if key != b"s"}
            with stream.view(known["catalog"], folder=empty) as view:
                pages, table = dict(view.items()), catalog_of(self.joined)
                assert view.get_many(table) == pages
            with stream.view(known["sellers"], folder=empty) as view:
                counted = list(view.items())
        assert statuses == {product: status for status, products in ended.items() for product in products}
        assert pages == {product: page for product, (_, page) in table.items() if page is not None}
        wanted = [pair for task in range(world.PARTITIONS) for pair in sellers_of(self.joined, task).items()]
        assert sorted(counted) == sorted(wanted)
        before = len([file for file in self.joined.local_files() if file.path.is_relative_to(empty)])
        assert before == 3 * world.PARTITIONS
        assert check_local_files(self.joined, ("create", "catalog", "sellers")) >= before


@pytest.fixture
def joined(tmp_path: Path, fork_server: ForkServerContext, seed: random.Random) -> Iterator[JoinedArena]:
    arena = JoinedArena(tmp_path, fork_server, seed)
    yield arena
    arena.close()


def died(process: ForkServerProcess) -> bool:
    assert process.exitcode in (None, -9), f"{process} ended with {process.exitcode}"
    return process.exitcode == -9


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_every_point(joined: JoinedArena, seed: random.Random, point: str) -> None:
    joined.publish(1, 15)
    # It has all three tasks for itself, so it comes to every point more than once.
    victim = joined.begin(world.work, ["create"], point=point, hit=seed.randint(1, 2))
    joined.begin(world.work, OTHERS, point=point, hit=seed.randint(4, 20))
    joined.begin(world.run, ["catalog", "sellers"], point=point, hit=seed.randint(1, 3))
    joined.begin(world.work, list(world.PARTS))
    wait_for(lambda: died(victim), f"the join to die at {point}")
    joined.begin(world.run, seed.sample(ALL, len(ALL)))
    joined.begin(world.work, ALL)
    # What comes now of products that were slow is late.
    wait_for(joined.books.everything_done, "the first deadlines to pass")
    joined.publish(16, 25)
    joined.settle()
    ended = joined.check()
    assert ended["completed"]
    assert ended["expired"]
    assert not ended["pending"]
    assert joined.books.topic("late-parts"), "nothing came late: this test shows nothing"


def epochs(books: JoinedBooks, owner: str = "%") -> dict[int, int]:
    """The epochs of the join's tasks, of those that an owner of such a name holds."""
    rows = books.db.execute(
        "SELECT task, epoch FROM djp_tasks JOIN djp_groups USING (group_id) WHERE name = 'create' AND owner LIKE ?",
        (owner,),
    )
    return dict(rows.fetchall())


def hand_over(arena: JoinedArena, held: dict[int, int], number: int) -> ForkServerProcess:
    """Another worker takes all the join's tasks that ``held`` names, for the ``number``-th time, and commits."""
    successor = arena.begin(world.work, ["create"])
    committed = {at: offset for at, offset in arena.books.committed().items() if at[0] == "create"}

    def has_happened() -> bool:
        now, after = epochs(arena.joined, f"%-{successor.pid}-%"), arena.books.committed()
        taken = all(now.get(task, 0) >= epoch + number for task, epoch in held.items())
        return taken and any(after[at] > offset for at, offset in committed.items())

    arena.publish(10 * number + 1, 10 * number + 10)
    wait_for(has_happened, f"hand-over {number} of {held}")
    return successor


@pytest.mark.parametrize(
    ("point", "own_disk"),
    [("4.handled", False), ("6.committed", False), ("6.committed", True), ("9.snapshot_stored", False)],
)
def test_a_stalled_worker_comes_back_after_two_hand_overs(joined: JoinedArena, point: str, own_disk: bool) -> None:
    joined.publish(1, 10)
    joined.begin(world.work, OTHERS)
    zombie = joined.begin(world.work, ["create"], fresh=own_disk, point=point, how="stop")
    joined.wait_until_stopped(zombie, point)
    held = epochs(joined.joined, f"%-{zombie.pid}-%")
    assert held
    hand_over(joined, held, 1).kill()
    hand_over(joined, held, 2)
    wait_for(joined.books.everything_done, "the others to finish")
    joined.wake(zombie)
    joined.publish(31, 34)
    joined.settle()
    assert zombie.exitcode == 0
    ended = joined.check()
    assert ended["completed"]
    assert ended["expired"]
    known = {(task, one.epoch) for task in held for one in joined.books.snapshots("create", task)}
    assert point != "9.snapshot_stored" or not known & set(held.items()), "a fenced holder made a snapshot known"


class Crowd:
    """A changing number of workers and runs, each with some of the consumers; together they have all."""

    def __init__(self, arena: JoinedArena, seed: random.Random) -> None:
        self.arena, self.seed = arena, seed
        self.alive: list[ForkServerProcess] = []

    def grow(self) -> None:
        """One more, of a random kind."""
        names = self.seed.sample(ALL, self.seed.randint(3, 5))
        role = self.seed.choice([world.work, world.work, world.run])
        self.alive.append(self.arena.begin(role, names))

    def kill_one(self) -> None:
        """A random one, at a random moment after it has begun to work; what replaces it is none, one or two."""
        victim = self.alive.pop(self.seed.randrange(len(self.alive)))
        self.arena.wait_until_at_work(victim)
        # The pause is the experiment: where in its work the victim is when it dies.
        time.sleep(self.seed.uniform(0.0, 0.2))
        victim.kill()
        while len(self.alive) < self.seed.randint(2, 4):
            self.grow()


def random_kills(joined: JoinedArena, seed: random.Random, kills: int) -> dict[str, set[str]]:
    """A publisher and a crowd under load; ``kills`` of them die at random moments; how the products ended."""
    world.open_world(joined.folder, joined.deadline_s).close()
    publisher = joined.start(world.publish, joined.salt, joined.deadline_s)
    crowd = Crowd(joined, seed)
    for _ in range(3):
        crowd.grow()
    before = joined.books.committed()
    for number in range(kills):
        if number % 10 == 9:
            publisher.kill()
            publisher = joined.start(world.publish, joined.salt, joined.deadline_s)
        else:
            crowd.kill_one()
        now = joined.books.committed()
        assert all(now[key] >= offset for key, offset in before.items()), "a committed offset went back"
        before = now
    (joined.folder / world.ENOUGH).touch()
    wait_for(lambda: publisher.exitcode == 0, "the publisher to end")
    joined.expect(1, joined.joined.last_sequence("uploader"))
    joined.begin(world.work, ALL)
    joined.settle()
    return joined.check()


def test_100_random_kills_under_load(joined: JoinedArena, seed: random.Random) -> None:
    joined.deadline_s = 3.0
    _require_telling(joined, random_kills(joined, seed, 100))


@pytest.mark.soak
def test_1000_random_kills_under_load(joined: JoinedArena, seed: random.Random) -> None:
    joined.deadline_s = 3.0
    _require_telling(joined, random_kills(joined, seed, 1000))


def _require_telling(joined: JoinedArena, ended: dict[str, set[str]]) -> None:
    """The kills have hit what they are about."""
    print({status: len(products) for status, products in ended.items()})
    assert ended["completed"]
    assert ended["expired"]
    assert ended["failed"]
    assert not ended["pending"]
    assert joined.books.topic("late-parts")
    for group in ("create", "catalog"):
        begins = [joined.books.changelog_span(group, task)[0] for task in range(world.PARTITIONS)]
        assert all(begins), f"the changelog of {group} was never compacted, it begins at {begins}"


def test_with_a_long_deadline_kills_change_nothing(
    joined: JoinedArena, tmp_path: Path, fork_server: ForkServerContext, seed: random.Random
) -> None:
    joined.wait_for_ever()
    killed = random_kills(joined, seed, 15)
    golden = JoinedArena(tmp_path / "golden", fork_server, seed)
    golden.folder.mkdir()
    golden.wait_for_ever()
    golden.salt = joined.salt
    try:
        golden.publish(1, joined.joined.last_sequence("uploader"))
        golden.begin(world.work, ALL)
        golden.settle()
        assert golden.check() == killed
        assert killed["completed"]
        assert killed["pending"]
        assert not killed["expired"]
        assert outcome(golden.joined) == outcome(joined.joined)
    finally:
        golden.close()


def outcome(books: JoinedBooks) -> dict[str, Any]:
    """What became of the uploads, apart from offsets and ids."""
    products = [
        (partition, *(event[DATA][name] for name in ("product", "seller", "version")))
        for partition, _, event in books.topic("products")
    ]
    catalog = {key: version for key, (version, _) in books.changelog("catalog").items()}
    counted = [sellers_of(books, task) for task in books.tasks("sellers")]
    return {"products": sorted(products), "catalog": catalog, "sellers": counted}
