"""Kappa: one stream serves the live consumer and its replay; one handler, two speeds.

`build_replay_asset` makes a time-partitioned asset of a consumer: a partition is the handler's return value for all
that happened in a window of time, and a backfill of partitions *is* the replay. It moves no offset; what the handler
emits is dropped, or goes to a shadow topic; ``batch.is_replay`` tells it so. Upstream of it is an asset that stands for
the records of each window: events that come late give it another data version, so that Dagster shows what was made of
them as stale.

State belongs to the whole of a stream: a stateful consumer is rebuilt beside the live one, and promoted.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any
from weakref import WeakKeyDictionary

import dagster as dg
from pydantic import Field

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.code_links import code_link
from djp_dagster.orchestration.replays import (
    ReplayConfig,
    Replayed,
    decode_seen,
    digest,
    encode_seen,
    find_stale,
    mark_stale,
    remember,
    replayed_by,
    value_metadata,
    version_of,
    window_metadata,
)
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key, identifier, topic_key
from djp_dagster.processing.consumer import Consumer
from djp_dagster.replaying.plan import ReplayPlan, TimeOf, parse_place, plan_ranges, plan_window
from djp_dagster.replaying.replay import replay, require_replayable
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.model import Range
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic
from djp_dagster.units import Duration, parse_seconds

_NUMBER = re.compile("-?[0-9]+")


class ReplayOpConfig(dg.Config):
    """Which records an op replays: offsets, or a window of time, or all; of them only some keys or ids."""

    ranges: dict[str, list[int]] = Field(
        default={}, description='Offsets by partition, from and to (not included): {"clicks:0": [0, 1200]}.'
    )
    start: str | None = Field(default=None, description="Or a window of time, from this moment on, with a zone.")
    end: str | None = Field(default=None, description="To this moment, not included.")
    by: str = Field(default="event_time", description="event_time or append_time.")
    keys: list[str] = Field(default=[], description="Only records of these keys; 42 is also the number.")
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
    Windows may be hours to months, in any time zone. A window that retention has begun to remove fails at once. A
    window without events is materialized without a value, and the handler is not called; a handler that returns
    nothing for others fails, unless it emits to shadow topics.

    Materialized with it is ``<name>_window``, which stands for the records: how many, and as of which offsets; the run
    config ``as_of`` reproduces a replay exactly.

    Args:
        consumer: whose handler; without state.
        partitions_def: the windows.
        by: ``"event_time"``, when events say they happened; or ``"append_time"``, when they came.
        lateness: how long after its end a window is left to be completed, by `build_replay_schedule`. Events that come
            after a partition was made, closed or not, mark it stale, by `build_replay_sensor`.
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
        InvalidSettingError: the consumer keeps state, or can only emit, and nowhere; or the windows are none of time.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.consumer(topic=djp.Topic("clicks"))
        ... def dashboard(batch):
        ...     return batch.to_pandas().groupby("page").size().reset_index()
        >>> daily = build_replay_asset(dashboard, partitions_def=dg.DailyPartitionsDefinition("2026-11-01"))
        >>> sorted(key.to_user_string() for key in daily.keys)
        ['dashboard_replay', 'dashboard_replay_window']
    """
    require_replayable(consumer, emit_to or {})
    if consumer.isolate == "per_event" and emit_to is None:
        raise InvalidSettingError(
            f"{consumer.group!r} handles events one by one, and returns nothing; its replay can only emit: "
            "build_replay_asset(emit_to={topic: shadow})",
            setting="emit_to",
            value=None,
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
    topics = {topic_key(topic) for topic in consumer.topics}
    tables = {consumer_key(table) for table in consumer.tables}
    common: dict[str, Any] = {"owners": owners, "tags": tags}
    outs = {
        "window": dg.AssetOut(
            key=window_key,
            dagster_type=dg.Nothing,
            description=f"The records of {', '.join(replayed.topics)} in each window, which {key.to_user_string()} is "
            "made of: how many, and as of which offsets. Both are materialized together.",
            kinds={"stream"},
            code_version="1",
            **common,
        ),
        "value": dg.AssetOut(
            key=key,
            description=description or consumer.__doc__,
            kinds={"python"},
            metadata=code_link(consumer.handler),
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
        deps=sorted(topics | tables),
        internal_asset_deps={"window": topics, "value": {window_key} | tables},
        partitions_def=partitions_def,
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        group_name=group_name,
    )
    def replay_window(context: dg.AssetExecutionContext, config: ReplayConfig) -> Iterator[dg.MaterializeResult[Any]]:
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        stream = resource.open()
        _create_topics(stream, consumer)
        window = context.partition_time_window
        plan = plan_window(stream.log, replayed.topics, window.start, window.end, by=by, as_of=config.ends())
        done = replay(
            stream,
            consumer,
            plan,
            emit_to=emit_to,
            resources={one: getattr(context.resources, one) for one in consumer.resource_names},
            max_events_per_second=(
                max_events_per_second if config.max_events_per_second is None else config.max_events_per_second
            ),
            state_folder=resource.state_path(),
        )
        if done.value is None and done.events and emit_to is None:
            raise InvalidSettingError(
                f"the handler of {consumer.group!r} returned nothing for {done.events} events, and its replay emits "
                "nowhere: return a value, or name a shadow topic: build_replay_asset(emit_to={topic: shadow})",
                setting="emit_to",
                value=None,
            )
        yield dg.MaterializeResult(
            asset_key=window_key, data_version=version_of(plan, done.events), metadata=window_metadata(plan, done)
        )
        # Of a window without events there is nothing to store; not every IO manager can store None.
        value = {} if emit_to is not None or not done.events else {"value": done.value}
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

    A window that was made before is replayed again then. One whose run fails is not asked for again.

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
        due = replayed.due(context.instance, context.scheduled_execution_time, most)
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

    Windows that were made before they were closed are only marked: `build_replay_schedule` replays them once they are.
    What happened so long ago that its window was never made is nobody's.

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
        _create_topics(stream, replayed.consumer)
        seen = decode_seen(context.cursor)
        stale, seen = find_stale(context.instance, stream, replayed, seen, datetime.now(timezone.utc))
        if not stale:
            context.update_cursor(encode_seen(seen))
            return dg.SkipReason("no event has come late")
        requests = [
            dg.RunRequest(run_key=f"{one.partition}/{digest(seen)}", partition_key=one.partition)
            for one in stale
            if replay_stale and one.is_closed
        ]
        return dg.SensorResult(
            run_requests=requests,
            asset_events=list(mark_stale(replayed, stale, seen)),
            cursor=encode_seen(seen),
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

    Raises:
        InvalidSettingError: the consumer keeps state, or a shadow topic does not fit.
    """
    require_replayable(consumer, emit_to or {})

    @dg.op(
        name=name or f"replay_{identifier(consumer.group)}",
        description=f"Replays {consumer.group}; no offset moves.",
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        code_version=consumer.code_version,
    )
    def replay_some(context: dg.OpExecutionContext, config: ReplayOpConfig) -> Any:
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        stream = resource.open()
        _create_topics(stream, consumer)
        plan = _plan_of(stream, consumer, config)
        done = replay(
            stream,
            consumer,
            plan,
            emit_to=emit_to,
            resources={one: getattr(context.resources, one) for one in consumer.resource_names},
            max_events_per_second=config.max_events_per_second,
            state_folder=resource.state_path(),
        )
        context.add_output_metadata({**value_metadata(done), "as_of": window_metadata(plan, done)["as_of"]})
        return done.value

    return replay_some


def _create_topics(stream: EventStream, consumer: Consumer) -> None:
    for topic in consumer.topics:
        stream.create_topic(topic)


def _plan_of(stream: EventStream, consumer: Consumer, config: ReplayOpConfig) -> ReplayPlan:
    topics = [topic.name for topic in consumer.topics]
    keys: list[str | int] | None = [*config.keys, *map(int, filter(_NUMBER.fullmatch, config.keys))] or None
    if config.start is None and config.end is None:
        spans = stream.log.spans(topics)
        ranges = [Range(at.topic, at.partition, span.begin, span.end) for at, span in sorted(spans.items())]
        return plan_ranges(stream.log, _ranges_of(config) or ranges, keys=keys, ids=config.ids or None)
    if config.ranges or config.start is None or config.end is None or config.by not in ("event_time", "append_time"):
        raise InvalidSettingError(
            f"start={config.start!r}, end={config.end!r}, by={config.by!r}, ranges={config.ranges}: give start and "
            "end, by event_time or append_time; or ranges",
            setting="start",
            value=config.start,
        )
    by: TimeOf = "event_time" if config.by == "event_time" else "append_time"
    found = plan_window(stream.log, topics, _moment(config.start), _moment(config.end), by=by)
    return found.of(keys, config.ids or None)


def _ranges_of(config: ReplayOpConfig) -> list[Range]:
    found = []
    for place, ends in config.ranges.items():
        if len(ends) != 2:
            raise InvalidSettingError(
                f"ranges={{{place!r}: {ends}}} must be two offsets, from and to", setting="ranges", value=ends
            )
        found.append(Range(*parse_place(place, setting="ranges"), *ends))
    return found


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))  # which Python 3.10 does not know
    except ValueError as error:
        raise InvalidSettingError(
            f"{text!r} is no moment; write it like 2026-11-20T00:00+01:00", setting="start", value=text
        ) from error
