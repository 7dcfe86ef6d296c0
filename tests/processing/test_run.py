"""`run_pending`: run mode."""

import random
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import (
    Batch,
    BatchReport,
    EventStream,
    Joined,
    SnapshotPolicy,
    Threshold,
    Topic,
    consumer,
    join,
    run_pending,
    testing,
)
from djp_dagster.errors import FencedError, LeaseBusyError, StreamUnavailableError
from djp_dagster.testing import Clock, crash_at
from tests.processing.kit import (
    FAST,
    NUMBERS,
    OUT,
    Impatient,
    committed,
    fill,
    in_thread,
    numbers,
    open_intents,
    values,
    wait_until,
)


@consumer(topic=NUMBERS, emits=[OUT], group="copy")
def copy(batch: Batch) -> None:
    for record in batch:
        batch.emit(OUT.event(n=record.data["n"]))


def test_nothing_pending_is_no_batch(stream: EventStream) -> None:
    report = run_pending(stream, copy)
    assert (report.batches, report.events, report.waited_for) == ((), 0, None)
    fill(stream, NUMBERS, numbers(2))
    assert run_pending(stream, copy).events == 2
    assert run_pending(stream, copy).batches == ()


def test_batches_are_bounded_and_reported(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, max_batch=Threshold(events=4))
    def handle(batch: Batch) -> None: ...

    seen: list[BatchReport] = []
    fill(stream, NUMBERS, numbers(10))
    report = run_pending(stream, handle, on_report=seen.append)
    assert [batch.events for batch in report.batches] == [4, 4, 2]
    assert list(report.batches) == seen
    first = seen[0]
    assert (first.group, first.kind, first.reason, first.attempt) == ("handle", "cut", "pending", 1)
    assert first.seconds >= first.handler_seconds >= 0 <= first.commit_seconds


def test_only_up_to_the_end_seen_at_the_start(stream: EventStream) -> None:
    @consumer(topic=NUMBERS, max_batch=Threshold(events=2))
    def handle(batch: Batch) -> None:
        stream.publish(NUMBERS, numbers(1))

    fill(stream, NUMBERS, numbers(4))
    assert run_pending(stream, handle).events == 4
    assert stream.pending("handle").events == 2


def test_several_topics_and_partitions_in_one_batch(stream: EventStream) -> None:
    left, right = Topic("left", partitions=3), Topic("right", partitions=2)
    seen: set[tuple[str, int]] = set()

    @consumer(topics=[left, right])
    def handle(batch: Batch) -> None:
        seen.update((record.topic, record.partition) for record in batch)

    fill(stream, left, [left.event(n=n) for n in range(30)])
    fill(stream, right, [right.event(n=n) for n in range(30)])
    report = run_pending(stream, handle)
    assert [batch.events for batch in report.batches] == [60]
    assert seen == {("left", 0), ("left", 1), ("left", 2), ("right", 0), ("right", 1)}


class TestThreshold:
    """Only what reaches it, in batches of that size."""

    @pytest.mark.parametrize(("pending", "batches"), [(3, []), (4, [4]), (7, [4]), (9, [4, 4])])
    def test_the_remainder_stays(self, stream: EventStream, pending: int, batches: list[int]) -> None:
        fill(stream, NUMBERS, numbers(pending))
        report = run_pending(stream, copy, threshold=Threshold(events=4))
        assert [batch.events for batch in report.batches] == batches
        assert {batch.reason for batch in report.batches} <= {"events"}
        assert stream.pending("copy").events == pending - sum(batches)

    def test_age_takes_the_remainder_too(self, stream: EventStream, clock: Clock) -> None:
        fill(stream, NUMBERS, numbers(6))
        threshold = Threshold(events=4, age="1h")
        assert [batch.reason for batch in run_pending(stream, copy, threshold=threshold).batches] == ["events"]
        clock.advance(3600)
        report = run_pending(stream, copy, threshold=threshold)
        assert [(batch.reason, batch.events) for batch in report.batches] == [("age", 2)]

    def test_without_a_size_the_consumers_bound_holds(self, stream: EventStream, clock: Clock) -> None:
        @consumer(topic=NUMBERS, max_batch=Threshold(events=2))
        def handle(batch: Batch) -> None: ...

        fill(stream, NUMBERS, numbers(5))
        handle.register(stream)
        assert run_pending(stream, handle, threshold=Threshold(idle=10)).batches == ()
        clock.advance(10)
        report = run_pending(stream, handle, threshold=Threshold(idle=10))
        assert [(batch.reason, batch.events) for batch in report.batches] == [("idle", 2), ("idle", 2), ("idle", 1)]

    def test_by_bytes(self, stream: EventStream) -> None:
        fill(stream, NUMBERS, numbers(100))
        size = stream.log.backlog(dict.fromkeys(stream.log.spans(["numbers"]), 0)).bytes
        assert size is not None
        report = run_pending(stream, copy, threshold=Threshold(bytes=size // 2))
        assert [batch.reason for batch in report.batches] == ["bytes"] * len(report.batches)
        assert 0 < sum(batch.events for batch in report.batches) <= 100
        left = stream.pending("copy").bytes
        assert left is not None
        assert left < size // 2

    def test_a_stateful_group_shares_it_among_its_tasks(
        self, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        """Batches of single tasks add up to what was reached; a remainder below it stays, wherever it is."""
        topic = Topic("keyed", partitions=4, key="k")
        stream.create_topic(topic)
        seen: list[int] = []

        @consumer(topic=topic, stateful=True)
        def handle(batch: Batch) -> None:
            seen.extend(record.data["n"] for record in batch)

        def run() -> list[str]:
            report = run_pending(stream, handle, threshold=Threshold(events=300, age="1h"), state_folder=tmp_path)
            assert all(len(batch.ranges) == 1 for batch in report.batches)
            return [batch.reason for batch in report.batches]

        stream.publish(topic, [topic.event(k=seed.randrange(1000), n=n) for n in range(1000)])
        assert set(run()) == {"events"}
        assert len(seen) == 900
        stream.publish(topic, [topic.event(k=seed.randrange(1000), n=1000 + n) for n in range(199)])
        assert run() == []
        stream.publish(topic, [topic.event(k=0, n=1199)])
        run()
        assert sorted(seen) == list(range(1200))

    @pytest.mark.parametrize("events", [1, 8, 100])
    def test_a_join_shares_it_and_never_stands_still(
        self, stream: EventStream, seed: random.Random, clock: Clock, tmp_path: Path, events: int
    ) -> None:
        """However unevenly it is spread over inputs and partitions, less than the threshold is left."""
        inputs = {name: Topic(name, partitions=3, key="k") for name in ("few", "some", "many")}

        @join(inputs=inputs, key="k")
        def meet(parts: Joined) -> None: ...

        meet.register(stream)
        for name, count in (("few", 3), ("some", 40), ("many", 300)):
            for n in range(count):
                clock.advance(0.001)
                stream.publish(inputs[name], [inputs[name].event(k=seed.randrange(30), n=n)])
        run_pending(stream, meet, threshold=Threshold(events=events), state_folder=tmp_path)
        assert stream.pending("meet").events < events

    def test_a_due_deadline_waits_for_no_threshold(self, stream: EventStream, clock: Clock) -> None:
        fired: list[str] = []

        @consumer(topic=NUMBERS)
        def handle(batch: Batch) -> None:
            fired.extend(deadline.key for deadline in batch.deadlines)
            if len(batch):
                batch.set_deadline("k", datetime.fromtimestamp(clock.now_s, timezone.utc) + timedelta(seconds=5))

        fill(stream, NUMBERS, numbers(1))
        run_pending(stream, handle)
        clock.advance(5)
        run_pending(stream, handle, threshold=Threshold(events=100))
        assert fired == ["k"]


class TestStop:
    """A graceful end."""

    def test_after_the_batch_under_way(self, stream: EventStream) -> None:
        stop = threading.Event()

        @consumer(topic=NUMBERS, max_batch=Threshold(events=1))
        def handle(batch: Batch) -> None:
            stop.set()

        fill(stream, NUMBERS, numbers(3))
        assert run_pending(stream, handle, stop=stop).events == 1
        assert committed(stream, handle) == [1]
        assert open_intents(stream, handle) == []

    def test_leases_are_given_back_however_it_ends(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, max_poison=0, retry=FAST)
        def handle(batch: Batch) -> None:
            raise ValueError

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(Exception, match="max_poison"):
            run_pending(stream, handle)
        assert [task.owner for task in stream.coordinator.tasks("handle")] == [None]
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("djp-leases")]


class TestBusy:
    """Another holder."""

    def test_one_that_did_the_work_is_named(self, stream: EventStream) -> None:
        reported, finish = threading.Event(), threading.Event()

        def hold(report: BatchReport) -> None:
            reported.set()
            assert finish.wait(30)

        fill(stream, NUMBERS, numbers(3))
        with in_thread(lambda: run_pending(stream, copy, owner="first", on_report=hold), finish) as outcome:
            assert reported.wait(30)
            second = run_pending(stream, copy, owner="second")
        assert (second.waited_for or "").startswith("first-")
        assert second.batches == ()
        assert outcome[0].events == 3
        assert values(stream, OUT) == [0, 1, 2]

    def test_it_is_waited_for(self, stream: EventStream) -> None:
        started, go_on = threading.Event(), threading.Event()

        @consumer(topic=NUMBERS, emits=[OUT], group="slow")
        def slow(batch: Batch) -> None:
            started.set()
            assert go_on.wait(30)
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(3))
        with in_thread(lambda: run_pending(stream, slow), go_on) as first:
            assert started.wait(30)
            with in_thread(lambda: run_pending(stream, slow)) as second:
                go_on.set()
        assert first[0].events == 3
        assert second[0].events == 0
        assert values(stream, OUT) == [0, 1, 2]

    def test_not_for_ever(self, stream: EventStream) -> None:
        fill(stream, NUMBERS, numbers(1))
        copy.register(stream)
        stream.coordinator.acquire("copy", None, "somebody", 60.0)
        with pytest.raises(LeaseBusyError) as caught:
            run_pending(stream, copy, wait=0)
        assert caught.value.facts["holder"] == "somebody"
        stop = threading.Event()
        stop.set()
        with pytest.raises(LeaseBusyError):
            run_pending(stream, copy, stop=stop)

    def test_a_dead_one_is_followed_once_its_lease_has_run_out(self, stream: EventStream, clock: Clock) -> None:
        fill(stream, NUMBERS, numbers(1))
        copy.register(stream)
        stream.coordinator.acquire("copy", None, "dead", 5.0)
        clock.advance(5.1)
        assert run_pending(stream, copy, wait=0).events == 1

    def test_one_that_lost_its_lease_commits_nothing(self, stream: EventStream, clock: Clock) -> None:
        taken: list[Any] = []

        @consumer(topic=NUMBERS, emits=[OUT], group="copy")
        def zombie(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=-record.data["n"]))
            if not taken:
                clock.advance(6)
                taken.append(run_pending(stream, copy, owner="next"))

        fill(stream, NUMBERS, numbers(3))
        with pytest.raises(FencedError):
            run_pending(stream, zombie, owner="zombie")
        assert taken[0].events == 3
        assert values(stream, OUT) == [0, 1, 2]
        assert committed(stream, copy) == [3]


class TestCrash:
    """An exception that passes between the steps; SIGKILL is tested elsewhere."""

    @pytest.mark.parametrize("point", testing.CRASH_POINTS)
    def test_the_next_run_completes_it_once(self, stream: EventStream, point: Any, tmp_path: Any) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], stateful=True, retry=FAST, snapshots=SnapshotPolicy(changes=1))
        def handle(batch: Batch) -> dict[str, int]:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))
                batch.state.set("sum", batch.state.get("sum", 0) + record.data["n"])
            return {"sum": batch.state.get("sum")}

        fill(stream, NUMBERS, numbers(4))
        with crash_at(point, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            run_pending(stream, handle, state_folder=tmp_path)
        stream.publish(NUMBERS, numbers(2, start=4))
        run_pending(stream, handle, state_folder=tmp_path)
        from djp_dagster.claim_check.serializers import load_value

        outputs = [load_value(stream.payloads, output.payload)["sum"] for output in stream.outputs("handle")]
        assert values(stream, OUT) == [0, 1, 2, 3, 4, 5]
        assert outputs[-1] == 15
        assert committed(stream, handle) == [6]
        assert open_intents(stream, handle) == []

    def test_an_unclear_commit_is_settled(self, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
        commit = stream.coordinator.commit
        tries: list[str] = []

        def lost(wanted: Any) -> Any:
            tries.append("lost" if len(tries) else "before")
            if tries == ["before"]:
                raise StreamUnavailableError("cut before COMMIT", ambiguous=True)
            commit(wanted)
            raise StreamUnavailableError("cut after COMMIT", ambiguous=True)

        monkeypatch.setattr(stream.coordinator, "commit", lost)
        fill(stream, NUMBERS, numbers(3))
        report = run_pending(stream, copy, stop=Impatient())
        assert tries == ["before", "lost"]
        assert report.events == 3
        assert values(stream, OUT) == [0, 1, 2]


def test_a_cut_can_be_asked_for(stream: EventStream) -> None:
    fill(stream, NUMBERS, numbers(5))
    copy.register(stream)
    number = stream.coordinator.request("copy", "cut", {"until": [["numbers", 0, 3]]})
    report = run_pending(stream, copy, only_requests=True)
    assert [(batch.reason, batch.events) for batch in report.batches] == [("requested", 3)]
    assert stream.coordinator.request_status(number) == "done"
    assert stream.pending("copy").events == 2


def test_run_consumer_gives_everything_back() -> None:
    @consumer(topic=NUMBERS, emits=[OUT], stateful=True)
    def handle(batch: Batch) -> dict[str, int]:
        for record in batch:
            if record.data["n"] == 1:
                batch.fail(record, "one")
            batch.emit(OUT.event(n=record.data["n"]))
            batch.state.set(record.data["n"], "seen")
        return {"size": len(batch)}

    run = testing.run_consumer(handle, {NUMBERS: numbers(3)})
    assert [record.data["n"] for record in run.emitted["out"]] == [0, 1, 2]
    assert run.outputs == [{"size": 3}]
    assert [letter.offset for letter in run.dead_letters] == [1]
    assert run.state == {0: "seen", 1: "seen", 2: "seen"}
    assert [batch.events for batch in run.batches] == [3]


def test_waiting_threads_are_gone(stream: EventStream) -> None:
    fill(stream, NUMBERS, numbers(1))
    run_pending(stream, copy)
    wait_until(
        lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("djp-")], "the threads"
    )
