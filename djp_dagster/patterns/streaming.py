"""Streaming: react to events, within seconds by a run per micro-batch, or within milliseconds by a resident worker.

A consumer says what to do with a batch. Here is who does it, and when:

==========================  ==============================================================  ======================
`build_stream_asset`        *Materialize* does what is pending                              when somebody asks
`build_stream_sensor`       a run per micro-batch, one at a time                            p50 6 s, max 11.8 s
`build_worker_sensor`       runs that stay and loop over one or several consumers           milliseconds
==========================  ==============================================================  ======================

They may meet: the consumer group's lease lets one of them work on a task at a time, and the others wait or go away. A
tick moves nothing, and its run request is a hint; wiping cursors, run keys, tags and runs loses nothing.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dagster as dg

from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.assets import consumer_asset, topic_assets
from djp_dagster.orchestration.sensors import run_sensor
from djp_dagster.orchestration.standing import Suspects
from djp_dagster.orchestration.step import ProcessConfig, backlog_of, processed, stream_of
from djp_dagster.orchestration.supervision import Crew, crew_code_version, supervise
from djp_dagster.orchestration.tags import STREAM_KEY, consumer_key, identifier
from djp_dagster.orchestration.worker_run import WorkerConfig, work
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.leases import DEFAULT_LEASE_S
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.topics import Topic, check_name
from djp_dagster.units import Duration, is_count, parse_seconds

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from djp_dagster.orchestration.assets import AssetOptions


def build_stream_asset(consumer: Consumer, **options: "Unpack[AssetOptions]") -> dg.AssetsDefinition:
    """The consumer as an asset: a run processes what is pending, and materializes if that was anything.

    Upstream of it are the topics it reads. What its handler returns can be read downstream as `BatchOutputs`.

    Args:
        consumer: what to do.
        **options: what ``dg.asset`` takes: ``deps, group_name, owners, tags, kinds, metadata, description, pool,
            automation_condition, freshness_policy, backfill_policy, hooks, op_tags, resource_defs``. Its key, code
            version and retries are the consumer's.

    Raises:
        InvalidSettingError: an option that follows from the consumer.

    Example:
        >>> import djp_dagster as djp
        >>> @djp.consumer(topic=djp.Topic("clicks"))
        ... def count(batch):
        ...     batch.log.info("%d clicks", len(batch))
        >>> build_stream_asset(count, group_name="shop", owners=["team:shop"]).key.to_user_string()
        'count'
    """
    return consumer_asset(consumer, options=options)


def build_topic_assets(
    *consumers: Consumer | Topic, only: Sequence[Topic] | None = None, group_name: str | None = None
) -> list[dg.AssetSpec]:
    """The topics of the consumers as external assets ``topics/<name>``: lineage from topic to consumer to topic.

    Each topic should be made once, with all who emit to it; others refer to it by key.

    Args:
        *consumers: whose topics, read or emitted to; or topics by themselves.
        only: these of them; the others are made elsewhere.
        group_name: their group in the UI; that of everything without one, unless given.

    Raises:
        InvalidSettingError: two declarations of one topic differ; ``only`` names a topic of nobody's.
    """
    return topic_assets(consumers, only=only, group_name=group_name)


def build_stream_sensor(
    consumer: Consumer,
    *,
    name: str | None = None,
    run_tags: Mapping[str, str] | None = None,
    minimum_interval_seconds: int = 5,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that runs the consumer's asset whenever something is pending, one run at a time.

    The run does everything up to the ends it sees at its start, in batches of the consumer's ``max_batch``. A run that
    changed nothing is repeated after pauses of up to 15 minutes. A run whose lease has run out is reported as failed.

    Args:
        consumer: whose asset to run.
        name: the sensor's name; ``<group>_sensor`` unless given.
        run_tags: tags of the runs, such as a priority or what a launcher wants to know.
        minimum_interval_seconds: how often to look; Dagster looks every 5 s at best.
        default_status: off until somebody turns it on, unless told.
    """
    return run_sensor(
        consumer,
        run_tags=run_tags,
        threshold=None,
        name=name or f"{identifier(consumer.group)}_sensor",
        description=f"Runs {consumer.group} when something is pending for it.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
    )


def build_worker_sensor(
    consumers: Sequence[Consumer],
    *,
    name: str | None = None,
    workers: int = 1,
    lease: Duration = DEFAULT_LEASE_S,
    max_runtime: Duration | None = "24h",
    report_every: Duration = "30s",
    stuck_after: Duration = "10min",
    run_tags: Mapping[str, str] | None = None,
    pool: str | None = None,
    minimum_interval_seconds: int = 5,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that keeps worker runs at work: long runs that loop over the consumers, milliseconds behind the stream.

    Workers share the tasks (partitions) of each consumer evenly; if one dies, the others take over after one lease, and
    the sensor replaces it. On changed code or settings, or after ``max_runtime``, a new run starts, then takes over
    from the old one, about one lease once its batch is done. A terminated run finishes and commits the batch under way.
    Each worker run takes a place in Dagster's run queue for as long as it lives; a ``pool`` must have one place more
    than there are workers, or a hand-over waits a minute. Turning the sensor off, or renaming the workers, leaves their
    runs at work: terminate them.

    Args:
        consumers: what each worker runs.
        name: the name of the workers, ``worker`` unless given; the sensor is ``<name>_sensor``, its job ``<name>_job``.
        workers: how many runs; more than a consumer has partitions stand by.
        lease: how long the tasks of a dead worker stay blocked.
        max_runtime: how long one run stays; None for ever.
        report_every: at most one materialization per consumer and worker in this time.
        stuck_after: a batch that takes longer is reported as an error in the run's log.
        run_tags: tags of the runs, such as a priority or what a launcher wants to know.
        pool: a Dagster concurrency pool for the worker runs.
        minimum_interval_seconds: how often to look; Dagster looks every 5 s at best.
        default_status: off until somebody turns it on, unless told.

    Raises:
        InvalidSettingError: no consumer, two of one group, or no worker.
    """
    name = check_name("worker", name or "worker")
    config = {
        "lease": f"{parse_seconds(lease, name='lease')}s",
        "report_every": f"{parse_seconds(report_every, name='report_every')}s",
        "stuck_after": f"{parse_seconds(stuck_after, name='stuck_after')}s",
    }
    consumers = with_helpers(consumers)
    crew = _crew(name, consumers, workers, max_runtime, config)
    job = _worker_job(name, crew, pool)

    @dg.sensor(
        name=f"{identifier(name)}_sensor",
        job=job,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description=f"Keeps {workers} runs of {job.name} at work on "
        f"{', '.join(consumer.group for consumer in crew.consumers)}.",
    )
    def worker_sensor(context: dg.SensorEvaluationContext, event_stream: SqlEventStream) -> dg.SensorResult:
        stream = event_stream.open()
        mine = crew._replace(tag=f"{name}@{_location_of(context)}/{stream.incarnation[:8]}")
        suspects = Suspects(context.cursor)
        launches, told = supervise(context.instance, stream, mine, suspects)
        context.update_cursor(suspects.cursor)
        requests = [
            dg.RunRequest(
                run_key=launch.run_key,
                tags={**(run_tags or {}), **launch.tags},
                run_config={"ops": {job.name[: -len("_job")]: {"config": {**config, "replaces": launch.replaces}}}},
            )
            for launch in launches
        ]
        return dg.SensorResult(run_requests=requests) if requests else dg.SensorResult(skip_reason="; ".join(told))

    return worker_sensor


def process_batch_op(consumer: Consumer, *, name: str | None = None) -> dg.OpDefinition:
    """The same as an op: processes what is pending, and returns how many events that was.

    Args:
        consumer: what to do.
        name: the op's name; ``process_<group>`` unless given.
    """

    @dg.op(
        name=name or f"process_{identifier(consumer.group)}",
        description=consumer.__doc__,
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        code_version=consumer.code_version,
        out=dg.Out(int, description="How many events were processed."),
        tags={"kind": "python"},
    )
    def process_batch(context: dg.OpExecutionContext, config: ProcessConfig) -> int:
        with processed(context, consumer, config) as done:
            backlog = backlog_of(stream_of(context.resources), consumer.group)
            context.add_output_metadata(done.metadata(backlog))
            return done.events

    return process_batch


def with_helpers(consumers: Sequence[Consumer]) -> list[Consumer]:
    """The consumers, each after those it needs; see `Consumer.helpers`."""
    return [one for consumer in consumers for one in (*consumer.helpers, consumer)]


def _location_of(context: dg.SensorEvaluationContext) -> str:
    origin = context.code_location_origin
    return origin.location_name if origin is not None else ""


def _crew(
    name: str,
    consumers: Sequence[Consumer],
    workers: int,
    max_runtime: Duration | None,
    settings: Mapping[str, object],
) -> Crew:
    groups = [consumer.group for consumer in consumers]
    if not consumers or len(set(groups)) != len(groups):
        raise InvalidSettingError(
            f"worker {name!r} needs consumers of different groups, not {groups}", setting="consumers", value=groups
        )
    if not is_count(workers) or workers < 1:
        raise InvalidSettingError(f"workers={workers!r} must be 1 or more", setting="workers", value=workers)
    max_runtime_s = None if max_runtime is None else parse_seconds(max_runtime, name="max_runtime")
    return Crew(name, tuple(consumers), workers, crew_code_version(consumers, settings), max_runtime_s)


def _worker_job(name: str, crew: Crew, pool: str | None) -> dg.JobDefinition:
    keys = {consumer.group: consumer_key(consumer) for consumer in crew.consumers}
    resources = {name for consumer in crew.consumers for name in consumer.resource_names}

    # No retry policy: it would make Dagster start a terminated worker again.
    @dg.op(name=identifier(name), required_resource_keys={STREAM_KEY, *resources}, pool=pool)
    def run_worker(context: dg.OpExecutionContext, config: WorkerConfig) -> None:
        """Work until terminated or replaced."""
        work(context, crew.consumers, keys, crew.code_version, config)

    @dg.job(
        name=f"{identifier(name)}_job",
        executor_def=dg.in_process_executor,
        description=f"Resident: works on {', '.join(keys)} until terminated or replaced.",
    )
    def worker_job() -> None:
        run_worker()

    return worker_job
