"""Everything at once: what can be loaded together, what it is called, what it costs to import; and topics as assets."""

import subprocess
import sys
from collections.abc import Iterator

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import SqlEventStream, Threshold, Topic, consumer
from djp_dagster.errors import InvalidSettingError
from tests.orchestration.kit import COPIES, ORDERS, copy

FAR = Topic("far", partitions=3, key="user", retention="7d")


@consumer(topic=COPIES, emits=[FAR], group="onward")
def onward(batch: djp.Batch) -> None: ...


def key(name: str) -> dg.AssetKey:
    return dg.AssetKey(name.split("/"))


class TestTopics:
    """Topics as external assets: lineage from topic to consumer to topic."""

    def test_lineage(self, resource: SqlEventStream) -> None:
        defs = dg.Definitions(
            assets=[
                *djp.build_topic_assets(copy, onward),
                djp.build_stream_asset(copy),
                djp.build_stream_asset(onward),
            ],
            resources={"event_stream": resource},
        )
        graph = defs.resolve_asset_graph()
        parents = {
            "topics/orders": set(),
            "copy": {"topics/orders"},
            "topics/copies": {"copy"},
            "onward": {"topics/copies"},
            "topics/far": {"onward"},
        }
        assert {one.to_user_string() for one in graph.get_all_asset_keys()} == set(parents)
        for name, expected in parents.items():
            assert {one.to_user_string() for one in graph.get(key(name)).parent_keys} == expected, name
        for name in parents:
            assert graph.get(key(name)).is_executable == (not name.startswith("topics/"))

    def test_several_writers_and_a_topic_by_itself(self) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], group="second")
        def second(batch: djp.Batch) -> None: ...

        lonely = Topic("lonely")
        specs = {spec.key.to_user_string(): spec for spec in djp.build_topic_assets(copy, second, lonely)}
        assert set(specs) == {"topics/orders", "topics/copies", "topics/lonely"}
        writers = {dep.asset_key.to_user_string() for dep in specs["topics/copies"].deps}
        assert writers == {"copy", "second"}
        assert list(specs["topics/lonely"].deps) == []

    def test_what_is_said_of_a_topic(self) -> None:
        specs = {spec.key.to_user_string(): spec for spec in djp.build_topic_assets(onward, group_name="flow")}
        far = specs["topics/far"]
        assert far.group_name == "flow"
        assert far.metadata["partitions"] == 3
        assert far.metadata["key"] == "user"
        assert "retention" in far.metadata
        assert "3 partitions by user" in (far.description or "")
        assert far.kinds == {"stream"}
        assert specs["topics/copies"].metadata["key"] == "(event id)"

    def test_only_some_of_them(self) -> None:
        (copies,) = djp.build_topic_assets(copy, only=[COPIES])
        assert (copies.key, [dep.asset_key for dep in copies.deps]) == (key("topics/copies"), [key("copy")])
        with pytest.raises(InvalidSettingError, match="lonely") as caught:
            djp.build_topic_assets(copy, only=[COPIES, Topic("lonely")])
        assert caught.value.facts["value"] == "lonely"

    @pytest.mark.parametrize(
        "other", [Topic("orders", partitions=3, key="user"), Topic("orders", partitions=2, key="id")]
    )
    def test_two_declarations_that_differ_are_refused(self, other: Topic) -> None:
        @consumer(topic=other, group="other")
        def reads(batch: djp.Batch) -> None: ...

        @consumer(topic=COPIES, emits=[other], group="writer")
        def writes(batch: djp.Batch) -> None: ...

        for thing in (other, reads, writes):
            with pytest.raises(InvalidSettingError, match="topic 'orders' is declared twice and differently") as caught:
                djp.build_topic_assets(copy, thing)
            assert caught.value.facts["value"] == "orders"

    def test_two_equal_declarations_are_one(self) -> None:
        again = Topic("orders", partitions=2, key="user")
        assert again is not ORDERS
        assert len(djp.build_topic_assets(copy, again, ORDERS)) == 2

    def test_an_asset_key_of_ones_own_is_followed(self) -> None:
        @consumer(topic=ORDERS, emits=[COPIES], group="named", asset_key=["shop", "named"])
        def named(batch: djp.Batch) -> None: ...

        assert djp.build_stream_asset(named).key == dg.AssetKey(["shop", "named"])
        (copies,) = [spec for spec in djp.build_topic_assets(named) if spec.key == key("topics/copies")]
        assert [dep.asset_key for dep in copies.deps] == [dg.AssetKey(["shop", "named"])]
        assert djp.build_stream_sensor(named).name == "named_sensor"
        assert djp.build_stream_sensor(named).job_name == "shop__named_job"


class TestCodeLinks:
    """A link leads to the handler, or to the mapper, and not to the builder."""

    @staticmethod
    def place_of(asset: dg.AssetsDefinition, name: str) -> tuple[str, int]:
        value = asset.metadata_by_key[key(name)]["dagster/code_references"].value
        (found,) = value.code_references
        return found.file_path, found.line_number

    def test_of_consumers_replays_and_mappers(self) -> None:
        @consumer(topic=ORDERS)
        def handler(batch: djp.Batch) -> dict[str, int]: ...

        first = handler.handler.__code__.co_firstlineno
        days = dg.DailyPartitionsDefinition("2026-11-01")
        mapped = djp.map_reduce_asset(source=djp.TextFiles("*.log"), combine=djp.Sum(), key="mapped")(_map)
        assert self.place_of(djp.build_stream_asset(handler), "handler") == (__file__, first)
        replayed = djp.build_replay_asset(handler, partitions_def=days)
        assert self.place_of(replayed, "handler_replay") == (__file__, first)
        assert self.place_of(mapped, "mapped") == (__file__, _map.__code__.co_firstlineno)

    def test_of_an_asset_with_metadata_of_its_own(self) -> None:
        asset = djp.build_stream_asset(copy, metadata={"wiki": "copies"})
        assert asset.metadata_by_key[key("copy")]["wiki"] == "copies"
        assert self.place_of(asset, "copy")[0].endswith("kit.py")

    def test_a_table_has_none(self) -> None:
        """Its handler is the library's."""
        table = djp.Table("emails", topic=Topic("updates", key="user"), value="email")
        assert "dagster/code_references" not in djp.build_table_asset(table).metadata_by_key[key("emails")]


class TestEventDags:
    """All of a DAG's consumers, with options of all and of single ones."""

    def test_options_of_single_consumers(self) -> None:
        assets = djp.build_event_dag_assets(
            djp.EventDag([copy, onward]),
            group_name="all",
            metadata={"wiki": "dag"},
            per_consumer={"onward": {"group_name": "one", "metadata": {"wiki": "onward"}}},
        )
        specs = {spec.key.to_user_string(): spec for asset in assets for spec in _specs(asset)}
        groups = {name: spec.group_name for name, spec in specs.items()}
        assert groups["onward"] == "one"
        assert {group for name, group in groups.items() if name != "onward"} == {"all"}
        assert (specs["copy"].metadata["wiki"], specs["onward"].metadata["wiki"]) == ("dag", "onward")
        assert all("event_dag" in specs[name].metadata for name in ("copy", "onward"))

    def test_of_a_consumer_that_is_not_in_it(self) -> None:
        with pytest.raises(InvalidSettingError, match="elsewhere"):
            djp.build_event_dag_assets(djp.EventDag([copy]), per_consumer={"elsewhere": {}})


def _map(line: str) -> Iterator[tuple[str, int]]:
    yield line, 1


def _specs(asset: dg.AssetsDefinition | dg.AssetSpec) -> list[dg.AssetSpec]:
    return [asset] if isinstance(asset, dg.AssetSpec) else list(asset.specs)


class TestTogether:
    """What is built for one consumer fits into one `Definitions`."""

    def test_three_drivers_of_one_consumer(self, resource: SqlEventStream) -> None:
        defs = dg.Definitions(
            assets=[djp.build_stream_asset(copy)],
            sensors=[
                djp.build_stream_sensor(copy),
                djp.build_batch_sensor(copy, threshold=Threshold(events=10)),
                djp.build_worker_sensor([copy]),
            ],
            schedules=[djp.build_batch_schedule(copy, cron_schedule="0 3 * * *")],
            resources={"event_stream": resource},
        )
        dg.Definitions.validate_loadable(defs)
        assert {sensor.name for sensor in defs.sensors or []} == {
            "copy_sensor",
            "copy_batch_sensor",
            "worker_sensor",
        }
        assert defs.resolve_job_def("copy_job").executor_def.name == "in_process"
        assert defs.resolve_job_def("worker_job").executor_def.name == "in_process"

    def test_everything_is_off_until_somebody_turns_it_on(self) -> None:
        sensors = [
            djp.build_stream_sensor(copy),
            djp.build_batch_sensor(copy, threshold=Threshold(events=10)),
            djp.build_worker_sensor([copy]),
            djp.build_check_sensor(djp.build_stream_checks(copy)),
        ]
        assert {sensor.default_status for sensor in sensors} == {dg.DefaultSensorStatus.STOPPED}
        schedule = djp.build_batch_schedule(copy, cron_schedule="0 3 * * *")
        assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED

    def test_two_worker_sensors_need_two_names(self, resource: SqlEventStream) -> None:
        defs = dg.Definitions(
            sensors=[djp.build_worker_sensor([copy], name="one"), djp.build_worker_sensor([onward], name="two")],
            resources={"event_stream": resource},
        )
        dg.Definitions.validate_loadable(defs)
        assert {job.name for job in defs.resolve_all_job_defs()} >= {"one_job", "two_job"}

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"consumers": []}, "needs consumers"),
            ({"consumers": [copy, copy]}, "different groups"),
            ({"consumers": [copy], "workers": 0}, "workers=0"),
            ({"consumers": [copy], "workers": True}, "workers=True"),
            ({"consumers": [copy], "lease": "soon"}, "lease"),
            ({"consumers": [copy], "max_runtime": "-1h"}, "max_runtime"),
            ({"consumers": [copy], "name": "a/b"}, "a/b"),
        ],
    )
    def test_a_worker_sensor_that_cannot_be(self, settings: dict[str, object], words: str) -> None:
        with pytest.raises(InvalidSettingError, match=words):
            djp.build_worker_sensor(**settings)  # type: ignore[arg-type]


class TestBuildDefs:
    """`build_defs`, for the first hour."""

    @pytest.mark.parametrize(
        ("mode", "sensors"),
        [
            ("runs", {"copy_sensor", "onward_sensor", "stream_checks_sensor"}),
            ("worker", {"worker_sensor", "stream_checks_sensor"}),
        ],
    )
    def test_both_modes_load(self, resource: SqlEventStream, mode: str, sensors: set[str]) -> None:
        defs = djp.build_defs(copy, onward, stream=resource, mode=mode)  # type: ignore[arg-type]
        dg.Definitions.validate_loadable(defs)
        assert {sensor.name for sensor in defs.sensors or []} == sensors
        assert {sensor.default_status for sensor in defs.sensors or []} == {dg.DefaultSensorStatus.STOPPED}
        assert {job.name for job in defs.resolve_all_job_defs()} >= {"publish_job", "redrive_job", "seek_job"}
        checks = {one.name for one in defs.resolve_asset_graph().asset_check_keys}
        assert checks == {"lag_below", "no_pending_dead_letters"} | ({"worker_alive"} if mode == "worker" else set())

    def test_it_can_be_merged_with_others(self, resource: SqlEventStream) -> None:
        @dg.asset
        def theirs(copy: djp.BatchOutputs) -> None: ...  # type: ignore[type-arg]

        ours = djp.build_defs(copy, stream=resource, executor=None)
        merged = dg.Definitions.merge(ours, dg.Definitions(assets=[theirs], executor=dg.multiprocess_executor))
        dg.Definitions.validate_loadable(merged)

    def test_what_is_wrong_is_named(self) -> None:
        with pytest.raises(InvalidSettingError, match="needs a consumer"):
            djp.build_defs()
        with pytest.raises(InvalidSettingError, match="mode='both'"):
            djp.build_defs(copy, mode="both")  # type: ignore[arg-type]

    def test_the_whole_way_in_process(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        defs = djp.build_defs(copy, onward, stream=resource)
        publish = defs.resolve_job_def("publish_job")
        config = {"ops": {"publish_job_op": {"config": {"topic": "orders", "events": [{"user": "a", "n": 1}]}}}}
        assert publish.execute_in_process(instance=instance, run_config=config).success
        for name in ("copy_job", "onward_job"):
            result = defs.resolve_job_def(name).execute_in_process(instance=instance)
            assert [event.asset_key.to_user_string() for event in result.get_asset_materialization_events()] == [  # type: ignore[union-attr]
                name.removesuffix("_job")
            ]
            assert all(one.passed for one in result.get_asset_check_evaluations())


def test_the_library_is_registered() -> None:
    from dagster_shared.libraries import DagsterLibraryRegistry

    djp.build_defs(copy)
    assert DagsterLibraryRegistry.get()["djp-dagster"] == djp.__version__


def test_importing_the_dagster_layer_loads_nothing_heavy() -> None:
    script = """
import sys
import djp_dagster as djp
from djp_dagster import orchestration
from djp_dagster.orchestration import assets, build, checks, jobs, operator_jobs, outputs, runs, sensors, standing, step
from djp_dagster.orchestration import supervision, ticks, worker_run
from djp_dagster.patterns import batching, streaming
heavy = {"pandas", "pyarrow", "boto3", "botocore", "rich", "psycopg", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
