"""Bad input: refused with a typed error that names it, or dead-lettered alone."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from djp_dagster.errors import (
    CommitTooLargeError,
    EventTooLargeError,
    MissingKeyError,
    OffsetOutOfRangeError,
    PoisonBlockedError,
    StreamCorruptError,
    SystemicFailureError,
    TopicMismatchError,
    UndecodableRecordError,
    UnknownTopicError,
)
from djp_dagster.events import Event
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import Consumer, consumer
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.records import Record, _slice
from djp_dagster.streams.stream import EventStream, open_stream
from djp_dagster.streams.topics import Topic
from djp_dagster.testing import Clock
from tests.faults.kit import ids, numbered, sources

NUMBERS = Topic("numbers", key="key")
COPIES = Topic("copies", key="n", max_event_bytes=2000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stream.db"


@pytest.fixture
def stream(path: Path) -> Iterator[EventStream]:
    with open_stream(path) as stream:
        stream.create_topic(NUMBERS)
        yield stream


def copier(**settings: object) -> Consumer:
    if settings.get("isolate") == "per_event":

        @consumer(topic=NUMBERS, emits=[COPIES], group="copier", **settings)  # type: ignore[arg-type]
        def copy(record: Record, batch: Batch) -> None:
            batch.emit(COPIES.event(n=record.data["n"]))
    else:

        @consumer(topic=NUMBERS, emits=[COPIES], group="copier", **settings)  # type: ignore[arg-type]
        def copy(batch: Batch) -> None:
            for record in batch:
                batch.emit(COPIES.event(n=record.data["n"]))

    return copy


# Publishing


def test_publishing_to_an_unknown_topic(stream: EventStream) -> None:
    with pytest.raises(UnknownTopicError, match=r"'nowhere'.*create_topic"):
        stream.publish("nowhere", numbered([1]))
    with pytest.raises(UnknownTopicError, match="'nowhere'"):
        stream.producer("p").publish("nowhere", numbered([1]))


def test_a_differing_partition_count_stops_everybody_who_declares_it(stream: EventStream) -> None:
    stream.publish(NUMBERS, numbered(range(5)))
    more = Topic("numbers", key="key", partitions=3)

    @consumer(topic=more)
    def reader(batch: Batch) -> None:
        raise AssertionError("never called")

    for use in (lambda: stream.create_topic(more), lambda: run_pending(stream, reader)):
        with pytest.raises(TopicMismatchError, match="partitions=1 and is declared with 3"):
            use()
    assert stream.groups() == []


@pytest.mark.parametrize(
    "data",
    [{"n": 1}, {"key": None}, {"key": 1.5}, {"key": True}, {"key": ["k"]}, "no object", None, b"bytes", ["key"]],
    ids=repr,
)
def test_a_missing_key_refuses_the_whole_publish(stream: EventStream, data: object) -> None:
    keyless = Event(id="keyless", source="/t", type="t", data=data)
    with pytest.raises(MissingKeyError, match="'keyless' of topic 'numbers'") as caught:
        stream.publish(NUMBERS, [*numbered([1, 2]), keyless])
    assert (caught.value.facts["event_id"], caught.value.facts["key"]) == ("keyless", "key")
    assert ids(stream, "numbers") == []
    stream.publish(NUMBERS, [Event(id="routed", source="/t", type="t", data=data, ext={"partitionkey": "k"})])
    assert ids(stream, "numbers") == ["routed"]


def test_an_event_too_large_refuses_the_whole_publish(stream: EventStream) -> None:
    stream.create_topic(Topic("small", max_event_bytes=300))
    large = Event(id="large", source="/t", type="t", data="x" * 300)
    with pytest.raises(EventTooLargeError, match=r"'large' has 3.. bytes, topic 'small' takes 300") as caught:
        stream.publish("small", [*numbered(range(50)), large])
    assert caught.value.facts["limit"] == 300
    assert ids(stream, "small") == []
    size = caught.value.facts["bytes"]
    stream.publish("small", [Event(id="large", source="/t", type="t", data="x" * (300 - (size - 300)))])
    assert ids(stream, "small") == ["large"]


# Emitting


def failing_copier(make: Callable[[int], Event]) -> Consumer:
    @consumer(topic=NUMBERS, emits=[COPIES], group="copier")
    def copy(batch: Batch) -> None:
        for record in batch:
            batch.emit(make(record.data["n"]))

    return copy


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (Event(source="/t", type="t", data={"no": "key"}), "MissingKeyError"),
        (Event(source="/t", type="t", data={"n": 1, "pad": "x" * 2000}), "EventTooLargeError"),
        (Event(source="/t", type="t", data={"n": 1, "pad": object()}), "InvalidEventError"),
    ],
)
def test_a_bad_emit_dead_letters_the_record_that_caused_it(stream: EventStream, bad: Event, error: str) -> None:
    stream.publish(NUMBERS, numbered(range(10)))
    copy = failing_copier(lambda n: bad if n in (3, 7) else COPIES.event(n=n))
    run_pending(stream, copy)
    assert sources(stream, "copies") == [0, 1, 2, 4, 5, 6, 8, 9]
    letters = stream.dead_letters("copier")
    assert [(letter.offset, letter.error_type) for letter in letters] == [(3, error), (7, error)]


def test_a_batch_that_emits_too_much_is_nobodys_fault(stream: EventStream) -> None:
    stream.publish(NUMBERS, numbered(range(10)))
    copy = failing_copier(lambda n: COPIES.event(n=n, pad="x" * 1500))
    copy.max_emit_bytes = 10_000
    with pytest.raises(CommitTooLargeError):
        run_pending(stream, copy)
    assert stream.dead_letters("copier") == []
    assert stream.pending("copier").events == 10
    copy.max_emit_bytes = 20_000
    run_pending(stream, copy)
    assert sources(stream, "copies") == list(range(10))


# Undecodable records


def spoil(path: Path, change: Callable[[bytes], bytes], offset: int = 0) -> None:
    """Change a stored blob behind everybody's back."""
    with sqlite3.connect(path) as raw:
        query = "SELECT row_id, blob FROM djp_record_batches WHERE base_offset <= ? ORDER BY base_offset DESC LIMIT 1"
        row, blob = raw.execute(query, (offset,)).fetchone()
        changed = change(blob)
        assert len(changed) == len(blob)
        raw.execute("UPDATE djp_record_batches SET blob = ? WHERE row_id = ?", (changed, row))
    raw.close()


def head(number: int) -> bytes:
    """How a record of `numbered` begins: its id and its source."""
    text = b"%d" % number
    return bytes([0xA0 + len(text)]) + text + b"\xa2/t"


def not_an_event(blob: bytes, number: int) -> bytes:
    """The blob with that record replaced by as many other bytes: well framed, but no array."""
    (record,) = [raw for raw in map(bytes, _slice(blob)) if head(number) in raw]
    return blob.replace(record, b"\xc5" + (len(record) - 3).to_bytes(2, "big") + b"\0" * (len(record) - 3))


def no_text(blob: bytes, number: int) -> bytes:
    """The blob with that record's id made something that is no UTF-8."""
    found = head(number)
    assert blob.count(found) == 1
    return blob.replace(found, found[:1] + b"\xff" * (len(found) - 4) + found[-3:])


@pytest.mark.parametrize("isolate", ["batch", "per_event"])
@pytest.mark.parametrize("damage", [not_an_event, no_text])
def test_an_undecodable_record_is_dead_lettered_alone(
    stream: EventStream, path: Path, isolate: str, damage: Callable[[bytes, int], bytes], seed: random.Random
) -> None:
    bad = seed.randrange(20)
    stream.publish(NUMBERS, numbered(range(10), mark="fine"))
    stream.publish(NUMBERS, [*numbered(range(10, 30), mark="fine")])
    stream.publish(NUMBERS, numbered(range(30, 40)))
    raw: list[bytes] = []

    def change(blob: bytes) -> bytes:
        raw.append(damage(blob, 10 + bad))
        return raw[0]

    spoil(path, change, 10)
    with pytest.raises(UndecodableRecordError, match=f"record {10 + bad} of topic 'numbers'"):
        sources(stream, "numbers")
    run_pending(stream, copier(isolate=isolate))
    expected = [number for number in range(40) if number != 10 + bad]
    assert sources(stream, "copies") == expected
    (letter,) = stream.dead_letters("copier")
    assert (letter.offset, letter.error_type) == (10 + bad, "UndecodableRecordError")
    assert letter.raw in raw[0]
    assert stream.pending("copier").events == 0


def test_an_undecodable_record_blocks_who_must_not_skip(stream: EventStream, path: Path) -> None:
    stream.publish(NUMBERS, numbered(range(10)))
    spoil(path, lambda blob: not_an_event(blob, 5))
    with pytest.raises(PoisonBlockedError, match="5"):
        run_pending(stream, copier(on_poison="block"))
    assert stream.dead_letters("copier") == []
    assert ids(stream, "copies") == []
    assert stream.pending("copier").events == 10


def test_too_many_undecodable_records_are_a_systemic_failure(stream: EventStream, path: Path) -> None:
    stream.publish(NUMBERS, numbered(range(10)))
    for number in (1, 4, 8):
        spoil(path, lambda blob, number=number: not_an_event(blob, number))  # type: ignore[misc]
    with pytest.raises(SystemicFailureError, match="max_poison=2"):
        run_pending(stream, copier(max_poison=2))
    assert stream.dead_letters("copier") == []
    assert stream.pending("copier").events == 10
    run_pending(stream, copier(max_poison=3))
    assert [letter.offset for letter in stream.dead_letters("copier")] == [1, 4, 8]
    assert len(ids(stream, "copies")) == 7


@pytest.mark.parametrize(
    "change", [lambda blob: b"\xc1" * len(blob), lambda blob: b"\x90" + blob[1:], lambda blob: b"\x99" + blob[1:]]
)
def test_a_damaged_record_batch_stops_the_consumer(
    stream: EventStream, path: Path, change: Callable[[bytes], bytes]
) -> None:
    stream.publish(NUMBERS, numbered(range(10)))
    spoil(path, change)
    with pytest.raises(StreamCorruptError, match="record batch at offset 0 of topic 'numbers'") as caught:
        run_pending(stream, copier())
    assert caught.value.facts["offset"] == 0
    assert stream.dead_letters("copier") == []
    assert stream.pending("copier").events == 10


# Time


def test_a_reader_below_retention_is_told_what_it_lost(tmp_path: Path) -> None:
    clock = Clock()
    with open_stream(tmp_path / "stream.db", clock=clock) as stream:
        topic = Topic("numbers", key="key", retention="1h", retention_cap="2h")
        stream.create_topic(topic)

        @consumer(topic=topic, emits=[COPIES], group="copier")
        def copy(batch: Batch) -> None:
            for record in batch:
                batch.emit(COPIES.event(n=record.data["n"]))

        stream.publish(topic, numbered(range(5)))
        run_pending(stream, copy)
        stream.publish(topic, numbered(range(5, 10)))
        clock.advance(3 * 3600)
        stream.publish(topic, numbered(range(10, 15)))
        (report,) = stream.apply_retention()
        assert (report.begin, report.end, report.lost_by) == (0, 10, ("copier",))
        with pytest.raises(OffsetOutOfRangeError, match=r"records 5 to 9 are gone.*stream\.seek"):
            run_pending(stream, copy)
        assert stream.dead_letters("copier") == []
        assert sources(stream, "copies") == list(range(5))
        stream.seek("copier", "earliest", wait=0)
        run_pending(stream, copy)
        assert sources(stream, "copies") == [*range(5), *range(10, 15)]


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_a_clock_that_jumps_while_publishing_and_consuming_changes_nothing(
    tmp_path: Path, seed: random.Random, jump_s: float
) -> None:
    clock = Clock()
    with open_stream(tmp_path / "stream.db", clock=clock) as stream:
        topic = Topic("numbers", key="key", partitions=3, retention="1d")
        stream.create_topic(topic)

        @consumer(topic=topic, emits=[COPIES], group="copier", stateful=True)
        def copy(batch: Batch) -> None:
            for count, record in enumerate(batch):
                if count == 2:
                    clock.advance(jump_s)
                batch.emit(COPIES.event(n=record.data["n"]))
                batch.state.set("seen", batch.state.get("seen", 0) + 1)

        number = 0
        for _ in range(6):
            for _ in range(3):
                count = seed.randint(1, 20)
                stream.publish(topic, numbered(range(number, number + count)))
                number += count
                clock.advance(seed.choice([0, 1, jump_s]))
            run_pending(stream, copy, state_folder=tmp_path / "state", wait=0)
            assert sorted(sources(stream, "copies")) == list(range(number))
            stream.apply_retention()
            assert stream.pending("copier").age_s == 0
        for name, partitions in (("numbers", 3), ("copies", 1)):
            for partition in range(partitions):
                times = [record.append_time for record in stream.records(name, partition)]
                assert times == sorted(times)
        for partition in range(3):
            keys: dict[str, list[int]] = {}
            for record in stream.records("numbers", partition):
                keys.setdefault(record.data["key"], []).append(record.data["n"])
            assert all(numbers == sorted(numbers) for numbers in keys.values())
