"""Keys whose handler fails, and records that are no parts: nothing of them stops the others."""

from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Event, EventStream, Joined, Topic, run_pending
from djp_dagster.errors import InvalidSettingError, RetriesExhaustedError, SystemicFailureError
from djp_dagster.testing import Clock
from tests.joining.kit import (
    OUT,
    PARTS,
    TASKS,
    A,
    B,
    completed,
    errors,
    joined,
    keys_of_task,
    part,
    statuses,
    tell,
    work,
)
from tests.joining.test_parts import publish
from tests.processing.kit import NO_EVENT, all_records, append_raw, committed, raw


def all_parts(*keys: str) -> list[Event]:
    return [part(topic, key) for topic in PARTS for key in keys]


BROKEN = ValueError("broken")


def failing_on(*keys: str, with_error: Any = BROKEN) -> Any:
    """A handler that has effects, then fails."""

    def handle(parts: Joined) -> None:
        tell(parts)
        if parts.key in keys:
            if isinstance(with_error, str):
                parts.fail(with_error)
            else:
                raise with_error

    return handle


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        (BROKEN, "ValueError", "broken"),
        ("not this one", "Failed", "not this one"),
        (KeyError("images"), "KeyError", "'images'"),
    ],
)
def test_a_key_fails_alone(
    stream: EventStream, clock: Clock, tmp_path: Path, apart: bool, error: Any, name: str, text: str
) -> None:
    join = joined(handler=failing_on("bad", with_error=error), late="dead_letter")
    join.register(stream)
    events = all_parts("good", "bad", "better")
    publish(stream, clock, *events[:-3])
    if apart:
        work(stream, join, tmp_path)
    publish(stream, clock, *events[-3:])
    done = work(stream, join, tmp_path)
    assert set(completed(stream)) == {"good", "better"}
    assert statuses(stream, tmp_path) == {"good": "completed", "bad": "failed", "better": "completed"}
    found = stream.dead_letters("j")
    assert sorted((one.topic, one.error_type, one.error) for one in found) == [(topic, name, text) for topic in "abc"]
    assert sum(one.counts.get("failed_keys", 0) for one in done) == 1
    assert sum(one.dead_letters for one in done) == 3
    # Their own bytes, so that they outlive their topics.
    assert {one.topic: one.raw for one in found} == {topic.name: raw(part(topic, "bad")) for topic in PARTS}


def test_what_fails_for_now_is_tried_again(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    away = [ConnectionError("away"), TimeoutError("slow")]

    def handle(parts: Joined) -> None:
        tell(parts)
        if away:
            raise away.pop()

    join = joined(handler=handle)
    join.register(stream)
    publish(stream, clock, *all_parts("x", "y"))
    work(stream, join, tmp_path)
    assert set(completed(stream)) == {"x", "y"}
    assert errors(stream) == {}


def test_what_stays_away_stops_the_run_and_nothing_else(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    gone = [True]

    def handle(parts: Joined) -> None:
        tell(parts)
        if gone:
            raise ConnectionError("away")

    join = joined(handler=handle)
    join.register(stream)
    publish(stream, clock, *all_parts("x"))
    before = committed(stream, join)
    for _ in range(2):
        with pytest.raises(RetriesExhaustedError, match="ConnectionError: away"):
            run_pending(stream, join, state_folder=tmp_path)
    assert committed(stream, join) == before
    assert (completed(stream), errors(stream), statuses(stream, tmp_path)) == ({}, {}, {})
    gone.clear()
    work(stream, join, tmp_path)
    assert set(completed(stream)) == {"x"}


@pytest.mark.parametrize("limit", [0, 3])
def test_more_than_may_fail_are_the_fault_of_the_code(
    stream: EventStream, clock: Clock, tmp_path: Path, limit: int
) -> None:
    keys = keys_of_task(0, 2 * limit + 2)
    few, many, fine = keys[:limit], keys[limit:-1], keys[-1]
    broken = joined(handler=failing_on(*keys[:-1]), max_poison=limit)
    broken.register(stream)
    publish(stream, clock, *all_parts(*few))
    work(stream, broken, tmp_path)
    tolerated = {"ValueError": 3 * limit} if limit else {}
    assert errors(stream) == tolerated
    before = committed(stream, broken)
    publish(stream, clock, *all_parts(*many, fine))
    for _ in range(2):
        with pytest.raises(SystemicFailureError, match=f"fails beyond {limit + 1} poison records"):
            run_pending(stream, broken, state_folder=tmp_path)
    assert errors(stream) == tolerated
    assert committed(stream, broken) == before
    assert completed(stream) == {}
    work(stream, joined(max_poison=limit), tmp_path)
    assert set(completed(stream)) == {*many, fine}
    assert errors(stream) == tolerated


def test_what_a_handler_fails_itself_is_not_counted(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined(handler=failing_on(*(f"k{n}" for n in range(30)), with_error="by hand"), max_poison=0)
    join.register(stream)
    publish(stream, clock, *all_parts(*(f"k{n}" for n in range(31))))
    work(stream, join, tmp_path)
    assert errors(stream) == {"Failed": 90}
    assert set(completed(stream)) == {"k30"}


def test_a_wrong_setting_blames_no_key(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    def handle(parts: Joined) -> None:
        parts.emit(OUT.event(k=1), topic="nobody declared it")

    join = joined(handler=handle)
    join.register(stream)
    publish(stream, clock, *all_parts("x"))
    with pytest.raises(InvalidSettingError, match="declare it with @consumer"):
        run_pending(stream, join, state_folder=tmp_path)
    assert errors(stream) == {}


class TestNoParts:
    """Records that cannot be parts of anything."""

    def test_without_a_key(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined(inputs={"a": A, "b": B})
        join.register(stream)
        wrong = [Event(type="a", source="/s", data=data) for data in ({}, None, {"k": None}, {"k": 1.5}, ["k"])]
        wrong.append(Event(type="a", source="/s", data={"k": True}))
        wrong.append(Event(type="a", source="/s", data={"k": "x"}, ext={"partitionkey": True}))
        append_raw(stream, A, [raw(event) for event in wrong])
        publish(stream, clock, part(A, "x"), part(B, "x"))
        work(stream, join, tmp_path)
        assert errors(stream) == {"MissingKeyError": 7}
        assert set(completed(stream)) == {"x"}

    def test_no_events_at_all(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = joined(inputs={"a": A, "b": B})
        join.register(stream)
        for partition in range(TASKS):
            append_raw(stream, A, [NO_EVENT, raw(part(A, f"x{partition}")), NO_EVENT], partition)
            append_raw(stream, B, [raw(part(B, f"x{partition}")), NO_EVENT], partition)
        work(stream, join, tmp_path)
        assert errors(stream) == {"UndecodableRecordError": 6}
        assert set(completed(stream)) == {"x0", "x1"}

    def test_a_late_event_that_its_topic_does_not_take(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        """It has no key there: it alone becomes a dead letter."""
        by_other = Topic("late-by-other", partitions=TASKS, key="other")
        join = joined(inputs={"a": A, "b": B}, late=by_other)
        join.register(stream)
        publish(stream, clock, part(A, "x"), part(B, "x"))
        publish(stream, clock, part(A, "x", "bad"), part(A, "x", "good", other=1), part(A, "y"), part(B, "y"))
        work(stream, join, tmp_path)
        assert errors(stream) == {"MissingKeyError": 1}
        assert [record.id for record in all_records(stream, by_other)] == ["good"]
        assert set(completed(stream)) == {"x", "y"}

    @pytest.mark.parametrize(
        ("event", "error", "text"),
        [
            (OUT.event(other=1), "MissingKeyError", "has no key: data['k']"),
            (OUT.event(k=1, pad="x" * 2_000_000), "EventTooLargeError", "topic 'out' takes 1048576"),
            (OUT.event(k=1, what=object()), "InvalidEventError", "data cannot be encoded"),
            ("no event", "AttributeError", "'str' object has no attribute"),
        ],
        ids=["no key", "too large", "no value", "no event"],
    )
    def test_what_a_handler_emits_that_its_topic_does_not_take(
        self, stream: EventStream, clock: Clock, tmp_path: Path, event: Any, error: str, text: str
    ) -> None:
        """It is the fault of its key, and nobody else's."""

        def handle(parts: Joined) -> None:
            tell(parts)
            if parts.key == "bad":
                parts.emit(event)

        join = joined(handler=handle)
        join.register(stream)
        publish(stream, clock, *all_parts("good", "bad", "better"))
        work(stream, join, tmp_path)
        assert set(completed(stream)) == {"good", "better"}
        assert errors(stream) == {error: 3}
        assert all(text in letter.error for letter in stream.dead_letters("j"))
