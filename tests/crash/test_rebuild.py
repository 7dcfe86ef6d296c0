"""A table made anew by processes that die while they do it: it is right in the end, and nobody sees half of one."""

import random
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from zlib import crc32

import pytest

import djp_dagster as djp
from djp_dagster.processing import commands
from djp_dagster.processing.run import run_pending
from tests.crash.conftest import Arena, wait_for
from tests.crash.oracle import check_local_files, check_snapshots
from tests.crash.world import LEASE_S, arm, until_stopped

pytestmark = pytest.mark.crash

PARTITIONS = 2
POINTS = ("2.intent", "4.handling", "4.handled", "6.committed", "7.applied")
PRICES = djp.Topic("prices", partitions=PARTITIONS, key="item")
Tables = list[dict[str, str]]


def keeping(value: str) -> djp.Table:
    """The table of one of the two prices; both are the same group."""
    snapshots = djp.SnapshotPolicy(changes=100, bytes="8KiB")
    return djp.Table("by_item", topic=PRICES, value=value, max_batch=djp.Threshold(events=150), snapshots=snapshots)


BEFORE, AFTER = keeping("net"), keeping("gross")


def prices(salt: int) -> list[djp.Event]:
    """Updates of some hundred items; a price may be taken back, the net one or the gross one."""
    chance = random.Random(salt)
    drawn = [(f"item-{chance.randrange(400)}", chance.choices([0, 1, 2], [8, 1, 1])[0]) for _ in range(1500)]
    return [
        PRICES.event(item=item, net=None if which == 1 else f"net {n}", gross=None if which == 2 else f"gross {n}")
        for n, (item, which) in enumerate(drawn)
    ]


def folded(salt: int, value: str) -> Tables:
    """What the table must hold in each task."""
    tables: Tables = [{} for _ in range(PARTITIONS)]
    for event in prices(salt):
        item = event.data["item"]
        table = tables[crc32(item.encode()) % PARTITIONS]
        table.pop(item, None)
        if event.data[value] is not None:
            table[item] = event.data[value]
    return tables


def rebuild(folder: str, state: str, point: str | None = None) -> None:
    """Who has the table made anew, by itself or by whoever holds it."""
    arm(folder, point, 1, "kill")
    # So that nobody waits for long if this one dies; `rebuild` itself has no such setting.
    vars(commands)["run_pending"] = partial(run_pending, lease=LEASE_S)
    with djp.open_stream(Path(folder) / "stream.db") as stream:
        djp.rebuild(stream, AFTER, state_folder=Path(folder) / state, wait="30s")


def work(folder: str, state: str, point: str | None = None) -> None:
    """A worker that holds the table; when it is armed, nothing is pending any more."""
    with djp.open_stream(Path(folder) / "stream.db") as stream:
        worker = djp.Worker(stream, [AFTER], lease=LEASE_S, state_folder=Path(folder) / state)
        arm(folder, point, 1, "kill")
        worker.run(until_stopped(folder))


SEEN = "seen"


def read(folder: str, salt: int) -> None:
    """A reader on a host of its own, who looks all the time; what it sees of each task is written down."""
    known = {"old": folded(salt, "net"), "new": folded(salt, "gross")}
    stop = until_stopped(folder)
    with (
        djp.open_stream(Path(folder) / "stream.db") as stream,
        stream.view(AFTER, folder=Path(folder) / "reader") as view,
        (Path(folder) / SEEN).open("w", buffering=1) as seen,
    ):
        while not stop.is_set():
            tables: Tables = [{} for _ in range(PARTITIONS)]
            for item, price in view.refresh().items():
                assert isinstance(item, str)
                tables[crc32(item.encode()) % PARTITIONS][item] = price
            print(*(_name(known, task, table) for task, table in enumerate(tables)), file=seen)
            stop.wait(0.01)


def _name(known: dict[str, Tables], task: int, table: dict[str, str]) -> str:
    return next((name for name, tables in known.items() if tables[task] == table), "half")


class Rebuilding(Arena):
    """A table that is up to date, and wrong; and somebody who reads it."""

    def __init__(self, folder: Path, context: ForkServerContext, seed: random.Random) -> None:
        super().__init__(folder, context)
        self.seed, self.salt = seed, seed.randrange(1 << 30)
        with djp.open_stream(folder / "stream.db") as stream:
            stream.create_topic(PRICES)
            stream.publish(PRICES, prices(self.salt))
            djp.run_pending(stream, BEFORE, state_folder=folder / "state")
        assert self.books.changelog("by_item") == merged(folded(self.salt, "net"))
        assert self.books.snapshots("by_item", 0)
        self.start(read, self.salt)
        wait_for(lambda: self.seen()[-1:] == ["old old"], "the reader to see the table as it was")

    def seen(self) -> list[str]:
        """What the reader has seen, in whole lines."""
        path = self.folder / SEEN
        return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []

    def host(self) -> str:
        """Where the table was kept so far, or another place, which is empty."""
        return self.seed.choice(["state", f"host-{len(self.processes)}"])

    def check(self) -> None:
        """The table is right, everywhere; nobody saw half of one, or the old one after the new one."""
        wait_for(lambda: self.seen()[-1:] == ["new new"], "the reader to see the table as it is")
        self.settle()
        assert self.books.changelog("by_item") == merged(folded(self.salt, "gross"))
        statuses = {status for (status,) in self.books.db.execute("SELECT status FROM djp_requests")}
        assert statuses == {"done"}
        check_snapshots(self.books, "by_item", keep=2)
        assert check_local_files(self.books, ["by_item"]) >= PARTITIONS
        for task in range(PARTITIONS):
            seen = [line.split()[task] for line in self.seen()]
            assert seen == sorted(seen, key=["old", "new"].index), f"task {task} was seen as {set(seen)}"


def merged(tables: Tables) -> dict[str, str]:
    return {item: price for table in tables for item, price in table.items()}


@pytest.fixture
def rebuilding(tmp_path: Path, fork_server: ForkServerContext, seed: random.Random) -> Iterator[Rebuilding]:
    arena = Rebuilding(tmp_path, fork_server, seed)
    yield arena
    arena.close()


@pytest.mark.parametrize("point", POINTS)
def test_whoever_makes_it_anew_dies_and_it_is_done_again(rebuilding: Rebuilding, point: str) -> None:
    victim = rebuilding.start(rebuild, rebuilding.host(), point=point)
    wait_for(lambda: victim.exitcode is not None, f"the death at {point}")
    assert victim.exitcode == -9
    committed = point in ("6.committed", "7.applied")
    assert bool(rebuilding.books.open_intents()) != committed
    wait_for(partial(has_seen_since, rebuilding, len(rebuilding.seen()) + 1), "the reader to look at what is left")
    assert rebuilding.seen()[-1].split().count("new") == committed
    again = rebuilding.start(rebuild, rebuilding.host())
    wait_for(lambda: again.exitcode == 0, "it to be done again")
    rebuilding.check()


@pytest.mark.parametrize("point", POINTS)
def test_the_worker_that_was_asked_to_dies(rebuilding: Rebuilding, point: str) -> None:
    worker = rebuilding.start(work, rebuilding.host(), point=point)
    wait_for(partial(is_held, rebuilding, worker.pid), "the worker to hold the table")
    asker = rebuilding.start(rebuild, rebuilding.host())
    wait_for(lambda: worker.exitcode is not None, f"the death at {point}")
    assert worker.exitcode == -9
    if rebuilding.seed.random() < 0.5:  # else the asker does it itself
        rebuilding.start(work, rebuilding.host())
    wait_for(lambda: asker.exitcode == 0, "it to be done all the same")
    rebuilding.check()


def has_seen_since(arena: Rebuilding, lines: int) -> bool:
    return len(arena.seen()) > lines


def is_held(arena: Rebuilding, pid: int | None) -> bool:
    rows = arena.books.db.execute("SELECT owner FROM djp_tasks").fetchall()
    return all(owner is not None and f"-{pid}-" in owner for (owner,) in rows)
