"""Publish → sensor → a run of the real daemon → intent → handler → commit → apply, killed between the steps.

For each crash point there is a group whose run kills itself there; Dagster notices, the sensor asks for another, and it
takes the open batch over. All at once, for most of it is waiting. The books are checked from outside.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster.testing import CRASH_POINTS
from tests.crash.oracle import DATA, Books
from tests.daemon.harness import AT_ONCE, Daemon
from tests.daemon.shop import counts_of, group_of, orders_of

pytestmark = pytest.mark.daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, Path(__file__).with_name("shop.py"), AT_ONCE)
    try:
        yield daemon
    finally:
        daemon.close()


SOME_POINTS = ("2.intent", "4.handling", "5.stored", "6.committed", "7.applied")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "points", [pytest.param(SOME_POINTS, id="some"), pytest.param(CRASH_POINTS, id="all", marks=pytest.mark.soak)]
)
def test_real_runs_are_killed_between_the_steps(daemon: Daemon, seed: random.Random, points: tuple[str, ...]) -> None:
    published = {}
    for point in points:
        orders = orders_of(point)
        daemon.stream.create_topic(orders)
        (daemon.folder / f"kill.{group_of(point)}").write_text(point)
        published[point] = seed.randint(1, 150)
        events = [orders.event(user=f"user-{seed.randrange(7)}", n=n) for n in range(published[point])]
        daemon.stream.publish(orders, events)
    daemon.start()
    for point in points:
        killed = daemon.folder / f"kill.{group_of(point)}.done"
        daemon.wait(killed.exists, f"the kill at {point}", patience_s=300)
    daemon.wait_done(*map(group_of, points), patience_s=300)
    daemon.wait(daemon.books.everything_done, "open batches to be closed")
    for point in points:
        _check(daemon.books, point, published[point])


def _check(books: Books, point: str, published: int) -> None:
    group = group_of(point)
    per_user: dict[str, list[int]] = defaultdict(list)
    for _, _, event in books.topic(orders_of(point).name):
        per_user[event[DATA]["user"]].append(event[DATA]["n"])
    emitted: dict[str, list[int]] = defaultdict(list)
    for _, _, event in books.topic(counts_of(point).name):
        emitted[event[DATA]["user"]].append(event[DATA]["n"])
        assert event[DATA]["count"] == len(emitted[event[DATA]["user"]])
    assert emitted == per_user
    assert sum(map(len, per_user.values())) == published
    seen = Counter(tuple(position) for output in books.outputs(group) for position in output["seen"])
    assert len(seen) == published
    assert set(seen.values()) == {1}
    assert books.changelog(group) == {user: len(numbers) for user, numbers in per_user.items()}
    assert books.deadlines(group) == dict.fromkeys(per_user, 1)
    assert books.dead_letters(group) == []
