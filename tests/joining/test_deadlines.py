"""When keys expire: on idle inputs, after downtime, at the very microsecond, by event time, and on command."""

import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from djp_dagster import EventStream, Topic, Worker, run_pending
from djp_dagster.joining import buffer
from djp_dagster.joining.inspection import request_expiry
from djp_dagster.orchestration.ticks import look
from djp_dagster.processing.crash_points import set_hook
from djp_dagster.streams.records import from_micros
from djp_dagster.streams.sql.coordinator import SqlCoordinator
from djp_dagster.testing import Clock, memory_stream
from tests.joining.kit import A, B, C, completed, emitted, errors, joined, part, statuses, work, work_resident
from tests.joining.test_parts import publish
from tests.processing.kit import in_thread, wait_until
from tests.state.kit import state_of

HOUR = 3600.0
MICRO = 1e-6
A1, B1 = Topic("a1", key="k"), Topic("b1", key="k")
"""Event time is a task's own: here there is one."""
START = 1_700_000_000  # small enough for microseconds to be exact in sums of it


@pytest.fixture
def clock() -> Clock:
    return Clock(START)


def deadline_rows(stream: EventStream) -> list[tuple[int, int]]:
    """Task and due time of all wake-ups in the stream."""
    coordinator = stream.coordinator
    assert isinstance(coordinator, SqlCoordinator)
    with coordinator.database.read() as connection:
        rows = connection.execute(sa.text("SELECT task, due_micros FROM djp_deadlines ORDER BY task")).all()
    return [(row.task, row.due_micros) for row in rows]


class TestAppendTime:
    """From the first part on, by the stream's clock."""

    def test_it_passes_on_idle_inputs(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined(deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, "x")])
        work(stream, join, tmp_path)
        clock.advance(HOUR - MICRO)
        assert look(stream, join).why_not == "nothing is pending"
        assert run_pending(stream, join, state_folder=tmp_path).batches == ()
        clock.advance(MICRO)
        assert look(stream, join).reason == "a deadline is due"
        (done,) = run_pending(stream, join, state_folder=tmp_path).batches
        assert (done.reason, done.events, done.dead_letters, done.counts) == ("deadline", 0, 1, {"expired_keys": 1})
        assert look(stream, join).reason is None
        (letter,) = stream.dead_letters("j")
        assert (letter.error_type, letter.error) == (
            "JoinIncompleteError",
            "key 'x': b, c missing when its deadline passed",
        )
        assert deadline_rows(stream) == []

    def test_it_passes_under_a_worker_by_the_clock_on_the_wall(self, tmp_path: Path) -> None:
        join = joined(deadline="200ms")
        with memory_stream() as stream:
            join.register(stream)
            stop = threading.Event()
            worker = Worker(stream, [join], state_folder=tmp_path)
            with in_thread(lambda: worker.run(stop), stop):
                stream.publish(A, [part(A, "x")])
                wait_until(lambda: errors(stream) == {"JoinIncompleteError": 1}, "the deadline")
            (letter,) = stream.dead_letters("j")
            assert letter.created_micros - letter.append_micros >= 200_000

    @pytest.mark.parametrize("after", ["at once", "an hour", "a year"])
    @pytest.mark.parametrize("worker", [work, work_resident])
    def test_what_was_appended_in_time_counts_after_any_downtime(
        self, stream: EventStream, clock: Clock, tmp_path: Path, after: str, worker: Callable[..., Any]
    ) -> None:
        join = joined(deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, "x"), part(A, "y")])
        work(stream, join, tmp_path)
        clock.advance(HOUR)
        stream.publish(B, [part(B, "x"), part(B, "y")])
        stream.publish(C, [part(C, "x")])  # exactly at the deadline
        clock.advance(MICRO)
        stream.publish(C, [part(C, "y")])  # exactly after it
        clock.advance({"at once": 0, "an hour": HOUR, "a year": 8760 * HOUR}[after])
        worker(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a", "b", "c"]}
        assert errors(stream) == {"JoinIncompleteError": 2, "LatePartError": 1}
        assert statuses(stream, tmp_path) == {"x": "completed", "y": "expired"}

    def test_it_passes_right_after_a_downtime(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined(deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, f"k{n}") for n in range(5)])
        clock.advance(100 * HOUR)
        stream.publish(A, [part(A, f"new{n}") for n in range(5)])
        work(stream, join, tmp_path)
        assert errors(stream) == {"JoinIncompleteError": 5}
        assert sorted(set(statuses(stream, tmp_path).values())) == ["expired", "pending"]

    def test_what_slips_in_before_the_commit_counts(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        """The batch that was woken is cut longer."""
        join = joined(deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, "x"), part(A, "gone")])
        work(stream, join, tmp_path)
        clock.advance(HOUR)
        published: list[str] = []

        def slip_in(reached: str) -> None:
            if reached == "5.stored" and not published:
                published.append(reached)
                for topic in (B, C):
                    stream.publish(topic, [part(topic, "x")])

        set_hook(slip_in)
        try:
            work(stream, join, tmp_path)
        finally:
            set_hook(None)
        assert published
        assert completed(stream) == {"x": ["a", "b", "c"]}
        assert errors(stream) == {"JoinIncompleteError": 1}

    def test_a_thousand_keys_are_one_wake_up_and_few_batches(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = joined(deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, f"k{n}") for n in range(1000)])
        clock.advance(1)
        stream.publish(A, [part(A, f"later{n}") for n in range(1000)])
        work(stream, join, tmp_path)
        due = round((START + HOUR) * 1e6)
        assert deadline_rows(stream) == [(0, due), (1, due)]
        clock.advance(HOUR - 1)
        done = work(stream, join, tmp_path)
        assert [one.reason for one in done] == ["deadline", "deadline"]
        assert errors(stream) == {"JoinIncompleteError": 1000}
        assert deadline_rows(stream) == [(0, due + 1_000_000), (1, due + 1_000_000)]
        clock.advance(1)
        work(stream, join, tmp_path)
        assert errors(stream) == {"JoinIncompleteError": 2000}
        assert deadline_rows(stream) == []

    @pytest.mark.parametrize("read", ["before", "with what is late"])
    def test_too_many_for_a_batch_expire_in_the_next(
        self, stream: EventStream, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: str
    ) -> None:
        monkeypatch.setattr(buffer, "_EXPIRE_PER_BATCH", 30)
        monkeypatch.setattr(buffer, "_EXPIRE_AT_ONCE", 7)
        join = joined([A, B], deadline="1h", late="dead_letter")
        join.register(stream)
        keys = [f"k{n}" for n in range(200)]
        stream.publish(A, [part(A, key) for key in keys])
        if read == "before":
            work(stream, join, tmp_path)
        clock.advance(HOUR + 1)
        # Those for which there is no room in the batch are late all the same.
        stream.publish(B, [part(B, key) for key in keys])
        done = work(stream, join, tmp_path)
        assert completed(stream) == {}
        assert errors(stream) == {"JoinIncompleteError": 200, "LatePartError": 200}
        assert set(statuses(stream, tmp_path).values()) == {"expired"}
        assert sum(one.counts.get("expired_keys", 0) for one in done) == 200

    def test_more_expire_than_a_batch_takes_on_idle_inputs(
        self, stream: EventStream, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(buffer, "_EXPIRE_PER_BATCH", 30)
        join = joined([A, B], deadline="1h")
        join.register(stream)
        stream.publish(A, [part(A, f"k{n}") for n in range(200)])
        work(stream, join, tmp_path)
        clock.advance(HOUR)
        done = work(stream, join, tmp_path)
        assert {one.counts["expired_keys"] for one in done} <= set(range(1, 31))
        assert errors(stream) == {"JoinIncompleteError": 200}
        assert deadline_rows(stream) == []

    def test_it_may_be_longer_than_time(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined([A, B], deadline="1000000w")
        join.register(stream)
        stream.publish(A, [part(A, "x")])
        work(stream, join, tmp_path)
        stream.publish(B, [part(B, "x")])
        work(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a", "b"]}

    def test_without_one_keys_wait_for_ever(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined()
        join.register(stream)
        stream.publish(A, [part(A, "x")])
        work(stream, join, tmp_path)
        assert deadline_rows(stream) == []
        clock.advance(1000 * 365 * 24 * HOUR)
        stream.publish(B, [part(B, "x")])
        stream.publish(C, [part(C, "x")])
        work(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a", "b", "c"]}

    @pytest.mark.parametrize("missing", ["c", "b"])
    def test_optional_parts_are_waited_for_until_then(
        self, stream: EventStream, clock: Clock, tmp_path: Path, missing: str
    ) -> None:
        join = joined(deadline="1h", optional=["c"])
        join.register(stream)
        for topic in (A, B, C):
            stream.publish(
                topic, [part(topic, key) for key in ("all", "some") if (key, topic.name) != ("some", missing)]
            )
        work(stream, join, tmp_path)
        assert completed(stream) == {"all": ["a", "b", "c"]}
        clock.advance(HOUR)
        work(stream, join, tmp_path)
        if missing == "c":
            assert [key_missing for found in emitted(stream).values() for *_, key_missing in found if key_missing] == [
                ["c"]
            ]
            assert completed(stream) == {"all": ["a", "b", "c"], "some": ["a", "b"]}
            assert errors(stream) == {}
        else:
            assert errors(stream) == {"JoinIncompleteError": 2}

    def test_partial_hands_over_what_there_is(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined(deadline="1h", on_deadline="partial")
        join.register(stream)
        stream.publish(B, [part(B, "x")])
        clock.advance(HOUR)
        work(stream, join, tmp_path)
        assert [one for found in emitted(stream).values() for one in found] == [["x", {"b": ["b-x"]}, ["a", "c"]]]
        assert errors(stream) == {}
        assert statuses(stream, tmp_path) == {"x": "completed"}


class TestEventTime:
    """From the earliest part on, once all inputs have come past it."""

    @pytest.fixture
    def clocked(self, stream: EventStream, clock: Clock, tmp_path: Path) -> Callable[..., None]:
        """Let time pass, publish a part that happened at a second, do what is due."""

        def go(after: float, *parts: tuple[Any, str, float]) -> None:
            clock.advance(after)
            for topic, key, second in parts:
                time = from_micros(round((START + second) * 1e6))
                stream.publish(topic, [part(topic, key, f"{topic.name}-{key}-{second}", time=time)])
            work(stream, self.join(), tmp_path)

        self.join().register(stream)
        return go

    def join(self) -> Any:
        return joined(deadline=10, clock="event_time", idle_after=60, late="dead_letter", inputs={"a": A1, "b": B1})

    def test_it_waits_for_the_slowest_input(self, stream: EventStream, clocked: Callable[..., None]) -> None:
        clocked(1, (A1, "x", 0), (B1, "other", 0))
        clocked(1, (A1, "far", 1000))
        assert errors(stream) == {}
        clocked(1, (B1, "near", 10))
        assert errors(stream) == {}, "the watermark is at the deadline, not past it"
        clocked(1, (B1, "x", 9.5))
        assert "x" in completed(stream)
        clocked(1, (B1, "z", 11))
        assert errors(stream) == {"JoinIncompleteError": 1}, "of the key 'other'"

    def test_an_input_that_is_silent_for_long_is_not_waited_for(
        self, stream: EventStream, clocked: Callable[..., None], tmp_path: Path
    ) -> None:
        clocked(0, (A1, "x", 0), (B1, "y", 1))
        for second in range(10, 61, 10):
            clocked(10, (B1, f"y{second}", second))
        assert errors(stream) == {}
        # A has been silent for just more than a minute; nothing comes at all.
        clocked(MICRO)
        assert statuses(stream, tmp_path)["x"] == "expired"
        # It speaks again, of long ago: late, but it holds back what is new.
        clocked(1, (A1, "x", 2), (A1, "new", 50), (B1, "far", 70))
        assert errors(stream)["LatePartError"] == 1
        clocked(1, (B1, "new", 60))
        assert "new" in completed(stream)

    def test_time_goes_on_if_all_are_silent(
        self, stream: EventStream, clock: Clock, clocked: Callable[..., None]
    ) -> None:
        clocked(0, (A1, "x", 0), (B1, "x2", 5))
        clocked(60)
        assert errors(stream) == {}
        clocked(MICRO)  # from where the furthest was, as much as has passed since: 5 + 60
        assert errors(stream) == {"JoinIncompleteError": 2}

    def test_time_that_went_on_by_itself_goes_on_exactly(
        self, stream: EventStream, clocked: Callable[..., None]
    ) -> None:
        clocked(0, (A1, "x", 100), (B1, "y", 10))
        # The furthest input is at 100; x is due at 110, y at 20.
        clocked(60 + MICRO)
        assert errors(stream) == {"JoinIncompleteError": 2}

    @pytest.mark.parametrize("looked", [False, True], ids=["nobody looked", "somebody looked"])
    def test_what_comes_after_a_silence_is_late_whether_or_not_somebody_looked(
        self, stream: EventStream, clocked: Callable[..., None], clock: Clock, looked: bool
    ) -> None:
        clocked(0, (A1, "x", 0), (B1, "y", 0))
        if looked:
            clocked(120)
        else:
            clock.advance(120)
        clocked(0, (B1, "x", 1))
        assert completed(stream) == {}
        assert errors(stream) == {"JoinIncompleteError": 2, "LatePartError": 1}

    def test_events_may_be_of_any_time(self, stream: EventStream, clocked: Callable[..., None]) -> None:
        long_ago = -START - 1000.0  # before 1970
        clocked(1, (A1, "x", long_ago), (B1, "y", long_ago))
        assert errors(stream) == {}
        clocked(1, (B1, "x", long_ago + 5))
        assert completed(stream) == {"x": ["a", "b"]}
        clocked(1, (A1, "z", long_ago + 11), (B1, "z", long_ago + 11))
        assert errors(stream) == {"JoinIncompleteError": 1}

    def test_events_may_be_of_the_last_moment_there_is(
        self, stream: EventStream, clocked: Callable[..., None], tmp_path: Path
    ) -> None:
        never = datetime(9999, 12, 31, 23, 59, tzinfo=timezone.utc).timestamp() - START
        clocked(1, (A1, "x", 0), (A1, "never", never), (B1, "y", 0))
        clocked(1000)
        assert statuses(stream, tmp_path) == {"x": "expired", "y": "expired", "never": "expired"}

    def test_events_without_a_time_are_of_when_they_were_appended(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = self.join()
        join.register(stream)
        publish(stream, clock, part(A1, "x"), part(B1, "y"))
        clock.advance(10.1)
        publish(stream, clock, part(A1, "z"), part(B1, "z"))
        work(stream, join, tmp_path)
        assert errors(stream) == {"JoinIncompleteError": 2}


class TestCommand:
    """What an operator asks for: expire now."""

    @pytest.fixture(params=["1h", None], ids=["a deadline", "none"])
    def waiting(self, request: pytest.FixtureRequest, stream: EventStream, tmp_path: Path) -> Any:
        join = joined(deadline=request.param)
        join.register(stream)
        stream.publish(A, [part(A, key) for key in ("x", "y", 3, "z")])
        stream.publish(B, [part(B, "z")])
        stream.publish(C, [part(C, "z")])
        work(stream, join, tmp_path)
        return join

    def ask(self, stream: EventStream, **command: Any) -> list[int]:
        return [
            stream.coordinator.request("j", "command", {"kind": "expire", "task": task, **command}) for task in range(2)
        ]

    def test_it_expires_the_keys_it_names(self, stream: EventStream, waiting: Any, tmp_path: Path) -> None:
        requests = self.ask(stream, keys=["x", "3", "z", "unknown"])
        assert look(stream, waiting).reason == "requests are open"
        work(stream, waiting, tmp_path)
        assert [stream.coordinator.request_status(number) for number in requests] == ["done", "done"]
        assert statuses(stream, tmp_path) == {"x": "expired", "y": "pending", 3: "pending", "z": "completed"}
        assert errors(stream) == {"JoinIncompleteError": 1}
        self.ask(stream, keys=[3, 3.5, None])
        work(stream, waiting, tmp_path)
        assert statuses(stream, tmp_path)[3] == "expired"

    def test_it_expires_all_if_it_names_none(
        self, stream: EventStream, clock: Clock, waiting: Any, tmp_path: Path
    ) -> None:
        self.ask(stream)
        work(stream, waiting, tmp_path)
        assert statuses(stream, tmp_path) == {"x": "expired", "y": "expired", 3: "expired", "z": "completed"}
        clock.advance(HOUR)
        assert all("expired_keys" not in one.counts for one in work(stream, waiting, tmp_path))
        assert deadline_rows(stream) == []
        # Nothing is left of them but marks, and what is counted.
        assert sum(len(state_of(stream, "j", task)) for task in range(2)) == 4 + 2

    def test_what_else_is_asked_for_is_not_done(
        self, stream: EventStream, waiting: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (before,) = [statuses(stream, tmp_path)]
        (number,) = [stream.coordinator.request("j", "command", {"kind": "explode", "task": 0})]
        work(stream, waiting, tmp_path)
        assert stream.coordinator.request_status(number) == "done"
        assert statuses(stream, tmp_path) == before
        assert "join j cannot explode" in caplog.text

    def test_what_is_unread_may_come_too_late_for_it(self, stream: EventStream, waiting: Any, tmp_path: Path) -> None:
        stream.publish(B, [part(B, "x")])
        stream.publish(C, [part(C, "x")])
        self.ask(stream, keys=["x"])
        work(stream, waiting, tmp_path)
        assert statuses(stream, tmp_path)["x"] == "expired"

    def test_a_worker_does_it(self, stream: EventStream, waiting: Any, tmp_path: Path) -> None:
        requests = request_expiry(stream, "j", ["x", 3])
        work_resident(stream, waiting, tmp_path)
        assert {stream.coordinator.request_status(number) for number in requests} == {"done"}
        assert errors(stream) == {"JoinIncompleteError": 2}

    def test_it_is_what_a_deadline_would_do(self, stream: EventStream, tmp_path: Path) -> None:
        join = joined(deadline="1h", on_deadline="partial")
        join.register(stream)
        stream.publish(A, [part(A, "x")])
        work(stream, join, tmp_path)
        request_expiry(stream, "j", ["x"])
        work(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a"]}
