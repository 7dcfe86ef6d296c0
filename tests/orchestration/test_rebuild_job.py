"""The rebuild job: what its runs do and tell; and how Dagster shows that a state was made by other code."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream
from djp_dagster.orchestration.checks import REBUILT, evaluate
from djp_dagster.orchestration.rebuild_job import ACTIONS
from tests.orchestration.kit import COPIES, ORDERS, copied, copy, publish
from tests.orchestration.test_operator_jobs import error_of, run


class Bonus:
    """A resource of the handler."""

    def __init__(self, value: int) -> None:
        self.value = value


def counting(step: int, code: str, **settings: Any) -> djp.Consumer:
    @djp.consumer(topic=ORDERS, emits=[COPIES], stateful=True, group="counts", code_version=code, **settings)
    def counts(batch: djp.Batch, bonus: Bonus) -> None:
        for record in batch:
            user = record.data["user"]
            batch.state.set(user, batch.state.get(user, 0) + step + bonus.value)
            batch.emit(COPIES.event(n=record.data["n"]))

    return counts


V1, V2 = counting(1, "v1"), counting(10, "v2")


class Site:
    """A stream, and runs of the job."""

    def __init__(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        self.instance, self.resource, self.stream = instance, resource, resource.open()

    def handle(self, consumer: djp.Consumer, count: int = 0, start: int = 0) -> None:
        consumer.register(self.stream)
        publish(self.stream, count, start) if count else None
        djp.run_pending(self.stream, consumer, resources={"bonus": Bonus(0)}, state_folder=self.resource.state_path())

    def do(self, consumer: djp.Consumer, action: str, *, fails: str = "", **more: Any) -> Mapping[str, Any]:
        """What the run has told of the asset; or how it failed."""
        job = djp.build_rebuild_job(consumer, copy_of_orders)
        config = {"group": "counts", "action": action, **more}
        result = job.execute_in_process(
            instance=self.instance,
            resources={"event_stream": self.resource, "bonus": Bonus(0)},
            run_config={"ops": {"rebuild_job_op": {"config": config}}},
            raise_on_error=False,
        )
        observed = [
            event.asset_observation_data.asset_observation for event in result.all_events if event.is_asset_observation
        ]
        if fails:
            assert not result.success
            assert fails in error_of(result)
            assert observed == []
            return {}
        assert result.success, error_of(result)
        (observation,) = observed
        assert (observation.asset_key, observation.description) == (dg.AssetKey("counts"), action)
        return {name: value.value for name, value in observation.metadata.items()}

    def state(self, consumer: djp.Consumer) -> dict[Any, int]:
        with self.stream.view(consumer, folder=self.resource.state_path()) as view:
            return dict(view.items())


@djp.consumer(topic=ORDERS, stateful=True, group="others")
def copy_of_orders(batch: djp.Batch) -> None:
    """Another one of the same job."""


@pytest.fixture
def site(instance: dg.DagsterInstance, resource: SqlEventStream) -> Site:
    return Site(instance, resource)


def test_from_follow_to_rollback(site: Site) -> None:
    site.handle(V1, 21)
    assert site.do(V2, "status") == {"live_code_version": "v1"}
    told = site.do(V2, "follow")
    assert told == {"events": 21, "next_behind": 0, "live_code_version": "v1", "next_code_version": "v2"}
    site.handle(V1, 7, 21)
    assert site.do(V2, "status")["next_behind"] == 7
    assert site.do(V2, "follow", max_lag_events=7)["next_behind"] == 0
    told = dict(site.do(V2, "compare"))
    examples = told.pop("examples")
    assert told == {
        "equal": False,
        "live_keys": 7,
        "next_keys": 7,
        "only_live": 0,
        "only_next": 0,
        "differing": 7,
        "records_behind": 0,
        "next_behind": 0,
        "live_code_version": "v1",
        "next_code_version": "v2",
    }
    rows = {record.data["key"]: record.data for record in examples.records}
    assert rows["'user-0'"] == {"key": "'user-0'", "live": "4", "next": "40"}
    assert site.do(V2, "promote") == {
        "events": 0,
        "previous_behind": 0,
        "live_code_version": "v2",
        "previous_code_version": "v1",
    }
    assert set(site.state(V2).values()) == {40}
    site.handle(V2, 7, 28)
    assert set(site.state(V2).values()) == {50}
    assert site.do(V1, "rollback")["events"] == 7
    assert set(site.state(V1).values()) == {5}
    assert copied(site.stream) == list(range(35))
    assert site.do(V1, "abandon_previous") == {"live_code_version": "v1"}
    site.do(V2, "follow")
    assert site.do(V2, "abandon") == {"live_code_version": "v1"}
    assert [info.name for info in site.stream.groups()] == ["counts"]


def test_mistakes_are_named_and_change_nothing(site: Site) -> None:
    site.do(V2, "follow", fails="consumer group 'counts' does not exist")
    site.handle(V1, 5)
    for action, words in (
        ("compare", "'counts.next' does not exist"),
        ("promote", "'counts.next' does not exist"),
        ("rollback", "nothing has been promoted"),
        ("abandon", "'counts.next' does not exist"),
        ("abandon_previous", "'counts.previous' does not exist"),
        ("rebuild", f"use ['counts', 'others'] and {list(ACTIONS)}"),
    ):
        site.do(V2, action, fails=words)
    site.do(V2, "follow")
    site.do(counting(5, "v3"), "promote", fails="was begun by code v2, and this is v3")
    assert site.do(V2, "status") == {"next_behind": 0, "live_code_version": "v1", "next_code_version": "v2"}


def test_another_group_is_named(instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
    result = run(djp.build_rebuild_job(copy_of_orders), instance, resource, fails=True, group="nobody")
    assert "group='nobody', action='status': use ['others']" in error_of(result)


@pytest.mark.parametrize("consumers", [(), (copy,), (V1, copy)])
def test_it_needs_consumers_with_state(consumers: tuple[djp.Consumer, ...]) -> None:
    with pytest.raises(djp.errors.InvalidSettingError, match="needs stateful consumers"):
        djp.build_rebuild_job(*consumers)


def test_the_launchpad_begins_with_what_changes_nothing() -> None:
    assert djp.build_rebuild_job(V1, name="mine").run_config == {
        "ops": {"mine_op": {"config": {"group": "counts", "action": "status"}}}
    }


class TestMadeByThisCode:
    """The check."""

    @staticmethod
    def verdict(stream: EventStream, consumer: djp.Consumer) -> tuple[bool, str, Mapping[str, Any]]:
        checks = djp.build_stream_checks(consumer, rebuilt=True)
        (spec,) = (one for one in checks.check_specs if one.name == REBUILT)
        return evaluate(stream, spec)

    def test_it_warns_until_the_state_is_rebuilt(self, site: Site) -> None:
        assert self.verdict(site.stream, V1)[0], "nothing has run"
        site.handle(V1, 5)
        assert self.verdict(site.stream, V1)[0]
        site.handle(V2, 5, 5)  # the code was deployed, and goes on with the state as it is
        passed, told, figures = self.verdict(site.stream, V2)
        assert (passed, figures) == (False, {"made_by": "v1", "code_version": "v2"})
        assert "rebuild_job" in told
        site.do(V2, "follow")
        assert not self.verdict(site.stream, V2)[0]
        site.do(V2, "promote")
        assert self.verdict(site.stream, V2)[0]
        site.do(V2, "rollback")
        assert not self.verdict(site.stream, V2)[0]

    def test_dagster_shows_it_as_a_warning(self, site: Site) -> None:
        site.handle(V1, 5)
        checks = djp.build_stream_checks(V2, rebuilt=True)
        result = dg.materialize(
            [checks, dg.AssetSpec("counts")],
            instance=site.instance,
            resources={"event_stream": site.resource},
            selection=dg.AssetSelection.checks(checks),
        )
        (evaluation,) = (one for one in result.get_asset_check_evaluations() if one.check_name == REBUILT)
        assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_dagster_shows_the_asset_of_changed_code_as_stale(site: Site) -> None:
    def defs_of(consumer: djp.Consumer) -> dg.Definitions:
        return dg.Definitions(
            assets=[djp.build_stream_asset(consumer)],
            resources={"event_stream": site.resource, "bonus": dg.ResourceDefinition.hardcoded_resource(Bonus(0))},
        )

    def staleness(consumer: djp.Consumer) -> tuple[StaleStatus, list[str]]:
        graph = defs_of(consumer).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(site.instance, graph, LoadingContextForTest(site.instance))
        key = dg.AssetKey("counts")
        return resolver.get_status(key), [cause.reason for cause in resolver.get_stale_causes(key)]

    V1.register(site.stream)
    publish(site.stream, 5)
    assert defs_of(V1).resolve_implicit_global_asset_job_def().execute_in_process(instance=site.instance).success
    assert staleness(V1) == (StaleStatus.FRESH, [])
    status, causes = staleness(V2)
    assert status is StaleStatus.STALE
    assert causes == ["has a new code version"]
