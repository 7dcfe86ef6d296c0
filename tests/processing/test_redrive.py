"""Dead letters back through their group's handler."""

import threading
from typing import Any

import pytest

from djp_dagster import Batch, Consumer, EventStream, Record, Topic, consumer, redrive, request_redrive, run_pending
from djp_dagster.errors import LeaseBusyError, RetriesExhaustedError, UnknownDeadLetterError, UnknownGroupError
from djp_dagster.processing.worker import Worker
from tests.processing.kit import (
    FAST,
    NO_EVENT,
    NUMBERS,
    OUT,
    Mortal,
    all_records,
    append_raw,
    committed,
    fill,
    in_thread,
    numbers,
    open_intents,
    raw,
    values,
    wait_until,
)


class Broken:
    """A consumer with records it cannot handle until told so."""

    def __init__(self, stream: EventStream, count: int = 6, bad: tuple[int, ...] = (1, 4), **settings: Any) -> None:
        self.stream, self.bad = stream, set(bad)
        self.reasons: list[str] = []

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, group="broken", **settings)
        def handle(batch: Batch) -> Any:
            self.reasons.append(batch.reason)
            for record in batch:
                if record.data["n"] in self.bad:
                    raise ValueError(f"bad {record.data['n']}")
                batch.emit(OUT.event(n=record.data["n"]))
                if settings.get("stateful"):
                    batch.state.set(record.data["n"], batch.reason)
            return {"size": len(batch)}

        self.consumer: Consumer = handle
        fill(stream, NUMBERS, numbers(count))

    def statuses(self) -> list[tuple[int, str, int]]:
        return [
            (letter.offset, letter.status, letter.redrives)
            for letter in self.stream.dead_letters("broken", status=None)
        ]


def test_after_a_fix_they_are_handled_once(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    broken.bad.clear()
    letters = redrive(stream, broken.consumer)
    assert [(letter.offset, letter.status, letter.redrives) for letter in letters] == [
        (1, "redriven", 1),
        (4, "redriven", 1),
    ]
    assert values(stream, OUT) == [0, 2, 3, 5, 1, 4]
    assert committed(stream, broken.consumer) == [6]
    assert len({record.id for record in all_records(stream, OUT)}) == 6
    assert len(stream.outputs("broken")) == 3
    assert stream.dead_letters("broken") == []
    assert redrive(stream, broken.consumer) == []
    assert values(stream, OUT) == [0, 2, 3, 5, 1, 4]


def test_the_records_are_as_they_were(stream: EventStream) -> None:
    seen: list[Record] = []

    @consumer(topic=NUMBERS, group="broken")
    def handle(batch: Batch) -> None:
        for record in batch:
            seen.append(record)
            if batch.reason != "redrive":
                batch.fail(record, "later")

    fill(stream, NUMBERS, numbers(3))
    run_pending(stream, handle)
    redrive(stream, handle)
    first, again = seen[:3], seen[3:]
    assert [record.event() for record in again] == [record.event() for record in first]
    for attribute in ("position", "append_time", "idempotency_key"):
        assert [getattr(record, attribute) for record in again] == [getattr(record, attribute) for record in first]


def test_emits_of_a_redriven_record_have_the_ids_they_would_have_had(stream: EventStream) -> None:
    broken = Broken(stream, bad=())
    run_pending(stream, broken.consumer)
    ids = {record.data["n"]: record.id for record in all_records(stream, OUT)}
    broken.bad.add(2)
    stream.seek("broken", "earliest")
    run_pending(stream, broken.consumer)
    broken.bad.clear()
    redrive(stream, broken.consumer)
    assert ids[2] == all_records(stream, OUT)[-1].id


def test_what_fails_again_stays_pending_with_its_new_error(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    broken.bad.remove(1)
    letters = redrive(stream, broken.consumer)
    assert [(letter.offset, letter.status, letter.redrives) for letter in letters] == [
        (1, "redriven", 1),
        (4, "pending", 1),
    ]
    assert letters[1].error == "bad 4"
    assert values(stream, OUT) == [0, 2, 3, 5, 1]
    assert open_intents(stream, broken.consumer) == []
    broken.bad.clear()
    redrive(stream, broken.consumer)
    assert broken.statuses() == [(1, "redriven", 1), (4, "redriven", 2)]


def test_only_those_asked_for(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    broken.bad.clear()
    second = stream.dead_letters("broken")[1].id
    (letter,) = redrive(stream, broken.consumer, [second])
    assert (letter.offset, letter.status) == (4, "redriven")
    assert broken.statuses() == [(1, "pending", 0), (4, "redriven", 1)]


def test_unknown_ones_are_named_and_nothing_is_done(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    first, second = stream.dead_letters("broken")
    stream.discard_dead_letters("broken", [second.id])
    with pytest.raises(UnknownDeadLetterError) as caught:
        redrive(stream, broken.consumer, [first.id, second.id, 999])
    assert caught.value.facts["ids"] == [second.id, 999]
    assert broken.statuses() == [(1, "pending", 0), (4, "discarded", 0)]
    with pytest.raises(UnknownGroupError):
        request_redrive(stream, "nobody")


def test_discarded_ones_are_left_alone(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    (number, _) = (letter.id for letter in stream.dead_letters("broken"))
    request_redrive(stream, "broken")
    assert stream.discard_dead_letters("broken", [number]) == 1
    assert stream.discard_dead_letters("broken", [number]) == 0
    broken.bad.clear()
    run_pending(stream, broken.consumer)
    assert broken.statuses() == [(1, "discarded", 0), (4, "redriven", 1)]
    assert values(stream, OUT) == [0, 2, 3, 5, 4]


def test_a_run_does_what_was_asked_for_first(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    broken.bad.clear()
    numbers_asked = request_redrive(stream, "broken")
    stream.publish(NUMBERS, numbers(1, start=6))
    report = run_pending(stream, broken.consumer)
    assert [(batch.kind, batch.reason, batch.events) for batch in report.batches] == [
        ("redrive", "redrive", 1),
        ("redrive", "redrive", 1),
        ("cut", "pending", 1),
    ]
    assert [stream.coordinator.request_status(number) for number in numbers_asked] == ["done"]


def test_redriving_cuts_nothing_new(stream: EventStream) -> None:
    broken = Broken(stream)
    run_pending(stream, broken.consumer)
    broken.bad.clear()
    stream.publish(NUMBERS, numbers(3, start=6))
    redrive(stream, broken.consumer)
    assert stream.pending("broken").events == 3


def test_the_state_of_a_stateful_group(stream: EventStream, tmp_path: Any) -> None:
    from djp_dagster.state.keys import decode_key
    from djp_dagster.streams.records import decode_value
    from tests.state.kit import state_of

    broken = Broken(stream, stateful=True)
    run_pending(stream, broken.consumer, state_folder=tmp_path)
    broken.bad.clear()
    redrive(stream, broken.consumer, state_folder=tmp_path)
    found = {decode_key(key): decode_value(value) for key, value in state_of(stream, "broken").items()}
    assert found == dict.fromkeys((0, 2, 3, 5), "pending") | dict.fromkeys((1, 4), "redrive")


def test_one_request_for_each_task(stream: EventStream) -> None:
    topic = Topic("spread", partitions=3, key="k")

    @consumer(topic=topic)
    def handle(batch: Batch) -> None:
        for record in batch:
            if batch.reason != "redrive":
                batch.fail(record, "later")

    fill(stream, topic, [topic.event(k=str(n)) for n in range(20)])
    run_pending(stream, handle)
    assert len(request_redrive(stream, "handle")) == 3
    run_pending(stream, handle)
    assert {letter.status for letter in stream.dead_letters("handle", status=None)} == {"redriven"}


def test_a_record_that_is_no_event_fails_again(stream: EventStream) -> None:
    @consumer(topic=NUMBERS)
    def handle(batch: Batch) -> None:
        list(batch)

    fill(stream, NUMBERS, [])
    append_raw(stream, NUMBERS, [NO_EVENT, raw(numbers(1)[0])])
    run_pending(stream, handle)
    (letter,) = redrive(stream, handle)
    assert (letter.status, letter.redrives, letter.error_type) == ("pending", 1, "UndecodableRecordError")
    assert open_intents(stream, handle) == []


@pytest.mark.parametrize("settings", [{"on_poison": "block"}, {"max_poison": 0}], ids=str)
@pytest.mark.parametrize("isolate", ["batch", "per_event"])
def test_failing_again_never_blocks_the_group(stream: EventStream, settings: dict[str, Any], isolate: Any) -> None:
    """Redriving is asked for; its failure says nothing about what is pending."""
    if isolate == "batch":

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, isolate="batch", group="g", **settings)
        def handle(batch: Batch) -> None:
            for record in batch:
                work(record, batch)

    else:

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST, isolate="per_event", group="g", **settings)
        def handle(record: Record, batch: Batch) -> None:
            work(record, batch)

    def work(record: Record, batch: Batch) -> None:
        if batch.reason == "redrive":
            raise ValueError("still bad")
        if record.data["n"] == 1:
            batch.fail(record, "not now")
        else:
            batch.emit(OUT.event(n=record.data["n"]))

    @consumer(topic=NUMBERS, emits=[OUT], group="g")
    def before(batch: Batch) -> None:
        for record in batch:
            work(record, batch)

    fill(stream, NUMBERS, numbers(3))
    run_pending(stream, before)
    (letter,) = redrive(stream, handle)
    assert (letter.status, letter.redrives, letter.error) == ("pending", 1, "still bad")
    assert open_intents(stream, handle) == []
    stream.publish(NUMBERS, numbers(1, start=3))
    run_pending(stream, handle)
    assert values(stream, OUT) == [0, 2, 3]


def test_a_transient_failure_is_retried_and_may_spend_the_budget(stream: EventStream) -> None:
    away = True

    @consumer(topic=NUMBERS, retry=FAST)
    def handle(batch: Batch) -> None:
        for record in batch:
            if batch.reason != "redrive":
                batch.fail(record, "later")
            elif away:
                raise ConnectionError

    fill(stream, NUMBERS, numbers(1))
    run_pending(stream, handle)
    with pytest.raises(RetriesExhaustedError):
        redrive(stream, handle)
    away = False
    run_pending(stream, handle)
    (letter,) = stream.dead_letters("handle", status=None)
    assert (letter.status, letter.redrives) == ("redriven", 1)


def test_one_that_kills_the_process_is_given_up(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    mortal = Mortal(stream, monkeypatch)

    @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
    def handle(batch: Batch) -> None:
        for record in batch:
            if batch.reason == "redrive" and record.data["n"] == 0:
                mortal.die()
            if batch.reason != "redrive" and record.data["n"] < 2:
                batch.fail(record, "later")
            else:
                batch.emit(OUT.event(n=record.data["n"]))

    fill(stream, NUMBERS, numbers(3))
    run_pending(stream, handle)
    request_redrive(stream, "handle")
    mortal.run(lambda: run_pending(stream, handle), limit=FAST.max_attempts)
    assert mortal.deaths == FAST.max_attempts
    first, second = stream.dead_letters("handle", status=None)
    assert (first.status, first.redrives, first.error_type) == ("pending", 1, "ProcessDied")
    assert (second.status, second.redrives) == ("redriven", 1)
    assert values(stream, OUT) == [2, 1]


def test_more_than_a_page_of_them(stream: EventStream) -> None:
    @consumer(topic=NUMBERS)
    def handle(batch: Batch) -> None:
        for record in batch:
            if batch.reason != "redrive":
                batch.fail(record, "later")

    fill(stream, NUMBERS, numbers(1005))
    run_pending(stream, handle)
    asked = request_redrive(stream, "handle")
    requests = stream.coordinator.requests("handle")
    assert [request.id for request in requests] == asked
    assert [len(request.body["ids"]) for request in requests] == [1000, 5]  # type: ignore[arg-type]


class TestWhileSomebodyHoldsTheGroup:
    """Redriving is then the holder's work."""

    def test_a_worker_does_it(self, stream: EventStream) -> None:
        broken = Broken(stream)
        run_pending(stream, broken.consumer)
        broken.bad.clear()
        stop = threading.Event()
        with in_thread(lambda: Worker(stream, [broken.consumer]).run(stop), stop) as outcome:
            wait_until(lambda: stream.coordinator.tasks("broken")[0].owner is not None, "the worker's lease")
            letters = redrive(stream, broken.consumer, wait=30)
        assert outcome == [None]
        assert [letter.status for letter in letters] == ["redriven", "redriven"]
        assert values(stream, OUT) == [0, 2, 3, 5, 1, 4]

    def test_one_that_does_not_get_to_it_is_named(self, stream: EventStream) -> None:
        broken = Broken(stream)
        run_pending(stream, broken.consumer)
        lease = stream.coordinator.acquire("broken", None, "somebody", 60.0)
        with pytest.raises(LeaseBusyError) as caught:
            redrive(stream, broken.consumer, wait=0)
        assert caught.value.facts["holder"] == "somebody"
        stream.coordinator.release(lease)
        broken.bad.clear()
        run_pending(stream, broken.consumer)
        assert [status for _, status, _ in broken.statuses()] == ["redriven", "redriven"]
