"""`look`: what a tick finds out, from the stream alone."""

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, LocalPayloadStore, SqlEventStream, Threshold, consumer
from djp_dagster.errors import RetriesExhaustedError, StreamUnavailableError
from djp_dagster.orchestration.ticks import look
from djp_dagster.streams.model import Intent, Range
from djp_dagster.testing import Clock
from tests.orchestration.kit import COPIES, FAST, ORDERS, copied, copy, drain, orders, publish, tick
from tests.processing.kit import at
from tests.servers.postgres import PostgresServer


@consumer(topic=ORDERS, group="newcomer", start="latest")
def newcomer(batch: djp.Batch) -> None: ...


def digest(stream: EventStream) -> str:
    """What a due look calls the present state."""
    seen = look(stream, copy)
    assert seen.reason is not None
    return seen.digest


class TestDue:
    """Whether a run is due."""

    def test_nothing_was_ever_published(self, timed: EventStream) -> None:
        seen = look(timed, copy)
        assert (seen.reason, seen.holder) == (None, None)
        assert "'orders' does not exist" in seen.why_not
        timed.create_topic(ORDERS)
        assert look(timed, copy)[:2] == (None, "nothing is pending")
        assert timed.groups() == [], "a tick writes nothing"

    def test_first_events_are_due_before_the_group_exists(self, timed: EventStream) -> None:
        publish(timed, 3)
        seen = look(timed, copy)
        assert (seen.reason, seen.holder) == ("first events", None)
        assert seen.digest
        assert timed.groups() == []
        drain(timed)
        assert look(timed, copy)[:2] == (None, "nothing is pending")

    def test_the_number_pending_is_the_reason(self, timed: EventStream) -> None:
        copy.register(timed)
        publish(timed, 5)
        assert look(timed, copy).reason == "5 events pending"
        drain(timed)
        assert look(timed, copy).reason is None
        publish(timed, 1)
        assert look(timed, copy).reason == "1 events pending"

    @pytest.mark.parametrize(
        ("threshold", "name"),
        [
            (Threshold(events=10), "events"),
            (Threshold(bytes=1), "bytes"),
            (Threshold(events=1000, age="1h"), "age"),
            (Threshold(events=1000, idle="30min"), "idle"),
        ],
    )
    @pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
    def test_a_threshold_is_waited_for(
        self, timed: EventStream, clock: Clock, threshold: Threshold, name: str, first: bool
    ) -> None:
        if not first:
            copy.register(timed)
        timed.create_topic(ORDERS)
        assert look(timed, copy, threshold)[:2] == (None, "nothing is pending")
        publish(timed, 9)
        if name == "bytes":
            assert look(timed, copy, threshold).reason is not None
            size = timed.log.backlog({at(ORDERS, 0): 0, at(ORDERS, 1): 0}).bytes
            assert size is not None
            waiting = look(timed, copy, Threshold(bytes=size + 1))
            assert waiting.reason is None
            assert f"waiting for bytes {size + 1}" in waiting.why_not
            threshold = Threshold(bytes=size)
        else:
            waiting = look(timed, copy, threshold)
            assert waiting.reason is None
            assert waiting.why_not.startswith("9 events of 0.0 MB, the oldest 0 s old pending; waiting for events ")
        if name == "events":
            publish(timed, 1, start=9)
        elif name == "age":
            clock.advance(1800)
            publish(timed, 1, start=9)  # age counts from the oldest
            clock.advance(1799)
            assert look(timed, copy, threshold).reason is None
            clock.advance(1)
        elif name == "idle":
            clock.advance(1799)
            publish(timed, 1, start=9)  # idle counts from the newest
            clock.advance(1799)
            assert look(timed, copy, threshold).reason is None
            clock.advance(1)
        reason = look(timed, copy, threshold).reason
        assert reason is not None
        assert reason.startswith(f"{name} reached: {9 + (name != 'bytes')} events of 0.0 MB, the oldest ")

    def test_a_group_from_the_latest_on_does_not_wait_to_exist(self, timed: EventStream) -> None:
        for threshold in (None, Threshold(events=1000)):
            reason = look(timed, newcomer, threshold).reason
            assert reason == "the group must begin before what it is to handle is appended"
        drain(timed, newcomer)
        publish(timed, 1)
        assert look(timed, newcomer, Threshold(events=1000)).reason is None
        assert look(timed, newcomer).reason == "1 events pending"

    @pytest.mark.parametrize("threshold", [None, Threshold(events=100)])
    def test_a_due_deadline_is_due(self, timed: EventStream, clock: Clock, threshold: Threshold | None) -> None:
        @consumer(topic=ORDERS)
        def patient(batch: djp.Batch) -> None:
            for record in batch:
                batch.set_deadline(record.data["user"], datetime.fromtimestamp(clock(), timezone.utc) + timedelta(1))

        publish(timed, 1)
        drain(timed, patient)
        assert look(timed, patient, threshold).reason is None
        clock.advance(86_399)
        assert look(timed, patient, threshold).reason is None
        clock.advance(1)
        assert look(timed, patient, threshold).reason == "a deadline is due"
        drain(timed, patient)
        assert look(timed, patient, threshold).reason is None

    @pytest.mark.parametrize("threshold", [None, Threshold(events=100)])
    def test_open_requests_are_due(self, timed: EventStream, threshold: Threshold | None) -> None:
        copy.register(timed)
        assert look(timed, copy, threshold).reason is None
        timed.coordinator.request("copy", "cut", {"until": [["orders", 0, 0]]})
        assert look(timed, copy, threshold).reason == "requests are open"
        djp.run_pending(timed, copy, only_requests=True)
        assert look(timed, copy, threshold).reason is None

    def test_a_batch_left_open_is_due_below_the_threshold(self, timed: EventStream) -> None:
        publish(timed, 3)
        copy.register(timed)
        threshold = Threshold(events=100)
        assert look(timed, copy, threshold).reason is None
        leave_open(timed)
        assert look(timed, copy, threshold).reason == "a batch was left open"
        djp.run_pending(timed, copy, threshold=threshold)
        assert look(timed, copy, threshold).reason is None
        assert len(copied(timed)) == 3


def leave_open(stream: EventStream) -> None:
    """Begin a batch of everything pending, and vanish."""
    lease = stream.coordinator.acquire("copy", None, "vanished", 5.0)
    spans = stream.log.spans(["orders"])
    ranges = tuple(Range(part.topic, part.partition, 0, span.end) for part, span in spans.items())
    intent = Intent(
        batch_id="left", group="copy", kind="cut", tasks=(0, 1), ranges=ranges, reason="events", now_micros=0
    )
    stream.coordinator.begin(lease, intent)
    stream.coordinator.release(lease)


class TestHolder:
    """Who is at work."""

    def test_a_live_holder_of_all_is_named_and_a_dead_one_is_not(self, timed: EventStream, clock: Clock) -> None:
        copy.register(timed)
        publish(timed, 3)
        assert look(timed, copy).holder is None
        timed.coordinator.acquire("copy", None, "worker-1", 5.0)
        seen = look(timed, copy)
        assert (seen.reason, seen.holder) == ("3 events pending", "worker-1")
        clock.advance(5)
        assert look(timed, copy).holder is None

    def test_two_holders_are_both_named(self, timed: EventStream) -> None:
        copy.register(timed)
        publish(timed, 3)
        timed.coordinator.acquire("copy", [0], "b", 5.0)
        assert look(timed, copy).holder is None, "task 1 is free: a run could do something"
        timed.coordinator.acquire("copy", [1], "a", 5.0)
        assert look(timed, copy).holder == "a, b"


class TestDigest:
    """What has been done, as a text."""

    def test_it_changes_with_every_commit_seek_and_request(self, timed: EventStream, clock: Clock) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], group="copy")
        def handle(batch: djp.Batch) -> None:
            for record in batch:
                batch.set_deadline(record.data["user"], datetime.fromtimestamp(clock(), timezone.utc) + timedelta(1))

        copy.register(timed)
        publish(timed, 3)
        seen = [digest(timed)]
        for _ in range(2):
            drain(timed, handle)
            timed.seek("copy", "earliest")  # as at first; but what lies between was done
            seen.append(digest(timed))
        drain(timed)
        publish(timed, 1)
        seen.append(digest(timed))
        timed.coordinator.request("copy", "cut", {"until": [["orders", 0, 0]]})
        seen.append(digest(timed))
        djp.run_pending(timed, copy, only_requests=True)
        clock.advance(90_000)
        drain(timed)
        publish(timed, 1)
        seen.append(digest(timed))
        assert len(set(seen)) == len(seen)

    def test_and_with_nothing_else(self, timed: EventStream, clock: Clock) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], group="copy", retry=FAST)
        def broken(batch: djp.Batch) -> None:
            raise djp.TransientError("away")

        copy.register(timed)
        publish(timed, 3)
        with pytest.raises(RetriesExhaustedError):
            drain(timed, broken)
        before = digest(timed)  # a batch is open now
        for _ in range(3):
            with pytest.raises(RetriesExhaustedError):
                drain(timed, broken)
            assert digest(timed) == before, "a run that only failed has done nothing"
        lease = timed.coordinator.acquire("copy", [0], "a", 5.0)
        publish(timed, 4)
        timed.coordinator.heartbeat([lease])
        timed.coordinator.join("copy", "a", 5.0)
        clock.advance(3600)
        timed.coordinator.release(lease)
        assert digest(timed) == before

    def test_a_death_is_something_learnt(self, timed: EventStream) -> None:
        """Runs that die are followed at once: the search for what kills them must not wait for minutes each time."""
        copy.register(timed)
        publish(timed, 3)
        leave_open(timed)
        seen = [digest(timed)]
        for _ in range(2):
            lease = timed.coordinator.acquire("copy", None, "next", 5.0)
            timed.coordinator.resume(lease, "left")
            timed.coordinator.release(lease)
            seen.append(digest(timed))
        assert len(set(seen)) == 3

    def test_it_is_another_in_another_group_and_another_stream(self, timed: EventStream) -> None:
        @consumer(topic=ORDERS)
        def other(batch: djp.Batch) -> None: ...

        publish(timed, 1)
        assert look(timed, copy).digest != look(timed, other).digest
        copy.register(timed), other.register(timed)
        assert look(timed, copy).digest != look(timed, other).digest
        first = look(timed, copy).digest
        with djp.testing.memory_stream() as second:
            copy.register(second)
            publish(second, 1)
            assert look(second, copy).digest != first


class TestOutage:
    """A stream that is away: the tick raises, so that it is seen; and nothing moves."""

    def test_a_stream_that_was_never_there(self, instance: dg.DagsterInstance, tmp_path: Path) -> None:
        away = SqlEventStream(
            url="postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=1",
            payloads=LocalPayloadStore(folder=str(tmp_path)),
        )
        for sensor in all_sensors():
            with pytest.raises(StreamUnavailableError):
                tick(sensor, instance, away)

    def test_a_stream_that_goes_away_and_comes_back(
        self, instance: dg.DagsterInstance, postgres_server: PostgresServer, postgres_url: str, tmp_path: Path
    ) -> None:
        resource = SqlEventStream(url=postgres_url, payloads=LocalPayloadStore(folder=str(tmp_path)))
        stream = resource.open()
        copy.register(stream)
        publish(stream, 3)

        def state() -> Any:
            return stream.positions("copy"), stream.coordinator.tasks("copy"), stream.dead_letters(status=None)

        before = state()
        postgres_server.stop()
        try:
            for sensor in all_sensors():
                with pytest.raises(StreamUnavailableError):
                    tick(sensor, instance, resource)
        finally:
            postgres_server.start()
        assert state() == before
        assert instance.get_runs_count() == 0
        for sensor in all_sensors()[:2]:
            assert len(tick(sensor, instance, resource).run_requests or []) == 1
        stream.close()


def all_sensors() -> list[dg.SensorDefinition]:
    """One of each kind; what they watch has work for each of them."""
    return [
        djp.build_stream_sensor(copy),
        djp.build_batch_sensor(copy, threshold=Threshold(events=2)),
        djp.build_worker_sensor([copy]),
        djp.build_check_sensor(djp.build_stream_checks(copy)),
    ]


def test_a_tick_neither_creates_nor_changes_anything(timed: EventStream) -> None:
    copy.register(timed)
    publish(timed, 3)
    before = (timed.positions("copy"), timed.coordinator.tasks("copy"), timed.topics(internal=True))
    for threshold in (None, Threshold(events=2), Threshold(events=200)):
        look(timed, copy, threshold)
    assert before == (timed.positions("copy"), timed.coordinator.tasks("copy"), timed.topics(internal=True))
    assert len(orders(3)) == 3
    assert COPIES.name in {info.name for info in timed.topics()}
