"""State moves with its task: whoever processes, wherever, and in batches of any size, it is the same in the end."""

import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    Consumer,
    Event,
    EventStream,
    SnapshotPolicy,
    Threshold,
    Topic,
    Worker,
    consumer,
    open_stream,
    run_pending,
)
from djp_dagster.partitioning import partition_of
from djp_dagster.streams.topics import changelog_of
from tests.processing.kit import in_thread, wait_until
from tests.state.kit import values_of

TASKS, USERS, KEPT = 4, 12, 3
CLICKS = Topic("clicks", partitions=TASKS, key="user")
Pages = list[dict[Any, Any]]


def latest_pages(events: int) -> Consumer:
    """Keeps the last few pages of each user, oldest first, until the user leaves; in batches of so many events."""

    @consumer(
        topic=CLICKS,
        stateful=True,
        group="pages",
        max_batch=Threshold(events=events),
        snapshots=SnapshotPolicy(changes=30, bytes="4KiB"),
    )
    def keep(batch: Batch) -> None:
        state = batch.state
        for record in batch:
            user, page, number = record.data["user"], record.data["page"], record.data["number"]
            if page is None:
                for key in [key for key, _ in state.items(prefix=(user,))]:
                    state.delete(key)
            else:
                state.set((user, number), {"page": page, "text": "x" * 200})
                for key in [key for key, _ in state.items(prefix=(user,))][:-KEPT]:
                    state.delete(key)
            state.set(("clicks", user), state.get(("clicks", user), 0) + 1)

    return keep


def clicks(rng: random.Random, start: int, count: int) -> list[Event]:
    pages = [*"abcdefgh", None]
    return [
        CLICKS.event(user=f"user {rng.randrange(USERS)}", page=rng.choice(pages), number=number)
        for number in range(start, start + count)
    ]


def folded(events: list[Event]) -> Pages:
    """What each task must hold after these events."""
    tasks: Pages = [{} for _ in range(TASKS)]
    for event in events:
        user, number, page = event.data["user"], event.data["number"], event.data["page"]
        state = tasks[partition_of(user, TASKS)]
        if page is not None:
            state[user, number] = {"page": page, "text": "x" * 200}
        mine = sorted(key for key in state if key[0] == user)
        for key in mine if page is None else mine[:-KEPT]:
            del state[key]
        state["clicks", user] = state.get(("clicks", user), 0) + 1
    return tasks


class World:
    """A stream, and the hosts that have worked for it."""

    def __init__(self, folder: Path, stream: EventStream, rng: random.Random) -> None:
        self.folder, self.stream, self._rng = folder, stream, rng
        self.events: list[Event] = []

    def publish(self, count: int) -> None:
        events = clicks(self._rng, len(self.events), count)
        self.stream.publish(CLICKS, events)
        self.events += events

    def run(self, events: int, host: str) -> None:
        run_pending(self.stream, latest_pages(events), state_folder=self.folder / host)

    def work(self, events: int, hosts: list[str], done: int) -> None:
        """Workers on these hosts, until so many of all events are done."""
        with ExitStack() as stack:
            for host in hosts:
                own, stop = stack.enter_context(open_stream(self.folder / "stream.db")), threading.Event()
                worker = Worker(own, [latest_pages(events)], state_folder=self.folder / host, lease=2)
                stack.enter_context(in_thread(lambda worker=worker, stop=stop: worker.run(stop), stop))  # type: ignore[misc]
            wait_until(lambda: sum(self.stream.positions("pages").values()) >= done, f"{done} events done")

    def check(self) -> None:
        assert self.stream.pending("pages").events == 0
        assert [values_of(self.stream, "pages", task) for task in range(TASKS)] == folded(self.events)
        with self.stream.view(latest_pages(1), folder=self.folder / "view") as view:
            assert dict(view.items()) == {key: value for task in folded(self.events) for key, value in task.items()}
        assert self.stream.dead_letters("pages", status=None) == []


@pytest.fixture
def world(seed: random.Random, tmp_path: Path) -> Iterator[World]:
    with open_stream(tmp_path / "stream.db") as stream:
        latest_pages(1).register(stream)
        yield World(tmp_path, stream, seed)


@pytest.mark.parametrize("events", [1, 7, 1000])
class TestIsTheSame:
    def test_by_runs(self, events: int, world: World) -> None:
        for _ in range(5):
            world.publish(60)
            world.run(events, "host")
        world.check()

    def test_by_runs_on_other_hosts_each_time(self, events: int, world: World) -> None:
        """Two of them come back to what they had; the others begin with an empty disk."""
        for host in ("a", "b", "a", "c", "b", "d"):
            world.publish(50)
            world.run(events, host)
        world.check()

    def test_by_one_worker(self, events: int, world: World) -> None:
        world.publish(300)
        world.work(events, ["host"], 300)
        world.check()

    def test_by_three_workers_on_hosts_of_their_own(self, events: int, world: World) -> None:
        world.publish(300)
        world.work(events, ["a", "b", "c"], 300)
        world.check()

    def test_by_a_worker_that_moves_to_an_empty_host_in_the_middle(self, events: int, world: World) -> None:
        world.publish(200)
        world.work(events, ["old"], 100)
        shutil.rmtree(world.folder / "old")
        world.publish(100)
        world.work(events, ["new"], 300)
        world.check()

    def test_by_workers_that_come_and_go_and_runs_between_them(self, events: int, world: World) -> None:
        world.publish(150)
        world.work(events, ["a", "b"], 50)
        world.run(events, "c")
        world.publish(150)
        world.work(events, ["b", "d"], 220)
        world.run(events, "a")
        world.check()


def test_a_folder_that_vanishes_under_a_run_is_restored(world: World) -> None:
    for _ in range(6):
        world.publish(50)
        world.run(5, "host")
        shutil.rmtree(world.folder / "host")
    spans = world.stream.log.spans([changelog_of("pages")])
    assert any(span.begin > 0 for span in spans.values())
    world.check()


def test_a_folder_that_vanishes_under_a_worker_is_restored(world: World) -> None:
    stop = threading.Event()
    worker = Worker(world.stream, [latest_pages(5)], state_folder=world.folder / "host")
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        for done in (100, 200, 300):
            world.publish(100)
            wait_until(lambda done=done: sum(world.stream.positions("pages").values()) == done, "all done")  # type: ignore[misc]
            for file in (world.folder / "host").rglob("*.db*"):
                if file.is_file():  # not the folder of a snapshot that is being taken
                    file.unlink(missing_ok=True)
    assert outcome == [None]
    world.check()
