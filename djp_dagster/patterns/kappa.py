"""Kappa: one stream serves the live consumer and its replay; one handler, two speeds.

`build_replay_asset` makes a time-partitioned asset of a consumer: a partition is the handler's return value for all
that happened in a window of time, and a backfill of partitions *is* the replay. It moves no offset; what the handler
emits is dropped, or goes to a shadow topic; ``batch.is_replay`` tells it so. Upstream of it is an asset that stands for
the records of each window: events that come late give it another data version, so that Dagster shows what was made of
them as stale.

State belongs to the whole of a stream: a stateful consumer is rebuilt beside the live one, and promoted.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from weakref import WeakKeyDictionary

import dagster as dg
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.replays import (
    ReplayConfig,
    Replayed,
    decode_ends,
    encode_ends,
    find_stale,
    mark_stale,
    remember,
    replayed_by,
    value_metadata,
    version_of,
    window_metadata,
)
from djp_dagster.orchestration.step import stream_of
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key, identifier, topic_key
from djp_dagster.processing.consumer import Consumer
from djp_dagster.replaying.plan import TimeOf, plan_ranges, plan_window
from djp_dagster.replaying.replay import replay
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.model import Range
from djp_dagster.streams.topics import Topic
from djp_dagster.units import Duration, parse_seconds


class ReplayOpConfig(dg.Config):
    """Which records an op replays: offsets, or a window of time; of them only some keys or ids."""

    ranges: dict[str, list[int]] = Field(
        default={}, description='Offsets by partition, from and to (not included): {"clicks:0": [0, 1200]}.'
    )
    start: str | None = Field(default=None, description="Or a window of time, from this moment on, with a zone.")
    end: str | None = Field(default=None, description="To this moment, not included.")
    by: str = Field(default="event_time", description="event_time or append_time.")
    keys: list[str] = Field(default=[], description="Only records of these keys.")
    ids: list[str] = Field(default=[], description="Only events of these ids.")
    max_events_per_second: float | None = Field(default=None, description="So that live consumers stay quick.")


def build_replay_asset(
    consumer: Consumer,
    *,
    partitions_def: dg.TimeWindowPartitionsDefinition,
    by: TimeOf = "event_time",
    lateness: Duration = "1h",
    emit_to: Mapping[Topic, Topic] | None = None,
    max_events_per_second: float | None = None,
    name: str | None = None,
    group_name: str | None = None,
    owners: Sequence[str] | None = None,
    description: str | None = None,
    tags: Mapping[str, str] | None = None,
    automation_condition: "dg.AutomationCondition[Any] | None" = None,
    io_manager_key: str | None = None,
) -> dg.AssetsDefinition:
    """The consumer's replay as an asset, partitioned by time: the same handler, on what happened in each window.

    A partition is one batch, read piece by piece, in bounded memory; what the handler returns is the asset's value.
    Windows may be hours to months, in any time zone. A window that retention has begun to remove fails at once.
    Materialized with it is ``<name>_window``, which stands for the records: how many, and as of which offsets; the run
    config ``as_of`` reproduces a replay exactly.

    Args:
        consumer: whose handler; without state.
        partitions_def: the windows.
        by: ``"event_time"``, when events say they happened; or ``"append_time"``, when they came.
        lateness: how long after its end a window is left to be completed, by `build_replay_schedule`. Events that come
            after a partition was made mark it stale, by `build_replay_sensor`.
        emit_to: shadow topics, each for a topic the consumer emits to; it then has no value. Other emits are dropped.
        max_events_per_second: so that a replay does not keep live consumers from the disk.
        name: of the asset; ``<consumer>_replay`` unless given.
        group_name: as of ``dg.asset``.
        owners: as of ``dg.asset``.
        description: as of ``dg.asset``; the handler's docstring unless given.
        tags: as of ``dg.asset``.
        automation_condition: as of ``dg.asset``.
        io_manager_key: what stores the value; ``io_manager`` unless given.

    Raises:
        InvalidSettingError: the consumer keeps state, or the windows are none of time.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.consumer(topic=djp.Topic("clicks"))
        ... def dashboard(batch):
        ...     return batch.to_pandas().groupby("page").size().reset_index()
        >>> daily = build_replay_asset(dashboard, partitions_def=dg.DailyPartitionsDefinition("2026-11-01"))
        >>> sorted(key.to_user_string() for key in daily.keys)
        ['dashboard_replay', 'dashboard_replay_window']
    """
    if consumer.stateful:
        raise InvalidSettingError(
            f"consumer {consumer.group!r} keeps state, which belongs to the whole of its stream; rebuild it instead: "
            "build_rebuild_job",
            setting="consumer",
            value=consumer.group,
        )
    if not isinstance(partitions_def, dg.TimeWindowPartitionsDefinition):
        raise InvalidSettingError(
            f"partitions_def must be windows of time, e.g. daily ones, not {type(partitions_def).__name__}",
            setting="partitions_def",
            value=type(partitions_def).__name__,
        )
    key = dg.AssetKey(name or f"{consumer.group}_replay")
    window_key = dg.AssetKey([*key.path[:-1], f"{key.path[-1]}_window"])
    replayed = Replayed(consumer, key, window_key, partitions_def, by, parse_seconds(lateness, name="lateness"))
    nothing: dict[str, Any] = {} if emit_to is None else {"dagster_type": dg.Nothing}
    common: dict[str, Any] = {"owners": owners, "tags": tags}
    outs = {
        "window": dg.AssetOut(
            key=window_key,
            dagster_type=dg.Nothing,
            description=f"The records of {', '.join(replayed.topics)} in each window.",
            kinds={"stream"},
            code_version="1",
            **common,
        ),
        "value": dg.AssetOut(
            key=key,
            description=description or consumer.__doc__,
            kinds={"python"},
            code_version=consumer.code_version,
            automation_condition=automation_condition,
            io_manager_key=io_manager_key,
            **nothing,
            **common,
        ),
    }

    @dg.multi_asset(
        name=key.to_python_identifier(),
        outs=outs,
        deps=[
            *(topic_key(topic) for topic in consumer.topics),
            *(consumer_key(table) for table in consumer.tables),
        ],
        internal_asset_deps={"window": {topic_key(topic) for topic in consumer.topics}, "value": {window_key}},
        partitions_def=partitions_def,
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        group_name=group_name,
    )
    def replay_window(context: dg.AssetExecutionContext, config: ReplayConfig) -> Iterator[dg.MaterializeResult[Any]]:
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        stream = resource.open()
        for topic in consumer.topics:
            stream.create_topic(topic)
        window = context.partition_time_window
        plan = plan_window(stream.log, replayed.topics, window.start, window.end, by=by, as_of=config.ends())
        done = replay(
            stream,
            consumer,
            plan,
            emit_to=emit_to,
            resources={one: getattr(context.resources, one) for one in consumer.resource_names},
            max_events_per_second=config.max_events_per_second or max_events_per_second,
            state_folder=resource.state_path(),
        )
        if done.value is None and emit_to is None:
            raise InvalidSettingError(
                f"the handler of {consumer.group!r} returns nothing, and its replay emits nowhere: return a value, or "
                "name a shadow topic: build_replay_asset(emit_to={topic: shadow})",
                setting="emit_to",
                value=None,
            )
        yield dg.MaterializeResult(
            asset_key=window_key, data_version=version_of(plan, done.events), metadata=window_metadata(plan, done)
        )
        value = {} if emit_to is not None else {"value": done.value}
        yield dg.MaterializeResult(asset_key=key, metadata=value_metadata(done), **value)

    remember(replay_window, replayed)
    return replay_window


def build_replay_schedule(
    asset: dg.AssetsDefinition,
    *,
    cron_schedule: str = "*/15 * * * *",
    most: int = 7,
    name: str | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """A schedule that replays each window once it is closed: ended, and its lateness passed.

    Args:
        asset: made by `build_replay_asset`.
        cron_schedule: how often to look.
        most: of the windows closed last, so many are looked at; older ones are for a backfill.
        name: of the schedule.
        default_status: off until somebody turns it on, unless told.

    Raises:
        InvalidSettingError: the asset is another one.
    """
    replayed = replayed_by(asset)
    job = _job_of(asset, replayed)

    @dg.schedule(
        name=name or f"{replayed.key.to_python_identifier()}_schedule",
        job=job,
        cron_schedule=cron_schedule,
        execution_timezone=replayed.partitions.timezone,
        default_status=default_status,
        description=f"Replays each window of {replayed.consumer.group} once it is closed.",
    )
    def replay_schedule(context: dg.ScheduleEvaluationContext) -> list[dg.RunRequest] | dg.SkipReason:
        now = context.scheduled_execution_time
        made = context.instance.get_materialized_partitions(replayed.key)
        due = [partition for partition in replayed.due(now, most) if partition not in made]
        if not due:
            return dg.SkipReason("every window that is closed has been replayed")
        return [dg.RunRequest(run_key=f"{replayed.key.to_user_string()}/{one}", partition_key=one) for one in due]

    return replay_schedule


def build_replay_sensor(
    asset: dg.AssetsDefinition,
    *,
    replay_stale: bool = True,
    name: str | None = None,
    minimum_interval_seconds: int = 60,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that marks partitions stale for which events have come late, and replays them.

    Args:
        asset: made by `build_replay_asset`, by event time.
        replay_stale: replay them; or only mark them, for a person or an automation condition.
        name: of the sensor.
        minimum_interval_seconds: how often to look.
        default_status: off until somebody turns it on, unless told.

    Raises:
        InvalidSettingError: the asset is another one.
    """
    replayed = replayed_by(asset)

    @dg.sensor(
        name=name or f"{replayed.key.to_python_identifier()}_sensor",
        job=_job_of(asset, replayed),
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description=f"Marks partitions of {replayed.key.to_user_string()} stale that lack events that came late.",
    )
    def replay_sensor(
        context: dg.SensorEvaluationContext, event_stream: SqlEventStream
    ) -> dg.SensorResult | dg.SkipReason:
        stream = event_stream.open()
        for topic in replayed.consumer.topics:
            stream.create_topic(topic)
        since = decode_ends(context.cursor)
        if not since:
            since = {at: span.begin for at, span in stream.log.spans(replayed.topics).items()}
        now = datetime.now(timezone.utc)
        stale, ends = find_stale(context.instance, stream, replayed, since, now)
        cursor = encode_ends(ends or since)
        if not stale:
            context.update_cursor(cursor)
            return dg.SkipReason("no event has come late")
        requests = [dg.RunRequest(run_key=f"{one.partition}/{cursor}", partition_key=one.partition) for one in stale]
        return dg.SensorResult(
            run_requests=requests if replay_stale else [],
            asset_events=list(mark_stale(replayed, stale, ends)),
            cursor=cursor,
        )

    return replay_sensor


def _job_of(asset: dg.AssetsDefinition, replayed: Replayed) -> Any:
    known = _jobs.get(asset)
    if known is None:
        known = _jobs[asset] = dg.define_asset_job(
            f"{replayed.key.to_python_identifier()}_job",
            selection=dg.AssetSelection.assets(*asset.keys),
            executor_def=dg.in_process_executor,
            description=f"Replays windows of {replayed.consumer.group}.",
        )
    return known


_jobs: "WeakKeyDictionary[dg.AssetsDefinition, Any]" = WeakKeyDictionary()


def replay_op(
    consumer: Consumer, *, emit_to: Mapping[Topic, Topic] | None = None, name: str | None = None
) -> dg.OpDefinition:
    """The same as an op: its config names offsets, a window of time, keys or ids; it returns the handler's value.

    Args:
        consumer: whose handler; without state.
        emit_to: shadow topics; what is emitted to others is dropped.
        name: of the op; ``replay_<consumer>`` unless given.
    """

    @dg.op(
        name=name or f"replay_{identifier(consumer.group)}",
        description=f"Replays {consumer.group}; no offset moves.",
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        code_version=consumer.code_version,
    )
    def replay_some(context: dg.OpExecutionContext, config: ReplayOpConfig) -> Any:
        stream = stream_of(context.resources)
        plan = _plan_of(stream, consumer, config)
        done = replay(
            stream,
            consumer,
            plan,
            emit_to=emit_to,
            resources={one: getattr(context.resources, one) for one in consumer.resource_names},
            max_events_per_second=config.max_events_per_second,
        )
        context.add_output_metadata({**value_metadata(done), "as_of": window_metadata(plan, done)["as_of"]})
        return done.value

    return replay_some


def _plan_of(stream: Any, consumer: Consumer, config: ReplayOpConfig) -> Any:
    topics = [topic.name for topic in consumer.topics]
    keys, ids = config.keys or None, config.ids or None
    if config.start is not None and config.end is not None:
        moments = [datetime.fromisoformat(text) for text in (config.start, config.end)]
        if config.by not in ("event_time", "append_time") or any(one.tzinfo is None for one in moments):
            raise InvalidSettingError(
                f"start={config.start!r}, end={config.end!r}, by={config.by!r}: give moments with a zone, and "
                "event_time or append_time",
                setting="start",
                value=config.start,
            )
        by: TimeOf = "event_time" if config.by == "event_time" else "append_time"
        found = plan_window(stream.log, topics, moments[0], moments[1], by=by)
        return found.of(keys, ids)
    spans = stream.log.spans(topics)
    ranges = [Range(at.topic, at.partition, span.begin, span.end) for at, span in sorted(spans.items())]
    if config.ranges:
        ranges = [
            Range(place.rpartition(":")[0], int(place.rpartition(":")[2]), *ends)
            for place, ends in config.ranges.items()
        ]
    return plan_ranges(stream.log, ranges, keys=keys, ids=ids)
