"""Deadlines across versions: what the live version has fired, the follower fires muted; nothing twice, nothing lost."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster.processing import crash_points, holding
from djp_dagster.testing import Clock, memory_stream
from djp_dagster.versions.comparison import compare
from tests.versions.kit import CLICKS, emitted, state_of

CLOSED = djp.Topic("closed", key="user")
VIDEO, IMAGES = djp.Topic("video", partitions=2, key="p"), djp.Topic("images", partitions=2, key="p")


def closing(after_s: float = 60.0, code: str = "v1", most: int = 7) -> djp.Consumer:
    """Sessions: a user's clicks are counted until there was none for a while; then the session is emitted.

    What comes of them is the same however they are cut into batches.
    """

    @djp.consumer(
        topic=CLICKS,
        emits=[CLOSED],
        stateful=True,
        group="sessions",
        code_version=code,
        max_batch=djp.Threshold(events=most),
    )
    def sessions(batch: djp.Batch) -> None:
        def close(user: str) -> None:
            batch.emit(CLOSED.event(user=user, clicks=batch.state.get(user)["clicks"], code=code))
            batch.state.delete(user)

        for record in batch:
            user, at = record.data["user"], record.append_time
            session = batch.state.get(user)
            if session is not None and at.timestamp() > session["due"]:
                close(user)  # its deadline fires in this batch, too
                session = None
            due = at + timedelta(seconds=after_s)
            batch.state.set(user, {"clicks": (session or {"clicks": 0})["clicks"] + 1, "due": due.timestamp()})
            batch.set_deadline(user, due)
        for deadline in batch.deadlines:
            session = batch.state.get(deadline.key)
            if session is not None and session["due"] <= deadline.due_micros / 1e6:
                close(deadline.key)

    return sessions


@djp.join(
    inputs={"video": VIDEO, "images": IMAGES},
    key="p",
    deadline="60s",
    on_deadline="partial",
    emits=[CLOSED],
    group="sessions",
)
def joined(parts: djp.Joined) -> None:
    """What is there of both."""
    status = "complete" if parts.complete else "expired"
    parts.emit(CLOSED.event(user=parts.key, status=status))


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Twin:
    """The same events to two streams by one clock; the state of one of them is rebuilt and promoted again and again."""

    def __init__(self, folder: Path, clock: Clock, streams: list[djp.EventStream], consumer: djp.Consumer) -> None:
        self.folder, self.clock, self.consumer = folder, clock, consumer
        self.changing, self.plain = streams
        for stream in streams:
            consumer.register(stream)

    def publish(self, topic: djp.Topic, *data: dict[str, Any]) -> None:
        self.clock.advance(0.001)  # nothing is appended at the very moment at which something was handled
        for stream in (self.changing, self.plain):
            stream.publish(topic, [topic.event(**one) for one in data])

    def handle(self) -> None:
        for stream, name in ((self.changing, "changing"), (self.plain, "plain")):
            djp.run_pending(stream, self.consumer, state_folder=self.folder / name)

    def follow(self) -> None:
        djp.follow(self.changing, self.consumer, state_folder=self.folder / "next")

    def promote(self) -> None:
        self.follow()
        djp.promote(self.changing, self.consumer, state_folder=self.folder / "next")

    def check(self) -> None:
        """Both have had the same effects, and hold the same."""
        closed, expected = (self.closed(stream) for stream in (self.changing, self.plain))
        assert closed == expected
        states = [
            state_of(stream, self.consumer, self.folder / str(n))
            for n, stream in enumerate((self.changing, self.plain))
        ]
        assert states[0] == states[1]

    @staticmethod
    def closed(stream: djp.EventStream) -> list[Any]:
        return sorted(str(record.data) for record in emitted(stream, CLOSED))


Twins = Callable[[djp.Consumer], Twin]
Action = Callable[[Twin, random.Random], None]
ACTIONS: list[Action] = [
    lambda twin, _: twin.handle(),
    lambda twin, _: twin.handle(),
    lambda twin, _: twin.follow(),
    lambda twin, _: twin.promote(),
]


@pytest.fixture
def twins(tmp_path: Path, clock: Clock) -> Iterator[Twins]:
    with ExitStack() as stack:

        def make(consumer: djp.Consumer) -> Twin:
            streams = [stack.enter_context(memory_stream(clock=clock)) for _ in range(2)]
            return Twin(tmp_path, clock, streams, consumer)

        yield make


@pytest.fixture
def while_frozen() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Have something happen while the live version is frozen, once."""

    def arrange(event: Callable[[], None]) -> None:
        def hook(point: str) -> None:
            if point == "v.frozen":
                crash_points.set_hook(None)
                event()

        crash_points.set_hook(hook)

    yield arrange
    crash_points.set_hook(None)


class TestSessions:
    """A plain consumer with deadlines."""

    def test_what_has_been_fired_is_fired_again_without_effect(self, twins: Twins) -> None:
        twin = twins(closing())
        twin.publish(CLICKS, *({"user": f"u{n}"} for n in range(9)))
        twin.handle()
        twin.clock.advance(61)
        twin.handle()
        assert len(twin.closed(twin.changing)) == 9
        twin.promote()
        twin.clock.advance(100)
        twin.handle()
        assert len(twin.closed(twin.changing)) == 9
        twin.check()

    def test_what_has_not_is_left_to_the_new_version(self, twins: Twins) -> None:
        twin = twins(closing())
        twin.publish(CLICKS, {"user": "a"})
        twin.handle()
        twin.clock.advance(30)
        twin.publish(CLICKS, {"user": "b"})
        twin.handle()
        twin.clock.advance(31)
        twin.follow()
        assert twin.changing.coordinator.next_deadline("sessions.next", [0, 1, 2]) is not None
        twin.handle()
        twin.promote()
        assert len(twin.closed(twin.changing)) == 1
        twin.clock.advance(30)
        twin.handle()
        assert len(twin.closed(twin.changing)) == 2
        twin.check()

    def test_a_live_version_that_is_late_loses_none(self, twins: Twins) -> None:
        """Nobody works on it when they are due; then it is promoted, and they are not those of the follower."""
        twin = twins(closing())
        twin.publish(CLICKS, {"user": "a"}, {"user": "b"})
        twin.handle()
        twin.clock.advance(90)
        twin.promote()
        assert twin.closed(twin.changing) == []
        twin.handle()
        assert len(twin.closed(twin.changing)) == 2
        twin.check()

    def test_those_due_while_it_is_frozen(
        self, twins: Twins, while_frozen: Callable[[Callable[[], None]], None]
    ) -> None:
        twin = twins(closing())
        twin.publish(CLICKS, {"user": "a"}, {"user": "b"})
        twin.handle()
        twin.clock.advance(59)
        twin.follow()

        def pass_them() -> None:
            twin.clock.advance(10)
            follower = twin.consumer.following("next")  # as its worker would
            djp.run_pending(twin.changing, follower, state_folder=twin.folder / "next")

        while_frozen(pass_them)
        twin.promote()
        assert twin.closed(twin.changing) == []
        twin.handle()
        twin.check()
        assert len(twin.closed(twin.changing)) == 2

    def test_a_live_version_in_the_midst_of_them(self, twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has fired some of those that were due, and dies: these are done, the others are left."""
        monkeypatch.setattr(holding, "_MAX_DEADLINES", 2)
        twin = twins(closing())
        one_task = [name for n in range(99) if CLICKS.partition_of(CLICKS.event(user=(name := f"u{n}"))) == 0]
        for user in one_task[:5]:
            twin.publish(CLICKS, {"user": user})
        twin.handle()
        twin.clock.advance(100)
        stop = threading.Event()
        djp.run_pending(
            twin.changing,
            twin.consumer,
            state_folder=twin.folder / "changing",
            stop=stop,
            on_report=lambda _: stop.set(),
        )
        assert len(twin.closed(twin.changing)) == 2
        twin.promote()
        assert len(twin.closed(twin.changing)) == 2
        twin.handle()
        twin.check()

    def test_another_rule_has_effects_from_the_switch_on(self, twins: Twins) -> None:
        """What comes due after the last thing that the old version has done is the new one's."""
        twin = twins(closing(600, "v1"))
        twin.publish(CLICKS, {"user": "a"})
        twin.handle()
        twin.clock.advance(30)
        twin.publish(CLICKS, {"user": "a", "again": True})  # in the same partition: the live version has come to here
        twin.handle()
        twin.consumer = closing(60, "v2")
        twin.clock.advance(70)
        twin.follow()
        twin.promote()
        djp.run_pending(twin.changing, twin.consumer, state_folder=twin.folder / "changing")
        assert [record.data for record in emitted(twin.changing, CLOSED)] == [{"user": "a", "clicks": 2, "code": "v2"}]

    def test_at_random(self, twins: Twins, seed: random.Random) -> None:
        twin = twins(closing())
        for _ in range(40):
            seed.choice([_publish_clicks, _wait, *ACTIONS])(twin, seed)
        _settle(twin)
        assert twin.closed(twin.plain)


class TestJoins:
    """An event buffer: keys expire in the order of time, once."""

    def test_expired_keys(self, twins: Twins) -> None:
        twin = twins(joined)
        twin.publish(VIDEO, {"p": "a"}, {"p": "b"}, {"p": "c"})
        twin.publish(IMAGES, {"p": "a"})
        twin.handle()
        twin.clock.advance(61)
        twin.publish(VIDEO, {"p": "d"})
        twin.follow()
        twin.handle()
        twin.promote()
        twin.clock.advance(61)
        twin.promote()
        twin.handle()
        twin.check()
        assert len(twin.closed(twin.changing)) == 4

    def test_at_random(self, twins: Twins, seed: random.Random) -> None:
        twin = twins(joined)
        for _ in range(40):
            seed.choice([_publish_parts, _wait, *ACTIONS])(twin, seed)
        _settle(twin)
        assert twin.closed(twin.plain)

    def test_a_clock_that_goes_back(self, twins: Twins) -> None:
        """What the live version has read before older stamps came to another topic, the follower reads before them."""
        twin = twins(joined)
        twin.publish(VIDEO, {"p": "a"}, {"p": "b"}, {"p": "c"})
        twin.handle()
        twin.clock.advance(-30)
        twin.publish(IMAGES, {"p": "a"}, {"p": "b"}, {"p": "c"})
        twin.promote()
        assert twin.changing.positions("sessions") == twin.plain.positions("sessions")
        twin.clock.advance(40)
        twin.handle()
        twin.check()
        assert sum("complete" in one for one in twin.closed(twin.changing)) == 3

    def test_the_rebuilt_buffer_is_the_live_one(self, twins: Twins, seed: random.Random) -> None:
        twin = twins(joined)
        for _ in range(10):
            _publish_parts(twin, seed)
            _wait(twin, seed)
            twin.handle()
        twin.follow()
        found = compare(twin.changing, joined, folder=twin.folder / "compared")
        assert found.equal, found
        assert found.keys > 0


def _publish_clicks(twin: Twin, seed: random.Random) -> None:
    twin.publish(CLICKS, *({"user": f"u{seed.randrange(8)}"} for _ in range(seed.randrange(1, 12))))


def _publish_parts(twin: Twin, seed: random.Random) -> None:
    for topic in (VIDEO, IMAGES):
        twin.publish(topic, *({"p": f"p{seed.randrange(30)}"} for _ in range(seed.randrange(4))))
        twin.clock.advance(seed.choice([0, 0.5, 3]))


def _wait(twin: Twin, seed: random.Random) -> None:
    twin.clock.advance(seed.choice([0.001, 5, 20, 45, 61]))


def _settle(twin: Twin) -> None:
    twin.handle()
    twin.clock.advance(1000)
    twin.handle()
    twin.check()
