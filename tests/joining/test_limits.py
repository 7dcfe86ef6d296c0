"""What a buffer may hold: bytes, claims in place of data, marks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    EventStream,
    Joined,
    SnapshotPolicy,
    Topic,
    consumer,
    open_stream,
    redrive,
    run_pending,
)
from djp_dagster.errors import BufferFullError, InvalidSettingError, UnknownGroupError
from djp_dagster.joining.inspection import EventBuffer, request_expiry
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import Clock
from tests.joining.kit import LATE, OUT, A, B, completed, errors, joined, keys_of_task, part, statuses, tell, work
from tests.joining.test_parts import publish
from tests.processing.kit import all_records
from tests.state.kit import state_of
from tests.streams.heavy import counted_store, grow_old, payload_files

HOUR = 3600.0
HEAVY = Topic("heavy", partitions=2, key="k", offload_above=1000)
OTHER = Topic("other", partitions=2, key="k", offload_above=1000)
TEXT = "a long text " * 500


class TestBytes:
    """`max_buffer_bytes` is of each task."""

    SIZE = 2500
    KEYS = keys_of_task(0, 5)

    def parts_of(self, topic: Topic) -> list[Any]:
        return [part(topic, key, pad="x" * 1000) for key in self.KEYS]

    def join(self, **settings: Any) -> Any:
        return joined([A, B], max_buffer_bytes=self.SIZE, deadline="1h", **settings)

    @pytest.mark.parametrize("at_once", [False, True])
    def test_what_exceeds_it_is_refused_and_not_lost(
        self, stream: EventStream, clock: Clock, tmp_path: Path, at_once: bool
    ) -> None:
        join = self.join()
        join.register(stream)
        done = []
        for event in self.parts_of(A):
            publish(stream, clock, event)
            done += [] if at_once else work(stream, join, tmp_path)
        done += work(stream, join, tmp_path)
        # Each takes some 1030 bytes.
        assert [status for _, status in sorted(statuses(stream, tmp_path).items())] == ["pending"] * 2
        assert errors(stream) == {"BufferFullError": 3}
        assert sum(one.counts.get("refused_parts", 0) for one in done) == 3
        assert 2000 < done[-1].gauges["buffered_bytes"] <= self.SIZE
        assert done[-1].gauges["pending_keys"] == 2
        letter = stream.dead_letters("j")[0]
        assert letter.error == (
            f"key {self.KEYS[2]!r}: the event buffer of 'j' holds {done[-1].gauges['buffered_bytes']} bytes of 2500 in "
            "task 0; raise max_buffer_bytes, or expire keys; then redrive"
        )
        # Once there is room, redriving them puts them in; those for which there is none stay what they are.
        first = {one.id: one.redrives for one in stream.dead_letters("j")}
        publish(stream, clock, *self.parts_of(B)[:2])
        work(stream, join, tmp_path)
        after = redrive(stream, join, state_folder=tmp_path)
        assert {one.id for one in after} == set(first)
        assert [one.status for one in after] == ["redriven", "redriven", "pending"]
        assert after[-1].redrives == 1
        publish(stream, clock, *self.parts_of(B)[2:])
        work(stream, join, tmp_path)
        redrive(stream, join, state_folder=tmp_path)
        assert set(completed(stream)) == set(self.KEYS)
        assert errors(stream) == {}
        assert work(stream, join, tmp_path) == []

    def test_room_made_by_the_same_batch_counts(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = self.join()
        join.register(stream)
        one, two, three, four, _ = self.parts_of(A)
        publish(stream, clock, one, two)
        work(stream, join, tmp_path)
        # They come before what makes room for them, and are read with it.
        publish(stream, clock, three, four, *self.parts_of(B)[:2])
        work(stream, join, tmp_path)
        assert errors(stream) == {}
        assert sorted(statuses(stream, tmp_path).values()) == ["completed", "completed", "pending", "pending"]

    def test_what_completes_with_its_batch_needs_no_room(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = self.join()
        join.register(stream)
        publish(stream, clock, *self.parts_of(A), *self.parts_of(B))
        work(stream, join, tmp_path)
        assert len(completed(stream)) == 5
        assert errors(stream) == {}

    def test_a_key_that_gets_no_room_for_a_second_part_keeps_its_first(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = self.join(duplicates="all")
        join.register(stream)
        key = self.KEYS[0]
        publish(stream, clock, *(part(A, key, str(n), pad="x" * 1000) for n in range(2)))
        work(stream, join, tmp_path)
        publish(stream, clock, part(A, key, "too much", pad="x" * 1000))
        work(stream, join, tmp_path)
        assert errors(stream) == {"BufferFullError": 1}
        # Its deadline is what it was, too.
        clock.advance(HOUR - 1)
        publish(stream, clock, part(B, key))
        work(stream, join, tmp_path)
        assert [record.data["parts"]["a"] for record in all_records(stream, OUT)] == [["0", "1"]]

    def test_expiring_keys_makes_room(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = self.join()
        join.register(stream)
        publish(stream, clock, *self.parts_of(A)[:3])
        work(stream, join, tmp_path)
        (refused,) = [one.id for one in stream.dead_letters("j") if one.error_type == "BufferFullError"]
        request_expiry(stream, "j", self.KEYS[:2])
        work(stream, join, tmp_path)
        (letter,) = redrive(stream, join, [refused], state_folder=tmp_path)
        assert letter.status == "redriven"
        assert statuses(stream, tmp_path)[self.KEYS[2]] == "pending"

    @pytest.mark.parametrize("remember", [None, "1d"])
    def test_a_redrive_that_finds_no_room_changes_nothing(
        self, stream: EventStream, clock: Clock, tmp_path: Path, remember: str | None
    ) -> None:
        join = self.join(remember=remember)
        join.register(stream)
        publish(stream, clock, self.parts_of(A)[0])
        clock.advance(HOUR + 1)
        publish(stream, clock, *self.parts_of(A)[1:3])
        work(stream, join, tmp_path)
        (before,) = [one for one in stream.dead_letters("j") if one.error_type == "JoinIncompleteError"]
        (after,) = redrive(stream, join, [before.id], state_folder=tmp_path)
        assert (after.status, after.error_type, after.redrives) == ("pending", BufferFullError.__name__, 1)
        assert [statuses(stream, tmp_path)[key] for key in self.KEYS[:3]] == ["expired", "pending", "pending"]
        # What is counted is right still, and what is remembered is forgotten in time.
        clock.advance(2 * 24 * HOUR)
        work(stream, join, tmp_path)
        publish(stream, clock, part(B, self.KEYS[4]))
        (done,) = work(stream, join, tmp_path)
        assert done.gauges["pending_keys"] == 1
        assert len(state_of(stream, "j", 0)) == 3 + (0 if remember else 3)


class TestPayloads:
    """Data in the payload store: the buffer holds claims."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Any:
        return counted_store(tmp_path / "payloads")[0]

    @pytest.fixture
    def stream(self, store: Any, clock: Clock, tmp_path: Path) -> Iterator[EventStream]:
        with open_stream(tmp_path / "stream.db", payloads=store, clock=clock) as opened:
            for topic in (OUT, LATE, HEAVY, OTHER):
                opened.create_topic(topic)
            yield opened

    def join(self, **settings: Any) -> Any:
        def handle(parts: Joined) -> None:
            tell(parts)
            for found in parts.values():
                for record in found if isinstance(found, list) else [found]:
                    assert record.data["text"].startswith(TEXT)
                    assert record.claim is not None

        return joined([HEAVY, OTHER], handle, **{"deadline": "1h", **settings})

    @pytest.mark.parametrize("apart", [False, True])
    @pytest.mark.parametrize("count", [None, {"heavy": 2}, {"heavy": "of"}], ids=["one", "two", "as they say"])
    def test_the_buffer_is_small_and_the_handler_loads(
        self, stream: EventStream, clock: Clock, tmp_path: Path, apart: bool, count: Any
    ) -> None:
        join = self.join(count=count, duplicates="first")
        join.register(stream)
        events = [part(HEAVY, f"k{n}", f"{n}-{m}", text=TEXT, of=2) for m in range(2) for n in range(20)]
        # The same ones again, which are known by their ids: that needs no data.
        publish(stream, clock, *events[:20])
        if apart:
            work(stream, join, tmp_path / "state")
        publish(stream, clock, *events)
        done = work(stream, join, tmp_path / "state")
        assert sum(one.gauges["pending_keys"] for one in done[-2:]) == 20
        assert 0 < sum(one.gauges["buffered_bytes"] for one in done[-2:]) < 40 * 600 < len(TEXT) * 10
        publish(stream, clock, *(part(OTHER, f"k{n}", text=TEXT) for n in range(20)))
        work(stream, join, tmp_path / "state")
        assert errors(stream) == {}
        assert len(completed(stream)) == 20

    def test_a_duplicate_of_what_waits_takes_nothing_from_it(
        self, stream: EventStream, clock: Clock, tmp_path: Path
    ) -> None:
        join = self.join()
        join.register(stream)
        publish(stream, clock, part(HEAVY, "x", text=TEXT))
        work(stream, join, tmp_path / "state")
        # In one batch with what completes the key.
        publish(stream, clock, part(HEAVY, "x", text=TEXT), part(OTHER, "x", text=TEXT))
        work(stream, join, tmp_path / "state")
        assert completed(stream) == {"x": ["heavy", "other"]}

    @pytest.mark.parametrize("how", ["deadline", "command"])
    def test_a_batch_without_records_loads_too(
        self, stream: EventStream, clock: Clock, tmp_path: Path, how: str
    ) -> None:
        join = self.join(on_deadline="partial")
        join.register(stream)
        publish(stream, clock, part(HEAVY, "x", text=TEXT))
        work(stream, join, tmp_path / "state")
        if how == "deadline":
            clock.advance(HOUR)
        else:
            request_expiry(stream, "j", ["x"])
        work(stream, join, tmp_path / "state")
        assert completed(stream) == {"x": ["heavy"]}

    def test_a_dead_letter_keeps_the_claim(self, stream: EventStream, clock: Clock, tmp_path: Path) -> None:
        join = self.join()
        join.register(stream)
        publish(stream, clock, part(HEAVY, "x", text=TEXT))
        work(stream, join, tmp_path / "state")
        clock.advance(HOUR)
        work(stream, join, tmp_path / "state")
        (letter,) = stream.dead_letters("j")
        assert b"dataref" in letter.raw
        assert len(letter.raw) < 600
        redrive(stream, join, state_folder=tmp_path / "state")
        publish(stream, clock, part(OTHER, "x", text=TEXT))
        work(stream, join, tmp_path / "state")
        assert completed(stream) == {"x": ["heavy", "other"]}

    @pytest.mark.parametrize("kept_in", ["the changelog", "a snapshot", "a dead letter"])
    def test_garbage_collection_keeps_what_waits(
        self, stream: EventStream, clock: Clock, tmp_path: Path, kept_in: str
    ) -> None:
        heavy = Topic("heavy", partitions=2, key="k", offload_above=1000, retention="1s")
        stream.create_topic(heavy)
        policy = SnapshotPolicy(changes=1, bytes=1, keep=2) if kept_in == "a snapshot" else None
        join = self.join(inputs={"heavy": heavy, "other": OTHER}, snapshots=policy)
        join.register(stream)
        first, *others = keys_of_task(0, 101)
        publish(stream, clock, part(heavy, first, text=TEXT))
        work(stream, join, tmp_path / "state")
        payloads = sorted(payload_files(tmp_path / "payloads"))
        clock.advance(HOUR if kept_in == "a dead letter" else 60)
        for start in range(0, 100, 25):
            # So that its record is no longer needed, and with snapshots, neither is the beginning of the changelog.
            stream.publish(heavy, [part(heavy, key, text=f"{TEXT} {key}") for key in others[start : start + 25]])
            work(stream, join, tmp_path / "state")
        clock.advance(60)
        stream.apply_retention()
        assert stream.log.spans(["heavy"])[TopicPartition("heavy", 0)].begin > 0
        changelog = stream.log.spans([changelog_of("j")])[TopicPartition(changelog_of("j"), 0)]
        assert (changelog.begin > 0) == (kept_in == "a snapshot")
        for _ in range(3):
            grow_old(tmp_path / "payloads")
            stream.collect_payloads(dry_run=False)
        assert set(payloads) <= set(payload_files(tmp_path / "payloads"))
        if kept_in == "a dead letter":
            redrive(stream, join, state_folder=tmp_path / "state")
        publish(stream, clock, part(OTHER, first, text=TEXT))
        work(stream, join, tmp_path / "elsewhere")
        assert completed(stream) == {first: ["heavy", "other"]}


def test_what_is_inspected_is_what_waits(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    join = joined([A, B], deadline="1h", duplicates="all")
    join.register(stream)
    publish(stream, clock, part(A, "x", "1"), part(A, "x", "2"), part(A, 7), part(B, 7))
    work(stream, join, tmp_path)
    with EventBuffer(stream, "j", folder=tmp_path) as buffer:
        found = buffer.find("x")
        assert found is not None
        assert (found.status, found.parts, found.since_micros) == ("pending", {"a": 2}, None)
        assert found.due_micros == round((Clock()() + 0.001 + HOUR) * 1e6)
        assert found.bytes > 40
        assert [record.id for record in buffer.records("x")["a"]] == ["1", "2"]
        done = buffer.find(7)
        assert done is not None
        assert (done.status, done.parts, done.due_micros, done.bytes) == ("completed", {}, None, 0)
        assert (buffer.find("nobody"), buffer.records("nobody"), buffer.records(7)) == (None, {}, {})
        assert sum(buffer.as_of.values()) == 4


def test_only_a_join_has_a_buffer_to_inspect(stream: EventStream, clock: Clock, tmp_path: Path) -> None:
    plain = consumer(topic=A, group="plain")(lambda batch: None)

    @consumer(topic=A, stateful=True, group="other")
    def other(batch: Batch) -> None:
        for record in batch:
            batch.state.set(record.data["k"], "expired, but not by a join")

    for one in (plain, other):
        one.register(stream)
    publish(stream, clock, part(A, "x"))
    run_pending(stream, other, state_folder=tmp_path)
    with pytest.raises(UnknownGroupError, match="nobody"):
        EventBuffer(stream, "nobody", folder=tmp_path)
    with pytest.raises(InvalidSettingError, match="'plain' keeps no state, so it is no join"):
        EventBuffer(stream, "plain", folder=tmp_path)
    with EventBuffer(stream, "other", folder=tmp_path) as buffer:
        with pytest.raises(InvalidSettingError, match="it is no join"):
            list(buffer)
        with pytest.raises(InvalidSettingError, match="it is no join"):
            buffer.find("x")
