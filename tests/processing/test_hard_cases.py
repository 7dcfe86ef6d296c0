"""Cases a reviewer of the protocol came up with: each once lost, doubled or blocked something."""

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, EventStream, Record, RetryPolicy, Topic, Worker, consumer, run_pending
from djp_dagster.errors import (
    AmbiguousPublishError,
    CommitTooLargeError,
    DjpError,
    PoisonBlockedError,
    StreamNotWritableError,
    StreamUnavailableError,
)
from djp_dagster.processing.leases import LeaseKeeper
from djp_dagster.state.file import StateFile
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.publishing import Producer
from djp_dagster.streams.records import TopicPartition
from tests.processing.kit import FAST, NUMBERS, OUT, fill, in_thread, numbers, values, wait_until


@consumer(topic=NUMBERS, stateful=True, group="tally")
def tally(batch: Batch) -> None:
    for record in batch:
        batch.state.set("x", batch.state.get("x", 0) + record.data["n"])


def test_a_group_made_anew_does_not_inherit_local_state(stream: EventStream, tmp_path: Path) -> None:
    fill(stream, NUMBERS, numbers(3, start=1))
    run_pending(stream, tally, state_folder=tmp_path / "here")
    stream.delete_group("tally")
    run_pending(stream, tally, state_folder=tmp_path / "elsewhere")
    stream.publish(NUMBERS, [NUMBERS.event(n=10)])
    run_pending(stream, tally, state_folder=tmp_path / "here")
    store = TaskStore(tmp_path / "fresh.db", stream.log, TopicPartition("__changelog.tally", 0))
    store.catch_up()
    assert [int(value[0]) for _, value in store.file.items()] == [1 + 2 + 3 + 10]
    store.close()


def test_a_producer_that_gave_up_does_not_reuse_the_sequence(
    stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream.create_topic(NUMBERS)
    original = stream.log.append

    def unclear(batches: Any, stamp: Any = None) -> Any:
        original(batches, stamp)
        raise StreamUnavailableError("cut during COMMIT", ambiguous=True)

    producer = Producer(stream.log, "p", retry_for_s=0)
    monkeypatch.setattr(stream.log, "append", unclear)
    with pytest.raises(StreamUnavailableError):
        producer.publish("numbers", numbers(1))
    monkeypatch.setattr(stream.log, "append", original)
    with pytest.raises(AmbiguousPublishError, match="sequence=1"):
        producer.publish("numbers", numbers(1, start=5))
    assert producer.publish("numbers", numbers(1), sequence=1) == []
    assert len(producer.publish("numbers", numbers(1, start=5))) == 1
    assert [record.data["n"] for record in stream.records("numbers", 0)] == [0, 5]


@pytest.mark.parametrize("text", ["half a pair \ud800", "a NUL \0 inside"])
def test_any_error_text_can_be_stored(stream: EventStream, text: str) -> None:
    @consumer(topic=NUMBERS, retry=FAST)
    def odd(batch: Batch) -> None:
        for record in batch:
            if record.data["n"] == 1:
                raise ValueError(text)

    fill(stream, NUMBERS, numbers(3))
    run_pending(stream, odd)
    (letter,) = stream.dead_letters("odd")
    assert letter.offset == 1
    assert "\0" not in letter.error


def test_trouble_with_the_local_state_blames_no_record(
    stream: EventStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failed = StateFile.get, []

    def damaged(store: StateFile, key: bytes) -> Any:
        if failed:
            return original(store, key)
        failed.append(key)
        with store._translated():
            raise sqlite3.DatabaseError("database disk image is malformed")

    quick = consumer(topic=NUMBERS, stateful=True, group="tally", retry=FAST)(tally.handler)
    fill(stream, NUMBERS, numbers(3))
    monkeypatch.setattr(StateFile, "get", damaged)
    run_pending(stream, quick, state_folder=tmp_path)
    assert failed
    assert stream.dead_letters(status=None) == []
    assert stream.pending("tally").events == 0


def test_heartbeats_go_on_whatever_happens(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    tally.register(stream)
    original = stream.coordinator.heartbeat
    beats: list[int] = []

    def broken(leases: Any) -> None:
        beats.append(len(beats))
        if len(beats) < 3:
            raise StreamNotWritableError("a terminal one")
        original(leases)

    monkeypatch.setattr(stream.coordinator, "heartbeat", broken)
    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=0.03) as keeper:
        keeper.acquire("tally")
        wait_until(lambda: len(beats) > 4, "heartbeats after a terminal error")


def test_a_paused_consumer_holds_nothing(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, retry=RetryPolicy(max_attempts=1, first=0.001, longest=0.001))
    def away(batch: Batch) -> None:
        raise ConnectionError("the service is away")

    failures: list[DjpError] = []
    fill(stream, NUMBERS, numbers(1))
    stop = threading.Event()
    worker = Worker(stream, [away], lease=0.15, on_failure=lambda _, error: failures.append(error))
    with in_thread(lambda: worker.run(stop), stop):
        wait_until(lambda: bool(failures), "the pause")
        # As soon as it pauses, and for as long: anybody may lease its tasks.
        lease = stream.coordinator.acquire("away", None, "somebody", 60.0)
        stream.coordinator.heartbeat([lease])
        assert len(failures) == 1


def test_a_batch_that_cannot_succeed_as_cut_can_be_got_past(stream: EventStream) -> None:
    def emit_all(batch: Batch) -> None:
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"], pad="x" * 100))

    fill(stream, NUMBERS, numbers(20))
    tight = consumer(topic=NUMBERS, emits=[OUT], group="g", max_emit_bytes=500)(emit_all)
    for _ in range(2):
        with pytest.raises(CommitTooLargeError, match=r"stream.seek"):
            run_pending(stream, tight)
    stream.seek("g", stream.positions("g"))
    wide = consumer(topic=NUMBERS, emits=[OUT], group="g")(emit_all)
    run_pending(stream, wide)
    assert values(stream, OUT) == list(range(20))


def test_a_poison_record_of_a_blocking_group_can_be_skipped(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, emits=[OUT], on_poison="block", retry=FAST)
    def strict(batch: Batch) -> None:
        for record in batch:
            if record.data["n"] == 1:
                batch.fail(record, "not this one")
            batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(4))
    with pytest.raises(PoisonBlockedError, match="record 1"):
        run_pending(stream, strict)
    assert stream.dead_letters("strict") == []
    stream.seek("strict", {TopicPartition("numbers", 0): 2})
    run_pending(stream, strict)
    assert values(stream, OUT) == [2, 3]


def test_owners_of_one_name_do_not_fence_each_other(stream: EventStream) -> None:
    one, two = (Worker(stream, [tally], owner="same") for _ in range(2))
    assert one.owner != two.owner


def test_a_bare_event_passed_on_keeps_its_id(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, emits=[OUT], isolate="per_event")
    def forward(record: Record, batch: Batch) -> None:
        batch.emit(record.event(), topic=OUT)

    fill(stream, NUMBERS, numbers(2))
    run_pending(stream, forward)
    before = [record.id for record in stream.records(NUMBERS, 0)]
    assert [record.id for record in stream.records(Topic("out"), 0)] == before
