"""Dead letters go back into the buffer, wait anew, and complete; what is completed stays so."""

import random
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import EventStream, Joined, Topic, redrive
from djp_dagster.processing.redrive import request_redrive
from djp_dagster.streams.records import from_micros
from djp_dagster.testing import Clock
from tests.joining.kit import (
    OUT,
    PARTS,
    A,
    B,
    C,
    completed,
    errors,
    joined,
    part,
    statuses,
    tell,
    work,
    work_resident,
)
from tests.joining.test_parts import publish
from tests.processing.kit import all_records

HOUR = 3600.0


def expired(stream: EventStream, clock: Clock, join: Any, folder: Path, *parts: Any) -> None:
    """The parts have come, and waited in vain."""
    join.register(stream)
    publish(stream, clock, *parts)
    clock.advance(HOUR)
    work(stream, join, folder)


def test_expired_parts_complete_once_the_missing_one_has_come(
    stream: EventStream, clock: Clock, tmp_path: Path
) -> None:
    join = joined(deadline="1h")
    expired(stream, clock, join, tmp_path, part(A, "x"), part(C, "x"))
    assert errors(stream) == {"JoinIncompleteError": 2}
    letters = redrive(stream, join, state_folder=tmp_path)
    assert {one.status for one in letters} == {"redriven"}
    assert statuses(stream, tmp_path) == {"x": "pending"}
    clock.advance(HOUR - 1)  # the deadline is a new one
    publish(stream, clock, part(B, "x"))
    work(stream, join, tmp_path)
    assert completed(stream) == {"x": ["a", "b", "c"]}
    assert errors(stream) == {}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("remember", [None, "1d"])
def test_also_if_the_missing_one_was_late(
    stream: EventStream, clock: Clock, tmp_path: Path, order: int, remember: str | None
) -> None:
    join = joined(deadline="1h", late="dead_letter", remember=remember)
    expired(stream, clock, join, tmp_path, part(A, "x"), part(C, "x"))
    publish(stream, clock, part(B, "x"))
    work(stream, join, tmp_path)
    assert errors(stream) == {"JoinIncompleteError": 2, "LatePartError": 1}
    for letter in stream.dead_letters("j")[::order]:
        redrive(stream, join, [letter.id], state_folder=tmp_path)
    assert completed(stream) == {"x": ["a", "b", "c"]}
    assert errors(stream) == {}


def test_they_expire_again(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined(deadline="1h")
    expired(stream, clock, join, tmp_path, part(A, "x"), part(C, "x"))
    for _ in range(3):
        redrive(stream, join, state_folder=tmp_path)
        assert errors(stream) == {}
        clock.advance(HOUR)
        work(stream, join, tmp_path)
        assert errors(stream) == {"JoinIncompleteError": 2}
    found = stream.dead_letters("j", status=None)
    assert [one.status for one in found] == ["redriven"] * 6 + ["pending"] * 2
    assert len({(one.topic, one.raw, one.append_micros, one.offset) for one in found}) == 2


@pytest.mark.parametrize("late", ["drop", "dead_letter"])
def test_a_completed_key_never_completes_again(stream: EventStream, clock: Clock, tmp_path: Path, late: str) -> None:
    join = joined([A, B], deadline="1h", late="dead_letter")
    join.register(stream)
    publish(stream, clock, part(A, "x"), part(B, "x"), part(A, "x", "a2"), part(B, "x", "b2"))
    work(stream, join, tmp_path)
    assert errors(stream) == {"LatePartError": 2}
    again = joined([A, B], deadline="1h", late=late)
    letters = redrive(stream, again, state_folder=tmp_path)
    assert {one.status for one in letters} == {"pending" if late == "dead_letter" else "redriven"}
    assert completed(stream) == {"x": ["a", "b"]}
    assert statuses(stream, tmp_path) == {"x": "completed"}


def test_a_key_that_failed_is_tried_again_once_its_parts_are_back(
    stream: EventStream, clock: Clock, tmp_path: Path
) -> None:
    broken = [True]

    def handle(parts: Joined) -> None:
        tell(parts)
        if broken:
            raise ValueError("broken")

    # Failing again is no failure of what is pending: it stops nothing, however few may fail.
    join = joined([A, B], handle, max_poison=1)
    join.register(stream)
    publish(stream, clock, part(A, "x"), part(B, "x"))
    work(stream, join, tmp_path)
    strict = joined([A, B], handle, max_poison=0)
    for _ in range(2):
        redrive(stream, strict, state_folder=tmp_path)
        found = stream.dead_letters("j")
        assert errors(stream) == {"ValueError": 2}
        # The one that was redriven last, and failed, stays the dead letter it was.
        assert [one.redrives for one in found] == [1, 0]
        assert statuses(stream, tmp_path) == {"x": "failed"}
    broken.clear()
    redrive(stream, strict, state_folder=tmp_path)
    assert completed(stream) == {"x": ["a", "b"]}
    assert errors(stream) == {}


def test_a_redrive_does_not_end_what_is_about_to_complete(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    """It is done before what is pending is read: the last part, in time, though time is over by now."""
    narrow = joined(deadline="1h", duplicates="all", max_buffer_bytes=700)
    narrow.register(stream)
    publish(stream, clock, part(A, "x", pad="x" * 500))
    work(stream, narrow, tmp_path)
    publish(stream, clock, part(A, "x", "refused", pad="x" * 500))
    work(stream, narrow, tmp_path)
    assert errors(stream) == {"BufferFullError": 1}
    publish(stream, clock, part(B, "x"), part(C, "x"))
    clock.advance(2 * HOUR)
    wide = joined(deadline="1h", duplicates="all")
    request_redrive(stream, "j")
    work(stream, wide, tmp_path)
    assert completed(stream) == {"x": ["a", "b", "c"]}
    assert [record.data["parts"]["a"] for record in all_records(stream, OUT)] == [["a-x", "refused"]]
    assert errors(stream) == {}


def test_by_event_time_they_count_from_where_time_is(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    topics = [Topic("a", key="k"), Topic("b", key="k")]

    def at(second: float) -> Any:
        return from_micros(round((Clock()() + second) * 1e6))

    join = joined(topics, deadline=10, clock="event_time", idle_after=60, late="dead_letter")
    join.register(stream)
    publish(stream, clock, part(A, "x", time=at(0)), part(B, "other", time=at(0)))
    publish(stream, clock, part(A, "y", time=at(100)), part(B, "y", time=at(100)))
    work(stream, join, tmp_path)
    assert errors(stream) == {"JoinIncompleteError": 2}
    # Time is at 100, and stays there: what is redriven does not make an input seem idle, or awake.
    clock.advance(50)
    publish(stream, clock, part(B, "z", time=at(104)))
    redrive(stream, join, state_folder=tmp_path)
    work(stream, join, tmp_path)
    assert errors(stream) == {}
    assert statuses(stream, tmp_path) == {"x": "pending", "other": "pending", "y": "completed", "z": "pending"}
    publish(stream, clock, part(A, "now", time=at(110)), part(B, "now", time=at(109)))
    publish(stream, clock, part(B, "x", time=at(109)))
    work(stream, join, tmp_path)
    assert set(completed(stream)) == {"y", "now", "x"}
    publish(stream, clock, part(A, "end", time=at(111)), part(B, "end", time=at(111)))
    work(stream, join, tmp_path)
    assert statuses(stream, tmp_path)["other"] == "expired"


def test_all_of_many_come_back(stream: EventStream, clock: Clock, seed: random.Random, tmp_path: Path) -> None:
    join = joined(deadline="1h", late="dead_letter")
    keys = [f"k{n}" for n in range(15)]
    there = {key: seed.sample(PARTS, seed.randint(1, 2)) for key in keys}
    expired(stream, clock, join, tmp_path, *(part(topic, key) for key in keys for topic in there[key]))
    publish(stream, clock, *(part(topic, key) for key in keys for topic in PARTS if topic not in there[key]))
    work(stream, join, tmp_path)
    assert sum(errors(stream).values()) == 45
    ids = [letter.id for letter in stream.dead_letters("j")]
    seed.shuffle(ids)
    request_redrive(stream, "j", ids[:20])
    work_resident(stream, join, tmp_path)
    request_redrive(stream, "j", ids[20:])
    work_resident(stream, join, tmp_path)
    assert {key: sorted(parts) for key, parts in completed(stream).items()} == {key: ["a", "b", "c"] for key in keys}
    assert errors(stream) == {}
