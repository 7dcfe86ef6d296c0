"""Which parts a key waits for, which are kept, and what the handler is given."""

import random
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Event, EventStream, Joined, Topic, run_pending
from djp_dagster.errors import InvalidSettingError
from djp_dagster.testing import Clock, crash_at
from tests.joining.kit import OUT, PARTS, A, B, C, completed, emitted, errors, joined, part, statuses, work
from tests.processing.kit import Died, all_records

ORDERS = list(permutations(PARTS))


def publish(stream: EventStream, clock: Clock, *events: Event) -> None:
    """One after the other, each at a moment of its own."""
    for event in events:
        clock.advance(0.001)
        stream.publish(event.type, [event])


@pytest.mark.parametrize("runs_between", [False, True])
def test_every_order_of_the_parts_completes_each_key_once(
    stream: EventStream, clock: Clock, seed: random.Random, tmp_path: Path, runs_between: bool
) -> None:
    join = joined()
    join.register(stream)
    # Each key gets its parts in one of the orders, keys interleaved; each part comes up to three times.
    waiting = {f"{number}-{n}": list(order) for number, order in enumerate(ORDERS) for n in range(10)}
    seen: list[Event] = []
    while waiting:
        key = seed.choice(list(waiting))
        topic = waiting[key].pop(0)
        event = part(topic, key)
        seen.append(event)
        others = [part(topic, key, f"another-{len(seen)}"), seed.choice(seen)]
        publish(stream, clock, event, *seed.sample(others, seed.randint(0, 2)))
        waiting = {key: left for key, left in waiting.items() if left}
        if runs_between and seed.random() < 0.1:
            run_pending(stream, join, state_folder=tmp_path)
    work(stream, join, tmp_path)
    said = [one for found in emitted(stream).values() for one in found]
    expected = {key: {topic.name: [f"{topic.name}-{key}"] for topic in PARTS} for key in keys_of(seen)}
    assert len(said) == len(expected) == 60
    assert {key: parts for key, parts, _ in said} == expected
    assert all(missing == [] for _, _, missing in said)
    assert set(statuses(stream, tmp_path).values()) == {"completed"}
    assert errors(stream) == {}


def keys_of(events: Sequence[Event]) -> set[str]:
    return {event.data["k"] for event in events}


def test_numbers_and_texts_are_different_keys(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined([A, B])
    join.register(stream)
    publish(stream, clock, part(A, 7), part(B, "7", "b"))
    work(stream, join, tmp_path)
    assert completed(stream) == {}
    publish(stream, clock, part(B, 7))
    work(stream, join, tmp_path)
    assert [one for found in emitted(stream).values() for one in found] == [[7, {"a": ["a-7"], "b": ["b-7"]}, []]]
    assert statuses(stream, tmp_path) == {7: "completed", "7": "pending"}


def test_parts_may_be_types_of_events_in_one_topic(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    topic = Topic("changes", partitions=2, key="k")
    join = joined(inputs={"old": (topic, "Removed"), "new": (topic, "Added"), "b": B})

    def change(kind: str, id: str) -> Event:  # noqa: A002
        return Event(id=id, type=kind, source="/s", data={"k": "x"})

    join.register(stream)
    for event in (change("Renamed", "0"), change("Added", "1"), change("Renamed", "2")):
        stream.publish(topic, [event])
    publish(stream, clock, part(B, "x"))
    work(stream, join, tmp_path)
    assert completed(stream) == {}
    stream.publish(topic, [change("Removed", "3")])
    work(stream, join, tmp_path)
    assert emitted(stream)[OUT.partition_of(part(B, "x"))] == [["x", {"old": ["3"], "new": ["1"], "b": ["b-x"]}, []]]
    assert errors(stream) == {}


@pytest.mark.parametrize(("duplicates", "kept"), [("first", ["1"]), ("last", ["3"]), ("all", ["1", "2", "3"])], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_which_duplicates_are_kept(
    stream: EventStream, clock: Clock, tmp_path: Path, duplicates: str, kept: list[str], apart: bool
) -> None:
    join = joined([A, B], duplicates=duplicates)
    join.register(stream)
    for number in ("1", "2", "1", "3", "2") if duplicates != "last" else ("1", "2", "3"):
        publish(stream, clock, part(A, "x", number))
        if apart:
            work(stream, join, tmp_path)
    publish(stream, clock, part(B, "x"))
    done = work(stream, join, tmp_path)
    ((_, parts, _),) = emitted(stream)[OUT.partition_of(part(B, "x"))]
    assert parts["a"] == kept
    assert sum(one.counts.get("completed_keys", 0) for one in done) == 1


@pytest.mark.parametrize("count", [3, "of", "how.many"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_part_of_several_events(
    stream: EventStream, clock: Clock, tmp_path: Path, count: int | str, apart: bool
) -> None:
    join = joined([A, B], count={"b": count})
    join.register(stream)
    events = [part(B, "x", str(n), of=3, how={"many": 3}) for n in range(5)]
    # The same one twice is one; and what exceeds the count is a duplicate.
    for event in (events[0], events[1], events[0], events[1]):
        publish(stream, clock, event)
        if apart:
            work(stream, join, tmp_path)
    publish(stream, clock, part(A, "x"))
    work(stream, join, tmp_path)
    assert completed(stream) == {}
    publish(stream, clock, part(A, "y"), *(part(B, "y", f"y{n}", of=3, how={"many": 3}) for n in range(2)))
    publish(stream, clock, events[2], events[3])
    work(stream, join, tmp_path)
    assert emitted(stream)[OUT.partition_of(events[0])] == [["x", {"a": ["a-x"], "b": ["0", "1", "2"]}, []]]


def test_more_events_than_the_part_takes_are_duplicates(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    for duplicates, kept in (("first", ["0", "1"]), ("last", ["3", "4"]), ("all", ["0", "1", "2", "3", "4"])):
        join = joined([A, B], count={"b": 2}, duplicates=duplicates, group=duplicates)
        join.register(stream)
        publish(stream, clock, *(part(B, duplicates, str(n)) for n in range(5)), part(A, duplicates))
        work(stream, join, tmp_path)
        said = {key: parts for found in emitted(stream).values() for key, parts, _ in found}
        assert said[duplicates]["b"] == kept


@pytest.mark.parametrize("said", [None, 0, -1, True, "3", 2.0, [3]])
def test_an_event_that_does_not_say_how_many_is_a_dead_letter(
    stream: EventStream, clock: Clock, tmp_path: Path, said: Any
) -> None:
    join = joined([A, B], count={"b": "of"}, deadline="1h")
    join.register(stream)
    publish(stream, clock, part(B, "x", "wrong", of=said))
    work(stream, join, tmp_path)
    assert errors(stream) == {"InvalidEventError": 1}
    (letter,) = stream.dead_letters("j")
    assert f"data['of'] must say how many events the part 'b' takes, a number above 0, not {said!r}" in letter.error
    # It has not begun anything: the deadline counts from the first part that is one.
    assert statuses(stream, tmp_path) == {}
    clock.advance(3599)
    publish(stream, clock, part(B, "x", "right", of=1))
    clock.advance(3000)
    publish(stream, clock, part(A, "x"))
    work(stream, join, tmp_path)
    assert completed(stream) == {"x": ["a", "b"]}


class Kept:
    """A handler that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, parts: Joined) -> None:
        self.seen.append(
            {
                "records": [record.id for record in parts.records],
                "positions": [record.position for record in parts.records],
                "keys": [record.idempotency_key for record in parts.records],
                "times": [record.append_time for record in parts.records],
                "first": parts.first_time,
                "data": {name: found.data for name, found in parts.items()},
            }
        )
        with pytest.raises(KeyError):
            parts["nothing"]
        assert (parts.get("nothing"), len(parts), parts.complete, parts.missing) == (None, 3, True, ())
        assert repr(parts) == "Joined(key='x', parts=['a', 'b', 'c'], missing=[])"
        with pytest.raises(InvalidSettingError, match="a join keeps its parts in its state, and nothing else"):
            _ = parts.state


def test_a_handler_cannot_tell_whether_parts_have_waited(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    together, apart = Kept(), Kept()
    joins = [joined(handler=together, group="together"), joined(handler=apart, group="apart")]
    for join in joins:
        join.register(stream)
    before: list[Event] = []
    for topic in (C, A, B):
        # The same event again, also of what waits already, must leave no trace either.
        publish(stream, clock, *before, part(topic, "x", note=topic.name))
        before.append(part(topic, "x", note=topic.name))
        work(stream, joins[1], tmp_path)
    work(stream, joins[0], tmp_path)
    (one,), (other,) = together.seen, apart.seen
    assert one["records"] == ["c-x", "a-x", "b-x"]
    assert one["first"] == one["times"][0] < one["times"][1] < one["times"][2]
    assert one["data"]["c"] == {"k": "x", "note": "c"}
    # Only the group in it differs.
    assert [key.replace("/together/", "/apart/") for key in one["keys"]] == other["keys"]
    assert len(set(one["keys"])) == 3
    assert {name: value for name, value in one.items() if name != "keys"} == {
        name: value for name, value in other.items() if name != "keys"
    }


def test_what_is_emitted_is_emitted_once_whatever_crashes(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined()
    join.register(stream)
    publish(stream, clock, part(A, "x"), part(B, "x"))
    work(stream, join, tmp_path)
    publish(stream, clock, part(C, "x"))
    for point in ("3.reading", "4.handled", "5.stored"):
        with pytest.raises(Died), crash_at(point, Died()):
            run_pending(stream, join, state_folder=tmp_path)
        assert completed(stream) == {}
    with pytest.raises(Died), crash_at("6.committed", Died()):
        run_pending(stream, join, state_folder=tmp_path)
    work(stream, join, tmp_path / "elsewhere")
    publish(stream, clock, part(C, "x"), part(C, "x", "another"))
    work(stream, join, tmp_path)
    assert completed(stream) == {"x": ["a", "b", "c"]}
    (record,) = all_records(stream, OUT)
    assert record.id.endswith("-0-0")  # derived from the offset of the part that came last


def test_parts_may_be_renamed_while_others_wait(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    before = joined(deadline="1h")
    before.register(stream)
    publish(stream, clock, part(A, "x"), part(C, "x"), part(A, "y"))
    work(stream, before, tmp_path)
    after = joined(inputs={"first": A, "b": B, "third": C}, deadline="1h")
    publish(stream, clock, part(B, "x"))
    work(stream, after, tmp_path)
    # Under their old names they do not count.
    assert completed(stream) == {}
    publish(stream, clock, part(C, "x", "new-c"), part(A, "x", "new-a"))
    work(stream, after, tmp_path)
    assert completed(stream) == {"x": ["first", "b", "third"]}
    # But what was there is not lost.
    clock.advance(3600)
    work(stream, after, tmp_path)
    assert errors(stream) == {"JoinIncompleteError": 1}
