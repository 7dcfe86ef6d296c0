"""Where batches end, against a brute-force model."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djp_dagster import Event, EventStream, Threshold, Topic
from djp_dagster.processing.cutting import cut_ranges, deadlines_within, nth_position, prefix
from djp_dagster.streams.model import Deadline, Range
from djp_dagster.streams.records import TopicPartition, encode_event
from djp_dagster.testing import Clock, memory_stream
from tests.processing.kit import NUMBERS, fill, numbers

TOPIC = Topic("t", partitions=3)
Sizes = dict[TopicPartition, list[int]]


def some_event(topic: Topic, chance: random.Random) -> Event:
    """An event of random size whose id, and so its partition, is random but the same for the same seed."""
    return topic.event(pad="x" * chance.choice([0, 5, 50, 500])).replace(id=f"{chance.getrandbits(64):016x}")


def grow(stream: EventStream, chance: random.Random) -> Sizes:
    """Publish record batches of random sizes; the encoded size of every record."""
    stream.create_topic(TOPIC)
    sizes: Sizes = {TopicPartition(TOPIC.name, partition): [] for partition in range(TOPIC.partitions)}
    for _ in range(chance.randint(0, 8)):
        events = [some_event(TOPIC, chance) for _ in range(chance.randint(1, 12))]
        stream.publish(TOPIC, events)
        for event in events:
            sizes[TopicPartition(TOPIC.name, TOPIC.partition_of(event))].append(len(encode_event(event)))
    return sizes


def bytes_of(sizes: Sizes, ranges: tuple[Range, ...]) -> int:
    return sum(sum(sizes[part.at][part.start : part.end]) for part in ranges)


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 2**32), events=st.integers(1, 60) | st.none(), size=st.integers(1, 4000) | st.none())
def test_a_cut_stays_in_its_bounds_and_moves(number: int, events: int | None, size: int | None) -> None:
    chance = random.Random(number)
    if events is None and size is None:
        events = 1
    bound = Threshold(events=events, bytes=size)
    with memory_stream(clock=Clock()) as stream:
        sizes = grow(stream, chance)
        positions = {at: chance.randint(0, len(held)) for at, held in sizes.items()}
        until = {at: chance.randint(positions[at], len(held)) for at, held in sizes.items()}
        ranges = cut_ranges(stream.log, positions, until, bound)
    pending = {at: until[at] - positions[at] for at in positions if until[at] > positions[at]}
    assert bool(ranges) == bool(pending), "one record at least, if there is one"
    assert all(part.start == positions[part.at] < part.end <= until[part.at] for part in ranges)
    assert len({part.at for part in ranges}) == len(ranges)
    count = sum(part.end - part.start for part in ranges)
    assert events is None or count <= events
    if size is not None and count > 1:
        # Stored batches carry a few bytes of their own, which count as well; the bound holds for the records.
        assert bytes_of(sizes, ranges) <= size
    if size is None and pending:
        assert events is not None
        total = sum(pending.values())
        assert count == min(total, events)
        exact = {at: min(total, events) * held / total for at, held in pending.items()}
        taken = {part.at: part.end - part.start for part in ranges}
        assert all(abs(taken.get(at, 0) - share) < 1 for at, share in exact.items()), "in proportion to what is pending"


@settings(max_examples=40, deadline=None)
@given(number=st.integers(0, 2**32), size=st.integers(1, 3000))
def test_a_single_partition_is_cut_as_long_as_the_bytes_allow(number: int, size: int) -> None:
    chance = random.Random(number)
    topic = Topic("one")
    with memory_stream(clock=Clock()) as stream:
        sizes: list[int] = []
        stream.create_topic(topic)
        for _ in range(chance.randint(1, 6)):
            events = [some_event(topic, chance) for _ in range(chance.randint(1, 12))]
            stream.publish(topic, events)
            sizes += [len(encode_event(event)) for event in events]
        at = TopicPartition("one", 0)
        start = chance.randint(0, len(sizes) - 1)
        (part,) = cut_ranges(stream.log, {at: start}, {at: len(sizes)}, Threshold(bytes=size))
    assert sum(sizes[start : part.end]) <= size or part.end == start + 1
    # One record more would not fit: each stored batch adds at most 5 bytes of its own, at most 6 batches here.
    assert part.end == len(sizes) or sum(sizes[start : part.end + 1]) > size - 6 * 5


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 2**32), events=st.integers(1, 20), size=st.integers(1, 2000))
def test_cutting_again_and_again_covers_everything_once(number: int, events: int, size: int) -> None:
    chance = random.Random(number)
    with memory_stream(clock=Clock()) as stream:
        sizes = grow(stream, chance)
        until = {at: len(held) for at, held in sizes.items()}
        positions = dict.fromkeys(sizes, 0)
        cuts = 0
        while ranges := cut_ranges(stream.log, positions, until, Threshold(events=events, bytes=size)):
            assert all(part.start == positions[part.at] for part in ranges)
            positions.update({part.at: part.end for part in ranges})
            cuts += 1
    assert positions == until
    assert cuts <= sum(until.values())


def test_a_partition_unknown_to_the_end_is_left_alone(stream: EventStream) -> None:
    fill(stream, NUMBERS, numbers(3))
    at = TopicPartition(NUMBERS.name, 0)
    assert cut_ranges(stream.log, {at: 1}, {}, Threshold(events=5)) == ()
    assert cut_ranges(stream.log, {at: 3}, {at: 3}, Threshold(events=5)) == ()


ranges_and_skip = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=4).flatmap(
    lambda spans: st.tuples(
        st.just(tuple(Range("t", i, start, start + length) for i, (start, length) in enumerate(spans))),
        st.frozensets(
            st.sampled_from(
                [("t", i, offset) for i, (start, length) in enumerate(spans) for offset in range(start, start + length)]
                or [("elsewhere", 0, 0)]
            ),
            max_size=6,
        ),
    )
)


@given(ranges_and_skip)
def test_positions_and_prefixes_as_brute_force_counts_them(
    drawn: tuple[tuple[Range, ...], frozenset[tuple[str, int, int]]],
) -> None:
    ranges, skip = drawn
    every = [(part.topic, part.partition, offset) for part in ranges for offset in range(part.start, part.end)]
    kept = [position for position in every if position not in skip]
    for index, position in enumerate(kept):
        assert nth_position(ranges, skip, index) == position
    with pytest.raises(IndexError):
        nth_position(ranges, skip, len(kept))
    for length in range(len(kept) + 1):
        taken = prefix(ranges, skip, length)
        covered = [(part.topic, part.partition, offset) for part in taken for offset in range(part.start, part.end)]
        assert [position for position in covered if position not in skip] == kept[:length]
        assert covered == every[: len(covered)]


def test_a_deadline_waits_for_what_was_appended_before_it(stream: EventStream, clock: Clock) -> None:
    topic = Topic("two", partitions=2)
    stream.create_topic(topic)
    early = round(clock.now_s * 1e6)
    for partition in (0, 1):
        event = next(event for event in numbers(99, topic) if topic.partition_of(event) == partition)
        stream.publish(topic, [event])
        clock.advance(60)
    positions = {TopicPartition("two", 0): 0, TopicPartition("two", 1): 0}
    due = [Deadline(0, "a", early - 1), Deadline(0, "b", early + 1), Deadline(1, "c", early + 10)]

    def fired(*ranges: Range) -> list[str]:
        return [deadline.key for deadline in deadlines_within(stream.log, due, positions, ranges)]

    assert deadlines_within(stream.log, [], positions, []) == ()
    assert fired() == ["a", "c"]
    assert fired(Range("two", 0, 0, 1)) == ["a", "b", "c"]


def test_a_large_record_is_not_starved_by_small_ones() -> None:
    topic = Topic("t", partitions=2, key="k")
    small, large = next(
        (a, b)
        for a in "abcd"
        for b in "efgh"
        if topic.partition_of(topic.event(k=a)) != topic.partition_of(topic.event(k=b))
    )
    with memory_stream() as stream:
        stream.create_topic(topic)
        stream.publish(topic, [topic.event(k=large, pad="x" * 5000)])
        stream.publish(topic, [topic.event(k=small, n=n) for n in range(200)])
        spans = stream.log.spans(["t"])
        until = {at: span.end for at, span in spans.items()}
        ranges = cut_ranges(stream.log, dict.fromkeys(until, 0), until, Threshold(bytes=6000))
        assert [(part.partition, part.start, part.end) for part in ranges] == [
            (topic.partition_of(topic.event(k=large)), 0, 1)
        ]
