"""SIGKILL at every step of a promotion under load: one valid version serves, and the books are right."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import djp_dagster as djp
from djp_dagster.processing.crash_points import VERSION_CRASH_POINTS
from djp_dagster.streams.records import TopicPartition
from djp_dagster.testing import kill_at
from djp_dagster.versions import promotion
from djp_dagster.versions.promotion import versions
from tests.crash.conftest import fork_server
from tests.crash.world import until_stopped
from tests.processing.kit import in_thread
from tests.versions.kit import (
    CLICKS,
    LEASE,
    PARTITIONS,
    causes,
    clicks,
    counted,
    counting,
    folded,
    publish,
    published,
    state_of,
    wait_until,
)

# Both count alike, so the books say what must come out whoever has done it.
OLD, NEW = (counting(1, code, most=200) for code in ("old", "new"))
pytestmark = pytest.mark.crash
__all__ = ["fork_server"]


def work(folder: str) -> None:
    """The worker of the live version."""
    with djp.open_stream(Path(folder) / "stream.db") as stream:
        djp.Worker(stream, [OLD], lease=LEASE, state_folder=Path(folder) / "w").run(until_stopped(folder))


def change(folder: str, what: str, point: str | None) -> None:
    """Whoever follows, or promotes, or goes back; and dies of it."""
    promotion._LEASE_S = 0.6
    if point is not None:
        kill_at(point)  # type: ignore[arg-type]
    state = Path(folder) / f"state-{os.getpid()}"
    with djp.open_stream(Path(folder) / "stream.db") as stream:
        if what == "follow":
            # Whoever is to die must have something to do, however little is behind.
            djp.follow(stream, NEW, state_folder=state, max_lag_events=300 if point is None else 0)
        elif what == "promote":
            djp.promote(stream, NEW, state_folder=state)
        else:
            djp.rollback(stream, OLD, state_folder=state)


class Look(NamedTuple):
    """What a reader has seen: the offsets it is told to be of, and the state."""

    as_of: dict[TopicPartition, int]
    state: dict[Any, Any]


class Site:
    """A stream with load on it, a worker, a reader, and processes that are killed."""

    def __init__(self, folder: Path, context: ForkServerContext, stream: djp.EventStream) -> None:
        self.folder, self.context, self.stream = folder, context, stream
        self.looks: list[Look] = []
        self.processes: list[ForkServerProcess] = []

    def start(self, role: Any, *arguments: Any) -> ForkServerProcess:
        process = self.context.Process(target=role, args=(str(self.folder), *arguments), daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def do(self, what: str, point: str | None = None) -> None:
        """Have a process do it; with a point, die of it."""
        process = self.start(change, what, point)
        process.join(60)
        assert process.exitcode == (0 if point is None else -9), (what, point)

    @contextmanager
    def under_load(self, seed: random.Random) -> Iterator[None]:
        stop = threading.Event()
        with in_thread(partial(self._publish, seed, stop), stop) as load, in_thread(partial(self._look, stop), stop):
            yield
        assert load == [None]

    def _publish(self, seed: random.Random, stop: threading.Event) -> None:
        number = 0
        while not stop.wait(0.04):
            publish(self.stream, clicks(seed, 10, number))
            number += 10

    def _look(self, stop: threading.Event) -> None:
        with djp.open_stream(self.folder / "stream.db") as there, there.view(OLD, folder=self.folder / "r") as view:
            while not stop.wait(0.03):
                with view.refresh().pinned():
                    self.looks.append(Look(dict(view.as_of), dict(view.items())))

    def serves(self) -> None:
        """The live version goes on."""
        before = sum(self.stream.positions("counts").values())
        wait_until(lambda: sum(self.stream.positions("counts").values()) > before + 20, "a version to serve")

    def settle(self) -> None:
        """Everything is done once: each click was emitted once, and counted in the state, and in what was seen."""
        wait_until(lambda: not self.stream.pending("counts").events, "everything to be done")
        (self.folder / "stop").touch()
        for process in self.processes:
            process.join(30)
            assert process.exitcode in (0, -9), process
        assert causes(self.stream) == published(self.stream)
        assert state_of(self.stream, OLD, self.folder) == folded(self.stream)
        assert self.stream.coordinator.intents("counts") == []
        self._check_looks()

    def _check_looks(self) -> None:
        """Every look was at the whole of one version: exactly what the records before its offsets make."""
        assert len(self.looks) > 10
        state: dict[str, Any] = {}
        come_to = {TopicPartition(CLICKS.name, partition): 0 for partition in range(PARTITIONS)}
        for look in self.looks:
            for at, offset in look.as_of.items():
                assert offset >= come_to[at], "a reader was taken back"
                for record in self.stream.records(CLICKS, at.partition, come_to[at], offset):
                    state[record.data["user"]] = counted(state.get(record.data["user"]), record, 1)
                come_to[at] = offset
            assert look.state == state


@pytest.fixture
def site(tmp_path: Path, fork_server: ForkServerContext) -> Iterator[Site]:
    with djp.open_stream(tmp_path / "stream.db") as stream:
        OLD.register(stream)
        publish(stream, clicks(random.Random(0), 100))
        made = Site(tmp_path, fork_server, stream)
        yield made
        for process in made.processes:
            if process.is_alive():
                process.kill()
            process.join(30)


@pytest.mark.parametrize("point", [*VERSION_CRASH_POINTS, "4.handled"])
def test_whoever_promotes_dies(site: Site, seed: random.Random, point: str) -> None:
    site.start(work)
    with site.under_load(seed):
        site.serves()
        site.do("follow")
        site.do("promote", point)
        codes = versions(site.stream, "counts").code_versions
        done = point == "v.swapped"
        assert codes == ({"live": "new", "previous": "old"} if done else {"live": "old", "next": "new"})
        site.serves()
        if not done:
            site.do("promote")
        assert versions(site.stream, "counts").code_versions == {"live": "new", "previous": "old"}
        site.serves()
    site.settle()


def test_whoever_follows_and_goes_back_dies_again_and_again(site: Site, seed: random.Random) -> None:
    site.start(work)
    with site.under_load(seed):
        site.serves()  # or there is nothing to follow
        for point in ("2.intent", "6.committed"):
            site.do("follow", point)
        site.do("promote")
        site.do("rollback", seed.choice(["v.frozen", "v.caught_up"]))
        site.do("rollback")
        site.serves()
    assert versions(site.stream, "counts").code_versions == {"live": "old", "previous": "new"}
    site.settle()
