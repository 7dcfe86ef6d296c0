"""What comes after its key is done: completed, expired, or failed."""

from pathlib import Path
from typing import Any

import pytest

from djp_dagster import EventStream, Joined
from djp_dagster.streams.records import from_micros
from djp_dagster.testing import Clock
from tests.joining.kit import LATE, OUT, A, B, completed, errors, joined, part, statuses, tell, work
from tests.joining.test_parts import publish
from tests.processing.kit import all_records
from tests.state.kit import state_of

HOUR = 3600.0


def complete(stream: EventStream, clock: Clock, key: str = "x") -> None:
    publish(stream, clock, part(A, key), part(B, key))


def expire(stream: EventStream, clock: Clock, key: str = "x") -> None:
    publish(stream, clock, part(A, key))
    clock.advance(HOUR + 1)


ENDS = pytest.mark.parametrize(("end", "status"), [(complete, "completed"), (expire, "expired")], ids=["done", "gone"])


@ENDS
@pytest.mark.parametrize("late", [None, "drop", "dead_letter", "topic"])
@pytest.mark.parametrize("at_once", [False, True])
def test_it_goes_where_it_should(
    stream: EventStream, clock: Clock, tmp_path: Path, end: Any, status: str, late: str | None, at_once: bool
) -> None:
    join = joined([A, B], deadline="1h", late=LATE if late == "topic" else late)
    join.register(stream)
    end(stream, clock)
    if not at_once:
        work(stream, join, tmp_path)
    late_event = part(B, "x", "late", note="as it is")
    publish(stream, clock, late_event)
    done = work(stream, join, tmp_path)
    assert sum(one.counts.get("late_parts", 0) for one in done) == 1
    assert [record.event() for record in all_records(stream, LATE)] == ([late_event] if late == "topic" else [])
    expected = {"JoinIncompleteError": 1} if status == "expired" else {}
    kept = late == "dead_letter" or (late is None and status == "expired")
    assert errors(stream) == expected | ({"LatePartError": 1} if kept else {})
    if kept:
        found = [letter.error for letter in stream.dead_letters("j") if letter.error_type == "LatePartError"]
        assert found == [f"key 'x' was {status} before it came"]
    assert statuses(stream, tmp_path) == {"x": status}


def test_what_a_failed_key_gets_later_is_late(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    def refuse(parts: Joined) -> None:
        parts.fail("no")

    join = joined([A, B], handler=refuse, late="dead_letter")
    join.register(stream)
    complete(stream, clock)
    publish(stream, clock, part(A, "x", "again"))
    work(stream, join, tmp_path)
    assert errors(stream) == {"Failed": 2, "LatePartError": 1}


@ENDS
def test_it_is_late_for_ever_on_any_disk(
    stream: EventStream, clock: Clock, tmp_path: Path, end: Any, status: str
) -> None:
    join = joined([A, B], deadline="1h", late="dead_letter")
    join.register(stream)
    end(stream, clock)
    for year in range(3):
        work(stream, join, tmp_path / f"disk-{year}")
        clock.advance(365 * 24 * HOUR)
        publish(stream, clock, part(A, "x", f"a{year}"), part(B, "x", f"b{year}"))
    work(stream, join, tmp_path / "empty")
    assert len(completed(stream)) == (status == "completed")
    assert errors(stream)["LatePartError"] == 6
    assert statuses(stream, tmp_path / "empty") == {"x": status}


@ENDS
@pytest.mark.parametrize("downtime", [False, True], ids=["read at once", "read after a downtime"])
def test_what_is_forgotten_begins_anew(
    stream: EventStream, clock: Clock, tmp_path: Path, end: Any, status: str, downtime: bool
) -> None:
    join = joined([A, B], deadline="1h", remember="2h", late="dead_letter")
    join.register(stream)
    end(stream, clock)
    # Completed just now; or expired a second ago, when nobody looked.
    done_at = clock() if status == "completed" else clock() - 1
    clock.now_s = done_at + 2 * HOUR - 0.01
    publish(stream, clock, part(A, "x", "just late"))
    if not downtime:
        work(stream, join, tmp_path)
    clock.advance(0.02)
    publish(stream, clock, part(A, "x", "anew"), part(B, "x", "anew b"))
    work(stream, join, tmp_path)
    assert errors(stream).get("LatePartError") == 1
    said = [record.data["parts"] for record in all_records(stream, OUT)]
    assert said[-1] == {"a": ["anew"], "b": ["anew b"]}
    assert len(said) == (2 if status == "completed" else 1)


def test_forgetting_shrinks_the_state(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined([A, B], deadline="1h", remember="3h")
    join.register(stream)
    for n in range(50):
        complete(stream, clock, f"done-{n}")
        publish(stream, clock, part(A, f"gone-{n}"))
    work(stream, join, tmp_path)
    clock.advance(HOUR + 1)
    work(stream, join, tmp_path)
    assert sum(len(state_of(stream, "j", task)) for task in range(2)) == 2 * 100 + 2
    clock.advance(3 * HOUR)
    for n in range(10):
        publish(stream, clock, part(A, f"other-{n}"))
    work(stream, join, tmp_path)
    # Ten that wait, with their places in the index; and what is counted.
    assert sum(len(state_of(stream, "j", task)) for task in range(2)) == 2 * 10 + 2
    assert set(statuses(stream, tmp_path).values()) == {"pending"}


def test_a_key_that_begins_anew_is_remembered_from_its_new_end_on(
    stream: EventStream, clock: Clock, tmp_path: Path
) -> None:
    join = joined([A, B], remember="1h", late="dead_letter")
    join.register(stream)
    for n in range(3):
        publish(stream, clock, part(A, "x", f"a{n}"), part(B, "x", f"b{n}"))
        work(stream, join, tmp_path)
        clock.advance(HOUR - 1)
        publish(stream, clock, part(A, "x", f"late{n}"))
        work(stream, join, tmp_path)
        assert errors(stream) == {"LatePartError": n + 1}
        # Nothing but the mark, its place in the index, and what is counted: in the one task that has ever had a key.
        assert sum(len(state_of(stream, "j", task)) for task in range(2)) == 3
        clock.advance(2)
    assert [record.data["parts"]["a"] for record in all_records(stream, OUT)] == [["a0"], ["a1"], ["a2"]]


class TestInEventTime:
    """Event time may come in any order."""

    def at(self, clock: Clock, seconds: float) -> Any:
        return from_micros(round((Clock()() + seconds) * 1e6))

    def test_a_part_later_than_its_key_is_due_is_late_and_the_key_waits_on(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = joined([A, B], deadline=10, clock="event_time", idle_after="1d", late="dead_letter")
        join.register(stream)
        publish(
            stream,
            clock,
            part(A, "x", time=self.at(clock, 0)),
            part(A, "x", "too late", time=self.at(clock, 11)),
            part(B, "x", time=self.at(clock, 10)),
        )
        work(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a", "b"]}
        assert [letter.error for letter in stream.dead_letters("j")] == ["key 'x' is due before it"]

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("late", ["drop", "dead_letter", "topic"])
    def test_an_earlier_part_brings_the_deadline_forward(
        self, stream: EventStream, clock: Clock, tmp_path: Path, apart: bool, late: str
    ) -> None:
        join = joined(
            [A, B], tell, deadline=10, clock="event_time", idle_after="1d", late=LATE if late == "topic" else late
        )
        join.register(stream)
        publish(stream, clock, part(B, "x", "later", time=self.at(clock, 15)))
        if apart:
            work(stream, join, tmp_path)
        publish(stream, clock, part(A, "x", time=self.at(clock, 4)))
        work(stream, join, tmp_path)
        assert completed(stream) == {}
        publish(stream, clock, part(B, "x", time=self.at(clock, 14)))
        work(stream, join, tmp_path)
        assert completed(stream) == {"x": ["a", "b"]}
        assert errors(stream) == ({"LatePartError": 1} if late == "dead_letter" else {})
        assert [record.id for record in all_records(stream, LATE)] == (["later"] if late == "topic" else [])
