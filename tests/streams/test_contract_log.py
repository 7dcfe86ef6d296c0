"""The `EventLog` contract, on every backend."""

from __future__ import annotations

import logging
import random

import msgspec
import pytest

from djp_dagster.errors import (
    InvalidSettingError,
    OffsetOutOfRangeError,
    ProducerFencedError,
    TopicMismatchError,
    UnknownTopicError,
)
from djp_dagster.streams.contracts import Watcher
from djp_dagster.streams.model import Backlog, GroupSpec, PartitionSpan, ProducerStamp, TrimReport
from djp_dagster.streams.records import TopicPartition, record_sizes
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic
from djp_dagster.testing import Clock
from tests.streams.conftest import Backend
from tests.streams.kit import FAR, NO_LIMIT, at, encoded, ids, intent_of, named, together

# Topics


def test_a_new_topic_is_empty(timed: EventStream, clock: Clock) -> None:
    info = timed.log.create_topic(Topic("t", partitions=3, key="user.id", max_event_bytes="2KiB", retention="1d"))
    now = round(clock() * 1e6)
    assert (info.name, info.partitions, info.key, info.max_event_bytes) == ("t", 3, "user.id", 2048)
    assert (info.retention.age_s, info.retention.cap_s, info.created_micros) == (86400, None, now)
    assert timed.log.topic("t") == info
    assert timed.log.topics() == [info]
    assert timed.log.spans(["t"]) == {at("t", p): PartitionSpan(0, 0, now) for p in range(3)}
    assert timed.log.read(at("t"), 0, end=0, max_bytes=NO_LIMIT) == []
    assert timed.log.append_time_of(at("t"), 0) is None
    assert timed.log.offset_at(at("t"), 0) == 0
    assert timed.log.cut(at("t"), 0, 0, max_bytes=10) == 0
    assert timed.log.backlog({at("t", 1): 0}) == Backlog(0, 0, False, None, None, now)


def test_a_topic_declared_alike_is_returned_and_its_retention_may_change(stream: EventStream) -> None:
    first = stream.log.create_topic(Topic("t", partitions=2, key="k"))
    assert stream.log.create_topic(Topic("t", partitions=2, key="k")) == first
    changed = stream.log.create_topic(Topic("t", partitions=2, key="k", retention="1h", retention_cap="2h"))
    assert changed.retention.age_s == 3600
    assert stream.log.topic("t") == changed


@pytest.mark.parametrize(
    ("declared", "setting"),
    [
        (Topic("t", partitions=3, key="k"), "partitions"),
        (Topic("t", partitions=2), "key"),
        (Topic("t", partitions=2, key="k", max_event_bytes=5), "max_event_bytes"),
    ],
)
def test_a_topic_declared_otherwise_is_refused(stream: EventStream, declared: Topic, setting: str) -> None:
    created = stream.log.create_topic(Topic("t", partitions=2, key="k"))
    with pytest.raises(TopicMismatchError, match=setting) as caught:
        stream.log.create_topic(declared)
    assert caught.value.facts["setting"] == setting
    assert stream.log.topic("t") == created


def test_topics_are_listed_by_name(stream: EventStream) -> None:
    for name in ("m", "z", "a"):
        stream.log.create_topic(Topic(name))
    assert [info.name for info in stream.log.topics()] == ["a", "m", "z"]


def test_two_processes_may_create_the_same_topic_at_once(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    for number in range(5):
        topic = Topic(f"t{number}", partitions=4)
        first, second = together(lambda: one.log.create_topic(topic), lambda: two.log.create_topic(topic))  # noqa: B023
        assert first == second
    assert len(one.log.topics()) == 5


def test_an_unknown_topic_is_named(stream: EventStream) -> None:
    for use in (
        lambda: stream.log.topic("nowhere"),
        lambda: stream.log.append([encoded("nowhere")]),
        lambda: stream.log.read(at("nowhere"), 0, end=1, max_bytes=1),
        lambda: stream.log.spans(["nowhere"]),
        lambda: stream.log.offset_at(at("nowhere"), 0),
        lambda: stream.log.backlog({at("nowhere"): 0}),
        lambda: stream.log.delete_topic("nowhere"),
    ):
        with pytest.raises(UnknownTopicError, match="nowhere") as caught:
            use()
        assert caught.value.facts["topic"] == "nowhere"


def test_a_topic_is_not_deleted_while_a_group_reads_it(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    stream.log.append([encoded("t")])
    stream.coordinator.ensure_group(GroupSpec("readers", ("t",)))
    with pytest.raises(InvalidSettingError, match="readers"):
        stream.log.delete_topic("t")
    assert ids(stream, "t") == ["one"]
    stream.coordinator.delete_group("readers")
    stream.log.delete_topic("t")
    with pytest.raises(UnknownTopicError):
        stream.log.append([encoded("t")])


def test_a_topic_deleted_and_made_anew_starts_empty_for_everybody(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.log.create_topic(Topic("t"))
    two.log.append([encoded("t")])
    one.log.delete_topic("t")
    one.log.create_topic(Topic("t", partitions=2))
    if two is not one:
        with pytest.raises(UnknownTopicError, match="anew"):
            two.log.append([encoded("t", 0, ["stale"])])
    two.log.append([encoded("t", 1, ["new"])])
    assert (ids(one, "t", 0), ids(one, "t", 1)) == ([], ["new"])


# Appending


def test_records_keep_their_order_and_offsets_have_no_holes(stream: EventStream, seed: random.Random) -> None:
    topic = Topic("t", partitions=3)
    stream.log.create_topic(topic)
    expected: list[list[str]] = [[], [], []]
    for number in range(40):
        partition = seed.randrange(3)
        new = named(f"{number}-", seed.randint(1, 7))
        (appended,) = stream.log.append([encoded("t", partition, new)])
        assert (appended.topic, appended.partition) == ("t", partition)
        assert (appended.base_offset, appended.count) == (len(expected[partition]), len(new))
        expected[partition] += new
    assert [ids(stream, "t", partition) for partition in range(3)] == expected


def test_one_append_spans_partitions_and_topics(stream: EventStream) -> None:
    for name in ("a", "b"):
        stream.log.create_topic(Topic(name, partitions=2))
    appended = stream.log.append(
        [encoded("b", 1, ["b1"]), encoded("a", 1, ["a1"]), encoded("a", 0, ["a2"]), encoded("a", 1, ["a3", "a4"])]
    )
    assert {(one.topic, one.partition, one.base_offset, one.count) for one in appended} == {
        ("a", 0, 0, 1),
        ("a", 1, 0, 1),
        ("a", 1, 1, 2),
        ("b", 1, 0, 1),
    }
    assert (ids(stream, "a", 0), ids(stream, "a", 1), ids(stream, "b", 1)) == (["a2"], ["a1", "a3", "a4"], ["b1"])
    assert stream.log.append([]) == []


@pytest.mark.parametrize("bad", [("t", 7), ("t", -1), ("unknown", 0)])
def test_a_refused_append_appends_nothing(stream: EventStream, bad: tuple[str, int]) -> None:
    stream.log.create_topic(Topic("t", partitions=2))
    with pytest.raises((InvalidSettingError, UnknownTopicError), match=bad[0]):
        stream.log.append([encoded("t", 0), encoded("t", 1), encoded(*bad)])
    assert ids(stream, "t", 0) == ids(stream, "t", 1) == []
    assert stream.log.append([encoded("t", 0)])[0].base_offset == 0


def test_appends_at_once_take_turns(backend: Backend) -> None:
    streams = [backend.open() for _ in range(4)]
    for name in ("a", "b"):
        streams[0].log.create_topic(Topic(name, partitions=2))
    parts = [(name, partition) for name in ("a", "b") for partition in (0, 1)]

    def append(writer: int) -> None:
        shuffled = random.Random(writer)
        for number in range(15):
            shuffled.shuffle(parts_of := list(parts))
            streams[writer].log.append([encoded(*part, [f"{writer}-{number}"]) for part in parts_of])

    together(*(lambda writer=writer: append(writer) for writer in range(4)))
    everything = [ids(streams[0], *part) for part in parts]
    assert len(everything[0]) == 60
    for writer in range(4):
        mine = [f"{writer}-{number}" for number in range(15)]
        assert all([one for one in found if one in mine] == mine for found in everything)


# Reading


def test_a_read_is_bounded_in_bytes_and_makes_progress(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    for number in range(6):
        stream.log.append([encoded("t", 0, [f"{number}a", f"{number}b"], [100, 100])])
    whole = stream.log.read(at("t"), 0, end=12, max_bytes=NO_LIMIT)
    size = len(whole[0].blob)
    assert [(one.base_offset, one.count, one.end_offset) for one in whole] == [(2 * n, 2, 2 * n + 2) for n in range(6)]
    for max_bytes, expected in [(0, 1), (1, 1), (size, 1), (size + 1, 1), (2 * size, 2), (3 * size - 1, 2)]:
        found = stream.log.read(at("t"), 0, end=12, max_bytes=max_bytes)
        assert found == whole[:expected], max_bytes
    assert stream.log.read(at("t"), 4, end=7, max_bytes=NO_LIMIT) == whole[2:4]
    assert stream.log.read(at("t"), 12, end=12, max_bytes=NO_LIMIT) == []


def test_reading_may_begin_and_end_inside_a_stored_batch(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    stream.log.append([encoded("t", 0, named("a", 5))])
    stream.log.append([encoded("t", 0, named("b", 5))])
    (stored,) = stream.log.read(at("t"), 3, end=4, max_bytes=1)
    assert (stored.base_offset, stored.count) == (0, 5)
    assert [record.id for record in stream.records("t", 0, 3, 7)] == ["a3", "a4", "b0", "b1"]
    assert ids(stream, "t", 0, 9) == ["b4"]


def test_a_read_past_the_end_is_refused(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    stream.log.append([encoded("t", 0, named("a", 3))])
    for offset, end in [(3, 4), (4, 4), (9, 12)]:
        with pytest.raises(OffsetOutOfRangeError, match="ends at offset 3") as caught:
            stream.log.read(at("t"), offset, end=end, max_bytes=NO_LIMIT)
        assert caught.value.facts["end"] == 3
    with pytest.raises(InvalidSettingError, match="partition"):
        stream.log.read(at("t", 1), 0, end=1, max_bytes=1)


# Measuring


def test_times_and_offsets_find_each_other(timed: EventStream, clock: Clock) -> None:
    timed.log.create_topic(Topic("t"))
    start = clock()
    for _ in range(3):
        timed.log.append([encoded("t", 0, ["x", "y"])])
        clock.advance(10)
    times = [round((start + 10 * number) * 1e6) for number in range(3)]
    assert [timed.log.append_time_of(at("t"), offset) for offset in range(7)] == [
        *(time for time in times for _ in range(2)),
        None,
    ]
    assert timed.log.offset_at(at("t"), 0) == 0
    for number, time in enumerate(times):
        assert timed.log.offset_at(at("t"), time) == 2 * number
        assert timed.log.offset_at(at("t"), time + 1) == 2 * number + 2
    assert timed.log.offset_at(at("t"), FAR) == 6
    assert timed.log.spans(["t"]) == {at("t"): PartitionSpan(0, 6, times[2])}
    assert timed.log.now_micros() == round(clock() * 1e6)


def test_a_backlog_counts_events_bytes_and_ages(timed: EventStream, clock: Clock) -> None:
    timed.log.create_topic(Topic("t", partitions=2))
    batches = [encoded("t", 0, named("a", 4)), encoded("t", 1, named("b", 2)), encoded("t", 0, named("c", 3), [50] * 3)]
    times = []
    for batch in batches:
        timed.log.append([batch])
        times.append(round(clock() * 1e6))
        clock.advance(5)
    sizes = [len(batch.blob) for batch in batches]
    now = round(clock() * 1e6)
    everything = timed.log.backlog({at("t", 0): 0, at("t", 1): 0})
    assert everything == Backlog(9, sum(sizes), False, times[0], times[2], now)
    assert (everything.age_s, everything.idle_s) == (15.0, 5.0)
    assert timed.log.backlog({at("t", 0): 4, at("t", 1): 2}) == Backlog(3, sizes[2], False, times[2], times[2], now)
    assert timed.log.backlog({at("t", 0): 7}) == Backlog(0, 0, False, None, None, now)
    inside = timed.log.backlog({at("t", 0): 1})
    assert inside.estimated
    assert inside.events == 6
    assert inside.oldest_micros == times[0]
    assert inside.bytes is not None
    assert sizes[2] < inside.bytes < sizes[0] + sizes[2]
    idle = timed.log.backlog({at("t", 0): 7})
    assert (idle.age_s, idle.idle_s) == (0.0, 0.0)


def test_a_cut_is_exact_by_bytes(stream: EventStream, seed: random.Random) -> None:
    """Records are counted to the byte; the framing of a record batch (1 to 5 bytes each) may count on top."""
    stream.log.create_topic(Topic("t"))
    for number in range(8):
        count = seed.choice([1, 2, 3, 17, 40])
        sizes = [seed.choice([0, 1, 30, 300, 5000]) for _ in range(count)]
        stream.log.append([encoded("t", 0, named(f"{number}-", count), sizes)])
    end = stream.log.spans(["t"])[at("t")].end
    stored = stream.log.read(at("t"), 0, end=end, max_bytes=NO_LIMIT)
    sizes = [size for batch in stored for size in record_sizes(batch)]
    batch_of = [number for number, batch in enumerate(stored) for _ in range(batch.count)]
    framing = [len(batch.blob) - sum(record_sizes(batch)) for batch in stored]
    for _ in range(60):
        start = seed.randrange(end)
        stop = seed.randint(start, end)
        exactly = sum(sizes[start : seed.randint(start, end)])
        max_bytes = max(0, seed.choice([0, 1, exactly - 1, exactly, exactly + 1, seed.randrange(100_000), NO_LIMIT]))
        cut = stream.log.cut(at("t"), start, stop, max_bytes=max_bytes)
        assert start <= cut <= stop
        assert sum(sizes[start:cut]) <= max_bytes
        if cut < stop:
            spanned = framing[batch_of[start] : batch_of[cut]]
            assert sum(sizes[start : cut + 1]) + sum(spanned) > max_bytes
    assert stream.log.cut(at("t"), 0, end, max_bytes=stream.log.backlog({at("t"): 0}).bytes or 0) == end


# Producers


def test_a_sequence_is_appended_once(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    stamp = stream.log.open_producer("p")
    assert stamp == ProducerStamp("p", 1, 0)
    assert len(stream.log.append([encoded("t", 0, ["a"])], stamp._replace(sequence=1))) == 1
    assert stream.log.append([encoded("t", 0, ["a"])], stamp._replace(sequence=1)) == []
    stream.log.append([encoded("t", 0, ["b"])], stamp._replace(sequence=5))
    assert stream.log.append([encoded("t", 0, ["c"])], stamp._replace(sequence=4)) == []
    assert ids(stream, "t") == ["a", "b"]
    assert stream.log.open_producer("p") == ProducerStamp("p", 2, 5)
    assert stream.log.open_producer("other") == ProducerStamp("other", 1, 0)


def test_a_refused_append_leaves_its_sequence_free(stream: EventStream) -> None:
    stream.log.create_topic(Topic("t"))
    stamp = stream.log.open_producer("p")._replace(sequence=1)
    with pytest.raises(InvalidSettingError):
        stream.log.append([encoded("t", 9)], stamp)
    assert len(stream.log.append([encoded("t", 0)], stamp)) == 1


def test_an_older_producer_is_fenced(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.log.create_topic(Topic("t"))
    old, new = one.log.open_producer("p"), two.log.open_producer("p")
    two.log.append([encoded("t", 0, ["new"])], new._replace(sequence=1))
    for sequence in (1, 2):
        with pytest.raises(ProducerFencedError, match="'p' of epoch 1"):
            one.log.append([encoded("t", 0, ["old"])], old._replace(sequence=sequence))
    with pytest.raises(ProducerFencedError):
        one.log.append([encoded("t", 0, ["old"])], ProducerStamp("never opened", 1, 1))
    assert ids(one, "t") == ["new"]


def test_the_same_sequence_sent_twice_at_once_is_appended_once(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.log.create_topic(Topic("t"))
    stamp = one.log.open_producer("p")
    for sequence in range(1, 6):
        now = stamp._replace(sequence=sequence)
        together(*(lambda s=s, now=now: s.log.append([encoded("t", 0, [f"{now.sequence}"])], now) for s in (one, two)))
    assert ids(one, "t") == ["1", "2", "3", "4", "5"]


# Retention


def old_topic(timed: EventStream, clock: Clock, *, cap: str | None = None) -> None:
    """Three record batches of two records: one old enough for both limits, one for the first, one fresh."""
    timed.log.create_topic(Topic("t", retention="10s", retention_cap=cap))
    for number, age in enumerate((100, 20, 0)):
        timed.log.append([encoded("t", 0, named(str(number), 2))])
        clock.advance((100, 20, 0)[number] - (20, 0, 0)[number] if age else 0)


def test_what_nobody_needs_goes_by_age(timed: EventStream, clock: Clock) -> None:
    old_topic(timed, clock)
    assert timed.log.trim() == [TrimReport("t", 0, 0, 4, ())]
    assert timed.log.trim() == []
    span = timed.log.spans(["t"])[at("t")]
    assert (span.begin, span.end) == (4, 6)
    assert ids(timed, "t") == ["20", "21"]
    clock.advance(11)
    assert timed.log.trim() == [TrimReport("t", 0, 4, 6, ())]
    assert timed.log.backlog({at("t"): 0}).events == 0
    assert timed.log.append([encoded("t")])[0].base_offset == 6
    assert timed.log.backlog({at("t"): 0}).events == 1


def test_a_topic_without_retention_keeps_everything(timed: EventStream, clock: Clock) -> None:
    timed.log.create_topic(Topic("t"))
    timed.log.append([encoded("t")])
    clock.advance(1e9)
    assert timed.log.trim() == []
    assert ids(timed, "t") == ["one"]


def test_retention_holds_for_groups(timed: EventStream, clock: Clock) -> None:
    old_topic(timed, clock)
    timed.coordinator.ensure_group(GroupSpec("slow", ("t",)))
    timed.coordinator.ensure_group(GroupSpec("fast", ("t",), start="latest"))
    assert timed.log.trim() == []
    timed.seek("slow", {at("t"): 3})
    assert timed.log.trim() == [TrimReport("t", 0, 0, 2, ())]  # only whole record batches go
    assert ids(timed, "t") == ["10", "11", "20", "21"]
    timed.coordinator.delete_group("slow")
    assert timed.log.trim() == [TrimReport("t", 0, 2, 4, ())]


def test_retention_holds_for_an_open_batch(timed: EventStream, clock: Clock) -> None:
    old_topic(timed, clock)
    timed.coordinator.ensure_group(GroupSpec("g", ("t",)))
    lease = timed.coordinator.acquire("g", None, "a", 5)
    timed.coordinator.begin(lease, intent_of(timed, lease))
    clock.advance(1000)
    assert timed.log.trim() == []
    assert len(ids(timed, "t")) == 6


def test_the_cap_loses_loudly(timed: EventStream, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    old_topic(timed, clock, cap="50s")
    for name, start in [("slow", 0), ("middle", 1), ("fast", 4)]:
        timed.coordinator.ensure_group(GroupSpec(name, ("t",)))
        timed.seek(name, {at("t"): start})
    with caplog.at_level(logging.ERROR):
        assert timed.apply_retention() == [TrimReport("t", 0, 0, 2, ("middle", "slow"))]
    assert "'t' partition 0 removed records 0 to 1" in caplog.text
    assert "['middle', 'slow']" in caplog.text
    with pytest.raises(OffsetOutOfRangeError, match="records 1 to 1 are gone") as caught:
        timed.log.read(at("t"), 1, end=6, max_bytes=NO_LIMIT)
    facts = caught.value.facts
    assert (facts["topic"], facts["partition"], facts["lost_from"], facts["lost_to"]) == ("t", 0, 1, 2)
    with pytest.raises(OffsetOutOfRangeError, match="records 0 to 1"):
        ids(timed, "t", 0, 0)
    assert (timed.pending("slow").events, timed.pending("fast").events) == (4, 2)
    assert timed.pending("slow") == timed.log.backlog({at("t"): 0})


def test_no_group_begins_at_a_record_that_is_going(backend: Backend, clock: Clock) -> None:
    one, two = backend.open(clock), backend.open(clock)
    one.log.create_topic(Topic("t", retention="1s"))
    for number in range(12):
        one.log.append([encoded("t", 0, [f"{number}"])])
        clock.advance(2)
        together(
            one.log.trim,
            lambda number=number: two.coordinator.ensure_group(GroupSpec(f"g{number}", ("t",), start="earliest")),
        )
        (committed,) = two.positions(f"g{number}").values()
        assert len(ids(two, "t", 0, committed)) == one.log.spans(["t"])[at("t")].end - committed
        two.coordinator.delete_group(f"g{number}")


# Clock and wake-up


def test_a_clock_that_goes_back_reorders_nothing(timed: EventStream, clock: Clock) -> None:
    timed.log.create_topic(Topic("t"))
    for jump in (0, -3600, 10, 3600):
        clock.advance(jump)
        timed.log.append([encoded("t")])
    times = [timed.log.append_time_of(at("t"), offset) for offset in range(4)]
    assert times == sorted(times)
    assert len(set(times)) == 2
    clock.advance(-7200)
    backlog = timed.log.backlog({at("t"): 0})
    assert backlog.now_micros == times[3]
    assert backlog.idle_s == 0.0
    assert backlog.age_s == 10.0


def settle(watcher: Watcher) -> None:
    for _ in range(100):
        if not watcher.wait(0):
            return
    raise AssertionError("the watcher wakes though nothing happens")


def test_a_watcher_wakes_for_appends_and_requests(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.log.create_topic(Topic("t"))
    one.coordinator.ensure_group(GroupSpec("g", ("t",)))
    watcher = one.log.watch()
    try:
        settle(watcher)
        assert not watcher.wait(0.02)
        for change in (
            lambda: two.log.append([encoded("t")]),
            lambda: two.coordinator.request("g", "cut", {}),
            lambda: one.log.append([encoded("t")]),
        ):
            change()
            assert watcher.wait(30)
            settle(watcher)
    finally:
        watcher.close()


def test_a_watcher_wakes_while_it_waits(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.log.create_topic(Topic("t"))
    watcher = one.log.watch()
    try:
        settle(watcher)
        woken, _ = together(lambda: watcher.wait(30), lambda: two.log.append([encoded("t")]))
        assert woken
    finally:
        watcher.close()


def test_a_stream_keeps_its_incarnation(backend: Backend) -> None:
    assert backend.open().incarnation == backend.open().incarnation
    capabilities = backend.open().log.capabilities
    assert all(msgspec.structs.asdict(capabilities).values())


# Everything against a model


class Model:
    """A partition as plain lists."""

    def __init__(self, now: int) -> None:
        self.begin, self.last = 0, now
        self.records: list[tuple[str, int, int]] = []  # id, append time, record batch
        self.batches: list[tuple[int, int]] = []  # base offset, bytes

    @property
    def end(self) -> int:
        return len(self.records)

    def append(self, new: list[str], size: int, now: int) -> None:
        self.last = max(self.last, now)
        self.batches.append((self.end, size))
        self.records += [(one, self.last, len(self.batches) - 1) for one in new]

    def bytes_from(self, offset: int) -> int:
        return sum(size for base, size in self.batches if base >= offset)

    def trim(self, before: int, held: int) -> None:
        while self.begin < self.end:
            _, time, batch = self.records[self.begin]
            after = self.batches[batch + 1][0] if batch + 1 < len(self.batches) else self.end
            if time >= before or after > held:
                return
            self.begin = after


def test_a_log_is_what_a_model_says(timed: EventStream, clock: Clock, seed: random.Random) -> None:
    age_s = 100
    partitions = 3
    timed.log.create_topic(Topic("t", partitions=partitions, retention=age_s))
    timed.coordinator.ensure_group(GroupSpec("g", ("t",)))
    models = {at("t", partition): Model(round(clock() * 1e6)) for partition in range(partitions)}
    committed = dict.fromkeys(models, 0)

    def append() -> None:
        batches = []
        for where in seed.choices(list(models), k=seed.randint(1, 3)):
            new = named(f"{seed.randrange(1 << 30)}-", seed.randint(1, 9))
            batches.append((where, new, encoded("t", where.partition, new, [seed.randrange(200) for _ in new])))
        timed.log.append([batch for _, _, batch in batches])
        for where, new, batch in batches:
            models[where].append(new, len(batch.blob), round(clock() * 1e6))

    def read() -> None:
        where = seed.choice(list(models))
        model = models[where]
        start = seed.randint(0, model.end)
        stop = seed.randint(start, model.end)
        if start < model.begin and start < stop:
            with pytest.raises(OffsetOutOfRangeError):
                list(timed.records("t", where.partition, start, stop))
            return
        found = list(timed.records("t", where.partition, start, stop))
        expected = [(one, time) for one, time, _ in model.records[start:stop]]
        assert [(one.id, one.origin.append_micros) for one in found] == expected
        assert [one.offset for one in found] == list(range(start, stop))

    def cut() -> None:
        where = seed.choice(list(models))
        model = models[where]
        start = seed.randint(model.begin, model.end)
        boundary = [base for base, _ in model.batches if base >= model.begin]
        if start in boundary:
            stop = seed.choice([*(base for base in boundary if base >= start), model.end])
            exactly = model.bytes_from(start) - model.bytes_from(stop)
            assert timed.log.cut(where, start, model.end, max_bytes=exactly) == stop
        assert start <= timed.log.cut(where, start, model.end, max_bytes=seed.randrange(5000)) <= model.end

    def measure() -> None:
        positions = {where: seed.randint(0, model.end) for where, model in models.items()}
        backlog = timed.log.backlog(positions)
        starts = {where: max(offset, models[where].begin) for where, offset in positions.items()}
        pending = {where: start for where, start in starts.items() if start < models[where].end}
        assert backlog.events == sum(models[where].end - start for where, start in pending.items())
        bases = {where: {base for base, _ in model.batches} for where, model in models.items()}
        assert backlog.estimated == any(start not in bases[where] for where, start in pending.items())
        if not backlog.estimated:
            assert backlog.bytes == sum(models[where].bytes_from(start) for where, start in pending.items())
        oldest = [models[where].records[start][1] for where, start in pending.items()]
        assert backlog.oldest_micros == min(oldest, default=None)
        assert backlog.newest_micros == max((models[where].last for where in pending), default=None)
        assert timed.pending("g") == timed.log.backlog(committed)

    def trim() -> None:
        for where, model in models.items():
            committed[where] = seed.randint(max(committed[where], model.begin), model.end)
        timed.seek("g", committed)
        timed.log.trim()
        before = round(clock() * 1e6) - age_s * 1_000_000
        for where, model in models.items():
            model.trim(before, committed[where])

    def find() -> None:
        where = seed.choice(list(models))
        model = models[where]
        micros = round((clock() - seed.uniform(0, 300)) * 1e6)
        later = [offset for offset in range(model.begin, model.end) if model.records[offset][1] >= micros]
        assert timed.log.offset_at(where, micros) == min(later, default=model.end)

    for _ in range(200):
        clock.advance(seed.choice([0, 0, 0.5, 5, 40, -20]))
        seed.choices([append, read, cut, measure, trim, find], weights=[6, 4, 4, 4, 1, 2])[0]()
        spans = timed.log.spans(["t"])
        assert {where: (span.begin, span.end, span.last_append_micros) for where, span in spans.items()} == {
            where: (model.begin, model.end, model.last) for where, model in models.items()
        }
    assert isinstance(next(iter(spans)), TopicPartition)
