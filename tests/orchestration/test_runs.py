"""`request_run`: one run at a time, keys that mean the same however often they are asked for, pauses, the dead."""

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream, Threshold, consumer
from djp_dagster.orchestration import runs, standing
from djp_dagster.orchestration.runs import in_flight, request_run
from djp_dagster.orchestration.standing import Suspects
from djp_dagster.orchestration.tags import BATCH_TAG, DIGEST_TAG, GROUP_TAG, REASON_TAG, STREAM_TAG, owner_of
from djp_dagster.orchestration.ticks import look
from djp_dagster.processing.leases import new_owner
from djp_dagster.testing import Clock
from tests.orchestration.kit import (
    FAST,
    ORDERS,
    copied,
    copy,
    later,
    make_run,
    publish,
    status_of,
    tick,
)
from tests.streams.kit import intent_of

Status = dg.DagsterRunStatus


def mine(stream: EventStream, **more: str) -> dict[str, str]:
    """The tags of a run that a sensor asked for some time ago."""
    return {**theirs(stream), DIGEST_TAG: "an older one", **more}


def theirs(stream: EventStream, group: str = "copy") -> dict[str, str]:
    """The tags of a run of somebody's own job that has begun a batch."""
    return {GROUP_TAG: group, STREAM_TAG: stream.incarnation, BATCH_TAG: "b1"}


class Ticks:
    """A sensor's ticks, with its cursor from one to the next."""

    def __init__(self, instance: dg.DagsterInstance, stream: EventStream) -> None:
        self._instance, self._stream = instance, stream
        self.cursor: str | None = None

    def ask(self) -> dg.RunRequest | dg.SkipReason:
        suspects = Suspects(self.cursor)
        found = request_run(self._instance, self._stream, "copy", look(self._stream, copy), suspects)
        self.cursor = suspects.cursor
        return found

    def asked(self) -> dg.RunRequest:
        request = self.ask()
        assert isinstance(request, dg.RunRequest), request
        return request

    def refused(self) -> str:
        reason = self.ask()
        assert isinstance(reason, dg.SkipReason), reason
        assert reason.skip_message is not None
        return reason.skip_message


def asked(instance: dg.DagsterInstance, stream: EventStream) -> dg.RunRequest:
    return Ticks(instance, stream).asked()


def refused(instance: dg.DagsterInstance, stream: EventStream) -> str:
    return Ticks(instance, stream).refused()


def as_requested(instance: dg.DagsterInstance, request: dg.RunRequest, status: Status) -> dg.DagsterRun:
    """The run that was asked for, come so far."""
    assert request.run_key is not None
    return make_run(instance, status, {**request.tags, "dagster/run_key": request.run_key})


@pytest.fixture
def due(timed: EventStream) -> EventStream:
    """Three events are pending for a group that exists."""
    copy.register(timed)
    publish(timed, 3)
    return timed


class TestKeys:
    """A key for what had been done, and the last run that found the same."""

    def test_a_tick_evaluated_again_asks_for_the_same(self, instance: dg.DagsterInstance, due: EventStream) -> None:
        first = asked(instance, due)
        publish(due, 5)
        again = [asked(instance, due) for _ in range(3)]
        assert {request.run_key for request in again} == {first.run_key}
        assert first.tags == {
            GROUP_TAG: "copy",
            STREAM_TAG: due.incarnation,
            DIGEST_TAG: look(due, copy).digest,
            REASON_TAG: "3 events pending",
        }

    def test_progress_makes_it_another(self, instance: dg.DagsterInstance, due: EventStream) -> None:
        keys = []
        for _ in range(3):
            keys.append(asked(instance, due).run_key)
            djp.run_pending(due, copy)
            publish(due, 1)
        assert len(set(keys)) == 3

    def test_a_run_that_changed_nothing_makes_it_another_after_a_pause(
        self, instance: dg.DagsterInstance, due: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = asked(instance, due)
        run = as_requested(instance, first, Status.FAILURE)
        later(monkeypatch, runs, 60)
        second = asked(instance, due)
        assert second.run_key != first.run_key
        assert run.run_id[:8] in (second.run_key or "")
        assert second.tags == first.tags
        assert asked(instance, due).run_key == second.run_key

    @pytest.mark.parametrize("status", [Status.FAILURE, Status.SUCCESS, Status.CANCELED])
    def test_the_pauses_grow(
        self, instance: dg.DagsterInstance, due: EventStream, monkeypatch: pytest.MonkeyPatch, status: Status
    ) -> None:
        keys = set()
        for number, pause_s in enumerate([10, 60, 300, 900, 900, 900, 900], start=1):
            later(monkeypatch, runs, 1e6)
            request = asked(instance, due)
            assert request.run_key not in keys
            keys.add(request.run_key)
            as_requested(instance, request, status)
            for passed_s in (0, pause_s - 5):
                later(monkeypatch, runs, passed_s)
                said = refused(instance, due)
                assert said.startswith(f"3 events pending; {min(number, 5)} runs changed nothing"), said
                left_s = int(said.rsplit(" in ", 1)[1].removesuffix(" s"))
                assert pause_s - passed_s - 4 <= left_s <= pause_s - passed_s
            later(monkeypatch, runs, pause_s)
            assert asked(instance, due).run_key not in keys

    def test_real_runs_of_a_broken_consumer_come_ever_more_rarely(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS, retry=FAST)
        def broken(batch: djp.Batch) -> None:
            raise djp.TransientError("the service is away")

        publish(stream, 3)
        asset, sensor = djp.build_stream_asset(broken), djp.build_stream_sensor(broken)
        started = 0
        for _ in range(4):
            data = tick(sensor, instance, resource)
            for request in data.run_requests or []:
                started += 1
                result = dg.materialize(
                    [asset],
                    instance=instance,
                    resources={"event_stream": resource},
                    tags=request.tags,
                    raise_on_error=False,
                )
                assert not result.success
        assert started <= 2, "the first, and perhaps one more: it has leased, but committed nothing"

    def test_a_run_never_launched_is_asked_for_again_by_the_same_key(
        self, instance: dg.DagsterInstance, due: EventStream
    ) -> None:
        first = asked(instance, due)
        run = as_requested(instance, first, Status.NOT_STARTED)
        assert asked(instance, due).run_key == first.run_key
        assert status_of(instance, run) == Status.NOT_STARTED

    def test_wiping_every_run_changes_nothing_about_what_is_asked_for(
        self, instance: dg.DagsterInstance, due: EventStream
    ) -> None:
        first = asked(instance, due)
        as_requested(instance, first, Status.FAILURE)
        assert "changed nothing" in refused(instance, due)
        for run in instance.get_runs():
            instance.delete_run(run.run_id)
        assert asked(instance, due).run_key == first.run_key


class TestUnderWay:
    """One run at a time, whoever asked for it."""

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (Status.QUEUED, "in the queue"),
            (Status.STARTING, "starting"),
            (Status.STARTED, "starting"),
            (Status.CANCELING, "being canceled"),
        ],
    )
    def test_it_is_named(self, instance: dg.DagsterInstance, due: EventStream, status: Status, words: str) -> None:
        run = make_run(instance, status, mine(due))
        assert refused(instance, due) == f"3 events pending; run {run.run_id[:8]} is {words}"
        assert status_of(instance, run) == status

    @pytest.mark.parametrize("held", [True, False], ids=["holds", "waits"])
    @pytest.mark.parametrize("status", [Status.STARTING, Status.STARTED, Status.CANCELING])
    def test_one_that_shows_signs_of_life_is_at_work(
        self,
        instance: dg.DagsterInstance,
        due: EventStream,
        monkeypatch: pytest.MonkeyPatch,
        status: Status,
        held: bool,
    ) -> None:
        run = make_run(instance, status, theirs(due))
        owner = new_owner(owner_of(run.run_id))
        if held:
            due.coordinator.acquire("copy", [1], owner, 5.0)
        else:
            due.coordinator.join("copy", owner, 5.0, paused=True)
        later(monkeypatch, standing, 1e6)
        assert refused(instance, due) == f"3 events pending; run {run.run_id[:8]} is at work"

    def test_other_groups_other_streams_and_finished_runs_are_none_of_ours(
        self, instance: dg.DagsterInstance, due: EventStream
    ) -> None:
        make_run(instance, Status.STARTED, mine(due, **{GROUP_TAG: "copy2"}))
        make_run(instance, Status.STARTED, mine(due, **{STREAM_TAG: "another"}))
        make_run(instance, Status.STARTED, {})
        for status in runs.FINISHED:
            make_run(instance, status, mine(due))
        asked(instance, due)

    def test_it_is_found_in_a_crowd(
        self, instance: dg.DagsterInstance, due: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "_CROWD", 5)
        run = make_run(instance, Status.STARTED, mine(due))
        for _ in range(8):
            make_run(instance, Status.QUEUED, {})
        found = in_flight(instance, {GROUP_TAG: "copy", STREAM_TAG: due.incarnation})
        assert [record.dagster_run.run_id for record in found] == [run.run_id]
        assert run.run_id[:8] in refused(instance, due)

    @pytest.mark.parametrize("name", ["host-7", f"run-{'0' * 36}-1234"])
    def test_whoever_else_holds_everything_is_named(
        self, instance: dg.DagsterInstance, due: EventStream, name: str
    ) -> None:
        due.coordinator.acquire("copy", None, name, 5.0)
        assert refused(instance, due) == f"3 events pending; {name} is at work"

    @pytest.mark.parametrize("status", [Status.STARTING, Status.STARTED, Status.CANCELING])
    def test_one_of_ours_that_long_shows_no_sign_is_ignored_and_let_be(
        self, instance: dg.DagsterInstance, due: EventStream, monkeypatch: pytest.MonkeyPatch, status: Status
    ) -> None:
        first = asked(instance, due)
        run = as_requested(instance, first, status)
        patience_s = 180 if status == Status.STARTING else 600
        later(monkeypatch, standing, patience_s - 10)
        assert run.run_id[:8] in refused(instance, due)
        later(monkeypatch, standing, patience_s + 10)
        assert asked(instance, due).run_key != first.run_key, "Dagster would take it for the same"
        assert status_of(instance, run) == status

    def test_one_in_the_queue_is_waited_for_however_long(
        self, instance: dg.DagsterInstance, due: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(instance, Status.QUEUED, mine(due))
        later(monkeypatch, standing, 1e6)
        assert run.run_id[:8] in refused(instance, due)

    def test_somebodys_own_job_past_its_batch_is_not_waited_for_and_never_reported(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = make_run(instance, Status.STARTED, theirs(due), job_name="theirs")
        owner = new_owner(owner_of(run.run_id))
        due.coordinator.join("copy", owner, 5.0)
        lease = due.coordinator.acquire("copy", None, owner, 5.0)
        assert "is at work" in refused(instance, due)
        due.coordinator.release(lease)
        due.coordinator.leave("copy", owner)
        asked(instance, due)
        clock.advance(1e6)
        later(monkeypatch, standing, 1e6)
        asked(instance, due)
        assert status_of(instance, run) == Status.STARTED


class TestDead:
    """Runs whose process is gone: it must show twice."""

    @pytest.mark.parametrize("whose", [mine, theirs])
    def test_it_is_fenced_then_reported_and_another_is_asked_for_in_the_same_tick(
        self,
        instance: dg.DagsterInstance,
        due: EventStream,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        whose: Callable[[EventStream], dict[str, str]],
    ) -> None:
        ticks = Ticks(instance, due)
        run = make_run(instance, Status.STARTED, whose(due))
        owner = new_owner(owner_of(run.run_id))
        due.coordinator.join("copy", owner, 5.0)
        lease = due.coordinator.acquire("copy", None, owner, 5.0)
        clock.advance(4.9)
        assert "is at work" in ticks.refused()
        clock.advance(0.1)
        for _ in range(3):
            assert "has not been heard of for longer than a lease" in ticks.refused()
        later(monkeypatch, standing, 3.5)
        assert "has not been heard of" in ticks.refused()
        assert status_of(instance, run) == Status.STARTED
        later(monkeypatch, standing, 4.5)
        ticks.asked()
        assert status_of(instance, run) == Status.FAILURE
        assert all(task.epoch > lease.epochs[task.task] for task in due.coordinator.tasks("copy"))
        assert [task.owner for task in due.coordinator.tasks("copy")] == [None, None]
        with pytest.raises(djp.errors.FencedError):
            due.coordinator.heartbeat([lease])
        failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
        assert "has not been heard of for longer than a lease" in str(failures[-1].dagster_event)

    def test_the_epoch_rises_before_the_run_is_reported(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = Ticks(instance, due)
        run = make_run(instance, Status.STARTED, mine(due))
        lease = due.coordinator.acquire("copy", [1], new_owner(owner_of(run.run_id)), 5.0)
        clock.advance(5)
        epochs: list[int] = []
        report = instance.report_run_failed

        def look_first(*arguments: Any, **options: Any) -> object:
            epochs.append(due.coordinator.tasks("copy")[1].epoch)
            return report(*arguments, **options)

        monkeypatch.setattr(instance, "report_run_failed", look_first)
        ticks.refused()
        later(monkeypatch, standing, 5)
        ticks.asked()
        assert len(epochs) == 1
        assert epochs[0] > lease.epochs[1]

    def test_one_that_is_heard_of_again_is_no_suspect_any_more(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The stream stood still for longer than a lease, twice."""
        ticks = Ticks(instance, due)
        run = make_run(instance, Status.STARTED, mine(due))
        lease = due.coordinator.acquire("copy", None, new_owner(owner_of(run.run_id)), 5.0)
        for passed_s in (0.0, 100.0, 200.0):
            clock.advance(5)
            later(monkeypatch, standing, passed_s)
            assert "has not been heard of" in ticks.refused()
            due.coordinator.heartbeat([lease])
            later(monkeypatch, standing, passed_s + 50)
            assert "is at work" in ticks.refused()
        assert status_of(instance, run) == Status.STARTED

    def test_one_that_was_taken_over_is_dead_too(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = Ticks(instance, due)
        run = make_run(instance, Status.STARTED, mine(due))
        owner = new_owner(owner_of(run.run_id))
        due.coordinator.join("copy", owner, 5.0)
        due.coordinator.acquire("copy", None, owner, 5.0)
        clock.advance(5)
        due.coordinator.acquire("copy", None, "worker-7", 60.0)
        ticks.refused()
        later(monkeypatch, standing, 5)
        assert "worker-7 is at work" in ticks.refused()
        assert status_of(instance, run) == Status.FAILURE

    @pytest.mark.parametrize("garbage", ["", "no json", "[]", '{"a": "b"}', "5", '{"a": null}'])
    def test_a_wiped_cursor_only_delays(
        self,
        instance: dg.DagsterInstance,
        due: EventStream,
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
        garbage: str,
    ) -> None:
        ticks = Ticks(instance, due)
        run = make_run(instance, Status.STARTED, mine(due))
        due.coordinator.acquire("copy", None, new_owner(owner_of(run.run_id)), 5.0)
        clock.advance(5)
        ticks.refused()
        ticks.cursor = garbage
        later(monkeypatch, standing, 5)
        ticks.refused()
        later(monkeypatch, standing, 10)
        ticks.asked()
        assert status_of(instance, run) == Status.FAILURE

    def test_one_of_two_is_dead(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ticks = Ticks(instance, due)
        alive, dead = (make_run(instance, Status.STARTED, mine(due)) for _ in range(2))
        due.coordinator.acquire("copy", None, new_owner(owner_of(dead.run_id)), 5.0)
        clock.advance(5)
        ticks.refused()
        later(monkeypatch, standing, 5)
        assert alive.run_id[:8] in ticks.refused()
        assert status_of(instance, dead) == Status.FAILURE
        assert status_of(instance, alive) == Status.STARTED

    def test_one_that_was_killed_twice_is_followed_at_once_each_time(
        self, instance: dg.DagsterInstance, due: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The search for the record that kills its process must not wait for minutes between two deaths."""
        ticks, keys = Ticks(instance, due), set()
        lease = None
        for number in range(4):
            request = ticks.asked()
            keys.add(request.run_key)
            run = as_requested(instance, request, Status.STARTED)
            lease = due.coordinator.acquire("copy", None, new_owner(owner_of(run.run_id)), 5.0)
            if number == 0:
                due.coordinator.begin(lease, intent_of(due, lease))
            else:
                (intent,) = lease.intents
                due.coordinator.resume(lease, intent.batch_id)
            clock.advance(5)
            later(monkeypatch, standing, 10 * number)
            ticks.refused()
            later(monkeypatch, standing, 10 * number + 5)
        ticks.asked()
        assert len(keys) == 4


class TestSensors:
    """The sensors and the schedule around it."""

    def test_what_a_sensor_asks_for_does_what_is_pending(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        asset, sensor = djp.build_stream_asset(copy), djp.build_stream_sensor(copy)
        assert "nothing was published yet" in (tick(sensor, instance, resource).skip_message or "")
        publish(stream, 20)
        (request,) = tick(sensor, instance, resource).run_requests or []
        dg.materialize([asset], instance=instance, resources={"event_stream": resource}, tags=request.tags)
        assert copied(stream) == list(range(20))
        assert tick(sensor, instance, resource).skip_message == "nothing is pending"

    def test_a_batch_sensor_gives_its_threshold_to_the_run(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        @consumer(topic=ORDERS)
        def piled(batch: djp.Batch) -> int:
            return len(batch)

        threshold = Threshold(bytes="100MB", events=8, age=3600.5, idle="2h")
        sensor, asset = djp.build_batch_sensor(piled, threshold=threshold), djp.build_stream_asset(piled)
        publish(stream, 7)
        assert "waiting for" in (tick(sensor, instance, resource).skip_message or "")
        publish(stream, 13)
        (request,) = tick(sensor, instance, resource).run_requests or []
        defs = dg.Definitions(assets=[asset], sensors=[sensor], resources={"event_stream": resource})
        job = defs.resolve_job_def("piled_job")
        result = job.execute_in_process(run_config=request.run_config, tags=request.tags, instance=instance)
        assert result.success
        assert [output.load() for output in djp.BatchOutputs[int](stream, "piled")] == [8, 8]
        assert stream.pending("piled").events == 4
        assert "waiting for" in (tick(sensor, instance, resource).skip_message or "")

    def test_a_schedule_asks_whenever_something_is_pending(
        self, lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        schedule = djp.build_batch_schedule(copy, cron_schedule="0 3 * * *", run_tags={"tier": "1"})

        def fire() -> tuple[list[dg.RunRequest], str | None]:
            with dg.build_schedule_context(instance=lasting, resources={"event_stream": resource}) as context:
                data = schedule.evaluate_tick(context)
            return list(data.run_requests or []), data.skip_message

        assert "nothing was published yet" in (fire()[1] or "")
        publish(stream, 1)
        ((request,), _) = fire()
        assert request.tags[REASON_TAG] == "first events"
        assert request.tags["tier"] == "1"
        copy.register(stream)
        stream.coordinator.acquire("copy", None, "worker-9", 60.0)
        make_run(lasting, Status.STARTED, mine(stream))
        ((request,), _) = fire()
        assert request.run_key is None, "its run waits for the holder, and does the rest"
