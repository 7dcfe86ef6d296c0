"""`isolate="per_event"`: a failing record is dead-lettered alone, without a search."""

from datetime import datetime, timezone
from typing import Any

import pytest

from djp_dagster import Batch, EventStream, Record, TransientError, consumer, run_pending
from djp_dagster.errors import PoisonBlockedError, RetriesExhaustedError, SystemicFailureError
from djp_dagster.testing import Clock, run_consumer
from tests.processing.kit import FAST, NO_EVENT, NUMBERS, OUT, append_raw, committed, fill, numbers, raw, values


def test_one_call_per_record_and_no_search(stream: EventStream) -> None:
    calls: list[int] = []

    @consumer(topic=NUMBERS, isolate="per_event")
    def handle(record: Record) -> None:
        calls.append(record.data["n"])
        if record.data["n"] in (1, 3):
            raise ValueError(record.data["n"])

    fill(stream, NUMBERS, numbers(5))
    report = run_pending(stream, handle)
    assert calls == [0, 1, 2, 3, 4]
    assert [(letter.offset, letter.error_type, letter.error) for letter in stream.dead_letters()] == [
        (1, "ValueError", "1"),
        (3, "ValueError", "3"),
    ]
    assert report.batches[0].dead_letters == 2


def test_what_a_failing_record_did_is_taken_back(stream: EventStream, clock: Clock, tmp_path: Any) -> None:
    due = datetime.fromtimestamp(clock.now_s + 10, timezone.utc)

    @consumer(topic=NUMBERS, emits=[OUT], isolate="per_event", stateful=True)
    def handle(record: Record, batch: Batch) -> None:
        n = record.data["n"]
        batch.emit(OUT.event(n=n))
        batch.emit(OUT.event(n=n))
        batch.state.set("sum", batch.state.get("sum", 0) + n)
        batch.state.set(f"seen-{n}", True)
        batch.set_deadline(f"d{n}", due)
        batch.set_deadline("last", datetime.fromtimestamp(clock.now_s + 100 + n, timezone.utc))
        if n == 3:
            batch.clear_deadline("d1")
            batch.state.delete("seen-1")
        if n in (2, 3):
            raise ValueError

    fill(stream, NUMBERS, numbers(5))
    run_pending(stream, handle, state_folder=tmp_path)
    assert values(stream, OUT) == [0, 0, 1, 1, 4, 4]
    assert stream.coordinator.next_deadline("handle", [0]) == round((clock.now_s + 10) * 1e6)
    found = stream.coordinator.due_deadlines("handle", [0], round((clock.now_s + 1000) * 1e6), 100)
    assert {deadline.key for deadline in found} == {"d0", "d1", "d4", "last"}
    assert max(deadline.due_micros for deadline in found) == round((clock.now_s + 104) * 1e6)
    from djp_dagster.state.keys import decode_key
    from djp_dagster.streams.records import decode_value
    from tests.state.kit import state_of

    state = {decode_key(key): decode_value(value) for key, value in state_of(stream, "handle").items()}
    assert state == {"sum": 5, "seen-0": True, "seen-1": True, "seen-4": True}


def test_resources_and_the_batch_by_name() -> None:
    seen: list[Any] = []

    @consumer(topic=NUMBERS, isolate="per_event")
    def handle(record: Record, batch: Batch, log: list[Any]) -> None:
        log.append((batch.reason, record.offset))

    run_consumer(handle, numbers(2), resources={"log": seen})
    assert seen == [("pending", 0), ("pending", 1)]


def test_a_transient_failure_tries_the_whole_batch_again(stream: EventStream) -> None:
    calls: list[int] = []

    @consumer(topic=NUMBERS, emits=[OUT], isolate="per_event", retry=FAST)
    def handle(record: Record, batch: Batch) -> None:
        calls.append(record.data["n"])
        batch.emit(OUT.event(n=record.data["n"]))
        if record.data["n"] == 1 and batch.attempt == 1:
            raise TransientError("away")

    fill(stream, NUMBERS, numbers(3))
    run_pending(stream, handle)
    assert calls == [0, 1, 0, 1, 2]
    assert values(stream, OUT) == [0, 1, 2]


def test_a_spent_budget_dead_letters_nothing(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, isolate="per_event", retry=FAST)
    def handle(record: Record) -> None:
        raise TransientError("away")

    fill(stream, NUMBERS, numbers(3))
    with pytest.raises(RetriesExhaustedError):
        run_pending(stream, handle)
    assert stream.dead_letters() == []
    assert committed(stream, handle) == [0]


def test_more_than_max_poison_is_systemic(stream: EventStream) -> None:
    calls: list[int] = []

    @consumer(topic=NUMBERS, isolate="per_event", max_poison=2)
    def handle(record: Record) -> None:
        calls.append(record.data["n"])
        raise ValueError

    fill(stream, NUMBERS, numbers(9))
    with pytest.raises(SystemicFailureError):
        run_pending(stream, handle)
    assert calls == [0, 1, 2]
    assert stream.dead_letters() == []
    assert committed(stream, handle) == [0]


def test_block_stops_at_the_first(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, isolate="per_event", on_poison="block")
    def handle(record: Record) -> None:
        if record.data["n"] == 2:
            raise ValueError("two")

    fill(stream, NUMBERS, numbers(9))
    with pytest.raises(PoisonBlockedError, match="record 2 "):
        run_pending(stream, handle)
    assert stream.dead_letters() == []
    assert committed(stream, handle) == [0]


def test_block_stops_at_what_is_no_event(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, isolate="per_event", on_poison="block")
    def handle(record: Record) -> None: ...

    fill(stream, NUMBERS, [])
    append_raw(stream, NUMBERS, [raw(numbers(1)[0]), NO_EVENT])
    with pytest.raises(PoisonBlockedError, match="no event"):
        run_pending(stream, handle)
    assert stream.dead_letters() == []
    assert committed(stream, handle) == [0]


def test_an_emit_that_cannot_be_encoded_is_found_by_search(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, emits=[OUT], isolate="per_event", retry=FAST)
    def handle(record: Record, batch: Batch) -> None:
        batch.emit(OUT.event(n=record.data["n"], what=object() if record.data["n"] == 3 else None))

    fill(stream, NUMBERS, numbers(6))
    run_pending(stream, handle)
    assert values(stream, OUT) == [0, 1, 2, 4, 5]
    assert [(letter.offset, letter.error_type) for letter in stream.dead_letters()] == [(3, "InvalidEventError")]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_failing_record_is_in_no_figure(concurrency: int) -> None:
    @consumer(topic=NUMBERS, isolate="per_event", concurrency=concurrency)
    def handle(record: Record, batch: Batch) -> None:
        batch.count("seen", record.data["n"])
        batch.gauge("last", record.data["n"], per_task=True)
        if record.data["n"] >= 3:
            raise ValueError

    (report,) = run_consumer(handle, numbers(5)).batches
    assert report.counts == {"seen": 0 + 1 + 2}
    assert report.gauges == {"last": 2}
    assert report.per_task == {"last"}


def test_what_a_handler_failed_before_it_raised_is_taken_back() -> None:
    @consumer(topic=NUMBERS, isolate="per_event")
    def handle(record: Record, batch: Batch) -> None:
        batch.fail(record, "as it says itself")
        if record.data["n"] == 1:
            raise ValueError("as it raises")

    letters = run_consumer(handle, numbers(3)).dead_letters
    assert [letter.error for letter in letters] == ["as it says itself", "as it raises", "as it says itself"]
