"""Streaming: a consumer as an asset, and a sensor that runs it as soon as something is pending.

A tick looks at committed offsets, epochs, deadlines, requests and runs in flight, and writes nothing. Its run request
carries a hint, never ranges: the run leases, recovers or cuts by itself. So no cursor, run key or tag matters for
correctness; wiping them all loses nothing.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from djp_dagster.errors import UnknownGroupError, UnknownTopicError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import RunReport, run_pending
from djp_dagster.resources import SqlEventStream
from djp_dagster.streams.stream import EventStream

AssetKeyLike = dg.AssetKey | str | Sequence[str]

GROUP_TAG = "djp/group"
DIGEST_TAG = "djp/digest"
STREAM_KEY = "event_stream"
_IN_FLIGHT = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_PAUSES_S = (0.0, 10.0, 60.0, 300.0, 900.0)


def build_stream_asset(
    consumer: Consumer, *, key: AssetKeyLike | None = None, group_name: str | None = "streaming"
) -> dg.AssetsDefinition:
    """The consumer as an asset: a run processes what is pending, and materializes if that was anything.

    Args:
        consumer: what to do.
        key: the asset's key; the consumer group's name unless given.
        group_name: the asset's group in the UI.
    """

    @dg.asset(
        key=key if key is not None else consumer.group,
        description=consumer.__doc__,
        group_name=group_name,
        code_version=consumer.code_version,
        kinds={"python"},
        required_resource_keys={STREAM_KEY, *consumer.resource_names},
        output_required=False,
        io_manager_def=_NothingStored(),
    )
    def stream_asset(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:  # type: ignore[type-arg]
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        reports: list[BatchReport] = []
        try:
            run_pending(
                resource.open(),
                consumer,
                resources={name: getattr(context.resources, name) for name in consumer.resource_names},
                state_folder=resource.state_path(),
                on_report=reports.append,
                owner=f"run-{context.run_id}",
            )
        finally:
            # What was committed is reported even if a later batch fails.
            if reports:
                context.log.info("committed %d batches", len(reports))
        if reports:
            yield dg.MaterializeResult(metadata=_metadata(RunReport(tuple(reports))))

    return stream_asset


class _NothingStored(dg.ConfigurableIOManager):
    """A stream asset's value lies in the stream; nothing is stored beside it."""

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        """Store nothing."""

    def load_input(self, context: dg.InputContext) -> object:
        """Not offered yet: read `EventStream.outputs`."""
        raise dg.DagsterInvariantViolationError(
            "a stream asset has no value of its own; read stream.outputs(group) of the event_stream resource"
        )


def _metadata(report: RunReport) -> Mapping[str, dg.MetadataValue]:
    seconds = sum(batch.seconds for batch in report.batches)
    last = report.batches[-1]
    return {
        "events": dg.MetadataValue.int(report.events),
        "batches": dg.MetadataValue.int(len(report.batches)),
        "emitted": dg.MetadataValue.int(sum(batch.emitted for batch in report.batches)),
        "dead_letters": dg.MetadataValue.int(sum(batch.dead_letters for batch in report.batches)),
        "seconds": dg.MetadataValue.float(seconds),
        "attempt": dg.MetadataValue.int(last.attempt),
        "reason": dg.MetadataValue.text(last.reason),
        "batch_id": dg.MetadataValue.text(last.batch_id),
    }


def build_stream_sensor(
    consumer: Consumer,
    *,
    name: str | None = None,
    asset: AssetKeyLike | None = None,
    minimum_interval_seconds: int = 5,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.STOPPED,
) -> dg.SensorDefinition:
    """A sensor that runs the consumer's asset whenever something is pending, one run at a time.

    Args:
        consumer: whose asset to run.
        name: the sensor's name; ``<group>_sensor`` unless given.
        asset: the asset's key, if `build_stream_asset` was given one.
        minimum_interval_seconds: how often to look; Dagster looks every 5 s at best.
        default_status: off until somebody turns it on, unless told.
    """
    job = dg.define_asset_job(
        f"{consumer.group}_job",
        selection=dg.AssetSelection.assets(asset if asset is not None else consumer.group),
        executor_def=dg.in_process_executor,
    )

    @dg.sensor(
        name=name or f"{consumer.group}_sensor",
        job=job,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STREAM_KEY},
        description=f"Runs {consumer.group} when something is pending for it.",
    )
    def stream_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        stream = getattr(context.resources, STREAM_KEY).open()
        reason = _what_is_due(stream, consumer)
        if reason is None:
            return dg.SensorResult(skip_reason="nothing is pending")
        return _request(context.instance, stream, consumer, reason)

    return stream_sensor


def _what_is_due(stream: EventStream, consumer: Consumer) -> str | None:
    coordinator = stream.coordinator
    try:
        info = coordinator.group(consumer.group)
    except UnknownGroupError:
        try:
            spans = stream.log.spans([topic.name for topic in consumer.topics])
        except UnknownTopicError:
            return None
        return "first events" if any(span.end > span.begin for span in spans.values()) else None
    pending = coordinator.pending(consumer.group)
    if pending.events:
        return f"{pending.events} events pending"
    due = coordinator.next_deadline(consumer.group, range(info.tasks))
    if due is not None and due <= pending.now_micros:
        return "a deadline is due"
    return "requests are open" if coordinator.requests(consumer.group) else None


def _request(instance: dg.DagsterInstance, stream: EventStream, consumer: Consumer, reason: str) -> dg.SensorResult:
    group = consumer.group
    if instance.get_runs(dg.RunsFilter(tags={GROUP_TAG: group}, statuses=_IN_FLIGHT), limit=1):
        return dg.SensorResult(skip_reason="a run is under way")
    digest = _digest(stream, group)
    finished = instance.get_run_records(
        dg.RunsFilter(
            tags={GROUP_TAG: group, DIGEST_TAG: digest},
            statuses=[
                dg.DagsterRunStatus.SUCCESS,
                dg.DagsterRunStatus.FAILURE,
                dg.DagsterRunStatus.CANCELED,
            ],
        ),
        limit=len(_PAUSES_S) * 20,
    )
    if finished:
        pause_s = _PAUSES_S[min(len(finished), len(_PAUSES_S) - 1)]
        since_s = stream.log.now_micros() / 1e6 - max(record.end_time or 0.0 for record in finished)
        if since_s < pause_s:
            return dg.SensorResult(
                skip_reason=f"{len(finished)} runs changed nothing; trying again in {pause_s - since_s:.0f} s"
            )
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=f"{group}:{digest}:{len(finished)}",
                tags={GROUP_TAG: group, DIGEST_TAG: digest, "djp/reason": reason},
            )
        ]
    )


def _digest(stream: EventStream, group: str) -> str:
    """What has been done, as a text that changes with every commit and every lease."""
    try:
        positions = sorted(stream.positions(group).items())
        epochs = [(task.task, task.epoch) for task in stream.coordinator.tasks(group)]
    except UnknownGroupError:
        positions, epochs = [], []
    return hashlib.sha256(repr((stream.incarnation, positions, epochs)).encode()).hexdigest()[:16]
