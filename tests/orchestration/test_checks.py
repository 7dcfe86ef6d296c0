"""Checks of a consumer: every verdict, in a run and between runs."""

import json
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream, consumer
from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration import checks as checks_module
from djp_dagster.orchestration.checks import Verdict, evaluate
from djp_dagster.testing import Clock
from tests.orchestration.kit import ORDERS, copy, drain, later, publish, tick
from tests.orchestration.test_ticks import leave_open


@consumer(topic=ORDERS, group="choosy")
def choosy(batch: djp.Batch) -> None:
    for record in batch:
        if record.data["n"] == 1:
            batch.fail(record, "one")


def verdict(stream: EventStream, definition: dg.AssetChecksDefinition, name: str) -> Verdict:
    (spec,) = [spec for spec in definition.check_specs if spec.name == name]
    return evaluate(stream, spec)


def test_the_checks_that_are_asked_for() -> None:
    def names(**settings: Any) -> set[str]:
        return {spec.name for spec in djp.build_stream_checks(copy, **settings).check_specs}

    assert names() == {"no_pending_dead_letters"}
    assert names(max_lag_events=5) == names(max_lag_age="5min") == {"no_pending_dead_letters", "lag_below"}
    assert names(worker=True) == {"no_pending_dead_letters", "worker_alive"}

    @consumer(topic=ORDERS, asset_key=["shop", "copy"])
    def named(batch: djp.Batch) -> None: ...

    checks = djp.build_stream_checks(named, max_lag_age="5min", blocking=True)
    assert {spec.asset_key for spec in checks.check_specs} == {dg.AssetKey(["shop", "copy"])}
    assert all(spec.blocking for spec in checks.check_specs)
    with pytest.raises(InvalidSettingError, match="max_lag_age"):
        djp.build_stream_checks(copy, max_lag_age="soon")


class TestLag:
    """`lag_below`."""

    def test_by_events(self, timed: EventStream) -> None:
        checks = djp.build_stream_checks(copy, max_lag_events=3)
        copy.register(timed)
        publish(timed, 3)
        good = verdict(timed, checks, "lag_below")
        assert good.passed
        publish(timed, 1)
        bad = verdict(timed, checks, "lag_below")
        assert not bad.passed
        assert bad.description == "4 pending, the oldest 0 s old"
        assert bad.metadata["lag_events"].value == 4

    def test_by_age(self, timed: EventStream, clock: Clock) -> None:
        checks = djp.build_stream_checks(copy, max_lag_age="5min")
        copy.register(timed)
        clock.advance(1e6)
        assert verdict(timed, checks, "lag_below").passed, "nothing is pending, however long nothing came"
        publish(timed, 1)
        clock.advance(300)
        assert verdict(timed, checks, "lag_below").passed
        clock.advance(0.01)
        publish(timed, 1)
        bad = verdict(timed, checks, "lag_below")
        assert not bad.passed
        assert bad.metadata["lag_age_seconds"].value == 300.01

    def test_by_both(self, timed: EventStream, clock: Clock) -> None:
        checks = djp.build_stream_checks(copy, max_lag_events=2, max_lag_age="5min")
        copy.register(timed)
        publish(timed, 2)
        assert verdict(timed, checks, "lag_below").passed
        clock.advance(301)
        assert not verdict(timed, checks, "lag_below").passed
        drain(timed)
        publish(timed, 3)
        assert not verdict(timed, checks, "lag_below").passed


class TestDeadLetters:
    """`no_pending_dead_letters`."""

    def test_only_pending_ones_of_this_group_count(self, timed: EventStream) -> None:
        checks = djp.build_stream_checks(choosy)
        choosy.register(timed)
        assert verdict(timed, checks, "no_pending_dead_letters").passed
        publish(timed, 3)
        drain(timed, choosy)
        bad = verdict(timed, checks, "no_pending_dead_letters")
        assert (bad.passed, bad.description) == (False, "1 dead letters are pending")
        assert bad.metadata == {"pending_dead_letters": 1}
        copy.register(timed)
        assert verdict(timed, djp.build_stream_checks(copy), "no_pending_dead_letters").passed
        timed.discard_dead_letters("choosy", [letter.id for letter in timed.dead_letters()])
        assert verdict(timed, checks, "no_pending_dead_letters").passed


class TestWorker:
    """`worker_alive`."""

    CHECKS = djp.build_stream_checks(copy, worker=True, stuck_after="1min")

    def test_none_some_paused_and_gone(self, timed: EventStream, clock: Clock) -> None:
        def say() -> tuple[bool, str]:
            return verdict(timed, self.CHECKS, "worker_alive")[:2]

        copy.register(timed)
        assert say() == (False, "no worker is there")
        timed.coordinator.join("copy", "a", 5.0)
        assert say() == (True, "1 workers are there")
        timed.coordinator.join("copy", "b", 5.0, paused=True)
        assert say() == (True, "1 workers are there")
        figures = verdict(timed, self.CHECKS, "worker_alive").metadata
        assert (figures["workers"], figures["paused_workers"]) == (1, 1)
        timed.coordinator.join("copy", "a", 5.0, paused=True)
        assert say() == (False, "every worker is paused after a failure")
        clock.advance(5)
        assert say() == (False, "no worker is there")

    def test_a_batch_that_takes_too_long(self, timed: EventStream, clock: Clock) -> None:
        copy.register(timed)
        publish(timed, 3)
        lease = timed.coordinator.acquire("copy", None, "a", 5.0)
        from tests.streams.kit import intent_of

        timed.coordinator.begin(lease, intent_of(timed, lease))
        for passed_s, passes in ((0, True), (60, True), (1, False)):
            clock.advance(passed_s)
            timed.coordinator.join("copy", "a", 5.0)
            assert verdict(timed, self.CHECKS, "worker_alive").passed == passes
        bad = verdict(timed, self.CHECKS, "worker_alive")
        assert bad.description == "a batch has been under way for 61 s"
        assert bad.metadata["longest_batch_seconds"] == 61


def test_before_the_group_exists(timed: EventStream) -> None:
    checks = djp.build_stream_checks(copy, max_lag_events=1, worker=True)
    verdicts = {spec.name: evaluate(timed, spec).passed for spec in checks.check_specs}
    assert verdicts == {"no_pending_dead_letters": True, "lag_below": True, "worker_alive": False}


def test_in_a_run_they_are_a_step_after_the_asset(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    checks = djp.build_stream_checks(choosy, max_lag_events=0)
    sensor = djp.build_stream_sensor(choosy)
    defs = dg.Definitions(
        assets=[djp.build_stream_asset(choosy)],
        asset_checks=[checks],
        sensors=[sensor],
        resources={"event_stream": resource},
        executor=dg.in_process_executor,
    )
    publish(stream, 3)
    result = defs.resolve_job_def("choosy_job").execute_in_process(instance=instance)
    assert result.success
    seen = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert {name: one.passed for name, one in seen.items()} == {"no_pending_dead_letters": False, "lag_below": True}
    assert seen["no_pending_dead_letters"].metadata["pending_dead_letters"].value == 1
    steps = [event.step_key for event in result.all_events if event.event_type_value == "STEP_START"]
    assert steps == ["choosy", "choosy_checks"]
    again = defs.resolve_job_def("choosy_job").execute_in_process(instance=instance)
    assert again.success
    assert again.get_asset_check_evaluations() == [], "nothing was materialized, so there is nothing to check"


def test_a_blocking_check_holds_back_what_is_downstream(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    ran: list[str] = []

    @dg.asset(deps=["choosy"])
    def after() -> None:
        ran.append("after")

    checks = djp.build_stream_checks(choosy, blocking=True)
    defs = dg.Definitions(
        assets=[djp.build_stream_asset(choosy), after],
        asset_checks=[checks],
        resources={"event_stream": resource},
        executor=dg.in_process_executor,
    )
    publish(stream, 3)
    job = defs.resolve_implicit_global_asset_job_def()
    assert not job.execute_in_process(instance=instance, raise_on_error=False).success
    assert ran == []
    stream.discard_dead_letters("choosy", [letter.id for letter in stream.dead_letters()])
    publish(stream, 1, start=3)
    assert job.execute_in_process(instance=instance).success
    assert ran == ["after"]


class TestSensor:
    """`build_check_sensor`: what has changed, without a run."""

    @pytest.fixture
    def sensor(self) -> dg.SensorDefinition:
        return djp.build_check_sensor(djp.build_stream_checks(choosy, max_lag_events=2))

    def test_at_a_change_only(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        sensor: dg.SensorDefinition,
    ) -> None:
        cursor: str | None = None

        def reported() -> dict[str, bool]:
            nonlocal cursor
            data = tick(sensor, instance, resource, cursor)
            cursor = data.cursor if data.cursor is not None else cursor
            events = [event for event in data.asset_events if isinstance(event, dg.AssetCheckEvaluation)]
            assert len(events) == len(data.asset_events)
            return {event.check_name: event.passed for event in events}

        choosy.register(stream)
        assert reported() == {"no_pending_dead_letters": True, "lag_below": True}
        assert reported() == {}
        publish(stream, 3)
        assert reported() == {"lag_below": False}
        assert reported() == {}
        drain(stream, choosy)
        assert reported() == {"lag_below": True, "no_pending_dead_letters": False}
        assert reported() == {}
        stream.discard_dead_letters("choosy", [letter.id for letter in stream.dead_letters()])
        assert reported() == {"no_pending_dead_letters": True}

    def test_and_again_after_a_while(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        sensor: dg.SensorDefinition,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        cursor = tick(sensor, instance, resource).cursor
        later(monkeypatch, checks_module, 590)
        assert not tick(sensor, instance, resource, cursor).asset_events
        later(monkeypatch, checks_module, 610)
        assert len(tick(sensor, instance, resource, cursor).asset_events) == 2

    @pytest.mark.parametrize(
        "garbage",
        [
            "",
            "no json",
            "[]",
            "5",
            "null",
            '{"choosy:lag_below": 5}',
            '{"choosy:lag_below": [true]}',
            '{"choosy:lag_below": [true, "long ago"]}',
            '{"choosy:lag_below": null}',
        ],
    )
    def test_a_cursor_that_cannot_be_read_makes_it_say_everything_again(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        sensor: dg.SensorDefinition,
        garbage: str,
    ) -> None:
        data = tick(sensor, instance, resource, garbage)
        assert len(data.asset_events) == 2
        assert data.cursor is not None
        assert set(json.loads(data.cursor)) == {"choosy:lag_below", "choosy:no_pending_dead_letters"}
        assert not tick(sensor, instance, resource, data.cursor).asset_events

    def test_what_it_reports_is_what_the_ui_shows(
        self,
        instance: dg.DagsterInstance,
        resource: SqlEventStream,
        stream: EventStream,
        sensor: dg.SensorDefinition,
    ) -> None:
        publish(stream, 3)
        drain(stream, choosy)
        for event in tick(sensor, instance, resource).asset_events:
            instance.report_runless_asset_event(event)
        key = dg.AssetCheckKey(dg.AssetKey("choosy"), "no_pending_dead_letters")
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=5)
        assert record.status.value == "FAILED"
        assert record.event is not None
        evaluation = record.event.dagster_event.event_specific_data  # type: ignore[union-attr]
        assert evaluation.severity == dg.AssetCheckSeverity.ERROR  # type: ignore[union-attr]
        assert "1 dead letters" in evaluation.description  # type: ignore[union-attr,operator]


def test_an_open_batch_nobody_works_on_is_not_a_worker(timed: EventStream) -> None:
    copy.register(timed)
    publish(timed, 2)
    leave_open(timed)
    assert not verdict(timed, TestWorker.CHECKS, "worker_alive").passed
