"""SIGKILL between every two numbers of the protocol, in several processes; then recovery, checked from outside."""

import random
import time
from collections.abc import Callable

import pytest

from djp_dagster.testing import CRASH_POINTS
from tests.crash import world
from tests.crash.conftest import Arena, wait_for
from tests.crash.oracle import DATA, check, check_local_files

pytestmark = pytest.mark.crash


def publish_some(arena: Arena, seed: random.Random, publishes: int) -> set[int]:
    salt = seed.randrange(1 << 30)
    acknowledged: set[int] = set()
    with world.open_world(str(arena.folder)) as stream:
        for number in range(publishes):
            events = world.orders_of(number, salt)
            stream.publish("orders", events)
            acknowledged |= {event.data["n"] for event in events}
    return acknowledged


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_every_point(arena: Arena, seed: random.Random, point: str) -> None:
    acknowledged = publish_some(arena, seed, 60)
    # Each of the two workers comes to a point of snapshots at least this often, however they share the tasks.
    most = 2 if point.startswith("9.") else 4
    victims = [
        arena.start(world.work, ["counts"], point=point, hit=seed.randint(1, most)),
        arena.start(world.work, ["relay", "counts"], point=point, hit=seed.randint(1, min(most, 3))),
        arena.start(world.run, ["files"], point=point, hit=seed.randint(1, 2)),
    ]
    wait_for(lambda: any(victim.exitcode == -9 for victim in victims), f"a death at {point}")
    arena.start(world.work, ["counts", "relay"])
    arena.start(world.run, ["files"])
    arena.settle()
    check(arena.books, acknowledged)
    assert any(arena.books.snapshots("counts", task) for task in range(world.PARTITIONS))
    assert check_local_files(arena.books, ["counts"]), "no local state has come to the end of its changelog"


@pytest.mark.parametrize("point", ["2.intent", "4.handled", "5.stored", "6.committed"])
def test_a_zombie_does_no_harm(arena: Arena, seed: random.Random, point: str) -> None:
    acknowledged = publish_some(arena, seed, 40)
    zombie = arena.start(world.work, ["counts"], point=point, how="stop")
    arena.wait_until_stopped(zombie, point)
    arena.start(world.work, ["counts", "relay"])
    arena.start(world.run, ["files"])
    wait_for(arena.books.everything_done, "the others to finish")
    arena.wake(zombie)
    with world.open_world(str(arena.folder)) as stream:
        more = [world.ORDERS.event(n=10**9 + index, user=f"user-{index}", kind="good") for index in range(12)]
        stream.publish("orders", more)
    acknowledged |= {event.data["n"] for event in more}
    arena.settle()
    assert zombie.exitcode == 0
    check(arena.books, acknowledged)


@pytest.mark.parametrize(("first", "second"), [("run", "work"), ("work", "run")])
def test_open_batches_change_hands_between_modes(arena: Arena, seed: random.Random, first: str, second: str) -> None:
    acknowledged = publish_some(arena, seed, 40)
    roles: dict[str, Callable[..., None]] = {"run": world.run, "work": world.work}
    victims = [arena.start(roles[first], ["files"], point="4.handling", hit=seed.randint(1, 2)) for _ in range(2)]
    wait_for(lambda: all(victim.exitcode is not None for victim in victims), "both to die while handling")
    assert arena.books.open_intents()
    for _ in range(2):
        arena.start(roles[second], ["files"])
    arena.start(world.work, ["counts", "relay"])
    arena.settle()
    check(arena.books, acknowledged)


def random_kills(arena: Arena, seed: random.Random, kills: int) -> None:
    """Publisher, workers and runners under load; ``kills`` of them die at random moments and are started anew."""
    world.open_world(str(arena.folder)).close()
    salt, total = seed.randrange(1 << 30), kills * 6
    roles: list[tuple[Callable[..., None], tuple[object, ...]]] = [
        (world.publish, (total, salt)),
        (world.work, (["counts", "relay"],)),
        (world.work, (["relay", "counts", "files"],)),
        (world.run, (["files"],)),
    ]
    alive = [arena.start(role, *arguments) for role, arguments in roles]
    before = arena.books.committed()
    repeats = "SELECT count(*) FROM djp_outputs WHERE attempt > 1"
    for number in range(3 * kills):
        if number >= kills and arena.books.db.execute(repeats).fetchone()[0]:
            break
        victim = seed.randrange(len(roles))
        process = alive[victim]
        arena.wait_until_at_work(process)
        # The pause is the experiment: where in its work the victim is when it dies.
        time.sleep(seed.uniform(0.0, 0.16))
        process.kill()
        role, arguments = roles[victim]
        alive[victim] = arena.start(role, *arguments)
        now = arena.books.committed()
        assert all(now[key] >= offset for key, offset in before.items()), "a committed offset went back"
        before = now

    def published() -> bool:
        rows = arena.books.db.execute("SELECT last_sequence FROM djp_producers WHERE name = 'shop'").fetchone()
        return rows is not None and rows[0] == total

    wait_for(published, "the publisher to finish")
    arena.settle()
    begins = [arena.books.changelog_span("counts", task)[0] for task in range(world.PARTITIONS)]
    assert all(begins), f"the changelog was never compacted, it begins at {begins}: this test shows nothing"
    assert arena.books.db.execute(repeats).fetchone()[0], "no kill hit a batch under way: this test shows nothing"
    acknowledged = {event.data["n"] for number in range(1, total + 1) for event in world.orders_of(number, salt)}
    assert {event[DATA]["n"] for _, _, event in arena.books.topic("orders")} == acknowledged
    check(arena.books, acknowledged)


def test_200_random_kills_under_load(arena: Arena, seed: random.Random) -> None:
    random_kills(arena, seed, 200)


@pytest.mark.soak
def test_1000_random_kills_under_load(arena: Arena, seed: random.Random) -> None:
    random_kills(arena, seed, 1000)
