"""`Worker`: worker mode."""

import threading
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    BatchReport,
    Consumer,
    DjpError,
    EventStream,
    Threshold,
    Topic,
    TransientError,
    Worker,
    consumer,
)
from djp_dagster.errors import RetriesExhaustedError, StreamUnavailableError, SystemicFailureError
from djp_dagster.testing import Clock, memory_stream
from tests.processing.kit import (
    FAST,
    NUMBERS,
    OUT,
    all_records,
    begin,
    fill,
    in_thread,
    numbers,
    open_intents,
    values,
    wait_until,
)

WIDE = Topic("wide", partitions=4)
FAR = Topic("far")


@consumer(topic=NUMBERS, emits=[OUT], group="copy")
def copy(batch: Batch) -> None:
    for record in batch:
        batch.emit(OUT.event(n=record.data["n"]))


def test_it_works_as_events_come_until_told_to_stop(stream: EventStream) -> None:
    stop = threading.Event()
    reports: list[BatchReport] = []
    stream.create_topic(NUMBERS)
    with in_thread(lambda: Worker(stream, [copy], on_report=reports.append).run(stop), stop) as outcome:
        for n in range(5):
            stream.publish(NUMBERS, numbers(1, start=n))
            wait_until(lambda n=n: len(reports) and stream.pending("copy").events == 0, "the worker")  # type: ignore[misc]
    assert outcome == [None]
    assert values(stream, OUT) == list(range(5))
    assert sum(report.events for report in reports) == 5
    assert {report.reason for report in reports} == {"worker"}
    assert [task.owner for task in stream.coordinator.tasks("copy")] == [None]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("djp-leases")]


def test_several_consumers_feed_one_another(stream: EventStream) -> None:
    @consumer(topic=OUT, emits=[FAR])
    def onward(batch: Batch) -> None:
        for record in batch:
            batch.emit(FAR.event(n=record.data["n"] * 10))

    stop = threading.Event()
    fill(stream, NUMBERS, numbers(20))
    with in_thread(lambda: Worker(stream, [copy, onward]).run(stop), stop) as outcome:
        wait_until(lambda: _end(stream, FAR) == 20, "both consumers")
    assert outcome == [None]
    assert values(stream, FAR) == [n * 10 for n in range(20)]


def _end(stream: EventStream, topic: Topic) -> int:
    return sum(span.end for span in stream.log.spans([topic.name]).values()) if _exists(stream, topic) else 0


def _exists(stream: EventStream, topic: Topic) -> bool:
    return any(info.name == topic.name for info in stream.topics())


def test_each_batch_is_of_one_task(stream: EventStream, tmp_path: Path) -> None:
    @consumer(topic=WIDE, stateful=True, max_batch=Threshold(events=3))
    def count(batch: Batch) -> None:
        assert len({record.partition for record in batch}) == 1
        batch.state.set("n", batch.state.get("n", 0) + len(batch))

    stop = threading.Event()
    reports: list[BatchReport] = []
    fill(stream, WIDE, [WIDE.event(n=n) for n in range(40)])
    worker = Worker(stream, [count], state_folder=tmp_path, on_report=reports.append)
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        wait_until(lambda: sum(report.events for report in reports) == 40, "the worker")
    assert outcome == [None]
    assert max(report.events for report in reports) <= 3
    assert {part.partition for report in reports for part in report.ranges} == {0, 1, 2, 3}


def test_two_workers_share_the_tasks_and_a_leaving_one_hands_over(stream: EventStream) -> None:
    done: Counter[str] = Counter()

    @consumer(topic=WIDE, emits=[OUT], group="shared")
    def handle(batch: Batch) -> None:
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"]))

    def owners() -> Counter[str | None]:
        return Counter(task.owner and task.owner.split("-")[0] for task in stream.coordinator.tasks("shared"))

    def work(name: str, stop: threading.Event) -> None:
        def count(report: BatchReport) -> None:
            done[name] += report.events

        Worker(stream, [handle], owner=name, lease=0.6, on_report=count).run(stop)

    handle.register(stream)
    first, second = threading.Event(), threading.Event()
    with in_thread(lambda: work("first", first), first) as one:
        wait_until(lambda: owners() == {"first": 4}, "the first to hold all")
        with in_thread(lambda: work("second", second), second) as two:
            wait_until(lambda: owners() == {"first": 2, "second": 2}, "an even share")
            stream.publish(WIDE, [WIDE.event(n=n) for n in range(100)])
            wait_until(lambda: sum(done.values()) == 100, "all the work")
            assert all(done[name] for name in ("first", "second"))
            first.set()
            wait_until(lambda: owners() == {"second": 4}, "the second to hold all")
            stream.publish(WIDE, [WIDE.event(n=n) for n in range(100, 120)])
            wait_until(lambda: sum(done.values()) == 120, "the rest of the work")
    assert one == two == [None]
    assert sorted(values(stream, OUT)) == list(range(120))
    assert len({record.id for record in all_records(stream, OUT)}) == 120


def test_an_open_batch_of_several_tasks_is_finished_first(stream: EventStream) -> None:
    from djp_dagster.streams.model import Range

    @consumer(topic=WIDE, emits=[OUT])
    def handle(batch: Batch) -> None:
        for record in batch:
            batch.emit(OUT.event(n=record.data["n"], size=len(batch), reason=batch.reason))

    stop = threading.Event()
    fill(stream, WIDE, [WIDE.event(n=n) for n in range(40)])
    ends = {at.partition: span.end for at, span in stream.log.spans(["wide"]).items()}
    begin(stream, handle, [Range("wide", partition, 0, ends[partition]) for partition in (1, 2)])
    with in_thread(lambda: Worker(stream, [handle]).run(stop), stop) as outcome:
        wait_until(lambda: _end(stream, OUT) == 40, "the worker")
        stream.publish(WIDE, [WIDE.event(n=n) for n in range(40, 60)])
        wait_until(lambda: _end(stream, OUT) == 60, "the worker")
    assert outcome == [None]
    assert sorted(values(stream, OUT)) == list(range(60))
    spanning = [record for record in all_records(stream, OUT) if record.data["reason"] == "test"]
    assert len(spanning) == ends[1] + ends[2] == spanning[0].data["size"]


def test_a_deadline_wakes_it() -> None:
    fired: list[str] = []

    @consumer(topic=NUMBERS)
    def handle(batch: Batch) -> None:
        fired.extend(deadline.key for deadline in batch.deadlines)
        for _ in batch:
            batch.set_deadline("soon", datetime.now(timezone.utc) + timedelta(milliseconds=30))

    stop = threading.Event()
    with memory_stream() as stream:
        fill(stream, NUMBERS, numbers(1))
        with in_thread(lambda: Worker(stream, [handle]).run(stop), stop) as outcome:
            wait_until(lambda: bool(fired), "the deadline")
    assert outcome == [None]
    assert fired == ["soon"]


class TestPause:
    """A consumer that gives up."""

    def test_it_pauses_while_the_others_go_on(self, stream: EventStream) -> None:
        failures: list[tuple[str, DjpError]] = []

        @consumer(topic=NUMBERS, retry=FAST)
        def broken(batch: Batch) -> None:
            raise TransientError("away")

        @consumer(topic=NUMBERS, retry=FAST, max_poison=0)
        def wrong(batch: Batch) -> None:
            raise ValueError

        def note(which: Consumer, error: DjpError) -> None:
            failures.append((which.group, error))

        stop = threading.Event()
        fill(stream, NUMBERS, numbers(3))
        worker = Worker(stream, [broken, wrong, copy], on_failure=note)
        with in_thread(lambda: worker.run(stop), stop) as outcome:
            wait_until(lambda: len(failures) == 2 and _end(stream, OUT) == 3, "the failures and the work")
            stream.publish(NUMBERS, numbers(2, start=3))
            wait_until(lambda: _end(stream, OUT) == 5, "more work")
            owners = {group: stream.coordinator.tasks(group)[0].owner for group in ("broken", "wrong", "copy")}
        assert outcome == [None]
        assert [(group, type(error)) for group, error in failures] == [
            ("broken", RetriesExhaustedError),
            ("wrong", SystemicFailureError),
        ]
        assert owners["copy"] == worker.owner
        assert stream.dead_letters() == []
        assert stream.positions("broken") == stream.positions("wrong") != stream.positions("copy")

    def test_without_a_listener_the_error_ends_the_worker(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, retry=FAST)
        def broken(batch: Batch) -> None:
            raise TransientError("away")

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(RetriesExhaustedError):
            Worker(stream, [broken]).run(threading.Event())
        assert [task.owner for task in stream.coordinator.tasks("broken")] == [None]


class TestLost:
    """Leases and streams that go away."""

    def test_a_lost_lease_is_let_go_and_the_work_is_done_once(self, stream: EventStream, clock: Clock) -> None:
        stolen: list[Any] = []

        @consumer(topic=NUMBERS, emits=[OUT], group="copy")
        def handle(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))
            if not stolen:
                clock.advance(6)
                stolen.append(stream.coordinator.acquire("copy", None, "thief", 5.0))
                stream.coordinator.release(stolen[0])

        stop = threading.Event()
        fill(stream, NUMBERS, numbers(3))
        with in_thread(lambda: Worker(stream, [handle], lease=0.5).run(stop), stop) as outcome:
            wait_until(lambda: _end(stream, OUT) == 3, "the worker")
        assert outcome == [None]
        assert values(stream, OUT) == [0, 1, 2]
        assert len(stolen) == 1

    @pytest.mark.parametrize("written", [True, False])
    def test_a_cut_that_may_have_been_written_is_not_cut_again(
        self, stream: EventStream, monkeypatch: pytest.MonkeyPatch, written: bool
    ) -> None:
        original = stream.coordinator.begin
        lost: list[str] = []

        def unclear(lease: Any, intent: Any) -> None:
            if lost:
                return original(lease, intent)
            lost.append(intent.batch_id)
            if written:
                original(lease, intent)
            raise StreamUnavailableError("cut during COMMIT", ambiguous=True)

        monkeypatch.setattr(stream.coordinator, "begin", unclear)
        stop = threading.Event()
        reports: list[BatchReport] = []
        fill(stream, NUMBERS, numbers(3))
        with in_thread(lambda: Worker(stream, [copy], lease=0.5, on_report=reports.append).run(stop), stop) as outcome:
            wait_until(lambda: sum(report.events for report in reports) == 3, "the worker")
        assert outcome == [None]
        assert values(stream, OUT) == [0, 1, 2]
        assert open_intents(stream, copy) == []
        assert reports[0].batch_id == lost[0]
        assert reports[0].attempt == 1, "nobody died"
