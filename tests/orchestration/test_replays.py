"""Replay as assets: partitions, backfills, what is stale as Dagster sees it; the schedule, the sensor, the op."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
import pandas as pd
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.loader import LoadingContextForTest
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.backfill import execute_backfill_iteration

import djp_dagster as djp
from djp_dagster import Batch, Consumer, Event, EventStream, Record, SqlEventStream, Topic, TopicPartition
from djp_dagster.errors import InvalidSettingError, ReplayExpiredError
from djp_dagster.orchestration import replays
from djp_dagster.orchestration.replays import Seen, decode_seen, encode_seen, replayed_by
from djp_dagster.patterns import kappa
from tests.orchestration.daemon_kit import home
from tests.orchestration.kit import records_of

CLICKS = Topic("clicks", partitions=2, key="user")
COPIES = Topic("copies")
SHADOWS = Topic("shadows")
DAY = datetime(2024, 11, 20, tzinfo=timezone.utc)
DAYS = dg.DailyPartitionsDefinition("2024-11-20")
NOW = DAY + timedelta(days=3, hours=2)


@djp.consumer(topic=CLICKS, code_version="1")
def dashboard(batch: Batch) -> pd.DataFrame:
    """Clicks per user."""
    batch.count("events", 99)
    batch.count("pages", 2)
    batch.gauge("failed_records", 0.5)
    return batch.to_pandas().groupby("user").size().reset_index(name="n")


@djp.consumer(topic=CLICKS, emits=[COPIES])
def copy(batch: Batch) -> None:
    for record in batch:
        batch.emit(COPIES.event(of=record.id))


daily = djp.build_replay_asset(dashboard, partitions_def=DAYS)


@dg.asset(partitions_def=DAYS)
def report(dashboard_replay: pd.DataFrame) -> int:
    """What is made of a partition."""
    return int(dashboard_replay["n"].sum())


def click(user: str, at: datetime | None) -> Event:
    return CLICKS.event(user=user) if at is None else CLICKS.event(user=user).replace(time=at)


def publish(stream: EventStream, *moments: datetime) -> None:
    stream.create_topic(CLICKS)
    stream.publish(CLICKS, [click(f"u{number % 5}", at) for number, at in enumerate(moments)])


def fill(stream: EventStream, days: int = 3) -> None:
    """A click an hour."""
    publish(stream, *(DAY + timedelta(hours=hour, minutes=30) for hour in range(24 * days)))


class World:
    """An instance, a folder of values, and the definitions on them."""

    def __init__(self, instance: dg.DagsterInstance, resource: SqlEventStream, folder: Path) -> None:
        self.instance, self.resource = instance, resource
        self.resources = {"event_stream": resource, "io_manager": dg.FilesystemIOManager(base_dir=str(folder))}

    def make(
        self,
        partition: str,
        asset: dg.AssetsDefinition = daily,
        *,
        config: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> dg.ExecuteInProcessResult:
        """Materialize a partition."""
        run_config = None if config is None else {"ops": {asset.node_def.name: {"config": config}}}
        return dg.materialize(
            [asset],
            partition_key=partition,
            instance=self.instance,
            resources=self.resources,
            run_config=run_config,
            **more,
        )

    def definitions(self, *instigators: Any, asset: dg.AssetsDefinition = daily) -> dg.Definitions:
        sensors = [one for one in instigators if isinstance(one, dg.SensorDefinition)]
        schedules = [one for one in instigators if isinstance(one, dg.ScheduleDefinition)]
        made = dg.Definitions(assets=[asset, report], sensors=sensors, schedules=schedules, resources=self.resources)
        dg.Definitions.validate_loadable(made)
        return made

    def statuses(self, partition: str) -> tuple[str, str]:
        """Of the records, and of what was made of them."""
        resolver = CachingStaleStatusResolver(
            self.instance, self.definitions().resolve_asset_graph(), LoadingContextForTest(self.instance)
        )
        keys = [dg.AssetKey("dashboard_replay_window"), dg.AssetKey("dashboard_replay")]
        window, value = (resolver.get_status(key, partition).value for key in keys)
        return window, value

    def due(self, schedule: dg.ScheduleDefinition, now: datetime) -> Sequence[dg.RunRequest]:
        """What a tick of the schedule asks for."""
        defs = self.definitions(schedule)
        context = dg.build_schedule_context(
            instance=self.instance, repository_def=defs.get_repository_def(), scheduled_execution_time=now
        )
        return schedule.evaluate_tick(context).run_requests or []

    def look(self, sensor: dg.SensorDefinition, cursor: str | None = None) -> tuple[list[str], list[str], str]:
        """Which partitions a tick of the sensor asks for, which it marks, and its cursor; the marks are reported."""
        defs, resources = self.definitions(sensor), {"event_stream": self.resource}
        with dg.build_sensor_context(
            instance=self.instance, cursor=cursor, resources=resources, definitions=defs
        ) as context:
            found = sensor.evaluate_tick(context)
        for event in found.asset_events:
            assert isinstance(event, dg.AssetMaterialization)
            self.instance.report_runless_asset_event(event)
        asked = [str(request.partition_key) for request in found.run_requests or []]
        keys = [request.run_key for request in found.run_requests or []]
        assert len(set(keys)) == len(keys)
        assert all(key is not None and len(key) < 60 for key in keys)
        marked = [str(event.partition) for event in found.asset_events]
        return asked, marked, str(found.cursor)


@pytest.fixture
def world(instance: dg.DagsterInstance, resource: SqlEventStream, tmp_path: Path) -> World:
    return World(instance, resource, tmp_path / "values")


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, dict[str, Any]]:
    events = result.get_asset_materialization_events()
    return {
        event.asset_key.to_user_string(): {key: one.value for key, one in event.materialization.metadata.items()}
        for event in events
        if event.asset_key is not None
    }


# The asset


def test_a_partition_and_what_is_made_of_it(world: World, stream: EventStream) -> None:
    fill(stream)
    result = world.make("2024-11-21")
    value = result.output_for_node("dashboard_replay", "value")
    assert value["n"].sum() == 24
    told = metadata(result)
    ends = {f"clicks:{at.partition}": span.end for at, span in stream.log.spans(["clicks"]).items()}
    assert told["dashboard_replay_window"]["events"] == 24
    assert told["dashboard_replay_window"]["as_of"] == ends
    of_value = told["dashboard_replay"]
    assert (of_value["events"], of_value["failed_records"], of_value["pages"]) == (24, 0, 2)
    assert of_value["events_per_second"] > 0
    assert stream.groups() == []

    loaded = dg.materialize(
        [report, daily],
        selection=[report],
        partition_key="2024-11-21",
        instance=world.instance,
        resources=world.resources,
    )
    assert loaded.output_for_node("report") == 24


def test_an_empty_window_is_materialized_without_a_value(world: World, stream: EventStream, tmp_path: Path) -> None:
    fill(stream, days=1)
    result = world.make("2024-11-22")
    assert result.success
    assert metadata(result)["dashboard_replay"]["events"] == 0
    assert not (tmp_path / "values" / "dashboard_replay").exists()
    world.make("2024-11-20")
    assert [path.name for path in (tmp_path / "values" / "dashboard_replay").iterdir()] == ["2024-11-20"]
    assert world.statuses("2024-11-22") == ("FRESH", "FRESH")


def test_a_handler_that_returns_nothing(world: World, stream: EventStream) -> None:
    @djp.consumer(topic=CLICKS)
    def silent(batch: Batch) -> None:
        for _ in batch:
            pass

    fill(stream)
    with pytest.raises(InvalidSettingError, match="returned nothing for 24 events"):
        world.make("2024-11-21", djp.build_replay_asset(silent, partitions_def=DAYS))


def test_as_of_reproduces(world: World, stream: EventStream) -> None:
    fill(stream)
    first = world.make("2024-11-21")
    as_of = metadata(first)["dashboard_replay_window"]["as_of"]
    publish(stream, *[DAY + timedelta(days=1, hours=hour) for hour in range(9)])
    assert metadata(world.make("2024-11-21"))["dashboard_replay_window"]["events"] == 33
    again = world.make("2024-11-21", config={"as_of": as_of})
    values = [one.output_for_node("dashboard_replay", "value") for one in (first, again)]
    pd.testing.assert_frame_equal(*values)
    versions = [
        (event.materialization.tags or {})["dagster/data_version"]
        for one in (first, again)
        for event in one.get_asset_materialization_events()
        if event.asset_key == dg.AssetKey("dashboard_replay_window")
    ]
    assert versions[0] == versions[1]
    with pytest.raises(InvalidSettingError, match="as_of must name each partition"):
        world.make("2024-11-21", config={"as_of": {"clicks:0": 1}})
    with pytest.raises(InvalidSettingError, match="max_events_per_second=0"):
        world.make("2024-11-21", config={"max_events_per_second": 0})


def test_days_of_25_hours_and_the_hour_that_comes_twice(world: World, stream: EventStream) -> None:
    zone = "Europe/Berlin"
    publish(stream, *(datetime(2024, 10, 26, 20, 30, tzinfo=timezone.utc) + timedelta(hours=one) for one in range(30)))
    for definition, sizes in (
        (dg.DailyPartitionsDefinition("2024-10-26", timezone=zone), {"2024-10-27": 25}),
        (
            dg.HourlyPartitionsDefinition("2024-10-26-00:00", timezone=zone),
            {"2024-10-27-01:00": 1, "2024-10-27-02:00": 1, "2024-10-27-02:00+0100": 1},
        ),
        (dg.WeeklyPartitionsDefinition("2024-10-20", timezone=zone), {"2024-10-20": 2, "2024-10-27": 28}),
        (dg.MonthlyPartitionsDefinition("2024-10-01", timezone=zone), {"2024-10-01": 30}),
    ):
        asset = djp.build_replay_asset(dashboard, partitions_def=definition, name=f"by_{len(sizes)}")
        for partition, events in sizes.items():
            told = metadata(world.make(partition, asset))
            assert told[f"by_{len(sizes)}"]["events"] == events, partition


def test_an_expired_window_fails_before_anything_is_read(world: World, stream: EventStream) -> None:
    topic = Topic("clicks", partitions=2, key="user", retention="1s", retention_cap="1s")
    fill(stream)
    stream.create_topic(topic)
    now = stream.log.now_micros()
    assert stream.log.trim(now + 10_000_000)
    called: list[int] = []

    @djp.consumer(topic=topic)
    def never(batch: Batch) -> int:
        called.append(1)
        return 0

    with pytest.raises(ReplayExpiredError, match="retention has removed all of it"):
        world.make("2024-11-21", djp.build_replay_asset(never, partitions_def=DAYS))
    assert not called


def test_shadow_topics_tables_and_resources(world: World, stream: EventStream) -> None:
    names = Topic("names", key="user")
    known = djp.Table("known", topic=names, value="name")

    @djp.consumer(topic=CLICKS, emits=[COPIES], tables=[known], isolate="per_event")
    def greet(record: Record, batch: Batch, greeting: dg.ResourceParam[str]) -> None:
        name = batch.table(known).get(record.data["user"])
        batch.emit(COPIES.event(text=f"{greeting}, {name}"))

    known.register(stream)
    stream.publish(names, [names.event(user="u1", name="Ada")])
    djp.run_pending(stream, known, wait=0, state_folder=world.resource.state_path())
    publish(stream, *[DAY] * 2)
    asset = djp.build_replay_asset(greet, partitions_def=DAYS, emit_to={COPIES: SHADOWS})
    world.resources["greeting"] = dg.ResourceDefinition.hardcoded_resource("Hello")  # type: ignore[assignment]
    told = metadata(world.make("2024-11-20", asset))
    assert (told["greet_replay"]["emitted_to_shadow"], told["greet_replay"]["events"]) == (2, 2)
    assert sorted(one.data["text"] for one in records_of(stream, SHADOWS)) == ["Hello, Ada", "Hello, None"]
    assert records_of(stream, COPIES) == []
    graph = dg.Definitions(assets=[asset], resources=world.resources).resolve_asset_graph()
    assert graph.get(dg.AssetKey("greet_replay")).parent_keys == {
        dg.AssetKey("greet_replay_window"),
        dg.AssetKey("known"),
    }


def test_what_no_asset_is_made_of() -> None:
    @djp.consumer(topic=CLICKS, stateful=True)
    def keeps(batch: Batch) -> None: ...

    @djp.consumer(topic=CLICKS, emits=[COPIES], isolate="per_event")
    def each(record: Record) -> None: ...

    wrong: list[tuple[Consumer, Any, dict[str, Any], str]] = [
        (keeps, DAYS, {}, "keeps state"),
        (each, DAYS, {}, "can only emit"),
        (dashboard, dg.StaticPartitionsDefinition(["a"]), {}, "must be windows of time"),
        (copy, DAYS, {"emit_to": {COPIES: COPIES}}, "where live events are"),
        (copy, DAYS, {"lateness": "soon"}, "lateness"),
    ]
    for which, partitions, more, told in wrong:
        with pytest.raises(InvalidSettingError, match=told):
            djp.build_replay_asset(which, partitions_def=partitions, **more)
    with pytest.raises(InvalidSettingError, match="keeps state"):
        djp.replay_op(keeps)
    for build in (djp.build_replay_schedule, djp.build_replay_sensor):
        with pytest.raises(InvalidSettingError, match="was not made by build_replay_asset"):
            build(report)


def test_what_was_built_is_forgotten_with_its_asset() -> None:
    def build() -> None:
        for number in range(8):
            asset = djp.build_replay_asset(dashboard, partitions_def=DAYS, name=f"forgotten_{number}")
            djp.build_replay_schedule(asset)

    gc.collect()
    before = len(replays._replayed), len(kappa._jobs)
    build()
    gc.collect()  # Dagster itself keeps the last one
    assert len(replays._replayed) - before[0] <= 1
    assert len(kappa._jobs) - before[1] <= 1


# A backfill, by the daemon's own loop

_DEFINITIONS = """
import dagster as dg
import djp_dagster as djp
from tests.orchestration.test_replays import daily, report

defs = dg.Definitions(
    assets=[daily, report],
    executor=dg.in_process_executor,
    resources={{
        "event_stream": djp.SqlEventStream(url={url!r}, state_folder={state!r}),
        "io_manager": dg.FilesystemIOManager(base_dir={values!r}),
    }},
)
"""


@pytest.fixture
def daemon(tmp_path: Path, resource: SqlEventStream) -> Iterator[tuple[dg.DagsterInstance, Any]]:
    """An instance that does its runs at once, and the daemon's view of the definitions."""
    file = tmp_path / f"replays_{uuid4().hex}.py"
    file.write_text(
        _DEFINITIONS.format(url=resource.url, state=str(tmp_path / "state"), values=str(tmp_path / "values"))
    )
    target = LoadableTargetOrigin(
        executable_path=sys.executable, python_file=str(file), working_directory=str(Path.cwd())
    )
    location = InProcessWorkspaceLoadTarget(InProcessCodeLocationOrigin(target, location_name="shop"))
    with home(tmp_path / "home") as made, create_test_daemon_workspace_context(location, made) as workspace:
        yield made, workspace


def test_a_backfill_is_the_replay(daemon: tuple[dg.DagsterInstance, Any], stream: EventStream, tmp_path: Path) -> None:
    instance, workspace = daemon
    publish(stream, *(DAY + timedelta(hours=hour) for hour in (1, 2, 3, 50, 51, 80)))  # nothing on the second day
    keys = [f"2024-11-2{day}" for day in range(4)]
    backfill = PartitionBackfill.from_asset_partitions(
        backfill_id="replays",
        asset_graph=workspace.create_request_context().asset_graph,
        partition_names=keys,
        asset_selection=[dg.AssetKey("dashboard_replay_window"), dg.AssetKey("dashboard_replay")],
        backfill_timestamp=datetime.now(timezone.utc).timestamp(),
        tags={},
        dynamic_partitions_store=instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )
    instance.add_backfill(backfill)
    for look in range(20):
        found = instance.get_backfill("replays")
        if found is not None and found.status == BulkActionStatus.COMPLETED_SUCCESS:
            break
        assert look < 19, found
        for error in execute_backfill_iteration(workspace, logging.getLogger("djp-test")):
            assert error is None, error.to_string()
    assert instance.get_materialized_partitions(dg.AssetKey("dashboard_replay")) == set(keys)
    values = {path.name: pd.read_pickle(path) for path in (tmp_path / "values" / "dashboard_replay").iterdir()}
    assert {key: value["n"].sum() for key, value in values.items()} == {keys[0]: 3, keys[2]: 2, keys[3]: 1}


# The schedule

schedule = djp.build_replay_schedule(daily)


def partitions_of(requests: Sequence[dg.RunRequest]) -> list[str]:
    return [str(request.partition_key) for request in requests]


def test_the_schedule_asks_for_closed_windows_the_oldest_first(
    lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, tmp_path: Path
) -> None:
    world = World(lasting, resource, tmp_path / "values")
    fill(stream)
    assert world.due(schedule, DAY + timedelta(hours=24, minutes=59)) == []
    asked = world.due(schedule, DAY + timedelta(hours=25))
    assert partitions_of(asked) == ["2024-11-20"]
    assert [request.run_key for request in asked] == ["dashboard_replay/2024-11-20"]
    assert partitions_of(world.due(schedule, NOW)) == ["2024-11-20", "2024-11-21", "2024-11-22"]
    world.make("2024-11-21")
    assert partitions_of(world.due(schedule, NOW)) == ["2024-11-20", "2024-11-22"]
    two = djp.build_replay_schedule(daily, most=2, name="two")
    assert partitions_of(world.due(two, NOW)) == ["2024-11-22"]
    world.make("2024-11-20")
    world.make("2024-11-22")
    assert world.due(schedule, NOW) == []


def test_a_window_made_before_it_was_closed_is_due_when_it_is(world: World, stream: EventStream) -> None:
    now = datetime.now(timezone.utc)
    today = dg.DailyPartitionsDefinition(f"{now:%Y-%m-%d}", end_offset=2)
    asset = djp.build_replay_asset(dashboard, partitions_def=today, lateness="2h")
    publish(stream, now)
    world.make(f"{now:%Y-%m-%d}", asset)
    tomorrow = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    replayed = replayed_by(asset)
    assert replayed.due(world.instance, tomorrow + timedelta(hours=1), 5) == []
    assert replayed.due(world.instance, tomorrow + timedelta(hours=2), 5) == [f"{now:%Y-%m-%d}"]


@pytest.mark.parametrize(
    ("partitions", "now", "due"),
    [
        (dg.DailyPartitionsDefinition("2024-11-20", end_date="2024-11-22"), NOW, ["2024-11-20", "2024-11-21"]),
        (dg.DailyPartitionsDefinition("2024-11-20", end_offset=-1), NOW, ["2024-11-20", "2024-11-21"]),
        (dg.DailyPartitionsDefinition("2024-11-20", end_offset=1), NOW, ["2024-11-20", "2024-11-21", "2024-11-22"]),
        (DAYS, DAY, []),
        (DAYS, DAY - timedelta(days=9), []),
        (
            dg.HourlyPartitionsDefinition("2024-10-27-00:00", timezone="Europe/Berlin"),
            datetime(2024, 10, 27, 3, tzinfo=timezone.utc),
            ["2024-10-27-00:00", "2024-10-27-01:00", "2024-10-27-02:00", "2024-10-27-02:00+0100"],
        ),
        (
            dg.DailyPartitionsDefinition("2024-10-26", timezone="Europe/Berlin"),
            datetime(2024, 10, 28, tzinfo=timezone.utc),
            ["2024-10-26", "2024-10-27"],
        ),
        (
            dg.DailyPartitionsDefinition("2024-10-26", timezone="Europe/Berlin"),
            datetime(2024, 10, 27, 23, 59, tzinfo=timezone.utc),
            ["2024-10-26"],
        ),
        (
            dg.MonthlyPartitionsDefinition("2024-09-01", timezone="Europe/Berlin"),
            datetime(2024, 11, 1, 1, tzinfo=timezone.utc),
            ["2024-09-01", "2024-10-01"],
        ),
    ],
)
def test_windows_that_are_due(
    instance: dg.DagsterInstance, partitions: dg.TimeWindowPartitionsDefinition, now: datetime, due: list[str]
) -> None:
    asset = djp.build_replay_asset(dashboard, partitions_def=partitions, lateness="1h")
    assert replayed_by(asset).due(instance, now, 7) == due


# The sensor

sensor = djp.build_replay_sensor(daily)
marking = djp.build_replay_sensor(daily, replay_stale=False, name="marking")


def test_events_that_come_late_make_a_partition_stale(world: World, stream: EventStream) -> None:
    fill(stream)
    assert world.look(sensor)[:2] == ([], [])  # what was never made is not stale
    world.make("2024-11-20")
    world.make("2024-11-21")
    asked, marked, cursor = world.look(sensor)
    assert (asked, marked) == ([], [])
    assert world.statuses("2024-11-20") == ("FRESH", "FRESH")

    publish(stream, *[DAY + timedelta(hours=hour) for hour in (0, 23, 50)])  # of the 22nd, which was never made
    assert world.statuses("2024-11-20") == ("FRESH", "FRESH")
    asked, marked, cursor = world.look(sensor, cursor)
    assert (asked, marked) == (["2024-11-20"], ["2024-11-20"])
    assert world.statuses("2024-11-20") == ("FRESH", "STALE")
    assert world.statuses("2024-11-21") == ("FRESH", "FRESH")

    asked, marked, cursor = world.look(sensor, cursor)  # asked once
    assert (asked, marked) == ([], [])
    publish(stream, DAY)  # again for what came later still, though marked already
    asked, marked, cursor = world.look(sensor, cursor)
    assert (asked, marked) == (["2024-11-20"], [])

    assert metadata(world.make("2024-11-20"))["dashboard_replay"]["events"] == 27
    assert world.statuses("2024-11-20") == ("FRESH", "FRESH")
    assert world.look(sensor, cursor)[:2] == ([], [])


@pytest.mark.parametrize("cursor", [None, "", "garbage", '{"ends": {"x": 1}}', '{"clicks:0": 5}', '{"ends": {}}', "[]"])
def test_a_lost_cursor(world: World, stream: EventStream, cursor: str | None) -> None:
    fill(stream)
    world.make("2024-11-20")
    publish(stream, DAY)
    asked, marked, _ = world.look(sensor, cursor)
    assert (asked, marked) == (["2024-11-20"], ["2024-11-20"])


def test_a_cursor_beyond_the_stream(world: World, stream: EventStream) -> None:
    fill(stream)
    world.make("2024-11-20")
    far = encode_seen(Seen({TopicPartition("clicks", 0): 10**9, TopicPartition("clicks", 1): 10**9}))
    asked, marked, cursor = world.look(sensor, far)
    assert (asked, marked) == ([], [])
    assert decode_seen(cursor).ends == {at: span.end for at, span in stream.log.spans(["clicks"]).items()}


def test_marks_without_replays(world: World, stream: EventStream) -> None:
    fill(stream)
    world.make("2024-11-20")
    _, _, cursor = world.look(marking)
    for number in range(15):
        publish(stream, DAY + timedelta(hours=1))
        asked, marked, cursor = world.look(marking, cursor)
        assert (asked, marked) == ([], [] if number else ["2024-11-20"])
    assert world.statuses("2024-11-20") == ("FRESH", "STALE")


def test_a_replay_that_was_under_way_when_the_sensor_looked(world: World, stream: EventStream) -> None:
    """Its events are as of before the look, its materialization after it: nobody else would find what came between."""
    fill(stream)
    cursors: list[str] = []

    @djp.consumer(topic=CLICKS, group="dashboard")
    def slow(batch: Batch) -> int:
        publish(stream, DAY)
        cursors.append(world.look(marking)[2])
        return len(batch)

    world.make("2024-11-20", djp.build_replay_asset(slow, partitions_def=DAYS))
    asked, marked, cursor = world.look(sensor, cursors[0])
    assert (asked, marked) == (["2024-11-20"], ["2024-11-20"])
    assert world.look(sensor, cursor)[:2] == ([], [])


def test_a_window_that_is_not_closed_is_marked_and_left_to_the_schedule(
    world: World, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return DAY + timedelta(days=1, hours=12)

    monkeypatch.setattr(kappa, "datetime", Then)
    fill(stream, days=1)
    world.make("2024-11-20")
    world.make("2024-11-21")
    _, _, cursor = world.look(sensor)
    publish(stream, DAY, DAY + timedelta(days=1, hours=11))
    asked, marked, _ = world.look(sensor, cursor)
    assert (asked, marked) == (["2024-11-20"], ["2024-11-20", "2024-11-21"])


def test_a_long_look_is_taken_in_pieces(world: World, stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "_MOST_RECORDS", 10)
    fill(stream, days=1)
    world.make("2024-11-20")
    publish(stream, *[DAY + timedelta(hours=1)] * 25)
    cursor, looks, asked_at = "", 0, []
    ends = {at: span.end for at, span in stream.log.spans(["clicks"]).items()}
    while decode_seen(cursor).ends != ends:
        asked, _, cursor = world.look(sensor, cursor)
        looks += 1
        asked_at += asked
        assert looks < 20
    assert looks == 5  # 49 records, ten at a time
    assert set(asked_at) == {"2024-11-20"}


def test_records_that_are_no_events_do_not_stop_the_sensor(world: World, stream: EventStream) -> None:
    from djp_dagster.streams.records import EncodedBatch

    fill(stream)
    world.make("2024-11-20")
    _, _, cursor = world.look(sensor)
    stream.log.append([EncodedBatch("clicks", 0, 1, b"\x91\x01", min_event_micros=0, max_event_micros=1 << 60)])
    publish(stream, DAY, DAY - timedelta(days=9))
    assert world.look(sensor, cursor)[:2] == (["2024-11-20"], ["2024-11-20"])


def test_several_topics(world: World, stream: EventStream) -> None:
    others = Topic("others", key="user")

    @djp.consumer(topics=[CLICKS, others], group="dashboard")
    def both(batch: Batch) -> int:
        return len(list(batch))

    asset = djp.build_replay_asset(both, partitions_def=DAYS)
    looking = djp.build_replay_sensor(asset)
    fill(stream)
    assert metadata(world.make("2024-11-20", asset))["dashboard_replay"]["events"] == 24
    _, _, cursor = world.look(looking)
    stream.publish(others, [others.event(user="u").replace(time=DAY)])
    assert world.look(looking, cursor)[:2] == (["2024-11-20"], ["2024-11-20"])
    assert metadata(world.make("2024-11-20", asset))["dashboard_replay"]["events"] == 25


def test_by_append_time_nothing_comes_late(world: World, stream: EventStream) -> None:
    asset = djp.build_replay_asset(dashboard, partitions_def=DAYS, by="append_time")
    fill(stream)
    world.make("2024-11-20", asset)
    publish(stream, DAY)
    asked, marked, _ = world.look(djp.build_replay_sensor(asset))
    assert (asked, marked) == ([], [])


# The op


def replayed(resource: SqlEventStream, which: Consumer = dashboard, **config: Any) -> Any:
    op = djp.replay_op(which)

    @dg.job(resource_defs={"event_stream": resource})
    def replaying() -> None:
        op()

    result = replaying.execute_in_process(run_config={"ops": {op.name: {"config": config}}})
    return result.output_for_node(op.name)


def test_the_op(resource: SqlEventStream, stream: EventStream) -> None:
    @djp.consumer(topic=CLICKS)
    def size(batch: Batch) -> int:
        return len(list(batch))

    assert replayed(resource, size) is None  # the topic is made, and there is nothing
    fill(stream)
    start, end = "2024-11-20T00:00Z", "2024-11-21T01:00:00+01:00"
    assert replayed(resource, size) == 72
    assert replayed(resource, size, start=start, end=end) == 24
    assert replayed(resource, size, start=start, end=end, by="append_time") is None
    assert replayed(resource, size, start=start, end=end, keys=["u1"]) == 5
    first = next(stream.records("clicks", 0))
    assert replayed(resource, size, ids=[first.id]) == 1
    assert replayed(resource, size, ranges={"clicks:0": [0, 7], "clicks:1": [3, 4]}) == 8
    assert replayed(resource, size, ranges={"clicks:0": [0, 7]}, ids=[first.id, "other"]) == 1


def test_the_op_knows_keys_that_are_numbers(resource: SqlEventStream, stream: EventStream) -> None:
    numbers = Topic("numbers", key="n")

    @djp.consumer(topic=numbers)
    def values(batch: Batch) -> list[int | str]:
        return [record.data["n"] for record in batch]

    stream.create_topic(numbers)
    stream.publish(numbers, [numbers.event(n=one) for one in (42, "42", 43, -1, "x")])
    assert replayed(resource, values, keys=["42", "-1"]) == [42, "42", -1]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"start": "2024-11-20T00:00Z"}, "give start and end"),
        ({"end": "2024-11-20T00:00Z"}, "give start and end"),
        ({"start": "2024-11-20T00:00Z", "end": "2024-11-21T00:00Z", "by": "time"}, "give start and end"),
        ({"start": "2024-11-20T00:00Z", "end": "2024-11-21T00:00Z", "ranges": {"clicks:0": [0, 1]}}, "or ranges"),
        ({"start": "2024-11-20T00:00", "end": "2024-11-21T00:00"}, "needs a time zone"),
        ({"start": "2024-11-21T00:00Z", "end": "2024-11-20T00:00Z"}, "must end after it begins"),
        ({"start": "yesterday", "end": "2024-11-21T00:00Z"}, "'yesterday' is no moment"),
        ({"ranges": {"clicks": [0, 1]}}, "must be a partition"),
        ({"ranges": {"clicks:0": [0]}}, "must be two offsets"),
        ({"ranges": {"clicks:0": [0, 10**6]}}, "it holds 0 to"),
        ({"ranges": {"clicks:9": [0, 1]}}, "it holds nothing"),
    ],
)
def test_configs_of_the_op_that_are_wrong(
    resource: SqlEventStream, stream: EventStream, config: dict[str, Any], told: str
) -> None:
    fill(stream)
    with pytest.raises(InvalidSettingError, match=told):
        replayed(resource, **config)
