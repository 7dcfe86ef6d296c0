"""Inputs that do not lie together: refused, or copied to topics that do."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Event, EventStream, Join, Joined, Topic, open_stream
from djp_dagster.errors import CoPartitionError
from djp_dagster.streams.records import from_micros
from djp_dagster.testing import Clock
from tests.joining.kit import LATE, OUT, TASKS, A, completed, errors, joined, part, statuses, tell, work
from tests.joining.test_parts import publish
from tests.processing.kit import NO_EVENT, all_records, append_raw, raw
from tests.streams.heavy import counted_store

BY_OTHER = Topic("by-other", partitions=3, key="image")
NO_KEY = Topic("no-key")
TWO, FOUR = Topic("two", partitions=2, key="k"), Topic("four", partitions=4, key="k")
TEXT = "a long text " * 500


@pytest.fixture
def stream(clock: Clock, tmp_path: Path) -> Iterator[EventStream]:
    store, _ = counted_store(tmp_path / "payloads")
    with open_stream(tmp_path / "stream.db", payloads=store, clock=clock) as opened:
        for topic in (OUT, LATE):
            opened.create_topic(topic)
        yield opened


def do_all(stream: EventStream, join: Join, folder: Path) -> None:
    join.register(stream)
    for consumer in (*join.helpers, join):
        work(stream, consumer, folder)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "apart", "count"),
    [
        ({"a": A, "o": BY_OTHER}, "'by-other' by 'image' into 3", 2),
        ({"a": A, "n": NO_KEY}, "'no-key' by None into 1", 2),
        ({"t": TWO, "f": FOUR}, "'two' by 'k' into 2", 4),
        ({"o": BY_OTHER, "n": NO_KEY}, "'by-other' by 'image' into 3, 'no-key' by None into 1", 3),
    ],
)
def test_they_are_refused_by_name(inputs: Any, apart: str, count: int) -> None:
    with pytest.raises(CoPartitionError) as refused:
        joined(inputs=inputs)
    assert str(refused.value) == (
        f"join 'j' needs its inputs partitioned by 'k' into {count}, so that all parts of a key meet in one task; not "
        f"so: {apart}. Declare them alike, or let it copy them: @join(repartition=True)"
    )
    assert refused.value.facts["group"] == "j"
    assert refused.value.facts["topics"] == sorted(name for name in ("by-other", "no-key", "two") if name in apart)


def test_what_lies_together_is_left_alone() -> None:
    join = joined(inputs={"a": A, "o": BY_OTHER, "t": TWO}, repartition=True)
    assert [topic.name for topic in join.topics] == ["a", "by-other-by-k-for-j", "two"]
    (helper,) = join.helpers
    assert (helper.group, [topic.name for topic in helper.topics]) == ("j-repartition-by-other", ["by-other"])
    (target,) = helper.emits
    assert (target.key, target.partitions, target.retention) == ("k", 2, "1d")
    assert helper.__doc__ == "The events of by-other, partitioned by k for j."
    assert joined(inputs={"a": A, "t": TWO}, repartition=True).helpers == ()
    kept = Topic("kept", key="z", retention="7d", max_event_bytes=5000)
    (target,) = joined(inputs={"a": A, "kept": kept}, repartition=True).helpers[0].emits
    assert (target.retention, target.max_event_bytes) == ("7d", 5000)


def test_two_joins_have_copies_of_their_own() -> None:
    one, two = (joined(inputs={"a": A, "o": BY_OTHER}, repartition=True, group=group) for group in ("one", "two"))
    assert {helper.group for join in (one, two) for helper in join.helpers} == {
        "one-repartition-by-other",
        "two-repartition-by-other",
    }
    assert not {topic.name for topic in one.helpers[0].emits} & {topic.name for topic in two.helpers[0].emits}


@pytest.mark.parametrize("inputs", [{"a": A, "x": BY_OTHER}, {"x": NO_KEY, "a": A}, {"a": TWO, "x": FOUR}])
def test_they_are_copied_and_meet(stream: EventStream, clock: Clock, tmp_path: Path, inputs: dict[str, Topic]) -> None:
    join = joined(inputs=inputs, repartition=True)
    join.register(stream)
    keys = [*(f"k{n}" for n in range(20)), *range(5)]
    for topic in inputs.values():
        stream.publish(topic, [part(topic, key, image=f"i{key}") for key in keys])
    do_all(stream, join, tmp_path / "state")
    assert completed(stream) == {key: list(inputs) for key in keys}
    # What is copied stays the event it is.
    for helper in join.helpers:
        (source,), (target,) = helper.topics, helper.emits
        assert Counter(record.id for record in all_records(stream, target)) == Counter(
            record.id for record in all_records(stream, source)
        )
        assert {record.partition for record in all_records(stream, target)} == set(range(target.partitions))
        assert stream.dead_letters(helper.group) == []


def test_a_key_of_its_topics_own_choice_gives_way(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    """`partitionkey` decides where an event lies in its own topic; joined is by what its data says."""
    join = joined(inputs={"a": A, "x": BY_OTHER}, repartition=True)
    join.register(stream)
    stream.publish(A, [part(A, f"k{n}") for n in range(10)])
    stream.publish(
        BY_OTHER,
        [
            Event(id=f"x{n}", type="by-other", source="/s", data={"k": f"k{n}"}, ext={"partitionkey": "one", "more": n})
            for n in range(10)
        ],
    )
    do_all(stream, join, tmp_path / "state")
    assert set(completed(stream)) == {f"k{n}" for n in range(10)}
    (copies,) = join.helpers[0].emits
    assert {(record.id, (record.ext or {})["more"]) for record in all_records(stream, copies)} == {
        (f"x{n}", n) for n in range(10)
    }


@pytest.mark.parametrize("explicit", [False, True])
def test_data_in_the_payload_store_is_not_copied(
    stream: EventStream, clock: Clock, tmp_path: Path, explicit: bool
) -> None:
    heavy = Topic("heavy", partitions=3, key="image", offload_above=1000)
    seen: list[str] = []

    def handle(parts: Joined) -> None:
        tell(parts)
        assert parts["x"].claim is not None
        assert parts["x"].data == {"k": parts.key, "image": "i", "text": TEXT}
        seen.append(parts["x"].topic)

    join = joined(inputs={"a": A, "x": heavy}, handler=handle, repartition=True)
    join.register(stream)
    ext = {"partitionkey": "here"} if explicit else None
    events = [part(heavy, f"k{n}", image="i", text=TEXT) for n in range(6)]
    stream.publish(heavy, [event.replace(ext=ext) for event in events])
    do_all(stream, join, tmp_path / "state")
    stream.publish(A, [part(A, f"k{n}") for n in range(6)])
    do_all(stream, join, tmp_path / "elsewhere")
    assert set(completed(stream)) == {f"k{n}" for n in range(6)}
    assert set(seen) == {"heavy-by-k-for-j"}
    (copies,) = join.helpers[0].emits
    assert [record.claim is not None for record in all_records(stream, copies)] == [True] * 6


def test_what_has_no_key_is_a_dead_letter_of_the_copying(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined(inputs={"a": A, "x": NO_KEY}, repartition=True)
    join.register(stream)
    append_raw(stream, NO_KEY, [raw(Event(type="no-key", source="/s", data={})), NO_EVENT, raw(part(NO_KEY, "x"))])
    publish(stream, clock, part(A, "x"))
    do_all(stream, join, tmp_path / "state")
    assert errors(stream, "j-repartition-no-key") == {"MissingKeyError": 1, "UndecodableRecordError": 1}
    assert errors(stream) == {}
    assert set(completed(stream)) == {"x"}


def test_event_time_survives_the_copying(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    """Of events that state no time, it is when they were appended first, however late they are copied."""
    topic, other = Topic("a", key="k"), Topic("x", key="image")
    join = joined(inputs={"a": topic, "x": other}, repartition=True, clock="event_time", deadline=10, idle_after="1d")
    join.register(stream)
    stated = from_micros(round((clock() + 5) * 1e6))
    publish(stream, clock, part(topic, "in time"), part(topic, "late"))
    clock.advance(9)
    publish(stream, clock, part(other, "in time", image=1), part(other, "stated", image=1, time=stated))
    clock.advance(2)
    publish(stream, clock, part(other, "late", image=1), part(topic, "stated"))
    clock.advance(3600)
    do_all(stream, join, tmp_path / "state")
    assert statuses(stream, tmp_path / "state") == {"in time": "completed", "late": "expired", "stated": "completed"}


def test_its_groups_exist_before_anything_is_published(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined(inputs={"a": A, "x": BY_OTHER}, repartition=True)
    info = join.register(stream)
    assert info.tasks == TASKS
    assert stream.coordinator.group("j-repartition-by-other").topics == ("by-other",)
